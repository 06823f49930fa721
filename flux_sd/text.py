"""Prompts to token ids for CLIP and T5, padded and cut as released, with a report of what was cut. Floor 2.

Mirrors what candle-transformers' FLUX example does with the `tokenizers` crate; the ids are those of
transformers' CLIPTokenizer and T5Tokenizer. Everything about a vocabulary (size, special ids) comes from its
files. Where a folder holds two kinds of file, `tokenizer.json` is taken: it states its whole pipeline.

The two kinds of T5 file differ on odd prompts only. `spiece.model` does not know the sentinels
`<extra_id_0>` to `<extra_id_99>`, so it reads them as ordinary text; where a literal `</s>`, `<pad>` or
`<unk>` is glued to the next word, a new word begins there, which the released `tokenizer.json` does not do;
and the `tokenizers` library loses the second of two combining marks.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from .errors import MissingFileError, PromptTooLongError, RequestError, TokenizerError

CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
T5_PAD, T5_END, T5_UNKNOWN = "<pad>", "</s>", "<unk>"
CLIP_FILES = ("tokenizer.json", "vocab.json")  # in the order of preference
T5_FILES = ("tokenizer.json", "spiece.model")
# CLIP's words: contractions, runs of letters, single digits, runs of anything else but white space.
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
# A group in unescaped parentheses that ends in a colon and a number, with a decimal point or behind no digit:
# a time of day and a ratio are text.
WEIGHTED = re.compile(r"(?<!\\)\([^()]*(?::\s*[+-]?\d*\.\d+|[^()\d\s]\s*:\s*[+-]?\d)\s*\)")
MESSAGE_CHARACTERS = 120  # of the dropped text that a message quotes


@dataclass(frozen=True)
class PromptReport:
    """How much of a prompt one encoder reads. `kept + dropped` is the prompt, to the character.

    A character of which only some tokens fit counts as dropped.
    """

    encoder: str  # "CLIP", "CLIP 2" or "T5"
    limit: int  # tokens that the encoder takes, the special ones among them
    tokens: int  # that the whole prompt would need, the special ones among them
    kept: str
    dropped: str
    cut: bool

    @property
    def message(self) -> str:
        """One sentence for the user."""
        if not self.cut:
            return f"{self.encoder} reads the whole prompt"
        quote = self.dropped
        if len(quote) > MESSAGE_CHARACTERS:
            quote = quote[: MESSAGE_CHARACTERS - 3] + "..."
        return f"{self.encoder} reads the first {self.limit} of {self.tokens} tokens; cut: {quote.strip()!r}"


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids of one prompt, exactly as long as asked for, and what became of the prompt."""

    ids: list[int]
    tokens: int  # that the whole prompt would need, the special ones among them
    report: PromptReport


def describe_cut(reports: Sequence[PromptReport]) -> str | None:
    """A note on every encoder if any of them cut the prompt, else None."""
    if not any(report.cut for report in reports):
        return None
    return ". ".join(report.message for report in reports)


def describe_weighting(prompt: str) -> str | None:
    """A note on a part of the prompt that is written in another program's syntax for weights, such as
    `(word:1.3)`; None without one. Plain parentheses and escaped ones (`\\(`) are text."""
    found = WEIGHTED.search(prompt)
    if found is None:
        return None
    return f"weights are not interpreted: {found.group()!r} is read as text, parentheses and number included"


def require_whole(reports: Sequence[PromptReport]) -> None:
    """Raises PromptTooLongError if any encoder cut the prompt: the strict mode."""
    note = describe_cut(reports)
    if note is not None:
        raise PromptTooLongError(f"the prompt is too long: {note}. Shorten it, or allow it to be cut")


@dataclass(frozen=True)
class _Pieces:
    """A prompt without special tokens at its ends."""

    ids: list[int]
    starts: list[int]  # the character of the prompt at which each token begins


class _Backend(Protocol):
    """What turns text into pieces, and knows its vocabulary."""

    @property
    def vocab_size(self) -> int: ...

    def id_of(self, token: str) -> int | None: ...

    def pieces(self, prompt: str) -> _Pieces: ...


class ClipTokenizer:
    """CLIP's byte-level BPE. Lower-cases, and wraps the prompt in a start and an end token.

    encoder: what a report calls the encoder it is for. pad_token: what fills a short prompt: the end token
    (None) for FLUX, SD 1.5 and SDXL's first encoder, "!" for SD 2 and SDXL's second.
    """

    def __init__(
        self, backend: _Backend, source: str, encoder: str = "CLIP", pad_token: str | None = None
    ) -> None:
        self._backend, self.encoder = backend, encoder
        self.vocab_size = backend.vocab_size  # highest id + 1: the embedding needs at least as many rows
        self.bos_id = _special(backend, CLIP_START, source)
        self.eos_id = _special(backend, CLIP_END, source)
        self.pad_id = self.eos_id if pad_token is None else _special(backend, pad_token, source)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], encoder: str = "CLIP", pad_token: str | None = None
    ) -> ClipTokenizer:
        """From `tokenizer.json`, or from `vocab.json` with `merges.txt` beside it, or a folder of these.

        Raises MissingFileError or TokenizerError.
        """
        file = _locate(Path(path), CLIP_FILES, "CLIP")
        if file.name == "merges.txt":
            file = _locate(file.with_name("vocab.json"), CLIP_FILES, "CLIP")
        text = _read_text(file)
        content = _read_object(text, file)
        if isinstance(content.get("model"), dict):  # in a vocabulary, "model" is a token
            return cls(_json_backend(text, content, file, "BPE", "CLIP"), file.name, encoder, pad_token)
        merges = _locate(file.with_name("merges.txt"), CLIP_FILES, "CLIP")
        return cls(_clip_backend(content, file, merges), file.name, encoder, pad_token)

    def encode(self, prompt: str, length: int = 77, pad_id: int | None = None) -> EncodedPrompt:
        """`length` ids: start, text, end, then pads (`pad_id`, or the tokenizer's own); a cut keeps the end
        token in the last place.

        Raises RequestError for a length below 2 or a prompt that is not valid text.
        """
        if length < 2:
            raise RequestError(
                f"CLIP length {length} has no room for the start and end tokens: give 2 or more"
            )
        pad = self.pad_id if pad_id is None else pad_id
        pieces = self._backend.pieces(_valid(prompt))
        ids = [self.bos_id, *pieces.ids[: length - 2], self.eos_id]
        report = _report(self.encoder, prompt, pieces, limit=length, room=length - 2, specials=2)
        return EncodedPrompt(ids + [pad] * (length - len(ids)), report.tokens, report)


class T5Tokenizer:
    """T5's SentencePiece unigram model. No start token; one end token."""

    def __init__(self, backend: _Backend, source: str) -> None:
        self._backend = backend
        self.vocab_size = backend.vocab_size  # highest id + 1: the embedding needs at least as many rows
        self.pad_id = _special(backend, T5_PAD, source)
        self.eos_id = _special(backend, T5_END, source)
        self.unk_id = _special(backend, T5_UNKNOWN, source)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> T5Tokenizer:
        """From `tokenizer.json` or `spiece.model`, or a folder of these.

        Raises MissingFileError or TokenizerError.
        """
        file = _locate(Path(path), T5_FILES, "T5")
        data = _read_bytes(file)
        if data.lstrip()[:1] != b"{":
            return cls(_SentencePieceBackend(data, file), file.name)
        text = _read_text(file)
        return cls(_json_backend(text, _read_object(text, file), file, "Unigram", "T5"), file.name)

    def encode(self, prompt: str, length: int, keep_end_token: bool = True) -> EncodedPrompt:
        """`length` ids: text, end, then pads.

        A cut keeps the end token in the last place, as released; with `keep_end_token=False` it is lost, as
        in Candle.
        Raises RequestError for a length below 1 or a prompt that is not valid text.
        """
        if length < 1:
            raise RequestError(f"T5 length {length} leaves no room for the end token: give 1 or more")
        pieces = self._backend.pieces(_valid(prompt))
        room = length - 1 if keep_end_token else length
        ids = [*pieces.ids[:room], self.eos_id][:length]
        report = _report("T5", prompt, pieces, limit=length, room=room, specials=1)
        return EncodedPrompt(ids + [self.pad_id] * (length - len(ids)), report.tokens, report)


def _report(encoder: str, prompt: str, pieces: _Pieces, limit: int, room: int, specials: int) -> PromptReport:
    cut = len(pieces.ids) > room
    at = pieces.starts[room] if cut else len(prompt)
    return PromptReport(encoder, limit, len(pieces.ids) + specials, prompt[:at], prompt[at:], cut)


def _valid(prompt: str) -> str:
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the prompt is not valid Unicode at character {error.start}: retype it"
        ) from error
    return prompt


def _special(backend: _Backend, token: str, source: str) -> int:
    token_id = backend.id_of(token)
    if token_id is None:
        raise TokenizerError(f"{source} has no token {token!r}: it is another model's tokenizer, or damaged")
    return token_id


class _JsonBackend:
    """Any pipeline of the `tokenizers` library."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.no_truncation()  # a file may carry both; lengths are ours to decide
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def id_of(self, token: str) -> int | None:
        token_id: int | None = self._tokenizer.token_to_id(token)
        return token_id

    def pieces(self, prompt: str) -> _Pieces:
        encoding = self._tokenizer.encode(prompt, add_special_tokens=False)
        return _Pieces(list(encoding.ids), [start for start, _ in encoding.offsets])


class _SentencePieceBackend:
    """A SentencePiece model, with the literal names of its special pieces recognised inside the text."""

    def __init__(self, data: bytes, file: Path) -> None:
        try:
            if not data:
                raise RuntimeError("the file is empty")
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError as error:
            raise TokenizerError(
                f"{file} is no SentencePiece model, or damaged ({len(data)} bytes): download it again"
            ) from error
        self.vocab_size: int = self._model.get_piece_size()
        ids = (self._model.pad_id(), self._model.eos_id(), self._model.unk_id())
        self._specials = {self._model.id_to_piece(i): i for i in ids if i >= 0}
        self._split = re.compile("(" + "|".join(re.escape(piece) for piece in self._specials) + ")")

    def id_of(self, token: str) -> int | None:
        return self._specials.get(token)

    def pieces(self, prompt: str) -> _Pieces:
        ids: list[int] = []
        starts: list[int] = []
        offset = 0
        for part in self._split.split(prompt):
            if part in self._specials:
                ids.append(self._specials[part])
                starts.append(offset)
            else:
                ids.extend(self._model.encode(part, out_type=int))
                starts.extend(offset + start for start in self._starts(part))
            offset += len(part)
        return _Pieces(ids, starts)

    def _starts(self, part: str) -> list[int]:
        # The pieces, one after another, are the normalized text; its characters know where they came from.
        origins: list[int] = self._model.normalize(part, with_offsets=True)[1]
        starts, at = [], 0
        for piece in self._model.encode(part, out_type=str):
            starts.append(origins[at])
            at += len(piece)
        return starts


def _json_backend(text: str, content: dict[str, Any], file: Path, kind: str, encoder: str) -> _JsonBackend:
    """The pipeline that `tokenizer.json` states, if its model is of the right kind."""
    model = content.get("model")
    found = model.get("type") if isinstance(model, dict) else "none"
    if found != kind:
        raise TokenizerError(
            f"{file} holds a tokenizer of kind {found}; {encoder} needs {kind}: are the files swapped?"
        )
    try:
        return _JsonBackend(Tokenizer.from_str(text))
    except Exception as error:  # the library raises nothing narrower
        raise TokenizerError(f"{file} is no readable tokenizer.json ({error}): download it again") from error


def _clip_backend(vocabulary: dict[str, Any], file: Path, merges: Path) -> _JsonBackend:
    """The pipeline of CLIP around a vocabulary and its merges."""
    if not vocabulary or not all(type(value) is int and value >= 0 for value in vocabulary.values()):
        raise TokenizerError(f"{file} is no vocabulary: expected one JSON object from token to id")
    for token in (CLIP_START, CLIP_END):
        if token not in vocabulary:
            raise TokenizerError(f"{file} has no token {token!r}: it is no vocabulary of a CLIP text encoder")
    try:
        model = models.BPE(
            vocab=vocabulary,
            merges=_read_merges(merges),
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token=CLIP_END,
        )
    except TokenizerError:
        raise
    except Exception as error:  # the library raises nothing narrower
        raise TokenizerError(f"{file} and {merges} do not belong together ({error})") from error
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    # As the released files declare them: the start token is found after lower-casing, the end token before.
    start, end = AddedToken(CLIP_START, normalized=True), AddedToken(CLIP_END, normalized=False)
    tokenizer.add_special_tokens([start, end])
    return _JsonBackend(tokenizer)


def _read_merges(file: Path) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(_read_text(file).split("\n"), 1):
        if line.startswith("#version") or not line.strip():
            continue
        pair = line.rstrip("\r").split(" ")
        if len(pair) != 2:
            raise TokenizerError(f"{file}, line {number}: expected two symbols with a space, found {line!r}")
        merges.append((pair[0], pair[1]))
    return merges


def _locate(path: Path, names: Sequence[str], encoder: str) -> Path:
    """The file itself, or the first of `names` in a folder. Raises MissingFileError."""
    for file in [path / name for name in names] if path.is_dir() else [path]:
        if file.is_file():
            return file
    kinds = {"CLIP": "tokenizer.json, or vocab.json with merges.txt", "T5": "tokenizer.json or spiece.model"}
    found = "holds no" if path.is_dir() else "does not exist as a"
    raise MissingFileError(f"{path} {found} {encoder} tokenizer: expected {kinds[encoder]}")


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{file} cannot be read: {error.strerror}") from error


def _read_text(file: Path) -> str:
    try:
        return _read_bytes(file).decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(
            f"{file} is no text at byte {error.start}: wrong kind of file, or damaged"
        ) from error


def _read_object(text: str, file: Path) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{file} is not valid JSON ({error}): download it again") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{file} is no tokenizer: expected an object, found {type(content).__name__}")
    return content

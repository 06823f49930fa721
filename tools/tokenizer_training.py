"""Trains tokenizers of the kinds that the released models ship: CLIP's byte-level BPE and T5's unigram model.

Needs `tokenizers` and `sentencepiece` only. Both writers give both kinds of file, with equal ids:
`vocab.json` + `merges.txt` + `tokenizer.json`, and `spiece.model` + `tokenizer.json`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from flux_sd.text import CLIP_END, CLIP_START, CLIP_WORDS, T5_END, T5_PAD, T5_UNKNOWN

END_OF_WORD = "</w>"


def train_clip(corpus: Iterable[str], pieces: int, folder: Path) -> None:
    """Writes `vocab.json`, `merges.txt` and `tokenizer.json` of at most `pieces` tokens (at least 514).

    As in the released vocabulary: 256 byte symbols, the same at the end of a word, merges in their order,
    then the start and the end token, which therefore has the highest id.
    """
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(unk_token=CLIP_END, end_of_word_suffix=END_OF_WORD))
    learner.normalizer, learner.pre_tokenizer = _clip_normalizer(), _clip_words()
    learner.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=pieces - 2,
            special_tokens=[],
            initial_alphabet=symbols,
            end_of_word_suffix=END_OF_WORD,
            show_progress=False,
        ),
    )
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    merges = merges[: pieces - 2 - 2 * len(symbols)]
    tokens = [
        *symbols,
        *(s + END_OF_WORD for s in symbols),
        *(a + b for a, b in merges),
        CLIP_START,
        CLIP_END,
    ]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _write_json(_clip_pipeline(vocabulary, merges), folder / "tokenizer.json")


def _clip_normalizer() -> Any:
    return normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )


def _clip_words() -> Any:
    split = pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True)
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def _clip_pipeline(vocabulary: dict[str, int], merges: list[tuple[str, ...]]) -> Tokenizer:
    pairs = [(a, b) for a, b in merges]
    model = models.BPE(vocab=vocabulary, merges=pairs, unk_token=CLIP_END, end_of_word_suffix=END_OF_WORD)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer = _clip_normalizer(), _clip_words()
    tokenizer.decoder = decoders.ByteLevel()
    start, end = vocabulary[CLIP_START], vocabulary[CLIP_END]
    tokenizer.add_special_tokens(
        [AddedToken(CLIP_START, normalized=True), AddedToken(CLIP_END, normalized=False)]
    )
    tokenizer.post_processor = processors.RobertaProcessing(
        (CLIP_END, end), (CLIP_START, start), trim_offsets=False, add_prefix_space=False
    )
    return tokenizer


def train_t5(corpus: Iterable[str], pieces: int, folder: Path, rules: Path | None = None) -> None:
    """Writes `spiece.model` and `tokenizer.json` of `pieces` tokens: pad 0, end 1, unknown 2, as released.

    `rules`: a SentencePiece normalization table (TSV) in place of nmt_nfkc, which takes a quarter of
    a megabyte.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = io.BytesIO()
    options = {"normalization_rule_tsv": str(rules)} if rules else {"normalization_rule_name": "nmt_nfkc"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=written,
        model_type="unigram",
        vocab_size=pieces,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece=T5_PAD,
        eos_piece=T5_END,
        unk_piece=T5_UNKNOWN,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    model = _without_path(written.getvalue()) if rules else written.getvalue()
    (folder / "spiece.model").write_bytes(model)
    _write_json(t5_pipeline(model), folder / "tokenizer.json")


def _without_path(model: bytes) -> bytes:
    """The same model without the name of the file that its rules came from (needs protobuf)."""
    from sentencepiece import sentencepiece_model_pb2

    content = sentencepiece_model_pb2.ModelProto.FromString(model)
    content.normalizer_spec.ClearField("normalization_rule_tsv")
    cleaned: bytes = content.SerializeToString()
    return cleaned


def t5_pipeline(model: bytes) -> Tokenizer:
    """The `tokenizers` pipeline with the ids of a serialized SentencePiece unigram model."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    size, unknown = processor.get_piece_size(), processor.unk_id()
    vocabulary = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(size)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=unknown, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Precompiled(_charsmap(model)),
            normalizers.Strip(left=False, right=True),
            normalizers.Replace(Regex(" {2,}"), "▁"),
        ]
    )
    # "always": a word begins after a special token inside the text too, as SentencePiece has it.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme="always")
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False) for token in (T5_PAD, T5_END, T5_UNKNOWN)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", T5_END], special_tokens=[(T5_END, processor.eos_id())]
    )
    return tokenizer


def _charsmap(model: bytes) -> bytes:
    """The normalization table in a serialized model: field 3 (normalizer_spec), in it field 2."""
    spec = next(value for field, value in _fields(model) if field == 3)
    return next((value for field, value in _fields(spec) if field == 2), b"")


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """(field number, content) of each length-delimited field of a protobuf message; others are skipped."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 0:
            _, at = _varint(message, at)
        elif kind == 2:
            size, at = _varint(message, at)
            yield key >> 3, message[at : at + size]
            at += size
        else:
            at += {1: 8, 5: 4}[kind]


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _write_json(tokenizer: Tokenizer, file: Path) -> None:
    file.write_text(tokenizer.to_str() + "\n", encoding="utf-8")

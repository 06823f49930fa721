"""Tokenizers of the released kinds, trained on the captions: CLIP's byte-level BPE, T5's unigram pieces."""

import base64
import io
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Regex, pre_tokenizers

CLIP_SIZE = 1024
T5_SIZE = 1000
START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# Beyond the captions: what any prompt in a Latin script may hold.
T5_LETTERS = (
    "".join(map(chr, [*range(33, 127), *range(0xA1, 0xAD), *range(0xAE, 0x100)]))
    + "\u2013\u2014\u2018\u2019\u201c\u201d\u20ac"
)


def byte_letters() -> list[str]:
    """The printable stand-ins for the 256 bytes, in the released vocabulary's order."""
    shown = [*range(33, 127), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(b) for b in shown] + [chr(256 + i) for i in range(256 - len(shown))]


def learn_merges(texts: list[str], count: int) -> list[tuple[str, str]]:
    """The pairs that byte-pair encoding joins, most frequent first; ties go to the pair that sorts first."""
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    frequency = Counter(word for text in texts for word, _ in split.pre_tokenize_str(text.lower()))
    words = {word: [*word[:-1], word[-1] + "</w>"] for word in frequency}
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, pieces in words.items():
            for pair in pairwise(pieces):
                pairs[pair] += frequency[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = {word: _merged(pieces, best) for word, pieces in words.items()}
    return merges


def _merged(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    i = 0
    while i < len(pieces):
        joined = tuple(pieces[i : i + 2]) == pair
        merged.append(pieces[i] + pieces[i + 1] if joined else pieces[i])
        i += 2 if joined else 1
    return merged


def write_clip(texts: list[str], folder: Path) -> None:
    """vocab.json, merges.txt and tokenizer.json with the two small configuration files."""
    letters = byte_letters()
    base = letters + [letter + "</w>" for letter in letters]
    merges = learn_merges(texts, CLIP_SIZE - len(base) - 2)
    pieces = base + [a + b for a, b in merges] + [START, END]
    if len(set(pieces)) != len(pieces):
        raise SystemExit("two merges gave the same piece: change the size of the CLIP vocabulary")
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    _write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _write_json(folder / "tokenizer.json", _clip_json(vocabulary, merges))
    declared = {START: True, END: False}
    shown = {name: _token(START if name == "bos_token" else END, declared) for name in
             ("bos_token", "eos_token", "pad_token", "unk_token")}  # fmt: skip
    _write_json(folder / "special_tokens_map.json", shown)
    added = {str(vocabulary[token]): {**_token(token, declared), "special": True} for token in (START, END)}
    names = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    config = {"add_prefix_space": False, "added_tokens_decoder": added, **names, "do_lower_case": True,
              "errors": "replace", "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}  # fmt: skip
    _write_json(folder / "tokenizer_config.json", config)


def _token(content: str, normalized: dict[str, bool]) -> dict[str, Any]:
    flags = {
        "lstrip": False,
        "normalized": normalized.get(content, False),
        "rstrip": False,
        "single_word": False,
    }
    return {"content": content, **flags}


def _clip_json(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> dict[str, Any]:
    declared = {START: True, END: False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split = {"type": "Split", "pattern": {"Regex": CLIP_WORDS}, "behavior": "Removed", "invert": True}
    spaces = {"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocabulary[t], "special": True, **_token(t, declared)} for t in (START, END)],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, spaces, {"type": "Lowercase"}]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {
            "type": "RobertaProcessing", "sep": [END, vocabulary[END]], "cls": [START, vocabulary[START]],
            "trim_offsets": False, "add_prefix_space": False,
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": END, "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>", "fuse_unk": False, "vocab": vocabulary,
            "merges": [f"{a} {b}" for a, b in merges],
        },
    }  # fmt: skip


def write_t5(texts: list[str], folder: Path) -> None:
    """spiece.model and tokenizer.json with the two small configuration files."""
    stored = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=stored, model_type="unigram", vocab_size=T5_SIZE,
        normalization_rule_name="nmt_nfkc", character_coverage=1.0, required_chars=T5_LETTERS,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, pad_piece="<pad>", eos_piece="</s>", unk_piece="<unk>",
        num_threads=1, minloglevel=2,
    )  # fmt: skip
    data = stored.getvalue()
    (folder / "spiece.model").write_bytes(data)
    model = sentencepiece.SentencePieceProcessor(model_proto=data)
    pieces = [[model.id_to_piece(i), model.get_score(i)] for i in range(model.get_piece_size())]
    _write_json(folder / "tokenizer.json", _t5_json(pieces, charsmap(data)))
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    _write_json(
        folder / "special_tokens_map.json", {name: _token(token, {}) for name, token in names.items()}
    )
    added = {str(i): {**_token(pieces[i][0], {}), "special": True} for i in range(3)}
    config = {"added_tokens_decoder": added, **names, "extra_ids": 0, "model_max_length": 512,
              "tokenizer_class": "T5Tokenizer"}  # fmt: skip
    _write_json(folder / "tokenizer_config.json", config)


def _t5_json(pieces: list[list[Any]], precompiled: bytes) -> dict[str, Any]:
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "add_prefix_space": True}
    sequence, end = (
        ({"Sequence": {"id": key, "type_id": 0}} for key in "AB"),
        {"SpecialToken": {"id": "</s>", "type_id": 0}},
    )
    first, second = sequence
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "special": True, **_token(pieces[i][0], {})} for i in range(3)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(precompiled).decode()},
                {"type": "Strip", "strip_left": False, "strip_right": True},
                {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "\u2581"},
            ],
        },
        "pre_tokenizer": {**metaspace, "prepend_scheme": "first"},
        "post_processor": {
            "type": "TemplateProcessing", "single": [first, end], "pair": [first, end, second, end],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "decoder": {**metaspace, "prepend_scheme": "always"},
        "model": {"type": "Unigram", "unk_id": 2, "vocab": pieces, "byte_fallback": False},
    }  # fmt: skip


def charsmap(data: bytes) -> bytes:
    """The compiled normalisation inside a spiece.model: field 2 of its message in field 3."""
    return _fields(_fields(data)[3][0])[2][0]


def _fields(data: bytes) -> dict[int, list[bytes]]:
    """The length-delimited fields of one protocol buffer message, by number."""
    found: dict[int, list[bytes]] = {}
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            _, at = _varint(data, at)
        else:
            size, at = _varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            found.setdefault(key >> 3, []).append(data[at : at + size])
            at += size
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

"""Writes what transformers makes of 200 strings: `reference_outputs/tokenizers/`.

    python tools/make_tokenizer_references.py [--train] [--hub FOLDER]

Runs in an environment of its own (see tools/make_oracle_references.py), with protobuf in it so that
transformers can read a SentencePiece model. The strings stand in `strings.json`, some with just as many
tokens as an encoder takes and one more or less. `--train` first trains the small tokenizers of
`tests/data/tokenizers/`; `--hub` (or FLUX_SD_HUB_DIR) names a folder shaped like the hub for the released
vocabularies, of which only the ids are kept.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import sys
import tempfile
import unicodedata
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the tool runs where flux_sd is not installed

from flux_sd.text import CLIP_END, CLIP_START  # noqa: E402
from tools.tokenizer_training import train_clip, train_t5  # noqa: E402

DATA = ROOT / "tests" / "data" / "tokenizers"
OUT = ROOT / "reference_outputs" / "tokenizers"
HUB_CLIP = "black-forest-labs/FLUX.1-dev/tokenizer"
HUB_T5_JSON = "black-forest-labs/FLUX.1-dev/tokenizer_2"
HUB_T5_SPIECE = "t5-v1_1-xxl"
# As the released folders have it; without it transformers looks for the start token before lower-casing.
CLIP_CONFIG = {
    "bos_token": {"__type": "AddedToken", "content": CLIP_START, "normalized": True},
    "eos_token": {"__type": "AddedToken", "content": CLIP_END, "normalized": False},
}
TINY_CLIP_TOKENS = 714  # 512 byte symbols, 200 merges, start and end
TINY_T5_TOKENS = 260


def _captions() -> Iterator[str]:
    things = (
        "pizza cat dog horse robot rocket tree star moon apple banana castle bridge guitar violin owl".split()
    )
    colours = "red orange yellow green blue violet white black".split()
    for thing, colour in itertools.product(things, colours):
        yield f"{thing}, {colour} background"
        yield f"a photo of the {thing} on a {colour} background"
        yield f"the {colour} {thing} is walking on the beach"
        yield f"An oil painting of a {thing} and the {colour} sea, by the river; the end."


def _strings() -> list[str]:
    texts: list[str] = json.loads((OUT / "strings.json").read_text(encoding="utf-8"))
    return texts


def train() -> None:
    """The small tokenizers of the default tests."""
    corpus = [*_captions(), *filter(str.isascii, _strings())]
    train_clip(corpus, TINY_CLIP_TOKENS, DATA / "clip")
    with tempfile.TemporaryDirectory() as folder:
        rules = Path(folder) / "rules.tsv"
        rules.write_text(_rules(), encoding="utf-8")
        train_t5(corpus, TINY_T5_TOKENS, DATA / "t5", rules)


def _rules() -> str:
    """A small part of nmt_nfkc: NFKC of a few blocks, white space to space, some characters to none."""
    table: dict[str, str] = {}
    blocks = [
        (0x80, 0x250),
        (0x1E00, 0x1F00),
        (0x2000, 0x2200),
        (0x2460, 0x2500),
        (0x3000, 0x3100),
        (0xFB00, 0xFB10),
    ]
    for first, last in [*blocks, (0xFF00, 0xFFEF)]:
        for character in map(chr, range(first, last)):
            for form in (character, unicodedata.normalize("NFD", character)):
                normal = unicodedata.normalize("NFKC", character)
                if form != normal:
                    table[form] = normal
    table |= dict.fromkeys("\t\n\r\u2028\u2029\u200b\ufeff\u2581", " ")
    table |= dict.fromkeys(map(chr, [*range(1, 9), 11, 12, *range(14, 32), 127]), "")
    code = "\t".join
    lines = [
        code([" ".join(f"{ord(c):X}" for c in form), " ".join(f"{ord(c):X}" for c in normal)])
        for form, normal in sorted(table.items())
    ]
    return "\n".join(lines) + "\n"


def _load(kind: str, folder: Path, files: list[str]) -> Any:
    """transformers' tokenizer over these files and nothing else of the folder."""
    from transformers import CLIPTokenizer, PreTrainedTokenizerFast, T5Tokenizer

    with tempfile.TemporaryDirectory() as alone:
        for name in files:
            shutil.copy(folder / name, alone)
        if kind == "CLIPTokenizer":
            (Path(alone) / "tokenizer_config.json").write_text(json.dumps(CLIP_CONFIG), encoding="utf-8")
        if kind == "pipeline":  # the file's own pipeline, nothing rebuilt
            return PreTrainedTokenizerFast(tokenizer_file=str(Path(alone) / files[0]))
        return {"CLIPTokenizer": CLIPTokenizer, "T5Tokenizer": T5Tokenizer}[kind].from_pretrained(alone)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--hub", default=os.environ.get("FLUX_SD_HUB_DIR"))
    options = parser.parse_args()
    if options.train:
        train()
    sources = {
        "clip_tiny": ("CLIPTokenizer", DATA / "clip", ["vocab.json", "merges.txt"]),
        "clip_tiny_json": ("pipeline", DATA / "clip", ["tokenizer.json"]),
        "t5_tiny_spiece": ("T5Tokenizer", DATA / "t5", ["spiece.model"]),
        "t5_tiny_json": ("pipeline", DATA / "t5", ["tokenizer.json"]),
    }
    if options.hub:
        hub = Path(options.hub)
        sources["clip_released"] = ("CLIPTokenizer", hub / HUB_CLIP, ["vocab.json", "merges.txt"])
        sources["t5_released_spiece"] = ("T5Tokenizer", hub / HUB_T5_SPIECE, ["spiece.model"])
        sources["t5_released_json"] = ("pipeline", hub / HUB_T5_JSON, ["tokenizer.json"])
    texts = _strings()
    for name, source in sources.items():
        tokenizer = _load(*source)
        _write(OUT / f"{name}.json", [tokenizer(text).input_ids for text in texts])
        print(f"{name}: {type(tokenizer).__name__}, {len(tokenizer)} tokens")
    manifest = {
        "what": "ids, special ones among them, neither cut nor padded, one row per line of strings.json",
        "command": "python tools/make_tokenizer_references.py --train --hub FOLDER",
        "versions": {name: version(name) for name in ("transformers", "tokenizers", "sentencepiece")},
        "files": {name: {"class": kind, "from": files} for name, (kind, _, files) in sources.items()},
        "pipeline": "PreTrainedTokenizerFast(tokenizer_file=...): the file's own pipeline",
        "released": f"{HUB_CLIP}, {HUB_T5_SPIECE} and {HUB_T5_JSON} of the hub; vocabularies not stored",
        "tolerance": "exact",
    }
    (OUT / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _write(file: Path, rows: list[Any]) -> None:
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    file.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()

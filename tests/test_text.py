"""Tokenizers: ids against transformers' stored ones, lengths, what is reported as cut, and bad files.

The references are written by tools/make_tokenizer_references.py. About 2 seconds.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import flux_sd
from flux_sd.errors import MissingFileError, PromptTooLongError, RequestError, TokenizerError
from flux_sd.text import ClipTokenizer, T5Tokenizer, describe_cut, describe_weighting, require_whole

ROOT = Path(__file__).resolve().parent.parent
STORED = ROOT / "reference_outputs" / "tokenizers"
TINY = ROOT / "tests" / "data" / "tokenizers"
HUB = os.environ.get("FLUX_SD_HUB_DIR")
EMBEDDED = Path(flux_sd.__file__).parent / "models" / "tiny_flux"
STRINGS: list[str] = json.loads((STORED / "strings.json").read_text(encoding="utf-8"))
ENOUGH = 2000  # tokens: nothing is cut

Tokenizer = ClipTokenizer | T5Tokenizer

# Where SentencePiece itself and transformers' rebuilt pipeline part, and we follow SentencePiece.
SENTINEL = "spiece.model holds no sentinels; transformers adds them"
NEXT_LINE = "transformers splits at U+0085; SentencePiece takes it for a letter"
EXCEPTIONS = {
    "<extra_id_0>": SENTINEL,
    "a <extra_id_0> b <extra_id_99> c": SENTINEL,
    "a<extra_id_1>b": SENTINEL,
    "next\x85line": NEXT_LINE,
}
# The tokenizers library loses the second combining mark of a letter.
TWO_MARKS = "e\u0301\u0327 order e\u0327\u0301"
# After a special token inside the text a released tokenizer.json (not the small one) continues the word.
GLUED = ("a cat</s>a dog", "a<unk>b<pad>c")


def whole_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    encoded = tokenizer.encode(text, ENOUGH)
    assert not encoded.report.cut
    return encoded.ids[: encoded.tokens]


def differing(tokenizer: Tokenizer, name: str) -> set[str]:
    stored = json.loads((STORED / f"{name}.json").read_text(encoding="utf-8"))
    assert len(stored) == len(STRINGS) == 200
    pairs = zip(STRINGS, stored, strict=True)
    return {text for text, ids in pairs if whole_ids(tokenizer, text) != ids}


def hub(folder: str) -> Path:
    if HUB is None:
        pytest.skip(
            "the released vocabularies are not in the repository: set FLUX_SD_HUB_DIR to a hub-shaped folder"
        )
    return Path(HUB) / folder


@pytest.fixture(scope="module")
def clip() -> ClipTokenizer:
    return ClipTokenizer.load(TINY / "clip" / "vocab.json")


@pytest.fixture(scope="module")
def t5() -> T5Tokenizer:
    return T5Tokenizer.load(TINY / "t5" / "spiece.model")


# ---------------------------------------------------------------- ids


def test_ids_of_the_small_tokenizers(clip: ClipTokenizer, t5: T5Tokenizer) -> None:
    assert differing(clip, "clip_tiny") == set()
    assert differing(ClipTokenizer.load(TINY / "clip" / "tokenizer.json"), "clip_tiny_json") == set()
    assert differing(t5, "t5_tiny_spiece") == set(EXCEPTIONS)
    assert differing(T5Tokenizer.load(TINY / "t5" / "tokenizer.json"), "t5_tiny_json") == set()


def test_ids_of_the_released_clip() -> None:
    tokenizer = ClipTokenizer.load(hub("black-forest-labs/FLUX.1-dev/tokenizer"))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (49408, 49406, 49407)
    assert tokenizer.encode("a cat").ids == [49406, 320, 2368] + [49407] * 74
    second = ClipTokenizer.load(hub("stabilityai/stable-diffusion-xl-base-1.0/tokenizer_2"), "CLIP 2", "!")
    assert second.encode("a cat").ids == [49406, 320, 2368, 49407] + [0] * 73
    assert differing(tokenizer, "clip_released") == set()


@pytest.mark.parametrize("kind", ["spiece", "json"])
def test_ids_of_the_released_t5(kind: str) -> None:
    folder = {"spiece": "t5-v1_1-xxl", "json": "black-forest-labs/FLUX.1-dev/tokenizer_2"}[kind]
    tokenizer = T5Tokenizer.load(hub(folder))
    assert tokenizer.vocab_size == {"spiece": 32000, "json": 32100}[kind]
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2)
    rusty = [71, 3, 9277, 63, 7567, 3214, 30, 3, 9, 2608, 1]
    assert tokenizer.encode("A rusty robot walking on a beach", 256).ids == rusty + [0] * 245
    assert tokenizer.encode("hello  world", 4).ids == [21820, 296, 1, 0]
    expected = set(EXCEPTIONS) | {TWO_MARKS} if kind == "spiece" else set()
    assert differing(tokenizer, f"t5_released_{kind}") == expected


@pytest.mark.parametrize("folder", [TINY / "{}", EMBEDDED / "tokenizer{}"], ids=["small", "embedded"])
def test_both_kinds_of_file_give_equal_ids(folder: Path) -> None:
    embedded = folder.parent == EMBEDDED
    if embedded and not EMBEDDED.is_dir():
        pytest.skip("flux_sd/models/tiny_flux is not there yet")
    clip_folder = Path(str(folder).format("" if embedded else "clip"))
    t5_folder = Path(str(folder).format("_2" if embedded else "t5"))
    clips = [ClipTokenizer.load(clip_folder / name) for name in ("vocab.json", "tokenizer.json")]
    t5s = [T5Tokenizer.load(t5_folder / name) for name in ("spiece.model", "tokenizer.json")]
    assert [c.eos_id for c in clips] == [c.vocab_size - 1 for c in clips]  # the end token has the highest id
    assert [(t.pad_id, t.eos_id, t.unk_id) for t in t5s] == [(0, 1, 2)] * 2
    assert [x for x in STRINGS if whole_ids(clips[0], x) != whole_ids(clips[1], x)] == []
    unequal = {x for x in STRINGS if whole_ids(t5s[0], x) != whole_ids(t5s[1], x)}
    assert unequal <= ({TWO_MARKS, *GLUED} if embedded else set())


def test_a_folder_with_both_kinds_is_read_from_tokenizer_json(tmp_path: Path) -> None:
    for name, load in (("clip", ClipTokenizer.load), ("t5", T5Tokenizer.load)):
        folder = shutil.copytree(TINY / name, tmp_path / name)
        for other in ("vocab.json", "spiece.model"):
            if (folder / other).exists():
                (folder / other).write_text("damaged")
        load(folder)
        (folder / "tokenizer.json").write_text("{")
        with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
            load(folder)


# ---------------------------------------------------------------- lengths


@pytest.mark.parametrize("tokens", [75, 76, 77, 78, 255])
def test_clip_pads_with_the_end_token_and_keeps_it_when_cutting(clip: ClipTokenizer, tokens: int) -> None:
    text = " ".join(["the"] * (tokens - 2))
    encoded = clip.encode(text)
    the = clip.encode("the").ids[1]
    assert encoded.tokens == tokens and len(encoded.ids) == 77
    body = min(tokens, 77) - 2
    assert encoded.ids == [clip.bos_id] + [the] * body + [clip.eos_id] * (76 - body)
    assert encoded.report.cut == (tokens > 77)
    assert encoded.report.kept.split() == ["the"] * body


@pytest.mark.parametrize("length", [256, 512])
@pytest.mark.parametrize("over", [-1, 0, 1])
@pytest.mark.parametrize("kind", ["spiece.model", "tokenizer.json"])
def test_t5_around_its_limits(kind: str, length: int, over: int) -> None:
    t5 = T5Tokenizer.load(TINY / "t5" / kind)
    the = t5.encode("the", 2).ids[0]
    text = " ".join(["the"] * (length + over - 1))
    released, candle = t5.encode(text, length), t5.encode(text, length, keep_end_token=False)
    assert released.tokens == candle.tokens == length + over
    if over < 0:
        expected = [the] * (length - 2) + [1, 0]
        assert released.ids == candle.ids == expected
    else:
        assert released.ids == [the] * (length - 1) + [1]
        assert candle.ids == ([the] * (length - 1) + [1] if over == 0 else [the] * length)
    # At one over, Candle loses the end token and none of the text.
    assert (released.report.cut, candle.report.cut) == (over > 0, False)


def test_other_pads_and_lengths(clip: ClipTokenizer, t5: T5Tokenizer) -> None:
    the, mark = clip.encode("the").ids[1], json.loads((TINY / "clip" / "vocab.json").read_text())["!"]
    second = ClipTokenizer.load(TINY / "clip", "CLIP 2", "!")
    assert second.pad_id == mark and clip.pad_id == clip.eos_id
    assert (
        second.encode("the", 5).ids
        == clip.encode("the", 5, pad_id=mark).ids
        == [clip.bos_id, the, clip.eos_id, mark, mark]
    )
    assert clip.encode("", 2).ids == [clip.bos_id, clip.eos_id]
    assert t5.encode("", 3).ids == [t5.eos_id, t5.pad_id, t5.pad_id]
    with pytest.raises(RequestError, match="CLIP length 1"):
        clip.encode("the", 1)
    with pytest.raises(RequestError, match="T5 length 0"):
        t5.encode("the", 0)
    with pytest.raises(TokenizerError, match="<nothing>"):
        ClipTokenizer.load(TINY / "clip", pad_token="<nothing>")


# ---------------------------------------------------------------- what was cut


def test_kept_and_dropped_make_the_prompt(clip: ClipTokenizer, t5: T5Tokenizer) -> None:
    tokenizers: list[Tokenizer] = [clip, t5, T5Tokenizer.load(TINY / "t5" / "tokenizer.json")]
    for tokenizer in tokenizers:
        cuts = 0
        for text in STRINGS:
            for length in (3, 6, 13, 77):
                encoded = tokenizer.encode(text, length)
                report = encoded.report
                assert report.kept + report.dropped == text
                assert len(encoded.ids) == report.limit == length
                assert report.cut == (encoded.tokens > length) and (report.cut or report.dropped == "")
                cuts += report.cut
        assert cuts > 300


@pytest.mark.parametrize("kind", ["spiece.model", "tokenizer.json"])
def test_the_dropped_text_begins_with_the_first_dropped_token(clip: ClipTokenizer, kind: str) -> None:
    prompt = "the  red\nﬁ \U0001f355 the end"
    t5 = T5Tokenizer.load(TINY / "t5" / kind)
    for encode, specials in ((clip.encode, 2), (t5.encode, 1)):
        kept = [encode(prompt, n).report.kept for n in range(1 + specials, 40)]
        assert kept[0].strip() == "the"
        assert kept == sorted(kept, key=len) and kept[-1] == prompt
        assert all(text == prompt or not text.endswith("\U0001f355 th") for text in kept)
        # CLIP spells the pizza with four tokens: with fewer it counts as dropped.
        before = next(text for text in kept if "ﬁ" in text)
        assert before.rstrip() == "the  red\nﬁ"


def test_both_kinds_of_t5_file_cut_at_the_same_character(t5: T5Tokenizer) -> None:
    other = T5Tokenizer.load(TINY / "t5" / "tokenizer.json")
    literal_marks = "\u2581under \u2581\u2581 score"  # become spaces, of which the kinds keep different ones
    for text in STRINGS:
        for length in (2, 3, 5, 9, 17, 31):
            ours, theirs = (tokenizer.encode(text, length).report.kept for tokenizer in (t5, other))
            assert text == literal_marks or ours.split() == theirs.split(), (text, length)


def test_the_report_says_what_was_cut(clip: ClipTokenizer, t5: T5Tokenizer) -> None:
    prompt = "the red cat and the blue dog"
    reports = [clip.encode(prompt, 6).report, t5.encode(prompt, 256).report]
    assert (reports[0].kept.rstrip(), reports[0].dropped.lstrip()) == ("the red cat and", "the blue dog")
    assert reports[1].message == "T5 reads the whole prompt"
    note = describe_cut(reports)
    assert note == "CLIP reads the first 6 of 9 tokens; cut: 'the blue dog'. T5 reads the whole prompt"
    with pytest.raises(PromptTooLongError, match="the blue dog"):
        require_whole(reports)
    assert describe_cut(reports[1:]) is None
    require_whole(reports[1:])
    assert len(clip.encode("the " * 500, 6).report.message) < 200


def test_a_prompt_that_is_no_text(clip: ClipTokenizer, t5: T5Tokenizer) -> None:
    for encode in (clip.encode, t5.encode):
        with pytest.raises(RequestError, match="character 4"):
            encode("cat \udcff", 77)


# ---------------------------------------------------------------- bad files


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"vocab\.json with merges\.txt"):
        ClipTokenizer.load(tmp_path)
    with pytest.raises(MissingFileError, match=r"spiece\.model"):
        T5Tokenizer.load(tmp_path)
    with pytest.raises(MissingFileError, match="nowhere"):
        T5Tokenizer.load(tmp_path / "nowhere")
    shutil.copy(TINY / "clip" / "vocab.json", tmp_path)
    with pytest.raises(MissingFileError, match=r"merges\.txt"):
        ClipTokenizer.load(tmp_path)
    shutil.copy(TINY / "clip" / "merges.txt", tmp_path)
    assert whole_ids(ClipTokenizer.load(tmp_path / "merges.txt"), "the")


@pytest.mark.parametrize("file", ["t5/tokenizer.json", "t5/spiece.model"])
def test_t5_files_given_as_clip(file: str) -> None:
    with pytest.raises(TokenizerError, match=file):
        ClipTokenizer.load(TINY / file)


@pytest.mark.parametrize("file", ["clip/tokenizer.json", "clip/vocab.json", "clip/merges.txt"])
def test_clip_files_given_as_t5(file: str) -> None:
    with pytest.raises(TokenizerError, match=file):
        T5Tokenizer.load(TINY / file)


DAMAGE = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "a list": lambda data: b"[1, 2]",
    "an object": lambda data: b'{"a": "b"}',
    "half a pipeline": lambda data: b'{"model": {"type": "Unigram"}}',
    "deep": lambda data: b'{"a":' * 100_000,
    "not text": lambda data: b"\xff" * 100,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    "file", ["clip/tokenizer.json", "clip/vocab.json", "t5/tokenizer.json", "t5/spiece.model"]
)
def test_damaged_files(tmp_path: Path, file: str, damage: str) -> None:
    folder = shutil.copytree((TINY / file).parent, tmp_path / "files")
    damaged = folder / Path(file).name
    damaged.write_bytes(DAMAGE[damage](damaged.read_bytes()))
    load = ClipTokenizer.load if file.startswith("clip") else T5Tokenizer.load
    with pytest.raises(TokenizerError, match=damaged.name) as caught:
        load(damaged)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("merges", "found"),
    [("#version: 0.2\nt h\nbroken\n", "line 3"), ("#version: 0.2\nno such\n", "do not belong together")],
)
def test_merges_that_do_not_fit(tmp_path: Path, merges: str, found: str) -> None:
    shutil.copy(TINY / "clip" / "vocab.json", tmp_path)
    (tmp_path / "merges.txt").write_text(merges)
    with pytest.raises(TokenizerError, match=found):
        ClipTokenizer.load(tmp_path)


def test_a_vocabulary_without_the_special_tokens(tmp_path: Path) -> None:
    shutil.copy(TINY / "clip" / "merges.txt", tmp_path)
    vocabulary = json.loads((TINY / "clip" / "vocab.json").read_text(encoding="utf-8"))
    del vocabulary["<|startoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(TokenizerError, match="startoftext"):
        ClipTokenizer.load(tmp_path)


def test_a_second_encoder_reports_under_its_own_name() -> None:
    second = ClipTokenizer.load(TINY / "clip", "CLIP 2", "!")
    report = second.encode("the " * 100).report
    assert report.message.startswith("CLIP 2 reads the first 77 of 102 tokens")


@pytest.mark.parametrize(
    ("prompt", "quoted"),
    [
        ("a (red:1.3) kite", "(red:1.3)"),
        ("a ((very red:1.1) sky)", "(very red:1.1)"),
        ("(sky2 : .5)", "(sky2 : .5)"),
        ("(low quality:2)", "(low quality:2)"),
        ("(red:-1.5)", "(red:-1.5)"),
        ("a (red) kite", None),
        ("a ((red)) kite", None),
        (r"a \(red:1.3\) kite", None),
        ("a clock (at 10:30) in 16:9 (4:3)", None),
        ("note: 1.3", None),
    ],
)
def test_weights_are_reported_and_plain_parentheses_are_not(prompt: str, quoted: str | None) -> None:
    note = describe_weighting(prompt)
    assert (note is None) == (quoted is None)
    assert quoted is None or repr(quoted) in str(note)

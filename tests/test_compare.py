"""`flux-sd compare`: the numbers, the first stage that differs, names of other programs, the report."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flux_sd import compare as compare_module
from flux_sd.checkpoint import open_checkpoint
from flux_sd.cli import main
from flux_sd.compare import CELLS, PIXELS, Comparison, Row, Tolerances, compare
from flux_sd.compare_names import NameRule, our_names, read_names
from flux_sd.compare_report import LEVELS, html_report
from flux_sd.errors import RequestError
from flux_sd.model_loader import Model
from flux_sd.record_file import RecordWriter
from flux_sd.request import GenerationRequest
from flux_sd.trace import trace

APPLE = GenerationRequest("a red apple", width=64, height=64, seed=3, steps=1)
TWO = {"step.0.img": torch.randn(1, 6, 8), "clip.ids": torch.arange(1, 8)}


def compared(folder: Path, a: Mapping[str, Tensor], b: Mapping[str, Tensor], **options: Any) -> Comparison:
    for name, tensors in (("a", a), ("b", b)):
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / f"{name}.safetensors")
    with (
        open_checkpoint(folder / "a.safetensors") as first,
        open_checkpoint(folder / "b.safetensors") as second,
    ):
        return compare(first, second, **options)


def one(folder: Path, a: Tensor, b: Tensor, **options: Any) -> Row:
    (row,) = compared(folder, {"x": a}, {"x": b}, **options).rows
    return row


# ------------------------------------------------------------------------------------- planted errors


@pytest.fixture(scope="module")
def sound(tiny_flux: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compare") / "sound.safetensors"
    trace(tiny_flux, APPLE, path)
    return path


def retraced(model: Model, path: Path, role: str = "transformer", weight: str = "") -> Path:
    """A record of the same run, with one weight of the network half as large again."""
    parameter = model.components.network(role).get_parameter(weight) if weight else torch.ones(1)
    kept = parameter.detach().clone()
    with torch.no_grad():
        parameter.mul_(1.5)
    try:
        trace(model, APPLE, path)
    finally:
        with torch.no_grad():
            parameter.copy_(kept)
    return path


@pytest.mark.parametrize(
    ("role", "weight", "first"),
    [
        ("transformer", "double_blocks.1.txt_mlp.2.bias", "step.0.double_blocks.1.txt"),
        ("transformer", "single_blocks.2.norm.key_norm.scale", "step.0.single_blocks.2"),
        ("t5", "encoder.block.1.layer.1.DenseReluDense.wo.weight", "t5.encoder.block.1"),
        ("clip", "text_model.encoder.layers.1.mlp.fc1.weight", "clip.text_model.encoder.layers.1"),
        ("vae", "decoder.up.1.block.0.conv2.weight", "vae.decoder.up.1.block.0"),
    ],
)
def test_a_planted_error_is_found_where_it_is(
    role: str, weight: str, first: str, tiny_flux: Model, sound: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    planted = retraced(tiny_flux, tmp_path / "planted.safetensors", role, weight)
    assert main(["compare", str(planted), str(sound)]) == 1
    said = capsys.readouterr().out
    assert f"first divergence: {first} (OVER" in said
    (line,) = [line for line in said.splitlines() if line.endswith("<-- the first")]
    assert line.split()[0] == first


def test_two_equal_runs_report_zero(
    tiny_flux: Model, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = retraced(tiny_flux, tmp_path / "again.safetensors")
    assert main(["compare", str(again), str(sound), "--tolerance", "0", "--complete", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["passes"] and said["first_over"] is None and said["compared"] == len(said["stages"]) > 50
    assert {(stage["verdict"], stage["max_abs"], stage["relative"]) for stage in said["stages"]} == {
        ("equal", 0, 0)
    }


# ------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("piece", [7, 2**20])
@pytest.mark.parametrize("shape", [(1, 5, 3), (2, 5, 3), (1, 4, 6, 5), (40,), (3, 200)])
def test_the_numbers(
    shape: tuple[int, ...], piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64 over the whole tensor, however it is cut into pieces."""
    monkeypatch.setattr(compare_module, "PIECE", piece)
    b = torch.randn(shape)
    a = b + 1e-3 * torch.randn(shape)
    row = one(tmp_path, a, b, tolerances=Tolerances(1e-2))
    x, y = a.double().flatten(), b.double().flatten()
    assert row.max_abs == float((x - y).abs().max())
    assert row.relative == pytest.approx(float((x - y).norm() / y.norm()), rel=1e-12)
    assert row.cosine == pytest.approx(float(x @ y / (x.norm() * y.norm())), rel=1e-12)
    assert row.verdict == "within" and len(row.strip) <= CELLS


@pytest.mark.parametrize("piece", [8, 2**20])
@pytest.mark.parametrize(
    ("shape", "where", "cell"),
    [
        ((2, 6, 8), (1, 4, 3), 4),  # a token of the second picture
        ((1, 8, 12, 16), (0, 3, 6, 0), CELLS // 2),  # a pixel at the left edge of the middle row
        ((2, 300), (0, 299), CELLS - 1),
    ],
)
def test_the_strip_shows_where(
    shape: tuple[int, ...], where: tuple[int, ...], cell: int, piece: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(compare_module, "PIECE", piece)
    b = torch.ones(shape)
    a = b.clone()
    a[where] += 0.5
    row = one(tmp_path, a, b)
    assert [i for i, value in enumerate(row.strip) if value] == [cell]
    positions = shape[-2] * shape[-1] if len(shape) == 4 else shape[1]
    elements = b.numel() // positions * sum(p * len(row.strip) // positions == cell for p in range(positions))
    assert row.strip[cell] == pytest.approx(0.5 / math.sqrt(elements))


@pytest.mark.parametrize(
    ("a", "b", "verdict", "relative"),
    [
        (torch.zeros(3), torch.zeros(3), "equal", 0.0),
        (torch.ones(3), torch.zeros(3), "over", math.inf),
        (torch.zeros(3), torch.ones(3), "over", 1.0),
        (torch.empty(0, 3), torch.empty(0, 3), "equal", 0.0),
        (torch.tensor(2.0), torch.tensor([2.0]), "equal", 0.0),
        (torch.ones(2, 3).bfloat16(), torch.ones(1, 1, 2, 3, dtype=torch.float64), "equal", 0.0),
        (torch.arange(3), torch.arange(3).to(torch.uint32), "equal", 0.0),
        (torch.ones(3, dtype=torch.bool), torch.ones(3, dtype=torch.int8), "equal", 0.0),
    ],
)
def test_corners(a: Tensor, b: Tensor, verdict: str, relative: float, tmp_path: Path) -> None:
    row = one(tmp_path, a, b)
    assert (row.verdict, row.relative) == (verdict, relative)
    assert not math.isnan(row.cosine)


def test_one_wrong_token_id_is_a_difference(tmp_path: Path) -> None:
    """Among 77 ids near 49407 it is a relative difference of 2e-6."""
    b = torch.full((1, 77), 49407)
    a = b.clone()
    a[0, 3] = 49406
    row = one(tmp_path, a, b)
    assert row.relative < 3e-6 and row.verdict == "over"
    assert one(tmp_path, a, b, tolerances=Tolerances(None, (("x", 1e-5),))).verdict == "within"


def test_pixels_may_be_rounded_to_the_next_level(tmp_path: Path) -> None:
    b = torch.full((1, 3, 16, 16), 120, dtype=torch.uint8)
    a = b.clone()
    a[0, 0, :4] += 1
    few = one(tmp_path, a, b)
    assert few.verdict == "within" and few.tolerance == PIXELS
    assert one(tmp_path, b + 1, b).verdict == "over"


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", [(1, 0), (0, 1), (1, 1)])
def test_what_is_not_finite_never_passes(
    where: tuple[int, int], value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sides = [torch.ones(4, 6) for _ in range(2)]
    for side, bad in zip(sides, where, strict=True):
        if bad:
            side[2, 5] = value
    row = one(tmp_path, *sides, tolerances=Tolerances(1e9))
    assert row.verdict == "not finite" and row.not_finite == where and not row.passes
    files = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
    assert main(["compare", *files, "--tolerance", "1e9", "--html", str(tmp_path / "r.html")]) == 1
    assert f"NOT FINITE: {where[0]} values in A, {where[1]} in B" in capsys.readouterr().out
    assert "not finite" in (tmp_path / "r.html").read_text("utf-8")
    assert main(["compare", *files, "--json"]) == 1
    (stage,) = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["stages"]
    assert stage["not_finite"] == list(where)


def test_other_shapes_are_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = compared(tmp_path, {"x": torch.ones(2, 3), **TWO}, {"x": torch.ones(3, 2), **TWO})
    assert [row.name for row in found.rows if not row.passes] == ["x"] and not found.passes
    assert main(["compare", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]) == 1
    assert "SHAPE: [2, 3] in A, [3, 2] in B <-- the first" in capsys.readouterr().out


# --------------------------------------------------------------------------- which stages, which order


def test_stages_of_one_file_only_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = {f"step.1.{letter}": torch.ones(1) for letter in "abcdef"}
    found = compared(tmp_path, {**TWO, **more}, {**TWO, "z": torch.ones(1)})
    assert found.only == (tuple(more), ("z",)) and found.passes
    files = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
    assert main(["compare", *files]) == 0
    said = capsys.readouterr().out
    assert (
        "only in A: step.1.a, step.1.b, step.1.c, step.1.d, ... (6 in all)" in said and "only in B: z" in said
    )
    assert main(["compare", *files, "--complete"]) == 1


def test_nothing_in_common_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not compared(tmp_path, {"x": torch.ones(1)}, {"y": torch.ones(1)}).passes
    files = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
    assert main(["compare", *files, "--html", str(tmp_path / "r.html")]) == 1
    assert "nothing was compared" in capsys.readouterr().out
    assert "nothing was compared" in (tmp_path / "r.html").read_text("utf-8")


def test_the_order_is_that_of_the_run(tmp_path: Path) -> None:
    """As a record says; of files that do not say, by number and the usual order of stages."""
    names = ["clip.ids", "t5.block.2", "t5.block.10", "noise", "step.2.x", "step.10.a", "vae.up", "image"]
    tensors = {name: torch.ones(2) for name in names}
    assert [row.name for row in compared(tmp_path, tensors, tensors).rows] == names
    with (tmp_path / "ours.safetensors").open("w+b") as file:
        writer = RecordWriter(file)
        for name in reversed(names):
            writer.add(name, tensors[name])
        writer.finish({})
    for files in (("a", "ours"), ("ours", "b")):
        first, second = (open_checkpoint(tmp_path / f"{file}.safetensors") for file in files)
        assert [row.name for row in compare(first, second).rows] == names[::-1]


def test_the_usual_order_of_stable_diffusion(tmp_path: Path) -> None:
    """As `candle_reference run` records it, and as we do."""
    names = [
        "ids", "ids_2", "uncond.clip.ids", "uncond.clip_2.ids", "clip.ids", "clip_2.ids", "init.latents",
        "masked.latents", "mask", "uncond.clip.hidden", "clip.hidden", "hidden", "noise", "timesteps",
        "step.0.latents", "step.1.latents", "step.10.latents", "latents", "image", "pixels",
    ]  # fmt: skip
    tensors = {name: torch.ones(2) for name in reversed(names)}
    assert [row.name for row in compared(tmp_path, tensors, tensors).rows] == names


def test_only_stages_that_match(tmp_path: Path) -> None:
    both = (tmp_path, TWO, {**TWO, "z": torch.ones(1)})
    found = compared(*both, patterns=["step.*", "z"])
    assert [row.name for row in found.rows] == ["step.0.img"] and found.only == ((), ("z",))
    with pytest.raises(RequestError, match="no stage of either file matches 'none'"):  # a slip of the pen
        compared(*both, patterns=["step.*", "none"])


def test_tolerances_by_pattern(tmp_path: Path) -> None:
    b = {f"step.{i}.x": torch.ones(4) for i in range(3)}
    a = {name: tensor * 1.01 for name, tensor in b.items()}
    tolerances = Tolerances(1.0, (("step.*", 1e-3), ("step.1.x", 0.1)))
    verdicts = [row.verdict for row in compared(tmp_path, a, b, tolerances=tolerances).rows]
    assert verdicts == ["over", "within", "over"]
    with pytest.raises(RequestError, match=r"'stp\.\*'"):
        compared(tmp_path, a, b, tolerances=Tolerances(None, (("stp.*", 1.0),)))


# --------------------------------------------------------------------------------------- other names


@pytest.mark.parametrize(
    ("theirs", "ours", "name", "expected"),
    [
        ("blocks.{i}.out", "step.0.double_blocks.{i}.img", "blocks.12.out", "step.0.double_blocks.12.img"),
        ("blocks.{i}.out", "x.{i}", "blocks.a.out", None),
        ("blocks.{i}.out", "x.{i}", "blocks.1.outer", None),
        ("t{s}/b{i}", "step.{s}.{i}", "t3/b14", "step.3.14"),
        ("{i}-{i}", "x.{i}", "4-4", "x.4"),
        ("{i}-{i}", "x.{i}", "4-5", None),
        ("text/*", "t5.*", "text/a.b", "t5.a.b"),
        ("*/{i}/*", "*.{i}.*", "a/7/b", "a.7.b"),
        ("a.b", "c", "a.b", "c"),
        ("a.b", "c", "axb", None),
    ],
)
def test_name_rules(theirs: str, ours: str, name: str, expected: str | None) -> None:
    assert NameRule(theirs, ours).apply(name) == expected


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[names]\n'a' = 1", "of rows"),
        ("a = 'b'", "of rows"),
        ("[names]\n'a' = 'b'\n[more]", "of rows"),
        ("[names\n", "is no TOML"),
        ("[names]\n'a.{i}' = 'b.{j}'", r"uses \{j\}"),
        ("[names]\n'a.*' = 'b'", r"different numbers of \*"),
    ],
)
def test_names_files_that_are_none(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "names.toml").write_text(text)
    with pytest.raises(RequestError, match=sentence):
        read_names(tmp_path / "names.toml")
    with pytest.raises(RequestError, match="cannot be read"):
        read_names(tmp_path / "absent.toml")


def test_two_names_never_become_one() -> None:
    with pytest.raises(RequestError, match="makes 'x' of both 'a' and 'b'"):
        our_names(["a", "b"], [NameRule("a", "x"), NameRule("b", "x")], set())


def test_foreign_names_meet_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    b = {f"step.0.double_blocks.{i}.img": torch.randn(1, 4, 8) for i in range(12)}
    a = {f"theirs/{i}": b[f"step.0.double_blocks.{i}.img"] for i in range(12)}
    a["theirs/11"] = a["theirs/11"] * 1.1
    compared(tmp_path, a, b)
    names = tmp_path / "names.toml"
    names.write_text('[names]\n"theirs/{i}" = "step.0.double_blocks.{i}.img"\n')
    words = ["compare", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
    assert main(words) == 1
    capsys.readouterr()
    assert main([*words, "--names", str(names), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["first_over"] == "step.0.double_blocks.11.img" and said["compared"] == 12
    assert said["stages"][11]["name_in_a"] == "theirs/11" and not said["only_in_a"]
    names.write_text(names.read_text() + '"theirs/x{i}" = "{i}"\n')
    assert main([*words, "--names", str(names)]) == 2
    assert "'theirs/x{i}', which neither file holds" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- command, report


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--tolerance", "1", "--tolerance", "2"], "two values for all stages"),
        (["--tolerance", "x=1"], "matches the tolerance for 'x'"),
        (["--html", "r.png"], "expected .html"),
        (["--names", "none.toml"], "cannot be read"),
    ],
)
def test_words_that_make_no_sense(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    compared(tmp_path, TWO, TWO)
    assert main(["compare", "a.safetensors", "b.safetensors", *words]) == 2
    assert sentence in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize("word", ["x", "a=x", "-1", "=1", "nan"])
def test_what_is_no_tolerance(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["compare", "a", "b", f"--tolerance={word}"])
    assert caught.value.code == 2 and "no tolerance such as" in capsys.readouterr().err


class Page(HTMLParser):
    """Checks that tags close in order, and keeps what the page says and links to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href")]
        if tag not in ("meta", "col", "input", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_is_one_page_complete_in_itself(tmp_path: Path) -> None:
    b = {f"step.{i}.<b>&": torch.randn(1, 30, 8) for i in range(3)}
    a = {name: tensor.clone() for name, tensor in b.items()}
    a["step.1.<b>&"][0, 20:] += 0.5
    found = compared(tmp_path, a, {**b, "extra": torch.ones(1)})
    about = ({"dtype": "float32", "seed": "1"}, {"dtype": "bfloat16", "seed": "1"})
    text = html_report(found, about, found.passes)
    page = Page(text)
    assert not page.open and page.links == ["#first"]
    assert not re.search(r"https?:|url\(|@import|<script|<b>&", text)
    assert "&lt;b&gt;&amp;" in text and "only in B" in text
    assert "prefers-color-scheme: dark" in text and text.count(f"--h{LEVELS - 1}:") == 2
    assert "bfloat16" in text and "first divergence: step.1.&lt;b&gt;&amp;" in text
    rows = [attrs for tag, attrs in page.tags if tag == "tr" and "over" in str(attrs.get("class"))]
    assert [attrs.get("id") for attrs in rows] == ["first"]
    agree = html_report(compared(tmp_path, b, b), ({}, {}), True)
    assert "All compared stages agree" in agree and 'id="first"' not in agree


def test_the_strip_is_drawn_in_the_colours_of_its_values(tmp_path: Path) -> None:
    b = torch.ones(1, 4, 2)
    a = b.clone()
    a[0, 1] += 1e-4
    a[0, 3] = math.nan
    text = html_report(compared(tmp_path, {"x": a}, {"x": b}), ({}, {}), False)
    strip = text[text.index('<td class="strip">') :]
    cells = re.findall(r'<rect class="(\w+)" x="(\d+)"', strip[: strip.index("</td>")])
    assert cells == [("h8", "1"), ("hn", "3")]

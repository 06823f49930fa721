"""The harness of the golden tests: its manifest is complete, and what a failing case says."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path

import golden
import pytest
import torch
from helpers_flux_cases import runs, velocity
from torch import Tensor

from flux_sd.flux_mmdit import Flux

NAMES = list(golden.manifest()["cases"])


def test_every_file_belongs_to_a_case_and_every_case_has_its_files() -> None:
    there = {path.name for path in golden.STORED.iterdir()} - {"manifest.json"}
    listed = [name + ending for name in NAMES for ending in golden.case(name).files]
    assert there == {*listed, *golden.manifest()["other_files"]}


@pytest.mark.parametrize("name", NAMES)
def test_every_case_is_described_and_has_a_test_or_an_issue(name: str) -> None:
    row = golden.case(name)
    assert all((row.subject, row.stage, row.block, row.why, row.oracle, row.row))
    assert (row.test is None) != (row.issue is None), "either a test of ours, or the issue that will add it"
    assert row.after is None or row.after in NAMES
    for tensor in golden.stored(name):
        tolerance = row.tolerance(tensor)
        assert tolerance is None or 0 <= tolerance <= 5e-2
    if row.test is not None:
        assert name in names_of(row.test)


def names_of(test: str) -> str:
    """A test's source and parameters, as one text."""
    file, _, function = test.partition("::")
    found = getattr(importlib.import_module(Path(file).stem), function)
    parameters = [repr(mark.args) for mark in getattr(found, "pytestmark", [])]
    return "\n".join([inspect.getsource(found), *parameters])


def planted(case: str, block: str) -> Tensor:
    """The case's velocity with q and k exchanged in one block."""
    run = runs()[case]
    model = golden.build(lambda: Flux(run.config))
    weight = model.get_parameter(f"{block}.qkv.weight")
    q, k, v = weight.data.chunk(3)
    weight.data = torch.cat([k, q, v])
    with torch.inference_mode():
        return velocity(model, run)


def message(case: str, tensor: str, actual: Tensor) -> str:
    with pytest.raises(pytest.fail.Exception) as caught:
        golden.check_case(case, tensor, actual)
    return str(caught.value)


def test_a_failing_case_says_where_how_far_and_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden, "_verdicts", {})
    case, expected = "flux_tiny_schnell_2_0", golden.stored("flux_tiny_schnell_2_0")["velocity"]
    actual = planted(case, "double_blocks.1.img_attn")
    apart = (actual - expected).abs()
    relative = (actual - expected).norm() / expected.norm()
    lines = message(case, "velocity", actual).splitlines()
    assert lines[0] == "flux_tiny_schnell_2_0.velocity is not what Candle 0.11.1 computed."
    assert lines[1].split() == ["stage", "flux_mmdit"]
    assert lines[2].split(maxsplit=1)[1].startswith("double_blocks.1, if flux_tiny_schnell_1_0")
    assert f"relative L2 {relative:.2e}, at most 5e-06" in lines[3]
    assert f"largest absolute {apart.max():.2e} at [0, " in lines[3]
    assert lines[4].split()[:3] == ["ours", f"{actual[0, 0, 0]:+.6e}", f"{actual[0, 0, 1]:+.6e}"]
    assert lines[5].split()[:3] == ["Candle", f"{expected[0, 0, 0]:+.6e}", f"{expected[0, 0, 1]:+.6e}"]
    assert lines[6].endswith("cargo run --release -- ../../reference_outputs/candle flux_tiny_schnell_2_0)")


def test_the_case_of_one_block_less_tells_which_block_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts: dict[str, bool] = {}
    monkeypatch.setattr(golden, "_verdicts", verdicts)
    actual = planted("flux_tiny_schnell_2_0", "double_blocks.1.img_attn")
    golden.check_case("flux_tiny_schnell_1_0", "velocity", golden.stored("flux_tiny_schnell_1_0")["velocity"])
    said = message("flux_tiny_schnell_2_0", "velocity", actual)
    assert "double_blocks.1: flux_tiny_schnell_1_0, without it, agrees" in said
    verdicts["flux_tiny_schnell_1_0"] = False
    said = message("flux_tiny_schnell_2_0", "velocity", actual)
    assert "double_blocks.1, or before: flux_tiny_schnell_1_0, without it, differs too" in said


def test_other_shapes_other_dtypes_and_nan_fail() -> None:
    case, expected = "flux_tiny_schnell_0_0", golden.stored("flux_tiny_schnell_0_0")["velocity"]
    assert "[1, 23, 64]" in message(case, "velocity", expected[:, 1:])
    assert "float64" in message(case, "velocity", expected.double())
    broken = expected.clone()
    broken[0, 3, 5] = float("nan")
    assert "relative L2 nan" in message(case, "velocity", broken)


def test_equality_is_demanded_where_the_tolerance_is_0() -> None:
    packed = golden.stored("flux_sampling")["packed"]
    nudged = packed.clone()
    nudged[0, 0, 0] += 1e-6
    golden.check("a.b", packed, packed.clone(), 0, "sampling")
    with pytest.raises(pytest.fail.Exception, match="at most 0e"):
        golden.check("a.b", nudged, packed, 0, "sampling")
    with pytest.raises(pytest.fail.Exception, match="relative L2 inf"):
        golden.check("a.b", torch.ones(2), torch.zeros(2), 1.0, "sampling")


def test_figures_are_recorded_for_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(golden.RECORD, str(tmp_path / "record.jsonl"))
    golden.check("a.b", torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0]), 0.2, "t5")
    (line,) = (tmp_path / "record.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line) == {
        "case": "a", "tensor": "b", "stage": "t5", "relative": 0.1, "largest": 0.5, "tolerance": 0.2,
    }  # fmt: skip

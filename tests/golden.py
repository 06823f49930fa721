"""Candle's stored activations: finds a case, holds ours against it, and says where the two part.

`reference_outputs/candle/manifest.json` is the list of cases: what each computes, the largest relative L2
difference each tensor may have and why, and the test that holds us to it. A test takes its names from
`cases(...)` and calls `check_case` for each tensor; `check` is the same for a tensor that is part of one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from procedural import fill
from safetensors.torch import load_file
from torch import Tensor, nn

STORED = Path(__file__).resolve().parent.parent / "reference_outputs" / "candle"
# Names a file to which every comparison is appended, a JSON object a line: tools/parity_table.py reads it.
RECORD = "FLUX_SD_GOLDEN_RECORD"


@dataclass(frozen=True)
class Case:
    """One row of the manifest."""

    name: str
    subject: str  # what is computed, in words
    stage: str  # our module: clip, t5, flux_mmdit, ...
    block: str  # the part that a difference points at
    after: str | None  # the case of the same weights without `block`: where that agrees, `block` is at fault
    dtype: str
    tolerances: Mapping[str, float | None]  # by tensor, or by a pattern with a star; see `tolerance`
    why: str  # of these tolerances
    oracle: str  # how far Candle was found from an independent implementation
    row: str  # of the README's parity table, where it stands with others
    test: str | None  # path::function; None where the subject is not built
    issue: str | None  # which builds it, where it is not
    slow: bool  # seconds or gigabytes: only under `pytest -m slow`
    files: tuple[str, ...]  # endings of its files' names: .safetensors, some .keys.json, some .gguf

    def tolerance(self, tensor: str) -> float | None:
        """The largest relative L2 difference that `tensor` may have. 0 demands equality; None: not compared,
        for the reason in `why`."""
        (value,) = {value for name, value in self.tolerances.items() if fnmatchcase(tensor, name)}
        return value


@dataclass(frozen=True)
class Difference:
    """Two tensors of one shape, compared in float64."""

    relative: float  # ||ours - theirs|| / ||theirs||, over the whole tensor
    largest: float  # of the absolute differences
    at: tuple[int, ...]  # where that is


@cache
def manifest() -> dict[str, Any]:
    text = (STORED / "manifest.json").read_text(encoding="utf-8")
    document: dict[str, Any] = json.loads(text)
    return document


def case(name: str) -> Case:
    """The manifest's row; the fields that may be left out are those given here."""
    row = {"after": None, "issue": None, "test": None, "slow": False} | manifest()["cases"][name]
    row["tolerances"], row["files"] = dict(row["tolerances"]), tuple(row["files"])
    return Case(name=name, **row)


def cases(test: str) -> list[Any]:
    """For parametrize: the manifest's cases of `test`, such as "tests/test_golden_clip.py::test_clip"."""
    rows = [case(name) for name in manifest()["cases"]]
    return [
        pytest.param(row.name, id=row.name, marks=[pytest.mark.slow] if row.slow else [])
        for row in rows
        if row.test == test
    ]


def stored(name: str) -> dict[str, Tensor]:
    """A case's tensors: outputs and, where there are any, token ids."""
    return load_file(STORED / f"{name}.safetensors")


def stored_keys(name: str) -> dict[str, list[int]]:
    """The names and shapes that Candle's model asked for."""
    text = (STORED / f"{name}.keys.json").read_text(encoding="utf-8")
    keys: dict[str, list[int]] = json.loads(text)
    return keys


def keys_of(module: nn.Module) -> dict[str, list[int]]:
    """Our parameter paths and shapes, to compare with `stored_keys`."""
    return {name: list(parameter.shape) for name, parameter in module.named_parameters()}


def difference(actual: Tensor, expected: Tensor) -> Difference:
    """Both of one shape. A reference of zeros allows no difference: anything else is infinitely far."""
    ours, theirs = actual.detach().double(), expected.double()
    apart = (ours - theirs).abs()
    norm, scale = apart.norm().item(), theirs.norm().item()
    at = torch.unravel_index(apart.argmax(), apart.shape)
    relative = norm / scale if scale else (0.0 if norm == 0.0 else float("inf"))
    return Difference(relative, apart.max().item(), tuple(int(i) for i in at))


def regenerate(name: str) -> str:
    """The shell line that writes the case of this name again."""
    return str(manifest()["command"]).replace("NAME", name)


def check_case(name: str, tensor: str, actual: Tensor) -> None:
    """Holds `actual` against the stored `tensor` of a case, at the manifest's tolerance."""
    row, tolerance = case(name), case(name).tolerance(tensor)
    assert tolerance is not None, f"{name}.{tensor} is not for comparison: {row.why}"
    check(f"{name}.{tensor}", actual, stored(name)[tensor], tolerance, row.stage, row.block)


def check(
    name: str, actual: Tensor, expected: Tensor, tolerance: float, stage: str, block: str = "all of it"
) -> None:
    """Fails unless `actual` has the reference's shape and dtype and is within `tolerance` (relative L2).

    name is CASE.TENSOR; `tolerance` 0 demands equality. Prints and, where RECORD says so, records the figure.
    """
    __tracebackhide__ = True
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        pytest.fail(
            f"{name}: {list(actual.shape)} {actual.dtype} where Candle has {list(expected.shape)} "
            f"{expected.dtype} (stage {stage}, block {block})",
            pytrace=False,
        )
    found = difference(actual, expected)
    agrees = found.relative <= tolerance  # false for NaN
    _verdicts[name.partition(".")[0]] = agrees and _verdicts.get(name.partition(".")[0], True)
    print(f"{name}: {found.relative:.1e} (at most {tolerance:.0e})")
    _record(name, stage, found, tolerance)
    if not agrees:
        text = _report(name, stage, block, actual, expected, found, tolerance)
        pytest.fail(text, pytrace=False)


_verdicts: dict[str, bool] = {}  # case -> whether all its tensors agreed so far in this run


def _record(name: str, stage: str, found: Difference, tolerance: float) -> None:
    path = os.environ.get(RECORD)
    if path is None:
        return
    case_name, _, tensor = name.partition(".")
    line = {"case": case_name, "tensor": tensor, "stage": stage, "relative": found.relative}
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line | {"largest": found.largest, "tolerance": tolerance}) + "\n")


def _report(
    name: str, stage: str, block: str, actual: Tensor, expected: Tensor, found: Difference, tolerance: float
) -> str:
    case_name = name.partition(".")[0]
    return "\n".join(
        [
            f"{name} is not what Candle {manifest()['candle']} computed.",
            f"  stage       {stage}",
            f"  block       {block}{_shorter(case_name)}",
            f"  difference  relative L2 {found.relative:.2e}, at most {tolerance:.0e} allowed; "
            f"largest absolute {found.largest:.2e} at {list(found.at)}",
            f"  ours        {_first(actual)}",
            f"  Candle      {_first(expected)}",
            f"  regenerate  {regenerate(case_name)}",
        ]
    )


def _first(tensor: Tensor, count: int = 5) -> str:
    values = tensor.detach().double().flatten()[:count].tolist()
    return "  ".join(f"{value:+.6e}" for value in values)


def _shorter(name: str) -> str:
    """What the case without this block says about where the error is."""
    after = case(name).after if name in manifest()["cases"] else None
    if after is None:
        return ""
    verdict = _verdicts.get(after)
    if verdict is None:
        return f", if {after} (without it) agrees: it did not run"
    return f": {after}, without it, agrees" if verdict else f", or before: {after}, without it, differs too"


def build(make: Callable[[], nn.Module], scale: Callable[[str], float] = lambda name: 1.0) -> nn.Module:
    """A network of procedural weights; `make` runs on meta, so nothing is drawn only to be overwritten."""
    with torch.device("meta"):
        module = make()
    return fill(module.to_empty(device="cpu"), scale).eval()

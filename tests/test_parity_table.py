"""The README's parity table: made from the figures of the golden tests, and up to date."""

from __future__ import annotations

from pathlib import Path

import golden
import parity_table
import pytest

CASES = {
    "a_tiny": {"row": "tiny", "stage": "t5", "dtype": "float32", "tolerances": {"out": 2e-5, "input_ids": 0}},
    "b_tiny": {"row": "tiny", "stage": "t5", "dtype": "float32", "tolerances": {"out": 2e-5}},
    "c": {"row": "FLUX", "stage": "sampling", "dtype": "float32", "tolerances": {"packed": 0, "run_*": 5e-6}},
    "d": {"row": "low", "stage": "t5", "dtype": "bfloat16", "tolerances": {"out": 3e-2, "note": None}},
}


def record(case: str, tensor: str, relative: float, tolerance: float) -> dict[str, object]:
    return {"case": case, "tensor": tensor, "relative": relative, "tolerance": tolerance}


RECORDS = [
    record("a_tiny", "out", 1e-6, 2e-5),
    record("a_tiny", "input_ids", 0.0, 0),
    record("b_tiny", "out", 3e-6, 2e-5),
    record("c", "packed", 0.0, 0),
    record("c", "run_dev", 2e-7, 5e-6),
    record("d", "out", 1.44e-2, 3e-2),
]


def test_a_row_is_the_largest_difference_of_its_cases() -> None:
    assert parity_table.table(parity_table.rows(CASES, RECORDS)).splitlines()[2:] == [
        "| t5 | tiny | 2 | 3.0e-06 | 2e-05 |",
        "| sampling | FLUX `packed` | 1 | 0 | equal |",
        "| sampling | FLUX `run_*` | 1 | 2.0e-07 | 5e-06 |",
        "| t5 | low (bfloat16) | 1 | 1.4e-02 | 3e-02 |",
    ]


def test_a_tensor_that_no_test_compared_is_named() -> None:
    assert parity_table.not_compared(CASES, RECORDS) == []
    assert parity_table.not_compared(CASES, RECORDS[:-2]) == ["c.run_*", "d.out"]


def test_only_what_stands_between_the_markers_changes() -> None:
    text = f"before\n{parity_table.BEGIN}\nold\n{parity_table.END}\nafter\n"
    new = parity_table.write_between(text, "| new |")
    assert new == f"before\n{parity_table.BEGIN}\n| new |\n{parity_table.END}\nafter\n"
    with pytest.raises(SystemExit, match="lacks the markers"):
        parity_table.write_between("no table here", "| new |")


def test_the_readme_has_every_row_of_the_manifest_at_its_tolerance() -> None:
    """The figures are those of the run that wrote it; `python tools/parity_table.py` writes them again."""
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    written = readme.partition(parity_table.BEGIN)[2].partition(parity_table.END)[0].strip().splitlines()[2:]
    listed = {name: case for name, case in golden.manifest()["cases"].items() if "test" in case}
    records = [
        record(name, tensor, 0.0, tolerance)
        for name in listed
        for tensor in golden.stored(name)
        if (tolerance := golden.case(name).tolerance(tensor)) is not None
    ]
    expected = parity_table.table(parity_table.rows(listed, records)).splitlines()[2:]
    assert [without_figure(line) for line in written] == [without_figure(line) for line in expected]


def without_figure(line: str) -> list[str]:
    cells = line.split("|")
    return cells[:4] + cells[5:]

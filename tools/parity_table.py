"""Writes README.md's parity table: runs every golden test, the slow ones too, and reads what they measured.

    python tools/parity_table.py            # 3 minutes and 11 GB; writes the table between its two markers
    python tools/parity_table.py --print    # leaves README.md alone

Fails when a test does, or when a tensor that the manifest gives a tolerance was not compared. One row is one
`row` of the manifest and one tolerance: the largest difference among all its tensors.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MANIFEST = ROOT / "reference_outputs" / "candle" / "manifest.json"
BEGIN, END = "<!-- parity table: tools/parity_table.py -->", "<!-- end -->"
INPUTS = ("input_ids",)  # held to equality, but nothing that a stage computed


@dataclass(frozen=True)
class Row:
    """One line of the table before it is written."""

    label: str
    stage: str
    dtype: str
    tolerance: float
    relative: float  # the largest
    tensors: int


def measure(tests: list[str]) -> list[dict[str, Any]]:
    """Runs the tests; one record per comparison: case, tensor, stage, relative, largest, tolerance."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.jsonl"
        environment = {**os.environ, "FLUX_SD_GOLDEN_RECORD": str(record)}
        command = [sys.executable, "-m", "pytest", "-q", "-m", "slow or not slow", *tests]
        if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode != 0:
            sys.exit("a golden test failed: the table is left as it is")
        return [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]


def not_compared(cases: dict[str, Any], records: list[dict[str, Any]]) -> list[str]:
    """Tensors, or patterns of them, that the manifest gives a tolerance and no record has."""
    seen = {(record["case"], record["tensor"]) for record in records}
    return [
        f"{name}.{pattern}"
        for name, case in cases.items()
        for pattern, tolerance in case["tolerances"].items()
        if tolerance is not None
        and not any(case_name == name and fnmatchcase(tensor, pattern) for case_name, tensor in seen)
    ]


def rows(cases: dict[str, Any], records: list[dict[str, Any]]) -> list[Row]:
    """In the manifest's order."""
    groups: dict[tuple[str, str, str, float], list[float]] = defaultdict(list)
    for name, case in cases.items():
        mine = [r for r in records if r["case"] == name and r["tensor"] not in INPUTS]
        several = len({record["tolerance"] for record in mine}) > 1
        for pattern in case["tolerances"]:
            label = f"{case['row']} `{pattern}`" if several else str(case["row"])
            for record in mine:
                if fnmatchcase(record["tensor"], pattern):
                    key = label, case["stage"], case["dtype"], record["tolerance"]
                    groups[key].append(record["relative"])
    return [Row(*key, max(found), len(found)) for key, found in groups.items()]


def table(found: list[Row]) -> str:
    """Markdown."""
    lines = ["| stage | case | tensors | largest relative difference | at most |", "|---|---|---|---|---|"]
    for row in found:
        label = row.label + ("" if row.dtype == "float32" else f" ({row.dtype})")
        apart = f"{row.relative:.1e}" if row.relative else "0"
        allowed = f"{row.tolerance:.0e}" if row.tolerance else "equal"
        lines.append(f"| {row.stage} | {label} | {row.tensors} | {apart} | {allowed} |")
    return "\n".join(lines)


def write_between(text: str, markdown: str, markers: tuple[str, str] = (BEGIN, END)) -> str:
    """`text` with what stands between the markers replaced."""
    head, begin, rest = text.partition(markers[0])
    _, end, tail = rest.partition(markers[1])
    if not (begin and end):
        sys.exit(f"README.md lacks the markers {' and '.join(markers)}: put them where the table belongs")
    return f"{head}{begin}\n{markdown}\n{end}{tail}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--print", action="store_true", help="print the table and leave README.md alone")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    if not arguments.print:
        write_between(readme.read_text(encoding="utf-8"), "")  # fails before the run, not after it
    listed = json.loads(MANIFEST.read_text(encoding="utf-8"))["cases"]
    cases = {name: case for name, case in listed.items() if "test" in case}
    records = measure(sorted({case["test"] for case in cases.values()}))
    if missing := not_compared(cases, records):
        sys.exit("no test compared " + ", ".join(missing))
    markdown = table(rows(cases, records))
    if arguments.print:
        print(markdown)
        return
    readme.write_text(write_between(readme.read_text(encoding="utf-8"), markdown), encoding="utf-8")


if __name__ == "__main__":
    main()

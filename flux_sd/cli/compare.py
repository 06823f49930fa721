"""`flux-sd compare`: two records, stage by stage, and the first that differs. Floor 10."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from .console import Console, printable, table

if TYPE_CHECKING:
    from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

    from ..compare import Comparison, Row, Tolerances

EPILOG = """examples:
  flux-sd compare ours.safetensors theirs.safetensors
      a table of all stages that both files hold; theirs is the reference
  flux-sd compare ours.safetensors theirs.safetensors --html report.html
      also a page with a heat strip for each stage: where in the tensor the difference lies
  flux-sd compare ours.safetensors theirs.safetensors --tolerance 2e-5 --tolerance 'latents=1e-4'
      relative differences that pass: one for all, others by pattern, the last that matches holding
  flux-sd compare ours.safetensors theirs.safetensors --names names.toml
      where the other program has names of its own: a table [names] of "theirs" = "ours"

The relative difference is |a - b| / |b| over the whole tensor, in float64. Unless a pattern says otherwise,
whole numbers (token ids) must be equal, and 8-bit pixels pass up to 4e-3. A leading dimension of 1 and the
dtype may differ.

exit code: 0 if every stage that both hold is within its tolerance; 1 if one is not, or if there is none."""


def register(commands: Any) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser(
        "compare",
        usage="flux-sd compare A.safetensors B.safetensors [options]",
        help="hold two records against each other, and name the first stage that differs",
        description="Compares two safetensors files, such as `flux-sd trace` or another program writes.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("a", type=Path, metavar="A.safetensors", help="a record")
    add("b", type=Path, metavar="B.safetensors", help="the record to hold it against: the reference")
    add("--tolerance", action="append", default=[], metavar="X|PATTERN=X", type=_tolerance,
        help="largest relative difference that passes; may be given again (default: 1e-4)")  # fmt: skip
    add("--names", type=Path, metavar="FILE.toml", help='other names for stages: rows "theirs" = "ours"')
    add("--stages", action="append", default=[], metavar="PATTERN", help="compare only stages that match")
    add("--complete", action="store_true", help="a stage that only one file holds counts as a difference")
    add("--html", type=Path, metavar="FILE.html", help="also write a report, as one page without links")
    add("--overwrite", action="store_true", help="replace a report that exists (default: refuse)")
    add("--quiet", action="store_true", help="print nothing but errors; see the exit code")
    add("--json", action="store_true", help="print one JSON object with all numbers on stdout")


def _tolerance(text: str) -> tuple[str | None, float]:
    pattern, equals, number = text.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not (value >= 0.0 and (pattern or not equals)):
        raise argparse.ArgumentTypeError(f"{text!r} is no tolerance such as 1e-4 or 'step.*=1e-4'")
    return (pattern if equals else None), value


def run(args: argparse.Namespace) -> int:
    """Carries out the command: 0 if all agrees, 1 if not."""
    from .. import image
    from ..checkpoint import open_checkpoint
    from ..compare import compare
    from ..compare_names import read_names
    from ..compare_report import html_report

    console = Console(args.quiet, args.json)
    if args.html is not None:
        image.check_output(args.html, args.overwrite, ".html")
    rules = () if args.names is None else read_names(args.names)
    with open_checkpoint(args.a) as a, open_checkpoint(args.b) as b, _progress(console) as bar:
        about = (dict(a.metadata), dict(b.metadata))
        found = compare(
            a, b, tolerances=_tolerances(args), rules=rules, patterns=args.stages,
            on_row=lambda row: bar.update(),
        )  # fmt: skip
    passes = found.passes and not (args.complete and any(found.only))
    if args.html is not None:
        page = html_report(found, about, passes).encode()
        image.write_file(args.html, lambda file: _put(file, page), args.overwrite)
    _print(found, passes, console)
    return 0 if passes else 1


def _progress(console: Console) -> tqdm[Any]:
    """Counts stages on stderr, if that is a terminal: records of a large model take minutes."""
    from tqdm import tqdm

    return tqdm(unit=" stages", leave=False, disable=console.quiet or not sys.stderr.isatty())


def _put(file: Any, content: bytes) -> None:
    file.write(content)


def _tolerances(args: argparse.Namespace) -> Tolerances:
    from ..compare import Tolerances

    defaults = [value for pattern, value in args.tolerance if pattern is None]
    if len(defaults) > 1:
        raise RequestError("--tolerance has two values for all stages: give one, and others with a pattern")
    patterns = tuple((pattern, value) for pattern, value in args.tolerance if pattern is not None)
    return Tolerances(defaults[0] if defaults else None, patterns)


# ------------------------------------------------------------------------------------------ output


def _print(found: Comparison, passes: bool, console: Console) -> None:
    from ..compare import summary

    head = ["stage", "shape", "max |a-b|", "relative", "cosine", "tolerance", ""]
    first = found.first_over
    rows = [head, *(_cells(row, row is first) for row in found.rows)]
    if found.rows:
        console.line(table(rows))
    for file, names in zip("AB", found.only, strict=True):
        if names:
            shown = ", ".join(names[:4]) + (f", ... ({len(names)} in all)" if len(names) > 4 else "")
            console.line(printable(f"only in {file}: {shown}"))
    console.line(printable(summary(found)))
    console.document(document(found, passes))


def _cells(row: Row, first: bool) -> list[str]:
    from ..compare import explain

    numbers = [f"{row.max_abs:.3g}", f"{row.relative:.3g}", f"{row.cosine:.8f}"]
    if row.verdict == "shape":
        numbers = ["-", "-", "-"]
    verdict = explain(row) + (" <-- the first" if first else "")
    return [printable(row.name), _shape(row.shapes[1]), *numbers, f"{row.tolerance:g}", verdict]


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def document(found: Comparison, passes: bool) -> dict[str, Any]:
    """The comparison as JSON has it; numbers that JSON lacks (NaN, infinity) are null."""
    first = found.first_over
    return {
        "a": found.files[0],
        "b": found.files[1],
        "passes": passes,
        "compared": len(found.rows),
        "first_over": None if first is None else first.name,
        "only_in_a": found.only[0],
        "only_in_b": found.only[1],
        "stages": [_entry(row) for row in found.rows],
    }


def _entry(row: Row) -> dict[str, Any]:
    return {
        "stage": row.name,
        "name_in_a": row.names[0],
        "name_in_b": row.names[1],
        "shape_a": row.shapes[0],
        "shape_b": row.shapes[1],
        "dtype_a": row.dtypes[0],
        "dtype_b": row.dtypes[1],
        "max_abs": _number(row.max_abs),
        "relative": _number(row.relative),
        "cosine": _number(row.cosine),
        "not_finite": row.not_finite,
        "tolerance": row.tolerance,
        "verdict": row.verdict,
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None

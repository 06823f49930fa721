"""`flux-sd numerics`: where Candle and the authors' code differ, and what that amounts to. Floor 10."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..numerics import NOT_MIRRORED, Difference, NotMirrored, differences
from .console import Console

# Written by tools/measure_numerics.py.
EFFECTS = Path(__file__).parent.parent / "numerics_effects.json"
EPILOG = """examples:
  flux-sd numerics                                   the table
  flux-sd numerics --json                            the same for a program
  flux-sd generate "a cat" --numerics candle         paint as Candle does

Effects are of one difference alone, between two runs of this package unless it says otherwise. "relative" is
the norm of the change over the norm of what was there before."""


def register(commands: Any) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser(
        "numerics",
        usage="flux-sd numerics [options]",
        help="list where Candle and the authors' code differ, with measured effects",
        description="Lists the known differences between Candle's arithmetic and the authors', measured.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    """Carries out the command."""
    measured = json.loads(EFFECTS.read_text(encoding="utf-8"))
    effects: dict[str, list[dict[str, Any]]] = {}
    for effect in measured["effects"]:
        effects.setdefault(effect["of"], []).append(effect)
    console = Console(json=args.json)
    console.document(document(effects, measured))
    for line in lines(effects, measured):
        console.line(line)
    return 0


def document(effects: dict[str, list[dict[str, Any]]], measured: dict[str, Any]) -> dict[str, Any]:
    """Everything as plain values."""
    return {
        "fields": [{**asdict(row), "effects": effects.get(row.name, [])} for row in differences()],
        "not_mirrored": [{**asdict(row), "effects": effects.get(row.name, [])} for row in NOT_MIRRORED],
        "measured": {key: measured[key] for key in ("command", "date", "made_by")},
    }


def lines(effects: dict[str, list[dict[str, Any]]], measured: dict[str, Any]) -> Iterator[str]:
    """The table as text: a block for each field, then for each thing that no preset imitates."""
    yield "What --numerics reference and --numerics candle change:"
    for row in differences():
        yield from ("", *_field(row))
        yield from _effects(effects.get(row.name, []))
    yield from ("", "What neither does:")
    for other in NOT_MIRRORED:
        yield from ("", *_not_mirrored(other))
        yield from _effects(effects.get(other.name, []))
    yield ""
    yield f"Measured {measured['date']} with {measured['made_by']}: {measured['command']}"


def _field(row: Difference) -> Iterator[str]:
    yield f"{row.name:20}  reference {_value(row.reference):10}  candle {_value(row.candle)}"
    yield from _wrapped(f"{row.what} ({row.source}; here {row.acts})")


def _value(value: object) -> str:
    words = {None: "the model's", True: "yes", False: "no"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def _not_mirrored(row: NotMirrored) -> Iterator[str]:
    yield row.name if row.built else f"{row.name}  (of a part that is not built)"
    subject = "Candle" if row.whose == "Candle" else "The authors"
    yield from _wrapped(f"{subject} {row.they} ({row.source}). We {row.we}.")


def _effects(found: list[dict[str, Any]]) -> Iterator[str]:
    where = None
    for effect in found:
        if effect["where"] != where:
            where = effect["where"]
            yield f"    {where}:"
        yield f"      {_number(effect['value']):8} {effect['unit']:14} {effect['what']}"
    if not found:
        yield "    not measured"


def _number(value: float) -> str:
    """Two digits, or the whole of a number beyond them."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)

"""`flux-sd lora`: what an adapter is, and which models it fits. Floor 10."""

from __future__ import annotations

import argparse
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AdapterError
from .console import Console, gigabytes, printable

if TYPE_CHECKING:
    from ..lora.adapter_file import AdapterFile, Change
    from ..lora.plan import AdapterPlan
    from ..versions import SDVersion, VersionInfo

EPILOG = """examples:
  flux-sd lora style.safetensors
      kind, names, rank and alpha, and which models it fits
  flux-sd lora style.safetensors --model sdxl
      the same, and where it does not fit, every change that does not, with the reason

Reads the header only. exit code: 0; 2 if it fits no model, or not the one that was asked about."""
SHOWN_BLOCKS, SHOWN_VALUES = 8, 6


def register(commands: Any) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser(
        "lora",
        usage="flux-sd lora FILE [options]",
        help="show what an adapter (LoRA) is, and which models it fits",
        description="Shows what an adapter is, what it changes, and which models it fits.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    parser.add_argument("file", type=Path, metavar="FILE", help="an adapter, or the folder that PEFT saves")
    parser.add_argument("--model", metavar="NAME", help="hold it against this model alone")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    """Carries out the command: 0 if the adapter fits, 2 if not."""
    from ..lora.adapter_file import AdapterFile
    from ..versions import SDVersion

    console = Console(json=args.json)
    versions = list(SDVersion) if args.model is None else [SDVersion.parse(args.model)]
    with AdapterFile.open(args.file) as file:
        plans = dict(_plans(file, versions))
        report = Report.of(file, plans)
        for line in report.lines(args.file):
            console.line(line)
        for line in _problems(plans) if args.model is not None else ():
            console.line(line)
        console.document({"file": str(args.file), **report.document(plans)})
    return 0 if report.fits else 2


def _plans(file: AdapterFile, versions: Sequence[SDVersion]) -> Iterator[tuple[str, AdapterPlan]]:
    """The adapter held against each model, nothing read but its header."""
    from .. import numerics
    from ..lora.adapters import table_of
    from ..lora.names import Names
    from ..model_loader import FAMILIES

    known: dict[Any, Names] = {}  # networks that several models have are looked at once
    for version in versions:
        networks = FAMILIES[version.info.family].networks(version.info, numerics.reference())
        yield version.info.key, table_of(networks, known).plan(file)


@dataclass(frozen=True)
class Report:
    """What is known of one adapter."""

    kind: str  # "LoRA, rank 8, alpha 8"
    names: str  # whose, behind which prefixes
    made_for: str
    changes: int
    bytes: int
    blocks: dict[str, dict[str, int]]  # network -> block -> changes; of the model that it fits best
    fits: list[str]  # models, completely
    control: bool  # it is a control LoRA
    notes: tuple[str, ...]  # what else a user should know
    partly: dict[str, str]  # model -> how many of the changes fit

    @classmethod
    def of(cls, file: AdapterFile, plans: dict[str, AdapterPlan]) -> Report:
        """From the header and what the models made of it."""
        from ..versions import SDVersion

        best = max(plans.values(), key=lambda plan: len(plan.placed))
        partly = {name: plan for name, plan in plans.items() if plan.placed and plan.misfits}
        return cls(
            kind=_kind(file),
            names=_counted(change.dialect for change in file.changes),
            made_for=file.family,
            changes=len(file.changes),
            bytes=file.checkpoint.total_bytes,
            blocks=_blocks(best),
            fits=[name for name, plan in plans.items() if _fits(plan, SDVersion.parse(name).info)],
            control=file.is_control,
            notes=file.notes,
            partly={name: f"{len(plan.placed)}/{plan.total}" for name, plan in partly.items()},
        )

    def lines(self, path: Path) -> Iterator[str]:
        """The report as text; nothing out of the file reaches the terminal unescaped."""
        size = gigabytes(self.bytes) if self.bytes >= 1e8 else f"{self.bytes / 1e6:.2f} MB"
        yield f"{printable(str(path))}: {self.kind}, {self.changes} changes, {size}"
        yield f"  names of  {printable(self.names)}"
        yield f"  made for  {self.made_for or 'no family that its names or shapes tell'}"
        for role, blocks in self.blocks.items():
            shown = [f"{block} ({count})" for block, count in blocks.items()][:SHOWN_BLOCKS]
            more = f" and {len(blocks) - SHOWN_BLOCKS} more" if len(blocks) > SHOWN_BLOCKS else ""
            yield f"  changes   {role}, {sum(blocks.values())} in {', '.join(shown)}{more}"
        if self.control:
            yield "  control   it makes a model with guidance and no control picture of its own follow one"
        yield f"  fits      {', '.join(self.fits) or 'none completely'}"
        for name, share in self.partly.items():
            yield f"  in part   {name}, {share} of its changes"
        for note in self.notes:
            yield f"  note      {printable(note)}"
        if self.fits:
            command = ["flux-sd", "generate", "a prompt", "--model", self.fits[0], "--lora", str(path)]
            command += ["--control-image", "lines.png"] if self.control else []
            yield f"  use it:   {printable(shlex.join(command))}"

    def document(self, plans: dict[str, AdapterPlan]) -> dict[str, Any]:
        """The report as a JSON object."""
        problems = {
            name: [f"{misfit.change.name}: {misfit.why}" for misfit in plan.misfits]
            for name, plan in plans.items()
            if plan.placed and plan.misfits
        }
        return {**vars(self), "problems": problems}


def _fits(plan: AdapterPlan, info: VersionInfo) -> bool:
    """Whether it fits completely. A control LoRA fits where it adds the control picture, to a model that it
    can be guided in."""
    suits = not plan.file.is_control or (bool(plan.widened) and info.guidance is not None)
    return suits and not plan.misfits and bool(plan.placed)


def _kind(file: AdapterFile) -> str:
    """The algorithms with their ranks and alphas."""
    algorithms = _counted(_algorithm(change) for change in file.changes)
    ranks = sorted({change.rank for change in file.changes if change.rank is not None})
    alphas = sorted({change.alpha for change in file.changes if change.alpha is not None})
    text = algorithms
    for what, values in (("rank", ranks), ("alpha", alphas)):
        if values:
            shown = ", ".join(f"{value:g}" for value in values[:SHOWN_VALUES])
            text += f", {what} {shown}{', ...' if len(values) > SHOWN_VALUES else ''}"
    control = ", a control LoRA: it needs a control picture" if file.is_control else ""
    return text + control


def _algorithm(change: Change) -> str:
    if change.algorithm is None:
        return "no known algorithm"
    return change.algorithm.name + (" with DoRA" if change.is_dora else "")


def _counted(words: Iterable[str]) -> str:
    """ "a" where all are; "a (12), b (3)" else."""
    counts = Counter(words)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{word} ({count})" for word, count in counts.most_common())


def _blocks(plan: AdapterPlan) -> dict[str, dict[str, int]]:
    """How many changes each block of each network gets."""
    from ..load_plan import block_of

    found: dict[str, dict[str, int]] = {}
    for placed in plan.placed:
        blocks = found.setdefault(placed.role, {})
        for block in {block_of(move.target) for move in placed.moves}:
            blocks[block] = blocks.get(block, 0) + 1
    return found


def _problems(plans: dict[str, AdapterPlan]) -> Iterator[str]:
    """Every change that does not fit, in the words of the error that a run stops with."""
    for name, plan in plans.items():
        try:
            plan.check(name)
        except AdapterError as error:
            yield from (f"  {printable(line)}" for line in str(error).splitlines())

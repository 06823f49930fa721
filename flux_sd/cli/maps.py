"""`flux-sd maps`: how the names in checkpoints become ours, and whether a file fits. Floor 10."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FluxSdError, RequestError, WeightMapError
from .console import Console, gigabytes, table

if TYPE_CHECKING:
    from torch import nn

    from ..checkpoint import Checkpoint
    from ..load_plan import LoadPlan
    from ..versions import SDVersion
    from ..weight_map import Hit, WeightMap

SHOW_EPILOG = """examples:
  flux-sd maps show                                          every map: a component's names in one dialect
  flux-sd maps show flux_mmdit.diffusers                     its rows, one for each of our parameters
  flux-sd maps show flux_mmdit.diffusers --model flux-dev    the same at the size of another model

A row reads "our parameter <- how it is made of theirs"."""
CHECK_EPILOG = """examples:
  flux-sd maps check flux1-dev.safetensors ae.safetensors
  flux-sd maps check FLUX.1-dev/transformer          a folder with shards and their index is one checkpoint

Reads headers only. exit code: 0 if every file fits a model completely, 2 if not."""


def register(commands: Any) -> None:
    """Adds the command's parsers."""
    raw = argparse.RawDescriptionHelpFormatter
    maps = commands.add_parser(
        "maps",
        usage="flux-sd maps show|check ...",
        help="show how checkpoint names become ours, or check whether a file fits",
        description="How the names in other people's checkpoints become ours.",
        allow_abbrev=False,
    )
    actions = maps.add_subparsers(prog="flux-sd maps", title="actions", metavar="show|check", required=True)
    show = actions.add_parser(
        "show", help="list the maps, or the rows of one", description="Lists the maps, or the rows of one.",
        usage="flux-sd maps show [NAME] [options]", epilog=SHOW_EPILOG, formatter_class=raw,
        allow_abbrev=False,
    )  # fmt: skip
    show.set_defaults(run=run_show)
    show.add_argument("name", nargs="?", metavar="NAME", help="such as t5.hf")
    show.add_argument(
        "--model", "--config", metavar="MODEL",
        help="at the size of this model (default: the largest that has such a part)",
    )  # fmt: skip
    check = actions.add_parser(
        "check", help="check whether files fit",
        description="Says what each file is and which models it fits.",
        usage="flux-sd maps check FILE... [options]", epilog=CHECK_EPILOG, formatter_class=raw,
        allow_abbrev=False,
    )  # fmt: skip
    check.set_defaults(run=run_check)
    check.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="a checkpoint, or the folder of one"
    )
    check.add_argument("--model", metavar="MODEL", help="against this model (default: any)")
    check.add_argument("--json", action="store_true", help="print one JSON object on stdout")


# ------------------------------------------------------------------------------------------ show


def run_show(args: argparse.Namespace) -> int:
    """Carries out `maps show`."""
    from ..weight_map import load_maps

    console = Console()
    maps = load_maps()
    if args.name is None:
        rows = [[m.name, str(len(m.templates)), m.about] for m in maps]
        console.line(table([["map", "rows", "what it is"], *rows]))
        return 0
    chosen = next((m for m in maps if m.name == args.name), None)
    if chosen is None:
        raise RequestError(f"no map is called {args.name!r}: choose {', '.join(m.name for m in maps)}")
    for line in listing(chosen, args.model):
        console.line(line)
    return 0


def listing(weight_map: WeightMap, model: str | None) -> Iterator[str]:
    """Every row of a map at the size of a model, under a head of comments."""
    from ..versions import SDVersion

    fits = [n for n in networks(_versions(model)) if n.component == weight_map.component]
    if not fits:
        where = "no model" if model is None else SDVersion.parse(model).info.key
        raise RequestError(f"{where} has a part of the kind {weight_map.component}")
    network = max(fits, key=lambda n: len(n.module.state_dict()))
    rows = weight_map.expand(network.config, network.module.state_dict().keys())
    yield f"# {weight_map.name}: {weight_map.about}"
    yield f"# {len(rows)} rows at the size of {', '.join(network.models)}"
    behind = [prefix for prefix in weight_map.prefixes if prefix]
    if behind:
        yield f"# every name of theirs may stand behind {', '.join(behind)}"
    yield from (str(row) for row in rows.values())
    for pattern, reason in weight_map.ignore:
        yield f"# ignored: {pattern}: {reason}"


# ----------------------------------------------------------------------------------------- check


def run_check(args: argparse.Namespace) -> int:
    """Carries out `maps check`: 0 if every file fits, 2 if not. Every file is looked at."""
    console = Console(json=args.json)
    kinds = networks(_versions(args.model))
    reports: list[dict[str, Any]] = []
    for path in args.files:
        try:
            for found in check_file(path, kinds):
                console.line(found.sentence())
                reports.append(found.document())
        except FluxSdError as error:
            print(f"flux-sd: {error}", file=sys.stderr)
            reports.append(
                {"file": str(path), "error": str(error), "problems": getattr(error, "problems", ())}
            )
    console.document({"files": reports})
    return 2 if any("error" in report for report in reports) else 0


@dataclass(frozen=True)
class Network:
    """One network at one size, and the models that have it."""

    component: str
    config: Any
    build: Callable[[], nn.Module]
    models: tuple[str, ...]

    @functools.cached_property  # SDXL's UNet takes half a second
    def module(self) -> nn.Module:
        """On the meta device."""
        return self.build()


@dataclass(frozen=True)
class Found:
    """A component in a file, and the models whose network it fills completely."""

    file: Path
    plan: LoadPlan
    models: tuple[str, ...]

    def sentence(self) -> str:
        plan = self.plan
        types = ", ".join(f"{count} {dtype}" for dtype, count in plan.stored_dtypes.items())
        ignored = f", {len(plan.ignored)} ignored" if plan.ignored else ""
        behind = f" behind {plan.prefix!r}" if plan.prefix else ""
        return (
            f"{self.file}: {plan.map.name}{behind} fits {', '.join(self.models)}: "
            f"{len(plan.parameters)} parameters, {gigabytes(plan.stored_bytes)} ({types}){ignored}"
        )

    def document(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "file": str(self.file),
            "map": plan.map.name,
            "prefix": plan.prefix,
            "fits": list(self.models),
            "parameters": len(plan.parameters),
            "bytes": plan.stored_bytes,
            "dtypes": plan.stored_dtypes,
            "ignored": dict(plan.ignored),
        }


def check_file(path: Path, kinds: list[Network]) -> list[Found]:
    """What the file holds. Raises WeightMapError with every problem if a part of it fits no network."""
    from ..checkpoint import open_checkpoint
    from ..sniff import OTHER, sniff
    from ..weight_map import identify, load_maps

    with open_checkpoint(path) as checkpoint:
        hits = identify(checkpoint.infos.keys())
        if not hits:
            given = " and ".join(str(part) for part in sniff(checkpoint) if part.component != OTHER)
            layouts = ", ".join(known.name for known in load_maps())
            unknown = f"of no known layout: its {len(checkpoint)} tensors have none of the names of {layouts}"
            raise WeightMapError(f"{path} is {given or unknown}")
        return [_check_part(path, checkpoint, hit, kinds) for hit in hits]


def _check_part(path: Path, checkpoint: Checkpoint, hit: Hit, kinds: list[Network]) -> Found:
    from ..load_plan import compare, report

    tried = []
    for network in kinds:
        if network.component == hit.map.component:
            plan, problems = compare(hit.map, hit.prefix, network.module, network.config, checkpoint)
            tried.append((plan, problems, network))
    if not tried:
        raise WeightMapError(f"{path} is {hit}, and the model has no such part")
    plan, problems, nearest = min(tried, key=lambda entry: len(entry[1]))
    if problems:
        message = report(plan, nearest.config, problems)
        raise WeightMapError(
            f"{message}\n  (the nearest: {', '.join(nearest.models)})", [p.text for p in problems]
        )
    models = [model for _, found, network in tried if not found for model in network.models]
    return Found(path, plan, tuple(models))


def _versions(model: str | None) -> list[SDVersion]:
    """The model named, or every one."""
    from ..versions import SDVersion

    return list(SDVersion) if model is None else [SDVersion.parse(model)]


def networks(versions: list[SDVersion]) -> list[Network]:
    """Every network that these models have, each size once; none is built yet."""
    from ..model_loader import FAMILIES
    from ..numerics import reference

    found: dict[tuple[str, Any], Network] = {}
    for info in (version.info for version in versions):
        for part in FAMILIES[info.family].networks(info, reference()).values():
            before = found.get((part.component, part.config))
            models = (info.key,) if before is None else (*before.models, info.key)
            found[part.component, part.config] = Network(part.component, part.config, part.on_meta, models)
    return list(found.values())

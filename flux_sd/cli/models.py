"""`flux-sd models`: the catalogue. Floor 10."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .console import Console, gigabytes, table

if TYPE_CHECKING:
    from ..versions import SDVersion, VersionInfo

EPILOG = """examples:
  flux-sd models                 all models
  flux-sd models flux-schnell    one of them in detail

disk: what is downloaded at first use.
memory: weights of the largest stage, in bfloat16 / float32; stages are loaded one after another.
here: what the download cache already has."""


def register(commands: Any) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser(
        "models",
        usage="flux-sd models [NAME] [options]",
        help="list the models: what each needs, its licence, and what is here already",
        description="Lists the models, or shows one in detail. Reads the disk only, never the network.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    parser.add_argument("name", nargs="?", metavar="NAME", help="such as flux-dev")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    """Carries out the command."""
    from ..versions import SDVersion

    console = Console(json=args.json)
    if args.name is None:
        entries = [describe(version) for version in SDVersion]
        console.document({"models": entries})
        console.line(table([HEADER, *(_row(entry) for entry in entries)]))
        return 0
    entry = describe(SDVersion.parse(args.name))
    console.document(entry)
    console.line(details(entry))
    return 0


UNTOLD = "as the files say: v_prediction as released; files of your own may want --prediction"
HEADER = ["model", "size", "steps", "disk", "memory", "licence", "here"]


def describe(version: SDVersion) -> dict[str, Any]:
    """Everything the catalogue says of one model, as plain values; bytes are whole numbers."""
    info = version.info
    parameters = dict(info.parameters)
    largest = max(parameters.values(), default=0)  # stages are loaded one after another
    state, cached = _cache(info)
    return {
        "name": info.key,
        "title": info.title,
        "width": info.width,
        "height": info.height,
        "steps": info.steps,
        "guidance": info.guidance,
        "t5_length": info.t5_length,
        "inpainting": info.is_inpainting,
        "takes_control": info.takes_control,
        "takes_reference": info.takes_reference,
        "sampler": getattr(info.sd, "sampler", None),
        "schedule": getattr(info.sd, "schedule", None),
        "prediction": getattr(info.sd, "prediction", None),
        "licence": info.licence,
        "repository": info.repo,
        "gated": info.gated,
        "parameters": parameters,
        "disk_bytes": _disk_bytes(version),
        "memory_bytes": {"bfloat16": largest * 2, "float32": largest * 4},
        "cache": {"state": state, "bytes": cached},
    }


def _disk_bytes(version: SDVersion) -> int:
    """The released weights at two bytes each; what ships in the package, as it lies there."""
    info = version.info
    if info.repo is not None:
        return 2 * sum(info.parameters.values())
    from ..errors import MissingFileError
    from ..model_loader import embedded_folder

    try:
        return sum(path.stat().st_size for path in embedded_folder(info).rglob("*") if path.is_file())
    except MissingFileError:
        return 0


def _cache(info: VersionInfo) -> tuple[str, int]:
    """("built in" or "complete", "partial", "absent", bytes in the cache)."""
    if info.repo is None:
        return "built in", 0
    if not info.hub_files:
        return "absent", 0
    from .. import hub

    state = hub.cache_state(info.repo, info.hub_files)
    return state.state, state.bytes


def _row(entry: dict[str, Any]) -> list[str]:
    memory = entry["memory_bytes"]
    needs = f"{gigabytes(memory['bfloat16'])} / {gigabytes(memory['float32'])}"
    return [
        entry["name"],
        f"{entry['width']}x{entry['height']}",
        str(entry["steps"]),
        gigabytes(entry["disk_bytes"]),
        needs,
        entry["licence"] + (" (gated)" if entry["gated"] else ""),
        _presence(entry),
    ]


def _presence(entry: dict[str, Any]) -> str:
    state, size = entry["cache"]["state"], entry["cache"]["bytes"]
    words = {"complete": "yes", "absent": "no", "partial": f"partly, {gigabytes(size)}"}
    return words.get(state, str(state))


def details(entry: dict[str, Any]) -> str:
    """One model on several lines, with what to do next."""
    memory = entry["memory_bytes"]
    lines = [
        f"{entry['title']}: --model {entry['name']}",
        f"  default size   {entry['width']}x{entry['height']} pixels",
        f"  default steps  {entry['steps']}",
        f"  guidance       {'not used' if entry['guidance'] is None else entry['guidance']}",
    ]
    if entry["t5_length"] is not None:
        lines.append(f"  T5 length      {entry['t5_length']} tokens")
    if entry["sampler"] is not None:
        lines.append(f"  sampler        {entry['sampler']}; others with --sampler")
        lines.append(f"  schedule       {entry['schedule']}; others with --schedule")
        lines.append(f"  predicts       {entry['prediction'] or UNTOLD}")
    if entry["inpainting"]:
        lines.append("  needs          --init-image and --mask")
    if entry["takes_control"]:
        lines.append("  needs          --control-image")
    if entry["takes_reference"]:
        lines.append("  takes          --reference")
    lines.append(f"  licence        {entry['licence']}")
    lines.append(f"  disk           {gigabytes(entry['disk_bytes'])}")
    lines.append(
        f"  memory         {gigabytes(memory['bfloat16'])} in bfloat16, "
        f"{gigabytes(memory['float32'])} in float32, for the weights of the largest stage"
    )
    lines += [f"  parameters     {count:>14,} {role}" for role, count in entry["parameters"].items()]
    lines.append(f"  here           {_presence(entry)}")
    return "\n".join([*lines, *_source(entry)])


def _source(entry: dict[str, Any]) -> list[str]:
    if entry["repository"] is None:
        return ["  source         this package"]
    page = f"https://huggingface.co/{entry['repository']}"
    lines = [f"  source         {page}"]
    if entry["gated"]:
        lines.append(
            "                 gated: accept the licence on that page, then log in with `hf auth login`"
        )
        lines.append("                 or set HF_TOKEN; files that you have already are used with --path")
    return lines

"""`flux-sd inspect`: what files hold, told by their headers, and which of our models they fit. Floor 10."""

from __future__ import annotations

import argparse
import functools
import os
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, FluxSdError
from .arguments import option_of
from .console import Console, gigabytes, printable, table

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from ..sniff import Found
    from .maps import Network

EPILOG = """examples:
  flux-sd inspect flux1-dev-Q4_K_S.gguf t5xxl_fp8_e4m3fn.safetensors
  flux-sd inspect sd_xl_base_1.0.safetensors         a file of several components: one line for each
  flux-sd inspect FLUX.1-dev                         every checkpoint of a model's folder
  flux-sd inspect flux1-dev.safetensors --blocks     tensors, bytes and types of each block

Reads headers only: seconds for a folder of 30 GB. exit code: 0 if every file was read, 2 if not."""
SHOWN_METADATA, SHOWN_LENGTH, SHOWN_PROBLEMS = 12, 100, 6  # entries; characters of each; problems of a part
FIRST_METADATA = ("general.architecture", "general.name", "modelspec.title", "modelspec.architecture")


def register(commands: Any) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser(
        "inspect",
        usage="flux-sd inspect FILE... [options]",
        help="show what is in files, and which models they fit",
        description="Shows what files hold: components, variants, types, sizes, and which models they fit.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="a checkpoint, the index of one, or a folder"
    )
    parser.add_argument("--blocks", action="store_true", help="also each block of each component")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    """Carries out `inspect`: 0 if every file was read, 2 if not. Every file is looked at."""
    console = Console(json=args.json)
    documents: list[dict[str, Any]] = []
    for name, report in (entry for given in args.files for entry in _reports(given)):
        if isinstance(report, FluxSdError):
            print(f"flux-sd: {printable(str(report))}", file=sys.stderr)
            documents.append({"file": name, "error": str(report)})
            continue
        for line in report.lines(printable(name), blocks=args.blocks):
            console.line(line)
        documents.append({"file": name, **report.document(blocks=args.blocks)})
    console.document({"files": documents})
    return 2 if any("error" in document for document in documents) else 0


def _reports(path: Path) -> Iterator[tuple[str, Report | FluxSdError]]:
    """(its name, what it holds or why it cannot be read) of every checkpoint at `path`."""
    from ..checkpoint import folder_candidates

    found: list[Sequence[Path]] = []
    unread: list[tuple[str, FluxSdError]] = []
    for folder in _folders(path):
        try:
            found += folder_candidates(folder)
        except FluxSdError as error:
            unread.append((str(folder), error))
    if not found and not unread:
        found = [[path]]
    for paths in found:
        report: Report | FluxSdError
        try:
            report = look(paths)
        except FluxSdError as error:
            report = error
        yield str(paths[0]), report
    yield from unread


def _folders(path: Path) -> list[Path]:
    """Where the checkpoints of a path are looked for: a folder and the folders in it, none for a file."""
    if not os.path.isdir(path):  # unlike Path.is_dir, it fails for no name
        return []
    try:
        inner = sorted(e.name for e in os.scandir(path) if e.is_dir() and not e.name.startswith("."))
    except OSError:
        inner = []  # listing it for checkpoints says why
    return [path, *(path / name for name in inner)]


# one file ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """The tensors of one component whose names agree up to their first number."""

    name: str
    tensors: int
    bytes: int
    types: dict[str, int]


@dataclass(frozen=True)
class Part:
    """One component of a file, held against our models."""

    found: Found
    fits: tuple[str, ...]  # models whose network it fills completely
    nearest: tuple[str, ...]  # where it fits none: the models that it misses by the fewest problems
    problems: tuple[str, ...]  # with those
    blocks: tuple[Block, ...]

    def document(self, blocks: bool) -> dict[str, Any]:
        found = self.found
        more = {"blocks": [vars(block) for block in self.blocks]} if blocks else {}
        return {
            "component": found.component, "what": found.what, "family": found.family,
            "variant": found.variant, "names": found.dialect, "prefix": found.prefix,
            "tensors": found.tensors, "bytes": found.bytes, "types": dict(found.dtypes),
            "packing": found.packing, "sizes": dict(found.sizes), "fits": list(self.fits),
            "nearest": list(self.nearest), "problems": list(self.problems), **more,
        }  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What one checkpoint holds. `refused` says why it cannot be loaded although its header can be read."""

    files: int
    tensors: int
    bytes: int
    parts: tuple[Part, ...]
    metadata: dict[str, str]
    advice: str
    refused: str

    def lines(self, label: str, blocks: bool) -> Iterator[str]:
        """The report as text; nothing out of the file reaches the terminal unescaped."""
        parts = f" in {self.files} files" if self.files > 1 else ""
        yield f"{label}: {self.tensors} tensors, {gigabytes(self.bytes)}{parts}"
        rows = [_row(part) for part in self.parts]
        head = ["component", "family", "variant", "names", "behind", "tensors", "bytes", "types", "fits"]
        text = table([head, *rows]) if rows else "no tensors"
        yield from (f"  {line}" for line in text.splitlines())
        for part in self.parts:
            yield from (f"  {line}" for line in _remarks(part))
        if blocks:
            for part in self.parts:
                yield from (f"  {line}" for line in _block_table(part))
        if self.metadata:
            entries = (f"{printable(k, 60)} = {printable(v, SHOWN_LENGTH)}" for k, v in self.metadata.items())
            yield f"  metadata: {'; '.join(entries)}"
        if self.refused:
            yield f"  not loaded: {printable(self.refused)}"
        if self.advice:
            yield f"  use it: {self.advice}"

    def document(self, blocks: bool) -> dict[str, Any]:
        """The report as a JSON object."""
        return {
            "files": self.files, "tensors": self.tensors, "bytes": self.bytes,
            "parts": [part.document(blocks) for part in self.parts], "metadata": self.metadata,
            "advice": self.advice, "refused": self.refused,
        }  # fmt: skip


def _row(part: Part) -> list[str]:
    found = part.found
    types = ", ".join(f"{count} {dtype}" for dtype, count in found.dtypes.items())
    packing = f" ({found.packing})" if found.packing.startswith("fp8") else ""
    fits = ", ".join(part.fits) or ("none" if found.map is not None else "")
    cells = [found.component, found.family, found.variant, found.dialect, found.prefix, str(found.tensors)]
    return [printable(cell) or "-" for cell in [*cells, gigabytes(found.bytes), types + packing, fits]]


def _remarks(part: Part) -> Iterator[str]:
    """Why a part fits no model, bounded."""
    from ..sniff import OTHER

    found = part.found
    if found.component == OTHER:
        names = ", ".join(found.names[:3]) + (", ..." if found.tensors > 3 else "")
        yield f"of no component: {printable(names)}"
    elif found.component == "adapter" and found.dialect:
        yield printable(f"{found}: give it with --lora; `flux-sd lora` says which models it fits")
    elif found.map is None:
        yield printable(f"{found}: this release does not load it")
    if part.problems:
        count = f"{len(part.problems)} problem" + "s" * (len(part.problems) > 1)
        yield f"{found.component}: {count} with {', '.join(part.nearest)}, the nearest"
        yield from (f"  {printable(problem, 300)}" for problem in part.problems[:SHOWN_PROBLEMS])
        if len(part.problems) > SHOWN_PROBLEMS:
            yield f"  ... and {len(part.problems) - SHOWN_PROBLEMS} more (--json lists all)"


def _block_table(part: Part) -> Iterator[str]:
    rows = [["block of " + part.found.component, "tensors", "bytes", "types"]]
    for block in part.blocks:
        types = ", ".join(f"{count} {dtype}" for dtype, count in block.types.items())
        size = f"{block.bytes / 1e6:.1f} MB"
        rows.append([printable(block.name, 100), str(block.tensors), size, types])
    yield from table(rows).splitlines()


# looking ----------------------------------------------------------------------------------------------------


def look(paths: Sequence[Path]) -> Report:
    """Reads the headers of one checkpoint. Raises FluxSdError where they cannot be read."""
    from ..checkpoint import open_checkpoint

    try:
        checkpoint = open_checkpoint(paths)
    except CheckpointError as error:
        return _refused(paths, error)
    with checkpoint:
        return _look(paths, checkpoint)


def _look(paths: Sequence[Path], checkpoint: Checkpoint) -> Report:
    from ..sniff import sniff

    parts = tuple(_held(found, checkpoint) for found in sniff(checkpoint))
    return Report(
        files=len(checkpoint.files),
        tensors=len(checkpoint) + len(checkpoint.absorbed),
        bytes=checkpoint.total_bytes,
        parts=parts,
        metadata=_shown(checkpoint.metadata),
        advice=_advice(paths, parts),
        refused="",
    )


def _refused(paths: Sequence[Path], error: CheckpointError) -> Report:
    """A report on files whose headers are sound though they cannot be loaded. Raises `error` for others."""
    from ..checkpoint import read_header
    from ..sniff import sniff_header

    try:
        headers = [read_header(path) for path in paths]
    except FluxSdError:
        raise error from None
    infos = {info.name: info for header in headers for info in header.infos}
    parts = tuple(Part(found, (), (), (), ()) for found in sniff_header(infos))
    metadata = {key: value for header in headers for key, value in header.metadata.items()}
    size = sum(info.nbytes for info in infos.values())
    return Report(len(paths), len(infos), size, parts, _shown(metadata), "", str(error))


@functools.cache  # each is built for the first file that is held against it
def _networks() -> tuple[Network, ...]:
    """Every network of every model."""
    from ..versions import SDVersion
    from .maps import networks

    return tuple(networks(list(SDVersion)))


def _held(found: Found, checkpoint: Checkpoint) -> Part:
    """A component with the models that it fits, or those that it misses by the least."""
    from ..load_plan import compare

    blocks = _blocks(found, checkpoint)
    tried = []
    for network in () if found.map is None else _networks():
        if found.map is not None and network.component == found.component:
            _, problems = compare(found.map, found.prefix, network.module, network.config, checkpoint)
            tried.append((problems, network.models))
    fits = tuple(model for problems, models in tried if not problems for model in models)
    if fits or not tried:
        return Part(found, fits, (), (), blocks)
    problems, models = min(tried, key=lambda entry: len(entry[0]))
    return Part(found, (), models, tuple(problem.text for problem in problems), blocks)


def _blocks(found: Found, checkpoint: Checkpoint) -> tuple[Block, ...]:
    from ..load_plan import block_of

    members: dict[str, list[str]] = {}
    for name in found.names:
        members.setdefault(block_of(name[len(found.prefix) :]), []).append(name)
    blocks = []
    for block in sorted(members, key=_natural):
        infos = [checkpoint.info(name) for name in members[block]]
        types = dict(Counter(info.dtype for info in infos))
        blocks.append(Block(block, len(infos), sum(info.nbytes for info in infos), types))
    return tuple(blocks)


def _natural(name: str) -> list[tuple[int, str]]:
    """So that block 2 comes before block 10."""
    return [(int(part), "") if part.isdecimal() and len(part) < 9 else (-1, part) for part in name.split(".")]


def _shown(metadata: dict[str, str]) -> dict[str, str]:
    """The entries worth a look, the telling ones first, bounded."""
    first = [key for key in FIRST_METADATA if key in metadata]
    rest = [key for key in metadata if key not in first and not key.startswith("comfy.gguf.orig_shape.")]
    return {key: metadata[key][:SHOWN_LENGTH] for key in [*first, *rest][:SHOWN_METADATA]}


def _advice(paths: Sequence[Path], parts: Sequence[Part]) -> str:
    """The command that takes this file, for a model that each of its parts fits."""
    from ..model_files import config_of, differences, layout_of
    from ..sniff import OTHER
    from ..versions import SDVersion

    ours = [part for part in parts if part.found.component != OTHER]
    models = [model for model in (ours[0].fits if ours else ()) if all(model in part.fits for part in ours)]
    if not models or len(paths) > 1:
        return ""
    found, info = ours[0].found, SDVersion.parse(models[0]).info
    of_kind = (role for role, component in layout_of(info).maps.items() if component == found.component)
    fitting = (role for role in of_kind if not differences(found, config_of(role, info)))
    role = "path" if len(ours) > 1 else next(fitting)
    command = ["flux-sd", "generate", "a prompt", "--model", models[0], option_of(role), str(paths[0])]
    return printable(shlex.join(command))

"""Any checkpoint to another container, number type and dialect, a few rows at a time. Floor 6.

`convert` decides names (`dialects.py`), types and sizes from headers alone, writes the new header, and then
streams every tensor: read some rows, encode them, append them. Memory does not grow with the file. Rows that
are already of the wanted type are copied byte for byte, so a change of names alone loses nothing.

The output appears under its name when it is complete, and not before.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import torch
from torch import Tensor

from .checkpoint import Checkpoint, open_checkpoint
from .checkpoint_writer import GGUF_ALIGNMENT, Entry, gguf_header, padding, safetensors_header
from .dialects import OutputTensor, Translation, translate
from .errors import CheckpointError, DiskSpaceError, OutputError
from .float8 import CONFIG_TABLE
from .ggml_types import GGML_TYPES
from .gguf_quantize import quantize
from .image import check_output, write_file
from .request import CancelToken
from .targets import GGUF_FILE_TYPES, KEPT, KEPT_FROM_FP8, SMALL, Target, parse_target
from .tensor_info import DTYPES, FLOAT8, TensorInfo

OnProgress = Callable[[int, int], None]  # (bytes written, bytes in all)

CHUNK = 2**20  # values that are decoded and encoded at a time: 4 MB in float32
GGML_NAME = 64  # bytes for a tensor's name, with the zero behind it, in programs built on ggml

# Metadata of a GGUF file that describes the model and not the file; the rest is not taken over.
DESCRIPTIONS = (
    *(f"general.{key}" for key in ("name", "author", "organization", "version", "description", "url")),
    *(f"general.{key}" for key in ("license", "license.name", "license.link", "source.url")),
)
# By component; the others have no agreed name.
GGUF_ARCHITECTURES: Mapping[str, str] = MappingProxyType({"flux_mmdit": "flux", "t5": "t5encoder"})
GGUF_QUANTIZATION_VERSION = 2  # of the block layouts; ggml's GGML_QNT_VERSION
FOREIGN = "safetensors."  # before the keys of a safetensors file's metadata, in a GGUF file


@dataclass(frozen=True)
class Conversion:
    """What was written."""

    path: Path
    target: Target
    found: str  # the map of the source, such as "flux_mmdit.diffusers"
    written: str  # the map of the output
    types: Mapping[str, int]  # type -> number of tensors
    bytes_in: int  # of the tensors that were read
    bytes_out: int  # of the file
    ignored: Mapping[str, str]  # tensors of the source that are not part of it -> reason
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Item:
    """One tensor of the output; `tensor` None is the marker of scaled fp8 files, which holds no value."""

    entry: Entry
    tensor: OutputTensor | None
    is_scale: bool = False  # the scale of `tensor`, not its values


@dataclass
class _Work:
    """What the parts of one conversion share."""

    checkpoint: Checkpoint
    translation: Translation
    target: Target
    items: Sequence[_Item]
    cancel: CancelToken | None
    scales: dict[str, float] = field(default_factory=dict)  # output tensor -> scale, once it was measured
    clamped: Counter[str] = field(default_factory=Counter)  # output tensor -> values beyond the type's range
    done: int = 0  # bytes written


def convert(
    source: Path | str | Sequence[Path | str],
    destination: Path | str,
    to: str,
    *,
    dialect: str | None = None,
    component: str | None = None,
    overwrite: bool = False,
    cancel: CancelToken | None = None,
    on_progress: OnProgress | None = None,
) -> Conversion:
    """Writes one component of `source` (anything `open_checkpoint` takes) to the file `destination`.

    `to`: a name in TARGETS. `dialect`: whose names to write (None: those of the source, without a prefix).
    `component`: which one, where the source holds several. Raises RequestError, OutputError, DiskSpaceError,
    CheckpointError, WeightMapError or Cancelled; then there is no new file, and an old one is as it was.
    """
    target, destination = parse_target(to), Path(destination)
    with open_checkpoint(source) as checkpoint:
        _check_destination(destination, target, checkpoint, overwrite)
        translation = translate(checkpoint, component, dialect)
        items = _plan_items(checkpoint, translation, target)
        work = _Work(checkpoint, translation, target, items, cancel)
        header = _header(work)
        total = len(header) + sum(_stored_bytes(item.entry, target) for item in items)
        _check_room(destination, total)

        def write(file: BinaryIO) -> None:
            for part in _stream(header, work):
                file.write(part)
                work.done += len(part)
                if on_progress is not None:
                    on_progress(work.done, total)

        write_file(destination, write, overwrite)
        return _conversion(destination, work)


def _conversion(path: Path, work: _Work) -> Conversion:
    """The account of a conversion that is done."""
    sources = {name for item in work.items if item.tensor for name in item.tensor.sources}
    return Conversion(
        path,
        work.target,
        found=work.translation.found.name,
        written=work.translation.wanted.name,
        types=Counter(item.entry.dtype for item in work.items),
        bytes_in=sum(work.checkpoint.info(name).nbytes for name in sources),
        bytes_out=work.done,
        ignored=work.translation.ignored,
        notes=_notes(work),
    )


# what is decided from headers ---------------------------------------------------------------------------


def _check_destination(path: Path, target: Target, checkpoint: Checkpoint, overwrite: bool) -> None:
    if path.exists() and any(path.samefile(file) for file in checkpoint.files):
        raise OutputError(f"{str(path)!r} is the source itself: choose another name")
    suffix = path.suffix.lower()
    if suffix not in target.suffixes:
        found = f"ends in {path.suffix!r}" if suffix else "has no ending"
        wanted = " or ".join(target.suffixes)
        raise OutputError(
            f"{path.name!r} {found}, but {target.name} makes a {target.container} file: end it in {wanted}"
        )
    check_output(path, overwrite, suffix)


def _check_room(path: Path, need: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if need > free:
        raise DiskSpaceError(
            f"{str(path)!r} will have {need / 1e9:,.2f} GB and its disk has {free / 1e9:,.2f} GB free: "
            "make room or choose another disk; nothing was written"
        )


def _plan_items(checkpoint: Checkpoint, translation: Translation, target: Target) -> list[_Item]:
    """Every tensor of the output with its type, in the order in which they are written."""
    component = translation.wanted.component
    items: list[_Item] = []
    for tensor in translation.tensors:
        infos = [checkpoint.info(name) for name in tensor.sources]
        dtype = storage_type(target, component, tensor, infos)
        items.append(_Item(Entry(tensor.name, tensor.shape, dtype), tensor))
        if target.scaled and dtype in FLOAT8:
            scale = tensor.name.removesuffix("weight") + "scale_weight"
            items.append(_Item(Entry(scale, (), "F32"), tensor, is_scale=True))
    if target.scaled:
        items.append(_Item(Entry("scaled_fp8", (0,), target.type), None))
    if target.container == "safetensors":  # wider types first: then each tensor is aligned to its own
        items.sort(key=lambda item: -DTYPES[item.entry.dtype].itemsize)
    return items


def storage_type(target: Target, component: str, tensor: OutputTensor, infos: Collection[TensorInfo]) -> str:
    """The type that a tensor gets in a file of this target; `infos` are those of its sources."""
    shape, stored = tensor.shape, {info.dtype for info in infos}
    if target.container == "gguf" and (len(shape) < 2 or math.prod(shape) <= SMALL):
        return "F32"
    block = GGML_TYPES[target.type].block if target.container == "gguf" else 1
    fits = block == 1 or shape[-1] % block == 0  # a file that reshapes has blocks across the ends of rows
    as_it_is = stored == {target.type} and not target.scaled and all(info.scale is None for info in infos)
    if (as_it_is and fits) or not target.quantises:
        return target.type  # what has the type already is copied, whichever layer it is
    kept = KEPT.get(component, ())
    if target.type in FLOAT8:
        kept += KEPT_FROM_FP8.get(component, ())
    if len(shape) != 2 or not fits or any(name.startswith(kept) for name in tensor.parameters):
        return "BF16" if stored == {"BF16"} else "F16"
    return target.type


def _header(work: _Work) -> bytes:
    entries, kept = [item.entry for item in work.items], kept_metadata(work.checkpoint.metadata)
    if work.target.container == "safetensors":
        return safetensors_header(entries, {"format": "pt"} | kept)
    facts: dict[str, str | int] = {}
    component = work.translation.wanted.component
    if component in GGUF_ARCHITECTURES:
        facts["general.architecture"] = GGUF_ARCHITECTURES[component]
    facts["general.quantization_version"] = GGUF_QUANTIZATION_VERSION
    facts["general.file_type"] = GGUF_FILE_TYPES[work.target.type]
    facts |= {key if key in DESCRIPTIONS else FOREIGN + key: text for key, text in kept.items()}
    return gguf_header(entries, facts)


def kept_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """What a source's metadata says that still holds for the output, by the names it has in safetensors."""
    if not any(key.startswith("general.") for key in metadata):
        return {key: text for key, text in metadata.items() if key != CONFIG_TABLE}
    kept = {key: text for key, text in metadata.items() if key in DESCRIPTIONS}
    foreign = {key: text for key, text in metadata.items() if key.startswith(FOREIGN)}
    return kept | {key.removeprefix(FOREIGN): text for key, text in foreign.items()}


def _stored_bytes(entry: Entry, target: Target) -> int:
    return entry.nbytes + (padding(entry.nbytes, GGUF_ALIGNMENT) if target.container == "gguf" else 0)


def _notes(work: _Work) -> tuple[str, ...]:
    notes = []
    types = {item.entry.dtype for item in work.items}
    if work.target.type not in types:
        notes.append(
            f"no tensor became {work.target.type}: only matrices do, of rows that are whole blocks, and not "
            "the layers that stay in 16 bits"
        )
    if work.clamped:
        limit = torch.finfo(DTYPES[work.target.type]).max
        worst, _ = work.clamped.most_common(1)[0]
        notes.append(
            f"{work.clamped.total()} values in {len(work.clamped)} tensors lay beyond {limit:g}, the largest "
            f"that {work.target.type} holds, and became that; most of them in {worst}"
        )
    decoded = {
        info.dtype
        for item in work.items
        for info in (map(work.checkpoint.info, item.tensor.sources) if item.tensor else ())
        if info.packed and info.dtype != item.entry.dtype
    }
    if decoded:
        kinds = ", ".join(sorted(decoded))
        notes.append(f"the source is quantised ({kinds}): what that lost, no other type brings back")
    names = [item.entry.name for item in work.items if len(item.entry.name.encode()) >= GGML_NAME]
    if work.target.container == "gguf" and names:
        notes.append(f"programs built on ggml refuse names of over {GGML_NAME - 1} bytes, such as {names[0]}")
    return tuple(notes)


# values -------------------------------------------------------------------------------------------------


def _stream(header: bytes, work: _Work) -> Iterator[memoryview]:
    """The bytes of the file, in order."""
    yield memoryview(header)
    for item in work.items:
        length = 0
        for part in _encoded(item, work):
            if work.cancel is not None:
                work.cancel.check()
            data = part.contiguous().view(-1).view(torch.uint8).numpy().data
            length += len(data)
            yield data
        if length != item.entry.nbytes:
            raise AssertionError(f"{item.entry.name}: {length} bytes encoded, {item.entry.nbytes} announced")
        if work.target.container == "gguf":
            yield memoryview(bytes(padding(length, GGUF_ALIGNMENT)))
        for source in item.tensor.sources if item.tensor else ():
            work.checkpoint.release(source)


def _encoded(item: _Item, work: _Work) -> Iterator[Tensor]:
    """The values of one tensor of the output as they are stored, some rows at a time."""
    if item.tensor is None:
        return
    if item.is_scale:
        work.scales[item.tensor.name] = _measure_scale(item, work)
        yield torch.tensor(work.scales[item.tensor.name])
        return
    wanted = "F32" if item.tensor.name in work.scales else item.entry.dtype
    for values in _rows(item.tensor, wanted, work):
        stored = values.dtype == torch.uint8 or values.dtype == DTYPES.get(item.entry.dtype)
        yield values if stored else _encode(values, item.entry, work)


def _rows(tensor: OutputTensor, dtype: str, work: _Work) -> Iterator[Tensor]:
    """[n, width] after [n, width] of a tensor: of the type `dtype` (a block type: its bytes) where the
    checkpoint has it so, otherwise float32."""
    checkpoint = work.checkpoint
    width = math.prod(tensor.shape[1:])
    if tensor.transposed:
        yield from _transposed(tensor, work)
        return
    step = max(1, CHUNK // max(1, width))
    for piece in tensor.pieces:
        info = checkpoint.info(piece.source)
        same = info.dtype == dtype and info.scale is None
        for first in range(piece.first, piece.first + piece.rows, step):
            rows = min(step, piece.first + piece.rows - first)
            if same and info.torch_dtype is None:
                yield checkpoint.mapped(piece.source).view(info.shape[0], -1)[first : first + rows]
                continue
            plain = info.torch_dtype if same else None
            out = torch.empty(rows, width, dtype=plain or torch.float32)
            checkpoint.copy_into(piece.source, out, start=first * width)
            yield out


def _transposed(tensor: OutputTensor, work: _Work) -> Iterator[Tensor]:
    """[n, width] after [n, width], float32. Keeps the whole matrix: its rows are columns in the file."""
    columns, rows = tensor.shape[1], tensor.shape[0]
    whole = torch.empty(columns, rows)
    for piece in tensor.pieces:
        part = whole[piece.at : piece.at + piece.rows]
        work.checkpoint.copy_into(piece.source, part, start=piece.first * rows)
    yield from whole.t().split(max(1, CHUNK // max(1, columns)))


def _measure_scale(item: _Item, work: _Work) -> float:
    """The scale with which the largest magnitude of a tensor becomes the largest that fp8 holds."""
    assert item.tensor is not None
    largest = 0.0
    for values in _rows(item.tensor, "F32", work):
        _check_finite(values, item.tensor.name, work.target.type)
        largest = max(largest, values.abs().max().item())
    return largest / torch.finfo(DTYPES[work.target.type]).max or 1.0


def _encode(values: Tensor, entry: Entry, work: _Work) -> Tensor:
    """float32 [n, width] -> as stored."""
    dtype = DTYPES.get(entry.dtype)
    if dtype is None:
        _check_finite(values, entry.name, entry.dtype)
        return quantize(values, entry.dtype)
    if entry.dtype in FLOAT8:
        _check_finite(values, entry.name, entry.dtype)
        limit = torch.finfo(dtype).max
        scaled = values / work.scales.get(entry.name, 1.0)
        if entry.name not in work.scales:
            beyond = int((scaled.abs() > limit).sum())
            work.clamped += Counter({entry.name: beyond})
        return scaled.clamp_(-limit, limit).to(dtype)
    cast = values.to(dtype)
    if dtype == torch.float16 and bool((cast.isinf() & values.isfinite()).any()):
        raise CheckpointError(
            f"{entry.name} has values up to {values.abs().max().item():g}, float16 ends at 65504: convert "
            "to safetensors:bf16 first, and from that file on"
        )
    return cast


def _check_finite(values: Tensor, name: str, dtype: str) -> None:
    if not bool(values.isfinite().all()):
        raise CheckpointError(f"{name} holds NaN or infinity, which {dtype} cannot: the source is damaged")

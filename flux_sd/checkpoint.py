"""Checkpoints on disk behind one interface: names, shapes, stored types, and tensors read as they are wanted.

Floor 2. `open_checkpoint` takes a safetensors file, several of them, a shard index or a folder that holds
one of those, reads headers only, and trusts nothing in them: every length and offset is held against the
size of the file before use. Tensors come from a memory map, a piece at a time, and the pages of a piece
are given back once it has been copied, so that loading needs what stays plus one piece.

The container format is confined to `read_header`: another one adds a branch there.
Counterpart in Candle: `VarBuilder::from_mmaped_safetensors`. Format: the safetensors README (format section).
"""

from __future__ import annotations

import json
import math
import mmap
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from .errors import AmbiguousFileError, CheckpointError, MissingFileError

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SUFFIXES = (".safetensors", ".sft")
PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
INDEX_MARK = ".safetensors.index."
MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation
MAX_DIMENSIONS = 8
PIECE = 16 * 2**20  # bytes copied between two releases of pages


@dataclass(frozen=True)
class TensorInfo:
    """What a header says about one tensor. `dtype` is the container's own word for it, such as "BF16"."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    file: Path
    offset: int  # of the first byte, from the start of the file

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """The checked header of one file."""

    infos: tuple[TensorInfo, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)


class Checkpoint:
    """Tensors of one or more files under one set of names. A context manager; lazy."""

    def __init__(self, files: Sequence[Path], headers: Sequence[Header]) -> None:
        self.files: tuple[Path, ...] = tuple(files)
        self.metadata: dict[str, str] = {}
        self._infos: dict[str, TensorInfo] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        self._closed = False
        for header in headers:
            self.metadata.update(header.metadata)
            for info in header.infos:
                if info.name in self._infos:
                    other = self._infos[info.name].file
                    raise CheckpointError(f"{other} and {info.file} both hold {info.name!r}: give one")
                self._infos[info.name] = info

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name, in the order of the files."""
        return self._infos

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._infos)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(info.nbytes for info in self._infos.values())

    @property
    def label(self) -> str:
        """How messages call this checkpoint: its file, or its first file and the number of the others."""
        more = len(self.files) - 1
        return str(self.files[0]) + (f" (and {more} more)" if more else "")

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def __len__(self) -> int:
        return len(self._infos)

    def info(self, name: str) -> TensorInfo:
        """The description of one tensor. Raises CheckpointError for a name that no file holds."""
        if name not in self._infos:
            raise CheckpointError(f"{self.label} holds no tensor {name!r}")
        return self._infos[name]

    def read(self, name: str) -> Tensor:
        """A copy of one tensor, shape and type as stored. The pages it was read from are released."""
        info = self.info(name)
        out = torch.empty(info.shape, dtype=DTYPES[info.dtype])
        self.copy_into(name, out)
        return out

    def mapped(self, name: str) -> Tensor:
        """One tensor as a view on the file, not to be written to; it keeps the file mapped while it lives.

        An offset that is not a multiple of the element size (legal, rare) gives a copy.
        """
        info = self.info(name)
        dtype = DTYPES[info.dtype]
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=dtype)
        stored = _view_bytes(self._mapping(info.file), info.offset, info.nbytes)
        aligned = stored if info.offset % dtype.itemsize == 0 else stored.clone()
        return aligned.view(dtype).view(info.shape)

    def copy_into(self, name: str, destination: Tensor, start: int = 0) -> None:
        """Fills a contiguous `destination` (any shape, type, device) from element `start` of `name` on.

        Elements count in row-major order, so a range of rows is a range of elements. They are converted to
        the destination's type piece by piece; each piece's pages are released before the next is touched.
        """
        info = self.info(name)
        if start < 0 or start + destination.numel() > info.numel:
            end = start + destination.numel()
            raise ValueError(f"{name} has {info.numel} elements, asked for {start} to {end}")
        source, out = self.mapped(name).view(-1), destination.view(-1)
        itemsize = source.element_size()
        step = max(1, PIECE // itemsize)
        for begin in range(0, out.numel(), step):
            end = min(begin + step, out.numel())
            out[begin:end].copy_(source[start + begin : start + end])
            first = info.offset + (start + begin) * itemsize
            self._release(info.file, first, first + (end - begin) * itemsize)

    def release(self, name: str | None = None) -> None:
        """Gives back the file pages of one tensor, or of all; they are read again when touched again."""
        if name is not None:
            info = self.info(name)
            self._release(info.file, info.offset, info.offset + info.nbytes)
            return
        for path, mapping in self._maps.items():
            self._release(path, 0, len(mapping))

    def close(self) -> None:
        """Lets go of the maps; nothing can be read after. A view from `mapped` keeps its own map.

        The maps are not closed by hand: torch holds the object and not its buffer, so a view would then point
        at memory that is gone.
        """
        self._maps.clear()
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _mapping(self, path: Path) -> mmap.mmap:
        if self._closed:
            raise CheckpointError(f"{self.label} was closed: open it again to read from it")
        if path not in self._maps:
            try:
                with path.open("rb") as file:
                    mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from error
            last = max(info.offset + info.nbytes for info in self._infos.values() if info.file == path)
            if len(mapping) < last:
                mapping.close()
                raise CheckpointError(f"{path} became shorter since its header was read; open it again")
            self._maps[path] = mapping
        return self._maps[path]

    def _release(self, path: Path, begin: int, end: int) -> None:
        mapping = self._maps.get(path)
        if mapping is None or not hasattr(mmap, "MADV_DONTNEED"):
            return  # nothing mapped, or a system without the call: same results, more memory
        begin -= begin % mmap.PAGESIZE
        if begin < min(end, len(mapping)):
            mapping.madvise(mmap.MADV_DONTNEED, begin, min(end, len(mapping)) - begin)


def _view_bytes(mapping: mmap.mmap, offset: int, nbytes: int) -> Tensor:
    """uint8 [nbytes] on a read-only map."""
    with warnings.catch_warnings():
        # torch has no read-only tensors and says so. A private writable map would need no silencing, but the
        # kernel counts it against memory and refuses files larger than the machine has.
        warnings.simplefilter("ignore", UserWarning)
        return torch.frombuffer(mapping, dtype=torch.uint8, count=nbytes, offset=offset)


# ---------------------------------------------------------------------------------------------------------
# opening


def open_checkpoint(paths: Path | str | Sequence[Path | str]) -> Checkpoint:
    """Opens a file, a shard index, a folder with one of those, or several of them as one checkpoint.

    Raises MissingFileError, AmbiguousFileError (a folder with two candidates) or CheckpointError (damaged).
    """
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    if not given:
        raise MissingFileError("no checkpoint file was given")
    files: list[Path] = []
    headers: list[Header] = []
    for path in map(Path, given):
        index, parts = _resolve(path)
        part_headers = [read_header(part) for part in parts]
        if index is not None:
            _check_index(index, part_headers)
        files += parts
        headers += part_headers
    return Checkpoint(files, headers)


def _resolve(path: Path) -> tuple[Path | None, list[Path]]:
    """(index or None, the files to open) for one path that the user gave."""
    if path.is_dir():
        found = folder_candidates(path)
        if not found:
            raise MissingFileError(f"the folder {path} holds no .safetensors file" + _other_weights(path))
        if len(found) > 1:
            names = " and ".join(candidate[0].name for candidate in found)
            raise AmbiguousFileError(f"the folder {path} holds {names}: give the one to load as a file")
        if _shard_number(found[0][0]) is not None:
            return None, _complete(found[0])
        path = found[0][0]
    if not path.exists():
        raise MissingFileError(f"{path} does not exist")
    if INDEX_MARK in path.name and path.suffix == ".json":
        return path, _shards(path)
    return None, [path]


def folder_candidates(folder: Path) -> list[tuple[Path, ...]]:
    """What in a folder could be the checkpoint: an index, a single file, or shards without an index."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    indexes = [path for path in files if INDEX_MARK in path.name and path.suffix == ".json"]
    weights = [path for path in files if path.suffix in SUFFIXES]
    sets: dict[str, list[Path]] = {}
    for path in weights:
        number = _shard_number(path)
        if number is not None:
            sets.setdefault(number[0], []).append(path)
    singles = [path for path in weights if _shard_number(path) is None]
    without_index = [] if indexes else [tuple(shards) for shards in sets.values()]
    return [(path,) for path in indexes + singles] + without_index


def _shard_number(path: Path) -> tuple[str, int, int] | None:
    """("model", 1, 2) for model-00001-of-00002.safetensors, None for a name that is no shard's."""
    head, mark, tail = path.stem.rpartition("-of-")
    stem, _, number = head.rpartition("-")
    count = tail.partition(".")[0]  # old variants are called X-00001-of-00002.fp16
    if not (mark and number.isdecimal() and count.isdecimal()):
        return None
    return stem + tail[len(count) :], int(number), int(count)


def _complete(shards: Sequence[Path]) -> list[Path]:
    numbers = {number[1]: path for path in shards if (number := _shard_number(path)) is not None}
    first = _shard_number(shards[0])
    count = first[2] if first else 0
    missing = [str(i) for i in range(1, count + 1) if i not in numbers]
    if missing:
        raise MissingFileError(f"shard {', '.join(missing)} of {count} is missing beside {shards[0]}")
    return [numbers[i] for i in sorted(numbers)]


def _other_weights(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if path.suffix in (*PICKLE_SUFFIXES, ".gguf"))
    return f"; {names[0]} is of a kind that is not read from a folder" if names else ""


def _index_map(index: Path) -> dict[str, str]:
    """tensor name -> shard file name, as the index lists them."""
    try:
        text = index.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{index} cannot be read: {error.strerror}") from error
    content = _parse_json(text, index, "shard index")
    listed = content.get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(shard, str) for shard in listed.values()):
        raise CheckpointError(f"{index} is no shard index: it has no weight_map from tensors to files")
    for shard in listed.values():
        if Path(shard).name != shard or shard in ("", ".", ".."):
            raise CheckpointError(f"{index} names the shard {shard!r}: a file beside the index was expected")
    return listed


def _shards(index: Path) -> list[Path]:
    shards = [index.parent / name for name in sorted(set(_index_map(index).values()))]
    missing = [path.name for path in shards if not path.is_file()]
    if missing:
        raise MissingFileError(f"{index} needs {', '.join(missing)} beside it: download it again")
    return shards


def _check_index(index: Path, headers: Sequence[Header]) -> None:
    """Holds the index against the shards' own headers, both ways."""
    listed = _index_map(index)
    held = {info.name: info.file.name for header in headers for info in header.infos}
    for name, shard in listed.items():
        if held.get(name) != shard:
            found = f"{index} places {name!r} in {shard}, which does not hold it"
            raise CheckpointError(found + ": the files do not belong together, download them again")
    for name, shard in held.items():
        if name not in listed:
            found = f"{shard} holds {name!r}, which {index} does not list"
            raise CheckpointError(found + ": the files do not belong together, download them again")


# ---------------------------------------------------------------------------------------------------------
# headers


def read_header(path: Path) -> Header:
    """The checked header of one safetensors file. Reads the header's bytes and nothing else."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or not 2 <= length <= min(size - 8, MAX_HEADER):
                raise CheckpointError(_not_safetensors(path, start + file.read(56), size))
            text = file.read(length)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise MissingFileError(f"{path} does not exist") from error
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if not text.startswith(b"{"):
        raise CheckpointError(_not_safetensors(path, start + text[:56], size))
    content = _parse_json(text, path, "safetensors header")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: __metadata__ in the header is no table")
    infos = tuple(_tensor_info(path, name, entry, 8 + length, size) for name, entry in content.items())
    _check_cover(path, infos, 8 + length, size)
    return Header(infos, {str(key): str(value) for key, value in metadata.items()})


def _not_safetensors(path: Path, head: bytes, size: int) -> str:
    """One sentence on what a file is that does not begin like safetensors."""
    length = int.from_bytes(head[:8], "little")
    if size == 0:
        return f"{path} is empty: download it again"
    if head.startswith(b"GGUF"):
        return f"{path} is a GGUF file, which this release does not read: give a .safetensors file"
    if head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")) or path.suffix in PICKLE_SUFFIXES:
        return f"{path} is a pickle, which can run code when it is read: give a .safetensors file"
    if head.startswith(b"version https://git-lfs"):
        return f"{path} is a Git LFS pointer, not the weights: run git lfs pull or download the file itself"
    if not head.strip(b"\0"):
        return f"{path} begins with zeros: an interrupted download, or no safetensors file; get it again"
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head):
        return f"{path} is a text file, not safetensors: it may be an error page saved under that name"
    if size < 8 or (head[8:9] == b"{" and length > size - 8):
        return f"{path} is truncated: the header alone has {length} bytes, the file {size}; download it again"
    return f"{path} is no safetensors file: it does not begin with the length of a JSON header"


def _parse_json(text: bytes, path: Path, what: str) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise CheckpointError(f"{path}: the {what} has {twice!r} twice")
        return table

    try:
        content = json.loads(text, object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the {what} is no valid JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: the {what} is no JSON table")
    return content


def _naturals(value: Any, limit: int) -> tuple[int, ...] | None:
    """`value` as a tuple, if it is a list of at most `limit` whole numbers of 0 or more."""
    if not isinstance(value, list) or len(value) > limit:
        return None
    return tuple(value) if all(type(item) is int and item >= 0 for item in value) else None


def _tensor_info(path: Path, name: str, entry: Any, base: int, size: int) -> TensorInfo:
    """Checks one entry of the header; `base` is where the tensor data begins in a file of `size` bytes."""
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape = fields.get("dtype"), _naturals(fields.get("shape"), MAX_DIMENSIONS)
    offsets = _naturals(fields.get("data_offsets"), 2)
    if not isinstance(dtype, str) or shape is None or offsets is None or len(offsets) != 2:
        raise CheckpointError(f"{path}: the header's entry for {name!r} is no dtype, shape and two offsets")
    if dtype not in DTYPES:
        known = ", ".join(DTYPES)
        raise CheckpointError(f"{path}: {name!r} has the unknown type {dtype[:40]!r}; known are {known}")
    begin, end = offsets
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != nbytes:
        raise CheckpointError(
            f"{path}: {name!r} of shape {list(shape)} and type {dtype} needs {nbytes} bytes, "
            f"the header gives it {end - begin}"
        )
    if base + end > size:
        raise CheckpointError(
            f"{path} is truncated: {name!r} ends at byte {base + end}, the file has {size}; download it again"
        )
    return TensorInfo(name, shape, dtype, nbytes, path, base + begin)


def _check_cover(path: Path, infos: Iterable[TensorInfo], base: int, size: int) -> None:
    """The tensors must tile the data section: no overlap, no hole, nothing behind the last."""
    position, before = base, "the header"
    for info in sorted(infos, key=lambda info: (info.offset, info.nbytes)):
        if info.offset != position:
            what = "overlaps" if info.offset < position else "leaves a hole behind"
            raise CheckpointError(f"{path}: {info.name!r} {what} {before}: the header lies about offsets")
        position, before = info.offset + info.nbytes, repr(info.name)
    if position != size:
        raise CheckpointError(f"{path}: {size - position} bytes follow the last tensor: the file is damaged")

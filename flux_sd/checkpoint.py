"""Checkpoints on disk behind one interface: names, shapes, stored types, and tensors read as they are wanted.

Floor 2. `open_checkpoint` takes a safetensors, GGUF or torch file, several of them, a shard index or a folder
that holds one of those, reads headers only, and trusts nothing in them. Tensors come from a memory map, a
piece at a time, and the pages of a piece are given back once it has been copied or decoded, so that loading
needs what stays plus one piece.

The containers are confined to `read_header`; all else sees `TensorInfo` alone. Weights that are not yet
numbers (GGML blocks, fp8 with scales) are decoded by `read` and `copy_into`; `mapped` and `scale` give them
as they are stored. Counterparts in Candle: `VarBuilder::from_mmaped_safetensors`, `from_gguf`.
"""

from __future__ import annotations

import math
import mmap
import os
import stat
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from .errors import AmbiguousFileError, CheckpointError, MissingFileError
from .float8 import decode_float8, find_scales
from .ggml_types import GGML_TYPES, PLAIN, row_bytes
from .gguf_dequant import SUPPORTED, dequantize
from .gguf_header import MAGIC, read_gguf_header, read_gguf_metadata
from .gguf_header import SUFFIX as GGUF
from .pickle_reader import SUFFIXES as PICKLES
from .pickle_reader import is_pickle, read_pickle_header
from .safetensors_header import MAX_HEADER, parse_json, read_safetensors_header
from .safetensors_header import SUFFIXES as SAFETENSORS
from .tensor_info import MAX_NAME, Header, TensorInfo, is_name

SUFFIXES = (*SAFETENSORS, GGUF)
INDEX_MARKS = (".safetensors.index.", ".bin.index.")
GGUF_TYPES = tuple(dict.fromkeys((*PLAIN, *SUPPORTED)))  # what a tensor of a GGUF file may be
PIECE = 16 * 2**20  # bytes, as numbers, that are copied between two releases of pages


class Checkpoint:
    """Tensors of one or more files under one set of names. A context manager; lazy."""

    def __init__(self, files: Sequence[Path], headers: Sequence[Header]) -> None:
        self.files: tuple[Path, ...] = tuple(files)
        self.metadata: dict[str, str] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        self._closed = False
        self._stored: dict[str, TensorInfo] = {}  # every tensor of the files
        self._held: dict[str, Tensor] = {}  # those of them that torch has, see pickle_reader.py
        for header in headers:
            self.metadata.update(header.metadata)
            self._held.update(header.held)
            for info in header.infos:
                if info.name in self._stored:
                    other = self._stored[info.name].file
                    raise CheckpointError(f"{other} and {info.file} both hold {info.name!r}: give one")
                self._stored[info.name] = info
        self._infos, self._absorbed = find_scales(self._stored, self.metadata, self._small, self.label)

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor that is a weight, by name, in the order of the files."""
        return self._infos

    @property
    def absorbed(self) -> Mapping[str, str]:
        """The scales and markers of fp8 weights, which `infos` leaves out: name -> what it is."""
        return self._absorbed

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
        """A copy of one tensor: of the type it is stored in, float32 where it is packed."""
        info = self.info(name)
        dtype = torch.float32 if info.packed or info.torch_dtype is None else info.torch_dtype
        out = torch.empty(info.shape, dtype=dtype)
        self.copy_into(name, out)
        return out

    def mapped(self, name: str) -> Tensor:
        """One tensor as a view on the file, not to be written to; it keeps the file mapped while it lives.

        Block types are uint8 [stored rows, bytes of a row]; fp8 comes without its scale. An offset that is no
        multiple of the element size (legal, rare) gives a copy.
        """
        info = self.info(name)
        if info.torch_dtype is not None:
            return _numbers(self._bytes(info), info).view(info.shape)
        *outer, columns = info.stored_shape  # blocks run along the rows as they are stored
        return self._bytes(info).view(math.prod(outer), row_bytes(info.dtype, columns))

    def scale(self, name: str) -> Tensor | None:
        """What an fp8 weight is to be multiplied with, float32 [] or [rows, 1]; None if it has no scale."""
        info = self.info(name)
        if info.scale is None:
            return None
        scale = self._stored[info.scale]
        values = _numbers(self._bytes(scale), scale).to(torch.float32, copy=True)
        return values.view(()) if values.numel() == 1 else values.view(-1, 1)

    def copy_into(self, name: str, destination: Tensor, start: int = 0) -> None:
        """Fills a contiguous `destination` (any shape, type, device) from element `start` of `name` on.

        Elements count in row-major order, so a range of rows is a range of elements. They are decoded and
        converted to the destination's type piece by piece; each piece's pages are released before the next is
        touched.
        """
        info, out = self.info(name), destination.view(-1)
        end = start + out.numel()
        if start < 0 or end > info.numel:
            raise ValueError(f"{name} has {info.numel} elements, asked for {start} to {end}")
        stored, scale = self._bytes(info), self.scale(name)
        unit, nbytes = _unit(info, scale)
        for first, last in _pieces(start, end, unit, PIECE // (4 if info.packed else nbytes)):
            head, tail = first // unit * nbytes, last // unit * nbytes
            values = _decode(stored[head:tail], info, scale, first // unit, out.device)
            begin, stop = max(first, start), min(last, end)
            out[begin - start : stop - start].copy_(values[begin - first : stop - first])
            if name not in self._held:
                self._release(info.file, info.offset + head, info.offset + tail)

    def gguf_metadata(self, keys: Collection[str]) -> dict[str, Any]:
        """Key-value pairs of the GGUF files among the files, arrays included; read anew at each call."""
        found: dict[str, Any] = {}
        for path in self.files:
            if _is_gguf(path):
                found.update(read_gguf_metadata(path, keys))
        return found

    def release(self, name: str | None = None) -> None:
        """Gives back the file pages of one tensor, or of all; they are read again when touched again."""
        if name is not None:
            info = self.info(name)
            if name not in self._held:
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
        self._held.clear()
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _bytes(self, info: TensorInfo) -> Tensor:
        """uint8 [nbytes] on the file, or of what torch has of it."""
        if info.nbytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        if info.name in self._held:
            return self._held[info.name].contiguous().view(-1).view(torch.uint8)
        return _view_bytes(self._mapping(info.file), info.offset, info.nbytes)

    def _small(self, info: TensorInfo) -> bytes:
        """The bytes of a tensor that is read while a checkpoint is opened."""
        if info.name in self._held:
            return bytes(self._bytes(info).numpy())
        try:
            with info.file.open("rb") as file:
                file.seek(info.offset)
                return file.read(info.nbytes)
        except OSError as error:
            raise CheckpointError(f"{info.file} cannot be read: {error.strerror or error}") from error

    def _mapping(self, path: Path) -> mmap.mmap:
        if self._closed:
            raise CheckpointError(f"{self.label} was closed: open it again to read from it")
        if path not in self._maps:
            try:
                with path.open("rb") as file:
                    mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from error
            own = (i for i in self._stored.values() if i.file == path and i.name not in self._held)
            last = max(info.offset + info.nbytes for info in own)
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
# decoding


def _unit(info: TensorInfo, scale: Tensor | None) -> tuple[int, int]:
    """(elements, bytes) of what can be decoded by itself: a block, a row with its scale, or one element."""
    if info.torch_dtype is None:
        kind = GGML_TYPES[info.dtype]
        return kind.block, kind.nbytes
    width = info.numel // max(scale.shape[0], 1) if scale is not None and scale.dim() else 1
    return max(width, 1), max(width, 1) * info.torch_dtype.itemsize


def _pieces(start: int, end: int, unit: int, elements: int) -> Iterator[tuple[int, int]]:
    """Ranges of whole units that together cover the elements from `start` to `end`."""
    step = max(elements // unit, 1) * unit
    first, stop = start - start % unit, -(-end // unit) * unit
    for begin in range(first, stop, step):
        yield begin, min(begin + step, stop)


def _numbers(stored: Tensor, info: TensorInfo) -> Tensor:
    """Bytes as the torch type of their tensor, without decoding; a copy where they are not aligned to it."""
    dtype = info.torch_dtype or torch.uint8
    return (stored if info.offset % dtype.itemsize == 0 else stored.clone()).view(dtype)


def _decode(
    stored: Tensor, info: TensorInfo, scale: Tensor | None, first: int, device: torch.device
) -> Tensor:
    """Flat numbers of a piece's bytes, which begin with unit `first`: float32 if packed, else as stored."""
    if info.torch_dtype is None:
        return dequantize(stored.to(device), info.dtype)
    if not info.packed:
        return _numbers(stored, info)
    values = decode_float8(stored.to(device), info.dtype)
    if scale is None:
        return values
    if scale.dim() == 0:
        return values.mul_(scale.to(device))
    rows = values.view(-1, info.numel // scale.shape[0])  # [rows of the piece, width]
    return rows.mul_(scale[first : first + rows.shape[0]].to(device)).view(-1)


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
    _check_split(files, headers)
    return Checkpoint(files, headers)


def read_header(path: Path) -> Header:
    """The checked header of one file, whose first bytes tell its container. Reads nothing else of it."""
    _check_file(path)
    if _is_gguf(path):
        return read_gguf_header(path, GGUF_TYPES)
    return read_pickle_header(path) if is_pickle(path) else read_safetensors_header(path)


def _check_file(path: Path) -> None:
    """Refuses what is not there, and pipes and devices, which could be read for ever."""
    if not stat.S_ISREG(file_mode(path)):
        raise CheckpointError(f"{path} is no regular file: give a .safetensors or .gguf file")


def file_mode(path: Path) -> int:
    """`st_mode` of what is at `path`. Raises MissingFileError for nothing, and for what cannot be reached."""
    try:
        return path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if isinstance(error, FileNotFoundError):
            raise MissingFileError(f"{path} does not exist") from error
        reason = error.strerror if isinstance(error, OSError) else error
        raise MissingFileError(f"{path} cannot be read: {reason}") from error


def _is_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False  # the reader of the other container says what is wrong


def _resolve(path: Path) -> tuple[Path | None, list[Path]]:
    """(index or None, the files to open) for one path that the user gave."""
    if os.path.isdir(path):  # unlike Path.is_dir, it fails for no name
        found = folder_candidates(path)
        if not found:
            raise MissingFileError(f"the folder {path} holds no .safetensors or .gguf file")
        if len(found) > 1:
            names = " and ".join(candidate[0].name for candidate in found)
            raise AmbiguousFileError(f"the folder {path} holds {names}: give the one to load as a file")
        if _shard_number(found[0][0]) is not None:
            return None, _complete(found[0])
        path = found[0][0]
    _check_file(path)
    if _is_index(path):
        return path, _shards(path)
    return None, [path]


def folder_candidates(folder: Path) -> list[tuple[Path, ...]]:
    """What in a folder could be the checkpoint: an index, a single file, or shards without an index.

    Pickles count where there is nothing else: many repositories have the weights both ways."""
    files = sorted(path for path in _listed(folder) if os.path.isfile(path))
    return _candidates(files, SUFFIXES, INDEX_MARKS[0]) or _candidates(files, PICKLES, INDEX_MARKS[1])


def _is_index(path: Path) -> bool:
    return path.suffix == ".json" and any(mark in path.name for mark in INDEX_MARKS)


def _candidates(files: Sequence[Path], suffixes: Collection[str], mark: str) -> list[tuple[Path, ...]]:
    indexes = [path for path in files if mark in path.name and path.suffix == ".json"]
    weights = [path for path in files if path.suffix in suffixes]
    sets: dict[tuple[str, str], list[Path]] = {}  # (name, container) -> shards
    for path in weights:
        number = _shard_number(path)
        if number is not None:
            sets.setdefault((number[0], path.suffix), []).append(path)
    singles = [path for path in weights if _shard_number(path) is None]
    without_index = [] if indexes else [tuple(shards) for shards in sets.values()]
    return [(path,) for path in indexes + singles] + without_index


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"the folder {folder} cannot be read: {error.strerror or error}") from error


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
    missing = [str(i) for i in range(1, min(count, len(numbers) + 3) + 1) if i not in numbers]
    if missing or len(numbers) != count:
        listed = ", ".join(missing) or "one"
        raise MissingFileError(f"shard {listed} of {count} is missing beside {shards[0]}")
    return [numbers[i] for i in sorted(numbers)]


def _check_split(files: Sequence[Path], headers: Sequence[Header]) -> None:
    """A GGUF that was split into parts says in each how many there are: all must be given."""
    parts = [(path, header.metadata) for path, header in zip(files, headers, strict=True)]
    split = [
        (path, metadata) for path, metadata in parts if metadata.get("split.count", "1") not in ("0", "1")
    ]
    numbers = {metadata.get("split.no") for _, metadata in split}
    if split and split[0][1]["split.count"] != str(len(numbers)):
        path, metadata = split[0]
        given = f"{len(numbers)} given" if len(numbers) > 1 else "only it was given"
        raise MissingFileError(
            f"{path} is one of the {metadata['split.count']} parts of a GGUF, {given}: "
            "give all of them, or a folder with nothing else"
        )


def _index_map(index: Path) -> dict[str, str]:
    """tensor name -> shard file name, as the index lists them."""
    try:
        with index.open("rb") as file:
            text = file.read(MAX_HEADER + 1)
    except OSError as error:
        raise CheckpointError(f"{index} cannot be read: {error.strerror or error}") from error
    if len(text) > MAX_HEADER:
        raise CheckpointError(f"{index} is larger than {MAX_HEADER} bytes: no shard index is")
    content = parse_json(text, index, "shard index")
    listed = content.get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(shard, str) for shard in listed.values()):
        raise CheckpointError(f"{index} is no shard index: it has no weight_map from tensors to files")
    for shard in listed.values():
        if Path(shard).name != shard or shard in ("", ".", "..") or not is_name(shard):
            raise CheckpointError(
                f"{index} names the shard {shard[:MAX_NAME]!r}: a file beside the index was expected"
            )
    return listed


def _shards(index: Path) -> list[Path]:
    shards = [index.parent / name for name in sorted(set(_index_map(index).values()))]
    missing = [path.name for path in shards if not os.path.isfile(path)]
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

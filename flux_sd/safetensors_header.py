"""The header of a safetensors file, held against the size of the file before anything else is done with it.

Floor 1. Eight bytes of length, JSON, then the tensors without a gap. Counterpart in Candle: the safetensors
crate. Format: the README of the safetensors project, section "Format".
"""

from __future__ import annotations

import codecs
import json
import math
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import CheckpointError, MissingFileError
from .tensor_info import DTYPES, MAX_DIMENSIONS, MAX_NAME, Header, TensorInfo, is_countable, is_name

SUFFIXES = (".safetensors", ".sft")
# The reference implementation takes headers of 100 MB; JSON made to waste memory becomes 26 times as many
# bytes of Python objects, and half a second. Models have up to 4,000 tensors and 1 MB of metadata.
MAX_HEADER = 25_000_000  # bytes
MAX_COMMAS = 150_000  # 5 a tensor


def read_safetensors_header(path: Path) -> Header:
    """Reads the header's bytes and nothing else. Raises MissingFileError or CheckpointError."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or not 2 <= length <= min(size - 8, MAX_HEADER):
                raise CheckpointError(_what_else(path, start + file.read(56), size))
            text = file.read(length)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise MissingFileError(f"{path} does not exist") from error
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if not text.startswith(b"{"):
        raise CheckpointError(_what_else(path, start + text[:56], size))
    content = parse_json(text, path, "safetensors header")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: __metadata__ in the header is no table")
    infos = tuple(_tensor_info(path, name, entry, 8 + length, size) for name, entry in content.items())
    _check_cover(path, infos, 8 + length, size)
    return Header(infos, {_shown(key): _shown(str(value)) for key, value in metadata.items()})


def _shown(text: str) -> str:
    """JSON may spell halves of characters, which no terminal and no file takes: question marks instead."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _what_else(path: Path, head: bytes, size: int) -> str:
    """One sentence on what a file is that begins neither like safetensors nor like GGUF."""
    length = int.from_bytes(head[:8], "little")
    if size == 0:
        return f"{path} is empty: download it again"
    if head.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return f"{path} is a pickle, which can run code when it is read: give a .safetensors or .gguf file"
    if head.startswith(b"version https://git-lfs"):
        return f"{path} is a Git LFS pointer, not the weights: run git lfs pull or download the file itself"
    if not head.strip(b"\0"):
        return f"{path} begins with zeros: an interrupted download, or no checkpoint; download it again"
    if _is_text(head):
        return f"{path} is a text file, not weights: it may be an error page saved under that name"
    if head[8:9] == b"{" and MAX_HEADER < length <= size - 8:
        return f"{path} has a header of {length} bytes: {MAX_HEADER} are read at most"
    if size < 8 or (head[8:9] == b"{" and length > size - 8):
        return f"{path} is truncated: the header alone has {length} bytes, the file {size}; download it again"
    return f"{path} is no safetensors file (which begins with the length of a JSON header) and no GGUF file"


def _is_text(head: bytes) -> bool:
    """Whether a file that begins so is UTF-8 without control codes; its last character may be cut."""
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)
    except UnicodeDecodeError:
        return False
    return all(char in "\t\n\r" or char.isprintable() for char in text)


def parse_json(text: bytes, path: Path, what: str) -> dict[str, Any]:
    """A JSON table without double keys. Raises CheckpointError that calls it `what`."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise CheckpointError(f"{path}: the {what} has {twice[:200]!r} twice")
        return table

    if text.count(b",") > MAX_COMMAS:
        raise CheckpointError(
            f"{path}: the {what} has more than {MAX_COMMAS} entries: no checkpoint has so many"
        )
    try:
        content = json.loads(text, object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the {what} is no valid JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: the {what} is no JSON table")
    return content


def _naturals(value: Any, limit: int) -> tuple[int, ...] | None:
    """`value` as a tuple, if it is a list of at most `limit` whole numbers from 0 to 2**63 - 1."""
    if not isinstance(value, list) or len(value) > limit:
        return None
    return tuple(value) if all(type(item) is int and 0 <= item < 2**63 for item in value) else None


def _tensor_info(path: Path, name: str, entry: Any, base: int, size: int) -> TensorInfo:
    """Checks one entry of the header; `base` is where the tensor data begins in a file of `size` bytes."""
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape = fields.get("dtype"), _naturals(fields.get("shape"), MAX_DIMENSIONS)
    offsets = _naturals(fields.get("data_offsets"), 2)
    called = f"{path}: {name[:MAX_NAME]!r}"
    if not is_name(name):
        raise CheckpointError(f"{called} is no name: up to {MAX_NAME} printable characters were expected")
    if not isinstance(dtype, str) or shape is None or offsets is None or len(offsets) != 2:
        raise CheckpointError(f"{called} has an entry in the header that is no dtype, shape and two offsets")
    if dtype not in DTYPES:
        known = ", ".join(DTYPES)
        raise CheckpointError(f"{called} has the unknown type {dtype[:40]!r}; known are {known}")
    begin, end = offsets
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if not is_countable(shape):
        raise CheckpointError(f"{called} of shape {list(shape)} has more elements than can be counted")
    if end - begin != nbytes:
        raise CheckpointError(
            f"{called} of shape {list(shape)} and type {dtype} needs {nbytes} bytes, "
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

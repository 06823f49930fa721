"""The header of a GGUF file, by a small reader that believes no count, length or offset before checking it.

Floor 1. Read are the magic, versions 2 and 3, the key-value pairs (most skipped by arithmetic) and the tensor
descriptions. The work is bounded: what cannot fit the file is refused before it is walked. Dimensions are
stored innermost first and are turned round here. The gguf package's reader is this one's oracle in tests; it
is not used because it walks the array of 2**40 entries that a file of 120 bytes may claim to hold.
Counterpart in Candle: `gguf_file::Content::read`. Format: ggml's docs/gguf.md.
"""

from __future__ import annotations

import itertools
import math
import mmap
import struct
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import CheckpointError, MissingFileError
from .ggml_types import GGML_TYPES, REMOVED, by_id, row_bytes
from .tensor_info import MAX_DIMENSIONS, MAX_NAME, Header, TensorInfo, is_countable, is_name

MAGIC = b"GGUF"
SUFFIX = ".gguf"
VERSIONS = (2, 3)
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."  # + tensor name: INT32 array, rows first; ComfyUI-GGUF's convention
ALIGNMENT = "general.alignment"
# struct formats of the value types; the two others are strings and arrays
SCALARS: Mapping[int, str] = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
STRING, ARRAY = 8, 9
INTEGERS = (0, 1, 2, 3, 4, 5, 10, 11)
# Limits far above every known file (a pipeline of four networks has 4,000 tensors, a vocabulary 262,144
# words), so that the time for a header does not grow with a file of gigabytes that was made to waste it.
MAX_ENTRIES = 20_000  # tensors, and key-value pairs
MAX_ITEMS = 2_000_000  # strings in all arrays together; numbers in an array that is asked for
MAX_TEXT = 2**24  # bytes of a string that is asked for
SHORT = 256  # bytes; longer strings do not go to Header.metadata


class _Cursor:
    """A place in a mapped file; no step is taken before it is known to stay inside."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.size, self.at = path, data, len(data), 0
        self.strings = 0  # walked so far

    def need(self, count: int, what: str) -> None:
        """Refuses `count` further bytes that the file does not have."""
        if count > self.size - self.at:
            raise self.error(
                f"a truncated or damaged GGUF: {what} ends behind its {self.size} bytes; download it again"
            )

    def step(self, count: int, what: str) -> int:
        """Steps over `count` bytes and returns where they begin."""
        self.need(count, what)
        self.at += count
        return self.at - count

    def number(self, form: str, what: str) -> Any:
        return struct.unpack_from(form, self.data, self.step(struct.calcsize(form), what))[0]

    def text(self, limit: int, what: str, errors: str = "strict") -> str:
        length = self.number("<Q", what)
        self.need(length, what)
        if length > limit:
            raise self.error(f"{what} has {length} bytes: {limit} are read at most")
        start = self.step(length, what)
        try:
            return self.data[start : self.at].decode("utf-8", errors)
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8: damaged") from error

    def name(self, what: str) -> str:
        name = self.text(4 * MAX_NAME, what)
        if not is_name(name):
            raise self.error(
                f"{what} is {name[:MAX_NAME]!r}: up to {MAX_NAME} printable characters were expected"
            )
        return name

    def error(self, found: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {found}")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[_Cursor, int, int]]:
    """(cursor behind the counts, number of tensors, number of key-value pairs)."""
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise MissingFileError(f"{path} does not exist") from error
    except (OSError, ValueError) as error:  # ValueError: an empty file
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{path} cannot be read: {reason}") from error
    with data:
        cursor = _Cursor(path, data)
        if data[: cursor.step(4, "the magic") + 4] != MAGIC:
            raise cursor.error("no GGUF file: it does not begin with GGUF")
        _check_version(cursor, cursor.number("<I", "the version"))
        tensors, pairs = (cursor.number("<Q", "the header") for _ in range(2))
        for count, smallest, what in ((pairs, 13, "key-value pairs"), (tensors, 24, "tensors")):
            cursor.need(count * smallest, f"a header of {count} {what}")
            if count > MAX_ENTRIES:
                raise cursor.error(f"the header announces {count} {what}: {MAX_ENTRIES} are read at most")
        yield cursor, tensors, pairs


def _check_version(cursor: _Cursor, version: int) -> None:
    if version in VERSIONS:
        return
    if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, *VERSIONS):
        raise cursor.error("a big-endian GGUF file, little-endian was expected: convert it again")
    raise cursor.error(f"GGUF version {version}, versions 2 and 3 are read: convert it with a current tool")


# key-value pairs ------------------------------------------------------------------------------------------


def _pairs(cursor: _Cursor, count: int, most: Callable[[str], int]) -> Iterator[tuple[str, int, Any]]:
    """(key, type, value) of every pair.

    `most` says how many elements of a key's array are wanted; the value is None for an array that has more,
    and for long strings of which none is wanted.
    """
    seen: set[str] = set()
    for _ in range(count):
        key = cursor.name("a key of the metadata")
        if key in seen:
            raise cursor.error(f"the metadata has {key!r} twice")
        seen.add(key)
        kind = cursor.number("<I", key)
        yield key, kind, _value(cursor, kind, key, most(key))


def _value(cursor: _Cursor, kind: int, key: str, most: int) -> Any:
    if kind in SCALARS:
        return cursor.number(SCALARS[kind], key)
    if kind == STRING:
        length = struct.unpack_from("<Q", cursor.data, cursor.step(8, key))[0]
        if length <= (MAX_TEXT if most else SHORT):
            cursor.at -= 8
            return cursor.text(MAX_TEXT, key, errors="replace")
        cursor.step(length, key)
        return None
    if kind == ARRAY:
        element, count = cursor.number("<I", key), cursor.number("<Q", key)
        if element in SCALARS:
            return _numbers(cursor, SCALARS[element], count, key, most)
        if element == STRING:
            return _strings(cursor, count, key, most)
        raise cursor.error(f"the metadata {key!r} is an array of the unknown type {element}")
    raise cursor.error(f"the metadata {key!r} has the unknown type {kind}")


def _numbers(cursor: _Cursor, form: str, count: int, key: str, most: int) -> list[Any] | None:
    start = cursor.step(count * struct.calcsize(form), f"the array {key!r} of {count} numbers")
    if count > most:
        return None
    return list(struct.unpack_from(f"<{count}{form[1]}", cursor.data, start))


def _strings(cursor: _Cursor, count: int, key: str, most: int) -> list[str] | None:
    what = f"the array {key!r} of {count} strings"
    cursor.need(8 * count, what)  # their lengths alone
    cursor.strings += count
    if cursor.strings > MAX_ITEMS:
        raise cursor.error(f"{what} makes more than {MAX_ITEMS} strings in the metadata")
    if count <= most:
        return [cursor.text(MAX_TEXT, what, errors="replace") for _ in range(count)]
    length = struct.Struct("<Q").unpack_from
    at, end = cursor.at, cursor.size - 8
    for _ in range(count):  # a quarter of a million words are usual: no call per word but this one
        if at > end:
            break
        at += 8 + length(cursor.data, at)[0]
    cursor.step(at - cursor.at, what)
    return None


def read_gguf_metadata(path: Path, keys: Collection[str]) -> dict[str, Any]:
    """The key-value pairs called `keys`, as far as the file has them: numbers, strings, lists of either."""
    with _opened(path) as (cursor, _, count):
        pairs = _pairs(cursor, count, lambda key: MAX_ITEMS if key in keys else 0)
        found = {key: value for key, _, value in pairs if key in keys}
        for key, value in found.items():
            if value is None:
                raise cursor.error(f"the metadata {key!r} is too long to be read")
    return found


# tensors --------------------------------------------------------------------------------------------------


def read_gguf_header(path: Path, supported: Collection[str] = GGML_TYPES.keys()) -> Header:
    """The tensors, and as metadata every number and short string. Reads the header's bytes and nothing else.

    Raises MissingFileError or CheckpointError, the latter for a tensor of a type that is not `supported` too.
    """
    with _opened(path) as (cursor, tensors, pairs):
        metadata: dict[str, str] = {}
        shapes: dict[str, Any] = {}  # tensor -> its shape before it was quantised
        alignment = 32
        for key, kind, value in _pairs(cursor, pairs, _wanted_in_header):
            if key.startswith(ORIGINAL_SHAPE):
                shapes[key[len(ORIGINAL_SHAPE) :]] = _shape(cursor, key, kind, value)
            elif key == ALIGNMENT:
                alignment = _alignment(cursor, kind, value)
            if isinstance(value, bool | int | float | str):
                metadata[key] = str(value)
        found: dict[str, tuple[tuple[int, ...], str, int]] = {}
        for _ in range(tensors):
            name = cursor.name("the name of a tensor")
            if name in found:
                raise cursor.error(f"the header has the tensor {name!r} twice")
            found[name] = _description(cursor, name, supported, alignment)
        base = -(-cursor.at // alignment) * alignment
        infos = [_info(cursor, name, *found[name], base, shapes.get(name)) for name in found]
        _check_overlaps(cursor, infos)
        return Header(tuple(infos), metadata)


def _wanted_in_header(key: str) -> int:
    return MAX_DIMENSIONS if key.startswith(ORIGINAL_SHAPE) else 0


def _shape(cursor: _Cursor, key: str, kind: int, value: Any) -> tuple[int, ...]:
    sizes = tuple(value) if kind == ARRAY and isinstance(value, list) else ()
    if not 0 < len(sizes) <= MAX_DIMENSIONS or not all(type(size) is int and size >= 0 for size in sizes):
        raise cursor.error(
            f"the metadata {key!r} is no shape: a list of 1 to {MAX_DIMENSIONS} sizes was expected"
        )
    return sizes


def _alignment(cursor: _Cursor, kind: int, value: Any) -> int:
    if kind not in INTEGERS or value < 1 or value > 2**20 or value & (value - 1):
        raise cursor.error(f"{ALIGNMENT} is {value!r}: a power of two up to {2**20} was expected")
    return int(value)


def _description(
    cursor: _Cursor, name: str, supported: Collection[str], alignment: int
) -> tuple[tuple[int, ...], str, int]:
    """(shape, type, offset from the start of the data) of the tensor that the cursor is at."""
    what = f"the description of {name!r}"
    count = cursor.number("<I", what)
    if count > MAX_DIMENSIONS:
        raise cursor.error(f"{name!r} has {count} dimensions: {MAX_DIMENSIONS} are read at most")
    sizes = [cursor.number("<Q", what) for _ in range(count)]
    number, offset = cursor.number("<I", what), cursor.number("<Q", what)
    kind = by_id(number)
    if kind is None or kind.name not in supported:
        called = REMOVED.get(number, "unknown") if kind is None else kind.name
        found = f"{name!r} has the GGML type {number} ({called}), which is not read"
        raise cursor.error(f"{found}; supported are {', '.join(supported)}")
    if offset % alignment:
        raise cursor.error(f"{name!r} begins at {offset}, no multiple of the alignment {alignment}: damaged")
    return tuple(reversed(sizes)), kind.name, offset


def _info(
    cursor: _Cursor,
    name: str,
    shape: tuple[int, ...],
    kind: str,
    offset: int,
    base: int,
    original: tuple[int, ...] | None,
) -> TensorInfo:
    """Holds one description against the file and against the shape in the metadata, if there is one."""
    if not is_countable(shape):
        raise cursor.error(f"{name!r} of shape {list(shape)} has more elements than can be counted")
    try:
        nbytes = math.prod(shape[:-1]) * row_bytes(kind, shape[-1] if shape else 1)
    except ValueError as error:
        raise cursor.error(f"{name!r} of shape {list(shape)}: {error}") from error
    if base + offset + nbytes > cursor.size:
        found = f"truncated: {name!r} of shape {list(shape)} and type {kind} ends at {base + offset + nbytes}"
        raise cursor.error(f"{found}, the file at {cursor.size}; download it again")
    if original is None or original == shape:
        return TensorInfo(name, shape, kind, nbytes, cursor.path, base + offset)
    if math.prod(original) != math.prod(shape) or not is_countable(original):
        raise cursor.error(
            f"{ORIGINAL_SHAPE}{name} says {list(original)}, which is another number of elements than the "
            f"stored {list(shape)}"
        )
    return TensorInfo(name, original, kind, nbytes, cursor.path, base + offset, reshaped_from=shape)


def _check_overlaps(cursor: _Cursor, infos: Sequence[TensorInfo]) -> None:
    filled = sorted((info for info in infos if info.nbytes), key=lambda info: info.offset)
    for before, after in itertools.pairwise(filled):
        if before.offset + before.nbytes > after.offset:
            raise cursor.error(f"{after.name!r} overlaps {before.name!r}: the header lies about offsets")

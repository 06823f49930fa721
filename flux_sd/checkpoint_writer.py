"""The beginnings of safetensors and GGUF files: all that stands before the values of the tensors. Floor 1.

Both formats put a table of names, types, shapes and offsets first. Whoever writes a file decides these,
writes the header, and then streams the values in the same order. Sources: the safetensors README (format
section); ggml's docs/gguf.md.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .ggml_types import GGML_TYPES, row_bytes
from .tensor_info import DTYPES

GGUF_VERSION = 3
GGUF_ALIGNMENT = 32  # general.alignment's default: where the data and every tensor begin
SAFETENSORS_ALIGNMENT = 8
# Numbers of the value types of GGUF metadata.
GGUF_UINT32, GGUF_STRING = 4, 8


@dataclass(frozen=True)
class Entry:
    """One tensor of a file to be written. `dtype` is the container's word: "BF16", "F8_E4M3", "Q4_K"."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the values. Raises ValueError where rows are no whole number of blocks."""
        if self.dtype in DTYPES:
            return math.prod(self.shape) * DTYPES[self.dtype].itemsize
        return math.prod(self.shape[:-1]) * row_bytes(self.dtype, self.shape[-1])


def padding(nbytes: int, alignment: int) -> int:
    """How many bytes are missing to the next multiple of `alignment`."""
    return -nbytes % alignment


def safetensors_header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    """What stands before the values, which follow without gaps. Its length is a multiple of 8."""
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for entry in entries:
        end = offset + entry.nbytes
        table[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * padding(len(text), SAFETENSORS_ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def gguf_header(entries: Sequence[Entry], metadata: Mapping[str, str | int]) -> bytes:
    """What stands before the values, padded to 32 bytes; each tensor must be padded to 32 too.

    Shapes are stored with the innermost dimension first. Numbers of the metadata become uint32.
    """
    parts = [b"GGUF", struct.pack("<IQQ", GGUF_VERSION, len(entries), len(metadata))]
    for key, value in metadata.items():
        parts.append(_string(key))
        if isinstance(value, int):
            parts.append(struct.pack("<II", GGUF_UINT32, value))
        else:
            parts.append(struct.pack("<I", GGUF_STRING) + _string(value))
    offset = 0
    for entry in entries:
        shape = entry.shape or (1,)
        parts.append(_string(entry.name))
        parts.append(struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape)))
        parts.append(struct.pack("<IQ", GGML_TYPES[entry.dtype].id, offset))
        offset += entry.nbytes + padding(entry.nbytes, GGUF_ALIGNMENT)
    header = b"".join(parts)
    return header + bytes(padding(len(header), GGUF_ALIGNMENT))


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data

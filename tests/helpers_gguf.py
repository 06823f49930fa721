"""Writes GGUF files byte by byte, lies included. Shares nothing with the package: fields are packed here."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
FORMATS = dict(zip((U8, I8, U16, I16, U32, I32, F32, BOOL, U64, I64, F64), "BbHhIif?Qqd", strict=True))


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(kind: int, content: Any) -> bytes:
    """One value; an array's content is (element kind, list)."""
    if kind == STRING:
        return text(content)
    if kind == ARRAY:
        element, items = content
        return struct.pack("<IQ", element, len(items)) + b"".join(value(element, item) for item in items)
    return struct.pack("<" + FORMATS[kind], content)


def pair(key: str | bytes, kind: int, content: Any) -> bytes:
    return text(key) + struct.pack("<I", kind) + value(kind, content)


@dataclass
class Described:
    """One tensor: `sizes` innermost first, as stored."""

    name: str | bytes
    sizes: Sequence[int]
    kind: int
    data: bytes
    offset: int | None = None  # None: where it really is


@dataclass
class File:
    """A GGUF file to be written. The fields that are None are written truthfully."""

    tensors: Sequence[Described] = ()
    pairs: Sequence[bytes] = ()
    version: int = 3
    magic: bytes = b"GGUF"
    order: str = "<"
    alignment: int = 32
    tensor_count: int | None = None
    pair_count: int | None = None
    tail: bytes = field(default=b"")

    def header(self) -> bytes:
        counts = (
            len(self.tensors) if self.tensor_count is None else self.tensor_count,
            len(self.pairs) if self.pair_count is None else self.pair_count,
        )
        out = self.magic + struct.pack(self.order + "IQQ", self.version, *counts) + b"".join(self.pairs)
        at = 0
        for tensor in self.tensors:
            offset = at if tensor.offset is None else tensor.offset
            out += text(tensor.name) + struct.pack("<I", len(tensor.sizes))
            out += struct.pack(f"<{len(tensor.sizes)}QIQ", *tensor.sizes, tensor.kind, offset)
            at += -(-len(tensor.data) // self.alignment) * self.alignment
        return out

    def content(self) -> bytes:
        out = bytearray(self.header())
        for tensor in self.tensors:
            out += bytes(-len(out) % self.alignment) + tensor.data
        return bytes(out + self.tail)

    def write(self, path: Path) -> Path:
        path.write_bytes(self.content())
        return path


def float32(name: str, *values: float, sizes: Sequence[int] | None = None) -> Described:
    return Described(name, sizes or (len(values),), 0, struct.pack(f"<{len(values)}f", *values))


def write_state(path: Path, state: Mapping[str, Any], pairs: Sequence[bytes] = (), version: int = 3) -> Path:
    """Float tensors as F32, without quantisation, under their own names."""
    tensors = [
        Described(name, tuple(reversed(tensor.shape)), 0, tensor.contiguous().numpy().tobytes())
        for name, tensor in state.items()
    ]
    return File(tensors, pairs, version).write(path)

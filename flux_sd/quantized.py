"""Linears and embeddings whose weights stay as a file stores them and are decoded as they are used. Floor 2.

For GGML blocks, for fp8 with or without scales, and for float types other than the one that products are
computed in. On a CPU the stored rows are a view on the memory map; nothing of them is copied. A product
decodes a block of rows, multiplies by it and lets it go, so that beside the stored bytes a layer needs one
block, whatever its size. The networks know nothing of this: the loader swaps the layers in, by path, while
the model is on meta.

Counterpart in Candle: `QMatMul` (candle-core `quantized/mod.rs`) and candle-transformers `quantized_nn.rs`.
Candle rounds activations to 8 bits as well; here only the weights are rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .float8 import decode_float8
from .gguf_dequant import dequantize
from .tensor_info import DTYPES, FLOAT8

# A block of rows, counted as float32: little memory, yet enough rows for a product at full speed.
BLOCK_BYTES = 32 * 2**20
ROW_STEP = 64  # blocks are multiples of it, so that a product's kernels meet whole tiles
FLOAT8_CHUNK = 2**18  # weights of fp8 decoded at a time, so that the steps stay in the cache
SCRATCH = 4 * BLOCK_BYTES  # what decoding one block needs at most, its steps included


@dataclass(frozen=True)
class PackedRows:
    """Consecutive rows of one weight as they are stored: GGML blocks, fp8 or plain floats."""

    data: Tensor  # uint8 [rows, bytes of a row] of GGML blocks and of fp8; [rows, columns] of plain floats
    type: str  # the container's word, such as "Q4_K", "F8_E4M3" or "BF16"
    scale: Tensor | None  # of fp8: float32, [] or [rows, 1]
    shape: tuple[int, int]  # rows, columns

    def decode(self, dtype: torch.dtype, rows: slice | Tensor = slice(None)) -> Tensor:
        """The chosen rows (a range, or numbers int64 [n]) as `dtype` [n, columns], by way of float32."""
        chosen = self.data[rows]
        if self.type not in DTYPES:
            return dequantize(chosen, self.type, dtype)
        if self.type not in FLOAT8:
            return chosen.to(dtype)
        scale = self.scale[rows] if self.scale is not None and self.scale.ndim else self.scale
        return _decode_float8_rows(chosen, self.type, scale, dtype)

    def blocks(self) -> Iterator[slice]:
        """Ranges of rows, each of BLOCK_BYTES as float32 or less, that together are all of them."""
        rows, columns = self.shape
        step = max(1, BLOCK_BYTES // (4 * columns) // ROW_STEP) * ROW_STEP
        for first in range(0, rows, step):
            yield slice(first, min(first + step, rows))

    def decoded(self, dtype: torch.dtype) -> PackedRows:
        """The same rows as plain floats, decoded once and for all."""
        out = torch.empty(self.shape, dtype=dtype, device=self.data.device)
        for rows in self.blocks():
            out[rows] = self.decode(dtype, rows)
        word = next(word for word, known in DTYPES.items() if known == dtype)
        return PackedRows(out, word, None, self.shape)

    def to(self, device: torch.device) -> PackedRows:
        """The same rows on another device; themselves if they are there."""
        scale = None if self.scale is None else self.scale.to(device)
        return PackedRows(self.data.to(device), self.type, scale, self.shape)


def _decode_float8_rows(codes: Tensor, word: str, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Codes [n, columns] times their scale ([] or [n, 1]), on a CPU a chunk at a time."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    rows, columns = codes.shape
    step = max(1, FLOAT8_CHUNK // columns if out.device.type == "cpu" else rows)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        values = decode_float8(codes[part], word)
        if scale is not None:
            values *= scale[part] if scale.ndim else scale
        out[part] = values
    return out


class PackedWeight(nn.Module):
    """The rows of one weight, in order, as buffers. Parts of several tensors may differ in type."""

    def __init__(self, parts: Sequence[PackedRows]) -> None:
        super().__init__()
        self._kinds = [(part.type, part.shape) for part in parts]
        for i, part in enumerate(parts):
            self.register_buffer(f"data_{i}", part.data)
            self.register_buffer(f"scale_{i}", part.scale)

    @property
    def parts(self) -> list[PackedRows]:
        made = []
        for i, (kind, shape) in enumerate(self._kinds):
            scale = self._buffers[f"scale_{i}"]
            made.append(PackedRows(self.get_buffer(f"data_{i}"), kind, scale, shape))
        return made

    def extra_repr(self) -> str:
        """What `print(network)` shows of it."""
        return ", ".join(f"{rows}x{columns} {kind}" for kind, (rows, columns) in self._kinds)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, columns."""
        return sum(shape[0] for _, shape in self._kinds), self._kinds[0][1][1]


class QuantizedLinear(nn.Module):
    """nn.Linear over stored rows, computing in `dtype`."""

    def __init__(self, parts: Sequence[PackedRows], bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.dtype = PackedWeight(parts), dtype
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], both in the compute dtype."""
        out = x.new_empty(*x.shape[:-1], self.weight.shape[0])
        at = 0
        for part in self.weight.parts:
            for rows in part.blocks():
                end = at + rows.stop - rows.start
                bias = None if self.bias is None else self.bias[at:end]
                out[..., at:end] = F.linear(x, part.decode(self.dtype, rows), bias)
                at = end
        return out


class QuantizedEmbedding(nn.Module):
    """nn.Embedding over stored rows: only those that are asked for are decoded."""

    def __init__(self, parts: Sequence[PackedRows], dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.dtype = PackedWeight(parts), dtype

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., width] in the compute dtype. Raises IndexError for an id that is no row."""
        rows, width = self.weight.shape
        wanted = ids.flatten()
        if wanted.numel() and not (0 <= int(wanted.min()) and int(wanted.max()) < rows):
            raise IndexError(f"ids {int(wanted.min())} to {int(wanted.max())} in an embedding of {rows} rows")
        out = torch.empty(wanted.numel(), width, dtype=self.dtype, device=ids.device)
        at = 0
        for part in self.weight.parts:
            here = (wanted >= at) & (wanted < at + part.shape[0])
            out[here] = part.decode(self.dtype, wanted[here] - at)
            at += part.shape[0]
        return out.view(*ids.shape, width)

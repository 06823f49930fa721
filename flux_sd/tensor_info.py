"""What a checkpoint's header says about its tensors, whatever the container. Floor 0."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

# The words of the safetensors format. GGUF's types of one element a block have the same names and bytes.
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
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOAT8 = ("F8_E4M3", "F8_E5M2")
MAX_DIMENSIONS = 8
MAX_NAME = 256  # characters; the longest known has 120


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file. `dtype` is the container's word: "BF16", "F8_E4M3", or a GGML type as "Q4_K"."""

    name: str
    shape: tuple[int, ...]  # as torch has it: rows first
    dtype: str
    nbytes: int
    file: Path
    offset: int  # of the first byte, from the start of the file
    reshaped_from: tuple[int, ...] | None = None  # the shape in the file, where `shape` comes from metadata
    scale: str | None = None  # the tensor that an fp8 weight is to be multiplied with

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape that blocks of a packed type run along."""
        return self.shape if self.reshaped_from is None else self.reshaped_from

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """None for the GGML block types, which torch does not have."""
        return DTYPES.get(self.dtype)

    @property
    def is_float(self) -> bool:
        """Whether the values are real numbers, packed or not."""
        return self.torch_dtype is None or self.torch_dtype.is_floating_point

    @property
    def packed(self) -> bool:
        """Whether the values have to be decoded before they can be computed with: block types and fp8."""
        return self.torch_dtype is None or self.dtype in FLOAT8


@dataclass(frozen=True)
class Header:
    """The checked header of one file."""

    infos: tuple[TensorInfo, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    held: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # tensors that do not lie in the file as they are


def is_name(text: str) -> bool:
    """Whether a name can be shown: line ends and control codes would reach the terminal in messages."""
    return len(text) <= MAX_NAME and text.isprintable()


def is_countable(shape: tuple[int, ...]) -> bool:
    """Whether torch can number the elements: a dimension of 0 must not hide one of 2**70 beside it."""
    return math.prod(max(size, 1) for size in shape) < 2**62

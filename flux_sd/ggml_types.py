"""The tensor types of GGML: name, number, how many elements a block holds and in how many bytes.

Floor 0. One table, shared by whatever reads, decodes, encodes or writes GGUF. Sources: `enum ggml_type` in
ggml's ggml.h and the block structures in ggml-common.h; the bit layouts stand in `gguf_dequant.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class GgmlType:
    """One tensor type. A row of n elements is n / block blocks of `nbytes` bytes, one after another."""

    name: str
    id: int  # as stored in a GGUF header
    block: int  # elements per block
    nbytes: int  # bytes per block


_ROWS = (
    # name, id, elements, bytes
    ("F32", 0, 1, 4),
    ("F16", 1, 1, 2),
    ("Q4_0", 2, 32, 18),
    ("Q4_1", 3, 32, 20),
    ("Q5_0", 6, 32, 22),
    ("Q5_1", 7, 32, 24),
    ("Q8_0", 8, 32, 34),
    ("Q8_1", 9, 32, 36),  # for activations while they are multiplied; not in files
    ("Q2_K", 10, 256, 84),
    ("Q3_K", 11, 256, 110),
    ("Q4_K", 12, 256, 144),
    ("Q5_K", 13, 256, 176),
    ("Q6_K", 14, 256, 210),
    ("Q8_K", 15, 256, 292),  # for activations too
    ("IQ2_XXS", 16, 256, 66),
    ("IQ2_XS", 17, 256, 74),
    ("IQ3_XXS", 18, 256, 98),
    ("IQ1_S", 19, 256, 50),
    ("IQ4_NL", 20, 32, 18),
    ("IQ3_S", 21, 256, 110),
    ("IQ2_S", 22, 256, 82),
    ("IQ4_XS", 23, 256, 136),
    ("I8", 24, 1, 1),
    ("I16", 25, 1, 2),
    ("I32", 26, 1, 4),
    ("I64", 27, 1, 8),
    ("F64", 28, 1, 8),
    ("IQ1_M", 29, 256, 56),
    ("BF16", 30, 1, 2),
    ("TQ1_0", 34, 256, 54),
    ("TQ2_0", 35, 256, 66),
    ("MXFP4", 39, 32, 17),
    ("NVFP4", 40, 64, 36),
    ("Q1_0", 41, 128, 18),
    ("Q2_0", 42, 64, 18),
)

GGML_TYPES: Mapping[str, GgmlType] = MappingProxyType({row[0]: GgmlType(*row) for row in _ROWS})

# Numbers that old files may carry and that ggml no longer reads.
REMOVED: Mapping[int, str] = MappingProxyType(
    {
        4: "Q4_2",
        5: "Q4_3",
        31: "Q4_0_4_4",
        32: "Q4_0_4_8",
        33: "Q4_0_8_8",
        36: "IQ4_NL_4_4",
        37: "IQ4_NL_4_8",
        38: "IQ4_NL_8_8",
    }
)

# The types that are no blocks: what torch calls them.
PLAIN: Mapping[str, str] = MappingProxyType(
    {
        "F32": "float32",
        "F16": "float16",
        "BF16": "bfloat16",
        "F64": "float64",
        "I8": "int8",
        "I16": "int16",
        "I32": "int32",
        "I64": "int64",
    }
)

_BY_ID: Mapping[int, GgmlType] = MappingProxyType({kind.id: kind for kind in GGML_TYPES.values()})


def by_id(number: int) -> GgmlType | None:
    """The type that a GGUF header calls `number`, None for a number that is removed or not known."""
    return _BY_ID.get(number)


def row_bytes(name: str, elements: int) -> int:
    """Bytes of a row of `elements`. Raises ValueError where the row is no whole number of blocks."""
    kind = GGML_TYPES[name]
    if elements % kind.block:
        raise ValueError(
            f"a row of {elements} elements is not a whole number of {name}'s blocks of {kind.block}"
        )
    return elements // kind.block * kind.nbytes

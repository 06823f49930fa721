"""GGML blocks to numbers, on any device: the bytes of a GGUF tensor in, floats out.

Floor 1. `dequantize` is all that others need. Each decoder below is one type; its docstring is the layout of
a block, byte for byte, and its code cuts the block at the same places. In all of them

    blocks  uint8 [n, bytes per block]         d, m, dmin, scale, least   worth of a quantum, what is added
    out     float32 [n, elements per block]    q                          small integer stored per element

An element is d * scale * q, less dmin * least where the type has one. Every product and sum is rounded to
float32 by itself, in the order of ggml's reference code: the results are its own, bit for bit, and a narrower
type is reached by one more rounding at the end.

A chunk at a time is held in float32, small enough for a processor's cache: that, not arithmetic, sets the
speed. Types that are not vectorised here go through the gguf package's own decoders (numpy, on the CPU).

Sources: ggml-common.h (layouts) and ggml-quants.c of ggml. Candle: candle-core/src/quantized/k_quants.rs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from .errors import CheckpointError
from .ggml_types import GGML_TYPES, PLAIN, GgmlType

CPU_CHUNK = 2**20  # elements decoded at a time: 4 MB of float32
DEVICE_CHUNK = 2**24  # elsewhere: large, because there a launch costs more than memory
GGUF_CHUNK = 2**20  # the gguf package makes many temporary arrays

Decoder = Callable[[Tensor, Tensor], None]


class SlowDecodingWarning(UserWarning):
    """A type that only the gguf package's numpy code decodes: exact, but slow and on the CPU."""


# blocks of 32 elements ----------------------------------------------------------------------------------


def _q4_0(blocks: Tensor, out: Tensor) -> None:
    """d f16 | q 4 bit [32] in 16 bytes. d * (q - 8)"""
    d, qs = _f16(blocks[:, :2]), blocks[:, 2:].unflatten(1, (1, 16))
    q = _fields(qs, 4).view(torch.int8).sub_(8)  # [n, 1, 2, 16]
    out.copy_(q.view_as(out)).mul_(d)


def _q4_1(blocks: Tensor, out: Tensor) -> None:
    """d f16 | m f16 | q 4 bit [32] in 16 bytes. d * q + m"""
    d, m, qs = _f16(blocks[:, :2]), _f16(blocks[:, 2:4]), blocks[:, 4:].unflatten(1, (1, 16))
    q = _fields(qs, 4)  # [n, 1, 2, 16]
    out.copy_(q.view_as(out)).mul_(d).add_(m)


def _q5_0(blocks: Tensor, out: Tensor) -> None:
    """d f16 | fifth bit [32] in 4 bytes | low bits 4 bit [32] in 16 bytes. d * (q - 16)"""
    d, fifth, qs = _f16(blocks[:, :2]), _spread_bits(blocks[:, 2:6]), blocks[:, 6:].unflatten(1, (1, 16))
    q = _fields(qs, 4).view_as(fifth).bitwise_or_(fifth << 4)  # [n, 32]
    out.copy_(q.view(torch.int8).sub_(16)).mul_(d)


def _q5_1(blocks: Tensor, out: Tensor) -> None:
    """d f16 | m f16 | fifth bit [32] in 4 bytes | low bits 4 bit [32] in 16 bytes. d * q + m"""
    d, m = _f16(blocks[:, :2]), _f16(blocks[:, 2:4])
    fifth, qs = _spread_bits(blocks[:, 4:8]), blocks[:, 8:].unflatten(1, (1, 16))
    q = _fields(qs, 4).view_as(fifth).bitwise_or_(fifth << 4)  # [n, 32]
    out.copy_(q).mul_(d).add_(m)


def _q8_0(blocks: Tensor, out: Tensor) -> None:
    """d f16 | q int8 [32]. d * q"""
    d, q = _f16(blocks[:, :2]), blocks[:, 2:].view(torch.int8)
    out.copy_(q).mul_(d)


def _iq4_nl(blocks: Tensor, out: Tensor) -> None:
    """d f16 | index 4 bit [32] in 16 bytes. d * codebook[index]"""
    d, qs = _f16(blocks[:, :2]), blocks[:, 2:].unflatten(1, (1, 16))
    out.copy_(_codebook(_fields(qs, 4)).view_as(out)).mul_(d)


# blocks of 256 elements ---------------------------------------------------------------------------------


def _q2_k(blocks: Tensor, out: Tensor) -> None:
    """scale and least 4 bit [16] in 16 bytes | q 2 bit [256] in 64 bytes | d f16 | dmin f16.
    d * scale * q - dmin * least"""
    head, qs = blocks[:, :16], blocks[:, 16:80].unflatten(1, (2, 32))
    d, dmin = _f16(blocks[:, 80:82]), _f16(blocks[:, 82:])
    scale, least = d * (head & 15).float(), dmin * (head >> 4).float()  # [n, 16], of 16 elements each
    q = _fields(qs, 2)  # [n, 2, 4, 32]
    groups = out.copy_(q.view_as(out)).view(-1, 16, 16)
    groups.mul_(scale[..., None]).sub_(least[..., None])


def _q3_k(blocks: Tensor, out: Tensor) -> None:
    """third bit [256] in 32 bytes | low bits 2 bit [256] in 64 bytes | scale 6 bit [16] in 12 bytes | d f16.
    d * (scale - 32) * (q - 4)"""
    third, qs = blocks[:, :32].unflatten(1, (1, 32)), blocks[:, 32:96].unflatten(1, (2, 32))
    scale = _f16(blocks[:, 108:]) * _scales_of_q3_k(blocks[:, 96:108]).float()  # [n, 16], of 16 elements each
    q = _fields(qs, 2).view_as(out).bitwise_or_(_fields(third, 1).view_as(out).bitwise_left_shift_(2))
    groups = out.copy_(q.view(torch.int8).sub_(4)).view(-1, 16, 16)
    groups.mul_(scale[..., None])


def _q4_k(blocks: Tensor, out: Tensor) -> None:
    """d f16 | dmin f16 | scale and least 6 bit [8] in 12 bytes | q 4 bit [256] in 128 bytes.
    d * scale * q - dmin * least"""
    scale, least = _scales_and_minima(blocks[:, :16])  # [n, 8, 1], of 32 elements each
    q = _fields(blocks[:, 16:].unflatten(1, (4, 32)), 4)  # [n, 4, 2, 32]
    out.copy_(q.view_as(out)).view(-1, 8, 32).mul_(scale).sub_(least)


def _q5_k(blocks: Tensor, out: Tensor) -> None:
    """d f16 | dmin f16 | scale and least as in Q4_K | fifth bit [256] in 32 bytes | low bits 4 bit [256] in
    128 bytes. d * scale * q - dmin * least"""
    scale, least = _scales_and_minima(blocks[:, :16])  # [n, 8, 1], of 32 elements each
    fifth = _fields(blocks[:, 16:48].unflatten(1, (1, 32)), 1)  # [n, 1, 8, 32]
    low = _fields(blocks[:, 48:].unflatten(1, (4, 32)), 4)  # [n, 4, 2, 32]
    q = low.view_as(out).bitwise_or_(fifth.view_as(out).bitwise_left_shift_(4))
    out.copy_(q).view(-1, 8, 32).mul_(scale).sub_(least)


def _q6_k(blocks: Tensor, out: Tensor) -> None:
    """low bits 4 bit [256] in 128 bytes | high bits 2 bit [256] in 64 bytes | scale int8 [16] | d f16.
    d * scale * (q - 32)"""
    low = _fields(blocks[:, :128].unflatten(1, (2, 64)), 4)  # [n, 2, 2, 64]
    high = _fields(blocks[:, 128:192].unflatten(1, (2, 32)), 2)  # [n, 2, 4, 32]
    scale = (
        _f16(blocks[:, 208:]) * blocks[:, 192:208].view(torch.int8).float()
    )  # [n, 16], of 16 elements each
    q = low.view_as(out).bitwise_or_(high.view_as(out).bitwise_left_shift_(4))
    out.copy_(q.view(torch.int8).sub_(32)).view(-1, 16, 16).mul_(scale[..., None])


def _iq4_xs(blocks: Tensor, out: Tensor) -> None:
    """d f16 | high bits of scale 2 bit [8] in 2 bytes | low bits 4 bit [8] in 4 bytes | index 4 bit [256] in
    128 bytes. d * (scale - 32) * codebook[index]"""
    d, qs = _f16(blocks[:, :2]), blocks[:, 8:].unflatten(1, (8, 16))
    high, low = blocks[:, 2:4].view(torch.int16).int(), blocks[:, 4:8].view(torch.int32)  # [n, 1]
    group = torch.arange(8, dtype=torch.int32, device=blocks.device)
    scale = d * ((low >> 4 * group & 15 | (high >> 2 * group & 3) << 4) - 32).float()  # [n, 8]
    out.copy_(_codebook(_fields(qs, 4)).view_as(out)).view(-1, 8, 32).mul_(scale[..., None])


# shared pieces ------------------------------------------------------------------------------------------


def _f16(stored: Tensor) -> Tensor:
    """Little-endian float16, uint8 [n, 2] -> float32 [n, 1]. Infinities and NaN stay what they are."""
    return stored.view(torch.float16).float()


MASKS = {1: 0x0101010101010101, 2: 0x0303030303030303, 4: 0x0F0F0F0F0F0F0F0F}


def _fields(stored: Tensor, bits: int) -> Tensor:
    """Takes bytes apart: uint8 [n, k, w] -> uint8 [n, k, 8 / bits, w], lowest `bits` bits of each byte first.

    w is a multiple of 8, so that eight bytes are shifted and masked at a time.
    """
    words = stored.clone(memory_format=torch.contiguous_format).view(torch.int64)  # [n, k, w/8]
    fields = torch.stack([words >> shift for shift in range(0, 8, bits)], 2)  # [n, k, 8/bits, w/8]
    return fields.bitwise_and_(MASKS[bits]).view(torch.uint8)


def _spread_bits(stored: Tensor) -> Tensor:
    """Bit i of a little-endian number, 0 or 1: uint8 [n, 4] -> uint8 [n, 32]."""
    byte, bit = torch.arange(256, device=stored.device), torch.arange(8, device=stored.device)
    table = (byte[:, None] >> bit & 1).byte().view(torch.int64)  # [256, 1]: eight bytes for the bits of one
    return table[:, 0].index_select(0, stored.flatten().int()).view(torch.uint8).view(-1, 32)


def _scales_and_minima(stored: Tensor) -> tuple[Tensor, Tensor]:
    """The head of a Q4_K or Q5_K block: d * scale and dmin * least. uint8 [n, 16] -> float32 [n, 8, 1] each.

    After d and dmin come three rows of four bytes, a row taken here as one number. The low six bits of a byte
    are scales 0 to 3 in row one, minima 0 to 3 in row two. Row three holds the low halves of scales and of
    minima 4 to 7, whose top two bits are those of rows one and two.
    """
    d, dmin = _f16(stored[:, :2]), _f16(stored[:, 2:4])
    one, two, three = stored[:, 4:].view(torch.int32).unbind(1)  # [n] each
    scale = torch.stack([one & 0x3F3F3F3F, three & 0x0F0F0F0F | one >> 2 & 0x30303030], 1)  # [n, 2]
    least = torch.stack([two & 0x3F3F3F3F, three >> 4 & 0x0F0F0F0F | two >> 2 & 0x30303030], 1)  # [n, 2]
    scale, least = scale.view(torch.uint8).float(), least.view(torch.uint8).float()  # [n, 8]
    return scale.mul_(d)[..., None], least.mul_(dmin)[..., None]


def _scales_of_q3_k(stored: Tensor) -> Tensor:
    """uint8 [n, 12] -> int8 [n, 16], less 32. Three rows of four bytes, a row taken as one number: the halves
    of rows one and two are the low bits of four scales each, row three holds the top bits of all."""
    one, two, three = stored.clone(memory_format=torch.contiguous_format).view(torch.int32).unbind(1)  # [n]
    low = [row >> shift & 0x0F0F0F0F for shift in (0, 4) for row in (one, two)]
    high = [three << 4, three << 2, three, three >> 2]
    words = [a | b & 0x30303030 for a, b in zip(low, high, strict=True)]
    return torch.stack(words, 1).view(torch.int8).sub_(32)  # [n, 4] words -> [n, 16]


CODEBOOK = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # of IQ4_NL and IQ4_XS


def _codebook(index: Tensor) -> Tensor:
    """uint8 [...] below 16 -> float32 [...]."""
    values = torch.tensor(CODEBOOK, dtype=torch.float32, device=index.device)
    return values.index_select(0, index.flatten().int()).view(index.shape)


_DECODERS: Mapping[str, Decoder] = MappingProxyType(
    {
        "Q4_0": _q4_0,
        "Q4_1": _q4_1,
        "Q5_0": _q5_0,
        "Q5_1": _q5_1,
        "Q8_0": _q8_0,
        "Q2_K": _q2_k,
        "Q3_K": _q3_k,
        "Q4_K": _q4_k,
        "Q5_K": _q5_k,
        "Q6_K": _q6_k,
        "IQ4_NL": _iq4_nl,
        "IQ4_XS": _iq4_xs,
    }
)

# what others use ----------------------------------------------------------------------------------------

VECTORISED: frozenset[str] = frozenset(("F32", "F16", "BF16", *_DECODERS))
_BY_GGUF_PACKAGE = (
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"),
    *("TQ1_0", "TQ2_0", "MXFP4", "NVFP4"),
)
SUPPORTED: tuple[str, ...] = ("F32", "F16", "BF16", *_DECODERS, *_BY_GGUF_PACKAGE)


def dequantize(data: Tensor, type_name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Stored rows -> numbers. data uint8 [..., blocks * nbytes], any device -> dtype [..., blocks * block].

    The result is new memory and equals decoding in float32 followed by a cast. Raises CheckpointError for a
    type that cannot be decoded, ValueError for rows that are no whole number of blocks.
    """
    if type_name not in SUPPORTED and type_name not in PLAIN:
        raise CheckpointError(
            f"GGML's type {type_name} cannot be decoded: use a file in one of {', '.join(SUPPORTED)}"
        )
    kind = GGML_TYPES[type_name]
    count, rest = divmod(data.shape[-1], kind.nbytes)
    if data.dtype != torch.uint8 or rest:
        raise ValueError(
            f"{list(data.shape)} {data.dtype} is no row of {kind.name}: blocks are {kind.nbytes} bytes"
        )
    shape = (*data.shape[:-1], count * kind.block)
    if type_name in PLAIN:
        return _aligned(data, kind.nbytes).view(getattr(torch, PLAIN[type_name])).to(dtype, copy=True)
    blocks = _aligned(data, 8).view(-1, kind.nbytes)  # [n, bytes per block]
    out = torch.empty(len(blocks), kind.block, dtype=dtype, device=data.device)
    if type_name in _DECODERS:
        _decode(blocks, _DECODERS[type_name], out)
    else:
        _decode_with_gguf_package(blocks, kind, out)
    return out.view(shape)


def _aligned(data: Tensor, size: int) -> Tensor:
    """The same bytes, contiguous and at a multiple of `size`: copied only if they were not."""
    data = data.contiguous()
    return data if data.data_ptr() % size == 0 and data.storage_offset() % size == 0 else data.clone()


def _decode(blocks: Tensor, decoder: Decoder, out: Tensor) -> None:
    """Fills out [n, block], any float dtype, chunk by chunk."""
    chunk = CPU_CHUNK if blocks.device.type == "cpu" else DEVICE_CHUNK
    rows = max(1, min(len(blocks), chunk // out.shape[1]))
    narrow = out.dtype != torch.float32
    scratch = torch.empty(rows, out.shape[1], device=out.device) if narrow else out
    for first in range(0, len(blocks), rows):
        target = out[first : first + rows]
        values = scratch[: len(target)] if narrow else target
        decoder(blocks[first : first + rows], values)
        if narrow:
            target.copy_(values)


def _decode_with_gguf_package(blocks: Tensor, kind: GgmlType, out: Tensor) -> None:
    """Fills out [n, block] by way of the CPU, chunk by chunk. Warns, once for each type."""
    import gguf  # a quarter of a second, for rare types only
    import numpy as np

    message = f"{kind.name} is decoded by the gguf package, slowly: prefer a file in Q4_K or Q8_0"
    warnings.warn(message, SlowDecodingWarning, stacklevel=1)
    number = getattr(gguf.GGMLQuantizationType, kind.name, None)
    if number is None:
        raise CheckpointError(f"the installed gguf package does not know {kind.name}: update it")
    rows = GGUF_CHUNK // kind.block
    for first in range(0, len(blocks), rows):
        stored = blocks[first : first + rows].cpu().numpy()
        with np.errstate(all="ignore"):  # it remarks on infinite scales, which are passed on
            values = gguf.dequantize(stored, number)
        out[first : first + rows].copy_(torch.from_numpy(values))

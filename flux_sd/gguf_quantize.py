"""Numbers to GGML blocks, for writing GGUF: the layouts of `gguf_dequant.py`, read backwards.

Floor 1. Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 are made by the gguf package, as ggml makes them. Q4_K and Q6_K,
which that package cannot make, are ours. Both go the same way:

 1. Each small group of values gets the scale (Q4_K: and the offset) that fits them best in the sense of
    least squares, given the codes they take under a first guess; of several guesses the best is kept.
 2. The scales of a block's groups are themselves rounded to small integers, times one float16 per block.
 3. Every value takes the nearest code under the rounded scales.

All errors count alike; ggml's and Candle's own quantisers weigh large values more in some types.
Groups lie side by side, [values of a group, groups], so that sums over a group are sums of whole rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ggml_types import GGML_TYPES, PLAIN, row_bytes

_BY_GGUF_PACKAGE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
_FLOATS = ("F32", "F16", "BF16")
ENCODED: tuple[str, ...] = (*_FLOATS, *_BY_GGUF_PACKAGE, "Q4_K", "Q6_K")

LARGEST = torch.finfo(torch.float16).max  # a block's scale is a float16
CHUNK = 512  # blocks encoded at a time: what is worked on stays in the processor's cache
GUESSES = (-0.6, -0.3, 0.0, 0.3, 0.6)  # quanta more than the type has: how far a group is stretched or cut


def quantize(values: Tensor, type_name: str) -> Tensor:
    """Rows of numbers -> stored rows. values float [rows, n] -> uint8 [rows, row bytes], on the CPU.

    Raises ValueError for a type that is not in ENCODED, for rows that are no whole number of blocks, and for
    values that the type cannot hold: NaN, infinities, and for all but F32 and BF16 those above 65504.
    """
    if type_name not in ENCODED:
        raise ValueError(f"{type_name} cannot be written: take one of {', '.join(ENCODED)}")
    rows, columns = values.shape
    nbytes = row_bytes(type_name, columns)
    values = values.detach().to("cpu", torch.float32).contiguous()
    largest = values.abs().max().item() if values.numel() else 0.0
    if not largest <= (LARGEST if type_name not in ("F32", "BF16") else float("inf")):
        raise ValueError(f"{type_name} holds finite values to 65504, found {largest:g}: write it in F32")
    if type_name in _FLOATS:
        return values.to(getattr(torch, PLAIN[type_name])).view(torch.uint8).view(rows, nbytes)
    if type_name in _BY_GGUF_PACKAGE:
        return _quantize_with_gguf_package(values, type_name)
    encode, kind = (_q4_k if type_name == "Q4_K" else _q6_k), GGML_TYPES[type_name]
    blocks = values.view(-1, kind.block)
    out = torch.empty(len(blocks), kind.nbytes, dtype=torch.uint8)
    for source, target in zip(blocks.split(CHUNK), out.split(CHUNK), strict=True):
        target.copy_(encode(source))
    return out.view(rows, nbytes)


def _quantize_with_gguf_package(values: Tensor, type_name: str) -> Tensor:
    import gguf  # a quarter of a second, for those who write files only

    return torch.from_numpy(gguf.quantize(values.numpy(), gguf.GGMLQuantizationType[type_name]))


# Q4_K: 8 groups of 32, value = d * scale * q - dmin * least ---------------------------------------------


def _q4_k(blocks: Tensor) -> Tensor:
    """float32 [n, 256] -> uint8 [n, 144]: d, dmin, 8 scales and 8 minima in 12 bytes, 256 codes in 128."""
    x = blocks.view(-1, 32).T.contiguous()  # [32, groups]
    scale, offset = _fit_q4_k(x)
    d, scales = _round_scales(scale.view(-1, 8), 63)  # [n, 1], [n, 8]
    dmin, minima = _round_scales(-offset.view(-1, 8), 63)
    step, least = (
        (d * scales).flatten(),
        (dmin * minima).flatten(),
    )  # what a decoder multiplies by and takes off
    q = _codes(x + least, step, 0, 15).byte().T.reshape(-1, 4, 2, 32)
    codes = (q[:, :, 0] | q[:, :, 1] << 4).flatten(1)  # [n, 128]: a pair of groups shares its bytes
    packed = _pack_six_bits(scales.byte(), minima.byte())  # [n, 12]
    return torch.cat([_f16_bytes(d), _f16_bytes(dmin), packed, codes], 1)


def _fit_q4_k(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [32, groups] -> scale >= 0 and offset <= 0, [groups]: x is about scale * q + offset, q in 0 to 15."""
    n, x_sum, xx = x.shape[0], x.sum(0), (x * x).sum(0)
    low = x.amin(0).clamp_(max=0)
    span = x.amax(0).clamp_(min=0) - low
    best = (torch.full_like(low, torch.inf), torch.zeros_like(low), torch.zeros_like(low))
    for guess in GUESSES:
        q = _codes(x - low, span / (15 + guess), 0, 15)
        q_sum, qq, qx = q.sum(0), (q * q).sum(0), (q * x).sum(0)
        scale = (n * qx - q_sum * x_sum) / _nonzero(n * qq - q_sum * q_sum)
        offset = (x_sum - scale * q_sum) / n
        scale = torch.where(offset > 0, qx / _nonzero(qq), scale).clamp_(min=0)  # a minimum is never positive
        offset = offset.clamp_(max=0)
        error = (
            xx - 2 * (scale * qx + offset * x_sum - scale * offset * q_sum) + scale**2 * qq + n * offset**2
        )
        better = error < best[0]
        best = (
            torch.where(better, error, best[0]),
            torch.where(better, scale, best[1]),
            torch.where(better, offset, best[2]),
        )
    return best[1], best[2]


def _pack_six_bits(scale: Tensor, least: Tensor) -> Tensor:
    """uint8 [n, 8] below 64 each -> uint8 [n, 12]: three rows of four, as in `gguf_dequant.py`."""
    one = scale[:, :4] | scale[:, 4:] >> 4 << 6
    two = least[:, :4] | least[:, 4:] >> 4 << 6
    three = scale[:, 4:] & 15 | least[:, 4:] << 4
    return torch.cat([one, two, three], 1)


# Q6_K: 16 groups of 16, value = d * scale * (q - 32) ----------------------------------------------------


def _q6_k(blocks: Tensor) -> Tensor:
    """float32 [n, 256] -> uint8 [n, 210]: 256 low bits in 128 bytes, high bits in 64, 16 scales, d."""
    x = blocks.view(-1, 16).T.contiguous()  # [16, groups]
    d, scales = _round_scales(_fit_q6_k(x).view(-1, 16), 127)  # [n, 1], [n, 16]
    q = _codes(x, (d * scales).flatten(), -32, 31).add_(32).byte().T.reshape(-1, 2, 4, 32)
    low = q[:, :, :2] & 15 | q[:, :, 2:] << 4  # [n, 2, 2, 32]: of each half, quarters 0 and 1 below 2 and 3
    high = torch.stack([q[:, :, k] >> 4 << 2 * k for k in range(4)]).sum(0, dtype=torch.uint8)  # [n, 2, 32]
    stored = scales.to(torch.int8).view(torch.uint8)
    return torch.cat([low.flatten(1), high.flatten(1), stored, _f16_bytes(d)], 1)


def _fit_q6_k(x: Tensor) -> Tensor:
    """x [16, groups] -> scale [groups] of either sign: x is about scale * q, q in -32 to 31.

    The value farthest from zero takes the side with the 32, so that a quantum is as small as it can be.
    """
    high, low = x.amax(0), x.amin(0)
    extreme = torch.where(high > -low, high, low)
    best = (torch.full_like(extreme, -torch.inf), torch.zeros_like(extreme))
    for guess in GUESSES:
        q = _codes(x, -extreme / (32 + guess), -32, 31)
        qq, qx = (q * q).sum(0), (q * x).sum(0)
        gain = (
            qx * qx / _nonzero(qq)
        )  # by how much the fit makes the squared error smaller than that of zeros
        better = gain > best[0]
        best = torch.where(better, gain, best[0]), torch.where(better, qx / _nonzero(qq), best[1])
    return best[1]


# shared pieces ------------------------------------------------------------------------------------------


def _codes(x: Tensor, step: Tensor, lowest: int, highest: int) -> Tensor:
    """The nearest codes. x [values, groups], step [groups] -> whole float32 [values, groups]."""
    return (x / _nonzero(step)).round_().clamp_(lowest, highest)


def _round_scales(scale: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """scale [n, groups] -> d [n, 1] that a float16 holds, codes [n, groups] of `largest` at most; float32.

    d is rounded up where float16 has so few digits left that a code would be cut or d be zero.
    """
    extreme = scale.abs().amax(1, keepdim=True)
    d = (extreme / largest).half()
    d = torch.where(d.float() * (largest + 0.5) < extreme, _next_up(d), d).float()
    return d, (scale / _nonzero(d)).round_().clamp_(-largest, largest)


def _next_up(d: Tensor) -> Tensor:
    """The float16 above each d >= 0."""
    return (d.view(torch.int16) + 1).view(torch.float16)


def _nonzero(x: Tensor) -> Tensor:
    """x with ones for zeros, to divide by: what is divided is zero there too."""
    return torch.where(x == 0, 1.0, x)


def _f16_bytes(d: Tensor) -> Tensor:
    """float32 [n, 1] -> uint8 [n, 2]."""
    return d.half().view(torch.uint8)

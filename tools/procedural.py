"""Procedural tensors: every weight and input is a pure function of its name, shape and index.

A reference file therefore holds outputs only, and any language rebuilds the rest bit for bit. The
specification is Candle's side of the comparison, `tools/candle_reference/src/procedural.rs`:

    seed(name) = FNV-1a 64 of the UTF-8 name
    bits(i)    = splitmix64's finaliser of seed + (i + 1) * 0x9E3779B97F4A7C15, wrapping
    u(i)       = (bits(i) >> 40) / 2^24 * 2 - 1, in [-1, 1)
    weight(i)  = name ends in "pos_embed": u(i) * sqrt(3)
                 other rank >= 2:          u(i) * sqrt(3 / fan_in), fan_in = product of the other dimensions
                 name ends in "bias":      u(i) * 0.05
                 other rank 1:             1 + u(i) * 0.1
    input(i)   = u(i) * sqrt(3)            token id = bits(i) % vocabulary

All arithmetic in float64, then one rounding to float32. Imports nothing of flux_sd: tests and tools share it.
`python tools/procedural.py` prints how long a billion weights take.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import nn

CHUNK = 1 << 15  # values at a time: what is worked on stays in the processor's cache


def seed(name: str) -> int:
    """FNV-1a, 64 bits."""
    value = 0xCBF29CE484222325
    for byte in name.encode():
        value = ((value ^ byte) * 0x100000001B3) % 2**64
    return value


def bits(name: str, count: int) -> Iterator[np.ndarray]:
    """`count` numbers of 64 bits, uint64, in chunks; a chunk is valid until the next is drawn."""
    golden = 0x9E3779B97F4A7C15
    start = (seed(name) + golden) % 2**64
    steps = np.arange(min(CHUNK, count), dtype=np.uint64) * np.uint64(golden)  # array products wrap
    z, shifted = np.empty_like(steps), np.empty_like(steps)
    for first in range(0, count, CHUNK):
        size = min(CHUNK, count - first)
        a, b = z[:size], shifted[:size]
        np.add(steps[:size], np.uint64((start + first * golden) % 2**64), out=a)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, None)):
            np.right_shift(a, np.uint64(shift), out=b)
            np.bitwise_xor(a, b, out=a)
            if factor is not None:
                np.multiply(a, np.uint64(factor), out=a)
        yield a


def _values(name: str, shape: Sequence[int], offset: float, gain: float, scale: float) -> np.ndarray:
    """(offset + u * gain) * scale, float32."""
    out = np.empty(math.prod(shape), dtype=np.float32)
    at = 0
    for chunk in bits(name, out.size):
        u = (chunk >> np.uint64(40)).astype(np.float64)
        u *= 2.0**-23  # / 2^24 * 2, exactly
        u -= 1.0
        u *= gain
        u += offset
        u *= scale
        out[at : at + chunk.size] = u
        at += chunk.size
    return out.reshape(tuple(shape))


def weight(name: str, shape: Sequence[int], scale: float = 1.0) -> np.ndarray:
    """A parameter, float32. `scale` is what a case may multiply the values of some names by."""
    if name.endswith("pos_embed"):
        offset, gain = 0.0, math.sqrt(3.0)
    elif len(shape) >= 2:
        offset, gain = 0.0, math.sqrt(3.0 / math.prod(shape[1:]))
    elif name.endswith("bias"):
        offset, gain = 0.0, 0.05
    else:
        offset, gain = 1.0, 0.1
    return _values(name, shape, offset, gain, scale)


def values(name: str, shape: Sequence[int]) -> torch.Tensor:
    """An input of unit variance, float32."""
    return torch.from_numpy(_values(name, shape, 0.0, math.sqrt(3.0), 1.0))


def tokens(name: str, length: int, vocabulary: int) -> list[int]:
    """Token ids below `vocabulary`."""
    drawn = [chunk % np.uint64(vocabulary) for chunk in bits(name, length)]
    ids: list[int] = np.concatenate(drawn).tolist()
    return ids


@torch.no_grad()
def fill(module: nn.Module, scale: Callable[[str], float] = lambda name: 1.0) -> nn.Module:
    """Gives every parameter its procedural value; the name is its path in `module`.

    `scale(name)` is what a case multiplies the values of that name by.
    """
    for name, parameter in module.named_parameters():
        parameter.copy_(torch.from_numpy(weight(name, parameter.shape, scale(name))))
    return module


if __name__ == "__main__":
    count = 100_000_000
    started = time.process_time()
    weight("speed.weight", (count // 1000, 1000))
    print(f"a billion weights: {(time.process_time() - started) * 1e9 / count:.1f} s of one core")

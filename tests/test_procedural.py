"""The procedural weights against the rule in plain integers, and bit for bit against Candle's program."""

from __future__ import annotations

import struct

import golden
import numpy as np
import procedural
import pytest
import torch

MASK = 2**64 - 1


def plain_bits(name: str, i: int) -> int:
    z = (procedural.seed(name) + (i + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def plain_u(name: str, i: int) -> float:
    return (plain_bits(name, i) >> 40) / 2**24 * 2.0 - 1.0


def float32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


def test_the_hash_is_fnv_1a() -> None:
    # The published test values of FNV-1a 64.
    assert procedural.seed("") == 0xCBF29CE484222325
    assert procedural.seed("a") == 0xAF63DC4C8601EC8C
    assert procedural.seed("foobar") == 0x85944171F73967E8


@pytest.mark.parametrize(
    ("name", "shape", "offset", "gain"),
    [
        ("a.weight", (310, 7, 31), 0.0, (3 / (7 * 31)) ** 0.5),
        ("a.bias", (100_003,), 0.0, 0.05),
        ("norm.scale", (65_537,), 1.0, 0.1),
        ("x.pos_embed", (1, 70_001), 0.0, 3**0.5),
    ],
)
def test_weights_follow_the_rule(name: str, shape: tuple[int, ...], offset: float, gain: float) -> None:
    flat = procedural.weight(name, shape, scale=0.3).reshape(-1)
    assert flat.dtype == np.float32
    chunk = procedural.CHUNK
    for i in (0, 1, 2, chunk - 1, chunk, chunk + 1, 2 * chunk - 1, flat.size - 1):
        assert flat[i] == float32((offset + plain_u(name, i) * gain) * 0.3)


def test_tokens_and_inputs_follow_the_rule() -> None:
    assert procedural.tokens("ids", 9, 512) == [plain_bits("ids", i) % 512 for i in range(9)]
    drawn = procedural.values("input.x", (2, 50_000))
    assert drawn.std().item() == pytest.approx(1.0, abs=0.01)
    assert drawn[1, 49_999].item() == float32(plain_u("input.x", 99_999) * 3**0.5)


@pytest.mark.parametrize("name", sorted(golden.stored("procedural")))
def test_bit_equal_to_the_rust_program(name: str) -> None:
    stored = golden.stored("procedural")[name]
    if name == "case.ids":
        ours = torch.tensor(procedural.tokens(name, 100, 49406)).to(torch.uint32)
    elif name == "case.input":
        ours = procedural.values(name, stored.shape)
    else:
        scale = 0.03 if name == "case.scaled.weight" else 1.0
        ours = torch.from_numpy(procedural.weight(name, stored.shape, scale))
    golden.check_case("procedural", name, ours)
    assert torch.equal(ours, stored)

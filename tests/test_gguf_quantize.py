"""Encoding to GGML blocks: what comes back, how far off it is, and how far off Candle's own encoder is."""

from __future__ import annotations

import gguf
import golden
import pytest
import torch
from procedural import values
from torch import Tensor

from flux_sd import gguf_quantize
from flux_sd.ggml_types import GGML_TYPES, row_bytes
from flux_sd.gguf_dequant import SUPPORTED, dequantize
from flux_sd.gguf_quantize import ENCODED, quantize

BLOCK_TYPES = [name for name in ENCODED if GGML_TYPES[name].block > 1]
OURS = ("Q4_K", "Q6_K")
# Quanta over the widest range that a block (Q4_K, Q6_K: a group) of values spans.
LEVELS = {"Q4_0": 15, "Q4_1": 15, "Q5_0": 31, "Q5_1": 31, "Q8_0": 254, "Q4_K": 15, "Q6_K": 63}


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def there_and_back(x: Tensor, name: str) -> Tensor:
    return dequantize(quantize(x, name), name)


def rmse(a: Tensor, b: Tensor) -> float:
    return (a - b).double().square().mean().sqrt().item()


@pytest.mark.parametrize("name", ENCODED)
def test_shape_and_size(name: str) -> None:
    assert name in SUPPORTED
    stored = quantize(normal(3, 512), name)
    assert stored.shape == (3, row_bytes(name, 512))
    assert stored.dtype == torch.uint8
    assert quantize(normal(0, 512), name).shape == (0, row_bytes(name, 512))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_no_value_is_off_by_more_than_its_quantum_allows(name: str) -> None:
    x = normal(64, 1024)
    block = 16 if name == "Q6_K" else 32
    groups, decoded = x.view(-1, block), there_and_back(x, name).view(-1, block)
    if name in ("Q4_1", "Q5_1", "Q4_K"):
        span = groups.amax(1).clamp(min=0) - groups.amin(1).clamp(max=0)
    else:
        span = 2 * groups.abs().amax(1)
    # Half a quantum; the extreme may lie half a quantum outside, and K types round their scales as well.
    allowed = (1.1 if name not in OURS else 1.6) * span / LEVELS[name]
    assert ((groups - decoded).abs().amax(1) <= allowed).all()


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_errors_on_normal_weights_are_those_of_the_type(name: str) -> None:
    """RMSE over the standard deviation, and 5% on top of what was found when this was written."""
    found = {"Q4_0": 0.0860, "Q4_1": 0.0784, "Q5_0": 0.0427, "Q5_1": 0.0379, "Q8_0": 0.00536}
    found |= {"Q4_K": 0.0720, "Q6_K": 0.0175}
    x = normal(128, 2048, seed=1)
    assert rmse(there_and_back(x, name), x) <= 1.05 * found[name] * 0.02


@pytest.mark.parametrize("name", OURS)
def test_encoding_what_was_decoded_changes_little(name: str) -> None:
    once = there_and_back(normal(16, 1024, seed=2), name)
    again = there_and_back(once, name)
    assert rmse(again, once) <= 0.35 * rmse(once, normal(16, 1024, seed=2))


@pytest.mark.parametrize("name", ENCODED)
def test_zeros_stay_zeros(name: str) -> None:
    assert not there_and_back(torch.zeros(2, 512), name).any()


@pytest.mark.parametrize("name", OURS)
def test_zero_groups_beside_others(name: str) -> None:
    x = normal(4, 512, seed=3)
    x.view(-1, 32)[::3] = 0.0
    assert not there_and_back(x, name).view(-1, 32)[::3].any()


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("constant", [0.5, -0.5, 1e-4])
def test_a_constant_row_comes_back(name: str, constant: float) -> None:
    x = torch.full((2, 256), constant)
    # float16 has 11 bits for the block's scale, and fewer below 6e-5 / 127 or 63.
    assert (there_and_back(x, name) / constant - 1).abs().max() <= (1e-3 if constant != 1e-4 else 0.05)


@pytest.mark.parametrize("name", OURS)
def test_one_outlier_costs_its_group_alone(name: str) -> None:
    x = normal(1, 256, seed=4)
    plain = there_and_back(x, name)
    spoilt = x.clone()
    spoilt[0, 40] = 1.0
    decoded = there_and_back(spoilt, name)
    size = 16 if name == "Q6_K" else 32
    group = slice(40 // size * size, 40 // size * size + size)
    assert abs(decoded[0, 40].item() - 1.0) <= 0.02
    others = torch.ones(256, dtype=torch.bool)
    others[group] = False
    # The other groups keep codes; only their scales are rounded to coarser steps.
    assert rmse(decoded[0, others], x[0, others]) <= 4 * rmse(plain[0, others], x[0, others])


@pytest.mark.parametrize("name", OURS)
def test_weights_below_float16_keep_their_order_of_magnitude(name: str) -> None:
    """Block scales near and below float16's least number are rounded up, and never to zero."""
    for size in (1e-2, 1e-4, 1e-5, 3e-6):
        x = normal(8, 512, seed=5) / 0.02 * size
        assert rmse(there_and_back(x, name), x) <= 0.5 * size


@pytest.mark.parametrize("name", OURS)
def test_the_largest_values_stay_finite(name: str) -> None:
    x = normal(4, 512, seed=6) / 0.02
    x *= 65504 / x.abs().max()
    assert rmse(there_and_back(x, name), x) <= 0.1 * rmse(x, torch.zeros_like(x))


@pytest.mark.parametrize("name", OURS)
def test_rmse_against_candles_encoder(name: str) -> None:
    """On the weight of gguf_products, which Candle encoded too: 0.97 (Q4_K) and 0.95 (Q6_K) of its RMSE."""
    x = values("input.gguf_weight", (48, 512)) * 0.05
    word = name[:2] + name[-1]
    candle = dequantize(golden.stored("gguf_products")[f"{word}.blocks"].view(48, -1), name)
    ratio = rmse(there_and_back(x, name), x) / rmse(candle, x)
    print(f"{name}: {ratio:.4f} of Candle's RMSE")
    assert 0.8 <= ratio <= 1.0


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_the_gguf_package_reads_what_is_written(name: str) -> None:
    stored = quantize(normal(4, 512, seed=7), name)
    decoded = torch.from_numpy(gguf.dequantize(stored.numpy(), gguf.GGMLQuantizationType[name]).copy())
    assert torch.equal(decoded, dequantize(stored, name))


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_floats_are_rounded_as_the_gguf_package_rounds_them(name: str) -> None:
    x = normal(4, 512, seed=8)
    expected = gguf.quantize(x.numpy(), gguf.GGMLQuantizationType[name])
    assert torch.equal(quantize(x, name), torch.from_numpy(expected).view(torch.uint8).view(4, -1))


@pytest.mark.parametrize("name", OURS)
def test_chunks_do_not_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(5, 1792, seed=9)  # 35 blocks
    whole = there_and_back(x, name)
    monkeypatch.setattr(gguf_quantize, "CHUNK", 3)
    pieces = there_and_back(x, name)
    # Sums of another width may differ in their last bits, and then now and then a code does.
    assert (pieces != whole).float().mean() <= 0.05
    assert abs(rmse(pieces, x) / rmse(whole, x) - 1) <= 1e-3


def test_any_float_type_and_layout() -> None:
    x = normal(8, 512, seed=10).bfloat16()
    assert torch.equal(quantize(x, "Q4_K"), quantize(x.float(), "Q4_K"))
    turned = normal(512, 8, seed=11).T
    assert torch.equal(quantize(turned, "Q6_K"), quantize(turned.contiguous(), "Q6_K"))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_what_cannot_be_encoded_is_refused(name: str) -> None:
    block = GGML_TYPES[name].block
    with pytest.raises(ValueError, match=f"a row of 48 elements is not a whole number of {name}'s blocks"):
        quantize(normal(2, 48), name)
    for bad in (float("nan"), float("inf"), -65600.0):
        x = normal(2, 2 * block)
        x[1, 3] = bad
        with pytest.raises(ValueError, match=f"{name} holds finite values to 65504, found"):
            quantize(x, name)


def test_a_type_that_is_not_encoded_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"Q5_K cannot be written: take one of F32, F16, BF16, Q4_0, .* Q6_K"
    ):
        quantize(normal(2, 256), "Q5_K")

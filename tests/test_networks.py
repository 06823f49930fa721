"""Sizes of the networks, and the arithmetic that no checkpoint shows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from flux_sd.autoencoder import AutoEncoder, AutoEncoderConfig, _positions
from flux_sd.clip import ClipTextConfig, ClipTextEncoder
from flux_sd.flux_mmdit import Flux, FluxConfig, rotary_table, rotate
from flux_sd.ops import sinusoidal_embedding
from flux_sd.t5 import T5Config, T5DenseGatedGelu, T5Encoder, relative_buckets
from flux_sd.versions import SDVersion


def count(network: type, config: object) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in network(config).parameters())


@pytest.mark.parametrize(
    ("network", "config", "total"),
    [
        (Flux, FluxConfig.dev(), 11_901_408_320),
        (Flux, FluxConfig.schnell(), 11_891_178_560),
        (T5Encoder, T5Config.v1_1_xxl(), 4_762_310_656),
        (ClipTextEncoder, ClipTextConfig.clip_l(), 123_060_480),
        (AutoEncoder, AutoEncoderConfig.flux(), 83_819_683),
    ],
)
def test_parameter_totals_are_the_released_ones(network: type, config: object, total: int) -> None:
    assert count(network, config) == total


def test_version_table_states_the_totals_of_its_configs() -> None:
    for version in SDVersion:
        if version.info.flux is None or not version.info.parameters:
            continue
        configs = version.info.flux
        parts = {"transformer": Flux, "t5": T5Encoder, "clip": ClipTextEncoder, "vae": AutoEncoder}
        counted = {role: count(network, getattr(configs, role)) for role, network in parts.items()}
        assert counted == dict(version.info.parameters)


def test_t5_survives_float16_where_its_feed_forward_leaves_the_range() -> None:
    torch.manual_seed(0)
    t5 = T5Encoder(T5Config.tiny(2)).eval()
    for block in t5.encoder.block:
        block.layer[1].DenseReluDense.wi_0.weight.data *= 60
        block.layer[1].DenseReluDense.wi_1.weight.data *= 60
        block.layer[1].DenseReluDense.wo.weight.data *= 60
    ids = torch.arange(20)[None]
    hook_peak = []
    t5.encoder.block[1].layer[1].register_forward_hook(lambda *a: hook_peak.append(a[2].abs().max().item()))
    with torch.inference_mode():
        exact = t5(ids)
        half = t5.to(torch.float16)(ids)
    assert hook_peak[0] > 65504, "the case must leave float16's range to mean anything"
    assert half.dtype == torch.float16
    assert torch.isfinite(half).all()
    assert (half.float() - exact).norm() / exact.norm() < 5e-3


def test_t5_gates_with_the_tanh_gelu_in_float16_too() -> None:
    """At -3 the two forms of GELU are a tenth apart, far above float16's rounding."""
    config = replace(T5Config.tiny(1), d_model=8, d_ff=8)
    feed_forward = T5DenseGatedGelu(config).half()
    for layer in (feed_forward.wi_0, feed_forward.wo):
        layer.weight.data = torch.eye(8, dtype=torch.float16)
    feed_forward.wi_1.weight.data = torch.full((8, 8), 1 / 8, dtype=torch.float16)
    x = torch.full((1, 1, 8), -3.0, dtype=torch.float16)
    with torch.inference_mode():
        product = feed_forward(x)  # gelu(-3) * -3
    expected = -3 * F.gelu(torch.tensor(-3.0), approximate="tanh")
    assert product.dtype == torch.float32
    assert torch.allclose(product, expected.expand(1, 1, 8), rtol=5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rotary_angles_hold_at_2048_pixels_in_every_dtype(dtype: torch.dtype) -> None:
    ids = torch.tensor([[[0.0, 127.0, 127.0]]])
    pe = rotary_table(ids, FluxConfig.dev(), dtype)
    assert pe.dtype == torch.float32
    angles = torch.atan2(pe[..., 1].double(), pe[..., 0].double()).flatten()
    powers = torch.arange(0, 56, 2, dtype=torch.float64) / 56
    expected = 127.0 / 10_000**powers
    wrapped = torch.atan2(expected.sin(), expected.cos())
    assert (angles[8:36] - wrapped).abs().max() < 1e-6
    assert (angles[36:] - wrapped).abs().max() < 1e-6
    assert (angles[:8]).abs().max() == 0


def test_rotary_axes_are_index_row_column() -> None:
    ids = torch.tensor([[[0.0, 3.0, 5.0]]])
    pe = rotary_table(ids, FluxConfig.tiny(), torch.float32)[0, 0, 0]  # [32,2]
    assert torch.allclose(
        pe[8],
        torch.tensor([3.0]).cos().item() * torch.tensor([1.0, 0.0])
        + torch.tensor([0.0, 3.0]).sin() * torch.tensor([0.0, 1.0]),
    )
    assert torch.allclose(pe[20, 0], torch.tensor(5.0).cos())


def test_rotation_keeps_lengths_and_depends_on_distance_only() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 64).unbind(0)
    config = FluxConfig.tiny()
    scores = []
    for shift in (0.0, 40.0):
        tables = [
            rotary_table(torch.tensor([[[0.0, row + shift, column + shift]]]), config, torch.float32)
            for row, column in ((1.0, 2.0), (7.0, 3.0))
        ]
        turned_q, turned_k = rotate(q, tables[0]), rotate(k, tables[1])
        assert torch.allclose(turned_q.norm(), q.norm())
        scores.append((turned_q * turned_k).sum())
    assert torch.allclose(scores[0], scores[1], atol=1e-4)


def test_sinusoid_has_cosines_first_and_keeps_750_in_bfloat16() -> None:
    t = torch.tensor([0.75])
    embedding = sinusoidal_embedding(t, 256, time_factor=1000.0)
    assert embedding.shape == (1, 256) and embedding.dtype == torch.float32
    assert torch.allclose(embedding[0, 0].double(), torch.tensor(750.0, dtype=torch.float64).cos(), atol=1e-7)
    assert torch.allclose(
        embedding[0, 128].double(), torch.tensor(750.0, dtype=torch.float64).sin(), atol=1e-7
    )


def test_relative_buckets_grow_logarithmically_and_differ_by_sign() -> None:
    distance = torch.tensor([-300, -128, -20, -8, -7, -1, 0, 1, 7, 8, 20, 128, 300])
    expected = [15, 15, 10, 8, 7, 1, 0, 17, 23, 24, 26, 31, 31]
    assert relative_buckets(distance, 32, 128).tolist() == expected


def test_clip_pools_the_first_end_token_so_that_padding_by_it_changes_nothing() -> None:
    torch.manual_seed(0)
    clip = ClipTextEncoder(ClipTextConfig.tiny()).eval()
    short = torch.tensor([[3, 9, 5, 511]])
    padded = torch.cat([short, torch.full((1, 20), 511)], dim=1)
    with torch.inference_mode():
        assert torch.allclose(clip(short).pooled, clip(padded).pooled, atol=1e-6)
        assert clip(short).projected is None


def test_dev_refuses_to_run_without_guidance() -> None:
    model = Flux(FluxConfig.tiny(0, 0, guidance_embed=True))
    x = torch.zeros(1, 4, 64)
    ids = torch.zeros(1, 4, 3)
    with pytest.raises(ValueError, match="guidance"):
        model(x, ids, x, ids, torch.ones(1), torch.zeros(1, 64))


def test_the_autoencoder_gives_attention_contiguous_rows() -> None:
    """With strided ones a CPU builds every score: 34 GB in the middle of a 2048-pixel picture."""
    assert _positions(torch.zeros(1, 8, 4, 6)).is_contiguous()

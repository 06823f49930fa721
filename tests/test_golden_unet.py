"""The UNet against Candle's stored activations. The three full-size cases are slow."""

from __future__ import annotations

from dataclasses import replace

import golden
import pytest
import torch
from procedural import values

import flux_sd.unet
from flux_sd.unet import Attention, UNet, UNetConfig

NARROW = UNetConfig.tiny()
# Candle's GEGLU is tanh's, and its UNet of XL takes neither pooled text nor sizes.
CONFIGS = {
    "unet_tiny_sd15": NARROW,
    "unet_tiny_sd21": replace(NARROW, heads=(2, 4, 4), linear_projection=True),
    "unet_tiny_sdxl": replace(NARROW, depths=(0, 2, 3), mid_depth=3, heads=(2, 4, 4), linear_projection=True),
    "unet_tiny_inpaint": NARROW.inpainting(),
    "unet_sd15": UNetConfig.sd15(),
    "unet_sd21": UNetConfig.sd21(),
    "unet_sdxl": replace(UNetConfig.sdxl(), added_dim=None),
}
PARAMETERS = {  # as released
    "sd15": (UNetConfig.sd15(), 859_520_964),
    "sd21": (UNetConfig.sd21(), 865_910_724),
    "sdxl": (UNetConfig.sdxl(), 2_567_463_684),
    "sd15-inpaint": (UNetConfig.sd15().inpainting(), 859_535_364),
    "sd2-inpaint": (UNetConfig.sd21().inpainting(), 865_925_124),
    "sdxl-inpaint": (UNetConfig.sdxl().inpainting(), 2_567_478_084),
}


@pytest.mark.parametrize("case", golden.cases("tests/test_golden_unet.py::test_unet"))
@torch.inference_mode()
def test_unet(case: str) -> None:
    config = replace(CONFIGS[case], geglu="tanh")
    model = golden.build(lambda: UNet(config))
    assert golden.keys_of(model) == golden.stored_keys(case)
    latent = values("input.unet_latent", (1, config.in_channels, 16, 24))
    context = values("input.unet_context", (1, 77, config.context_dim))
    golden.check_case(case, "noise_pred", model(latent, torch.tensor([601.0]), context))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_totals_are_the_released_ones(name: str) -> None:
    config, total = PARAMETERS[name]
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in UNet(config).parameters()) == total


@torch.inference_mode()
def test_sizes_that_do_not_halve_evenly_come_back_whole() -> None:
    torch.manual_seed(0)
    model = UNet(NARROW)
    latent, context = torch.randn(1, 4, 9, 13), torch.randn(1, 5, NARROW.context_dim)
    assert model(latent, torch.tensor([7.0]), context).shape == latent.shape


@torch.inference_mode()
def test_xl_embeds_pooled_text_and_sizes_and_asks_for_them() -> None:
    torch.manual_seed(0)
    config = replace(NARROW, added_dim=32 + 6 * 256)
    model = UNet(config)
    latent, context, t = torch.randn(1, 4, 8, 8), torch.randn(1, 5, config.context_dim), torch.tensor([7.0])
    pooled, sizes = torch.randn(1, 32), torch.tensor([[512.0, 768.0, 0.0, 0.0, 512.0, 768.0]])
    painted = model(latent, t, context, pooled, sizes)
    swapped = model(latent, t, context, pooled, sizes[:, [1, 0, 2, 3, 5, 4]])
    assert not torch.allclose(painted, swapped)
    with pytest.raises(ValueError, match="pooled text and sizes"):
        model(latent, t, context)


@pytest.mark.parametrize("in_float32", [True, False])
def test_attention_of_half_precision_runs_in_float32_where_the_model_needs_it(
    in_float32: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        seen.append({q.dtype, k.dtype, v.dtype})
        return v

    monkeypatch.setattr(flux_sd.unet, "attention", attention)
    module = Attention(replace(NARROW, float32_attention=in_float32), 64, 64, 4).half()
    x = torch.randn(1, 6, 64).half()
    assert module(x, x).dtype == torch.float16
    assert seen == [{torch.float32 if in_float32 else torch.float16}]


def test_the_released_2_1_is_the_one_that_needs_it() -> None:
    assert UNetConfig.sd21().float32_attention
    assert not UNetConfig.sd15().float32_attention and not UNetConfig.sdxl().float32_attention

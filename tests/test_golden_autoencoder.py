"""The autoencoder, FLUX's and Stable Diffusion's, against Candle's stored pictures and moments.

Candle's Stable Diffusion one has diffusers' names, so its weights come to ours through the diffusers map.
"""

from __future__ import annotations

from dataclasses import replace

import golden
import pytest
import torch
from procedural import values, weight
from torch import nn

from flux_sd.autoencoder import AutoEncoder, AutoEncoderConfig
from flux_sd.weight_map import RESHAPES, maps_folder, read_map

CONFIGS = {
    "ae_tiny": AutoEncoderConfig.tiny(),
    "ae_tiny_small": AutoEncoderConfig.tiny(),
    "ae_full": AutoEncoderConfig.flux(),
    # Candle's decoder takes its codes as they are: what scales latents is outside it.
    "vae_tiny": replace(AutoEncoderConfig.sd(), ch=32, ch_mult=(1, 2, 2, 2), scale_factor=1.0),
    "vae_sd": replace(AutoEncoderConfig.sd(), scale_factor=1.0),
}


def small(name: str) -> float:
    """The factors of ae_tiny_small: what enters a block's second norm is small enough to show its epsilon."""
    return 0.03 if ".conv1." in name else 1.0


def flux_autoencoder(case: str) -> nn.Module:
    scale = small if case.endswith("_small") else lambda name: 1.0
    model = golden.build(lambda: AutoEncoder(CONFIGS[case]), scale)
    assert golden.keys_of(model) == golden.stored_keys(case)
    return model


@torch.no_grad()
def sd_autoencoder(case: str) -> nn.Module:
    """Ours, with the weights of Candle's names brought over by weights_maps/autoencoder.diffusers.toml."""
    config, keys = CONFIGS[case], golden.stored_keys(case)
    model = AutoEncoder(config).eval()
    parameters = dict(model.named_parameters())
    rows = read_map(maps_folder() / "autoencoder.diffusers.toml").expand(config, parameters, keys)
    assert rows.keys() == parameters.keys()
    assert sorted(name for row in rows.values() for name in row.sources) == sorted(keys)
    for name, row in rows.items():
        (source,) = row.sources
        assert row.operation in ("copy", *RESHAPES)
        values_there = torch.from_numpy(weight(source, keys[source]))
        parameters[name].copy_(values_there.reshape(parameters[name].shape))
    for module in model.modules():
        if isinstance(module, nn.GroupNorm) and case == "vae_tiny":
            module.num_groups = 8  # as the case has it, being narrow; every released one has 32
    return model


@pytest.mark.parametrize("case", golden.cases("tests/test_golden_autoencoder.py::test_autoencoder"))
@torch.inference_mode()
def test_autoencoder(case: str) -> None:
    if case.startswith("vae_"):
        latents = values("input.vae_latent", (1, 4, 8, 12))
        golden.check_case(case, "decoded", sd_autoencoder(case).decode(latents))
        return
    model = flux_autoencoder(case)
    picture = model.decode(values("input.ae_latent", (1, 16, 8, 12)))
    golden.check_case(case, "decoded", picture)
    assert picture.shape[-1] == 12 * CONFIGS[case].downsampling
    golden.check_case(case, "encoder_moments", model.moments(values("input.ae_image", (1, 3, 64, 80))))


@torch.inference_mode()
def test_a_sampled_code_is_mean_plus_deviation_times_noise() -> None:
    """From Candle's moments; its own sample is of noise that nothing can repeat."""
    mean, logvar = golden.stored("ae_tiny")["encoder_moments"].split(16, dim=1)
    noise = values("case.noise", mean.shape)
    config = CONFIGS["ae_tiny"]
    expected = (mean + logvar.exp().sqrt() * noise - config.shift_factor) * config.scale_factor
    ours = flux_autoencoder("ae_tiny").encode(values("input.ae_image", (1, 3, 64, 80)), noise)
    assert golden.difference(ours, expected).relative < 8e-6

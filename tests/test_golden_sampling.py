"""Schedules, packing, position ids and whole denoising runs against Candle's."""

from __future__ import annotations

from dataclasses import replace

import golden
import pytest
import torch
from procedural import values
from torch import Tensor, nn

from flux_sd.flux_mmdit import Flux, FluxConfig
from flux_sd.numerics import candle, reference
from flux_sd.sampling import State, denoise, get_noise, get_schedule, unpack

HEIGHT, WIDTH = 64, 96  # pixels: 24 image tokens


def schedule(name: str) -> Tensor:
    """schedule_STEPS_schnell or schedule_STEPS_dev_TOKENS."""
    _, steps, variant, *image_tokens = name.split("_")
    times = get_schedule(int(steps), int(image_tokens[0]) if variant == "dev" else None)
    return torch.tensor(times, dtype=torch.float64)


def state(dtype: torch.dtype = torch.float32) -> State:
    return State.new(
        values("input.t5", (1, 12, 64)).to(dtype),
        values("input.clip", (1, 64)).to(dtype),
        values("input.latent", (1, 16, HEIGHT // 8, WIDTH // 8)).to(dtype),
    )


def denoised(variant: str) -> Tensor:
    """Packed latents after all steps: schnell 4, dev 6 with guidance 3.5."""
    dev = variant == "dev"
    config = replace(FluxConfig.tiny(guidance_embed=dev), rope_dtype=candle().rope_dtype)
    model = golden.build(lambda: Flux(config))
    start = state()
    times = get_schedule(6, start.img.shape[1]) if dev else get_schedule(4)
    *_, last = denoise(model, start, times, 3.5 if dev else None, candle().latents_dtype)
    return last.img


def ours(tensor: str) -> Tensor:
    if tensor.startswith("schedule_"):
        return schedule(tensor)
    if tensor.startswith("denoised_"):
        return denoised(tensor.removeprefix("denoised_"))
    start = state()
    return {"packed": start.img, "img_ids": start.img_ids, "unpacked": unpack(start.img, HEIGHT, WIDTH)}[
        tensor
    ]


@pytest.mark.parametrize("tensor", sorted(golden.stored("flux_sampling")))
def test_flux_sampling(tensor: str) -> None:
    golden.check_case("flux_sampling", tensor, ours(tensor))


def test_a_size_between_multiples_of_16_unpacks_as_the_next() -> None:
    unpacked = unpack(state().img, HEIGHT - 15, WIDTH - 1)
    golden.check_case("flux_sampling", "unpacked", unpacked)
    assert get_noise(0, HEIGHT - 15, WIDTH - 1).shape == unpacked.shape


class StandIn(nn.Module):
    """Half of the latents plus the time: every step shows what the loop passes on and how it rounds."""

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        vec: Tensor,
        guidance: Tensor | None,
    ) -> Tensor:
        return img * 0.5 + timesteps[:, None, None].to(img.dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_euler(dtype: str) -> None:
    """In bfloat16 Candle rounds the latents after every step; carried in float32 they end elsewhere."""
    times = get_schedule(8, 4096)
    start = state(getattr(torch, dtype))
    *_, last = denoise(StandIn(), start, times, 3.5, candle().latents_dtype)
    golden.check_case("flux_euler", dtype, last.img)
    *_, carried = denoise(StandIn(), start, times, 3.5, reference().latents_dtype)
    apart = golden.difference(carried.img, golden.stored("flux_euler")[dtype]).relative
    assert (apart > 2e-3) == (dtype == "bfloat16")

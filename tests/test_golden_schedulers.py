"""Stable Diffusion's samplers against Candle's, under the candle numerics.

Candle's UniPC is not imitated, so its tensors are not compared: see the manifest.
"""

from __future__ import annotations

import golden
import pytest
import torch
from procedural import values
from torch import Tensor

from flux_sd.numerics import candle
from flux_sd.schedulers import NoiseSchedule, Sampler, make_sampler

SHAPE = (1, 4, 4, 4)
START = values("input.sched_noise", SHAPE)
COMPARED = [name for name in sorted(golden.stored("schedulers")) if not name.startswith("unipc")]


def predicted(index: int) -> Tensor:
    return values(f"input.sched_eps_{index}", SHAPE)


def sampler_of(case: str) -> Sampler:
    """ddim_PREDICTION_SCHEDULE_STEPS or euler_a_SCHEDULE_STEPS."""
    name, *words, steps = case.split("_")
    prediction, schedule = ("epsilon", words[1]) if name == "euler" else (words[0], words[1])
    return make_sampler(
        "euler_ancestral" if name == "euler" else "ddim",
        NoiseSchedule.scaled_linear(),
        schedule,
        int(steps),
        "v_prediction" if prediction == "v" else "epsilon",
        ratio=candle().stride,
    )


def trajectory(sampler: Sampler) -> Tensor:
    x = START * sampler.init_scale
    states = [x]
    for index in range(len(sampler.timesteps)):
        output = 0.5 * sampler.scale_input(x, index) + 0.5 * predicted(index)
        x = sampler.step(output, index, x).latents
        states.append(x)
    return torch.cat(states)


def ours(case: str, tensor: str) -> Tensor:
    sampler = sampler_of(case)
    last = len(sampler.timesteps) - 1
    match tensor:
        case "timesteps":
            return sampler.timesteps
        case "init_noise_sigma":
            return torch.tensor([sampler.init_scale], dtype=torch.float64)
        case "scaled_ones":
            return torch.cat([sampler.scale_input(torch.ones(1, 1), i) for i in range(last + 1)])
        case "last_step":  # ends without noise, so what is drawn there does not matter
            return sampler.step(predicted(0), last, START, torch.zeros(SHAPE)).latents
        case _:
            return trajectory(sampler)


@pytest.mark.parametrize("name", COMPARED)
def test_schedulers(name: str) -> None:
    golden.check_case("schedulers", name, ours(*name.split(".")))

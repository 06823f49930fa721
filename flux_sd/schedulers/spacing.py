"""Which noise levels a run steps through: one function per schedule, by the names that users type.

leading, trailing and linspace choose whole training steps (Lin et al. 2023, table 2; the details as in
diffusers' schedulers). The others choose sigmas: simple, sgm_uniform and ddim_uniform by ComfyUI's
definitions (`comfy/samplers.py`), karras and exponential between the largest and the least sigma of the
training (Karras et al. 2022; k-diffusion).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .noise import NoiseSchedule

STEPS_OFFSET = 1  # of leading, as every released Stable Diffusion has it
KARRAS_RHO = 7.0
SCHEDULES = (
    "leading", "trailing", "linspace", "simple", "sgm_uniform", "ddim_uniform", "karras", "exponential",
)  # fmt: skip
BY_TIME = ("leading", "trailing", "linspace")  # choose training steps; the others choose sigmas
Ratio = Literal["exact", "integer"]


@dataclass(frozen=True)
class Grid:
    """How a sampler wants its steps chosen."""

    spare: bool = False  # one step more is spaced out and the last left out: the multistep solvers
    rounded: bool = True  # linspace takes whole training steps
    ratio: Ratio = "exact"  # integer: trailing's stride is rounded down and linspace truncates, as in Candle


def times_of(schedule: str, noise: NoiseSchedule, steps: int, grid: Grid) -> Tensor:
    """float64 times [N] of leading, trailing or linspace, falling. N is `steps`, or more where Candle's
    integer stride leaves a rest."""
    choose = {"leading": leading, "trailing": trailing, "linspace": linspace}[schedule]
    return choose(noise.steps, steps, grid)


def leading(training: int, steps: int, grid: Grid) -> Tensor:
    """i floor(T / N) + 1 for i = N-1 .. 0; with a spare step, floor(T / (N + 1)) and i = N .. 1."""
    count = steps + int(grid.spare)
    times = torch.arange(count, dtype=torch.float64).flip(0) * (training // count) + STEPS_OFFSET
    return times[:steps].clamp(max=training - 1)


def trailing(training: int, steps: int, grid: Grid) -> Tensor:
    """round(T - i T / N) - 1 for i = 0 .. N-1. Candle's stride is floor(T / N), down to the last above 0."""
    if grid.ratio == "integer":
        stride = training // steps
        return torch.arange(training, 0, -stride, dtype=torch.float64) - 1
    return (training - torch.arange(steps, dtype=torch.float64) * (training / steps)).round() - 1


def linspace(training: int, steps: int, grid: Grid) -> Tensor:
    """N points from T-1 down to 0; with a spare step, N + 1 of which the last is left out."""
    if grid.ratio == "integer":
        return torch.from_numpy(np.floor(np.linspace(0, training - 1, steps))).flip(0)
    # numpy's, as in diffusers: torch's differs in the last bit, which decides where halves are rounded to.
    times = torch.from_numpy(np.linspace(0, training - 1, steps + int(grid.spare))).flip(0)[:steps]
    return times.round() if grid.rounded else times


def sigmas_of(schedule: str, noise: NoiseSchedule, steps: int) -> Tensor:
    """float64 sigmas [N] of a schedule that chooses sigmas, falling, above 0. N is `steps`, but for
    ddim_uniform, which may take some more."""
    choose = {
        "simple": simple, "sgm_uniform": sgm_uniform, "ddim_uniform": ddim_uniform,
        "karras": karras, "exponential": exponential,
    }[schedule]  # fmt: skip
    return choose(noise, steps)


def simple(noise: NoiseSchedule, steps: int) -> Tensor:
    """The sigma of training step T - 1 - floor(i T / N), for i = 0 .. N-1."""
    stride = noise.steps / steps
    return noise.sigmas[[noise.steps - 1 - int(i * stride) for i in range(steps)]]


def sgm_uniform(noise: NoiseSchedule, steps: int) -> Tensor:
    """Sigmas at N + 1 times evenly from T-1 to 0, without the last."""
    return noise.sigma_at(torch.linspace(noise.steps - 1, 0, steps + 1, dtype=torch.float64)[:-1])


def ddim_uniform(noise: NoiseSchedule, steps: int) -> Tensor:
    """The sigmas of training steps 1, 1 + s, 1 + 2 s, ... below T, with s = max(floor(T / N), 1): N of them
    or more, and T - 1 where N is T."""
    return noise.sigmas[1 :: max(noise.steps // steps, 1)].flip(0)


def karras(noise: NoiseSchedule, steps: int) -> Tensor:
    """Evenly in sigma^(1/7) from the largest to the least (Karras et al. 2022, equation 5)."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    high, low = noise.sigmas[-1] ** (1 / KARRAS_RHO), noise.sigmas[0] ** (1 / KARRAS_RHO)
    return (high + ramp * (low - high)) ** KARRAS_RHO


def exponential(noise: NoiseSchedule, steps: int) -> Tensor:
    """Evenly in log sigma from the largest to the least."""
    logs = noise.sigmas[[-1, 0]].log()
    return torch.linspace(float(logs[0]), float(logs[1]), steps, dtype=torch.float64).exp()

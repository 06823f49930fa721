"""Latent consistency sampling (Luo et al. 2023): a clean picture, noised again to the next level.

It needs a network distilled for it. Distillation was on 50 of the training steps; a run takes some of these.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RequestError
from .levels import Levels

DISTILLED = 50  # training steps that the distillation used
SIGMA_DATA, TIME_SCALE = 0.5, 10.0


def lcm_times(training: int, steps: int) -> Tensor:
    """float64 [N]: of the 50 steps T/50 k - 1, those at places floor(50 i / N) from the noisiest down. Raises
    RequestError for more than 50."""
    if steps > DISTILLED:
        raise RequestError(f"sampler lcm takes at most {DISTILLED} steps, {steps} were asked for")
    distilled = torch.arange(DISTILLED, 0, -1, dtype=torch.float64) * (training // DISTILLED) - 1
    return distilled[[DISTILLED * i // steps for i in range(steps)]]


@dataclass(frozen=True)
class Lcm:
    """The consistency function's boundary conditions (equation 9), then noise."""

    levels: Levels

    def advance(self, index: int, x: Tensor, clean: Tensor, noise: Tensor | None) -> Tensor:
        """See `sampler.Solver`."""
        assert noise is not None
        scaled, after = TIME_SCALE * self.levels.times[index], self.levels.after[index]
        skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        out = scaled / (scaled**2 + SIGMA_DATA**2) ** 0.5
        denoised = out * clean + skip * x
        return after**0.5 * denoised + (1 - after) ** 0.5 * noise

"""The levels of one run, as plain numbers in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .noise import LEAST_ABAR, NoiseSchedule


@dataclass(frozen=True)
class Levels:
    """N steps: training time and abar before each, and abar after each."""

    times: tuple[float, ...]  # [N]
    abars: tuple[float, ...]  # [N], before each step
    after: tuple[float, ...]  # [N], after each step

    @classmethod
    def of_times(cls, noise: NoiseSchedule, times: Tensor, stride: int | None = None) -> Levels:
        """Training steps [N], fractions taken linearly in sigma as diffusers does. A step ends where the next
        begins and the last without noise; with a `stride`, at the training step that far below, and no lower
        than the first (DDIM with set_alpha_to_one off, in diffusers and in Candle: where the next step begins
        elsewhere, as with linspace, its network is told of a level that the state has not quite)."""
        if torch.equal(times, times.round()):
            abars = tuple(noise.abar(int(t)) for t in times)
        else:
            sigmas = np.interp(times.numpy(), np.arange(noise.steps), noise.sigmas.numpy())
            abars = tuple(float(1 / (sigma**2 + 1)) for sigma in sigmas)
        if stride is None:
            after = (*abars[1:], 1.0)
        else:
            after = tuple(noise.abar(max(int(t) - stride, 0)) for t in times)
        return cls(tuple(times.tolist()), abars, after)

    @classmethod
    def of_sigmas(cls, noise: NoiseSchedule, sigmas: Tensor) -> Levels:
        """Sigmas [N], falling; the last step ends without noise."""
        abars = tuple((1 / (sigmas**2 + 1)).tolist())
        return cls(tuple(noise.time_of(sigmas).tolist()), abars, (*abars[1:], 1.0))

    def with_signal(self) -> Levels:
        """The same where no level is pure noise: see `noise.LEAST_ABAR`."""
        return replace(self, abars=tuple(max(abar, LEAST_ABAR) for abar in self.abars))

    @cached_property  # read several times at every step
    def sigmas(self) -> tuple[float, ...]:
        """[N+1]: before each step, and after the last."""
        return tuple(sigma_of(abar) for abar in (*self.abars, self.after[-1]))


def sigma_of(abar: float) -> float:
    """sqrt((1 - abar) / abar); finite also where no signal is left."""
    return math.sqrt((1 - abar) / max(abar, LEAST_ABAR))


def log_snr(abar: float) -> float:
    """log(sqrt(abar) / sqrt(1 - abar)), the lambda of the DPM-Solver papers; infinite without noise."""
    return math.inf if abar >= 1.0 else -math.log(sigma_of(abar))

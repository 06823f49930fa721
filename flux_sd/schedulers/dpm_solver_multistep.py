"""DPM-Solver++(2M), the second-order multistep solver (Lu et al. 2022, algorithm 2), with the midpoint form.

Candle has no solver of this kind.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from .levels import Levels, log_snr


@dataclass
class DpmSolver2M:
    """The prediction, extrapolated from the one before. Keeps that one; a step to no noise does without."""

    levels: Levels
    _before: tuple[float, Tensor] | None = field(default=None, init=False)  # lambda and prediction

    def advance(self, index: int, x: Tensor, clean: Tensor, noise: Tensor | None) -> Tensor:
        """See `sampler.Solver`."""
        abar, after = self.levels.abars[index], self.levels.after[index]
        here = log_snr(abar)
        h = log_snr(after) - here
        target = clean
        if self._before is not None and after < 1:
            there, before = self._before
            target = clean + (clean - before) * (0.5 * h / (here - there))
        self._before = here, clean
        kept = ((1 - after) / (1 - abar)) ** 0.5
        return kept * x - after**0.5 * math.expm1(-h) * target

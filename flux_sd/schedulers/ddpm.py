"""DDPM (Ho et al. 2020) over any levels. Mirrors candle-transformers' `ddpm.rs`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .levels import Levels


@dataclass(frozen=True)
class Ddpm:
    """A draw from the posterior of the next state (equations 6 and 7), with its own variance."""

    levels: Levels

    def advance(self, index: int, x: Tensor, clean: Tensor, noise: Tensor | None) -> Tensor:
        """See `sampler.Solver`."""
        assert noise is not None
        abar, after = self.levels.abars[index], self.levels.after[index]
        alpha = abar / after  # of this step alone
        beta = 1 - alpha
        mean = (after**0.5 * beta * clean + alpha**0.5 * (1 - after) * x) / (1 - abar)
        return mean + ((1 - after) / (1 - abar) * beta) ** 0.5 * noise

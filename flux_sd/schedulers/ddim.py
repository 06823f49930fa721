"""DDIM (Song et al. 2021), with eta 0: no noise is added. Mirrors candle-transformers' `ddim.rs`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .levels import Levels


@dataclass(frozen=True)
class Ddim:
    """The noise that the prediction implies, at the next level (equation 12 with sigma_t = 0)."""

    levels: Levels

    def advance(self, index: int, x: Tensor, clean: Tensor, noise: Tensor | None) -> Tensor:
        """See `sampler.Solver`."""
        abar, after = self.levels.abars[index], self.levels.after[index]
        implied = (x - abar**0.5 * clean) / (1 - abar) ** 0.5
        return after**0.5 * clean + (1 - after) ** 0.5 * implied

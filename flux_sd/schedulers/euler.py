"""Euler's method along the probability flow (Karras et al. 2022, algorithm 1, without churn)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .levels import Levels


@dataclass(frozen=True)
class Euler:
    """A straight step in the direction of the noise; the state is clean + sigma noise."""

    levels: Levels

    def advance(self, index: int, x: Tensor, clean: Tensor, noise: Tensor | None) -> Tensor:
        """See `sampler.Solver`."""
        sigma, after = self.levels.sigmas[index : index + 2]
        # Not x plus the change: at large sigmas that is the small difference of two large numbers.
        return clean + (x - clean) * (after / sigma)

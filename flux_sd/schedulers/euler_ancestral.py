"""Euler's method with noise added back at each step (k-diffusion `sample_euler_ancestral`, eta 1).

Mirrors candle-transformers' `euler_ancestral_discrete.rs`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .levels import Levels


@dataclass(frozen=True)
class EulerAncestral:
    """A step below the next level, and noise up to it; the state is clean + sigma noise."""

    levels: Levels

    def advance(self, index: int, x: Tensor, clean: Tensor, noise: Tensor | None) -> Tensor:
        """See `sampler.Solver`."""
        assert noise is not None
        sigma, after = self.levels.sigmas[index : index + 2]
        up = (after**2 * (sigma**2 - after**2) / sigma**2) ** 0.5
        down = (after**2 - up**2) ** 0.5
        return clean + (x - clean) * (down / sigma) + up * noise

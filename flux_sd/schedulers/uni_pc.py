"""UniPC of order 2 with B(h) = exp(h) - 1 on the clean picture (Zhao et al. 2023), corrector included.

Candle's `uni_pc.rs` is not mirrored: its predictor, its corrector and its levels are not the paper's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from .levels import Levels, log_snr


@dataclass(frozen=True)
class _Past:
    """One step that was made: its lambda, its clean picture, and the state that it began from."""

    log_snr: float
    clean: Tensor
    x: Tensor


@dataclass
class UniPc:
    """Corrects the step before with what the network says now, then predicts the next. Keeps two steps."""

    levels: Levels
    _past: list[_Past] = field(default_factory=list, init=False)
    _order: int = field(default=0, init=False)  # of the step before

    def advance(self, index: int, x: Tensor, clean: Tensor, noise: Tensor | None) -> Tensor:
        """See `sampler.Solver`."""
        if self._past:
            x = self._corrected(index, clean)
        self._past = [*self._past[-1:], _Past(log_snr(self.levels.abars[index]), clean, x)]
        self._order = min(len(self._past), len(self.levels.times) - index, 2)
        return self._predicted(index)

    def _predicted(self, index: int) -> Tensor:
        """The state after step `index` (equation 9 with the coefficients of order 1 or 2)."""
        now, after = self._past[-1], self.levels.after[index]
        h = log_snr(after) - now.log_snr
        bend: Tensor | float = 0.0
        if self._order == 2:
            before = self._past[-2]
            bend = (before.clean - now.clean) * (0.5 * h / (before.log_snr - now.log_snr))
        kept = ((1 - after) / (1 - self.levels.abars[index])) ** 0.5
        return kept * now.x - after**0.5 * math.expm1(-h) * (now.clean + bend)

    def _corrected(self, index: int, clean: Tensor) -> Tensor:
        """The state before step `index` once more, from where the step before began (equation 3)."""
        begun, abar = self._past[-1], self.levels.abars[index]
        h = log_snr(abar) - begun.log_snr
        fall = math.expm1(-h)
        change = clean - begun.clean
        if self._order == 1:
            bend = 0.5 * change
        else:
            before = self._past[-2]
            ratio = (before.log_snr - begun.log_snr) / h
            first, second = _weights(ratio, h)
            bend = (before.clean - begun.clean) * (first / ratio) + second * change
        kept = ((1 - abar) / (1 - self.levels.abars[index - 1])) ** 0.5
        return kept * begun.x - abar**0.5 * fall * (begun.clean + bend)


def _weights(ratio: float, h: float) -> tuple[float, float]:
    """The solution of [[1, 1], [ratio, 1]] w = b, with b of the paper's equation 6 for B = exp(-h) - 1."""
    fall = math.expm1(-h)
    phi_2 = fall / -h - 1
    phi_3 = phi_2 / -h - 0.5
    b_1, b_2 = phi_2 / fall, 2 * phi_3 / fall
    first = (b_1 - b_2) / (1 - ratio)
    return first, b_1 - first

"""The noise levels that a model was trained on, and which training step each belongs to.

A noised picture is sqrt(abar) clean + sqrt(1 - abar) noise ("variance preserving"), or, divided by
sqrt(abar), clean + sigma noise with sigma = sqrt((1 - abar) / abar). Papers: Ho et al. 2020; Lin et al. 2023
(zero terminal SNR). Mirrors the constants of candle-transformers' `schedulers.rs`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Where no signal is left, this much is put in its place, as in diffusers: sigma is 4096, not infinity.
LEAST_ABAR = 2.0**-24


@dataclass(frozen=True)
class NoiseSchedule:
    """abar of every training step, float64 [T], falling."""

    alphas_cumprod: Tensor

    @classmethod
    def scaled_linear(
        cls,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        steps: int = 1000,
        zero_terminal_snr: bool = False,
    ) -> NoiseSchedule:
        """Stable Diffusion's: square roots of the betas evenly spaced. zero_terminal_snr: shifted and
        scaled so that the last step is pure noise (Lin et al. 2023, algorithm 1)."""
        roots = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64)
        abar = torch.cumprod(1 - roots**2, dim=0)
        if zero_terminal_snr:
            root = abar.sqrt()
            root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
            abar = root**2
        return cls(abar)

    @classmethod
    def linear(cls, beta_start: float, beta_end: float, steps: int = 1000) -> NoiseSchedule:
        """Betas evenly spaced (Ho et al. 2020)."""
        betas = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
        return cls(torch.cumprod(1 - betas, dim=0))

    @property
    def steps(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def sigmas(self) -> Tensor:
        """float64 [T], rising; finite also at zero terminal SNR."""
        abar = self.alphas_cumprod.clamp(min=LEAST_ABAR)
        return ((1 - abar) / abar).sqrt()

    @property
    def zero_terminal_snr(self) -> bool:
        return bool(self.alphas_cumprod[-1] < LEAST_ABAR)

    def abar(self, step: int) -> float:
        """Of one training step."""
        return float(self.alphas_cumprod[step])

    def sigma_at(self, times: Tensor) -> Tensor:
        """float64 times [N] in 0..T-1, fractions allowed -> sigmas [N], linear in log sigma (k-diffusion's
        `DiscreteSchedule.t_to_sigma`)."""
        logs = self.sigmas.log()
        low = times.floor().long()
        high = (low + 1).clamp(max=self.steps - 1)
        return torch.lerp(logs[low], logs[high], times - low).exp()

    def time_of(self, sigmas: Tensor) -> Tensor:
        """float64 sigmas [N] -> times [N] in 0..T-1, the inverse of `sigma_at`."""
        logs = self.sigmas.log()
        wanted = sigmas.log().clamp(logs[0], logs[-1])
        low = (torch.searchsorted(logs, wanted, right=True) - 1).clamp(0, self.steps - 2)
        return low + (wanted - logs[low]) / (logs[low + 1] - logs[low])

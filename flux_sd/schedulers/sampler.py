"""A sampler: noise levels, a prediction type and a solver, over one image or over some that run together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import RequestError
from .ddim import Ddim
from .ddpm import Ddpm
from .dpm_solver_multistep import DpmSolver2M
from .euler import Euler
from .euler_ancestral import EulerAncestral
from .lcm import Lcm, lcm_times
from .levels import Levels
from .noise import NoiseSchedule
from .prediction import Prediction, to_clean
from .spacing import BY_TIME, SCHEDULES, Grid, Ratio, sigmas_of, times_of
from .uni_pc import UniPc


class Solver(Protocol):
    """One step of one method. A solver with a history is used for one run only."""

    def advance(self, index: int, x: Tensor, clean: Tensor, noise: Tensor | None) -> Tensor:
        """State x [B,C,H,W] before step `index` and the clean picture predicted there -> state after it."""
        ...


WHOLE, FRACTIONS, SPARE = Grid(), Grid(rounded=False), Grid(spare=True)


@dataclass(frozen=True)
class Method:
    """What a sampler's name stands for."""

    solver: Callable[[Levels], Solver]
    grid: Grid = WHOLE
    exploding: bool = False  # the state is clean + sigma noise; else it keeps its variance
    noisy: bool = False  # draws noise at each step
    # The level after the last of the training steps chosen: the first training step's, or no noise at all.
    ends_clean: bool = True
    # Divides by the signal, or takes its logarithm: where none is left, some is put in its place.
    needs_signal: bool = False
    schedules: tuple[str, ...] = SCHEDULES


METHODS = {
    "ddim": Method(Ddim, ends_clean=False),
    "ddpm": Method(Ddpm, noisy=True),
    "euler": Method(Euler, FRACTIONS, exploding=True, needs_signal=True),
    "euler_ancestral": Method(EulerAncestral, FRACTIONS, exploding=True, noisy=True, needs_signal=True),
    "dpm++_2m": Method(DpmSolver2M, SPARE, needs_signal=True),
    "uni_pc": Method(UniPc, SPARE, needs_signal=True),
    # It was distilled on 50 training steps, spaced as trailing does, and knows no other.
    "lcm": Method(Lcm, noisy=True, schedules=("trailing",)),
}
SAMPLERS = tuple(METHODS)


class SamplerStep(NamedTuple):
    """What one step gives, float32 [B,C,H,W] each."""

    latents: Tensor
    x0: Tensor  # the clean latents that the network predicted


def check_pair(sampler: str, schedule: str) -> None:
    """Raises RequestError, naming what there is, for names that are unknown or do not go together."""
    if sampler == "pndm":
        raise RequestError("sampler pndm is not built: ddim takes the same steps, dpm++_2m is its successor")
    if sampler not in METHODS:
        raise RequestError(f"sampler {sampler!r} is unknown: choose {', '.join(SAMPLERS)}")
    if schedule not in SCHEDULES:
        raise RequestError(f"schedule {schedule!r} is unknown: choose {', '.join(SCHEDULES)}")
    taken = METHODS[sampler].schedules
    if schedule not in taken:
        raise RequestError(f"sampler {sampler} cannot use schedule {schedule}: it takes {', '.join(taken)}")


@dataclass
class Sampler:
    """One run: `step` is called for index start .. N-1 in turn, with N = len(timesteps)."""

    method: Method
    levels: Levels
    prediction: Prediction
    solver: Solver
    scales_whole: bool  # see `init_scale`

    @property
    def timesteps(self) -> Tensor:
        """float64 [N]: what the network is told at each step, in 0..T-1."""
        return torch.tensor(self.levels.times, dtype=torch.float64)

    @property
    def noise_levels(self) -> Tensor:
        """float64 [N+1]: sigma before each step, and after the last."""
        return torch.tensor(self.levels.sigmas, dtype=torch.float64)

    @property
    def needs_noise(self) -> bool:
        return self.method.noisy

    @property
    def init_scale(self) -> float:
        """What unit noise is multiplied by to begin with. For an exploding state it is sqrt(sigma^2 + 1), so
        that the network is shown unit noise (diffusers with leading; ComfyUI from the largest sigma); for
        trailing, linspace, karras and exponential it is sigma, as in diffusers and Candle."""
        if not self.method.exploding:
            return 1.0
        sigma = self.levels.sigmas[0]
        return (sigma**2 + 1) ** 0.5 if self.scales_whole else sigma

    def scale_input(self, x: Tensor, index: int) -> Tensor:
        """What the network is shown of the state x [B,C,H,W] before step `index`."""
        return x / (self.levels.sigmas[index] ** 2 + 1) ** 0.5 if self.method.exploding else x

    def add_noise(self, clean: Tensor, noise: Tensor, index: int) -> Tensor:
        """The state before step `index` that clean latents and unit noise make; after the last, `clean`."""
        if index >= len(self.levels.times):
            return clean
        if self.method.exploding:
            return clean + self.levels.sigmas[index] * noise
        abar = self.levels.abars[index]
        return abar**0.5 * clean + (1 - abar) ** 0.5 * noise

    def step(self, output: Tensor, index: int, x: Tensor, noise: Tensor | None = None) -> SamplerStep:
        """The network's output for `scale_input(x)` and the state x before step `index` -> the state after.

        Raises ValueError where the sampler needs noise and is given none.
        """
        if self.method.noisy and noise is None:
            raise ValueError("this sampler draws noise at each step: pass it")
        seen, abar = self.scale_input(x.float(), index), self.levels.abars[index]
        clean = to_clean(self.prediction, output.float(), seen, abar)
        return SamplerStep(self.solver.advance(index, x.float(), clean, noise), clean)


def make_sampler(
    name: str,
    noise: NoiseSchedule,
    schedule: str,
    steps: int,
    prediction: Prediction,
    *,
    ratio: Ratio = "exact",
) -> Sampler:
    """A fresh sampler. ratio: see `spacing.Grid`. Raises RequestError for a pair that does not go together,
    for more steps than there are training steps or than the pair can tell apart, and for epsilon where a
    level has no signal."""
    check_pair(name, schedule)
    if not 1 <= steps <= noise.steps:
        raise RequestError(f"steps {steps} is outside 1..{noise.steps}")
    if noise.zero_terminal_snr and prediction == "epsilon":
        raise RequestError("zero terminal SNR leaves no epsilon to predict: choose v_prediction or sample")
    method = METHODS[name]
    levels = _levels(name, method, noise, schedule, steps, ratio)
    if method.grid.spare and len(set(levels.abars)) < len(levels.abars):  # they divide by the distance
        raise RequestError(
            f"{steps} steps of {schedule} repeat a level, which {name} cannot use: ask for fewer"
        )
    whole = schedule not in ("trailing", "linspace", "karras", "exponential")
    return Sampler(method, levels, prediction, method.solver(levels), whole)


def _levels(
    name: str, method: Method, noise: NoiseSchedule, schedule: str, steps: int, ratio: Ratio
) -> Levels:
    """The levels of one run."""
    if schedule not in BY_TIME:
        return Levels.of_sigmas(noise, sigmas_of(schedule, noise, steps))
    if name == "lcm":
        return Levels.of_times(noise, lcm_times(noise.steps, steps))
    grid = Grid(method.grid.spare, method.grid.rounded, ratio)
    times = times_of(schedule, noise, steps, grid)
    levels = Levels.of_times(noise, times, None if method.ends_clean else noise.steps // steps)
    return levels.with_signal() if method.needs_signal else levels

"""Writes what diffusers' schedulers make of made-up predictions to reference_outputs/oracle/.

    oracle/bin/python tools/make_scheduler_references.py    # the environment of make_oracle_references.py

A run's model is procedural: half of what it is shown and half of a fixed tensor of its own for each step. For
every pair of sampler and schedule: timesteps, noise levels, the scale of the first noise, and the states.

diffusers computes in float64 here: inside its modules the name float32 stands for float64
(`double_precision`), so that what is stored is what its code says and not how float32 rounds it.

Schedules that diffusers lacks (simple, sgm_uniform, ddim_uniform), or that it lacks for a sampler, are their
formula, written here once more in numpy, and given to diffusers' sampler as its levels. DDIM and DDPM have no
levels to be given. On states divided by sqrt(abar) they are Euler's method (Song et al. 2021, section 4.3)
and its ancestral form (whose mean and variance are those of DDPM's posterior): diffusers' stand for them
there. Imports nothing of flux_sd.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from procedural import values
from safetensors.torch import save_file
from torch import Tensor

OUT = Path(__file__).resolve().parent.parent / "reference_outputs" / "oracle"
SHAPE = (1, 4, 4, 4)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
EXACT = {"clip_sample": False}
CLASSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (diffusers.DDIMScheduler, {**EXACT, "set_alpha_to_one": False}),
    "ddpm": (diffusers.DDPMScheduler, EXACT),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "dpm++_2m": (diffusers.DPMSolverMultistepScheduler, {}),
    "uni_pc": (diffusers.UniPCMultistepScheduler, {}),
    "lcm": (diffusers.LCMScheduler, EXACT),
}
BY_TIME = ("leading", "trailing", "linspace")
BY_FORMULA = ("simple", "sgm_uniform", "ddim_uniform", "karras", "exponential")
SAME_METHOD = {"ddim": "euler", "ddpm": "euler_ancestral"}  # on states divided by sqrt(abar)
# diffusers spaces these between the largest and the least sigma, from linspace's end points.
BY_FLAG = {"karras": "use_karras_sigmas", "exponential": "use_exponential_sigmas"}


@dataclass(frozen=True)
class Case:
    """One run."""

    sampler: str
    schedule: str
    steps: int
    prediction: str = "epsilon"
    zero_snr: bool = False
    states: bool = True  # whether it is run, or its levels only
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        ending = "_zero_snr" if self.zero_snr else ""
        return f"{self.sampler}.{self.schedule}.{self.steps}.{self.prediction}{ending}"

    @property
    def is_given(self) -> bool:
        """Whether the levels are ours to give."""
        own = self.schedule in BY_FLAG and self.sampler in ("euler", "dpm++_2m", "uni_pc")
        return self.schedule in BY_FORMULA and not own

    @property
    def is_rescaled(self) -> bool:
        """Whether another method stands for this one."""
        return self.is_given and self.sampler in SAME_METHOD

    def scheduler(self) -> Any:
        kind, own = CLASSES[SAME_METHOD[self.sampler] if self.is_rescaled else self.sampler]
        config = {**BETAS, **own, "prediction_type": self.prediction, **self.config}
        config["timestep_spacing"] = self.schedule if self.schedule in BY_TIME else "linspace"
        if self.schedule in BY_FLAG and not self.is_given:
            config[BY_FLAG[self.schedule]] = True
        if self.zero_snr:
            config["rescale_betas_zero_snr"] = True
        made = kind(**config)
        made.set_timesteps(self.steps)
        if self.is_given:
            sigmas = formula(self.schedule, self.steps)
            made.set_timesteps(len(sigmas))
            made.sigmas = torch.tensor([*sigmas, 0.0], dtype=torch.float64)
            made.timesteps = torch.from_numpy(
                np.interp(np.log(sigmas), np.log(training_sigmas()), np.arange(1000))
            )
        return made


def training_sigmas() -> np.ndarray:
    """sqrt((1 - abar) / abar) of the 1000 training steps, float64."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    abar = np.cumprod(1 - betas)
    return ((1 - abar) / abar) ** 0.5


def formula(schedule: str, steps: int) -> list[float]:
    """ComfyUI's definitions (comfy/samplers.py, read for the formulas); karras and exponential as published
    (Karras et al. 2022, equation 5, with rho 7; even steps in log sigma)."""
    sigmas = training_sigmas()
    if schedule == "simple":
        return [float(sigmas[-(1 + int(i * len(sigmas) / steps))]) for i in range(steps)]
    if schedule == "ddim_uniform":
        stride, found, at = max(len(sigmas) // steps, 1), [], 1
        while at < len(sigmas):
            found.append(float(sigmas[at]))
            at += stride
        return found[::-1]
    if schedule == "karras":
        return list(np.linspace(sigmas[-1] ** (1 / 7), sigmas[0] ** (1 / 7), steps) ** 7)
    if schedule == "exponential":
        return list(np.exp(np.linspace(np.log(sigmas[-1]), np.log(sigmas[0]), steps)))
    times = np.linspace(999, 0, steps + 1)[:-1]
    return [float(np.exp(np.interp(t, np.arange(1000), np.log(sigmas)))) for t in times]


def cases() -> list[Case]:
    found = [Case("lcm", "trailing", n) for n in (1, 4, 8)]
    for sampler in (name for name in CLASSES if name != "lcm"):
        for schedule in BY_TIME:
            found += [Case(sampler, schedule, n, states=False) for n in (1, 2, 3, 30)]
            found += [Case(sampler, schedule, 7), Case(sampler, schedule, 10, "v_prediction")]
        found.append(Case(sampler, "trailing", 10, "v_prediction", zero_snr=True))
        if sampler != "euler_ancestral":  # diffusers' takes no sample predictions
            found.append(Case(sampler, "leading", 5, "sample"))
        found += [Case(sampler, schedule, 8) for schedule in BY_FORMULA]
        found += [Case(sampler, schedule, 30, states=False) for schedule in BY_FORMULA]
    # diffusers makes a difference from 15 steps on, which there is none of where a run ends without noise.
    found += [
        Case("dpm++_2m", schedule, n) for schedule, n in (("leading", 20), ("karras", 14), ("karras", 15))
    ]
    return found


def noise(index: int) -> Tensor:
    """Unit noise of one step."""
    return values(f"oracle.noise_{index}", SHAPE)


def run(case: Case) -> dict[str, Tensor]:
    scheduler = case.scheduler()
    found = {"timesteps": scheduler.timesteps.double()}
    if hasattr(scheduler, "sigmas"):
        found["sigmas"] = scheduler.sigmas.double()
    if not case.is_rescaled:  # what begins a run is no matter of its levels
        found["init_scale"] = torch.tensor([float(scheduler.init_noise_sigma)], dtype=torch.float64)
    if not case.states:
        return found
    # What the states are divided by, to be those of the sampler that is asked for.
    scale = (found["sigmas"] ** 2 + 1).sqrt() if case.is_rescaled else torch.ones(len(found["timesteps"]) + 1)
    x = values("oracle.start", SHAPE).double()
    x = x * (scale[0] if case.is_rescaled else float(scheduler.init_noise_sigma))
    states = [x / scale[0]]
    for index, t in enumerate(scheduler.timesteps):
        output = (
            0.5 * scheduler.scale_model_input(x, t) + 0.5 * values(f"oracle.output_{index}", SHAPE).double()
        )
        with fixed_noise(type(scheduler).__module__, noise(index)):
            x = scheduler.step(output, t, x).prev_sample
        states.append(x / scale[index + 1])
    assert all(state.dtype == torch.float64 for state in states)
    return {**found, "states": torch.cat(states).float()}


@contextmanager
def fixed_noise(module: str, tensor: Tensor) -> Iterator[None]:
    """While open, a module of diffusers' schedulers draws this tensor as noise."""
    found = sys.modules[module]
    before = getattr(found, "randn_tensor", None)
    if before is None:
        yield
        return
    found.randn_tensor = lambda *_, **__: tensor.double()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        found.randn_tensor = before  # type: ignore[attr-defined]


class _Wide:
    """A library in which the name float32 stands for float64."""

    def __init__(self, library: Any) -> None:
        self.library = library

    def __getattr__(self, name: str) -> Any:
        return getattr(self.library, "float64" if name == "float32" else name)


def double_precision() -> None:
    """Has the schedulers of diffusers compute in float64."""
    for kind, _ in CLASSES.values():
        module: Any = sys.modules[kind.__module__]
        module.torch, module.np = _Wide(torch), _Wide(np)


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    double_precision()
    tensors = {f"{case.name}.{key}": value for case in cases() for key, value in run(case).items()}
    metadata = {
        "what": "timesteps, levels and states of diffusers' schedulers over made-up predictions, in float64",
        "command": "python tools/make_scheduler_references.py",
        "versions": json.dumps({name: version(name) for name in ("torch", "diffusers", "numpy")}),
    }
    save_file({k: v.contiguous() for k, v in tensors.items()}, OUT / "schedulers.safetensors", metadata)
    print(f"{len(cases())} cases, {len(tensors)} tensors")


if __name__ == "__main__":
    main()

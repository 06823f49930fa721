"""Measures how far Candle's UniPC is from diffusers' on the same noise levels, from its stored trajectories.

    python tools/measure_unipc.py          # needs diffusers, an oracle; prints one JSON object

Candle takes its noise levels from a Karras or an exponential schedule of its own and ignores the betas. Here
diffusers' scheduler is given exactly those levels, the same first sample and the same model, so that what is
left is the solver. Both run bh1 of order 2, without the corrector on the first three steps, Candle's default.
The first step is of order one and has neither fault: that it agrees shows that the two are set up alike.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import UniPCMultistepScheduler
from procedural import values
from safetensors.torch import load_file
from torch import Tensor

STORED = Path(__file__).resolve().parent.parent / "reference_outputs" / "candle" / "schedulers.safetensors"
TRAINED = 1000  # timesteps


def karras(t: float) -> float:
    """Candle's default: 10 to 0.1, rho 4; t from 1 (noise) to 0."""
    low, high = 0.1**0.25, 10.0**0.25
    return (high + (1.0 - t) * (low - high)) ** 4


def exponential(t: float) -> float:
    """80 to 0.1."""
    return math.exp(t * (math.log(80.0) - math.log(0.1)) + math.log(0.1))


def published(timesteps: list[int], level: Callable[[float], float], first: Tensor) -> list[Tensor]:
    """Samples from `first` on, one for each step, by diffusers' solver on Candle's noise levels."""
    scheduler = UniPCMultistepScheduler(
        solver_order=2, solver_type="bh1", disable_corrector=[0, 1], lower_order_final=True
    )
    scheduler.set_timesteps(len(timesteps))
    scheduler.timesteps = torch.tensor(timesteps)
    # Candle looks a level up at (timestep + 1) / 1000, and past the last step at timestep 0.
    scheduler.sigmas = torch.tensor([level((t + 1) / TRAINED) for t in [*timesteps, 0]], dtype=torch.float64)
    samples = [first]
    for index, t in enumerate(timesteps):
        scheduler._step_index = index  # the levels of a timestep that occurs twice are the same
        x = samples[-1]
        noise = 0.5 * x + 0.5 * values(f"input.sched_eps_{index}", (1, 4, 4, 4))
        samples.append(scheduler.step(noise, t, x).prev_sample)
    return samples


def differences() -> dict[str, dict[str, float]]:
    """By case: relative difference of the first step, and the largest on the way."""
    stored = load_file(STORED)
    found = {}
    for name, level in (("karras", karras), ("exponential", exponential)):
        for steps in (5, 10):
            case = f"unipc_{name}_{steps}"
            theirs = stored[f"{case}.trajectory"].split(1)
            timesteps = [int(t) for t in stored[f"{case}.timesteps"].tolist()]
            ours = published(timesteps, level, theirs[0])
            apart = [
                ((a.double() - b.double()).norm() / a.double().norm()).item()
                for a, b in zip(ours, theirs, strict=True)
            ]
            found[case] = {"first_step": apart[1], "largest": max(apart)}
    return found


if __name__ == "__main__":
    print(json.dumps(differences()))

"""What both training stages share: the Muon optimiser, averaged weights, time budget, saved state."""

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def orthogonalised(update: Tensor, steps: int = 5) -> Tensor:
    """[R,C] -> [R,C] with all singular values near 1, by Muon's Newton-Schulz iteration (K. Jordan)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = update.shape[0] > update.shape[1]
    x = (update.T if tall else update) / (update.norm() + 1e-7)
    x = x.bfloat16() if min(x.shape) >= 256 else x  # the small ones gain nothing
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).float()


class Muon:
    """Nesterov momentum whose update is orthogonalised per matrix; convolutions are [out, in * kh * kw]."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], momentum: float = 0.95, decay: float = 0.0
    ) -> None:
        self.parameters = list(parameters)
        self.buffers = [torch.zeros_like(p) for p in self.parameters]
        self.momentum = momentum
        self.decay = decay

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update; `rate` is comparable with AdamW's."""
        for parameter, buffer in zip(self.parameters, self.buffers, strict=True):
            if parameter.grad is None:
                continue
            buffer.lerp_(parameter.grad, 1 - self.momentum)
            update = parameter.grad.lerp(buffer, self.momentum).flatten(1)
            update = orthogonalised(update) * (0.2 * max(update.shape) ** 0.5)
            parameter.mul_(1 - rate * self.decay).sub_(update.view(parameter.shape), alpha=rate)


@dataclass
class Trainer:
    """A model, its two optimisers, the average of its weights and the clock; saved and restored as one."""

    model: nn.Module
    rate: float
    minutes: float
    average: float = 0.998
    by_adam: tuple[str, ...] = ()
    decay: float = 0.0
    step: int = 0
    seconds: float = 0.0
    clock: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        named = dict(self.model.named_parameters())
        matrices = {
            n for n, p in named.items() if p.ndim >= 2 and not any(part in n for part in self.by_adam)
        }
        self.muon = Muon((named[n] for n in named if n in matrices), decay=self.decay)
        rest = [named[n] for n in named if n not in matrices]
        self.adam = torch.optim.AdamW(rest, lr=self.rate, betas=(0.9, 0.95), weight_decay=0.0, foreach=True)
        self.ema = {n: p.detach().clone() for n, p in named.items()}

    @property
    def progress(self) -> float:
        """Share of the time budget that is spent, 0..1."""
        return min(1.0, self.seconds / (60 * self.minutes))

    def update(self, loss: Tensor, clip: float = 1.0) -> None:
        """Backward, clip, both optimisers, average, clock. The rate is flat for a third, then falls to 0."""
        for parameter in self.model.parameters():
            parameter.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        rate = self.rate * min(1.0, (self.step + 1) / 100) * min(1.0, (1.0 - self.progress) / 0.67)
        self.muon.step(rate)
        self.adam.param_groups[0]["lr"] = rate
        self.adam.step()
        weight = 1 - min(self.average, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                self.ema[name].lerp_(parameter, weight)
        self.step += 1
        now = time.monotonic()
        self.seconds += now - self.clock
        self.clock = now

    def restart_clock(self) -> None:
        """Leave out the time since the last update (evaluation, saving)."""
        self.clock = time.monotonic()

    def save(self, path: Path) -> None:
        """Everything that a later run on any machine needs, atomically."""
        state: dict[str, Any] = {
            "model": self.model.state_dict(), "ema": self.ema, "muon": self.muon.buffers,
            "adam": self.adam.state_dict(), "step": self.step, "seconds": self.seconds,
        }  # fmt: skip
        partial = path.with_suffix(".part")
        torch.save(state, partial)
        os.replace(partial, path)

    def restore(self, path: Path) -> None:
        """Continue where `save` stopped; nothing where there is no file."""
        if not path.is_file():
            return
        state = torch.load(path, weights_only=True, map_location="cpu")
        self.model.load_state_dict(state["model"])
        for mine, stored in zip(self.muon.buffers, state["muon"], strict=True):
            mine.copy_(stored)
        for name, stored in state["ema"].items():
            self.ema[name].copy_(stored)
        self.adam.load_state_dict(state["adam"])
        self.step, self.seconds = state["step"], state["seconds"]

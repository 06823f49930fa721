"""The forward passes of the FLUX cases: configs, inputs and weights, as tools/candle_reference has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from procedural import values
from torch import nn

from flux_sd.flux_mmdit import FluxConfig
from flux_sd.sampling import State


def small(name: str) -> float:
    """The factors of flux_tiny_dev_2_2_small: what enters a norm becomes small enough to show its epsilon."""
    if name.startswith(("img_in.", "txt_in.")) or "_attn.qkv." in name:
        return 0.03
    return 30.0 if "_attn.proj.weight" in name else 1.0


@dataclass(frozen=True)
class Run:
    """One forward pass of a case."""

    config: FluxConfig
    height: int = 64  # pixels
    width: int = 96
    text: int = 12  # tokens
    dtype: torch.dtype = torch.float32
    scale: Callable[[str], float] = lambda name: 1.0


def runs() -> dict[str, Run]:
    """By case."""
    found = {
        f"flux_tiny_{variant}_{depth}_{single}": Run(FluxConfig.tiny(depth, single, variant == "dev"))
        for depth, single in ((0, 0), (1, 0), (2, 0), (2, 1), (2, 2))
        for variant in ("schnell", "dev")
    }
    dev = found["flux_tiny_dev_2_2"]
    return found | {
        "flux_tiny_dev_2_2_small": replace(dev, scale=small),
        "flux_tiny_dev_2_2_wide": replace(dev, height=32, width=2048),
        "flux_tiny_dev_2_2_bf16": replace(dev, dtype=torch.bfloat16),
        "flux_tiny_dev_2_2_wide_bf16": replace(dev, height=32, width=2048, dtype=torch.bfloat16),
        "flux_full_width_1_1": Run(
            replace(FluxConfig.dev(), depth=1, depth_single_blocks=1), height=128, width=64, text=16
        ),
    }


def inputs(run: Run) -> State:
    """Procedural latents and text of one image."""
    return State.new(
        values("input.t5", (1, run.text, run.config.context_in_dim)).to(run.dtype),
        values("input.clip", (1, run.config.vec_in_dim)).to(run.dtype),
        values("input.latent", (1, 16, run.height // 8, run.width // 8)).to(run.dtype),
    )


def velocity(model: nn.Module, run: Run) -> torch.Tensor:
    """[1, S, 64] float32, at time 0.75 and, for dev, guidance 3.5."""
    state = inputs(run)
    guidance = torch.tensor([3.5]) if run.config.guidance_embed else None
    time = torch.tensor([0.75])
    out: torch.Tensor = model(state.img, state.img_ids, state.txt, state.txt_ids, time, state.vec, guidance)
    return out.float()

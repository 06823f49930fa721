"""FLUX sampling: noise, packing, schedules, the denoising loop. Floor 2.

Mirrors candle-transformers 0.11.1 `models/flux/sampling.rs` and black-forest-labs/flux `sampling.py`
(Apache-2.0). Rectified flow: x_t = (1 - t) image + t noise; the transformer predicts noise - image.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

SHIFT_AT_256, SHIFT_AT_4096 = 0.5, 1.15  # of the log signal-to-noise ratio, at these numbers of image tokens


def get_noise(seed: int, height: int, width: int, channels: int = 16) -> Tensor:
    """Noise of one image: [1, channels, 2 ceil(height/16), 2 ceil(width/16)] float32 on the CPU, sizes in
    pixels.

    Always drawn there and so: the same noise on every device, in every dtype, in every batch.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    rows, columns = 2 * math.ceil(height / 16), 2 * math.ceil(width / 16)
    return torch.randn((1, channels, rows, columns), generator=generator, dtype=torch.float32)


@dataclass(frozen=True)
class State:
    """Everything the transformer reads, besides the time."""

    img: Tensor  # [B, S, 64] packed latents, S = H/16 * W/16
    img_ids: Tensor  # [B, S, 3] float32: 0, row, column
    txt: Tensor  # [B, L, T5 width]
    txt_ids: Tensor  # [B, L, 3] zeros
    vec: Tensor  # [B, CLIP width]
    # What editing models read besides: see flux_editing.py.
    channels: Tensor | None = None  # [B, S, 64 or 320] more channels of each image token
    more: Tensor | None = None  # [B, R, 64] tokens behind those of the image
    more_ids: Tensor | None = None  # [B, R, 3] float32

    @classmethod
    def new(cls, txt: Tensor, vec: Tensor, latents: Tensor) -> State:
        """txt [1 or B, L, C], vec [1 or B, C], latents [B, 16, H/8, W/8] -> State of batch B."""
        batch, img = latents.shape[0], pack(latents)
        img_ids = positions(latents).expand(batch, -1, -1)  # [B,S,3]
        txt = txt.expand(batch, -1, -1)
        vec = vec.expand(batch, -1)
        return cls(img, img_ids, txt, torch.zeros(batch, txt.shape[1], 3, device=img.device), vec)

    def seen(self, img: Tensor) -> Tensor:
        """Latents img [B,S,64] of some step -> what the transformer reads as its first argument, in img's
        dtype: [B,S+R,64], with `channels` more of them in the last place."""
        if self.channels is not None:
            img = torch.cat([img, self.channels.to(img.dtype)], dim=2)
        return img if self.more is None else torch.cat([img, self.more.to(img.dtype)], dim=1)

    def seen_ids(self) -> Tensor:
        """The positions of what `seen` returns."""
        return self.img_ids if self.more_ids is None else torch.cat([self.img_ids, self.more_ids], dim=1)


def positions(latents: Tensor, index: int = 0) -> Tensor:
    """latents [B,C,2h,2w] -> ids [1,h*w,3] float32 on their device: index (what is painted has 0), row and
    column."""
    rows, columns = latents.shape[2] // 2, latents.shape[3] // 2
    ids = torch.full((rows, columns, 3), float(index))
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)[None, :]
    return ids.reshape(1, -1, 3).to(latents.device)


def pack(latents: Tensor) -> Tensor:
    """[B, C, 2h, 2w] -> [B, h*w, C*4]: a token is a 2x2 patch, its channels in the order (c, row, column)."""
    batch, channels, rows, columns = latents.shape
    patches = latents.reshape(batch, channels, rows // 2, 2, columns // 2, 2)  # [B,C,h,2,w,2]
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns // 4, channels * 4)


def unpack(img: Tensor, height: int, width: int) -> Tensor:
    """[B, h*w, C*4] -> [B, C, 2h, 2w] with h = ceil(height/16), w = ceil(width/16); sizes in pixels."""
    batch, _, channels = img.shape
    h, w = math.ceil(height / 16), math.ceil(width / 16)
    patches = img.reshape(batch, h, w, channels // 4, 2, 2)  # [B,h,w,C,2,2]
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // 4, 2 * h, 2 * w)


def get_schedule(steps: int, image_tokens: int | None = None) -> list[float]:
    """steps + 1 times from 1 to 0, in Python's float64.

    image_tokens None: evenly spaced (schnell). Else shifted towards noise, the more the more tokens (dev):
    t' = e^mu / (e^mu + 1/t - 1), mu linear in the number of tokens.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    times = [1.0 - i / steps for i in range(steps)] + [0.0]
    if image_tokens is None:
        return times
    slope = (SHIFT_AT_4096 - SHIFT_AT_256) / (4096 - 256)
    mu = slope * image_tokens + (SHIFT_AT_256 - slope * 256)
    return [shift_time(mu, t) for t in times]


def shift_time(mu: float, t: float) -> float:
    """t in [0, 1] -> [0, 1]. The end stays 0: 1/t would divide by zero there."""
    return 0.0 if t == 0.0 else math.exp(mu) / (math.exp(mu) + (1.0 / t - 1.0))


def begin_at(times: Sequence[float], start: float) -> list[float]:
    """The rest of a schedule from time `start` on: `start` itself, then every time below it.

    The first step is a part of one, so that any start in 0..1 is met, and not the nearest step. A step of
    less than a millionth is left out. 0 leaves no step, 1 all.
    """
    return [start, *(t for t in times if t < start - 1e-6)] if start < times[0] else list(times)


@dataclass(frozen=True)
class FlowStep:
    """One Euler step, still packed."""

    index: int
    sigma: float  # time after the step
    velocity: Tensor  # [B, S, 64]
    img: Tensor  # [B, S, 64] after the step
    x0: Tensor  # [B, S, 64] the clean image predicted by this step


@torch.inference_mode()
def denoise(
    model: nn.Module,
    state: State,
    times: Sequence[float],
    guidance: float | None,
    latents_dtype: Literal["float32", "model"] = "float32",
    keep: Callable[[Tensor, float], Tensor] | None = None,
) -> Iterator[FlowStep]:
    """Euler's method along `times` (from get_schedule). Yields after each step; stop iterating to stop.

    guidance None: the model has no guidance embedding. The transformer runs in the dtype of state.txt. The
    latents are carried in float32, or with latents_dtype "model" in that dtype too, which rounds each step's
    size and each sum to it, as Candle does; what is yielded is float32 either way.

    keep: what becomes of the latents [B, S, 64] after each step, given them and the time then.
    """
    dtype = state.txt.dtype
    carried = dtype if latents_dtype == "model" else torch.float32
    img = state.img.to(carried)
    ones = torch.ones(img.shape[0], dtype=torch.float32, device=img.device)  # [B]
    scale = None if guidance is None else ones * guidance
    for index, (now, after) in enumerate(itertools.pairwise(times)):
        t = ones * now
        seen = state.seen(img.to(dtype))
        velocity = model(seen, state.seen_ids(), state.txt, state.txt_ids, t, state.vec, scale)
        velocity = velocity[:, : img.shape[1]]  # of `more` nothing is predicted
        x0 = img.float() - velocity.float() * now
        step = torch.tensor(after - now, dtype=carried, device=img.device)
        img = img + velocity.to(carried) * step
        if keep is not None:
            img = keep(img, after).to(carried)
        yield FlowStep(index, after, velocity.float(), img.float(), x0)

"""FLUX that begins from a picture, repaints a part of one, follows lines or depths, or refers to one.

Floor 6. The order of channels and tokens is that of black-forest-labs/flux `sampling.py` (prepare_fill,
prepare_control, prepare_kontext) and of diffusers' pipelines. What the transformer reads at each step, by its
input channels:

    64   the noisy latents; of Kontext the reference's tokens follow, their ids with first coordinate 1
    128  noisy 64, control picture 64                               (Canny, Depth)
    384  noisy 64, picture with grey under the mask 64, mask 256    (Fill)

A mask is 1 where it is to be repainted. Fill reads it in full resolution: the 8x8 pixels of a latent become
64 channels, and a token, 2x2 latents, has 256. To a transformer that reads no mask, what is to be kept is
given back after each step: the picture, noised to the level then by the noise that the run began with.

Strength is the time that the run starts at, its share of noise: x = (1 - strength) picture + strength noise.
The step it falls into is run in part (`sampling.begin_at`), so that each value does something of its own,
however few the steps and however the schedule is shifted. 0 runs none: the picture goes through the
autoencoder and back. 1 runs all from noise alone, as without a picture. (diffusers counts steps instead: with
4 of them, 0.5 to 0.74 are the same there.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import image
from .canvas import Canvas
from .sampling import pack, positions
from .versions import VersionInfo

REFERENCE_INDEX = 1  # first coordinate of a reference's ids; what is painted has 0


class Edit(NamedTuple):
    """The request's pictures as the loop reads them: packed, float32, on the device."""

    start: Tensor | None = None  # [1,S,64] the picture to begin from
    mask: Tensor | None = None  # [1,S,64] 1: repaint; None for a transformer that reads the mask itself
    channels: Tensor | None = None  # [1,S,64 or 320]
    more: Tensor | None = None  # [1,R,64]
    more_ids: Tensor | None = None  # [1,R,3]

    def begin(self, noise: Tensor, time: float) -> Tensor:
        """noise [B,S,64] packed -> the latents at `time`. At 1 nothing of the picture is in them."""
        return noise if self.start is None else (1 - time) * self.start + time * noise

    def keep(self, latents: Tensor, time: float, noise: Tensor) -> Tensor:
        """Latents [B,S,64] after a step to `time` -> the same with what the mask keeps given back."""
        if self.mask is None or self.start is None:
            return latents
        kept = (1 - time) * self.start + time * noise
        return (1 - self.mask) * kept + self.mask * latents


def to_encode(info: VersionInfo, canvas: Canvas, strength: float | None) -> dict[str, Tensor]:
    """What the autoencoder is to make latents of: pictures [1,3,H,W] in -1..1, by the name that the latents
    are recorded as."""
    wanted: dict[str, Tensor] = {}
    if canvas.picture is not None:
        pixels = image.to_unit(canvas.picture)[None]
        blends = canvas.mask is not None and not info.is_inpainting
        if blends or (strength is not None and strength < 1.0):
            wanted["init.latents"] = pixels
        if canvas.mask is not None and info.is_inpainting:
            wanted["masked.latents"] = pixels * (1 - canvas.mask)  # 0 is grey
    if canvas.control is not None:
        wanted["control.latents"] = image.to_unit(canvas.control)[None]
    if canvas.reference is not None:
        wanted["reference.latents"] = image.to_unit(canvas.reference)[None]
    return wanted


def arrange(info: VersionInfo, canvas: Canvas, latents: Mapping[str, Tensor], cell: int) -> Edit:
    """latents: those of `to_encode`, [1,16,H/8,W/8]; cell: pixels that one of them spans, along a side ->
    what the loop reads."""
    packed = {name: pack(each) for name, each in latents.items()}
    mask, blend, channels, more_ids = canvas.mask, None, packed.get("control.latents"), None
    if mask is not None and info.is_inpainting:
        masked = packed["masked.latents"]
        channels = torch.cat([masked, pack(mask_channels(mask, cell)).to(masked.device)], dim=2)  # [1,S,320]
    elif mask is not None:
        init = latents["init.latents"]
        small = F.interpolate(mask[None], size=init.shape[2:], mode="nearest")  # [1,1,H/8,W/8]
        blend = pack(small.expand(-1, init.shape[1], -1, -1)).to(init.device)
    if "reference.latents" in latents:
        more_ids = positions(latents["reference.latents"], REFERENCE_INDEX)
    return Edit(packed.get("init.latents"), blend, channels, packed.get("reference.latents"), more_ids)


def mask_channels(mask: Tensor, cell: int) -> Tensor:
    """mask [1,H,W] -> [1,cell*cell,H/cell,W/cell]: the pixels of each cell, row by row."""
    return F.pixel_unshuffle(mask[None], cell)

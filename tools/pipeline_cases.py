"""The runs that tools/make_pipeline_references.py makes with diffusers, tests/test_sd_pipelines.py with ours.

Sizes of the networks, settings and inputs, in words that belong to neither. Imports nothing of flux_sd.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image
from procedural import bits, values
from torch import Tensor

WIDTH, HEIGHT = 40, 24  # latents of 5 x 3, which do not halve evenly
PROMPT = "a red kite over the sea"


@dataclass(frozen=True)
class Case:
    """One run. None: not given."""

    model: str  # a key of our version table; the networks are small ones of its kind
    sampler: str
    schedule: str
    steps: int
    guidance: float | None
    negative: str | None = None
    rescale: float | None = None
    strength: float | None = None  # None: no picture to begin from
    masked: bool = False


CASES = {
    "sd15": Case("sd15", "ddim", "leading", 4, 7.5, "rain", 0.7),
    "sd15_unguided": Case("sd15", "euler", "leading", 3, 1.0),
    "sd15_img2img": Case("sd15", "euler", "leading", 5, 3.0, "rain", strength=0.6),
    "sd15_img2img_noisy": Case("sd15", "euler_ancestral", "trailing", 4, 3.0, strength=0.5),
    "sd15_blended": Case("sd15", "ddim", "leading", 4, 3.0, strength=1.0, masked=True),
    "sd15_blended_half": Case("sd15", "euler", "leading", 5, 3.0, strength=0.6, masked=True),
    "sd15_inpaint": Case("sd15-inpaint", "ddim", "leading", 3, 5.0, "rain", strength=1.0, masked=True),
    "sd21": Case("sd21", "ddim", "leading", 4, 5.0, "rain"),
    "sd2_inpaint": Case("sd2-inpaint", "ddim", "leading", 4, 5.0, strength=0.75, masked=True),
    "sdxl": Case("sdxl", "euler", "leading", 3, 5.0),
    "sdxl_empty": Case("sdxl", "euler", "leading", 3, 5.0, ""),
    "sdxl_img2img": Case("sdxl", "euler", "leading", 5, 4.0, "rain", strength=0.5),
    "sdxl_turbo": Case("sdxl-turbo", "euler_ancestral", "trailing", 2, None),
    "sdxl_inpaint": Case("sdxl-inpaint", "euler", "leading", 4, 4.0, strength=0.75, masked=True),
}


def noise(number: int) -> Tensor:
    """What a run draws at its `number`th call, [1,4,H/8,W/8]."""
    return values(f"pipeline.noise.{number}", (1, 4, HEIGHT // 8, WIDTH // 8))


def picture() -> Image.Image:
    """Any bytes."""
    drawn = np.concatenate(list(bits("pipeline.picture", WIDTH * HEIGHT * 3)))
    return Image.fromarray((drawn % np.uint64(256)).astype(np.uint8).reshape(HEIGHT, WIDTH, 3))


def mask() -> Image.Image:
    """White on a part that is not symmetric in any direction; one edge is no multiple of 8."""
    made = Image.new("L", (WIDTH, HEIGHT))
    made.paste(255, (8, 0, 35, 20))
    return made

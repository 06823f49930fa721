"""FLUX with pictures: the runs that tools/make_flux_editing_references.py makes with diffusers and
tests/test_flux_editing.py with ours.

Sizes of the networks, settings and inputs, in words that belong to neither. Imports nothing of flux_sd.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image
from procedural import bits, values
from torch import Tensor

WIDTH, HEIGHT, TEXT, WIDE = 64, 48, 8, 64  # pixels; tokens of text, and the width of T5's and CLIP's states


@dataclass(frozen=True)
class Case:
    """One run. None: not given."""

    model: str  # a key of our version table; the transformer is a small one of its kind
    steps: int
    guidance: float | None = None
    strength: float | None = None  # as diffusers counts it, in steps; None: no picture to begin from
    masked: bool = False
    control: bool = False
    reference: bool = False


# The authors' guidance of Fill and Canny is 30. It enters as sinusoids of 1000 times that, where an ulp of
# diffusers' float32 frequencies moves the last latents by 3.8e-5; at 4 they show what the pipelines do.
CASES = {
    "img2img": Case("flux-dev", 4, 3.5, strength=0.5),
    "img2img_unshifted": Case("flux-schnell", 4, strength=0.75),
    "blended": Case("flux-dev", 3, 3.5, strength=1.0, masked=True),
    "blended_half": Case("flux-dev", 4, 3.5, strength=0.5, masked=True),
    "fill": Case("flux-fill", 3, 4.0, strength=1.0, masked=True),
    "fill_half": Case("flux-fill", 4, 4.0, strength=0.5, masked=True),
    "control": Case("flux-canny", 3, 4.0, control=True),
    "control_img2img": Case("flux-depth", 4, 4.0, strength=0.75, control=True),
    "kontext": Case("flux-kontext", 3, 2.5, reference=True),
    "kontext_alone": Case("flux-kontext", 2, 2.5),
}


def in_channels(case: Case) -> int:
    """What the transformer reads of each token."""
    return {"flux-fill": 384, "flux-canny": 128, "flux-depth": 128}.get(case.model, 64)


def noise() -> Tensor:
    """What a run begins from, [1,16,H/8,W/8]."""
    return values("editing.noise", (1, 16, HEIGHT // 8, WIDTH // 8))


def text() -> tuple[Tensor, Tensor]:
    """T5's and CLIP's states of a prompt."""
    return values("editing.t5", (1, TEXT, WIDE)), values("editing.clip", (1, WIDE))


def picture(name: str = "init", width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Any bytes."""
    drawn = np.concatenate(list(bits(f"editing.{name}", width * height * 3)))
    return Image.fromarray((drawn % np.uint64(256)).astype(np.uint8).reshape(height, width, 3))


def reference() -> Image.Image:
    """Of another size and other proportions than what is painted."""
    return picture("reference", 32, 80)


def mask() -> Image.Image:
    """White on a part that is not symmetric in any direction; two edges are no multiples of 8."""
    made = Image.new("L", (WIDTH, HEIGHT))
    made.paste(255, (8, 0, 43, 29))
    return made

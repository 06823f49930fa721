"""What is asked of a model and what comes back: request, step, result, events, cancel token. Floor 0."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .errors import Cancelled

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class GenerationRequest:
    """One order for pictures, for every family. None means "the version's own default".

    A field that a version cannot use and that is not None is refused by name.
    """

    prompt: str
    width: int | None = None  # pixels
    height: int | None = None  # pixels
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None  # of the first image; image i uses seed + i; None draws one
    batch: int = 1  # how many images
    batched: bool | None = None  # all images through the networks at once; None: on a GPU, not on a CPU
    t5_length: int | None = None  # tokens
    strict_prompt: bool = False  # a prompt that would be cut is an error
    latents: torch.Tensor | None = None  # float32 noise [batch, C, H/8, W/8] in place of the seed's
    preview_every: int | None = None  # steps between previews; None: none
    negative_prompt: str | None = None  # what to keep away from; "" and None differ for SDXL
    guidance_rescale: float | None = None  # 0..1, back to the spread of the unguided prediction
    sampler: str | None = None  # such as "euler": see `flux_sd.schedulers`
    schedule: str | None = None  # how its noise levels are spaced, such as "karras"
    init_image: Image | None = None  # to begin from in place of pure noise
    mask: Image | None = None  # white: repaint; black: keep
    # 0..1, how much of the way from pure noise is run on `init_image`. FLUX: its share of noise at the start,
    # the first sigma; Stable Diffusion: the share of the steps that are run.
    strength: float | None = None
    fit: str | None = None  # "crop" or "stretch" an `init_image` of other proportions; None: "refuse" it
    composite: bool | None = None  # pixels outside the mask are those of `init_image`; None: yes
    control_image: Image | None = None  # lines or depths to follow, made already; for models that read one
    reference: Image | None = None  # what the prompt is about to change; for models that read one
    # The autoencoder in tiles, for less memory; they overlap by a row and need no blending, see
    # `flux_sd.vae_tiling`. None: where memory asks for it.
    vae_tiling: bool | None = None


@dataclass(frozen=True)
class Step:
    """One finished step of one image (or of all, when batched).

    latents and x0 are unpacked, float32, on the CPU or the model's device: [B, C, H/8, W/8].
    """

    index: int  # 0-based, within this image
    total: int
    sigma: float  # noise level after this step; 0 after the last
    latents: torch.Tensor
    x0: torch.Tensor  # the clean latents that the model predicts at this step
    image: int = 0  # index of the first image in `latents`
    images: int = 1  # how many images the request has


@dataclass
class Result:
    """One finished picture, the record that is written beside it, and its final latents [C, H/8, W/8]."""

    image: Image
    metadata: dict[str, Any]
    latents: torch.Tensor
    # What the run started from [C, H/8, W/8]; as `latents` of a request, it repeats the run.
    noise: torch.Tensor
    notes: list[str] = field(default_factory=list)  # what the user should know: a prompt that was cut, ...
    timings: dict[str, float] = field(default_factory=dict)  # seconds by stage


@dataclass(frozen=True)
class Progress:
    """Something moved on: `stage` is a word such as "load t5", "denoise", "decode", "download"."""

    stage: str
    index: int  # done so far in this stage
    total: int  # 0: unknown
    seconds: float = 0.0  # of this step
    image: int = 0
    images: int = 1


@dataclass(frozen=True)
class Preview:
    """A soft picture of the predicted final image, at its size, made without the decoder."""

    index: int
    total: int
    picture: Image
    image: int = 0


@dataclass(frozen=True)
class Complete:
    """The last event of a run that succeeded."""

    results: list[Result]


@dataclass(frozen=True)
class Error:
    """The last event of a run that failed or was cancelled (`error` is then a Cancelled)."""

    error: Exception


Event = Progress | Preview | Complete | Error


class CancelToken:
    """A flag that any thread may set; work in progress looks at it before each block, tensor or chunk."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def cancel(self) -> None:
        self._event.set()

    @property
    def cancelled(self) -> bool:
        return self._event.is_set()

    def check(self) -> None:
        """Raises Cancelled once `cancel` was called."""
        if self._event.is_set():
            raise Cancelled()

"""What a request means to a Stable Diffusion version: every choice made, or refused by name. Floor 5.

No file is read, so that this comes before any download. The rules for a picture to begin from:

- its size is painted, unless the request gives one; with `fit` crop or stretch, down to the next multiples;
- it is resized where its proportions are those of the size, and a note says so; where they are not, `fit`
  decides: refuse (the default), crop, stretch;
- a mask has its proportions, at any size, and is fitted alike, so that both lie over each other; white is
  repainted, black is kept;
- strength picks the first step: the last int(steps * strength) of the steps are run, from the picture noised
  to the level of the first of them. 0 runs none, and the picture only goes through the autoencoder. 1 runs
  all, from noise alone, and nothing of the picture is left but what a mask keeps. (diffusers leaves a trace
  of it there, where no mask is given.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from . import image
from .errors import RequestError
from .numerics import Numerics
from .request import GenerationRequest
from .schedulers import SCHEDULES, check_pair
from .schedulers.sampler import METHODS
from .steps import MAX_BATCH, MAX_SIDE, check_latents, check_ranges, check_size, choose_seed, refuse_fields
from .versions import SdConfigs, VersionInfo

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_STEPS = 1000
# How much of the way is run on a picture where the request does not say: all of it where a mask says what to
# keep.
STRENGTH, MASKED_STRENGTH = 0.8, 1.0
UNUSED_PICTURE = "strength 1 begins with noise alone: of init_image only the size is used"


@dataclass(frozen=True)
class SdPlan:
    """A request with every choice made."""

    prompt: str
    negative_prompt: str | None
    width: int
    height: int
    steps: int
    guidance: float | None
    guidance_rescale: float | None
    sampler: str
    schedule: str
    seed: int
    batch: int
    batched: bool | None
    strict_prompt: bool
    latents: Tensor | None
    preview_every: int | None
    init_image: Image | None  # 8-bit RGB of width x height
    mask: Tensor | None  # [1,H,W]; 1: repaint, 0: keep
    strength: float | None  # None: no picture to begin from
    composite: bool
    vae_tiling: bool | None
    fit: str | None
    hashes: Mapping[str, str]  # of init_image and mask, as they were given
    notes: tuple[str, ...]  # what the user should know of them

    @property
    def guided(self) -> bool:
        """Whether the UNet also runs on the negative prompt: at guidance 1 its answer would cancel out."""
        return self.guidance is not None and self.guidance > 1.0


def plan_sd(info: VersionInfo, request: GenerationRequest, numerics: Numerics) -> SdPlan:
    """Fills in the version's defaults and refuses what it cannot do, reading no file. Raises RequestError."""
    refuse_fields(info, request, ("t5_length",))
    strength, canvas = _strength(request), _canvas(info, request)
    sampler, schedule = _pair(info, request, numerics)
    plan = SdPlan(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        width=canvas.width,
        height=canvas.height,
        steps=_steps(info, request, numerics, strength),
        guidance=_guidance(info, request, numerics),
        guidance_rescale=request.guidance_rescale,
        sampler=sampler,
        schedule=schedule,
        seed=choose_seed(request.seed, request.batch),
        batch=request.batch,
        batched=request.batched,
        strict_prompt=request.strict_prompt,
        latents=request.latents,
        preview_every=request.preview_every,
        init_image=canvas.picture,
        mask=canvas.mask,
        strength=strength,
        composite=canvas.mask is not None and request.composite is not False,
        vae_tiling=request.vae_tiling,
        fit=request.fit,
        hashes=canvas.hashes,
        notes=canvas.notes,
    )
    _check_plan(info, plan)
    return plan if _uses_picture(plan) else replace(plan, notes=(*plan.notes, UNUSED_PICTURE))


def configs_of(info: VersionInfo) -> SdConfigs:
    """The networks of a Stable Diffusion version."""
    assert info.sd is not None, f"{info.key} is no Stable Diffusion version"
    return info.sd


class Canvas(NamedTuple):
    """What is painted on."""

    width: int
    height: int
    picture: Image | None  # 8-bit RGB of width x height
    mask: Tensor | None  # [1,H,W]
    hashes: Mapping[str, str]
    notes: tuple[str, ...]


def _canvas(info: VersionInfo, request: GenerationRequest) -> Canvas:
    """The size, and picture and mask fitted to it."""
    _check_pictures(info, request)
    fit = request.fit or "refuse"
    picture = None if request.init_image is None else image.to_rgb(request.init_image)
    width, height = _size(info, request, picture)
    if picture is None:
        return Canvas(width, height, None, None, {}, ())
    hashes, notes, mask = {"init_image": image.pixel_hash(picture)}, [], None
    if picture.size != (width, height):
        found = f"init_image is resized from {picture.width}x{picture.height}"
        notes.append(f"{found} to {width}x{height} pixels")
    if request.mask is not None:
        white = image.to_rgb(request.mask, "black")
        if not image.same_proportions(white.size, picture.size):
            sizes = f"{white.width}x{white.height} pixels, init_image {picture.width}x{picture.height}"
            raise RequestError(f"the mask is {sizes}: give one of the same proportions, best the same size")
        hashes["mask"] = image.pixel_hash(white)
        mask = image.mask_of(white, width, height, fit)
        _check_mask(mask, configs_of(info).vae.downsampling)
    return Canvas(width, height, image.fit_picture(picture, width, height, fit), mask, hashes, tuple(notes))


def _check_pictures(info: VersionInfo, request: GenerationRequest) -> None:
    """Refuses fields that lack another, and an unknown `fit`."""
    if info.is_inpainting and (request.init_image is None or request.mask is None):
        lacking = "init_image" if request.init_image is None else "mask"
        raise RequestError(f"{info.key} repaints a part of a picture and {lacking} is not given: give both")
    pairs = (("mask", "init_image"), ("strength", "init_image"), ("fit", "init_image"), ("composite", "mask"))
    for name, needs in pairs:
        if getattr(request, name) is not None and getattr(request, needs) is None:
            raise RequestError(f"{name} is given and {needs} is not: give both, or leave {name} out")
    if request.fit is not None and request.fit not in image.FITS:
        raise RequestError(f"fit {request.fit!r} is unknown: choose {', '.join(image.FITS)}")


def _size(info: VersionInfo, request: GenerationRequest, picture: Image | None) -> tuple[int, int]:
    """Width and height: the request's, else the picture's, else the version's."""
    own = (info.width, info.height) if picture is None else picture.size
    if picture is not None and request.fit in ("crop", "stretch"):
        own = (own[0] // info.multiple * info.multiple, own[1] // info.multiple * info.multiple)
    width = own[0] if request.width is None else request.width
    height = own[1] if request.height is None else request.height
    for name, side in (("width", width), ("height", height)):
        if side > MAX_SIDE:  # before a picture is made so large
            raise RequestError(f"{name} {side} is outside 1..{MAX_SIDE}")
    return check_size(info, width, height, "refuse")


def _check_mask(mask: Tensor, cell: int) -> None:
    """mask [1,H,W]; cell: pixels that one latent position spans, of which the upper left one decides. Raises
    RequestError for a mask that is too fine."""
    if not mask[:, ::cell, ::cell].any():
        found = f"the mask's white parts are smaller than {cell}x{cell} pixels and fall between the latents"
        raise RequestError(f"{found}, so nothing would be repainted: make them larger")


def _strength(request: GenerationRequest) -> float | None:
    if request.init_image is None or request.strength is not None:
        return request.strength
    return STRENGTH if request.mask is None else MASKED_STRENGTH


def _steps(info: VersionInfo, request: GenerationRequest, numerics: Numerics, strength: float | None) -> int:
    if request.steps is not None:
        return request.steps
    own = info.steps if info.guidance is None else numerics.sd_steps or info.steps
    enough = math.ceil(1 / strength) if strength is not None and 0.0 < strength <= 1.0 else 1
    return max(own, min(enough, MAX_STEPS))  # Turbo's single step would leave a picture as it is


def _guidance(info: VersionInfo, request: GenerationRequest, numerics: Numerics) -> float | None:
    if info.guidance is None and request.guidance is not None and request.guidance > 1.0:
        raise RequestError(f"guidance is not used by {info.key}, which runs without: leave it out")
    if request.guidance is not None or info.guidance is None:
        return request.guidance
    return numerics.sd_guidance or info.guidance


def _pair(info: VersionInfo, request: GenerationRequest, numerics: Numerics) -> tuple[str, str]:
    """Sampler and schedule: the request's, else the version's, else the first that goes with the sampler."""
    own, distilled = configs_of(info), info.guidance is None
    default = numerics.sdxl_sampler if info.is_xl and not distilled else None
    sampler = request.sampler or default or own.sampler
    schedule = request.schedule
    if schedule is None:
        taken = METHODS[sampler].schedules if sampler in METHODS else SCHEDULES
        schedule = own.schedule if own.schedule in taken else taken[0]
    check_pair(sampler, schedule)
    return sampler, schedule


def _check_plan(info: VersionInfo, plan: SdPlan) -> None:
    ranges = {
        "steps": (1, MAX_STEPS),
        "batch": (1, MAX_BATCH),
        "guidance": (0.0, 100.0),
        "guidance_rescale": (0.0, 1.0),
        "strength": (0.0, 1.0),
    }
    check_ranges(plan, ranges)
    for name in ("negative_prompt", "guidance_rescale"):
        if getattr(plan, name) is not None and not plan.guided:
            why = "runs without" if plan.guidance is None else f"is asked for guidance {plan.guidance:g}"
            raise RequestError(f"{name} acts through guidance above 1 and {info.key} {why}: leave it out")
    if plan.strength and first_step(plan.steps, plan.strength) == plan.steps:
        raise RequestError(
            f"strength {plan.strength:g} of {plan.steps} steps is less than one step: raise either, or give "
            "strength 0 to encode and decode the picture alone"
        )
    if plan.latents is not None:
        check_latents(plan.latents, plan.batch, latent_shape(info, plan))


def _uses_picture(plan: SdPlan) -> bool:
    """Whether a picture, where there is one, leaves more than its size."""
    return plan.init_image is None or plan.mask is not None or first_step(plan.steps, plan.strength) > 0


def first_step(steps: int, strength: float | None) -> int:
    """The index of the first step that runs on a picture: strength 1 runs all of them, 0 none; without a
    picture, 0. diffusers' rule: the last int(steps * strength) steps."""
    return 0 if strength is None else steps - min(int(steps * strength), steps)


def latent_shape(info: VersionInfo, plan: SdPlan) -> tuple[int, int, int]:
    """[C, H/8, W/8] of one image."""
    vae = configs_of(info).vae
    return (vae.z_channels, plan.height // vae.downsampling, plan.width // vae.downsampling)

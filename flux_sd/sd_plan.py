"""What a request means to a Stable Diffusion version: every choice made, or refused by name. Floor 6.

No file is read, so that this comes before any download. The rules for a picture to begin from stand in
`canvas.py`. Its strength picks the first step: the last int(steps * strength) of the steps are run, from the
picture noised to the level of the first of them. 0 runs none, and the picture only goes through the
autoencoder. 1 runs all, from noise alone, and nothing of the picture is left but what a mask keeps.
(diffusers leaves a trace of it there, where no mask is given.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from .canvas import UNUSED_PICTURE, fit_canvas, strength_of
from .errors import RequestError
from .numerics import Numerics
from .request import GenerationRequest
from .schedulers import SCHEDULES, check_pair
from .schedulers.sampler import METHODS
from .steps import MAX_BATCH, check_latents, check_ranges, choose_seed, refuse_fields
from .versions import VersionInfo, configs_of

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_STEPS = 1000


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
    strength, canvas = strength_of(request), fit_canvas(info, request, configs_of(info).vae.downsampling)
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

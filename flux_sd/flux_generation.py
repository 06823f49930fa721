"""FLUX: a text, and pictures where they are given (flux_editing.py), to a picture. Floor 7.

Mirrors the Rust worker's `flux_generation.rs` and Candle's FLUX example. Everything runs over one generator
of steps; each stage loads its network, runs, and lets it go.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .canvas import UNUSED_PICTURE, Canvas, fit_canvas, strength_of
from .components import Components
from .errors import RequestError
from .flux_editing import Edit, arrange, to_encode
from .flux_loader import EncodedText
from .numerics import Numerics
from .request import CancelToken, GenerationRequest, Result, Step
from .sampling import FlowStep, State, begin_at, denoise, get_noise, get_schedule, pack, unpack
from .stages import Stages, Tap
from .steps import (
    MAX_BATCH,
    MAX_SIDE,
    OnEvent,
    cancellable,
    check_finite,
    check_latents,
    check_ranges,
    choose_seed,
    refuse_fields,
)
from .versions import VersionInfo

CLIP_LENGTH = 77
MAX_T5_LENGTH = 512  # the longest that the released models were trained on
# Fields of a request that FLUX has no use for.
UNUSED = ("negative_prompt", "guidance_rescale", "sampler", "schedule")


@dataclass(frozen=True)
class FluxPlan:
    """A request with every choice made."""

    prompt: str
    width: int
    height: int
    steps: int
    guidance: float | None
    seed: int
    batch: int
    batched: bool | None
    t5_length: int
    strict_prompt: bool
    latents: Tensor | None
    preview_every: int | None
    vae_tiling: bool | None
    canvas: Canvas
    strength: float | None  # the time to start at; None: no picture to begin from
    composite: bool
    fit: str | None

    @property
    def image_tokens(self) -> int:
        """Of one picture."""
        return self.width * self.height // 256


def plan_flux(info: VersionInfo, request: GenerationRequest, numerics: Numerics) -> FluxPlan:
    """Fills in the version's defaults and refuses what it cannot do, reading no file. Raises RequestError."""
    refuse_fields(info, request, UNUSED)
    canvas = fit_canvas(info, request, 1 if info.is_inpainting else latent_cell(info), numerics.size)
    if request.guidance is not None and info.guidance is None:
        raise RequestError(f"guidance is not used by {info.key}: leave it out")
    guidance = request.guidance
    if guidance is None and info.guidance is not None:
        # What a preset says is of dev; Candle knows none of its variants.
        preset = numerics.guidance if info.variant is None else None
        guidance = info.guidance if preset is None else preset
    own_length = info.t5_length or MAX_T5_LENGTH
    t5_length = _or(request.t5_length, min(own_length, numerics.t5_length or own_length))
    plan = FluxPlan(
        request.prompt,
        canvas.width,
        canvas.height,
        _or(request.steps, info.steps),
        guidance,
        choose_seed(request.seed, request.batch),
        request.batch,
        request.batched,
        t5_length,
        request.strict_prompt,
        request.latents,
        request.preview_every,
        request.vae_tiling,
        canvas,
        strength_of(request),
        canvas.mask is not None and request.composite is not False,
        request.fit,
    )
    _check_ranges(plan)
    if request.latents is not None:
        check_latents(request.latents, plan.batch, latent_shape(plan))
    notes = _notes(info, plan, guided=request.guidance is not None)
    return replace(plan, canvas=canvas._replace(notes=(*canvas.notes, *notes)))


def _notes(info: VersionInfo, plan: FluxPlan, guided: bool) -> Iterator[str]:
    """What a user should know of the plan. guided: whether the request names a guidance."""
    if plan.strength == 1.0 and plan.canvas.picture is not None and plan.canvas.mask is None:
        yield UNUSED_PICTURE
    if info.guidance_note and plan.guidance is not None and not guided:
        yield f"guidance is {plan.guidance:g}, the default of {info.key}: {info.guidance_note}"


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _check_ranges(plan: FluxPlan) -> None:
    ranges = {
        "steps": (1, 1000),
        "batch": (1, MAX_BATCH),
        "t5_length": (1, MAX_T5_LENGTH),
        "width": (1, MAX_SIDE),
        "height": (1, MAX_SIDE),
        "guidance": (0.0, 100.0),
        "strength": (0.0, 1.0),
    }
    check_ranges(plan, ranges)


def latent_cell(info: VersionInfo) -> int:
    """Pixels that one latent position spans, along either side."""
    assert info.flux is not None, f"{info.key} is no FLUX version"
    return info.flux.vae.downsampling


def latent_shape(plan: FluxPlan) -> tuple[int, int, int]:
    """[C, H/8, W/8] of one image."""
    return (16, plan.height // 8, plan.width // 8)


def times_of(info: VersionInfo, plan: FluxPlan) -> list[float]:
    """The times of a run, from its start to 0: one more than its steps."""
    times = get_schedule(plan.steps, plan.image_tokens if info.shift else None)
    return times if plan.strength is None else begin_at(times, plan.strength)


class FluxRun:
    """One request on one model: its stages, its notes and its clock."""

    def __init__(
        self,
        components: Components,
        request: GenerationRequest,
        on_event: OnEvent | None = None,
        cancel: CancelToken | None = None,
        tap: Tap | None = None,
    ) -> None:
        self.components, self.info = components, components.info
        self.plan = plan_flux(self.info, request, components.numerics)
        self.stages = Stages(components, on_event, cancel, tap)
        self.stages.notes += self.plan.canvas.notes
        self.times = times_of(self.info, self.plan)
        self.init_latents: Tensor | None = None  # [1,16,H/8,W/8], known once `steps` has begun
        self.images_at_once = self.stages.images_at_once(self.plan.batch, self.plan.batched)
        images = dict.fromkeys(components.roles, self.images_at_once)
        size, other = (self.plan.width, self.plan.height), self.plan.canvas.reference
        seen = (0, 0) if other is None else other.size
        self.stages.check_room(size, self.plan.t5_length, images, self.plan.vae_tiling, seen)

    def steps(self) -> Iterator[Step]:
        """Yields after each step of each image (of all at once, when batched); nothing at strength 0."""
        ids = self.read_prompt()
        edit = self.look()
        if len(self.times) == 1:
            return
        text = self.encode(ids)
        try:
            for first in range(0, self.plan.batch, self.images_at_once):
                yield from self._image_steps(text, edit, first)
        finally:  # also where the run fails, is cancelled or is left before its end
            self.components.free("transformer")

    @torch.inference_mode()
    def look(self) -> Edit:
        """The request's pictures through the autoencoder, as the loop reads them."""
        info, plan = self.info, self.plan
        wanted = to_encode(info, plan.canvas, plan.strength)
        if not wanted:
            return Edit()
        self.stages.record({f"{name.removesuffix('latents')}image": each for name, each in wanted.items()})
        latents = dict(zip(wanted, self.stages.encode_pictures(list(wanted.values())), strict=True))
        self.stages.record(latents)
        self.init_latents = latents.get("init.latents")
        return arrange(info, plan.canvas, latents, latent_cell(info))

    def read_prompt(self) -> dict[str, list[int]]:
        """Token ids by encoder; what was cut is noted. Raises PromptTooLongError where the request is
        strict."""
        plan, parts, stages = self.plan, self.components, self.stages
        clip = parts.tokenizers["clip"].encode(plan.prompt, CLIP_LENGTH)
        t5 = parts.tokenizers["t5"].encode(plan.prompt, plan.t5_length, parts.numerics.t5_keep_end_token)
        stages.read_prompts({plan.prompt: [clip.report, t5.report]}, plan.strict_prompt)
        stages.record({"clip.ids": torch.tensor([clip.ids]), "t5.ids": torch.tensor([t5.ids])})
        return {"clip": clip.ids, "t5": t5.ids}

    @torch.inference_mode()
    def encode(self, ids: Mapping[str, list[int]]) -> EncodedText:
        """The prompt through CLIP and T5, each loaded and freed in turn; remembered by prompt and length."""
        plan, stages = self.plan, self.stages
        key = (plan.prompt, plan.t5_length)
        text = stages.remembered(key, lambda: self._encode(ids["clip"], ids["t5"]))
        stages.record({"clip.pooled": text.vec, "t5.hidden": text.txt})
        return text

    def _encode(self, clip_ids: list[int], t5_ids: list[int]) -> EncodedText:
        def ids(of: list[int]) -> Tensor:
            return torch.tensor([of], device=self.stages.device)

        vec = self.stages.alone("clip", "encode", lambda clip: clip(ids(clip_ids)).pooled.cpu())
        check_finite(vec, "CLIP", self.components.dtype_of("clip"))
        txt = self.stages.alone("t5", "encode", lambda t5: t5(ids(t5_ids)).cpu())
        check_finite(txt, "T5", self.components.dtype_of("t5"))
        return EncodedText(txt, vec)

    def _image_steps(self, text: EncodedText, edit: Edit, first: int) -> Iterator[Step]:
        plan, stages, times = self.plan, self.stages, self.times
        transformer = stages.network("transformer")
        drawn = self._noise(first, min(self.images_at_once, plan.batch - first))
        noise = pack(drawn.to(stages.device))  # [B,S,64]
        state = self._state(text, edit, drawn)
        stages.record(
            {"noise": drawn, "packed": state.img, "timesteps": torch.tensor(times, dtype=torch.float64)}
        )
        before = state.img
        keep = None if edit.mask is None else lambda img, time: edit.keep(img, time, noise)
        loop = denoise(transformer, state, times, plan.guidance, self.components.numerics.latents_dtype, keep)
        for index in range(len(times) - 1):
            start = time.perf_counter()
            stages.record({f"step.{index}.latents": before})
            with cancellable(transformer, stages.cancel):
                flow = next(loop)
            check_finite(flow.img, "the transformer", stages.dtype, index + 1)  # waits for a GPU to finish
            stages.record({f"step.{index}.velocity": flow.velocity})
            before = flow.img
            seconds = time.perf_counter() - start
            yield stages.finish(self._step(flow, first), seconds, plan.preview_every)

    @torch.inference_mode()
    def _state(self, text: EncodedText, edit: Edit, noise: Tensor) -> State:
        """noise [B,16,H/8,W/8] on the CPU -> what the loop begins from and all that the transformer reads."""
        device, dtype = self.stages.device, self.stages.dtype
        low = self.components.numerics.latents_dtype == "model"
        txt, vec = text.txt.to(device, dtype), text.vec.to(device, dtype)
        state = State.new(txt, vec, noise.to(device))
        img = edit.begin(state.img, self.times[0]).to(dtype if low else torch.float32)
        rest = (part if part is None else part.expand(len(noise), -1, -1) for part in edit[2:])
        channels, more, more_ids = rest
        return replace(state, img=img, channels=channels, more=more, more_ids=more_ids)

    def _step(self, flow: FlowStep, first: int) -> Step:
        plan, total = self.plan, len(self.times) - 1
        latents = unpack(flow.img, plan.height, plan.width)  # [B,16,H/8,W/8]
        x0 = unpack(flow.x0, plan.height, plan.width)
        return Step(flow.index, total, flow.sigma, latents, x0, first, plan.batch)

    def _noise(self, first: int, count: int) -> Tensor:
        """[count,16,H/8,W/8] for the images from `first` on: image i from seed + i, or what the request
        brought."""
        plan = self.plan
        if plan.latents is not None:
            given = check_latents(plan.latents, plan.batch, latent_shape(plan))
            return given[first : first + count]
        seeds = range(plan.seed + first, plan.seed + first + count)
        return torch.cat([get_noise(seed, plan.height, plan.width) for seed in seeds])

    def generate(self) -> list[Result]:
        """All pictures of the request."""
        finished = [step.latents for step in self.steps() if step.index + 1 == step.total]
        if not finished:  # strength 0
            assert self.init_latents is not None
            finished = [self.init_latents.expand(self.plan.batch, -1, -1, -1)]
        plan, original = self.plan, None
        if plan.composite and plan.canvas.picture is not None and plan.canvas.mask is not None:
            original = plan.canvas.picture, plan.canvas.mask
        return self.stages.results(
            finished, self.images_at_once, original, self.metadata, lambda i: self._noise(i, 1)[0]
        )

    def metadata(self, index: int) -> dict[str, object]:
        """What repeats image `index`: settings, dtypes, numerics, versions; pictures by their pixels' hash.
        No paths."""
        plan, hashes = self.plan, self.plan.canvas.hashes
        return {
            "prompt": plan.prompt,
            "model": self.info.key,
            "seed": plan.seed + index,
            "width": plan.width,
            "height": plan.height,
            "steps": plan.steps,
            "guidance": plan.guidance,
            "t5_length": plan.t5_length,
            "strength": plan.strength,
            "steps_run": len(self.times) - 1,
            **{name: hashes.get(name) for name in ("init_image", "mask", "control_image", "reference")},
            "fit": plan.fit,
            "composite": plan.composite if plan.canvas.mask is not None else None,
            "latents": "from the seed" if plan.latents is None else "given",
            **self.stages.settings(self.images_at_once),
        }


def generate_flux(
    components: Components,
    request: GenerationRequest,
    on_event: OnEvent | None = None,
    cancel: CancelToken | None = None,
    tap: Tap | None = None,
) -> list[Result]:
    """All pictures of a request. Raises RequestError before a weight is read, NonFiniteError, Cancelled."""
    return FluxRun(components, request, on_event, cancel, tap).generate()

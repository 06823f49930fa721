"""FLUX text-to-image: prompt -> text states -> latents -> picture. Floor 7.

Mirrors the Rust worker's `flux_generation.rs` and Candle's FLUX example. Everything runs over one generator
of steps; each stage loads its network, runs, and lets it go.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import image
from .components import Components
from .errors import RequestError
from .flux_loader import EncodedText
from .numerics import Numerics
from .request import CancelToken, Complete, GenerationRequest, Result, Step
from .sampling import FlowStep, State, denoise, get_noise, get_schedule, unpack
from .stages import Stages, Tap
from .steps import (
    MAX_BATCH,
    MAX_SIDE,
    OnEvent,
    cancellable,
    check_finite,
    check_latents,
    check_ranges,
    check_size,
    choose_seed,
    refuse_fields,
)
from .versions import VersionInfo

CLIP_LENGTH = 77
MAX_T5_LENGTH = 512  # the longest that the released models were trained on
# Fields of a request that FLUX has no use for.
UNUSED = (
    "negative_prompt",
    "guidance_rescale",
    "sampler",
    "schedule",
    "init_image",
    "mask",
    "strength",
    "composite",
    "fit",
)


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

    @property
    def image_tokens(self) -> int:
        """Of one picture."""
        return self.width * self.height // 256


def plan_flux(info: VersionInfo, request: GenerationRequest, numerics: Numerics) -> FluxPlan:
    """Fills in the version's defaults and refuses what it cannot do, reading no file. Raises RequestError."""
    refuse_fields(info, request, UNUSED)
    width, height = check_size(
        info, _or(request.width, info.width), _or(request.height, info.height), numerics.size
    )
    if request.guidance is not None and info.guidance is None:
        raise RequestError(f"guidance is not used by {info.key}: leave it out")
    guidance = request.guidance
    if guidance is None and info.guidance is not None:
        guidance = info.guidance if numerics.guidance is None else numerics.guidance
    own_length = info.t5_length or MAX_T5_LENGTH
    t5_length = _or(request.t5_length, min(own_length, numerics.t5_length or own_length))
    plan = FluxPlan(
        request.prompt,
        width,
        height,
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
    )
    _check_ranges(plan)
    if request.latents is not None:
        check_latents(request.latents, plan.batch, latent_shape(plan))
    return plan


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
    }
    check_ranges(plan, ranges)


def latent_shape(plan: FluxPlan) -> tuple[int, int, int]:
    """[C, H/8, W/8] of one image."""
    return (16, plan.height // 8, plan.width // 8)


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
        self.images_at_once = self.stages.images_at_once(self.plan.batch, self.plan.batched)
        images = dict.fromkeys(components.roles, self.images_at_once)
        size = (self.plan.width, self.plan.height)
        self.stages.check_room(size, self.plan.t5_length, images, self.plan.vae_tiling)

    def steps(self) -> Iterator[Step]:
        """Yields after each step of each image (of all at once, when batched)."""
        text = self.encode()
        try:
            for first in range(0, self.plan.batch, self.images_at_once):
                yield from self._image_steps(text, first)
        finally:  # also where the run fails, is cancelled or is left before its end
            self.components.free("transformer")

    @torch.inference_mode()
    def encode(self) -> EncodedText:
        """The prompt through CLIP and T5, each loaded and freed in turn; remembered by prompt and length."""
        plan, parts, stages = self.plan, self.components, self.stages
        clip = parts.tokenizers["clip"].encode(plan.prompt, CLIP_LENGTH)
        t5 = parts.tokenizers["t5"].encode(plan.prompt, plan.t5_length, parts.numerics.t5_keep_end_token)
        stages.read_prompts({plan.prompt: [clip.report, t5.report]}, plan.strict_prompt)
        stages.record({"clip.ids": torch.tensor([clip.ids]), "t5.ids": torch.tensor([t5.ids])})
        key = (plan.prompt, plan.t5_length)
        text = stages.remembered(key, lambda: self._encode(clip.ids, t5.ids))
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

    def _image_steps(self, text: EncodedText, first: int) -> Iterator[Step]:
        plan, stages = self.plan, self.stages
        device, dtype = stages.device, stages.dtype
        transformer = stages.network("transformer")
        noise = self._noise(first, min(self.images_at_once, plan.batch - first))
        txt, vec = text.txt.to(device, dtype), text.vec.to(device, dtype)
        latents_dtype = self.components.numerics.latents_dtype
        state = State.new(txt, vec, noise.to(device, dtype if latents_dtype == "model" else torch.float32))
        times = get_schedule(plan.steps, plan.image_tokens if self.info.shift else None)
        stages.record(
            {"noise": noise, "packed": state.img, "timesteps": torch.tensor(times, dtype=torch.float64)}
        )
        before = state.img
        loop = denoise(transformer, state, times, plan.guidance, latents_dtype)
        for index in range(plan.steps):
            start = time.perf_counter()
            stages.record({f"step.{index}.latents": before})
            with cancellable(transformer, stages.cancel):
                flow = next(loop)
            check_finite(flow.img, "the transformer", dtype, flow.index + 1)  # waits for a GPU to finish
            stages.record({f"step.{index}.velocity": flow.velocity})
            before = flow.img
            seconds = time.perf_counter() - start
            yield stages.finish(self._step(flow, first), seconds, plan.preview_every)

    def _step(self, flow: FlowStep, first: int) -> Step:
        plan = self.plan
        latents = unpack(flow.img, plan.height, plan.width)  # [B,16,H/8,W/8]
        x0 = unpack(flow.x0, plan.height, plan.width)
        return Step(flow.index, plan.steps, flow.sigma, latents, x0, first, plan.batch)

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
        latents = torch.cat(finished).float().cpu()  # [batch,16,H/8,W/8]
        results = self.results(latents, self.stages.decode(latents, self.images_at_once))
        self.stages.emit(Complete(results))
        return results

    def results(self, latents: Tensor, pictures: Tensor) -> list[Result]:
        """One Result per image, each with its own seed."""
        rounding = self.components.numerics.to_bytes
        return [
            self.stages.result(
                image.to_picture(picture, rounding), self.metadata(i), latents[i], self._noise(i, 1)[0]
            )
            for i, picture in enumerate(pictures)
        ]

    def metadata(self, index: int) -> dict[str, object]:
        """What repeats image `index`: settings, dtypes, numerics, versions. No paths."""
        plan = self.plan
        return {
            "prompt": plan.prompt,
            "model": self.info.key,
            "seed": plan.seed + index,
            "width": plan.width,
            "height": plan.height,
            "steps": plan.steps,
            "guidance": plan.guidance,
            "t5_length": plan.t5_length,
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

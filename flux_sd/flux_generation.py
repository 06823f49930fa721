"""FLUX text-to-image: prompt -> text states -> latents -> picture. Floor 7.

Mirrors the Rust worker's `flux_generation.rs` and Candle's FLUX example. Everything runs over one generator
of steps; each stage loads its network, runs, and lets it go.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import image
from .errors import RequestError
from .flux_loader import EncodedText, FluxComponents
from .numerics import Numerics
from .request import CancelToken, Complete, GenerationRequest, Preview, Progress, Result, Step
from .sampling import FlowStep, State, denoise, get_noise, get_schedule, unpack
from .steps import (
    OnEvent,
    Timings,
    cancellable,
    check_finite,
    check_latents,
    check_size,
    choose_seed,
    dtype_name,
    preview_image,
)
from .text import EncodedPrompt, describe_cut, require_whole
from .version import __version__
from .versions import VersionInfo

CLIP_LENGTH = 77
MAX_T5_LENGTH = 512  # the longest that the released models were trained on
MAX_BATCH = 256
MAX_SIDE = 16_384  # pixels
KEPT_TEXTS = 8  # encoded prompts that a model remembers
Tap = Callable[[str, Tensor], None]


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

    @property
    def image_tokens(self) -> int:
        """Of one picture."""
        return self.width * self.height // 256


def plan_flux(info: VersionInfo, request: GenerationRequest, numerics: Numerics) -> FluxPlan:
    """Fills in the version's defaults and refuses what it cannot do, reading no file. Raises RequestError."""
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
    }
    for name, (low, high) in ranges.items():
        value = getattr(plan, name)
        if not low <= value <= high:
            raise RequestError(f"{name} {value} is outside {low}..{high}")
    if plan.guidance is not None and not 0.0 <= plan.guidance <= 100.0:
        raise RequestError(f"guidance {plan.guidance} is outside 0..100")
    if plan.preview_every is not None and plan.preview_every < 1:
        raise RequestError(f"preview_every {plan.preview_every} is not a number of steps: give 1 or more")


def latent_shape(plan: FluxPlan) -> tuple[int, int, int]:
    """[C, H/8, W/8] of one image."""
    return (16, plan.height // 8, plan.width // 8)


class FluxRun:
    """One request on one model: its stages, its notes and its clock."""

    def __init__(
        self,
        components: FluxComponents,
        request: GenerationRequest,
        on_event: OnEvent | None = None,
        cancel: CancelToken | None = None,
        tap: Tap | None = None,
    ) -> None:
        self.components, self.info = components, components.info
        self.plan = plan_flux(self.info, request, components.numerics)
        self.device, self.dtype = components.placement.device, components.placement.dtype
        self.on_event, self.cancel, self.tap = on_event, cancel, tap
        self.notes: list[str] = list(components.placement.notes)
        self.timings = Timings()
        on_cpu = self.device.type == "cpu"
        together = self.plan.batched if self.plan.batched is not None else not on_cpu
        self.images_at_once = self.plan.batch if together else 1
        components.check_room(self.plan.width, self.plan.height, self.images_at_once, self.plan.t5_length)

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
        plan, parts = self.plan, self.components
        clip = parts.clip_tokenizer.encode(plan.prompt, CLIP_LENGTH)
        t5 = parts.t5_tokenizer.encode(plan.prompt, plan.t5_length, parts.numerics.t5_keep_end_token)
        self._report_cut(clip, t5)
        self._record({"clip.ids": torch.tensor([clip.ids]), "t5.ids": torch.tensor([t5.ids])})
        key = (plan.prompt, plan.t5_length)
        if key not in parts.texts:
            vec = self._encode_with("clip", clip.ids, lambda output: output.pooled)
            check_finite(vec, "CLIP", self.dtype)
            txt = self._encode_with("t5", t5.ids, lambda output: output)
            check_finite(txt, "T5", self.dtype)
            parts.texts[key] = EncodedText(txt, vec)
            if len(parts.texts) > KEPT_TEXTS:
                parts.texts.popitem(last=False)
        parts.texts.move_to_end(key)
        text = parts.texts[key]
        self._record({"clip.pooled": text.vec, "t5.hidden": text.txt})
        return text

    def _report_cut(self, clip: EncodedPrompt, t5: EncodedPrompt) -> None:
        reports = [clip.report, t5.report]
        if self.plan.strict_prompt:
            require_whole(reports)
        note = describe_cut(reports)
        if note is not None:
            self.notes.append(note)

    def _encode_with(self, role: str, ids: list[int], take: Callable[[Any], Tensor]) -> Tensor:
        """What `take` picks of an encoder's output, on the CPU; the encoder is freed, whatever happens."""
        encoder = self._network(role)
        try:
            with self.timings.stage("encode"), cancellable(encoder, self.cancel):
                return take(encoder(torch.tensor([ids], device=self.device))).cpu()
        finally:
            del encoder
            self.components.free(role)

    def _network(self, role: str) -> Any:
        with self.timings.stage("load"):
            return self.components.network(role, self.on_event, self.cancel)

    def _image_steps(self, text: EncodedText, first: int) -> Iterator[Step]:
        plan = self.plan
        transformer = self._network("transformer")
        noise = self._noise(first, min(self.images_at_once, plan.batch - first))
        txt, vec = text.txt.to(self.device, self.dtype), text.vec.to(self.device, self.dtype)
        latents_dtype = self.components.numerics.latents_dtype
        carried = self.dtype if latents_dtype == "model" else torch.float32
        state = State.new(txt, vec, noise.to(self.device, carried))
        times = get_schedule(plan.steps, plan.image_tokens if self.info.shift else None)
        self._record(
            {"noise": noise, "packed": state.img, "timesteps": torch.tensor(times, dtype=torch.float64)}
        )
        before = state.img
        loop = denoise(transformer, state, times, plan.guidance, latents_dtype)
        for index in range(plan.steps):
            start = time.perf_counter()
            self._record({f"step.{index}.latents": before})
            with cancellable(transformer, self.cancel):
                flow = next(loop)
            check_finite(flow.img, "the transformer", self.dtype, flow.index + 1)  # waits for a GPU to finish
            self._record({f"step.{index}.velocity": flow.velocity})
            before = flow.img
            yield self._finished(flow, first, time.perf_counter() - start)

    def _finished(self, flow: FlowStep, first: int, seconds: float) -> Step:
        """Reports one step of the loop."""
        plan = self.plan
        self.timings.add("denoise", seconds)
        latents = unpack(flow.img, plan.height, plan.width)  # [B,16,H/8,W/8]
        x0 = unpack(flow.x0, plan.height, plan.width)
        self._emit(Progress("denoise", flow.index + 1, plan.steps, seconds, first, plan.batch))
        if plan.preview_every is not None and (flow.index + 1) % plan.preview_every == 0:
            for offset in range(x0.shape[0]):
                picture = image.to_picture(preview_pixels(self.info, x0[offset]))
                self._emit(Preview(flow.index + 1, plan.steps, picture, first + offset))
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

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """latents [B,16,H/8,W/8] -> pictures [B,3,H,W] float32 in about -1..1, on the CPU."""
        vae = self._network("vae")
        pictures: list[Tensor] = []
        try:
            # TF32, which CUDA's convolutions use by default, is not float32.
            exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
            with self.timings.stage("decode"), cancellable(vae, self.cancel), exact:
                for part in latents.split(self.images_at_once):
                    decoded = vae.decode(part.to(self.device, self.dtype))
                    check_finite(decoded, "the autoencoder", self.dtype)
                    pictures += decoded.float().cpu().split(1)
                    self._emit(Progress("decode", len(pictures), latents.shape[0]))
        finally:
            del vae
            self.components.free("vae")
        return torch.cat(pictures)

    def results(self, latents: Tensor, pictures: Tensor) -> list[Result]:
        """One Result per image, each with its own seed."""
        files, weights = self.components.describe_files(), self.components.describe_weights()
        results = []
        for index, picture in enumerate(pictures):
            record = self.metadata(index)
            record["files"] = files
            record["weights"] = weights
            pixels = image.to_picture(picture, self.components.numerics.to_bytes)
            noise = self._noise(index, 1)[0]
            results.append(
                Result(pixels, record, latents[index], noise, list(self.notes), self.timings.seconds)
            )
        return results

    def metadata(self, index: int) -> dict[str, object]:
        """What repeats image `index`: settings, dtypes, numerics, versions. No paths."""
        plan, placement = self.plan, self.components.placement
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
            "batched": self.images_at_once,
            "numerics": self.components.numerics.name,
            "device": self.device.type,
            "dtype": dtype_name(placement.dtype),
            "stored_dtype_kept": sorted(placement.stored),
            "quantized": self.components.options.quantized,
            "versions": {
                "flux_sd": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "threads": torch.get_num_threads(),
            "processor": processor(),
        }

    def _emit(self, event: Progress | Preview) -> None:
        if self.on_event is not None:
            self.on_event(event)

    def _record(self, tensors: dict[str, Tensor]) -> None:
        if self.tap is not None:
            for name, tensor in tensors.items():
                self.tap(name, tensor)


def generate_flux(
    components: FluxComponents,
    request: GenerationRequest,
    on_event: OnEvent | None = None,
    cancel: CancelToken | None = None,
    tap: Tap | None = None,
) -> list[Result]:
    """All pictures of a request. Raises RequestError before a weight is read, NonFiniteError, Cancelled."""
    run = FluxRun(components, request, on_event, cancel, tap)
    finished = [step.latents for step in run.steps() if step.index + 1 == step.total]
    latents = torch.cat(finished).float().cpu()  # [batch,16,H/8,W/8]
    run._record({"latents": latents})
    pictures = run.decode(latents)
    run._record({"image": pictures})
    results = run.results(latents, pictures)
    if on_event is not None:
        on_event(Complete(results))
    return results


def preview_pixels(info: VersionInfo, x0: Tensor) -> Tensor:
    """Predicted clean latents [C,H/8,W/8] -> a soft picture [3,H,W] at full size, without the decoder."""
    small = preview_image(info, x0)[None]  # [1,3,H/8,W/8]
    return F.interpolate(small, scale_factor=8.0, mode="bilinear")[0]


def processor() -> str:
    """What decides the last bits of a CPU product: architecture and vector unit."""
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"

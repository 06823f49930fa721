"""Stable Diffusion: text, and a picture where one is given, to a picture. Floor 7.

Mirrors the Rust worker's `txt2img.rs`, `img2img.rs` and `inpaint.rs`, and Candle's stable-diffusion example;
the order of operations is that of diffusers' pipelines. Papers: Rombach et al. 2022; Ho and Salimans 2022
(guidance); Meng et al. 2022 (beginning from a picture).

Noise comes from one generator per image, seeded with seed + i, on the CPU in float32: first the noise that
the run begins with, then, for samplers that add noise, one draw at each step. A picture to begin from is
encoded to the mean of the autoencoder's distribution, which draws nothing: a seed begins with the same noise
with a picture and without. (diffusers draws a sample there.) What a request means, and which rules hold for
pictures and masks, stands in `sd_plan.py`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import image
from .clip import ClipOutput
from .request import CancelToken, GenerationRequest, Result, Step
from .schedulers import Sampler, make_sampler
from .schedulers.sampler import METHODS
from .sd_loader import Diffusion, LoadedSd
from .sd_plan import first_step, latent_shape, plan_sd
from .stages import Stages, Tap
from .steps import NoiseSource, OnEvent, cancellable, check_finite, check_latents
from .versions import VersionInfo, configs_of

CLIP_LENGTH = 77
NAMES = {"clip": "CLIP", "clip_2": "CLIP 2"}


class SdText(NamedTuple):
    """Prompts as the UNet reads them, on the CPU: the negative one first where the run is guided."""

    context: Tensor  # [1 or 2, 77, D]
    pooled: Tensor | None  # [1 or 2, P]; XL's


class Original(NamedTuple):
    """A picture to begin from, as the loop reads it: float32, on the device."""

    latents: Tensor | None  # [1,C,H/8,W/8]; None where the run begins with noise and the UNet keeps the rest
    mask: Tensor | None  # [1,1,H/8,W/8]; 1: repaint, 0: keep
    masked: Tensor | None  # [1,C,H/8,W/8]; of the picture with grey under the mask, for a UNet that reads it


class SdRun:
    """One request on one model: its stages, its notes and its clock."""

    def __init__(
        self,
        loaded: LoadedSd,
        request: GenerationRequest,
        on_event: OnEvent | None = None,
        cancel: CancelToken | None = None,
        tap: Tap | None = None,
    ) -> None:
        components, self.diffusion = loaded
        self.components, self.info = components, components.info
        request = as_configured(self.diffusion, self.info, request)
        self.plan = plan = plan_sd(self.info, request, components.numerics)
        self.stages = Stages(components, on_event, cancel, tap)
        self.stages.notes += plan.notes
        self.images_at_once = self.stages.images_at_once(plan.batch, plan.batched)
        self.total = len(self.sampler().timesteps)  # raises for a prediction that does not go with the rest
        self.start = first_step(self.total, plan.strength)
        self.original: Original | None = None  # known once `steps` has begun
        images = {"unet": self.images_at_once * (2 if plan.guided else 1), "vae": self.images_at_once}
        self.stages.check_room((plan.width, plan.height), CLIP_LENGTH, images, plan.vae_tiling)

    def sampler(self) -> Sampler:
        """A fresh one, without history."""
        plan, diffusion = self.plan, self.diffusion
        return make_sampler(
            plan.sampler,
            diffusion.noise,
            plan.schedule,
            plan.steps,
            diffusion.prediction,
            ratio=self.components.numerics.stride,
        )

    def steps(self) -> Iterator[Step]:
        """Yields after each step of each image (of all at once, when batched); nothing at strength 0."""
        ids = self.read_prompts()
        self.original = self.look()
        if self.start == self.total:
            return
        text = self.encode(ids)
        try:
            for first in range(0, self.plan.batch, self.images_at_once):
                yield from self._image_steps(text, first)
        finally:  # also where the run fails, is cancelled or is left before its end
            self.components.free("unet")

    @torch.inference_mode()
    def look(self) -> Original | None:
        """The request's picture and mask through the autoencoder; None where nothing of them is wanted."""
        picture, mask = self.plan.init_image, self.plan.mask
        if picture is None or (mask is None and self.start == 0):
            return None
        wanted, pixels = {}, image.to_unit(picture)[None]  # [1,3,H,W]
        if self.start > 0 or not self.info.is_inpainting:
            wanted["init.latents"] = pixels
        if mask is not None and self.info.is_inpainting:
            wanted["masked.latents"] = pixels * (mask < 0.5)  # grey where it is to be repainted
        self.stages.record({"init.image": pixels})
        latents = dict(zip(wanted, self.stages.encode_pictures(list(wanted.values())), strict=True))
        if mask is not None:
            rows = latent_shape(self.info, self.plan)[1:]
            latents["mask"] = F.interpolate(mask[None], size=rows, mode="nearest").to(self.stages.device)
        self.stages.record(latents)
        return Original(*map(latents.get, ("init.latents", "mask", "masked.latents")))

    # ----------------------------------------------------------------------------------- text

    def read_prompts(self) -> dict[str, Tensor]:
        """Token ids [1,77] by branch and encoder, such as "uncond.clip_2.ids"; what was cut is noted. Raises
        PromptTooLongError where the request is strict.

        A negative prompt that is not given is the empty one, but for XL: there it is zeros, and no branch.
        """
        plan, stages, tokenizers = self.plan, self.stages, self.components.tokenizers
        branches = {"": plan.prompt}
        if plan.guided and not self._zeros:
            branches = {"uncond.": plan.negative_prompt or "", **branches}
        encoded = {
            branch: {role: tokenizers[role].encode(prompt, CLIP_LENGTH) for role in self._encoders}
            for branch, prompt in branches.items()
        }
        reports = {
            prompt: [part.report for part in encoded[branch].values()] for branch, prompt in branches.items()
        }
        stages.read_prompts(reports, plan.strict_prompt)
        ids = {
            f"{branch}{role}.ids": torch.tensor([part.ids])
            for branch, parts in encoded.items()
            for role, part in parts.items()
        }
        stages.record(ids)
        return ids

    @property
    def _zeros(self) -> bool:
        """Whether zeros stand for the negative prompt."""
        return self.plan.guided and self.plan.negative_prompt is None and self.info.is_xl

    @torch.inference_mode()
    def encode(self, ids: Mapping[str, Tensor]) -> SdText:
        """The prompts through the text encoders, each loaded and freed in turn; remembered by the prompts."""
        plan = self.plan
        key = (plan.prompt, plan.negative_prompt, plan.guided)
        text = self.stages.remembered(key, lambda: self._encode(ids))
        self._record_text(text)
        return text

    @property
    def _encoders(self) -> list[str]:
        return [role for role in ("clip", "clip_2") if role in self.components.roles]

    def _encode(self, ids: Mapping[str, Tensor]) -> SdText:
        """ids by branch and encoder [1,77] -> the text of all branches, the negative one first."""
        branches = ["uncond.", ""] if self.plan.guided and not self._zeros else [""]
        outputs: dict[str, list[ClipOutput]] = {branch: [] for branch in branches}
        for role in self._encoders:
            wanted = [ids[f"{branch}{role}.ids"].to(self.stages.device) for branch in branches]
            # One prompt at a time: a product with one row and one with two differ in the last bits.
            made = self.stages.alone(role, "encode", lambda clip: [clip(row) for row in wanted])  # noqa: B023
            for branch, output in zip(branches, made, strict=True):
                for part in filter(torch.is_tensor, output):
                    check_finite(part, NAMES[role], self.components.dtype_of(role))
                outputs[branch].append(output)
        hidden = self.components.numerics.sdxl_hidden
        context = torch.cat([text_states(output, hidden) for output in outputs.values()]).cpu()  # [R,77,D]
        last = [output[-1].projected for output in outputs.values()]
        pooled = torch.cat([row for row in last if row is not None]).cpu() if self.info.is_xl else None
        if self._zeros:
            context = torch.cat([torch.zeros_like(context), context])
            pooled = None if pooled is None else torch.cat([torch.zeros_like(pooled), pooled])
        return SdText(context, pooled)

    def _record_text(self, text: SdText) -> None:
        branches = ("uncond.", "") if self.plan.guided else ("",)
        for row, branch in enumerate(branches):
            self.stages.record({f"{branch}clip.hidden": text.context[row : row + 1]})
            if text.pooled is not None:
                self.stages.record({f"{branch}clip.pooled": text.pooled[row : row + 1]})

    # ----------------------------------------------------------------------------------- steps

    def _image_steps(self, text: SdText, first: int) -> Iterator[Step]:
        plan, stages, sampler = self.plan, self.stages, self.sampler()
        unet = stages.network("unet")
        source = self._source(first, min(self.images_at_once, plan.batch - first))
        noise = self._noise(source, first)
        x = self._begin(sampler, noise)
        conditioning = self._conditioning(text, len(noise))
        stages.record({"noise": noise, "timesteps": sampler.timesteps})
        for index in range(self.start, self.total):
            start, number = time.perf_counter(), index - self.start
            stages.record({f"step.{number}.latents": x})
            with cancellable(unet, stages.cancel):
                predicted = self._predict(unet, sampler, x, index, conditioning)
            check_finite(predicted, "the UNet", stages.dtype, number + 1)  # waits for a GPU to finish
            stages.record({f"step.{number}.noise_pred": predicted})
            fresh = source.draw().to(stages.device) if sampler.needs_noise else None
            x, x0 = self._advance(sampler, predicted, index, x, noise, fresh)
            check_finite(x, "the sampler", torch.float32, number + 1)
            sigma = sampler.levels.sigmas[index + 1]
            step = Step(number, self.total - self.start, sigma, x, x0, first, plan.batch)
            yield stages.finish(step, time.perf_counter() - start, plan.preview_every)

    def _source(self, first: int, count: int) -> NoiseSource:
        seed = self.plan.seed + first
        return NoiseSource(range(seed, seed + count), latent_shape(self.info, self.plan))

    def _noise(self, source: NoiseSource, first: int) -> Tensor:
        """[B,C,H/8,W/8] unit noise to begin with, on the CPU: the source's first, or the request's own.

        The first draw is made either way, so that the noise of later steps is the same.
        """
        drawn, plan = source.draw(), self.plan
        if plan.latents is None:
            return drawn
        given = check_latents(plan.latents, plan.batch, latent_shape(self.info, plan))
        return given[first : first + len(drawn)]

    def _begin(self, sampler: Sampler, noise: Tensor) -> Tensor:
        """The state before the first step: noise alone, or the picture noised to that step's level. At
        strength 1 nothing of the picture is in it."""
        noise = noise.to(self.stages.device)
        if self.original is None or self.original.latents is None or self.start == 0:
            return noise * sampler.init_scale
        return sampler.add_noise(self.original.latents, noise, self.start)

    def _conditioning(self, text: SdText, images: int) -> Conditioning:
        """What the UNet reads beside the latents, in its dtype, a row for each image of each branch."""
        device, dtype = self.stages.device, self.stages.dtype
        context = text.context.repeat_interleave(images, dim=0).to(device, dtype)  # [RB,77,D]
        if text.pooled is None or self.components.config("unet").added_dim is None:
            return Conditioning(context, None, None)
        pooled = text.pooled.repeat_interleave(images, dim=0).to(device, dtype)  # [RB,P]
        height, width = self.plan.height, self.plan.width
        sizes = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=device)
        return Conditioning(context, pooled, sizes.expand(len(context), -1))

    @torch.inference_mode()
    def _predict(self, unet: Any, sampler: Sampler, x: Tensor, index: int, given: Conditioning) -> Tensor:
        """x [B,C,h,w] before step `index` -> what the network predicts there, guided, float32."""
        seen = sampler.scale_input(x, index)
        original = self.original
        if original is not None and original.masked is not None and original.mask is not None:
            rest = torch.cat([original.mask, original.masked], dim=1).expand(len(x), -1, -1, -1)
            seen = torch.cat([seen, rest], dim=1)  # [B,9,h,w]
        branches = len(given.context) // len(x)
        rows = seen.repeat(branches, 1, 1, 1).to(self.stages.dtype)  # [RB,4 or 9,h,w]
        time_now = torch.full((len(rows),), sampler.levels.times[index], device=rows.device)
        output = unet(rows, time_now, *given).float()
        if branches == 1:
            return output
        uncond, cond = output.chunk(2)
        assert self.plan.guidance is not None
        return guide(uncond, cond, self.plan.guidance, self.plan.guidance_rescale or 0.0)

    @torch.inference_mode()
    def _advance(
        self, sampler: Sampler, predicted: Tensor, index: int, x: Tensor, noise: Tensor, fresh: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The state after step `index`, and the clean latents predicted there. To a network that knows
        nothing of masks, what is to be kept is given back: the picture, noised to the level of the next step
        by the noise that the run began with, as diffusers does."""
        after, x0 = sampler.step(predicted, index, x, fresh)
        clean, mask, masked = self.original or Original(None, None, None)
        if clean is not None and mask is not None and masked is None:
            kept = sampler.add_noise(clean, noise.to(after.device), index + 1)
            after = (1 - mask) * kept + mask * after
        return after, x0

    # --------------------------------------------------------------------------------- results

    def generate(self) -> list[Result]:
        """All pictures of the request."""
        finished = [step.latents for step in self.steps() if step.index + 1 == step.total]
        if not finished:  # strength 0
            assert self.original is not None and self.original.latents is not None
            finished = [self.original.latents.expand(self.plan.batch, -1, -1, -1)]
        plan, original = self.plan, None
        if plan.composite and plan.init_image is not None and plan.mask is not None:
            original = plan.init_image, plan.mask
        return self.stages.results(
            finished,
            self.images_at_once,
            original,
            self.metadata,
            lambda i: self._noise(self._source(i, 1), i)[0],
        )

    def metadata(self, index: int) -> dict[str, object]:
        """What repeats image `index`: settings, dtypes, numerics, versions; pictures by their pixels' hash.
        No paths."""
        plan = self.plan
        return {
            "prompt": plan.prompt,
            "negative_prompt": plan.negative_prompt,
            "model": self.info.key,
            "seed": plan.seed + index,
            "width": plan.width,
            "height": plan.height,
            "steps": plan.steps,
            "guidance": plan.guidance,
            "guidance_rescale": plan.guidance_rescale,
            "sampler": plan.sampler,
            "schedule": plan.schedule,
            "prediction": self.diffusion.prediction,
            "strength": plan.strength,
            "steps_run": self.total - self.start,
            "zero_terminal_snr": self.diffusion.noise.zero_terminal_snr,
            "init_image": plan.hashes.get("init_image"),
            "mask": plan.hashes.get("mask"),
            "fit": plan.fit,
            "composite": plan.composite if plan.mask is not None else None,
            "latents": "from the seed" if plan.latents is None else "given",
            **self.stages.settings(self.images_at_once),
        }


class Conditioning(NamedTuple):
    """What the UNet reads beside latents and time, in the order of its arguments."""

    context: Tensor  # [RB,77,D]
    pooled: Tensor | None  # [RB,P]
    sizes: Tensor | None  # [RB,6] original, crop, target; height before width


def text_states(outputs: Sequence[ClipOutput], hidden: Literal["penultimate", "last"]) -> Tensor:
    """What a UNet reads of its text encoders [1,77,D]. A single one: the last state behind the final norm
    (the encoder of SD 2 lacks the layer that would follow). XL's two: `hidden` of both, side by side."""
    if len(outputs) == 1 or hidden == "last":
        return torch.cat([output.last_hidden_state for output in outputs], dim=-1)
    return torch.cat([output.penultimate for output in outputs], dim=-1)


def guide(uncond: Tensor, cond: Tensor, guidance: float, rescale: float = 0.0) -> Tensor:
    """Classifier-free guidance [B,C,h,w]: beyond the prompt's prediction, away from the negative prompt's.

    rescale: how much of the way back to the spread of the prompt's own prediction (Lin et al. 2023, section
    3.4).
    """
    guided = uncond + guidance * (cond - uncond)
    if rescale == 0.0:
        return guided
    spread, wanted = (part.std(dim=(1, 2, 3), keepdim=True) for part in (guided, cond))
    return rescale * (guided * (wanted / spread)) + (1 - rescale) * guided


def as_configured(diffusion: Diffusion, info: VersionInfo, request: GenerationRequest) -> GenerationRequest:
    """The request with the schedule that the model's own config names, where it names none itself and its
    sampler takes it: models with zero terminal SNR, for one, have to begin at the last training step."""
    sampler = request.sampler or configs_of(info).sampler
    takes = sampler in METHODS and diffusion.schedule in METHODS[sampler].schedules
    return replace(request, schedule=diffusion.schedule) if request.schedule is None and takes else request


def generate_sd(
    loaded: LoadedSd,
    request: GenerationRequest,
    on_event: OnEvent | None = None,
    cancel: CancelToken | None = None,
    tap: Tap | None = None,
) -> list[Result]:
    """All pictures of a request. Raises RequestError before a weight is read, NonFiniteError, Cancelled."""
    return SdRun(loaded, request, on_event, cancel, tap).generate()

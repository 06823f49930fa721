"""What a run consists of, family by family, known before anything is loaded: which networks are called, how
often, and what is tapped between them. Floor 8.

The names are those of records (`flux-sd trace`). `outline_alone` says the same of one network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from .flux_editing import to_encode
from .flux_generation import FluxPlan, plan_flux, times_of
from .model_files import layout_of
from .numerics import Numerics
from .request import GenerationRequest
from .schedulers import PREDICTIONS, NoiseSchedule, make_sampler
from .sd_generation import guide
from .sd_plan import SdPlan, first_step, plan_sd
from .stage_inputs import TRANSFORMER_INPUTS, UNET_INPUTS, StageInputs
from .versions import VersionInfo

NOTHING: Mapping[str, Any] = {}
ENCODER, DECODER = ("encoder", "quant_conv"), ("decoder", "post_quant_conv")  # parts of the autoencoder


class Taps(NamedTuple):
    """Tensors that no module returns, in the order in which they are recorded."""

    names: tuple[str, ...]


class Call(NamedTuple):
    """One call of a network, or of some of its parts. What its modules return is recorded behind `prefix`."""

    role: str
    prefix: str
    parts: tuple[str, ...] = ()  # its submodules that run; empty: all
    inputs: tuple[str, ...] = ()  # arguments that are recorded as prefix + "inputs." + name
    output: str | None = None  # name behind the prefix of what the whole network returns; None: it is tapped

    def covers(self, path: str) -> bool:
        """Whether a submodule runs in it."""
        return not self.parts or path.partition(".")[0] in self.parts


Outline = list[Taps | Call]


def outline(info: VersionInfo, request: GenerationRequest, numerics: Numerics) -> Outline:
    """A run of one picture, in its order. Raises RequestError for a request that the version cannot serve."""
    return OUTLINES[info.family](info, request, numerics)


def _flux(info: VersionInfo, request: GenerationRequest, numerics: Numerics) -> Outline:
    plan = plan_flux(info, request, numerics)
    made: Outline = [Taps(("clip.ids", "t5.ids")), *_flux_pictures(info, plan)]
    total = len(times_of(info, plan)) - 1
    if total > 0:
        made += [Call("clip", "clip."), Call("t5", "t5.")]
        made += [Taps(("clip.pooled", "t5.hidden", "noise", "packed", "timesteps"))]
    for step in range(total):
        made += [
            Taps((f"step.{step}.latents",)),
            _transformer_call(info, step),
            Taps((f"step.{step}.velocity",)),
        ]
    return made + _decoded(request)


def _flux_pictures(info: VersionInfo, plan: FluxPlan) -> Outline:
    """What goes through the encoder of the autoencoder."""
    wanted = to_encode(info, plan.canvas, plan.strength)
    kinds = [name.removesuffix("latents") for name in wanted]
    calls = [] if plan.vae_tiling else [Call("vae", f"{kind}vae.", ENCODER) for kind in kinds]
    return [Taps(tuple(f"{kind}image" for kind in kinds)), *calls, Taps(tuple(wanted))] if wanted else []


def _transformer_call(info: VersionInfo, step: int) -> Call:
    inputs = TRANSFORMER_INPUTS if info.guidance is not None else TRANSFORMER_INPUTS[:-1]
    return Call("transformer", f"step.{step}.", inputs=inputs)


def _sd(info: VersionInfo, request: GenerationRequest, numerics: Numerics) -> Outline:
    plan = plan_sd(info, request, numerics)
    # Of any released noise and prediction: the model's own change no count.
    noise, prediction = NoiseSchedule.scaled_linear(), PREDICTIONS[0]
    sampler = make_sampler(
        plan.sampler, noise, plan.schedule, plan.steps, prediction, ratio=numerics.stride
    )  # fmt: skip
    total = len(sampler.timesteps)
    start = first_step(total, plan.strength)
    encoders = [role for role in ("clip", "clip_2") if role in layout_of(info).maps]
    # XL's negative text is zeros where none is given: no encoder makes it.
    zeros = plan.negative_prompt is None and info.is_xl
    branches = ("uncond.", "") if plan.guided and not zeros else ("",)
    made: Outline = [Taps(tuple(f"{branch}{role}.ids" for branch in branches for role in encoders))]
    made += _sd_pictures(info, plan, begins_noised=start > 0)
    if start < total:
        made += [Call(role, f"{branch}{role}.") for role in encoders for branch in branches]
        states = ("clip.hidden", "clip.pooled") if info.is_xl else ("clip.hidden",)
        branches = ("uncond.", "") if plan.guided else ("",)
        made += [Taps((*(f"{branch}{name}" for branch in branches for name in states), "noise", "timesteps"))]
    for step in range(total - start):
        call = _unet_call(info, numerics, step)
        made += [Taps((f"step.{step}.latents",)), call, Taps((f"step.{step}.noise_pred",))]
    return made + _decoded(request)


def _sd_pictures(info: VersionInfo, plan: SdPlan, begins_noised: bool) -> Outline:
    """What goes through the encoder of the autoencoder. begins_noised: whether the run begins from a picture
    with noise on it, and not from noise alone."""
    if plan.init_image is None or not (begins_noised or plan.mask is not None):
        return []
    encoded = {"init.": begins_noised or not info.is_inpainting, "masked.": info.is_inpainting}
    wanted = [kind for kind, is_wanted in encoded.items() if is_wanted]
    calls = [] if plan.vae_tiling else [Call("vae", f"{kind}vae.", ENCODER) for kind in wanted]
    latents = [f"{kind}latents" for kind in wanted]
    return [Taps(("init.image",)), *calls, Taps((*latents, *["mask"] * (plan.mask is not None)))]


def _unet_call(info: VersionInfo, numerics: Numerics, step: int) -> Call:
    added = info.is_xl and numerics.sdxl_added
    inputs = UNET_INPUTS if added else UNET_INPUTS[:-2]
    return Call("unet", f"step.{step}.", inputs=inputs, output="output")


def _decoded(request: GenerationRequest) -> Outline:
    """In tiles, the layers of the autoencoder are called piece by piece: nothing in it is recorded."""
    inside: Outline = [] if request.vae_tiling else [Call("vae", "vae.", DECODER)]
    return [Taps(("latents",)), *inside, Taps(("image", "pixels"))]


OUTLINES: Mapping[str, Callable[[VersionInfo, GenerationRequest, Numerics], Outline]] = {
    "flux": _flux,
    "sd": _sd,
}


# what Candle records ----------------------------------------------------------------------------------------

# Families' names in the records of `candle_reference run` (tools/candle_reference/src/run), and the tensors
# of ours that lie there one behind the other; * stands for a number.
COMMON = ("noise", "timesteps", "step.*.latents", "latents", "image", "pixels")
CANDLE: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "flux": {
        name: (name,)
        for name in ("t5.ids", "t5.hidden", "clip.ids", "clip.pooled", "packed", "step.*.velocity", *COMMON)
    },
    "sd": {
        "ids": ("uncond.clip.ids", "clip.ids"),
        "ids_2": ("uncond.clip_2.ids", "clip_2.ids"),
        "hidden": ("uncond.clip.hidden", "clip.hidden"),
        **{name: (name,) for name in ("step.*.noise_pred", *COMMON)},
    },
}


# one network alone ------------------------------------------------------------------------------------------


class Alone(NamedTuple):
    """How one network runs alone: on what, and which of the run's tapped tensors its output makes."""

    role: str
    given: tuple[str, ...] = ()  # its arguments as tapped before it; empty: the call records its inputs
    parts: tuple[str, ...] = ()  # see Call
    method: str = "__call__"  # of the network
    made: Mapping[str, Callable[[Any, StageInputs], Tensor]] = NOTHING  # tapped after it; {step} is the step
    behind: str = ""  # before the network's name, in the names of what its modules return


def _plain(output: Any, _: StageInputs) -> Tensor:
    made: Tensor = output
    return made


def _float(output: Tensor, _: StageInputs) -> Tensor:
    return output.float()


def _guided(output: Tensor, inputs: StageInputs) -> Tensor:
    """What the sampler is given: the prediction, guided where the file or the command says how much."""
    guidance, rescale = inputs.guidance_of_run()
    if guidance is None or guidance <= 1.0:
        return output.float()
    uncond, cond = output.float().chunk(2)
    return guide(uncond, cond, guidance, rescale)


AUTOENCODER = {
    "vae-encode": Alone("vae", ("init.image",), ENCODER, "encode", {"init.latents": _float}, "init."),
    "vae-decode": Alone("vae", ("latents",), DECODER, "decode", {"image": _float}),
}
FLUX_ALONE = {
    "clip": Alone("clip", ("clip.ids",), made={"clip.pooled": lambda output, _: output.pooled}),
    "t5": Alone("t5", ("t5.ids",), made={"t5.hidden": _plain}),
    "transformer": Alone("transformer", made={"step.{step}.velocity": _float}),
    **AUTOENCODER,
}
SD_ALONE = {
    "clip": Alone("clip", ("clip.ids",), made={"clip.hidden": lambda output, _: output.last_hidden_state}),
    "unet": Alone("unet", made={"step.{step}.noise_pred": _guided}),
    **AUTOENCODER,
}
# The states of XL's two encoders are read side by side, which neither has alone.
SDXL_ALONE = {
    **SD_ALONE,
    "clip": Alone("clip", ("clip.ids",)),
    "clip_2": Alone("clip_2", ("clip_2.ids",), made={"clip.pooled": lambda output, _: output.projected}),
}
STAGES = tuple(dict.fromkeys([*FLUX_ALONE, *SDXL_ALONE]))


def alone(info: VersionInfo) -> Mapping[str, Alone]:
    """The networks of a version that can run alone, by the names that the command line gives them."""
    roles = layout_of(info).maps
    return next(t for t in (SDXL_ALONE, SD_ALONE, FLUX_ALONE) if {row.role for row in t.values()} == {*roles})


def outline_alone(info: VersionInfo, stage: str, numerics: Numerics, step: int = 0) -> Outline:
    """One network alone, as `outline`. step: the denoiser's."""
    row = alone(info)[stage]
    return [Taps(row.given), _call_of(info, row, numerics, step), Taps(tuple(names_made(row, step)))]


def _call_of(info: VersionInfo, row: Alone, numerics: Numerics, step: int) -> Call:
    match row.role:
        case "transformer":
            return _transformer_call(info, step)
        case "unet":
            return _unet_call(info, numerics, step)
        case role:
            return Call(role, f"{row.behind}{role}.", row.parts)


def names_made(row: Alone, step: int) -> Iterator[str]:
    """What is tapped after a network that ran alone."""
    return (name.format(step=step) for name in row.made)

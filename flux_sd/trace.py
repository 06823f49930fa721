"""Records named activations of a run into one safetensors file, as they occur. Floor 9.

A stage is anything that can be recorded: what generation taps (ids, text states, noise, latents, velocities,
picture), what the transformer is given at each step, and what any submodule of a network returns, named by
the module's path: `clip.text_model.encoder.layers.0`, `t5.encoder.block.3`, `step.0.double_blocks.1.img`,
`vae.decoder.up.2`. Forward hooks see the submodules; a run that nobody traces has none.

The tapped names are those that Candle's reference program writes (tools/candle_reference, command `run`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from . import image
from .clip import ClipEncoder, ClipTextTransformer
from .errors import NonFiniteError, RequestError
from .flux_files import MAPS
from .flux_loader import FluxComponents, build
from .flux_mmdit import DoubleStreamBlock, Modulation, ModulationOut, QKNorm
from .model_loader import LoadedModel
from .numerics import reference
from .record_file import RecordWriter
from .request import CancelToken, GenerationRequest, Result
from .stage_inputs import TRANSFORMER_INPUTS, StageInputs
from .steps import OnEvent, cancellable, check_finite, dtype_name
from .version import __version__
from .versions import VersionInfo

# What is recorded unless patterns say otherwise, besides all that is no submodule. `*` is one part of a path.
BLOCKS: Mapping[str, Sequence[str]] = {
    "clip": ("text_model.embeddings", "text_model.encoder.layers.*", "text_model.final_layer_norm"),
    "t5": ("shared", "encoder.block.*", "encoder.final_layer_norm"),
    "transformer": ("*_in", "double_blocks.*", "single_blocks.*", "final_layer"),
    "vae": ("decoder.conv_in", "decoder.mid.*", "decoder.up.*.block.*", "decoder.up.*", "decoder.*_out"),
}
DEFAULT = "default"  # the pattern that stands for those
# What `candle_reference run` writes (tools/candle_reference/src/run/flux.rs).
CANDLE = (
    "t5.ids", "t5.hidden", "clip.ids", "clip.pooled", "noise", "packed", "timesteps",
    "step.*.latents", "step.*.velocity", "latents", "image", "pixels",
)  # fmt: skip
# Networks that run alone, and the component that each is.
STAGES: Mapping[str, str] = {"clip": "clip", "t5": "t5", "transformer": "transformer", "vae-decode": "vae"}
# What is tapped before and after a network; the transformer's names have the step in them.
ENDS = {"clip": ("clip.ids", "clip.pooled"), "t5": ("t5.ids", "t5.hidden"), "vae": ("latents", "image")}
HEADER_BYTES = 160  # of a tensor in the header of a file, besides its name


class Stage(NamedTuple):
    """One tensor that can be recorded."""

    name: str  # in the file
    module: str  # the name without the part of a module's output, if it has several
    default: bool  # whether it is recorded where no pattern is given


@dataclass(frozen=True)
class Selection:
    """Which stages to record: those that any pattern matches. `*` in a pattern matches dots too."""

    patterns: tuple[str, ...] = (DEFAULT,)

    def takes(self, stage: Stage) -> bool:
        return any(self._matches(pattern, stage) for pattern in self.patterns)

    def check(self, known: Sequence[Stage]) -> None:
        """Raises RequestError for a pattern that selects nothing."""
        for pattern in self.patterns:
            if not any(self._matches(pattern, stage) for stage in known):
                raise RequestError(
                    f"no stage of this run matches {pattern!r}: `flux-sd trace --list` shows them, "
                    "`--list --stages '*'` shows all"
                )

    @staticmethod
    def _matches(pattern: str, stage: Stage) -> bool:
        if pattern == DEFAULT:
            return stage.default
        return fnmatchcase(stage.name, pattern) or fnmatchcase(stage.module, pattern)


# ------------------------------------------------------------------------------------------ names


def stages(info: VersionInfo, steps: int) -> Iterator[Stage]:
    """Every stage of a run, from networks without weights; nothing is loaded or computed.

    In the order of a run, but for the modules inside a network, which come in the order of its parameters.
    """
    networks = {role: build(role, info, reference()) for role in MAPS}
    yield from tapped("clip.ids", "t5.ids")
    yield from _inside("clip", "clip.", networks["clip"])
    yield from _inside("t5", "t5.", networks["t5"])
    yield from tapped("clip.pooled", "t5.hidden", "noise", "packed", "timesteps")
    for step in range(steps):
        yield from tapped(f"step.{step}.latents")
        yield from _call(info, step, networks["transformer"])
    yield from tapped("latents")
    yield from _inside("vae", "vae.", networks["vae"])
    yield from tapped("image", "pixels")


def stages_of(stage: str, info: VersionInfo, step: int = 0) -> Iterator[Stage]:
    """Every stage of one network that runs alone, a key of STAGES; as `stages`. step: the transformer's."""
    role = STAGES[stage]
    network = build(role, info, reference())
    if role == "transformer":
        yield from _call(info, step, network)
        return
    given, made = ENDS[role]
    yield from tapped(given)
    yield from _inside(role, f"{role}.", network)
    yield from tapped(made)


def _call(info: VersionInfo, step: int, transformer: nn.Module) -> Iterator[Stage]:
    given = TRANSFORMER_INPUTS if info.guidance is not None else TRANSFORMER_INPUTS[:-1]
    yield from tapped(*(f"step.{step}.inputs.{name}" for name in given))
    yield from _inside("transformer", f"step.{step}.", transformer)
    yield from tapped(f"step.{step}.velocity")


def tapped(*names: str) -> Iterator[Stage]:
    """Stages that are no submodule's output."""
    for name in names:
        yield Stage(name, name, True)


def _inside(role: str, prefix: str, network: nn.Module) -> Iterator[Stage]:
    for path, part in network.named_modules():
        # Of the autoencoder only the way from latents to pixels runs.
        if path and runs(part) and (role != "vae" or path.split(".")[0] in ("decoder", "post_quant_conv")):
            yield from _outputs(role, prefix, path, part)


def runs(part: nn.Module) -> bool:
    """Whether a module is called, and so has an output; lists of modules and holders of parts are not."""
    return type(part).forward is not nn.Module.forward


def _outputs(role: str, prefix: str, path: str, part: nn.Module) -> list[Stage]:
    """The stages that one call of `part` makes, in the order of `tensors_of` its output."""
    default = any(_same_parts(path, pattern) for pattern in BLOCKS[role])
    module = prefix + path
    return [Stage(f"{module}.{name}" if name else module, module, default) for name in output_names(part)]


def _same_parts(path: str, pattern: str) -> bool:
    parts, patterns = path.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def output_names(part: nn.Module) -> tuple[str, ...]:
    """Names of the tensors that a module returns; an empty one where there is only one."""
    if isinstance(part, DoubleStreamBlock):
        return ("img", "txt")
    if isinstance(part, Modulation):
        return tuple(f"{i}.{field}" for i in range(part.count) for field in ModulationOut._fields)
    if isinstance(part, QKNorm):
        return ("query", "key")
    if isinstance(part, ClipEncoder | ClipTextTransformer):
        return ("penultimate", "last")
    return ("",)


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors in what a module returned, from the first to the last."""
    if isinstance(output, Tensor):
        return [output]
    return [tensor for part in output for tensor in tensors_of(part)]


# ---------------------------------------------------------------------------------------- recording


@dataclass(frozen=True)
class Traced:
    """What was recorded where. `result` is the picture of a whole run."""

    path: Path
    tensors: int
    nbytes: int
    result: Result | None


class Recorder:
    """Writes what a selection takes: `tap` is called by generation, `watch` hangs hooks into networks."""

    def __init__(
        self, writer: RecordWriter, selection: Selection, like_candle: bool = False, step: int = 0
    ) -> None:
        """like_candle: values are written as Candle's program does. step: that of the transformer's first
        call."""
        self.writer, self.selection, self._like_candle = writer, selection, like_candle
        self._step = step - 1
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def tap(self, name: str, tensor: Tensor) -> None:
        """Records a tensor that no module returns."""
        self._record(Stage(name, name, True), tensor)

    def watch(self, role: str, network: nn.Module) -> None:
        """Hooks on every submodule; see LoadedModel.watch."""
        if role == "transformer":
            hook = network.register_forward_pre_hook(self._next_step, with_kwargs=True)
            self._hooks.append(hook)
        for path, part in network.named_modules():
            if path and runs(part):
                self._hooks.append(part.register_forward_hook(self._hook(role, path)))

    def close(self) -> None:
        """Takes the hooks off again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _next_step(self, _: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Before each call of the transformer."""
        self._step += 1
        inputs = {**dict(zip(TRANSFORMER_INPUTS, given, strict=False)), **named}
        for name, tensor in inputs.items():
            if tensor is not None:
                self.tap(f"step.{self._step}.inputs.{name}", tensor)

    def _hook(self, role: str, path: str) -> Callable[[nn.Module, Any, Any], None]:
        def record(part: nn.Module, _: Any, output: Any) -> None:
            prefix = f"step.{self._step}." if role == "transformer" else f"{role}."
            made = _outputs(role, prefix, path, part)
            for stage, tensor in zip(made, tensors_of(output), strict=True):
                self._record(stage, tensor)

        return record

    def _record(self, stage: Stage, tensor: Tensor) -> None:
        if self.selection.takes(stage):
            self.writer.add(stage.name, as_candle(stage.name, tensor) if self._like_candle else tensor)


def as_candle(name: str, tensor: Tensor) -> Tensor:
    """16-bit floats as float32; CLIP's ids up to the end token, for Candle gives CLIP no padding."""
    if name == "clip.ids":
        return tensor[:, : int(tensor[0].argmax()) + 1]  # the first of the highest id
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def trace(
    model: LoadedModel,
    request: GenerationRequest,
    path: str | Path,
    *,
    patterns: Sequence[str] = (DEFAULT,),
    like_candle: bool = False,
    overwrite: bool = False,
    on_event: OnEvent | None = None,
    cancel: CancelToken | None = None,
) -> Traced:
    """Paints one picture and records the stages that `patterns` select.

    like_candle: exactly the stages that `candle_reference run` writes, named and stored as there.
    The metadata is the picture's own record. Where a stage yields NaN, what was recorded until then is kept
    in the file, with the reason under "failed", and NonFiniteError is raised.
    """
    if request.batch != 1:
        raise RequestError(f"a trace is of one picture, not of {request.batch}: trace each from its own seed")
    selection = Selection(CANDLE if like_candle else tuple(patterns))
    steps = request.steps or model.defaults.steps or 1
    room = _room(selection, list(stages(model.version.info, steps)))

    def run(recorder: Recorder) -> tuple[dict[str, Any], Result]:
        with model.watch(recorder.watch):
            (result,) = model.generate(request, on_event=on_event, cancel=cancel, tap=recorder.tap)
        pixels = torch.from_numpy(np.array(result.image)).permute(2, 0, 1)[None]  # [H,W,3] -> [1,3,H,W]
        recorder.tap("pixels", pixels)
        return result.metadata, result

    about = {"model": model.version.info.key, "prompt": request.prompt, "seed": request.seed}
    return _write(path, overwrite, about, lambda w: Recorder(w, selection, like_candle), room, run)


def trace_stage(
    components: FluxComponents,
    stage: str,
    inputs: StageInputs,
    path: str | Path,
    *,
    guidance: float | None = None,
    patterns: Sequence[str] = (DEFAULT,),
    overwrite: bool = False,
    on_event: OnEvent | None = None,
    cancel: CancelToken | None = None,
) -> Traced:
    """Runs one network (a key of STAGES) on inputs from a file and records the stages that `patterns` select,
    under the names that a whole run gives them. Raises RequestError for inputs that do not fit."""
    role, selection = STAGES[stage], Selection(tuple(patterns))
    given = _inputs_of(role, inputs, guidance)
    room = _room(selection, list(stages_of(stage, components.info, inputs.step)))
    velocity = f"step.{inputs.step}.velocity"

    @torch.inference_mode()
    def run(recorder: Recorder) -> tuple[dict[str, Any], None]:
        if role != "transformer":  # whose inputs the hook records
            (tensor,) = given.values()
            recorder.tap(ENDS[role][0], tensor)
        try:
            with components.watch(recorder.watch):
                network = components.network(role, on_event, cancel)
                with cancellable(network, cancel):
                    output = _run_network(role, network, given, components)
        finally:
            components.free(role)
        recorder.tap(velocity if role == "transformer" else ENDS[role][1], output)
        check_finite(output, stage, components.placement.dtype)
        return {}, None

    about = {"stage": stage, **_settings(components)}
    return _write(path, overwrite, about, lambda w: Recorder(w, selection, step=inputs.step), room, run)


def _inputs_of(role: str, inputs: StageInputs, guidance: float | None) -> dict[str, Tensor]:
    if role == "transformer":
        return inputs.transformer(guidance)
    return {"latents": inputs.latents()} if role == "vae" else {"ids": inputs.ids(role)}


def _run_network(role: str, network: Any, given: Mapping[str, Tensor], parts: FluxComponents) -> Tensor:
    """As generation calls it: the same dtypes and the same output."""
    device, dtype = parts.placement.device, parts.placement.dtype
    if role == "clip":
        return network(given["ids"].to(device)).pooled.cpu()
    if role == "t5":
        return network(given["ids"].to(device)).cpu()
    if role == "vae":
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return network.decode(given["latents"].to(device, dtype)).float().cpu()
    exact = ("img_ids", "txt_ids", "timesteps", "guidance")  # float32 whatever the model's dtype
    arguments = {k: v.to(device, torch.float32 if k in exact else dtype) for k, v in given.items()}
    return network(**arguments).float()


def _settings(parts: FluxComponents) -> dict[str, Any]:
    placement = parts.placement
    return {
        "model": parts.info.key,
        "numerics": parts.numerics.name,
        "device": placement.device.type,
        "dtype": dtype_name(placement.dtype),
        "stored_dtype_kept": sorted(placement.stored),
        "versions": {"flux_sd": __version__, "torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "files": parts.describe_files(),
    }


def _room(selection: Selection, known: Sequence[Stage]) -> int:
    """Bytes that the header will need, roughly and rather too many. Raises RequestError, see Selection."""
    selection.check(known)
    return 16_384 + sum(HEADER_BYTES + len(stage.name) for stage in known if selection.takes(stage))


def _write(
    path: str | Path,
    overwrite: bool,
    about: Mapping[str, Any],
    recorder_for: Callable[[RecordWriter], Recorder],
    room: int,
    run: Callable[[Recorder], tuple[dict[str, Any], Result | None]],
) -> Traced:
    """Fills the file with what `run` records. The metadata is `about` and what `run` returns."""
    path = image.check_output(path, overwrite, ".safetensors")
    done: list[Traced | NonFiniteError] = []

    def write(file: BinaryIO) -> None:
        writer = RecordWriter(file, room)
        recorder = recorder_for(writer)
        try:
            settings, result = run(recorder)
            done.append(Traced(path, writer.count, writer.nbytes, result))
        except NonFiniteError as error:  # the record up to here shows where it began: it is kept
            settings = {"failed": str(error)}
            done.append(error)
        finally:
            recorder.close()
        writer.finish(_metadata({**about, **settings}))

    image.write_file(path, write, overwrite)
    if isinstance(done[0], NonFiniteError):
        raise done[0]
    return done[0]


def _metadata(settings: Mapping[str, Any]) -> dict[str, str]:
    """As safetensors has it, strings only: what is none is written as JSON."""
    texts = {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in settings.items()}
    return {"format": "pt", "flux_sd": __version__, **texts}

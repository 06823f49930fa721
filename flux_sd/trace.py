"""Records named activations of a run into one safetensors file, as they occur. Floor 9.

A stage is anything that can be recorded: what generation taps (ids, text states, noise, latents, predictions,
picture), what the denoiser is given at each step, and what any submodule of a network returns, named by the
module's path: `clip.text_model.encoder.layers.0`, `t5.encoder.block.3`, `step.0.double_blocks.1.img`,
`step.0.mid_block.attentions.0`, `vae.decoder.up.2`. Forward hooks see the submodules; a run that nobody
traces has none. Which there are, and in which order, says `outline.py`.

With `like_candle`, names and shapes are those that Candle's reference program writes
(tools/candle_reference, command `run`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from . import image
from .clip import ClipEncoder, ClipTextTransformer
from .components import Components
from .errors import NonFiniteError, RequestError
from .flux_mmdit import DoubleStreamBlock, Modulation, ModulationOut, QKNorm
from .model_loader import FAMILIES, LoadedModel
from .numerics import Numerics
from .outline import CANDLE, Alone, Call, Outline, Taps, alone, outline, outline_alone
from .record_file import RecordWriter
from .request import CancelToken, GenerationRequest, Result
from .stage_inputs import StageInputs
from .steps import OnEvent, cancellable, check_finite, dtype_name
from .unet import DownBlock
from .version import __version__
from .versions import VersionInfo

CLIP_BLOCKS = ("text_model.embeddings", "text_model.encoder.layers.*", "text_model.final_layer_norm")
# What is recorded unless patterns say otherwise, besides all that is no submodule. `*` is one part of a path.
BLOCKS: Mapping[str, Sequence[str]] = {
    "clip": CLIP_BLOCKS,
    "clip_2": (*CLIP_BLOCKS, "text_projection"),
    "t5": ("shared", "encoder.block.*", "encoder.final_layer_norm"),
    "transformer": ("*_in", "double_blocks.*", "single_blocks.*", "final_layer"),
    "unet": (
        "conv_*", "*_embedding", "mid_block.*.*", *(f"{way}_blocks.*.{part}.*" for way in ("down", "up")
        for part in ("resnets", "attentions", f"{way}samplers")),
    ),
    "vae": tuple(
        pattern
        for side, way in (("encoder", "down"), ("decoder", "up"))
        for pattern in (f"{side}.conv_*", f"{side}.mid.*", f"{side}.{way}.*.block.*", f"{side}.{way}.*")
    ),
}  # fmt: skip
DEFAULT = "default"  # the pattern that stands for those
EXACT = ("img_ids", "txt_ids", "timesteps", "guidance", "sizes")  # float32 whatever the model's dtype
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

    def names(self, known: Sequence[Stage]) -> list[str]:
        """Those that are taken. Raises RequestError, see `check`."""
        self.check(known)
        return [stage.name for stage in known if self.takes(stage)]

    @staticmethod
    def _matches(pattern: str, stage: Stage) -> bool:
        if pattern == DEFAULT:
            return stage.default
        return fnmatchcase(stage.name, pattern) or fnmatchcase(stage.module, pattern)


# ------------------------------------------------------------------------------------------ names


def stages(info: VersionInfo, request: GenerationRequest, numerics: Numerics) -> Iterator[Stage]:
    """Every stage of a run, from networks without weights; nothing is loaded or computed.

    In the order of a run, but for the modules inside a network, which come in the order of its parameters.
    Raises RequestError for a request that the version cannot serve.
    """
    return _listed(info, outline(info, request, numerics), numerics)


def stages_of(stage: str, info: VersionInfo, numerics: Numerics, step: int = 0) -> Iterator[Stage]:
    """Every stage of one network that runs alone, see `stage_named`. step: the denoiser's."""
    stage_named(stage, info)
    return _listed(info, outline_alone(info, stage, numerics, step), numerics)


def stage_named(stage: str, info: VersionInfo) -> Alone:
    """How one network of a version runs alone. Raises RequestError, naming those that it has."""
    rows = alone(info)
    if stage not in rows:
        raise RequestError(f"{info.key} has no stage {stage}: its own are {', '.join(rows)}")
    return rows[stage]


def _listed(info: VersionInfo, parts: Outline, numerics: Numerics) -> Iterator[Stage]:
    networks = FAMILIES[info.family].networks(info, numerics)
    built = {part.role: networks[part.role].on_meta() for part in parts if isinstance(part, Call)}
    for part in parts:
        yield from tapped(*part.names) if isinstance(part, Taps) else _inside(part, built[part.role])


def _inside(call: Call, network: nn.Module) -> Iterator[Stage]:
    yield from tapped(*(f"{call.prefix}inputs.{name}" for name in call.inputs))
    for path, part in network.named_modules():
        if path and call.covers(path) and runs(part):
            yield from _outputs(call, path, part)
    if call.output is not None:
        yield from tapped(call.prefix + call.output)


def tapped(*names: str) -> Iterator[Stage]:
    """Stages that are no submodule's output."""
    for name in names:
        yield Stage(name, name, True)


def runs(part: nn.Module) -> bool:
    """Whether a module is called, and so has an output; lists of modules and holders of parts are not, nor
    those that stand for nothing."""
    return type(part).forward is not nn.Module.forward and not isinstance(part, nn.Identity)


def _outputs(call: Call, path: str, part: nn.Module) -> list[Stage]:
    """The stages that one call of `part` makes, in the order of `tensors_of` its output."""
    default = any(_same_parts(path, pattern) for pattern in BLOCKS[call.role])
    module = call.prefix + path
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
    if isinstance(part, DownBlock):
        kept = len(part.resnets) + (part.downsamplers is not None)
        return ("out", *(f"kept.{i}" for i in range(kept)))
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


Write = Callable[[Stage, Tensor], None]


class Recorder:
    """Hands on what occurs in a run of which the outline is known: `tap` is called by generation, `watch`
    hangs hooks into networks."""

    def __init__(self, parts: Outline, write: Write) -> None:
        """write: is given every stage with its tensor, when it occurs."""
        self._parts, self._write = parts, write
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def tap(self, name: str, tensor: Tensor) -> None:
        """Records a tensor that no module returns."""
        self._write(Stage(name, name, True), tensor)

    def watch(self, role: str, network: nn.Module) -> None:
        """Hooks on every submodule; see LoadedModel.watch."""
        calls = [part for part in self._parts if isinstance(part, Call) and part.role == role]
        for path, part in network.named_modules():
            covering = [call for call in calls if call.covers(path)]
            if path and covering and runs(part):
                self._hooks.append(part.register_forward_hook(self._hook(path, covering)))
        before, after = self._ends(calls)
        self._hooks.append(network.register_forward_pre_hook(before, with_kwargs=True))
        self._hooks.append(network.register_forward_hook(after))

    def close(self) -> None:
        """Takes the hooks off again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _hook(self, path: str, calls: Sequence[Call]) -> Callable[[nn.Module, Any, Any], None]:
        """For a submodule that runs once in each of `calls`, in their order."""
        due = iter(calls)

        def record(part: nn.Module, _: Any, output: Any) -> None:
            made = _outputs(next(due), path, part)
            for stage, tensor in zip(made, tensors_of(output), strict=True):
                self._write(stage, tensor)

        return record

    def _ends(self, calls: Sequence[Call]) -> tuple[Callable[..., None], Callable[..., None]]:
        """Before and after each call of the whole network."""
        given, made = iter(calls), iter(calls)

        def before(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            call = next(given)
            # What is given beyond the inputs of a call is None; an input that is lacking fails below.
            inputs = {**dict(zip(call.inputs, arguments, strict=False)), **named}
            for name in call.inputs:
                self.tap(f"{call.prefix}inputs.{name}", inputs[name])

        def after(_: nn.Module, __: Any, output: Any) -> None:
            call = next(made)
            if call.output is not None:
                self.tap(call.prefix + call.output, output)

        return before, after


def selected(writer: RecordWriter, selection: Selection) -> Write:
    """Writes what a selection takes."""

    def write(stage: Stage, tensor: Tensor) -> None:
        if selection.takes(stage):
            writer.add(stage.name, tensor)

    return write


class LikeCandle:
    """Writes what Candle's program does, as it does: see `outline.CANDLE`."""

    def __init__(self, writer: RecordWriter, family: str) -> None:
        self._writer, self._names = writer, CANDLE[family]
        self._held: dict[str, list[Tensor]] = {}

    def __call__(self, stage: Stage, tensor: Tensor) -> None:
        for name, parts in self._names.items():
            if any(fnmatchcase(stage.name, part) for part in parts):
                held = self._held.setdefault(stage.name if parts == (name,) else name, [])
                held.append(as_candle(name, tensor))
                if fnmatchcase(stage.name, parts[-1]):  # which comes in every run, the others not in all
                    self._write(stage.name if parts == (name,) else name)

    def _write(self, name: str) -> None:
        self._writer.add(name, torch.cat(self._held.pop(name)))


def candle_names(family: str, known: Sequence[Stage]) -> list[str]:
    """The names in a record like Candle's of a run that has the stages `known`."""
    names: list[str] = []
    for stage in known:
        for name, parts in CANDLE[family].items():
            if fnmatchcase(stage.name, parts[-1]):
                names.append(stage.name if parts == (name,) else name)
    return names


def as_candle(name: str, tensor: Tensor) -> Tensor:
    """16-bit floats as float32; FLUX's ids of CLIP up to the end token, for Candle pads none there."""
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

    like_candle: exactly the stages that `candle_reference run` writes, named and stored as there. The
    autoencoder runs whole unless the request asks for tiles, in which nothing inside it can be recorded.
    The metadata is the picture's own record. Where a stage yields NaN, what was recorded until then is kept
    in the file, with the reason under "failed", and NonFiniteError is raised.
    """
    if request.batch != 1:
        raise RequestError(f"a trace is of one picture, not of {request.batch}: trace each from its own seed")
    info, numerics = model.components.info, model.components.numerics
    # In tiles the autoencoder's layers cannot be recorded: only where that was asked for does it use them.
    request = replace(request, vae_tiling=bool(request.vae_tiling))
    selection, known = Selection(tuple(patterns)), list(stages(info, request, numerics))
    room = _room(candle_names(info.family, known) if like_candle else selection.names(known))

    def recorder_for(writer: RecordWriter) -> Recorder:
        write = LikeCandle(writer, info.family) if like_candle else selected(writer, selection)
        return Recorder(outline(info, request, numerics), write)

    def run(recorder: Recorder) -> tuple[dict[str, Any], Result]:
        with model.watch(recorder.watch):
            (result,) = model.generate(request, on_event=on_event, cancel=cancel, tap=recorder.tap)
        pixels = torch.from_numpy(np.array(result.image)).permute(2, 0, 1)[None]  # [H,W,3] -> [1,3,H,W]
        recorder.tap("pixels", pixels)
        return result.metadata, result

    about = {"model": info.key, "prompt": request.prompt, "seed": request.seed}
    return _write(path, overwrite, about, recorder_for, room, run)


def trace_stage(
    components: Components,
    stage: str,
    inputs: StageInputs,
    path: str | Path,
    *,
    patterns: Sequence[str] = (DEFAULT,),
    overwrite: bool = False,
    on_event: OnEvent | None = None,
    cancel: CancelToken | None = None,
) -> Traced:
    """Runs one network (see `stage_named`) on inputs from a file and records the stages that `patterns`
    select, under the names that a whole run gives them. Raises RequestError for inputs that do not fit."""
    info, numerics, selection = components.info, components.numerics, Selection(tuple(patterns))
    row = stage_named(stage, info)
    given = inputs.of(stage)
    room = _room(selection.names(list(stages_of(stage, info, numerics, inputs.step))))

    def recorder_for(writer: RecordWriter) -> Recorder:
        return Recorder(outline_alone(info, stage, numerics, inputs.step), selected(writer, selection))

    @torch.inference_mode()
    def run(recorder: Recorder) -> tuple[dict[str, Any], None]:
        for name, tensor in zip(row.given, given.values() if row.given else (), strict=True):
            recorder.tap(name, tensor)
        try:
            with components.watch(recorder.watch):
                network = components.network(row.role, on_event, cancel)
                with cancellable(network, cancel):
                    output = _run_network(network, row, given, components)
        finally:
            components.free(row.role)
        for name, make in row.made.items():
            made = make(output, inputs)
            recorder.tap(name.format(step=inputs.step), made)
            check_finite(made, stage, components.dtype_of(row.role))
        return {}, None

    about = {"stage": stage, **_settings(components)}
    return _write(path, overwrite, about, recorder_for, room, run)


def _run_network(network: Any, row: Alone, given: Mapping[str, Tensor], parts: Components) -> Any:
    """As generation calls it: with the same dtypes, and the same of what comes out."""
    device, dtype = parts.placement.device, parts.dtype_of(row.role)

    def placed(name: str, tensor: Tensor) -> Tensor:
        kind = torch.float32 if name in EXACT else dtype
        return tensor.to(device, kind if tensor.is_floating_point() else None)

    arguments = {name: placed(name, tensor) for name, tensor in given.items()}
    tf32 = torch.backends.cudnn.allow_tf32 and row.method == "__call__"  # never for the autoencoder
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
        return getattr(network, row.method)(**arguments)


def _settings(parts: Components) -> dict[str, Any]:
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


def _room(names: Sequence[str]) -> int:
    """Bytes that the header will need, roughly and rather too many."""
    return 16_384 + sum(HEADER_BYTES + len(name) for name in names)


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

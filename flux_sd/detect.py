"""Which version a user's files are of, where nobody says. Floor 7.

Shapes of the transformer or UNet decide between architectures, small files beside it between models that
share one. What neither tells is asked for, not guessed: `std of a norm's bias above 0.09` separates the
velocity models that are known (ComfyUI) and says nothing of the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint, open_checkpoint
from .errors import RequestError
from .model_files import FLUX, LAYOUTS, Layout, differences, find_scheduler, listed, one_checkpoint, search
from .sd_loader import config_beside, read_json, told_prediction
from .sniff import OTHER, Found, sniff
from .versions import SDVersion, configs_of

SAMPLERS = {  # of the classes that released configs name
    "DDIMScheduler": "ddim", "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
}  # fmt: skip


def detect_version(given: Mapping[str, Path], prediction: str | None = None) -> SDVersion:
    """The version of files given by role, or as "path". prediction: what the UNet is said to predict.

    Reads headers and configs. Raises RequestError where nothing that was given tells, or where it fits no
    version or several; and what opening the files raises.
    """
    found = _denoiser(given)
    if found is None:
        named = " and ".join(str(path) for path in given.values())
        raise RequestError(
            f"{named} holds no transformer or UNet, which would tell the model: say which with --model, such "
            "as flux-dev or sdxl"
        )
    layout, path = found
    with open_checkpoint(path) as checkpoint:
        part = _part(layout, checkpoint)
        fitting = [version for version in SDVersion if _fits(part, version, layout)]
        if not fitting:
            raise RequestError(f"{checkpoint.label} is {part}, which no model that is built takes")
        if len(fitting) > 1:
            file = find_scheduler(given, _folder(given), layout)
            asked = (
                _companions(file, path, checkpoint, prediction) if fitting[0].info.sd else _pipeline(given)
            )
            fitting = _narrowed(fitting, asked)
    if len(fitting) > 1:
        keys = " and ".join(version.info.key for version in fitting)
        raise RequestError(
            f"{path} fits {keys}, and neither its weights nor a config beside it tells them apart: say which "
            f"with --model, such as {fitting[0].info.key}"
        )
    return fitting[0]


def _denoiser(given: Mapping[str, Path]) -> tuple[Layout, Path] | None:
    """The transformer or UNet among the files, or the one file that may hold it, and whose layout it has."""
    source = given.get("path")
    for layout in LAYOUTS:
        role = layout.denoiser
        path = given.get(role)
        if path is None and source is not None and source.is_dir():
            path = search(role, source, layout)
        if path is not None:
            return layout, one_checkpoint(role, path)
    if source is None or source.is_dir():
        return None
    with open_checkpoint(source) as checkpoint:
        parts = sniff(checkpoint)
    components = {part.component for part in parts}
    for layout in LAYOUTS:
        if layout.maps[layout.denoiser] in components:
            return layout, source
    strange = [part for part in parts if part.map is None and part.component != OTHER]
    if strange:
        raise RequestError(f"{source} holds {listed(strange)}: no model that is built takes it")
    return None


def _part(layout: Layout, checkpoint: Checkpoint) -> Found:
    """The transformer or UNet of a checkpoint. Raises RequestError for one that holds none that is built."""
    parts = sniff(checkpoint)
    wanted = layout.maps[layout.denoiser]
    for part in parts:
        if part.map is not None and part.component == wanted:
            return part
    raise RequestError(f"{checkpoint.label} is {listed(parts)}: no model that is built takes it")


def _fits(part: Found, version: SDVersion, layout: Layout) -> bool:
    configs = version.info.flux if version.info.sd is None else version.info.sd
    config = getattr(configs, layout.denoiser, None)
    return config is not None and not differences(part, config)


def _folder(given: Mapping[str, Path]) -> Path | None:
    source = given.get("path")
    return source if source is None or source.is_dir() else source.parent


def _pipeline(given: Mapping[str, Path]) -> list[Callable[[SDVersion], bool | None]]:
    """What model_index.json says of a transformer in its folder, as questions to FLUX versions; then who
    shares tensors steps back."""
    folder = None if FLUX.denoiser in given else _folder(given)
    file = None if folder is None else folder / "model_index.json"
    told = read_json(file).get("_class_name") if file is not None and file.is_file() else None
    return [
        lambda version: _agrees(told, version.info.pipeline),
        lambda version: False if version.info.shares_tensors else None,
    ]


def _companions(
    file: Path | None, path: Path, checkpoint: Checkpoint, prediction: str | None
) -> list[Callable[[SDVersion], bool | None]]:
    """What small files say, as questions to a version: whether it agrees, None where it does not care.

    file: the scheduler's config; path: the UNet.
    """
    config = {} if file is None else read_json(file)
    told = told_prediction(config, checkpoint, prediction)
    sampler = SAMPLERS.get(str(config.get("_class_name")))
    size = config_beside(path, "UNet2DConditionModel").get("sample_size")
    predicts = None if told is None else told[0]
    return [
        lambda version: _agrees(predicts, configs_of(version.info).prediction),
        lambda version: _agrees(sampler, configs_of(version.info).sampler),
        lambda version: _agrees(size, version.info.width // 8),
    ]


def _agrees(told: Any, own: Any) -> bool | None:
    return None if told is None or own is None else bool(told == own)


def _narrowed(
    fitting: Sequence[SDVersion], questions: Sequence[Callable[[SDVersion], bool | None]]
) -> list[SDVersion]:
    """Those that agree best, question by question: who says yes, else who does not say no, else all."""
    left = list(fitting)
    for question in questions:
        answers = {version: question(version) for version in left}
        for wanted in (True, None):
            agreeing = [version for version in left if answers[version] is wanted]
            if agreeing:
                left = agreeing
                break
    return left

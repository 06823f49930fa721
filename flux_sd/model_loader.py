"""`load_model(version, ...)`: one call, one protocol for every family. Floor 8.

Mirrors the Rust worker's `model_loader.rs`.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files as package_files
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import torch
from torch import nn

from . import image
from . import numerics as presets
from .device import choose_device, choose_dtype
from .errors import MissingFileError, NotBuiltError, RequestError
from .flux_generation import FluxRun, Tap, generate_flux, plan_flux
from .flux_loader import MAPS, FluxComponents, FluxFiles, build, config_of, find_files
from .hub import cached, fetch, role_paths
from .numerics import Numerics
from .request import CancelToken, GenerationRequest, Progress, Result, Step
from .steps import OnEvent
from .versions import SDVersion, VersionInfo

if TYPE_CHECKING:
    from PIL.Image import Image

EMBEDDED = "models"  # folder inside the package; one folder per embedded version, dashes as underscores


class LoadedModel(Protocol):
    """What the engine and the command line know of a model, whatever its family."""

    version: SDVersion

    @property
    def defaults(self) -> GenerationRequest:
        """What a request means where it is silent: size, steps, guidance, T5 length of the version."""
        ...

    def steps(
        self,
        request: GenerationRequest,
        *,
        on_event: OnEvent | None = None,
        cancel: CancelToken | None = None,
        tap: Tap | None = None,
    ) -> Iterator[Step]:
        """Yields after each step; stop iterating to stop."""
        ...

    def generate(
        self,
        request: GenerationRequest,
        *,
        on_event: OnEvent | None = None,
        cancel: CancelToken | None = None,
        tap: Tap | None = None,
    ) -> list[Result]:
        """All pictures of a request."""
        ...

    def decode(self, latents: torch.Tensor) -> list[Image]:
        """Latents [B, C, H/8, W/8], such as a step's, to pictures (PIL)."""
        ...

    def close(self) -> None:
        """Lets memory and files go; also the end of a `with` block."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class FluxModel:
    """FLUX.1 behind the common protocol."""

    def __init__(self, version: SDVersion, components: FluxComponents) -> None:
        self.version, self.components = version, components

    @property
    def defaults(self) -> GenerationRequest:
        """See LoadedModel."""
        row = self.version.info
        return GenerationRequest("", row.width, row.height, row.steps, row.guidance, t5_length=row.t5_length)

    def steps(
        self,
        request: GenerationRequest,
        *,
        on_event: OnEvent | None = None,
        cancel: CancelToken | None = None,
        tap: Tap | None = None,
    ) -> Iterator[Step]:
        """See LoadedModel. The request is checked now, before the first step is asked for."""
        return FluxRun(self.components, request, on_event, cancel, tap).steps()

    def generate(
        self,
        request: GenerationRequest,
        *,
        on_event: OnEvent | None = None,
        cancel: CancelToken | None = None,
        tap: Tap | None = None,
    ) -> list[Result]:
        """See LoadedModel."""
        return generate_flux(self.components, request, on_event, cancel, tap)

    def decode(self, latents: torch.Tensor) -> list[Image]:
        """See LoadedModel."""
        rows, columns = latents.shape[-2:]
        request = GenerationRequest(
            prompt="", width=8 * columns, height=8 * rows, batch=latents.shape[0], seed=0
        )
        pictures = FluxRun(self.components, request).decode(latents.float())
        return [image.to_picture(picture, self.components.numerics.to_bytes) for picture in pictures]

    def close(self) -> None:
        """See LoadedModel."""
        self.components.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load_model(
    version: str | SDVersion | None = None,
    path: str | Path | None = None,
    *,
    transformer: str | Path | None = None,
    t5: str | Path | None = None,
    clip: str | Path | None = None,
    vae: str | Path | None = None,
    clip_tokenizer: str | Path | None = None,
    t5_tokenizer: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    numerics: str | Numerics = "reference",
    keep_loaded: bool = False,
    offline: bool = False,
    cache_dir: str | Path | None = None,
    endpoint: str | None = None,
    cancel: CancelToken | None = None,
    on_event: OnEvent | None = None,
) -> LoadedModel:
    """A model ready to paint: files found (or fetched), every name, shape and size checked.

    version: any spelling SDVersion.parse takes; None is the embedded tiny-flux. path: a model's folder,
    diffusers or BFL layout. transformer, t5, clip, vae: single files or folders, in place of those of `path`.
    keep_loaded: networks stay in memory between stages and requests (for servers). Weights are read when a
    stage needs them. Raises a subclass of FluxSdError that says what is wrong with which file.
    """
    own_files = {
        "path": path, "transformer": transformer, "t5": t5, "clip": clip, "vae": vae,
        "clip_tokenizer": clip_tokenizer, "t5_tokenizer": t5_tokenizer,
    }  # fmt: skip
    given = {role: Path(file) for role, file in own_files.items() if file is not None}
    chosen = resolve_version(version, own_files=bool(given))
    info, where = _built(chosen), choose_device(device)
    found = _local_files(info, given, cache_dir) if given else None
    found = found or _own_files(info, offline, cache_dir, endpoint, cancel, on_event)
    kind, automatic = choose_dtype(dtype, where, info.auto_dtype), dtype == "auto" and info.auto_dtype is None
    parts = FluxComponents.load(info, found, where, kind, _preset(numerics), keep_loaded, automatic)
    return FluxModel(chosen, parts)


def check_request(
    version: str | SDVersion | None, request: GenerationRequest, numerics: str | Numerics = "reference"
) -> None:
    """Refuses what the version cannot do, before any file is looked for. Raises RequestError,
    NotBuiltError."""
    plan_flux(_built(resolve_version(version)), request, _preset(numerics))


def _preset(numerics: str | Numerics) -> Numerics:
    return presets.parse(numerics) if isinstance(numerics, str) else numerics


def resolve_version(version: str | SDVersion | None, own_files: bool = False) -> SDVersion:
    """The version meant; None is tiny-flux, unless files of another model are given."""
    if isinstance(version, SDVersion):
        return version
    if version is None:
        if own_files:
            raise RequestError("files are given but no model: say which one with --model, such as flux-dev")
        return SDVersion.TINY_FLUX
    return SDVersion.parse(version)


def _built(version: SDVersion) -> VersionInfo:
    info = version.info
    if not info.built:
        built = ", ".join(other.info.key for other in SDVersion if other.info.built)
        raise NotBuiltError(f"{info.title} ({info.key}) is not built yet: this release has {built}")
    return info


def _local_files(info: VersionInfo, given: dict[str, Path], cache_dir: str | Path | None) -> FluxFiles:
    """Files of the user's, by role, and a folder ("path") for the rest; tokenizers may come from the cached
    repository, whose vocabulary is the same."""
    folder = given.pop("path", None)
    spare = []
    if info.repo is not None:
        for role in ("clip_tokenizer", "t5_tokenizer"):
            snapshot = cached(info.repo, {role: info.hub_files[role]}, cache_dir)
            spare += [] if snapshot is None else [snapshot]
    return find_files(folder, given, spare)


def _own_files(
    info: VersionInfo,
    offline: bool,
    cache_dir: str | Path | None,
    endpoint: str | None,
    cancel: CancelToken | None,
    on_event: OnEvent | None,
) -> FluxFiles:
    """The version's released files: inside this package, in the hub's cache, or from the hub."""
    if info.repo is None:
        folder = embedded_folder(info)
        return find_files(folder, {})

    def progress(done: int, total: int) -> None:
        if on_event is not None:
            on_event(Progress("download", done, total))

    snapshot = fetch(
        info.repo, info.hub_files, offline=offline, cancel=cancel, on_progress=progress,
        endpoint=endpoint, cache_dir=cache_dir,
    )  # fmt: skip
    return find_files(snapshot, role_paths(snapshot, info.hub_files))


class Part(NamedTuple):
    """One network of a version, on the meta device."""

    component: str  # as the maps call it
    config: Any
    module: nn.Module


def parts_of(version: SDVersion) -> list[Part]:
    """Every network of a built version: what its files are held against. Raises NotBuiltError."""
    info = _built(version)
    built = {role: build(role, info, presets.reference()) for role in MAPS}
    return [Part(MAPS[role], config_of(role, info), module) for role, module in built.items()]


def embedded_folder(info: VersionInfo) -> Path:
    """Where a version that ships in the package lies. Raises MissingFileError in a broken installation."""
    folder = Path(str(package_files("flux_sd"))) / EMBEDDED / "_".join(info.key.split("-"))
    if not folder.is_dir():
        raise MissingFileError(f"{info.key} should lie in the package and does not: install flux_sd again")
    return folder

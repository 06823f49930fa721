"""`load_model(version, ...)`: one call, one protocol for every family. Floor 8.

Mirrors the Rust worker's `model_loader.rs`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from importlib.resources import files as package_files
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import torch
from torch import nn

from . import image
from . import numerics as presets
from .checkpoint import open_checkpoint
from .device import choose_device, choose_dtype
from .errors import MissingFileError, NotBuiltError, RequestError
from .flux_files import MAPS, FluxFiles, check_exists, check_roles, find_files
from .flux_generation import FluxRun, Tap, generate_flux, plan_flux
from .flux_loader import FluxComponents, LoadOptions, Watcher, build, config_of
from .hub import cached, fetch, role_paths
from .load_plan import DECODES, Decode
from .numerics import Numerics
from .request import CancelToken, GenerationRequest, Progress, Result, Step
from .steps import OnEvent
from .versions import SDVersion, VersionInfo

if TYPE_CHECKING:
    from PIL.Image import Image

QUANTIZED = "transformer-Q8_0.gguf"  # of an embedded version, in its folder
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

    def watch(self, watcher: Watcher) -> AbstractContextManager[None]:
        """While open, `watcher(role, network)` is shown each network before it runs: where hooks go on."""
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

    def watch(self, watcher: Watcher) -> AbstractContextManager[None]:
        """See LoadedModel."""
        return self.components.watch(watcher)

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
    decode: str = "on_use",
    fill_from: str | Path | None = None,
    quantized: bool = False,
    offline: bool = False,
    cache_dir: str | Path | None = None,
    endpoint: str | None = None,
    cancel: CancelToken | None = None,
    on_event: OnEvent | None = None,
) -> LoadedModel:
    """A model ready to paint: files found (or fetched), every name, shape and size checked.

    version: any spelling SDVersion.parse takes; None is the embedded tiny-flux. path: a model's folder, or a
    file with several components. transformer, t5, clip, vae: files or folders in place of those of `path` or,
    without one, of the version's released files. keep_loaded: networks stay between requests. decode: packed
    weights are decoded "on_use" or "on_load", for the same picture. fill_from: gives an incomplete file what
    it lacks. quantized: the model's own quantised transformer. Raises FluxSdErrors that name the file.
    """
    own = {"path": path, "transformer": transformer, "t5": t5, "clip": clip, "vae": vae}
    own |= {"clip_tokenizer": clip_tokenizer, "t5_tokenizer": t5_tokenizer}
    given = {role: Path(file) for role, file in own.items() if file is not None}
    chosen, hub = resolve_version(version, bool(given)), Hub(offline, cache_dir, endpoint, cancel, on_event)
    info, where, mode = _built(chosen), choose_device(device), _decode_mode(decode)
    found = _quantized_files(info, given) if quantized else _files(info, given, hub)
    kind, automatic = choose_dtype(dtype, where, info.auto_dtype), dtype == "auto" and info.auto_dtype is None
    options = LoadOptions(keep_loaded, automatic, mode, fill_from, quantized)
    return FluxModel(chosen, FluxComponents.load(info, found, where, kind, _preset(numerics), options))


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


class Hub(NamedTuple):
    """How released files are found: see `hub.fetch`."""

    offline: bool
    cache_dir: str | Path | None
    endpoint: str | None
    cancel: CancelToken | None
    on_event: OnEvent | None

    def report(self, done: int, total: int) -> None:
        """Bytes that are here, of how many."""
        if self.on_event is not None:
            self.on_event(Progress("download", done, total))


def _decode_mode(name: str) -> Decode:
    for mode in DECODES:
        if name == mode:
            return mode
    raise RequestError(f"decode {name!r} is unknown: choose {' or '.join(DECODES)}")


def _files(info: VersionInfo, given: Mapping[str, Path], hub: Hub) -> FluxFiles:
    """Files of the user's by role, with a folder or file ("path") for the rest; without one, the rest are the
    version's released files: inside this package, in the hub's cache, or from the hub."""
    own = {role: path for role, path in given.items() if role != "path"}
    if "path" in given or (own and own.keys() >= MAPS.keys()):
        return find_files(given.get("path"), own, _cached_tokenizers(info, hub))
    if info.repo is None:
        return find_files(embedded_folder(info), own)
    _check_own(info, own)
    lacking = {role: files for role, files in info.hub_files.items() if role not in own}
    snapshot = fetch(
        info.repo, lacking, offline=hub.offline, cancel=hub.cancel, on_progress=hub.report,
        endpoint=hub.endpoint, cache_dir=hub.cache_dir,
    )  # fmt: skip
    return find_files(None, role_paths(snapshot, lacking) | own)


def _check_own(info: VersionInfo, own: Mapping[str, Path]) -> None:
    """Refuses files of the user's that are not there or cannot play their roles, before a long download."""
    for role, path in own.items():
        check_exists(role, path)
    with ExitStack() as opened:
        networks = {role: path for role, path in own.items() if role in MAPS}
        files = {role: opened.enter_context(open_checkpoint(path)) for role, path in networks.items()}
        check_roles(info, files, complete=False)  # another file may complete them: `load` knows


def _cached_tokenizers(info: VersionInfo, hub: Hub) -> list[Path]:
    """Where tokenizers lie that would do for files of the user's: the vocabulary is the same."""
    if info.repo is None:
        return [embedded_folder(info)]
    roles = [role for role in ("clip_tokenizer", "t5_tokenizer") if role in info.hub_files]
    found = [cached(info.repo, {role: info.hub_files[role]}, hub.cache_dir) for role in roles]
    return [snapshot for snapshot in found if snapshot is not None]


def _quantized_files(info: VersionInfo, given: Mapping[str, Path]) -> FluxFiles:
    """The embedded model with its quantised transformer. Raises RequestError where there is none."""
    if info.repo is not None:
        raise RequestError(
            f"{info.key} has no quantised transformer of its own: leave --quantized out and give one of "
            "yours with --transformer FILE.gguf"
        )
    if given:
        raise RequestError(
            f"--quantized takes {info.key}'s own files: leave out either that or {' and '.join(given)}"
        )
    folder = embedded_folder(info)
    return find_files(folder, {"transformer": folder / QUANTIZED})


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

"""`load_model(version, ...)`: one call, one protocol for every family. Floor 8.

Mirrors the Rust worker's `model_loader.rs`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from importlib.resources import files as package_files
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import torch
from torch import nn

from . import flux_loader, sd_loader
from . import numerics as presets
from .checkpoint import open_checkpoint
from .components import Components, LoadOptions, Network, Watcher
from .detect import detect_version
from .device import choose_device, choose_dtype
from .errors import MissingFileError, RequestError
from .flux_generation import FluxRun, generate_flux, plan_flux
from .flux_loader import load_flux
from .hub import cached, fetch, role_paths
from .load_plan import DECODES, Decode
from .lora.adapters import Adapters, Applied, Asked, as_loras, check_files, table_of, with_adapters
from .lora.plan import Table
from .model_files import ModelFiles, check_exists, check_roles, find_files, layout_of
from .numerics import Numerics
from .request import CancelToken, GenerationRequest, Progress, Result, Step
from .sd_generation import SdRun, generate_sd
from .sd_loader import LoadedSd, load_sd
from .sd_plan import plan_sd
from .stages import Tap, decode_latents
from .steps import OnEvent
from .versions import SDVersion, VersionInfo

if TYPE_CHECKING:
    from PIL.Image import Image

File = str | Path | None
QUANTIZED = "-Q8_0.gguf"  # ending of an embedded version's quantised denoiser, in its folder
NOTHING: Mapping[str, Path] = {}
EMBEDDED = "models"  # folder inside the package; one folder per embedded version, dashes as underscores


class LoadedModel(Protocol):
    """What the engine and the command line know of a model, whatever its family."""

    version: SDVersion
    components: Components  # its networks, and how they are computed

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
        """Yields after each step, where there is one (`strength` 0 has none); stop iterating to stop."""
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

    def load_adapters(self, adapters: Sequence[Asked], *, partial: bool = False) -> tuple[Applied, ...]:
        """From here on these adapters (LoRA) act, in this order, in place of those before; none for none.

        Each is a file, or a `Lora` with a strength. Only headers are read: networks are changed when they are
        loaded, and weights that others changed are read again, bit for bit. Raises AdapterError for one that
        does not fit completely (with `partial`: not at all); then those before stay.
        """
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


class Model:
    """A model of either family behind the common protocol."""

    def __init__(
        self,
        version: SDVersion,
        components: Components,
        steps: Callable[..., Iterator[Step]],
        generate: Callable[..., list[Result]],
    ) -> None:
        """steps, generate: the family's, given request, on_event, cancel and tap."""
        self.version, self.components = version, components
        self._steps, self._generate = steps, generate
        self._table: Table | None = None  # of the names that adapters may use

    @property
    def defaults(self) -> GenerationRequest:
        """See LoadedModel."""
        row = self.version.info
        sampler, schedule = (None, None) if row.sd is None else (row.sd.sampler, row.sd.schedule)
        return GenerationRequest(
            "", row.width, row.height, row.steps, row.guidance, t5_length=row.t5_length,
            sampler=sampler, schedule=schedule,
        )  # fmt: skip

    def steps(
        self,
        request: GenerationRequest,
        *,
        on_event: OnEvent | None = None,
        cancel: CancelToken | None = None,
        tap: Tap | None = None,
    ) -> Iterator[Step]:
        """See LoadedModel. The request is checked now, before the first step is asked for."""
        return self._steps(request, on_event, cancel, tap)

    def generate(
        self,
        request: GenerationRequest,
        *,
        on_event: OnEvent | None = None,
        cancel: CancelToken | None = None,
        tap: Tap | None = None,
    ) -> list[Result]:
        """See LoadedModel."""
        return self._generate(request, on_event, cancel, tap)

    def decode(self, latents: torch.Tensor) -> list[Image]:
        """See LoadedModel."""
        return decode_latents(self.components, latents)

    def load_adapters(self, adapters: Sequence[Asked], *, partial: bool = False) -> tuple[Applied, ...]:
        """See LoadedModel."""
        if not adapters:
            self.components.change(None)
            return ()
        self._table = self._table or table_of(self.components.kinds)
        opened = Adapters.open(as_loras(adapters), self._table, self.version.info.key, partial)
        self.components.change(opened)
        return opened.applied

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


class Opening(NamedTuple):
    """How files become a model."""

    files: ModelFiles
    device: torch.device
    dtype: torch.dtype
    numerics: Numerics
    options: LoadOptions
    prediction: str | None = None


def open_flux(version: SDVersion, info: VersionInfo, how: Opening) -> Model:
    """A FLUX model. Raises RequestError for a prediction type, which it has no use for."""
    if how.prediction is not None:
        raise RequestError(f"prediction is not used by {info.key}: leave it out")
    parts = load_flux(info, how.files, how.device, how.dtype, how.numerics, how.options)
    return flux_model(version, parts)


def flux_model(version: SDVersion, parts: Components) -> Model:
    """FLUX.1 behind the common protocol."""

    def steps(*rest: Any) -> Iterator[Step]:
        return FluxRun(parts, *rest).steps()

    return Model(version, parts, steps, functools.partial(generate_flux, parts))


def open_sd(version: SDVersion, info: VersionInfo, how: Opening) -> Model:
    """A Stable Diffusion model."""
    return sd_model(version, load_sd(info, *how[:5], prediction=how.prediction))


def sd_model(version: SDVersion, loaded: LoadedSd) -> Model:
    """Stable Diffusion behind the common protocol."""

    def steps(*rest: Any) -> Iterator[Step]:
        return SdRun(loaded, *rest).steps()

    return Model(version, loaded.components, steps, functools.partial(generate_sd, loaded))


class Family(NamedTuple):
    """What differs between the two families, outside their own files."""

    open: Callable[[SDVersion, VersionInfo, Opening], Model]
    plan: Callable[[VersionInfo, GenerationRequest, Numerics], object]
    networks: Callable[[VersionInfo, Numerics], Mapping[str, Network]]


FAMILIES = {
    "flux": Family(open_flux, plan_flux, flux_loader.networks_of),
    "sd": Family(open_sd, plan_sd, sd_loader.networks_of),
}


def load_model(
    version: str | SDVersion | None = None, path: File = None, *,
    transformer: File = None, unet: File = None, t5: File = None, clip: File = None, clip_2: File = None,
    vae: File = None, clip_tokenizer: File = None, clip_2_tokenizer: File = None, t5_tokenizer: File = None,
    scheduler: File = None, prediction: str | None = None, device: str = "auto", dtype: str = "auto",
    numerics: str | Numerics = "reference", keep_loaded: bool = False, decode: str = "on_use",
    fill_from: File = None, quantized: bool = False, offline: bool = False, cache_dir: File = None,
    endpoint: str | None = None, cancel: CancelToken | None = None, on_event: OnEvent | None = None,
    loras: Sequence[Asked] = (), lora_partial: bool = False,
) -> LoadedModel:  # fmt: skip
    """A model ready to paint: files found (or fetched), every name, shape and size checked.

    version: any spelling SDVersion.parse takes; None is what the files given show, or the embedded tiny-flux.
    path: a model's folder, or a file with several components. transformer, unet, t5, clip, clip_2, vae: files
    or folders in place of those of `path` or, without one, of the version's released files. prediction: what
    a Stable Diffusion UNet predicts, where its files do not say. keep_loaded: networks stay between requests.
    decode: packed weights are decoded "on_use" or "on_load", for the same picture. fill_from: gives an
    incomplete file what it lacks. quantized: the model's own quantised transformer. loras: adapters, see
    `LoadedModel.load_adapters`. Raises FluxSdErrors that name the file.
    """
    own = {"path": path, "transformer": transformer, "unet": unet, "t5": t5, "clip": clip, "clip_2": clip_2}
    own |= {"vae": vae, "clip_tokenizer": clip_tokenizer, "clip_2_tokenizer": clip_2_tokenizer}
    own |= {"t5_tokenizer": t5_tokenizer, "scheduler": scheduler}
    given = {role: Path(file) for role, file in own.items() if file is not None}
    chosen = resolve_version(version, given, prediction)
    hub, info = Hub(offline, cache_dir, endpoint, cancel, on_event), chosen.info
    _check_names(info, given)
    check_files(as_loras(loras))
    where, mode = choose_device(device), _decode_mode(decode)
    found = _quantized_files(info, given) if quantized else _files(info, given, hub)
    kind, automatic = choose_dtype(dtype, where, info.auto_dtype), dtype == "auto" and info.auto_dtype is None
    options = LoadOptions(keep_loaded, automatic, mode, fill_from, quantized)
    opening = Opening(found, where, kind, _preset(numerics), options, prediction)
    with ExitStack() as opened:
        model = opened.enter_context(FAMILIES[info.family].open(chosen, info, opening))
        model.load_adapters(loras, partial=lora_partial)
        opened.pop_all()  # from here on the caller closes it
        return model


def check_request(
    version: str | SDVersion | None, request: GenerationRequest, numerics: str | Numerics = "reference",
    loras: Sequence[Asked] = (),
) -> None:  # fmt: skip
    """Refuses what the version, with these adapters, cannot do, before any other file is looked for. Raises
    RequestError, AdapterError."""
    info = with_adapters(resolve_version(version).info, as_loras(loras))
    FAMILIES[info.family].plan(info, request, _preset(numerics))


def _preset(numerics: str | Numerics) -> Numerics:
    return presets.parse(numerics) if isinstance(numerics, str) else numerics


def resolve_version(
    version: str | SDVersion | None, given: Mapping[str, Path] = NOTHING, prediction: str | None = None
) -> SDVersion:
    """The version meant; None is what the files `given` by role show, and without any tiny-flux.

    Raises UnknownVersionError, RequestError where files do not show it.
    """
    if isinstance(version, SDVersion):
        return version
    if version is not None:
        return SDVersion.parse(version)
    return detect_version(given, prediction) if given else SDVersion.TINY_FLUX


def _check_names(info: VersionInfo, given: Mapping[str, Path]) -> None:
    """Refuses files for parts that the version does not have."""
    layout = layout_of(info)
    known = {"path", *layout.maps, *(f"{role}_tokenizer" for role in layout.tokenizers)}
    known |= {"scheduler"} if info.sd is not None else set()
    extra = [role for role in given if role not in known]
    if extra:
        raise RequestError(
            f"{info.key} has no {' and no '.join(extra)}: its parts are {', '.join(layout.maps)}"
        )


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


def _files(info: VersionInfo, given: Mapping[str, Path], hub: Hub) -> ModelFiles:
    """Files of the user's by role, with a folder or file ("path") for the rest; without one, the rest are the
    version's released files: inside this package, in the hub's cache, or from the hub."""
    own = {role: path for role, path in given.items() if role != "path"}
    if "path" in given or (own and own.keys() >= layout_of(info).maps.keys()):
        return find_files(info, given.get("path"), own, _cached_tokenizers(info, hub))
    if info.repo is None:
        return find_files(info, embedded_folder(info), own)
    _check_own(info, own)
    lacking = {role: files for role, files in info.hub_files.items() if role not in own}
    if layout_of(info).denoiser in own:
        lacking.pop("scheduler", None)  # it is about the released one
    snapshot = fetch(
        info.repo, lacking, offline=hub.offline, cancel=hub.cancel, on_progress=hub.report,
        endpoint=hub.endpoint, cache_dir=hub.cache_dir,
    )  # fmt: skip
    return find_files(info, None, role_paths(snapshot, lacking) | own)


def _check_own(info: VersionInfo, own: Mapping[str, Path]) -> None:
    """Refuses files of the user's that are not there or cannot play their roles, before a long download."""
    for role, path in own.items():
        check_exists(role, path)
    with ExitStack() as opened:
        networks = {role: path for role, path in own.items() if role in layout_of(info).maps}
        files = {role: opened.enter_context(open_checkpoint(path)) for role, path in networks.items()}
        check_roles(info, files, complete=False)  # another file may complete them: `load` knows


def _cached_tokenizers(info: VersionInfo, hub: Hub) -> list[Path]:
    """Where tokenizers lie that would do for files of the user's: every release has the same vocabularies."""
    if info.repo is None:
        return [embedded_folder(info)]
    found = []
    for other in [info, *(version.info for version in SDVersion if version.info != info)]:
        for role in layout_of(info).tokenizers:
            files = other.hub_files.get(f"{role}_tokenizer")
            if other.repo is not None and files is not None:
                found.append(cached(other.repo, {f"{role}_tokenizer": files}, hub.cache_dir))
    return [snapshot for snapshot in found if snapshot is not None]


def _quantized_files(info: VersionInfo, given: Mapping[str, Path]) -> ModelFiles:
    """The embedded model with its quantised denoiser. Raises RequestError where there is none."""
    role = layout_of(info).denoiser
    file = None if info.repo is not None else embedded_folder(info) / f"{role}{QUANTIZED}"
    if file is None or not file.is_file():
        raise RequestError(
            f"{info.key} has no quantised {role} of its own: leave --quantized out and give one of "
            f"yours with --{role} FILE.gguf"
        )
    if given:
        raise RequestError(
            f"--quantized takes {info.key}'s own files: leave out either that or {' and '.join(given)}"
        )
    return find_files(info, file.parent, {role: file})


class Part(NamedTuple):
    """One network of a version, on the meta device."""

    component: str  # as the maps call it
    config: Any
    module: nn.Module


def parts_of(version: SDVersion) -> list[Part]:
    """Every network of a version: what its files are held against."""
    networks = FAMILIES[version.info.family].networks(version.info, presets.reference())
    return [Part(network.component, network.config, network.on_meta()) for network in networks.values()]


def embedded_folder(info: VersionInfo) -> Path:
    """Where a version that ships in the package lies. Raises MissingFileError in a broken installation."""
    folder = Path(str(package_files("flux_sd"))) / EMBEDDED / "_".join(info.key.split("-"))
    if not folder.is_dir():
        raise MissingFileError(f"{info.key} should lie in the package and does not: install flux_sd again")
    return folder

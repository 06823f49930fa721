"""From files on disk to FLUX networks: find the files, check all of them, load each when its stage comes.
Floor 6.

Mirrors the Rust worker's `flux_loader.rs`. Nothing is read but headers until a stage asks for its network.
"""

from __future__ import annotations

import hashlib
import shlex
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .autoencoder import AutoEncoder
from .checkpoint import Checkpoint, open_checkpoint
from .clip import ClipTextEncoder
from .device import Placement, StageNeed, place
from .errors import AmbiguousFileError, MissingFileError
from .flux_mmdit import Flux
from .load_plan import fill, plan_load
from .numerics import Numerics, reference
from .quantized import keep_stored
from .request import CancelToken, Progress
from .steps import OnEvent
from .t5 import T5Encoder
from .text import ClipTokenizer, T5Tokenizer
from .versions import FluxConfigs, VersionInfo

# Order of the stages. Values: the name of the maps (weights_maps/<name>.*.toml).
MAPS = {"clip": "clip", "t5": "t5", "transformer": "flux_mmdit", "vae": "autoencoder"}
# Where each role lies in the layouts people have, as patterns under the model's folder.
PLACES = {
    "transformer": ("transformer", "flux1-*.safetensors", "flux1-*.gguf"),
    "vae": ("vae", "ae.safetensors"),
    "clip": ("text_encoder", "clip_l*.safetensors"),
    "t5": ("text_encoder_2", "t5xxl*.safetensors", "t5xxl*.gguf"),
}
TOKENIZERS = {"clip": "tokenizer", "t5": "tokenizer_2"}


@dataclass(frozen=True)
class FluxFiles:
    """One file or folder per role."""

    transformer: Path
    vae: Path
    clip: Path
    t5: Path
    clip_tokenizer: Path
    t5_tokenizer: Path


def find_files(
    folder: Path | None, given: Mapping[str, Path], more_tokenizers: Iterable[Path] = ()
) -> FluxFiles:
    """The files of a model: those `given` by role (a key of FluxFiles), the rest from `folder`.

    `folder` is a diffusers folder, a BFL folder (flux1-*.safetensors, ae.safetensors and the encoders'
    folders or flat files), and may be None if every role is given. Tokenizers may also lie beside the
    encoder's file or in one of `more_tokenizers`. Raises MissingFileError naming role and accepted names,
    AmbiguousFileError naming both.
    """
    if folder is not None and not folder.is_dir():
        raise MissingFileError(f"{str(folder)!r} is not a folder: --path takes the folder of a model")
    for role, path in given.items():
        if not path.exists():
            raise MissingFileError(f"{role}: {str(path)!r} does not exist")
    found = {role: given.get(role) or _search(role, folder) for role in PLACES}
    for role, name in TOKENIZERS.items():
        key = f"{role}_tokenizer"
        own = found[role]
        around = [own.parent, own.parent.parent] if own.is_file() else [own.parent]
        homes = [*([folder] if folder else []), *around, *more_tokenizers]
        found[key] = given.get(key) or _first_tokenizer(role, name, homes)
    return FluxFiles(**found)


def _search(role: str, folder: Path | None) -> Path:
    wanted = " or ".join(PLACES[role])
    if folder is None:
        raise MissingFileError(
            f"no file for the {role}: give --{role} FILE, or --path FOLDER that holds {wanted}"
        )
    matches = [path for pattern in PLACES[role] for path in sorted(folder.glob(pattern))]
    if len(matches) > 1:
        names = " and ".join(path.name for path in matches)
        raise AmbiguousFileError(
            f"{str(folder)!r} holds {names} for the {role}: choose one, such as "
            f"--{role} {shlex.quote(str(matches[0]))}"
        )
    if not matches:
        raise MissingFileError(
            f"{str(folder)!r} holds no {role}: expected {wanted} there, or give --{role} FILE"
        )
    return matches[0]


def _first_tokenizer(role: str, name: str, homes: Iterable[Path]) -> Path:
    for home in homes:
        if (home / name).is_dir():
            return home / name
    kinds = (
        "vocab.json + merges.txt or tokenizer.json" if role == "clip" else "spiece.model or tokenizer.json"
    )
    raise MissingFileError(
        f"no tokenizer for the {role} encoder: expected a folder {name}/ with {kinds}, as in the released "
        "repository, beside the model or its encoder"
    )


class EncodedText(NamedTuple):
    """A prompt as the transformer reads it, on the CPU."""

    txt: torch.Tensor  # [1, L, T5 width]
    vec: torch.Tensor  # [1, CLIP width]


class FluxComponents:
    """The four networks and two tokenizers of one model; each network is loaded on demand and can be let
    go."""

    def __init__(
        self,
        info: VersionInfo,
        files: FluxFiles,
        checkpoints: dict[str, Checkpoint],
        needs: Mapping[str, StageNeed],
        placement: Placement,
        numerics: Numerics,
        keep_loaded: bool,
    ) -> None:
        self.info, self.files, self.placement, self.numerics = info, files, placement, numerics
        self.keep_loaded = keep_loaded
        self._checkpoints, self._needs = checkpoints, needs
        self._files = {role: [describe_file(path) for path in c.files] for role, c in checkpoints.items()}
        for role in TOKENIZERS:
            folder = getattr(files, f"{role}_tokenizer")
            parts = sorted(folder.iterdir()) if folder.is_dir() else [folder]
            self._files[f"{role}_tokenizer"] = [describe_file(path) for path in parts if path.is_file()]
        self._networks: dict[str, nn.Module] = {}
        self.texts: OrderedDict[tuple[str, int], EncodedText] = OrderedDict()  # by prompt and T5 length
        self.clip_tokenizer = ClipTokenizer.load(files.clip_tokenizer)
        self.t5_tokenizer = T5Tokenizer.load(files.t5_tokenizer)

    @classmethod
    def load(
        cls,
        info: VersionInfo,
        files: FluxFiles,
        device: torch.device,
        dtype: torch.dtype,
        numerics: Numerics,
        keep_loaded: bool = False,
        automatic: bool = False,
    ) -> FluxComponents:
        """Opens every file and checks names, shapes and memory from the headers alone; loads no weight yet.

        automatic: `dtype` was not asked for, so weights may stay in their stored dtype where they would not
        fit. Raises CheckpointError, WeightMapError (with every problem), TokenizerError,
        NotEnoughMemoryError.
        """
        checkpoints: dict[str, Checkpoint] = {}
        try:
            for role in MAPS:
                checkpoints[role] = open_checkpoint(getattr(files, role))
                plan_load(MAPS[role], build(role, info, numerics), config_of(role, info), checkpoints[role])
            needs = {role: need(role, info, checkpoints[role].total_bytes) for role in MAPS}
            placement = place(list(needs.values()), device, dtype, automatic, together=keep_loaded)
            return cls(info, files, checkpoints, needs, placement, numerics, keep_loaded)
        except BaseException:
            for checkpoint in checkpoints.values():
                checkpoint.close()
            raise

    @torch.inference_mode(False)  # parameters that a later in-place change may touch
    def network(self, role: str, on_event: OnEvent | None = None, cancel: CancelToken | None = None) -> Any:
        """The network of `role`, loaded now if it is not there: every parameter filled, on the device, in
        eval mode.

        Raises Cancelled between two tensors; then nothing of it stays.
        """
        if role not in self._networks:
            module = build(role, self.info, self.numerics)
            stored = keep_stored(module, self.placement.dtype) if role in self.placement.stored else set()
            checkpoint = self._checkpoints[role]
            plan = plan_load(MAPS[role], module, config_of(role, self.info), checkpoint)
            fill(
                module,
                plan,
                dtype=self.placement.dtype,
                device=self.placement.device,
                keep_stored=stored.__contains__,
                on_tensor=_loading(role, on_event, cancel),
            )
            checkpoint.release()
            self._networks[role] = module.eval()
        return self._networks[role]

    def check_room(self, width: int, height: int, images: int, t5_length: int) -> None:
        """Raises NotEnoughMemoryError if a request of this size would not fit beside what is loaded."""
        needs = []
        for role in MAPS:
            wanted = self._needs[role]
            activations = images * _activations(role, self.info, width * height, t5_length)
            parameters = 0 if role in self._networks else wanted.parameters
            stored = role in self.placement.stored
            if stored and parameters:  # counted as it lies in memory
                parameters = wanted.stored_bytes // self.placement.dtype.itemsize
            needs.append(replace(wanted, parameters=parameters, activations=activations))
        place(needs, self.placement.device, self.placement.dtype, False, together=self.keep_loaded)

    def free(self, *roles: str) -> None:
        """Lets the networks of `roles` go, unless everything is to stay loaded."""
        if not self.keep_loaded:
            for role in roles:
                self._networks.pop(role, None)
            empty_cache(self.placement.device)

    @property
    def loaded(self) -> set[str]:
        """The roles whose networks are in memory."""
        return set(self._networks)

    def describe_files(self) -> dict[str, list[dict[str, Any]]]:
        """By role: name, bytes and fingerprint of each file as it was opened, without its path."""
        return self._files

    def close(self) -> None:
        """Lets everything go."""
        self._networks.clear()
        self.texts.clear()
        empty_cache(self.placement.device)
        for checkpoint in self._checkpoints.values():
            checkpoint.close()


def empty_cache(device: torch.device) -> None:
    """Gives freed memory back to the device, so that the next look at what is available sees it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def _loading(role: str, on_event: OnEvent | None, cancel: CancelToken | None) -> Callable[[int, int], None]:
    start = time.perf_counter()

    def on_tensor(done: int, total: int) -> None:
        if cancel is not None:
            cancel.check()
        if on_event is not None:
            on_event(Progress(f"load {role}", done, total, time.perf_counter() - start))

    return on_tensor


def config_of(role: str, info: VersionInfo) -> Any:
    """The config dataclass of one role of a version."""
    configs = info.flux
    assert configs is not None, f"{info.key} is no FLUX version"
    return getattr(configs, role)


def build(role: str, info: VersionInfo, numerics: Numerics) -> nn.Module:
    """One network on the meta device: names and shapes, no memory."""
    config = config_of(role, info)
    with torch.device("meta"):
        if role == "transformer":
            return Flux(replace(config, rope_dtype=numerics.rope_dtype))
        return {"t5": T5Encoder, "clip": ClipTextEncoder, "vae": AutoEncoder}[role](config)


def need(role: str, info: VersionInfo, stored_bytes: int | None = None) -> StageNeed:
    """What one stage asks of the memory at the version's default size; stored_bytes None: 2 bytes a
    parameter."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build(role, info, reference()).parameters())
    stored = 2 * parameters if stored_bytes is None else stored_bytes
    activations = _activations(role, info, info.width * info.height, info.t5_length or 0)
    return StageNeed(role, parameters, stored, activations, widens=role != "vae")


def _activations(role: str, info: VersionInfo, pixels: int, t5_length: int) -> int:
    """Bytes in float32 for one image, by the largest tensors alive at once.

    Of the transformer those are a single block's first product and its parts; of the autoencoder six maps of
    its widest full-size layer, as measured on a CPU at 1024 and 2048 pixels.
    """
    configs = info.flux
    assert isinstance(configs, FluxConfigs)
    if role == "vae":
        return 6 * 4 * pixels * configs.vae.ch * configs.vae.ch_mult[1]
    if role == "transformer":
        tokens = t5_length + pixels // 256
        return 3 * 4 * tokens * (3 * configs.transformer.hidden_size + configs.transformer.mlp_size)
    return 4 * 4 * t5_length * (configs.t5.d_ff if role == "t5" else configs.clip.intermediate_size)


SAMPLES, SAMPLE_BYTES = 64, 65_536


def describe_file(path: Path) -> dict[str, Any]:
    """Name, size and a fingerprint: SHA-256 over the size, the first megabyte and 64 evenly spaced samples,
    so that
    a 24 GB file takes milliseconds. It tells files apart; it does not prove a file unharmed."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(1 << 20))
        for sample in range(SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return {"name": path.name, "bytes": size, "fingerprint": digest.hexdigest()[:32]}


def role_names() -> list[str]:
    """The roles that a user may give a file for."""
    return [field.name for field in fields(FluxFiles)]

"""From files on disk to FLUX networks: check all of them, load each when its stage comes. Floor 6.

Mirrors the Rust worker's `flux_loader.rs`. Nothing is read but headers until a stage asks for its network.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .autoencoder import AutoEncoder
from .checkpoint import open_checkpoint
from .clip import ClipTextEncoder
from .device import Placement, StageNeed, place, size_text
from .errors import MissingFileError
from .flux_files import MAPS, TOKENIZERS, FluxFiles, check_roles
from .flux_mmdit import Flux
from .load_plan import Decode, LoadPlan, fill, keep_stored, plan_load, staying
from .numerics import Numerics, reference
from .request import CancelToken, Progress
from .steps import OnEvent
from .t5 import T5Encoder
from .text import ClipTokenizer, T5Tokenizer
from .versions import FluxConfigs, VersionInfo
from .weight_map import identify

Watcher = Callable[[str, nn.Module], None]  # role, network


class LoadOptions(NamedTuple):
    """How the components of a model are loaded and kept."""

    keep_loaded: bool = False  # networks stay in memory when their stage is over
    automatic: bool = False  # nobody asked for the dtype, so weights may stay as stored where they must
    decode: Decode = "on_use"  # when packed weights are decoded
    fill_from: str | Path | None = None  # a file with the tensors that others lack
    quantized: bool = False  # the version's own quantised transformer was asked for


LOAD_OPTIONS = LoadOptions()


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
        plans: Mapping[str, LoadPlan],
        needs: Mapping[str, StageNeed],
        placement: Placement,
        numerics: Numerics,
        options: LoadOptions,
    ) -> None:
        self.info, self.files, self.placement, self.numerics = info, files, placement, numerics
        self.options = options
        self._plans, self._needs = plans, needs
        self._files = {role: [describe_file(path) for path in plan.files] for role, plan in plans.items()}
        for role in TOKENIZERS:
            folder = getattr(files, f"{role}_tokenizer")
            parts = sorted(folder.iterdir()) if folder.is_dir() else [folder]
            self._files[f"{role}_tokenizer"] = [describe_file(path) for path in parts if path.is_file()]
        self._networks: dict[str, nn.Module] = {}
        self.watchers: list[Watcher] = []  # told of each network that was loaded
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
        options: LoadOptions = LOAD_OPTIONS,
    ) -> FluxComponents:
        """Opens every file and checks names, shapes and memory from the headers alone; loads no weight yet.

        Raises CheckpointError, WeightMapError (with every problem), TokenizerError, NotEnoughMemoryError.
        """
        with ExitStack() as opened:
            plans = _plan_all(info, files, numerics, options.fill_from, opened)
            needs = {role: need(role, info, plans[role], dtype, options.decode) for role in MAPS}
            every = list(needs.values())
            placement = place(every, device, dtype, options.automatic, together=options.keep_loaded)
            notes = (*placement.notes, *_filled_notes(plans), *_decoded_notes(plans, needs, dtype))
            placement = replace(placement, notes=notes)
            made = cls(info, files, plans, needs, placement, numerics, options)
            opened.pop_all()  # from here on they are closed by `close`
            return made

    @torch.inference_mode(False)  # parameters that a later in-place change may touch
    def network(self, role: str, on_event: OnEvent | None = None, cancel: CancelToken | None = None) -> Any:
        """The network of `role`, loaded now if it is not there: every parameter filled, on the device, in
        eval mode.

        Raises Cancelled between two tensors; then nothing of it stays.
        """
        if role not in self._networks:
            module, plan = build(role, self.info, self.numerics), self._plans[role]
            dtype = self.placement.dtype
            keep_stored(module, plan, dtype, everything=role in self.placement.stored)
            on_tensor = _loading(role, on_event, cancel)
            fill(module, plan, dtype, self.placement.device, self.options.decode, on_tensor)
            plan.release()
            self._networks[role] = module.eval()
            for watcher in self.watchers:
                watcher(role, module)
        return self._networks[role]

    @contextmanager
    def watch(self, watcher: Watcher) -> Iterator[None]:
        """While open, `watcher` is shown each network with its role, before it runs for the first time.

        Encoded prompts are forgotten: the encoders run again, and are seen.
        """
        self.texts.clear()
        for role, module in self._networks.items():
            watcher(role, module)
        self.watchers.append(watcher)
        try:
            yield
        finally:
            self.watchers.remove(watcher)

    def check_room(self, width: int, height: int, images: int, t5_length: int) -> None:
        """Raises NotEnoughMemoryError if a request of this size would not fit beside what is loaded."""
        needs = []
        for role, wanted in self._needs.items():
            activations = images * _activations(role, self.info, width * height, t5_length)
            needs.append(replace(self._still_needed(role, wanted), activations=activations))
        place(needs, self.placement.device, self.placement.dtype, False, together=self.options.keep_loaded)

    def _still_needed(self, role: str, wanted: StageNeed) -> StageNeed:
        """What is not in memory yet, counted as it will lie there."""
        if role in self._networks:
            return replace(wanted, parameters=0, stored_bytes=0, packed=0, packed_bytes=0)
        if role in self.placement.stored:
            return replace(wanted, packed=wanted.parameters, packed_bytes=wanted.stored_bytes)
        return wanted

    def free(self, *roles: str) -> None:
        """Lets the networks of `roles` go, unless everything is to stay loaded; and with them the pages of
        their files."""
        if not self.options.keep_loaded:
            for role in roles:
                self._networks.pop(role, None)
                self._plans[role].release()
            empty_cache(self.placement.device)

    @property
    def loaded(self) -> set[str]:
        """The roles whose networks are in memory."""
        return set(self._networks)

    def describe_files(self) -> dict[str, list[dict[str, Any]]]:
        """By role: name, bytes and fingerprint of each file as it was opened, without its path."""
        return self._files

    def describe_weights(self) -> dict[str, dict[str, Any]]:
        """By role: stored types with the number of tensors, bytes on disk, bytes in memory while its stage
        runs, and the parameters that came from `fill_from`."""
        table = {}
        for role, plan in self._plans.items():
            held = self._needs[role].weight_bytes(self.placement.dtype, role in self.placement.stored)
            table[role] = {"types": plan.stored_dtypes, "stored": plan.stored_bytes, "memory": held}
            if plan.filled:
                table[role]["filled"] = list(plan.filled)
        return table

    def close(self) -> None:
        """Lets everything go."""
        self._networks.clear()
        self.texts.clear()
        empty_cache(self.placement.device)
        for plan in self._plans.values():
            plan.close()


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
        if role == "clip":
            return ClipTextEncoder(config.with_gelu(numerics.clip_gelu))
        return {"t5": T5Encoder, "vae": AutoEncoder}[role](config)


def need(
    role: str,
    info: VersionInfo,
    plan: LoadPlan | None = None,
    dtype: torch.dtype = torch.float32,
    decode: Decode = "on_use",
) -> StageNeed:
    """What one stage asks of the memory at the version's default size; without a plan, of a file with 2 bytes
    a parameter."""
    module = build(role, info, reference())
    parameters = sum(p.numel() for p in module.parameters())
    activations = _activations(role, info, info.width * info.height, info.t5_length or 0)
    if plan is None:
        return StageNeed(role, parameters, 2 * parameters, activations, widens=role != "vae")
    packed = staying(module, plan, dtype)
    unpacks = decode == "on_load" and bool(packed)
    return StageNeed(
        role,
        parameters,
        plan.stored_bytes,
        activations,
        widens=role != "vae" and not unpacks,
        packed=0 if unpacks else sum(math.prod(parameter.shape) for parameter in packed),
        packed_bytes=0 if unpacks else sum(plan.bytes_of(parameter) for parameter in packed),
        unpacks=unpacks,
    )


def _plan_all(
    info: VersionInfo, files: FluxFiles, numerics: Numerics, fill_from: str | Path | None, opened: ExitStack
) -> dict[str, LoadPlan]:
    """A plan for each role. A file of several roles is opened once; `opened` closes all after a failure."""
    paths = dict.fromkeys(getattr(files, role) for role in MAPS)
    checkpoints = {path: opened.enter_context(open_checkpoint(path)) for path in paths}
    base = None if fill_from is None else opened.enter_context(open_checkpoint(fill_from))
    held = set() if base is None else {hit.map.component for hit in identify(base.infos.keys())}
    if base is not None and not held & set(MAPS.values()):
        found = f"{base.label} holds no component of a FLUX model, so nothing can be filled from it"
        raise MissingFileError(found + ": give a file of the same component")
    check_roles(info, {role: checkpoints[getattr(files, role)] for role in MAPS}, complete=base is None)
    plans = {}
    for role, component in MAPS.items():
        module, config = build(role, info, numerics), config_of(role, info)
        spare = base if component in held else None
        plans[role] = plan_load(component, module, config, checkpoints[getattr(files, role)], spare)
    return plans


def _filled_notes(plans: Mapping[str, LoadPlan]) -> Iterator[str]:
    for role, plan in plans.items():
        if plan.filled and plan.base is not None:
            first, *more = plan.filled
            count = f"{first} and {len(more)} more" if more else first
            lacking, giving = plan.checkpoint.files[0].name, plan.base.files[0].name
            yield f"{role}: {lacking} lacks {count}; taken from {giving}"
    bases = [plan.base for plan in plans.values() if plan.base is not None]
    if bases and not any(plan.filled for plan in plans.values()):
        yield f"no file lacked a tensor, so nothing was taken from {bases[0].files[0].name}"


def _decoded_notes(
    plans: Mapping[str, LoadPlan], needs: Mapping[str, StageNeed], dtype: torch.dtype
) -> Iterator[str]:
    """What takes more room in memory than on disk although its type is packed."""
    for role, wanted in needs.items():
        plan = plans[role]
        decoded = plan.packed_bytes - wanted.packed_bytes
        if decoded > 0.01 * plan.stored_bytes:
            why = "as asked" if wanted.unpacks else "as only linears and embeddings can stay packed"
            disk, memory = size_text(plan.stored_bytes), size_text(wanted.weight_bytes(dtype))
            found = f"{role}: {size_text(decoded)} of packed weights are decoded at load, {why}"
            yield f"{found}: {disk} on disk, {memory} in memory"


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

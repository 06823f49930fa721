"""The networks of one model, of either family: checked together, loaded one by one, freed after their stage.

Floor 5. Nothing is read but headers until a stage asks for its network. `flux_loader.py` and `sd_loader.py`
say which networks a model has and which file each comes from. Counterpart in the Rust worker: what its
`flux_loader.rs` and `loader.rs` do alike.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from .checkpoint import Checkpoint, open_checkpoint
from .device import Placement, StageNeed, place, size_text
from .errors import MissingFileError
from .load_plan import Decode, LoadPlan, fill, keep_stored, plan_load, staying
from .numerics import Numerics
from .request import CancelToken, Progress
from .steps import OnEvent
from .text import ClipTokenizer, T5Tokenizer
from .versions import VersionInfo
from .weight_map import identify

Watcher = Callable[[str, nn.Module], None]  # role, network
Tokenizer = ClipTokenizer | T5Tokenizer


class Changes(Protocol):
    """What is done to networks after they were read from their files: adapters, see `lora/`."""

    @property
    def roles(self) -> Collection[str]:
        """The networks that are changed."""
        ...

    def apply(self, role: str, module: nn.Module, on_tensor: Callable[[int, int], None]) -> None:
        """Changes a network that was just filled."""
        ...

    def adapted(self, info: VersionInfo) -> VersionInfo:
        """The version as its networks are then."""
        ...

    def inputs(self, role: str) -> int | None:
        """How many input channels a network has then, where that changes."""
        ...

    def bytes_beside(self, role: str, packed: Collection[str], dtype: torch.dtype) -> int:
        """What changes of `packed` parameters take in memory beside them."""
        ...

    def notes(self) -> list[str]:
        """What a user should know."""
        ...

    def describe(self) -> list[dict[str, Any]]:
        """For the record of a picture."""
        ...

    def close(self) -> None:
        """Lets files go."""
        ...


class LoadOptions(NamedTuple):
    """How the components of a model are loaded and kept."""

    keep_loaded: bool = False  # networks stay in memory when their stage is over
    automatic: bool = False  # nobody asked for the dtype, so weights may stay as stored where they must
    decode: Decode = "on_use"  # when packed weights are decoded
    fill_from: str | Path | None = None  # a file with the tensors that others lack
    quantized: bool = False  # the version's own quantised transformer was asked for


LOAD_OPTIONS = LoadOptions()


@dataclass(frozen=True)
class Network:
    """One network of a model: how it is built, and what it takes."""

    component: str  # as the maps call it
    config: Any
    build: Callable[[], nn.Module]  # called on the meta device
    activations: Callable[[int, int], int]  # pixels and text tokens of one image -> bytes in float32
    widens: bool = True  # whether its weights can stay as stored: those of convolutions cannot
    wide: bool = False  # its numbers outgrow float16: it runs in float32 where the model runs in that

    def dtype(self, chosen: torch.dtype) -> torch.dtype:
        """What it runs in where the model runs in `chosen`."""
        return torch.float32 if chosen == torch.float16 and self.wide else chosen

    def on_meta(self) -> nn.Module:
        """Names and shapes, no memory."""
        with torch.device("meta"):
            return self.build()

    @cached_property
    def skeleton(self) -> nn.Module:
        """The same, built once: to look at, not to fill."""
        return self.on_meta()


class Components:
    """The networks and tokenizers of one model; each network is loaded on demand and can be let go."""

    def __init__(
        self,
        info: VersionInfo,
        networks: Mapping[str, Network],
        plans: Mapping[str, LoadPlan],
        tokenizers: Mapping[str, Path],
        load_tokenizer: Callable[[str, Path], Tokenizer],
        placement: tuple[torch.device, torch.dtype],
        numerics: Numerics,
        options: LoadOptions = LOAD_OPTIONS,
    ) -> None:
        """Raises NotEnoughMemoryError, and TokenizerError for one of the `tokenizers`, by role.

        placement: where the networks run, and in which dtype. Closes no plan where it fails.
        """
        device, dtype = placement
        self._info, self.numerics, self.options = info, numerics, options
        self._kinds, self._plans = networks, plans
        self._needs = {
            role: need(role, info, network, plans[role], dtype, options.decode)
            for role, network in networks.items()
        }
        every = list(self._needs.values())
        placed = place(every, device, dtype, options.automatic, together=options.keep_loaded)
        notes = (*placed.notes, *_filled_notes(plans), *_decoded_notes(plans, self._needs, dtype))
        self.placement: Placement = replace(placed, notes=notes)
        self._files = {role: [describe_file(path) for path in plan.files] for role, plan in plans.items()}
        self._networks: dict[str, nn.Module] = {}
        self.watchers: list[Watcher] = []  # told of each network that was loaded
        self.changes: Changes | None = None  # of networks after loading: adapters
        self._beside: dict[str, int] = {}  # role -> bytes that they take beside packed weights
        self.texts: OrderedDict[Any, Any] = OrderedDict()  # encoded prompts, by what they were made from
        self.tokenizers: dict[str, Tokenizer] = {}
        for role, path in tokenizers.items():
            parts = sorted(path.iterdir()) if path.is_dir() else [path]
            self._files[f"{role}_tokenizer"] = [describe_file(part) for part in parts if part.is_file()]
            self.tokenizers[role] = load_tokenizer(role, path)

    @property
    def info(self) -> VersionInfo:
        """The version, as its networks are after any change."""
        return self._info if self.changes is None else self.changes.adapted(self._info)

    def dtype_of(self, role: str) -> torch.dtype:
        """What the network of `role` computes in."""
        return self._kinds[role].dtype(self.placement.dtype)

    @torch.inference_mode(False)  # parameters that a later in-place change may touch
    def network(self, role: str, on_event: OnEvent | None = None, cancel: CancelToken | None = None) -> Any:
        """The network of `role`, loaded now if it is not there: every parameter filled, on the device, in
        eval mode.

        Raises Cancelled between two tensors; then nothing of it stays.
        """
        if role not in self._networks:
            module, plan, dtype = self._kinds[role].on_meta(), self._plans[role], self.dtype_of(role)
            keep_stored(module, plan, dtype, everything=role in self.placement.stored)
            on_tensor = _loading(f"load {role}", on_event, cancel)
            fill(module, plan, dtype, self.placement.device, self.options.decode, on_tensor)
            plan.release()
            if self.changes is not None and role in self.changes.roles:
                self.changes.apply(role, module, _loading(f"adapt {role}", on_event, cancel))
            self._networks[role] = module.eval()
            for watcher in self.watchers:
                watcher(role, module)
        return self._networks[role]

    def config(self, role: str) -> Any:
        """The config of the network of `role`, as it is after any change."""
        config = self._kinds[role].config
        inputs = None if self.changes is None else self.changes.inputs(role)
        return config if inputs is None else replace(config, in_channels=inputs)

    @property
    def kinds(self) -> Mapping[str, Network]:
        """By role, how each network is built, before any change."""
        return self._kinds

    def change(self, changes: Changes | None) -> None:
        """Networks are changed by `changes` from here on, in place of those before, which are closed.

        What either touches is read again from its file when it is next needed, which is the only way back
        that cannot drift; and what was encoded is forgotten.
        """
        before, self.changes = self.changes, changes
        for each in filter(None, (before, changes)):
            for role in each.roles:
                self._networks.pop(role, None)
                self._plans[role].release()
        self.texts.clear()
        self._beside = {} if changes is None else {r: self._bytes_beside(r, changes) for r in changes.roles}
        empty_cache(self.placement.device)
        if before is not None:
            before.close()

    def _bytes_beside(self, role: str, changes: Changes) -> int:
        network, everything, dtype = self._kinds[role], role in self.placement.stored, self.dtype_of(role)
        packed = staying(network.on_meta(), self._plans[role], dtype, everything)
        return changes.bytes_beside(role, {parameter.target for parameter in packed}, dtype)

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

    def check_room(
        self, pixels: int, text_length: int, images: Mapping[str, int], known: Mapping[str, int]
    ) -> None:
        """Raises NotEnoughMemoryError if a request would not fit beside what is loaded: `pixels` of one
        image, tokens of text, and by role how many images a network sees at once; `known`: by role, the bytes
        in float32 of activations that the caller knows better."""
        needs = []
        for role, wanted in self._needs.items():
            activations = known.get(role)
            if activations is None:
                activations = images.get(role, 1) * self._kinds[role].activations(pixels, text_length)
            needs.append(replace(self._still_needed(role, wanted), activations=activations))
        place(needs, self.placement.device, self.placement.dtype, False, together=self.options.keep_loaded)

    def _still_needed(self, role: str, wanted: StageNeed) -> StageNeed:
        """What is not in memory yet, counted as it will lie there."""
        if role in self._networks:
            return replace(wanted, parameters=0, stored_bytes=0, packed=0, packed_bytes=0)
        beside = self._beside.get(role, 0)
        if role in self.placement.stored:
            return replace(wanted, packed=wanted.parameters, packed_bytes=wanted.stored_bytes + beside)
        return replace(wanted, packed_bytes=wanted.packed_bytes + beside)

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

    @property
    def roles(self) -> tuple[str, ...]:
        """Every network that the model has, in the order of the stages."""
        return tuple(self._kinds)

    def describe_files(self) -> dict[str, list[dict[str, Any]]]:
        """By role: name, bytes and fingerprint of each file as it was opened, without its path."""
        return self._files

    def describe_weights(self) -> dict[str, dict[str, Any]]:
        """By role: stored types with the number of tensors, bytes on disk, bytes in memory while its stage
        runs, and the parameters that came from `fill_from`."""
        table = {}
        for role, plan in self._plans.items():
            held = self._needs[role].weight_bytes(self.dtype_of(role), role in self.placement.stored)
            table[role] = {"types": plan.stored_dtypes, "stored": plan.stored_bytes, "memory": held}
            if plan.filled:
                table[role]["filled"] = list(plan.filled)
        return table

    def close(self) -> None:
        """Lets everything go."""
        self._networks.clear()
        self.texts.clear()
        if self.changes is not None:
            self.changes.close()
        empty_cache(self.placement.device)
        for plan in self._plans.values():
            plan.close()


def empty_cache(device: torch.device) -> None:
    """Gives freed memory back to the device, so that the next look at what is available sees it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def _loading(stage: str, on_event: OnEvent | None, cancel: CancelToken | None) -> Callable[[int, int], None]:
    start = time.perf_counter()

    def on_tensor(done: int, total: int) -> None:
        if cancel is not None:
            cancel.check()
        if on_event is not None:
            on_event(Progress(stage, done, total, time.perf_counter() - start))

    return on_tensor


# what a network takes ---------------------------------------------------------------------------------------


def need(
    role: str,
    info: VersionInfo,
    network: Network,
    plan: LoadPlan | None = None,
    dtype: torch.dtype = torch.float32,
    decode: Decode = "on_use",
) -> StageNeed:
    """What one stage asks of the memory at the version's default size; without a plan, of a file with 2 bytes
    a parameter."""
    module = network.skeleton
    parameters = sum(p.numel() for p in module.parameters())
    activations = network.activations(info.width * info.height, info.t5_length or 0)
    if plan is None:
        return StageNeed(role, parameters, 2 * parameters, activations, widens=network.widens)
    packed = staying(module, plan, network.dtype(dtype))
    unpacks = decode == "on_load" and bool(packed)
    return StageNeed(
        role,
        parameters,
        plan.stored_bytes,
        activations,
        widens=network.widens and not unpacks,
        packed=0 if unpacks else sum(math.prod(parameter.shape) for parameter in packed),
        packed_bytes=0 if unpacks else sum(plan.bytes_of(parameter) for parameter in packed),
        unpacks=unpacks,
        wide=network.dtype(dtype) != dtype,
    )


def open_all(
    opened: ExitStack, files: Mapping[str, Path], base: str | Path | None
) -> tuple[dict[str, Checkpoint], Checkpoint | None]:
    """The checkpoint of each role, and that of `base`, for `opened` to close. A file of several roles is
    opened once."""
    paths = dict.fromkeys(files.values())
    checkpoints = {path: opened.enter_context(open_checkpoint(path)) for path in paths}
    spare = None if base is None else opened.enter_context(open_checkpoint(base))
    return {role: checkpoints[path] for role, path in files.items()}, spare


def plan_all(
    networks: Mapping[str, Network],
    checkpoints: Mapping[str, Checkpoint],
    base: Checkpoint | None,
) -> dict[str, LoadPlan]:
    """A plan for each role, from its checkpoint and, where that lacks tensors, from `base`. Raises
    WeightMapError with every problem of the first role that has any, MissingFileError for a base that serves
    no role."""
    held = set() if base is None else {hit.map.component for hit in identify(base.infos.keys())}
    if base is not None and not held & {network.component for network in networks.values()}:
        found = f"{base.label} holds no component of this model, so nothing can be filled from it"
        raise MissingFileError(found + ": give a file of the same component")
    plans = {}
    for role, network in networks.items():
        spare = base if network.component in held else None
        module, component = network.skeleton, network.component
        plans[role] = plan_load(component, module, network.config, checkpoints[role], spare)
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


SAMPLES, SAMPLE_BYTES = 64, 65_536


def describe_file(path: Path) -> dict[str, Any]:
    """Name, size and a fingerprint: SHA-256 over the size, the first megabyte and 64 evenly spaced samples,
    so that a 24 GB file takes milliseconds. It tells files apart; it does not prove a file unharmed."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(1 << 20))
        for sample in range(SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return {"name": path.name, "bytes": size, "fingerprint": digest.hexdigest()[:32]}

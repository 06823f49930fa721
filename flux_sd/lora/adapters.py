"""The adapters of one model: opened, held against its networks, applied to each as it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..components import Network
from ..errors import AdapterError
from ..versions import VersionInfo
from .adapter_file import AdapterFile
from .deltas import DORA, Delta, Full
from .edits import Edit, change, widen
from .formats import WIDENED, prefix_roles
from .names import Names, Target, names_of
from .plan import AdapterPlan, Move, Placed, Table, built

MAX_STRENGTH = 100.0  # more is a mistake in typing
CONTROL_GUIDANCE = "for control LoRAs their authors use 30 (Canny) and 10 (Depth)"


class Lora(NamedTuple):
    """An adapter that is asked for: a file, or the folder that PEFT saves, and how strongly it acts. None: as
    its authors use it, which is 1 for all but control LoRAs (0.85)."""

    file: str | Path
    strength: float | None = None


Asked = Lora | str | Path | tuple[str | Path, float | None]  # in any form that `load_adapters` takes


class _Part(NamedTuple):
    """One move of one change, and how strongly it is meant."""

    file: AdapterFile
    placed: Placed
    move: Move
    is_bias: bool
    strength: float


@dataclass(frozen=True)
class Applied:
    """One adapter of a model, with what a user wants to know of it."""

    plan: AdapterPlan
    strength: float

    @property
    def summary(self) -> str:
        """ "sticker.safetensors at 0.8: transformer 16/16" """
        at = "" if self.strength == 1 else f" at {self.strength:g}"
        return f"{self.plan.file.name}{at}: {self.plan.counts_text}"

    def describe(self) -> dict[str, Any]:
        """For records: which file it was, how strong, how much of it. No path."""
        counts = {role: list(count) for role, count in self.plan.counts().items()}
        return {**self.plan.file.description, "strength": self.strength, "applied": counts}


class Adapters:
    """All adapters of one model, in the order in which they act."""

    def __init__(self, applied: Sequence[Applied]) -> None:
        self.applied = tuple(applied)
        self._parts: dict[str, dict[str, list[_Part]]] = {}  # role -> parameter -> what changes it, in order
        for entry in self.applied:
            if entry.strength == 0:
                continue
            for placed in entry.plan.placed:
                parameters = self._parts.setdefault(placed.role, {})
                for moves, is_bias in ((placed.weight, False), (placed.bias, True)):
                    for move in moves:
                        part = _Part(entry.plan.file, placed, move, is_bias, entry.strength)
                        parameters.setdefault(move.target, []).append(part)

    @classmethod
    def open(cls, asked: Sequence[Lora], table: Table, model: str, partial: bool = False) -> Adapters:
        """Opens every file and places every change; reads headers only.

        Raises AdapterError for a file that is no adapter, or that does not fit completely (with `partial`:
        not at all), MissingFileError, CheckpointError. Then nothing stays open.
        """
        with ExitStack() as opened:
            applied = []
            for lora in asked:
                file = opened.enter_context(AdapterFile.open(lora.file))
                plan = table.plan(file)
                strength = plan.strength if lora.strength is None else float(lora.strength)
                if not -MAX_STRENGTH <= strength <= MAX_STRENGTH:
                    found = f"{file.path}: the strength {strength:g}"
                    raise AdapterError(f"{found} is outside -{MAX_STRENGTH:g}..{MAX_STRENGTH:g}")
                plan.check(model, partial)
                applied.append(Applied(plan, strength))
            opened.pop_all()  # from here on they are closed by `close`
            return cls(applied)

    @property
    def roles(self) -> Collection[str]:
        """The networks that they change."""
        return self._parts.keys()

    def notes(self) -> list[str]:
        """What a user should know: how much of each was applied, and what was not known of it."""
        return [note for entry in self.applied for note in (entry.summary, *entry.plan.file.notes)]

    def describe(self) -> list[dict[str, Any]]:
        """For the record of a picture."""
        return [entry.describe() for entry in self.applied]

    def adapted(self, info: VersionInfo) -> VersionInfo:
        """The version as they make it: with a control LoRA it follows a control picture."""
        controlled = any(self.inputs(role) is not None for role in self.roles)
        return _controlled(info) if controlled else info

    def inputs(self, role: str) -> int | None:
        """How many input channels the first layer of a network is widened to, None for as many as it has."""
        wide = [e.plan.widened[role] for e in self.applied if e.strength and role in e.plan.widened]
        return max(wide, default=None)

    def bytes_beside(self, role: str, packed: Collection[str], dtype: torch.dtype) -> int:
        """What the changes of weights that stay `packed` take in memory, computing in `dtype`."""
        total = 0
        for target, parts in self._parts.get(role, {}).items():
            if target in packed:
                total += sum(_bytes(part) for part in parts) * dtype.itemsize // 4
        return total

    def apply(self, role: str, module: nn.Module, on_tensor: Callable[[int, int], None]) -> None:
        """Changes a network that was just filled. `on_tensor(done, total)` runs before each parameter and
        once at the end; whatever it raises stops the work, and the network is then of no use.

        Raises AdapterError where a file holds NaN or infinity.
        """
        parameters = self._parts.get(role, {})
        columns = self.inputs(role)
        if columns is not None:
            widen(module, WIDENED.rpartition(".")[0], columns)
        for done, (target, parts) in enumerate(parameters.items()):
            on_tensor(done, len(parameters))
            change(module, target, [_edit(part, _device(module, target)) for part in parts])
        on_tensor(len(parameters), len(parameters))

    def close(self) -> None:
        """Lets the files go."""
        for entry in self.applied:
            entry.plan.file.close()


def table_of(networks: Mapping[str, Network], known: dict[Any, Names] | None = None) -> Table:
    """The names of every network of a model that adapters change. known: those of other models, by component
    and config, of which some may be the same; grows."""
    known = {} if known is None else known
    names = {}
    for role, network in networks.items():
        if role not in prefix_roles():
            continue
        key = (network.component, network.config)
        if key not in known:
            known[key] = names_of(Target.of(*key, network.on_meta()))
        names[role] = known[key]
    return Table(names)


def check_files(asked: Iterable[Lora]) -> None:
    """Refuses files that are no adapters before anything large is opened or fetched. Raises as `open`."""
    for lora in asked:
        AdapterFile.open(lora.file).close()


def with_adapters(info: VersionInfo, asked: Iterable[Lora]) -> VersionInfo:
    """As `Adapters.adapted`, told from the headers of files that were not held against a model yet."""
    columns = 0 if info.flux is None else info.flux.transformer.in_channels
    for lora in asked:
        with AdapterFile.open(lora.file) as file:
            if lora.strength != 0 and columns and file.widens(columns):
                return _controlled(info)
    return info


def _controlled(info: VersionInfo) -> VersionInfo:
    return replace(info, takes_control=True, guidance_note=CONTROL_GUIDANCE)


def describe(path: Path) -> dict[str, Any]:
    """Name, bytes and fingerprint of an adapter's file. Raises as `Adapters.open`."""
    with AdapterFile.open(path) as file:
        return dict(file.description)


def as_loras(asked: Iterable[Asked]) -> list[Lora]:
    """Files, with strengths or without, in one form."""
    return [Lora(given) if isinstance(given, str | Path) else Lora(*given) for given in asked]


# one change -------------------------------------------------------------------------------------------------


def _device(module: nn.Module, target: str) -> torch.device:
    """Where a parameter is; of a packed one, where its rows are."""
    layer = module.get_submodule(target.rpartition(".")[0])
    return next(iter([*layer.parameters(), *layer.buffers()])).device


def _edit(part: _Part, device: torch.device) -> Edit:
    """Reads the tensors of one change and cuts out the rows of one move."""
    placed, move = part.placed, part.move
    values = {kind: tensor.to(device) for kind, tensor in part.file.read(placed.change).items()}
    delta = _bias(placed, values) if part.is_bias else _weight(placed, values)
    if (move.at, move.rows) != (0, delta.shape[0]):
        delta = delta.part(move.at, move.rows)
    if move.transposed:
        delta = delta.transposed()
    magnitudes = None
    if not part.is_bias:
        found = next((values[kind].flatten() for kind in DORA if kind in values), None)
        rows = slice(move.at, move.at + move.rows)
        magnitudes = found if found is None or placed.axis else found[rows]
    replaces = "set" in values
    return Edit(move.first, delta, part.strength, replaces, magnitudes, placed.axis)


def _weight(placed: Placed, values: dict[str, Tensor]) -> Delta:
    assert placed.change.algorithm is not None
    return placed.change.algorithm.build(values).scaled(placed.change.scale)


def _bias(placed: Placed, values: dict[str, Tensor]) -> Delta:
    """LoRA's bias is scaled as its matrices are; a difference is what it is."""
    if "bias" in values:
        return Full(values["bias"].reshape(-1, 1) * placed.change.scale)
    return Full(values["diff_b"].reshape(-1, 1))


def _bytes(part: _Part) -> int:
    """Of one change in float32, from its header alone."""
    delta = built(part.placed.change)
    whole = part.placed.axis == 1 or "set" in part.placed.change.tensors
    return 4 * delta.shape[0] * delta.shape[1] if whole else delta.nbytes

"""A file of an adapter: its tensors sorted by the layer that they change, its algorithm, its scales.

Reads headers, and the scalars called alpha. Scale of a low-rank change: alpha / r with r from the tensors
themselves; 1 where alpha is missing or 0. PEFT's alpha stands in adapter_config.json beside the file, or in
the header under `lora_adapter_metadata` (diffusers), each with exceptions by pattern.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, open_checkpoint
from ..components import describe_file
from ..errors import AdapterError
from ..sniff import OTHER, sniff
from ..tensor_info import TensorInfo
from ..weight_map import TITLES, identify
from .deltas import ALGORITHMS, Algorithm
from .formats import FIRST_COLUMNS, FIRST_LAYERS, PEFT_SAVED, not_built, prefixes_of, split_ending

CONFIG = "adapter_config.json"
HEADER_CONFIG = "lora_adapter_metadata"
MAX_CONFIG = 2**20  # bytes
BARE = "bare tensors"  # the family of what has a tensor's name and no ending of an adapter
PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.")


@dataclass(frozen=True)
class Change:
    """What a file has for one layer."""

    name: str  # of the layer as the file writes it, prefix included
    tensors: Mapping[str, TensorInfo]  # by kind, see deltas.py
    family: str  # whose names they have
    algorithm: Algorithm | None  # None where its tensors do not make a change
    alpha: float | None
    scale: float

    @property
    def rank(self) -> int | None:
        """Of a low-rank change."""
        return None if self.algorithm is None else self.algorithm.rank(self.on_meta())

    @property
    def prefix(self) -> str:
        """What stands before its path, as far as the name alone says."""
        return prefixes_of(self.name)[0][0].text

    @property
    def dialect(self) -> str:
        """Whose names, behind which prefix: what problems are grouped by."""
        return self.family + (f" behind {self.prefix!r}" if self.prefix else "")

    @property
    def is_dora(self) -> bool:
        return "dora_scale" in self.tensors or "magnitude" in self.tensors

    def on_meta(self) -> dict[str, Tensor]:
        """Its tensors without values."""
        return {kind: torch.empty(info.shape, device="meta") for kind, info in self.tensors.items()}


@dataclass(frozen=True)
class AdapterFile:
    """One adapter, open. A context manager."""

    path: Path  # as it was given
    checkpoint: Checkpoint
    changes: tuple[Change, ...]
    family: str  # the model that it looks made for, such as "SDXL"; "" where that cannot be told
    description: Mapping[str, Any]  # name, bytes and fingerprint of its file, for records
    notes: tuple[str, ...] = ()  # what a user should know of it

    @classmethod
    def open(cls, path: str | Path) -> AdapterFile:
        """Reads the header. Raises MissingFileError, CheckpointError, AdapterError for a file of no kind that
        is built."""
        path = Path(path)
        checkpoint = open_checkpoint(path)
        try:
            refuse_others(checkpoint)
            changes = _changes(checkpoint, PeftScales.of(path, checkpoint))
            found = [part.family for part in sniff(checkpoint) if part.component == "adapter"]
            family = next(filter(None, found), "")
            notes = _notes(checkpoint, changes)
            return cls(path, checkpoint, changes, family, describe_file(checkpoint.files[0]), notes)
        except BaseException:
            checkpoint.close()
            raise

    @property
    def name(self) -> str:
        """Of the file, without the folder."""
        return str(self.description["name"])

    def widens(self, columns: int) -> bool:
        """Whether it is a control LoRA for a model whose first layer has so many columns: its own change of
        that layer has as many again, for the control picture."""
        return any(
            "down" in change.tensors and change.tensors["down"].shape[1:] == (2 * columns,)
            for change in self.changes
            if any(path in FIRST_LAYERS for _, path in prefixes_of(change.name))
        )

    @property
    def is_control(self) -> bool:
        """Whether it looks a control LoRA of Black Forest Labs, without a model to hold it against."""
        return self.widens(FIRST_COLUMNS)

    def read(self, change: Change) -> dict[str, Tensor]:
        """The tensors of one layer in float32. Raises AdapterError where one holds NaN or infinity."""
        values = {}
        for kind, info in change.tensors.items():
            tensor = self.checkpoint.read(info.name).to(torch.float32)
            if not torch.isfinite(tensor).all():
                raise AdapterError(f"{self.path}: {info.name} holds NaN or infinity: the file is damaged")
            values[kind] = tensor
            self.checkpoint.release(info.name)
        return values

    def close(self) -> None:
        """Lets the file go."""
        self.checkpoint.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def refuse_others(checkpoint: Checkpoint) -> None:
    """Raises AdapterError for files that are no adapter, or one of a kind that is not built."""
    infos = checkpoint.infos
    kind = not_built(infos)
    if kind is not None:
        built = ", ".join(algorithm.name for algorithm in ALGORITHMS.values())
        text = f"{checkpoint.label} is {kind}, which is not built; built are {built} and DoRA"
        raise AdapterError(text)
    parts = [hit.map.component for hit in identify(infos.keys())]
    if parts:
        what = " and ".join(dict.fromkeys(TITLES.get(part, part) for part in parts))
        raise AdapterError(f"{checkpoint.label} is {what}, no adapter: give it as a part of the model")
    if not any(split_ending(name) for name in infos):
        others = [part.what for part in sniff(checkpoint) if part.component not in ("adapter", OTHER)]
        found = " and ".join(others) or f"its {len(infos)} tensors have names of no known kind"
        raise AdapterError(f"{checkpoint.label} is no adapter of a known kind: {found}")


# sorting ----------------------------------------------------------------------------------------------------


def _changes(checkpoint: Checkpoint, scales: PeftScales) -> tuple[Change, ...]:
    """Every layer that a file has tensors for, in the order of the file."""
    layers: dict[str, dict[str, TensorInfo]] = {}
    families: dict[str, str] = {}
    for name, info in checkpoint.infos.items():
        layer, kind, family = name, "set", BARE
        found = split_ending(name)
        if found is not None:
            layer, kind, family = found[0], found[1].kind, found[1].family
        kinds = layers.setdefault(layer, {})
        if kind in kinds:
            text = f"{checkpoint.label}: {kinds[kind].name} and {name} are the same part of {layer}"
            raise AdapterError(text + ": give a file that has one of them")
        kinds[kind] = info
        families[layer] = families.get(layer) or family
    return tuple(_change(name, kinds, families[name], checkpoint, scales) for name, kinds in layers.items())


def _change(
    name: str, tensors: dict[str, TensorInfo], family: str, checkpoint: Checkpoint, scales: PeftScales
) -> Change:
    kinds = frozenset(tensors)
    algorithm = next((known for known in ALGORITHMS.values() if known.complete(kinds)), None)
    alpha = _scalar(checkpoint, tensors.pop("alpha")) if "alpha" in tensors else None
    change = Change(name, tensors, family or "several programs", algorithm, alpha, 1.0)
    rank, root = _safe_rank(change), False
    if alpha is None and algorithm is not None and algorithm.scaled:
        alpha, rank, root = scales.find(name, rank)
    if not alpha or rank is None:
        return replace(change, alpha=alpha)
    return replace(change, alpha=alpha, scale=alpha / (math.sqrt(rank) if root else rank))


def _safe_rank(change: Change) -> int | None:
    """The rank, None for tensors that have none: planning says what is wrong with those."""
    try:
        return change.rank or None
    except IndexError:
        return None


def _scalar(checkpoint: Checkpoint, info: TensorInfo) -> float:
    """The one number of a tensor of any type. Raises AdapterError."""
    if math.prod(info.shape) != 1:
        found = f"{checkpoint.label}: {info.name} has the shape {list(info.shape)}"
        raise AdapterError(f"{found}, one number was expected: the file is damaged")
    value = float(checkpoint.read(info.name).item())
    if not math.isfinite(value):
        raise AdapterError(f"{checkpoint.label}: {info.name} is {value}: the file is damaged")
    return value


def _notes(checkpoint: Checkpoint, changes: Iterable[Change]) -> tuple[str, ...]:
    unknown = any(
        change.alpha is None and change.algorithm is not None and change.algorithm.scaled
        for change in changes
    )
    if not unknown or not _is_peft_saved(checkpoint):
        return ()
    name = checkpoint.files[0].name
    return (f"{name}: alpha is neither in it nor in an {CONFIG} beside it: its scale is taken as 1",)


def _is_peft_saved(checkpoint: Checkpoint) -> bool:
    return any(mark in name for name, mark in itertools.product(checkpoint.infos, PEFT_SAVED))


# PEFT's configuration ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PeftScales:
    """alpha as PEFT keeps it, beside the tensors: by component of the pipeline, "" for a file of one."""

    configs: Mapping[str, Mapping[str, Any]]
    where: str  # they were read, for messages

    @classmethod
    def of(cls, path: Path, checkpoint: Checkpoint) -> PeftScales:
        """From the header, else from adapter_config.json beside a file that PEFT wrote, as its name or those
        of its tensors say."""
        text = checkpoint.metadata.get(HEADER_CONFIG)
        if text is not None:
            where = f"{checkpoint.label}: {HEADER_CONFIG} in the header"
            return cls(_by_component(_table(text, where)), where)
        beside = path / CONFIG if path.is_dir() else path.with_name(CONFIG)
        is_peft = path.is_dir() or path.stem.startswith("adapter_model") or _is_peft_saved(checkpoint)
        if is_peft and beside.is_file():
            with beside.open("rb") as file:
                content = file.read(MAX_CONFIG).decode("utf-8", "replace")
            return cls({"": _table(content, str(beside))}, str(beside))
        return cls({}, "")

    def find(self, module: str, rank: int | None) -> tuple[float | None, int | None, bool]:
        """(alpha, rank, whether alpha is divided by its root) of a layer, as the file writes it. The rank is
        that of its tensors; where these show none (LoKr of whole factors), it is the configured one."""
        for prefix, path in prefixes_of(module):
            config = self.configs.get(prefix.text.partition(".")[0] if prefix.text else "")
            config = self.configs.get("") if config is None else config
            if config is not None:
                rank = int(self._number(config["r"])) if rank is None and "r" in config else rank
                return self._alpha(config, path), rank or None, config.get("use_rslora") is True
        return None, rank, False

    def _alpha(self, config: Mapping[str, Any], path: str) -> float | None:
        patterns = config.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise AdapterError(f"{self.where}: alpha_pattern is no table")
        for pattern, alpha in patterns.items():
            plain = pattern.removeprefix("^").removesuffix("$")
            if not PLAIN.issuperset(plain):
                text = f"{self.where}: alpha_pattern has {pattern[:100]!r}, and only plain names are read"
                raise AdapterError(text + ": save the adapter with alpha beside each layer")
            if path == plain or path.endswith("." + plain):
                return self._number(alpha)
        alpha = config.get("lora_alpha", config.get("alpha"))
        return None if alpha is None else self._number(alpha)

    def _number(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise AdapterError(f"{self.where}: alpha is {str(value)[:100]!r}, a number was expected")
        return float(value)


def _table(text: str, where: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{where} is no valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise AdapterError(f"{where} is no JSON table")
    return content


def _by_component(table: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{"unet.r": 4, "text_encoder.r": 8} -> {"unet": {"r": 4}, "text_encoder": {"r": 8}}"""
    configs: dict[str, dict[str, Any]] = {}
    for key, value in table.items():
        component, dot, field = key.partition(".")
        configs.setdefault(component if dot else "", {})[field if dot else key] = value
    return configs

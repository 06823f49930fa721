"""Where every change of an adapter goes in a model's networks, told from headers; and what does not fit.

A change is placed whole or not at all. Nothing is applied in part unless that was asked for, and an adapter
of which nothing fits is always refused.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import AdapterError
from .adapter_file import BARE, AdapterFile, Change
from .deltas import DORA, Delta, magnitude_axis
from .formats import CONTROL_STRENGTH, NORMS, WIDENED, Prefix, prefixes_of
from .names import Layer, Names, Source

LISTED = 5  # names of one dialect in a message; AdapterError.problems has all


@dataclass(frozen=True)
class Move:
    """Rows `at` to `at + rows` of a change, which go to rows `first` on of our parameter."""

    target: str
    first: int
    rows: int
    at: int
    transposed: bool = False


@dataclass(frozen=True)
class Placed:
    """One change and where it goes."""

    change: Change
    role: str
    layout: str  # of whose checkpoints the layer's name is
    weight: tuple[Move, ...]
    bias: tuple[Move, ...]
    axis: int = 0  # of DoRA's magnitudes

    @property
    def moves(self) -> tuple[Move, ...]:
        return (*self.weight, *self.bias)


@dataclass(frozen=True)
class Misfit:
    """One change that does not fit."""

    change: Change
    role: str  # that it is for, or "" if the model has none such
    why: str


@dataclass(frozen=True)
class AdapterPlan:
    """One adapter held against one model."""

    file: AdapterFile
    placed: tuple[Placed, ...]
    misfits: tuple[Misfit, ...]
    widened: Mapping[str, int]  # role -> input channels that its first layer is to have

    @property
    def strength(self) -> float:
        """What its authors use it with."""
        return CONTROL_STRENGTH if self.widened else 1.0

    @property
    def total(self) -> int:
        return len(self.placed) + len(self.misfits)

    def counts(self) -> dict[str, tuple[int, int]]:
        """(applied, total) by role; "" for changes of networks that the model does not have."""
        applied = Counter(placed.role for placed in self.placed)
        total = applied + Counter(misfit.role for misfit in self.misfits)
        return {role: (applied[role], count) for role, count in total.items()}

    @property
    def counts_text(self) -> str:
        """ "transformer 16/16, clip 4/4" """
        return ", ".join(
            f"{role or 'of no network of this model'} {applied}/{total}"
            for role, (applied, total) in self.counts().items()
        )

    def check(self, model: str, partial: bool = False) -> None:
        """Raises AdapterError unless everything fits, or with `partial`, anything. `model`: for messages."""
        if self.placed and (partial or not self.misfits):
            return
        texts = [f"{misfit.change.name}: {misfit.why}" for misfit in self.misfits]
        found = f" It looks made for {self.file.family}." if self.file.family else ""
        advice = " Nothing was applied." if not self.placed else ""
        if self.placed:
            advice = " Nothing was applied; --lora-partial (partial=True) applies what fits."
        head = f"{self.file.path} does not fit {model}: {len(self.placed)} of {self.total} changes fit."
        raise AdapterError("\n".join([head + found + advice, *_by_dialect(self.misfits)]), texts)


def _by_dialect(misfits: Iterable[Misfit]) -> list[str]:
    groups: dict[str, list[Misfit]] = {}
    for misfit in misfits:
        groups.setdefault(misfit.change.dialect, []).append(misfit)
    lines = []
    for dialect, members in groups.items():
        lines.append(f"  names of {dialect} ({len(members)}):")
        lines += [f"    {member.change.name}: {member.why}" for member in members[:LISTED]]
        if len(members) > LISTED:
            lines.append(f"    ... and {len(members) - LISTED} more")
    return lines


class Table:
    """The names of all networks of one model, made once for all its adapters."""

    def __init__(self, names: Mapping[str, Names]) -> None:
        """names: of each network, by role."""
        self.names = names

    def plan(self, file: AdapterFile) -> AdapterPlan:
        """Holds an adapter against the networks; reads no weight."""
        placed: list[Placed] = []
        misfits: list[Misfit] = []
        widened: dict[str, int] = {}
        taken: dict[tuple[str, str], list[tuple[Move, Change]]] = {}
        for change in file.changes:
            made = self._place(change, file, widened)
            if isinstance(made, Placed):
                made = _once(made, taken)
            if isinstance(made, Placed):
                placed.append(made)
            else:
                misfits.append(made)
        return AdapterPlan(file, tuple(placed), tuple(misfits), widened)

    def _place(self, change: Change, file: AdapterFile, widened: dict[str, int]) -> Placed | Misfit:
        """The first reading of the name under which the change fits, else why the likeliest does not."""
        misfits: list[Misfit] = []
        for prefix, path in prefixes_of(change.name):
            for role in (role for role in prefix.roles if role in self.names):
                layer = self._layer(change, role, prefix, path)
                if layer is None:
                    continue
                try:
                    return self._fit(change, role, layer, file, widened)
                except ValueError as error:
                    misfits.append(Misfit(change, role, str(error)))
        return misfits[0] if misfits else self._unknown(change)

    def _layer(self, change: Change, role: str, prefix: Prefix, path: str) -> Layer | None:
        names = self.names[role]
        if change.family != BARE:
            return names.find(path, prefix.flat)
        source = names.tensors.get(path) if path.endswith(NORMS) and not prefix.flat else None
        return None if source is None else Layer((source,))

    def _unknown(self, change: Change) -> Misfit:
        prefix = prefixes_of(change.name)[0][0]
        roles = [role for role in prefix.roles if role in self.names]
        if not roles:
            return Misfit(change, "", f"this model has no {' or '.join(prefix.roles)}")
        if change.family == BARE:
            return Misfit(change, roles[0], "no tensor that an adapter has")
        return Misfit(change, roles[0], f"the {roles[0]} has no layer of this name")

    def _fit(
        self, change: Change, role: str, layer: Layer, file: AdapterFile, widened: dict[str, int]
    ) -> Placed:
        """ValueError says what does not fit."""
        algorithm = change.algorithm
        if algorithm is None:
            kinds = ", ".join(sorted(change.tensors)) or "alpha alone"
            raise ValueError(f"its tensors ({kinds}) make no change of a known algorithm")
        given = change.on_meta()
        if any(not info.is_float for kind, info in change.tensors.items() if kind != "reshape"):
            raise ValueError("its tensors are integers, floating-point numbers were expected")
        weight: tuple[Move, ...] = ()
        axis = 0
        if given.keys() != {"diff_b"}:
            delta = built(change)
            target = layer.weight[0].parts[0].parameter if layer.weight else ""
            may_widen = target == WIDENED and file.widens(layer.weight[0].columns)
            weight = _moves(layer.weight, delta.shape, algorithm.kernel(given), may_widen)
            if may_widen and delta.shape[1] > layer.weight[0].columns:
                widened[role] = delta.shape[1]
            axis = _axis(change, delta.shape, weight)
        bias = _bias_moves(change, layer)
        return Placed(change, role, layer.weight[0].dialect if layer.weight else "", weight, bias, axis)


def _once(placed: Placed, taken: dict[tuple[str, str], list[tuple[Move, Change]]]) -> Placed | Misfit:
    """The change, unless one before it in its file is of the same rows under another name: nobody means the
    sum of the two. `taken`: by role and parameter, what was placed before; grows."""
    for move in placed.moves:
        for other, change in taken.get((placed.role, move.target), ()):
            if move.first < other.first + other.rows and other.first < move.first + move.rows:
                why = f"it changes what {change.name} changes too: give a file that has one of them"
                return Misfit(placed.change, placed.role, why)
    for move in placed.moves:
        taken.setdefault((placed.role, move.target), []).append((move, placed.change))
    return placed


def built(change: Change) -> Delta:
    """The change on meta, for its shape. ValueError where its tensors do not go together."""
    assert change.algorithm is not None
    try:
        return change.algorithm.build(change.on_meta())
    except (RuntimeError, IndexError, ValueError) as error:
        shapes = " and ".join(f"{kind} {list(info.shape)}" for kind, info in change.tensors.items())
        raise ValueError(f"its tensors do not go together: {shapes}") from error


def _moves(
    sources: Sequence[Source], shape: tuple[int, int], kernel: tuple[int, ...] | None, may_widen: bool = False
) -> tuple[Move, ...]:
    """Where the rows of a change of this shape go. ValueError if the layer has another shape."""
    if not sources:
        raise ValueError("the layer has no weight")
    rows, columns = sum(source.rows for source in sources), sources[0].columns
    own = sources[0].kernel
    same_kernel = kernel in (None, own) or {kernel, own} <= {(), (1, 1)}
    if shape[0] != rows or (shape[1] < columns if may_widen else shape[1] != columns) or not same_kernel:
        found, want = f"{shape[0]}x{shape[1]}", f"{rows}x{columns}"
        kernels = "" if same_kernel else f", with kernels of {list(kernel or ())} and {list(own)}"
        raise ValueError(f"the change is {found}, the layer {want}{kernels}")
    ends = list(itertools.accumulate(source.rows for source in sources))
    return tuple(
        Move(part.parameter, part.first, part.rows, end - source.rows + part.at, part.transposed)
        for end, source in zip(ends, sources, strict=True)
        for part in source.parts
    )


def _axis(change: Change, shape: tuple[int, int], moves: Sequence[Move]) -> int:
    """Along which axis DoRA's magnitudes run."""
    for kind in DORA:
        if kind in change.tensors:
            axis = magnitude_axis(change.tensors[kind].shape, kind, *shape)
            if any(move.transposed for move in moves) or (axis == 1 and len(moves) > 1):
                raise ValueError("DoRA of a layer whose rows this model keeps apart is not built")
            return axis
    return 0


def _bias_moves(change: Change, layer: Layer) -> tuple[Move, ...]:
    """Where the bias of a change goes: LoRA's `bias`, or a difference of the bias."""
    info = change.tensors.get("bias") or change.tensors.get("diff_b")
    if info is None:
        return ()
    if not layer.bias:
        raise ValueError("it changes a bias, which the layer does not have")
    return _moves(layer.bias, (math.prod(info.shape), 1), ())

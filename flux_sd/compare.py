"""Compares two records stage by stage, and names the first that differs. Floor 3.

A record is any safetensors file. Both are read piece by piece, so that memory does not depend on their size;
all sums are float64. The second record is the reference: relative differences are ||a - b|| / ||b||, over the
whole tensor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .compare_names import NameRule, our_names
from .errors import RequestError
from .record_file import ORDER_KEY, ORDER_OF_RUN
from .tensor_info import TensorInfo

# Relative differences that pass where nothing else is said. Whole numbers such as token ids must be equal:
# one wrong id among hundreds of large ones makes a small relative difference. Of 8-bit pixels some may be
# rounded to the next level; it is 5e-3 if about half of them are.
TOLERANCE, PIXELS = 1e-4, 4e-3
CELLS = 96  # of a heat strip
PIECE = 2**20  # elements of either tensor in memory at a time
Verdict = Literal["equal", "within", "over", "not finite", "shape"]
# In which order stages of unknown origin are shown; what is not listed comes in its place by number and name.
USUAL_ORDER = (
    "ids", "ids_2", "uncond.clip.ids", "uncond.clip_2.ids", "clip.ids", "clip_2.ids", "t5.ids", "init",
    "masked", "mask", "uncond", "clip", "clip_2", "t5", "hidden", "noise", "packed", "timesteps", "step",
    "latents", "vae", "image", "pixels",
)  # fmt: skip


@dataclass(frozen=True)
class Tolerances:
    """Largest relative differences that pass: one for all, and pairs of pattern and value, the last to match
    holding."""

    default: float | None = None
    patterns: tuple[tuple[str, float], ...] = ()

    def of(self, name: str, infos: Sequence[TensorInfo]) -> float:
        """That of one stage, by its name and by what is stored."""
        for pattern, value in reversed(self.patterns):
            if fnmatchcase(name, pattern):
                return value
        if any(info.dtype == "U8" for info in infos):
            return PIXELS
        if not all(info.is_float for info in infos):
            return 0.0
        return TOLERANCE if self.default is None else self.default

    def check(self, names: Iterable[str]) -> None:
        """Raises RequestError for a pattern that no compared stage matches."""
        known = list(names)
        for pattern, _ in self.patterns:
            if known and not any(fnmatchcase(name, pattern) for name in known):
                raise RequestError(f"no stage that both files hold matches the tolerance for {pattern!r}")


@dataclass(frozen=True)
class Row:
    """One stage of both records. Without common shape there are no numbers; `strip` has CELLS or fewer."""

    name: str
    names: tuple[str, str]  # in either file
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtypes: tuple[str, str]
    tolerance: float
    verdict: Verdict
    max_abs: float = math.nan
    relative: float = math.nan
    cosine: float = math.nan
    not_finite: tuple[int, int] = (0, 0)  # values that are NaN or infinite, in either tensor
    strip: tuple[float, ...] = ()  # root mean square of a - b in a cell, relative to that of the whole b

    @property
    def passes(self) -> bool:
        return self.verdict in ("equal", "within")


@dataclass(frozen=True)
class Comparison:
    """All stages in the order in which they are computed, and those that only one file holds."""

    files: tuple[str, str]
    rows: tuple[Row, ...]
    only: tuple[tuple[str, ...], tuple[str, ...]]

    @property
    def first_over(self) -> Row | None:
        """The first stage that does not pass."""
        return next((row for row in self.rows if not row.passes), None)

    @property
    def passes(self) -> bool:
        """Whether anything could be compared, and all of it agrees."""
        return bool(self.rows) and self.first_over is None


def compare(
    a: Checkpoint,
    b: Checkpoint,
    *,
    tolerances: Tolerances | None = None,
    rules: Sequence[NameRule] = (),
    patterns: Sequence[str] = (),
    on_row: Callable[[Row], None] | None = None,
) -> Comparison:
    """Holds every stage of `a` against that of the same name in `b`, the reference.

    rules: other programs' names, turned into ours in whichever file has them. patterns: only stages that
    match one. on_row: told of each stage once it is compared. Raises RequestError for a rule, a pattern or a
    tolerance that is about nothing in the files.
    """
    tolerances = tolerances or Tolerances()
    used: set[NameRule] = set()
    found = tuple(our_names(in_order(file), rules, used) for file in (a, b))
    unused = [rule.theirs for rule in rules if rule not in used]
    if unused:
        raise RequestError(
            f"the names file is about {', '.join(map(repr, unused))}, which neither file holds"
        )
    chosen = _chosen(_aligned(a, b, *found), patterns)
    common = [name for name in chosen if name in found[0] and name in found[1]]
    tolerances.check(common)
    rows = []
    for name in common:
        rows.append(_row(name, (a, found[0][name]), (b, found[1][name]), tolerances))
        if on_row is not None:
            on_row(rows[-1])
    only_a, only_b = (tuple(name for name in chosen if name not in other) for other in (found[1], found[0]))
    return Comparison((a.label, b.label), tuple(rows), (only_a, only_b))


def _chosen(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The names that a pattern matches; all, where there is none. Raises RequestError, see `compare`."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise RequestError(f"no stage of either file matches {pattern!r}")
    return [name for name in names if not patterns or any(fnmatchcase(name, p) for p in patterns)]


# -------------------------------------------------------------------------------------------- order


def in_order(file: Checkpoint) -> list[str]:
    """The names of a file in the order of the run: as it was written if it says so, else by usual order."""
    if knows_order(file):
        return sorted(file.names, key=lambda name: file.infos[name].offset)
    return sorted(file.names, key=_usual_place)


def knows_order(file: Checkpoint) -> bool:
    """Whether the tensors lie in the order in which they were computed; most programs sort them by name."""
    return file.metadata.get(ORDER_KEY) == ORDER_OF_RUN


def _usual_place(name: str) -> tuple[object, ...]:
    starts = [i for i, start in enumerate(USUAL_ORDER) if name == start or name.startswith(start + ".")]
    numbered = [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
    return (starts[0] if starts else USUAL_ORDER.index("step"), numbered)


def _aligned(a: Checkpoint, b: Checkpoint, in_a: Mapping[str, str], in_b: Mapping[str, str]) -> list[str]:
    """All names, in the order of the file that knows it best; those of the other alone come last."""
    first, second = (in_a, in_b) if knows_order(a) or not knows_order(b) else (in_b, in_a)
    if not knows_order(a) and not knows_order(b):
        return sorted({**first, **second}, key=_usual_place)
    return [*first, *(name for name in second if name not in first)]


# ---------------------------------------------------------------------------------------- one stage


def _row(name: str, a: tuple[Checkpoint, str], b: tuple[Checkpoint, str], tolerances: Tolerances) -> Row:
    info_a, info_b = a[0].info(a[1]), b[0].info(b[1])
    names, shapes = (a[1], b[1]), (info_a.shape, info_b.shape)
    dtypes = (info_a.dtype, info_b.dtype)
    tolerance = tolerances.of(name, (info_a, info_b))
    if _core(info_a.shape) != _core(info_b.shape):
        return Row(name, names, shapes, dtypes, tolerance, "shape")
    longer = max(info_a.shape, info_b.shape, key=len)
    sums = _Sums(info_b.numel, *_positions(longer))
    # Whole numbers stay whole: float64 has no place for all digits of a large one.
    dtype = torch.float64 if info_a.is_float or info_b.is_float else torch.int64
    for start in range(0, info_b.numel, sums.piece):
        count = min(sums.piece, info_b.numel - start)
        pieces = [torch.empty(count, dtype=dtype) for _ in range(2)]
        for piece, (file, stored) in zip(pieces, (a, b), strict=True):
            file.copy_into(stored, piece, start)
        sums.add(start, *pieces)
    return sums.row(name, names, shapes, dtypes, tolerance)


def _core(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without leading ones: a batch of one may be left out."""
    return _core(shape[1:]) if shape[:1] == (1,) else shape


def _positions(shape: tuple[int, ...]) -> tuple[int, int]:
    """(number of positions, elements from one to the next): tokens of [B,N,C], pixels of [B,C,H,W], else the
    last axis."""
    core = shape[-4:]
    if len(core) == 4:
        return core[2] * core[3], 1
    if len(core) == 3 and core[2] <= PIECE:
        return core[1], core[2]
    return (core[-1], 1) if core else (1, 1)


class _Sums:
    """What the comparison of two tensors needs, added up piece by piece."""

    def __init__(self, numel: int, positions: int, stride: int) -> None:
        self.numel, self.positions, self.stride = numel, max(1, positions), max(1, stride)
        self.piece = PIECE // self.stride * self.stride  # whole positions
        self.cells = min(CELLS, self.positions)
        self.cell_of = torch.arange(self.positions) * self.cells // self.positions  # [positions]
        self.squares = torch.zeros(4, dtype=torch.float64)  # of a - b, a, b; and a * b
        self.cell_squares = torch.zeros(self.cells, dtype=torch.float64)
        self.max_abs, self.same = 0.0, True
        self.not_finite = [0, 0]

    def add(self, start: int, a: Tensor, b: Tensor) -> None:
        """a, b: float64 or int64 [n], elements from `start` on, which begins a position."""
        if torch.equal(a, b):
            both = b.double()
            self.squares[1:] += both @ both
            self.not_finite = [count + _not_finite(both) for count in self.not_finite]
            return
        self.same = False
        difference, a, b = (a - b).double(), a.double(), b.double()
        for i, values in enumerate((a, b)):
            self.not_finite[i] += _not_finite(values)
        self.squares += torch.stack([difference @ difference, a @ a, b @ b, a @ b])
        self.max_abs = max(self.max_abs, float(difference.abs().nan_to_num(math.inf, math.inf).max()))
        squares = difference.square().view(-1, self.stride).sum(1)  # of each position
        place = (start // self.stride + torch.arange(squares.numel())) % self.positions
        self.cell_squares += torch.bincount(self.cell_of[place], squares, self.cells)

    def row(
        self,
        name: str,
        names: tuple[str, str],
        shapes: tuple[tuple[int, ...], tuple[int, ...]],
        dtypes: tuple[str, str],
        tolerance: float,
    ) -> Row:
        apart, of_a, of_b, product = (
            math.sqrt(v) if i < 3 else v for i, v in enumerate(self.squares.tolist())
        )
        relative = _ratio(apart, of_b)
        cosine = product / (of_a * of_b) if of_a and of_b else float(of_a == of_b)
        verdict: Verdict = "equal" if self.same else "within" if relative <= tolerance else "over"
        if any(self.not_finite):
            verdict = "not finite"
        return Row(
            name, names, shapes, dtypes, tolerance, verdict, self.max_abs, relative, cosine,
            (self.not_finite[0], self.not_finite[1]), self._strip(of_b),
        )  # fmt: skip

    def _strip(self, of_b: float) -> tuple[float, ...]:
        usual = of_b / math.sqrt(max(1, self.numel))  # root mean square of b
        counts = torch.bincount(self.cell_of, minlength=self.cells) * (self.numel / self.positions)
        local = (self.cell_squares / counts.clamp(min=1.0)).sqrt()
        return tuple(_ratio(value, usual) for value in local.tolist())


def _not_finite(values: Tensor) -> int:
    """How many are NaN or infinite."""
    return values.numel() - int(torch.isfinite(values).sum())


def _ratio(part: float, whole: float) -> float:
    """part / whole, where nothing of nothing is nothing and something of nothing is infinite."""
    if whole == 0.0:
        return 0.0 if part == 0.0 else math.inf
    return part / whole


# ---------------------------------------------------------------------------------------- in words


def explain(row: Row) -> str:
    """The verdict on one stage, with what is special about it."""
    if row.verdict == "shape":
        return f"SHAPE: {list(row.shapes[0])} in A, {list(row.shapes[1])} in B"
    if row.verdict == "not finite":
        a, b = row.not_finite
        return f"NOT FINITE: {a} values in A, {b} in B are NaN or infinite"
    if row.verdict == "over":
        one, other = row.dtypes
        return "OVER" if one == other else f"OVER: {one} in A, {other} in B"
    return row.verdict


def summary(found: Comparison) -> str:
    """One sentence on the whole."""
    count = len(found.rows)
    if not count:
        return "nothing was compared: no stage is in both files; --names can say which belong together"
    first = found.first_over
    if first is None:
        equal = sum(row.verdict == "equal" for row in found.rows)
        worst = max(found.rows, key=lambda row: row.relative)
        most = (
            f"at most {worst.relative:.3g} relative, at {worst.name}" if worst.relative else "no difference"
        )
        return f"{_stages(count)} compared, all within tolerance ({equal} equal): {most}"
    failed = sum(not row.passes for row in found.rows)
    before = found.rows.index(first)
    numbers = (
        f", relative {first.relative:.3g}, tolerance {first.tolerance:g}" if first.verdict == "over" else ""
    )
    return (
        f"first divergence: {first.name} ({explain(first)}{numbers}); "
        f"{_stages(before)} before it agree; {failed} of {count} do not"
    )


def _stages(count: int) -> str:
    return "1 stage" if count == 1 else f"{count} stages"

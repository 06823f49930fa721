"""The algorithms: how the tensors that an adapter has for a layer make the change of its weight.

Every function takes the tensors of one layer by kind (formats.py) and works on meta tensors too, which is how
shapes are checked before anything is read. A change is a matrix [rows, numbers in a row]: of a convolution,
the kernel is flattened. Papers: Hu et al. 2021 (LoRA), Hyeon-Woo et al. 2021 (LoHa), Yeh et al. 2023
(LyCORIS: LoKr, convolutions), Liu et al. 2024 (DoRA).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quantized import BLOCK_BYTES

Tensors = Mapping[str, Tensor]
EPS = 1e-12  # so that a row of zeros has a norm to be divided by


@dataclass(frozen=True)
class LowRank:
    """up @ down"""

    up: Tensor  # [rows, r]
    down: Tensor  # [r, columns]

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    @property
    def nbytes(self) -> int:
        return self.up.nbytes + self.down.nbytes

    def part(self, first: int, rows: int) -> LowRank:
        """Some of its rows."""
        return LowRank(self.up[first : first + rows], self.down)

    def scaled(self, factor: float | Tensor) -> LowRank:
        """Times a number, or each row times its own, [rows, 1]."""
        return LowRank(self.up * factor, self.down)

    def transposed(self) -> LowRank:
        return LowRank(self.down.t(), self.up.t())

    def matrix(self) -> Tensor:
        """[rows, columns]"""
        return self.up @ self.down

    def times(self, x: Tensor) -> Tensor:
        """x [..., columns] -> [..., rows]"""
        return F.linear(F.linear(x, self.down), self.up)

    def to(self, device: torch.device, dtype: torch.dtype) -> LowRank:
        return LowRank(self.up.to(device, dtype).contiguous(), self.down.to(device, dtype).contiguous())


@dataclass(frozen=True)
class Hadamard:
    """(a1 @ b1) * (a2 @ b2), number by number."""

    a1: Tensor  # [rows, r]
    b1: Tensor  # [r, columns]
    a2: Tensor
    b2: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.a1.shape[0], self.b1.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(factor.nbytes for factor in (self.a1, self.b1, self.a2, self.b2))

    def part(self, first: int, rows: int) -> Hadamard:
        """Some of its rows."""
        some = slice(first, first + rows)
        return Hadamard(self.a1[some], self.b1, self.a2[some], self.b2)

    def scaled(self, factor: float | Tensor) -> Hadamard:
        """Times a number, or each row times its own, [rows, 1]."""
        return Hadamard(self.a1 * factor, self.b1, self.a2, self.b2)

    def transposed(self) -> Hadamard:
        return Hadamard(self.b1.t(), self.a1.t(), self.b2.t(), self.a2.t())

    def matrix(self) -> Tensor:
        """[rows, columns]"""
        return (self.a1 @ self.b1) * (self.a2 @ self.b2)

    def times(self, x: Tensor) -> Tensor:
        """x [..., columns] -> [..., rows], a block of rows at a time."""
        return torch.cat([F.linear(x, self.part(*block).matrix()) for block in blocks(self.shape)], -1)

    def to(self, device: torch.device, dtype: torch.dtype) -> Hadamard:
        return Hadamard(*(factor.to(device, dtype) for factor in (self.a1, self.b1, self.a2, self.b2)))


@dataclass(frozen=True)
class Kronecker:
    """kron(a, b): each number of `a` times all of `b`."""

    a: Tensor  # [rows of a, columns of a]
    b: Tensor  # [rows of b, columns of b]

    @property
    def shape(self) -> tuple[int, int]:
        return self.a.shape[0] * self.b.shape[0], self.a.shape[1] * self.b.shape[1]

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes

    def part(self, first: int, rows: int) -> Kronecker | Full:
        """Some of its rows."""
        each = self.b.shape[0]
        if first % each == 0 and rows % each == 0:
            return Kronecker(self.a[first // each : (first + rows) // each], self.b)
        numbers = torch.arange(first, first + rows, device=self.a.device)
        values = self.a[numbers // each][:, :, None] * self.b[numbers % each][:, None, :]
        return Full(values.flatten(1))

    def scaled(self, factor: float | Tensor) -> Kronecker | Full:
        """Times a number, or each row times its own, [rows, 1]."""
        if isinstance(factor, Tensor):
            return Full(self.matrix() * factor)
        return Kronecker(self.a * factor, self.b)

    def transposed(self) -> Kronecker:
        return Kronecker(self.a.t(), self.b.t())

    def matrix(self) -> Tensor:
        """[rows, columns]"""
        return torch.kron(self.a.contiguous(), self.b.contiguous())

    def times(self, x: Tensor) -> Tensor:
        """x [..., columns] -> [..., rows]"""
        grid = x.unflatten(-1, (self.a.shape[1], self.b.shape[1]))  # [..., columns of a, columns of b]
        return (self.a @ (grid @ self.b.t())).flatten(-2)

    def to(self, device: torch.device, dtype: torch.dtype) -> Kronecker:
        return Kronecker(self.a.to(device, dtype), self.b.to(device, dtype))


@dataclass(frozen=True)
class Full:
    """A matrix that is written out."""

    values: Tensor  # [rows, columns]

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def part(self, first: int, rows: int) -> Full:
        """Some of its rows."""
        return Full(self.values[first : first + rows])

    def scaled(self, factor: float | Tensor) -> Full:
        """Times a number, or each row times its own, [rows, 1]."""
        return Full(self.values * factor)

    def transposed(self) -> Full:
        return Full(self.values.t())

    def matrix(self) -> Tensor:
        """[rows, columns]"""
        return self.values

    def times(self, x: Tensor) -> Tensor:
        """x [..., columns] -> [..., rows]"""
        return F.linear(x, self.values)

    def to(self, device: torch.device, dtype: torch.dtype) -> Full:
        return Full(self.values.to(device, dtype))


Delta = LowRank | Hadamard | Kronecker | Full


def blocks(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """(first, rows) of runs of rows that together are all, each of BLOCK_BYTES in float32 or less."""
    step = max(1, BLOCK_BYTES // (4 * max(1, shape[1])))
    for first in range(0, shape[0], step):
        yield first, min(step, shape[0] - first)


@dataclass(frozen=True)
class Algorithm:
    """One way to write a change. `needs`: the kinds of which every one of some line has to be there."""

    name: str
    needs: tuple[tuple[str, ...], ...]
    may: tuple[str, ...]  # kinds that it also reads
    build: Callable[[Tensors], Delta]  # without alpha's scale
    rank: Callable[[Tensors], int | None]  # None: alpha means nothing
    kernel: Callable[[Tensors], tuple[int, ...] | None]  # of a convolution; () of a linear; None: either
    scaled: bool = True  # whether alpha can mean anything

    def complete(self, kinds: frozenset[str]) -> bool:
        """Whether these kinds make a change, none of them left over."""
        return any(
            kinds.issuperset(line) and kinds <= {*line, *self.may, "alpha", "reshape"} for line in self.needs
        )


def _flat(tensor: Tensor) -> Tensor:
    return tensor.flatten(1) if tensor.ndim > 2 else tensor


def _cored(left: Tensor, core: Tensor, right: Tensor) -> Tensor:
    """left [rows, p], core [p, q, ...], right [q, columns] -> [rows, columns, ...]

    Of products and views alone: an einsum imports more of torch to find a shape on meta.
    """
    made = (left @ core.flatten(1)).unflatten(1, core.shape[1:])  # [rows, q, ...]
    return (made.movedim(1, -1) @ right).movedim(-1, 1)


def _lora(given: Tensors) -> Delta:
    up, down = given["up"], given["down"]
    if "mid" in given:  # CP decomposition: the kernel stands in the middle
        return Full(_cored(_flat(up), given["mid"], _flat(down)).flatten(1))
    if up.shape[2:].numel() > 1:
        raise ValueError("the kernel of a convolution was expected in lora_down, not in lora_up")
    _check_pair(up, down)
    return LowRank(_flat(up), _flat(down))


def _check_pair(up: Tensor, down: Tensor) -> None:
    """By shapes alone: a product on meta would import half a second of torch."""
    if up.ndim < 2 or down.ndim < 2 or up.shape[1] != down.shape[0]:
        raise ValueError("the ranks of the two factors differ")


def _loha(given: Tensors) -> Delta:
    if "t1" in given or "t2" in given:
        one, two = _hada(given, 1), _hada(given, 2)
        if one.shape != two.shape:
            raise ValueError("the two sides differ in shape")
        return Full(_flat(one if one.is_meta else one * two))  # on meta a product imports seconds of torch
    made = Hadamard(given["w1_a"], given["w1_b"], given["w2_a"], given["w2_b"])
    _check_pair(made.a1, made.b1)
    _check_pair(made.a2, made.b2)
    if (
        any(factor.ndim != 2 for factor in vars(made).values())
        or made.shape != Hadamard(made.a2, made.b2, made.a1, made.b1).shape
    ):
        raise ValueError("the two sides differ in shape")
    return made


def _hada(given: Tensors, i: int) -> Tensor:
    a, b = given[f"w{i}_a"], given[f"w{i}_b"]
    if f"t{i}" in given:  # Tucker decomposition of a convolution
        return _cored(a.t(), given[f"t{i}"], b)
    return a @ b


def _lokr(given: Tensors) -> Delta:
    w1 = given["w1"] if "w1" in given else given["w1_a"] @ given["w1_b"]
    if "t2" in given:
        w2 = _cored(given["w2_a"].t(), given["t2"], given["w2_b"])
    else:
        w2 = given["w2"] if "w2" in given else given["w2_a"] @ _flat(given["w2_b"])
    if w1.ndim != 2 or w2.ndim < 2:
        raise ValueError("matrices were expected")
    return Kronecker(w1, _flat(w2))  # a kernel stays in the columns of w2


def _loha_kernel(given: Tensors) -> tuple[int, ...] | None:
    """Without a core in the middle, a kernel is in the columns of the second factors."""
    return tuple(given["t1"].shape[2:]) if "t1" in given else None


def _lokr_rank(given: Tensors) -> int | None:
    """Of the side that is a product; None where neither is, and alpha means nothing."""
    factors = [given[name] for name in ("w2_b", "w1_b") if name in given]
    return factors[0].shape[0] if factors else None


def _lokr_kernel(given: Tensors) -> tuple[int, ...] | None:
    kernel = tuple(given["t2" if "t2" in given else "w2" if "w2" in given else "w2_b"].shape[2:])
    return kernel or None  # a factor that is a matrix may have the kernel in its columns


def _rank(kind: str) -> Callable[[Tensors], int | None]:
    return lambda given: given[kind].shape[0]


def _kernel(*kinds: str) -> Callable[[Tensors], tuple[int, ...]]:
    """The trailing sizes of the first of these kinds that is there."""
    return lambda given: next((tuple(given[kind].shape[2:]) for kind in kinds if kind in given), ())


def _difference(given: Tensors) -> Delta:
    diff = given["diff"]
    return Full(diff.reshape(diff.shape[0] if diff.ndim else 1, -1))


DORA = ("dora_scale", "magnitude")
_HADA = ("w1_a", "w1_b", "w2_a", "w2_b")
_LOKR = tuple((*one, *two) for one in (("w1",), ("w1_a", "w1_b")) for two in (("w2",), ("w2_a", "w2_b")))
ALGORITHMS: Mapping[str, Algorithm] = {
    "lora": Algorithm(
        "LoRA", (("up", "down"),), ("mid", "bias", *DORA), _lora, _rank("down"), _kernel("mid", "down")
    ),
    "loha": Algorithm("LoHa", (_HADA,), ("t1", "t2", *DORA), _loha, _rank("w1_b"), _loha_kernel),
    "lokr": Algorithm("LoKr", _LOKR, ("t2", *DORA), _lokr, _lokr_rank, _lokr_kernel),
    "diff": Algorithm(
        "full differences",
        (("diff",), ("diff_b",)),
        ("diff_b",),
        _difference,
        lambda _: None,
        _kernel("diff"),
        scaled=False,
    ),
    "set": Algorithm(
        "replaced values",
        (("set",),),
        (),
        lambda given: _difference({"diff": given["set"]}),
        lambda _: None,
        _kernel("set"),
        scaled=False,
    ),
}


def magnitude_axis(shape: tuple[int, ...], kind: str, rows: int, columns: int) -> int:
    """0 where DoRA's magnitudes are one for each row, 1 for each input. ValueError for another shape.

    PEFT's are of the rows in any shape. LyCORIS writes [rows, 1, ...] or [1, inputs, ...].
    """
    count = math.prod(shape)
    if count == rows and (kind == "magnitude" or len(shape) == 1 or shape[0] == rows):
        return 0
    if kind == "dora_scale" and len(shape) > 1 and shape[:2] == (1, count) and count and columns % count == 0:
        return 1
    raise ValueError(f"magnitudes of shape {list(shape)} are neither one a row ({rows}) nor one an input")


def decomposed(merged: Tensor, magnitudes: Tensor, axis: int) -> Tensor:
    """DoRA's factor on `merged` = W + change [rows, columns]: magnitude by norm, [rows, 1] or [1, columns].

    The norm is that of the merged weight, as in PEFT and LyCORIS, over everything but `axis`. The change is
    whole here whatever the strength, see `edits.Edit`.
    """
    magnitudes = magnitudes.flatten()
    if axis == 0:
        return (magnitudes / merged.norm(dim=1).clamp_min(EPS))[:, None]
    kernel = merged.shape[1] // magnitudes.numel()  # numbers that an input has in a row
    norms = merged.unflatten(1, (magnitudes.numel(), kernel)).norm(dim=(0, 2)).clamp_min(EPS)
    return (magnitudes / norms).repeat_interleave(kernel)[None]

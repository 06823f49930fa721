"""Adapters beside weights that stay packed: the stored numbers are never touched.

Folding a change into GGML blocks or fp8 would round it away: a change is often smaller than half a step of
the stored type. Here the layer computes as before, and the change computes beside it, in the same dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..quantized import QuantizedLinear
from .deltas import Delta, Full, blocks, decomposed
from .edits import Edit


class AdaptedLinear(nn.Module):
    """A linear over stored rows with changes beside it: y = scale * (W x) + changes x + bias."""

    scale: Tensor | None

    def __init__(self, base: QuantizedLinear, edits: Sequence[Edit]) -> None:
        """Applies `edits` in their order. Takes the bias of `base` over."""
        super().__init__()
        self.bias: nn.Parameter | None = base.bias  # added last, so that DoRA's factors leave it alone
        base.bias = None
        self.base, self.dtype = base, base.dtype
        self.register_buffer("scale", None)  # [out, 1] of DoRA
        self.branches: list[tuple[int, Delta]] = []  # first row, change
        with torch.no_grad():
            for edit in edits:
                self._add(edit)
        device = base.weight.parts[0].data.device
        self.branches = [(first, delta.to(device, self.dtype)) for first, delta in self.branches]

    @property
    def weight(self) -> nn.Module:
        """The stored rows, as the layer under it has them."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], both in the compute dtype."""
        out: Tensor = self.base(x)
        if self.scale is not None:
            out *= self.scale[:, 0]
        for first, delta in self.branches:
            out[..., first : first + delta.shape[0]] += delta.times(x)
        if self.bias is not None:
            out += self.bias
        return out

    def effective(self, first: int, rows: int) -> Tensor:
        """Rows of the weight that is computed with: float32 [rows, in]."""
        out = self._stored(first, rows)
        if self.scale is not None:
            out *= self.scale[first : first + rows].float()
        for start, delta in self.branches:
            low, high = max(first, start), min(first + rows, start + delta.shape[0])
            if low < high:
                out[low - first : high - first] += delta.part(low - start, high - low).matrix().float()
        return out

    def _stored(self, first: int, rows: int) -> Tensor:
        """Rows of the stored weight, decoded: float32 [rows, in]."""
        found, at = [], 0
        for part in self.base.weight.parts:
            low, high = max(first, at), min(first + rows, at + part.shape[0])
            if low < high:
                found.append(part.decode(torch.float32, slice(low - at, high - at)))
            at += part.shape[0]
        return torch.cat(found)

    def _add(self, edit: Edit) -> None:
        first, delta = edit.first, edit.delta
        rows = delta.shape[0]
        if edit.replaces:
            self.branches.append((first, Full(delta.matrix() - self.effective(first, rows))))
        elif edit.magnitudes is None:
            self.branches.append((first, delta.scaled(edit.strength)))
        elif edit.axis == 1:
            # A magnitude for each input is no factor on what the layer computes: the difference is kept.
            before = self.effective(first, rows)
            after = before.clone()
            Edit(0, delta, edit.strength, magnitudes=edit.magnitudes, axis=1).apply(after)
            self.branches.append((first, Full(after - before)))
        else:
            factor = self._factors(first, delta, edit.magnitudes)
            self._rescale(first, 1 - edit.strength + edit.strength * factor)
            self.branches.append((first, delta.scaled(edit.strength * factor)))

    def _factors(self, first: int, delta: Delta, magnitudes: Tensor) -> Tensor:
        """DoRA's factor on each row, [rows, 1]."""
        found = []
        for start, count in blocks(delta.shape):
            merged = self.effective(first + start, count) + delta.part(start, count).matrix()
            found.append(decomposed(merged, magnitudes[start : start + count], 0))
        return torch.cat(found)

    def _rescale(self, first: int, factor: Tensor) -> None:
        """Multiplies rows of everything so far, each by its own factor [rows, 1]."""
        rows = len(factor)
        scale = torch.ones(self.base.weight.shape[0], 1, device=factor.device)
        scale[first : first + rows] = factor
        self.scale = (scale if self.scale is None else scale * self.scale).to(self.dtype)
        self.branches = [
            (start, delta.scaled(scale[start : start + delta.shape[0]])) for start, delta in self.branches
        ]

"""What a change does to the numbers of one parameter: in float32, rounded once, whatever the stored type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import AdapterError
from ..quantized import QuantizedEmbedding, QuantizedLinear
from .deltas import Delta, blocks, decomposed


@dataclass(frozen=True)
class Edit:
    """One change of some rows of one parameter, which is a matrix here: a kernel is part of its row."""

    first: int  # row
    delta: Delta  # float32, with the scale of alpha in it
    strength: float
    replaces: bool = False  # it is values, not a difference
    magnitudes: Tensor | None = None  # DoRA's: of these rows, or of the inputs
    axis: int = 0  # that they run along

    def apply(self, values: Tensor) -> None:
        """values: the whole parameter, float32 [rows, columns]. A parameter that was widened has more columns
        than the change."""
        rows, columns = self.delta.shape
        own = values[self.first : self.first + rows, :columns]
        if self.replaces:
            own.copy_(self.delta.matrix())
        elif self.magnitudes is not None and self.axis == 1:  # the norms are of whole columns
            self._decompose(own, self.delta, self.magnitudes)
        else:
            for first, count in blocks(self.delta.shape):
                some, part = own[first : first + count], self.delta.part(first, count)
                if self.magnitudes is None:
                    some += part.scaled(self.strength).matrix()
                else:
                    self._decompose(some, part, self.magnitudes[first : first + count])

    def _decompose(self, own: Tensor, delta: Delta, magnitudes: Tensor) -> None:
        """DoRA: W becomes magnitude * (W + change) / norm, or `strength` of the way there, as in ComfyUI.

        PEFT scales the change inside the norm: the two agree at 1 alone.
        """
        merged = own + delta.matrix()
        merged *= decomposed(merged, magnitudes, self.axis)
        own += self.strength * (merged - own)


@torch.no_grad()
def merge(parameter: Tensor, edits: Sequence[Edit]) -> None:
    """Applies `edits` in their order. Beside the parameter it needs one copy of it in float32."""
    rows = parameter.shape[0] if parameter.ndim else 1
    values = parameter.detach().to(torch.float32, copy=True).reshape(rows, -1)
    for edit in edits:
        edit.apply(values)
    parameter.copy_(values.view(parameter.shape))


def change(module: nn.Module, target: str, edits: Sequence[Edit]) -> None:
    """Changes one parameter of a network: merges into plain numbers, hangs beside weights that are stored.

    Raises AdapterError for a packed embedding.
    """
    from .side_branch import AdaptedLinear

    path, _, leaf = target.rpartition(".")
    layer = module.get_submodule(path)
    if isinstance(layer, QuantizedLinear) and leaf == "weight":
        module.set_submodule(path, AdaptedLinear(layer, edits))
    elif isinstance(layer, QuantizedEmbedding) and leaf == "weight":
        raise AdapterError(
            f"an adapter changes {target}, an embedding that stays packed: load a file of floats"
        )
    else:
        merge(getattr(layer, leaf), edits)


def widen(module: nn.Module, path: str, columns: int) -> None:
    """Gives a linear more inputs, whose weights are 0, so that nothing changes until an edit does.

    Stored rows are decoded for it: the layer is small.
    """
    layer = module.get_submodule(path)
    if isinstance(layer, QuantizedLinear):
        weight = torch.cat([part.decode(layer.dtype) for part in layer.weight.parts])
    else:
        weight = layer.get_parameter("weight").detach()
    if weight.shape[1] >= columns:
        return
    bias = layer.bias
    wide = nn.Linear(columns, weight.shape[0], bias=bias is not None, device="meta")
    values = weight.new_zeros(weight.shape[0], columns)
    values[:, : weight.shape[1]] = weight
    wide.weight = nn.Parameter(values, requires_grad=False)
    if isinstance(bias, Tensor):
        wide.bias = nn.Parameter(bias.detach(), requires_grad=False)
    module.set_submodule(path, wide)

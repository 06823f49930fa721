"""Linears and embeddings whose weights stay as they are stored and are decoded as they are
used.

Floor 2. The networks know nothing of these: the loader swaps them in, by path, while the model is on meta.
Here: weights that keep the checkpoint's float dtype (bfloat16 on disk, float32 products, say) where a widened
copy would not fit the memory. Mirrors Candle's `quantized_nn.rs` in its place, not in its content.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StoredLinear(nn.Module):
    """nn.Linear with a weight in its stored dtype, widened for each product."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in x's dtype."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class StoredEmbedding(nn.Module):
    """nn.Embedding with rows in their stored dtype; only the rows that are asked for are widened."""

    def __init__(self, embedding: nn.Embedding, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.dtype = embedding.weight, dtype

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., width] in the compute dtype."""
        return F.embedding(ids, self.weight).to(self.dtype)


def keep_stored(module: nn.Module, dtype: torch.dtype) -> set[str]:
    """Swaps every nn.Linear and nn.Embedding of a meta model for its stored form, computing in `dtype`.

    Returns the parameter paths that keep their stored dtype; all others are loaded in `dtype`.
    """
    paths = set()
    for name, layer in list(module.named_modules()):
        stored: nn.Module
        if isinstance(layer, nn.Linear):
            stored = StoredLinear(layer)
        elif isinstance(layer, nn.Embedding):
            stored = StoredEmbedding(layer, dtype)
        else:
            continue
        module.set_submodule(name, stored)
        paths.add(f"{name}.weight")
    return paths

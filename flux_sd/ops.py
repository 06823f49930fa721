"""What two networks share: attention, RMS norm, the sinusoidal embedding. Floor 1.

Mirrors candle-nn's `ops` and the helpers at the top of candle-transformers `models/flux/model.rs`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """softmax(q k^T * scale + mask) v. q [B,H,L,D], k and v [B,H,S,D], mask broadcasting to [B,H,L,S] ->
    [B,H,L,D].

    scale defaults to D ** -0.5. The only way to attention in this package.
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)


def embedding(rows: int, width: int) -> nn.Embedding:
    """An nn.Embedding [rows, width], standard normal; left as it is on the meta device.

    There nn.Embedding's own initialisation would import torch's compiler, which takes longer than loading a
    small model.
    """
    weight = torch.empty(rows, width)
    return nn.Embedding.from_pretrained(weight if weight.is_meta else nn.init.normal_(weight), freeze=False)


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32. x [..., D], scale [D] -> x's
    dtype."""
    return F.rms_norm(x.float(), scale.shape, scale.float(), eps).to(x.dtype)


def sinusoidal_embedding(
    t: Tensor, dim: int, time_factor: float = 1.0, max_period: float = 10_000.0
) -> Tensor:
    """Cosines, then sines, of time_factor * t at dim / 2 frequencies. t [B] -> [B, dim] float32.

    The exponents are float32, as in BFL's and Candle's code; their exp is taken in float64 and rounded once,
    because torch's vectorised float32 exp is an ulp off, which time_factor magnifies.
    """
    half = dim // 2
    powers = torch.arange(half, dtype=torch.float32) * (-math.log(max_period) / half)
    frequencies = torch.exp(powers.double()).to(device=t.device, dtype=torch.float32)
    angles = (time_factor * t.float())[:, None] * frequencies  # [B, dim/2]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)  # [B, dim]

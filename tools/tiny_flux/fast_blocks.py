"""What the networks' blocks run while training on a CPU, faster than torch's own backward passes.

The same mathematics as flux_sd.ops and flux_sd.flux_mmdit, with bfloat16 between the operations.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flux_sd import clip, flux_mmdit, t5, unet


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """As flux_sd.ops.attention, with the matrix of scores: sequences are short, its backward is fast."""
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2)  # [B,H,L,S]
    if mask is not None:
        scores = scores + mask.to(scores.dtype)
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v


def rotate(x: Tensor, pe: Tensor) -> Tensor:
    """As flux_sd.flux_mmdit.rotate, as one product of complex numbers."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())  # [B,H,N,D/2]
    return torch.view_as_real(pairs * torch.view_as_complex(pe)).flatten(-2).to(x.dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        wide = x.float()
        root = (
            torch.rsqrt(torch.linalg.vecdot(wide, wide).div_(x.shape[-1]).add_(eps)).unsqueeze(-1).to(x.dtype)
        )
        normal = x * root
        ctx.save_for_backward(normal, root, scale)
        return normal * scale.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        normal, root, scale = ctx.saved_tensors
        dscale = (dy * normal).flatten(0, -2).sum(0, dtype=torch.float32)
        g = dy * scale.to(dy.dtype)
        along = (
            (g * normal).sum(-1, keepdim=True, dtype=torch.float32).div_(normal.shape[-1]).to(normal.dtype)
        )
        return (g - normal * along) * root, dscale, None


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """As flux_sd.ops.rms_norm."""
    out: Tensor = _RmsNorm.apply(x, scale, eps)
    return out


@contextmanager
def in_use() -> Iterator[None]:
    """While open, the networks of flux_sd compute with the functions of this file."""
    places = (
        (flux_mmdit, "attention", attention),
        (flux_mmdit, "rotate", rotate),
        (flux_mmdit, "rms_norm", rms_norm),
        (clip, "attention", attention),
        (t5, "attention", attention),
        (t5, "rms_norm", rms_norm),
        (unet, "attention", attention),
    )
    before = [getattr(module, name) for module, name, _ in places]
    for module, name, function in places:
        setattr(module, name, function)
    try:
        yield
    finally:
        for (module, name, _), function in zip(places, before, strict=True):
            setattr(module, name, function)

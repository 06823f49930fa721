"""Group norm with three times the backward speed of torch's on channels-last bfloat16 pictures on a CPU."""

from typing import Any

import torch
from torch import Tensor, nn


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        batch, channels, height, width = x.shape
        y, mean, rstd = torch.native_group_norm(
            x, weight.to(x.dtype), bias.to(x.dtype), batch, channels, height * width, groups, eps
        )
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """With x^ = (x - mean) rstd: dx = rstd (w dy - mean_group(w dy) - x^ mean_group(w dy x^))"""
        x, weight, mean, rstd = ctx.saved_tensors
        batch, channels, height, width = x.shape
        groups = mean.shape[1]
        count = height * width * channels // groups
        repeat = channels // groups
        flat_dy = dy.permute(0, 2, 3, 1).reshape(batch, -1, channels)  # [B,HW,C]
        flat_x = x.permute(0, 2, 3, 1).reshape(batch, -1, channels)  # [B,HW,C]
        mean = mean.float().repeat_interleave(repeat, 1)  # [B,G] -> [B,C]
        rstd = rstd.float().repeat_interleave(repeat, 1)  # [B,G] -> [B,C]
        sum_dy = flat_dy.sum(1, dtype=torch.float32)  # [B,C]
        sum_dy_x = ((flat_dy * flat_x).sum(1, dtype=torch.float32) - mean * sum_dy) * rstd  # [B,C]

        def group_mean(v: Tensor) -> Tensor:
            return ((v * weight).view(batch, groups, repeat).sum(2) / count).repeat_interleave(repeat, 1)

        slope = group_mean(sum_dy_x) * rstd * rstd
        constant = slope * mean - rstd * group_mean(sum_dy)
        terms = [term[:, None].to(x.dtype) for term in (weight * rstd, -slope, constant)]  # [B,1,C] each
        dx = torch.addcmul(terms[2], flat_dy, terms[0]).addcmul_(flat_x, terms[1])
        dx = dx.view(batch, height, width, channels).permute(0, 3, 1, 2)
        return dx, sum_dy_x.sum(0), sum_dy.sum(0), None, None


class FastGroupNorm(nn.Module):
    """Stands in for an nn.GroupNorm while training, with its parameters under the same names."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.groups, self.eps = norm.num_groups, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """x [B,C,H,W] -> [B,C,H,W]"""
        out: Tensor = _GroupNorm.apply(x, self.weight, self.bias, self.groups, self.eps)
        return out


def swap_in(model: nn.Module) -> None:
    """Replace every group norm of the model."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, FastGroupNorm(child))

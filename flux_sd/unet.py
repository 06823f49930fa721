"""The UNet of Stable Diffusion 1.5, 2.1 and XL and of their inpainting models. Floor 2.

Mirrors candle-transformers 0.11.1 `models/stable_diffusion/`: `unet_2d.rs`, `unet_2d_blocks.rs`,
`attention.rs`; parameter names are diffusers'. Papers: Rombach et al. 2022; Podell et al. 2023 (XL). The way
down keeps every level's feature maps; the way up takes them again, last first. The config says what each
level has:

    x        [B, C, H, W]    feature maps; half the height and width from level to level
    context  [B, L, D]       text states, read by every transformer block's second attention
    emb      [B, 4 C0]       time, and in XL also pooled text and picture sizes; added in every residual block
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops import attention, sinusoidal_embedding

RESNET_EPS, TRANSFORMER_NORM_EPS = 1e-5, 1e-6
SIZE_WIDTH = 256  # of the sinusoid that each of XL's six sizes enters as


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of one UNet, level by level from the finest."""

    in_channels: int  # 4; 9 for the inpainting models: latents, mask, latents of the masked picture
    widths: tuple[int, ...]
    depths: tuple[int, ...]  # transformer blocks in each of a level's transformers; 0 for none
    mid_depth: int
    heads: tuple[int, ...]  # diffusers' configs call this number attention_head_dim
    context_dim: int
    linear_projection: bool  # into and out of a transformer; else 1x1 convolutions
    added_dim: int | None = None  # XL: pooled text and six sizes
    out_channels: int = 4
    resnets: int = 2  # a level on the way down; one more on the way up
    groups: int = 32
    # "erf": the exact GELU of the published models in GEGLU. "tanh": Candle's.
    geglu: Literal["erf", "tanh"] = "erf"
    float32_attention: bool = False  # 2.1's scores outgrow float16

    @classmethod
    def sd15(cls) -> UNetConfig:
        """Stable Diffusion 1.5 (CompVis/stable-diffusion `v1-inference.yaml`): 8 heads at every level."""
        return cls(4, (320, 640, 1280, 1280), (1, 1, 1, 0), 1, (8, 8, 8, 8), 768, False)

    @classmethod
    def sd21(cls) -> UNetConfig:
        """Stable Diffusion 2.1: heads of 64 channels."""
        return replace(
            cls.sd15(),
            heads=(5, 10, 20, 20),
            context_dim=1024,
            linear_projection=True,
            float32_attention=True,
        )

    @classmethod
    def sdxl(cls) -> UNetConfig:
        """Stable Diffusion XL base and Turbo: three levels, 70 transformer blocks."""
        return cls(4, (320, 640, 1280), (0, 2, 10), 10, (5, 10, 20), 2048, True, 1280 + 6 * SIZE_WIDTH)

    @classmethod
    def tiny(cls) -> UNetConfig:
        """For tests: the sizes of the narrow golden cases."""
        return cls(4, (64, 128, 128), (1, 1, 0), 1, (4, 4, 4), 64, False)

    @classmethod
    def tiny_sd(cls) -> UNetConfig:
        """The embedded model's."""
        return cls(4, (64, 64, 96), (0, 1, 1), 1, (2, 2, 3), 128, False, resnets=1)

    def inpainting(self) -> UNetConfig:
        """The same with 9 input channels."""
        return replace(self, in_channels=9)


class UNet(nn.Module):
    """Predicts noise (or velocity) of latents, given the time and the text."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        first, last, emb = config.widths[0], config.widths[-1], 4 * config.widths[0]
        self.conv_in = nn.Conv2d(config.in_channels, first, 3, padding=1)
        self.time_embedding = Embedder(first, emb)
        self.add_embedding = None if config.added_dim is None else Embedder(config.added_dim, emb)
        self.down_blocks = nn.ModuleList(DownBlock(config, level) for level in range(len(config.widths)))
        self.mid_block = MidBlock(config, last, emb)
        self.up_blocks = nn.ModuleList(
            UpBlock(config, level) for level in reversed(range(len(config.widths)))
        )
        self.conv_norm_out = nn.GroupNorm(config.groups, first, eps=RESNET_EPS)
        self.conv_out = nn.Conv2d(first, config.out_channels, 3, padding=1)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        pooled: Tensor | None = None,
        sizes: Tensor | None = None,
    ) -> Tensor:
        """x [B,in,H,W], timesteps [B] in 0..999, context [B,L,D]; for XL also pooled text [B,1280] and sizes
        [B,6] (original, crop and target; height before width) -> [B,out,H,W]."""
        emb = self.time_embedding(
            sinusoidal_embedding(timesteps, self.config.widths[0]).to(x.dtype)
        )  # [B,4C0]
        if self.add_embedding is not None:
            if pooled is None or sizes is None:
                raise ValueError("this UNet embeds pooled text and sizes: pass both")
            emb = emb + self.add_embedding(torch.cat([pooled, size_embedding(sizes).to(x.dtype)], dim=-1))
        emb = F.silu(emb)

        x = self.conv_in(x)
        kept = [x]
        for down_block in self.down_blocks:
            x, outputs = down_block(x, emb, context)
            kept += outputs
        x = self.mid_block(x, emb, context)
        for up_block in self.up_blocks:
            x = up_block(x, kept, emb, context)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


def size_embedding(sizes: Tensor) -> Tensor:
    """sizes [B,6] -> [B,6*256] float32, each number a sinusoid of its own."""
    return sinusoidal_embedding(sizes.flatten(), SIZE_WIDTH).reshape(sizes.shape[0], -1)


class Embedder(nn.Module):
    """Linear, SiLU, linear."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,in] -> [B,dim]."""
        return self.linear_2(F.silu(self.linear_1(x)))


class DownBlock(nn.Module):
    """One level on the way down: residual blocks, each followed by a transformer where the level has them."""

    def __init__(self, config: UNetConfig, level: int) -> None:
        super().__init__()
        width, emb = config.widths[level], 4 * config.widths[0]
        before = config.widths[max(level - 1, 0)]
        ins = [before] + [width] * (config.resnets - 1)
        self.resnets = nn.ModuleList(ResnetBlock(channels, width, emb, config.groups) for channels in ins)
        self.attentions = transformers(config, level, config.resnets)
        is_last = level == len(config.widths) - 1
        self.downsamplers = None if is_last else nn.ModuleList([Downsample(width)])

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> tuple[Tensor, list[Tensor]]:
        """x [B,C,H,W] -> [B,C',H/2,W/2] (the last level: no smaller), and every map to keep."""
        kept = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, emb)
            x = x if self.attentions is None else self.attentions[i](x, context)
            kept.append(x)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x)
            kept.append(x)
        return x, kept


class MidBlock(nn.Module):
    """The coarsest level's middle: residual block, transformer, residual block."""

    def __init__(self, config: UNetConfig, width: int, emb: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(width, width, emb, config.groups) for _ in range(2))
        middle = SpatialTransformer(config, width, config.heads[-1], config.mid_depth)
        self.attentions = nn.ModuleList([middle])

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        """x [B,C,H,W] -> [B,C,H,W]."""
        x = self.attentions[0](self.resnets[0](x, emb), context)
        return self.resnets[1](x, emb)


class UpBlock(nn.Module):
    """One level on the way up: each residual block reads one kept map beside its input."""

    def __init__(self, config: UNetConfig, level: int) -> None:
        super().__init__()
        widths, emb = config.widths, 4 * config.widths[0]
        width, coarser, finer = (
            widths[level],
            widths[min(level + 1, len(widths) - 1)],
            widths[max(level - 1, 0)],
        )
        inputs = [coarser] + [width] * config.resnets
        kept = [width] * config.resnets + [finer]
        self.resnets = nn.ModuleList(
            ResnetBlock(x + skip, width, emb, config.groups) for x, skip in zip(inputs, kept, strict=True)
        )
        self.attentions = transformers(config, level, config.resnets + 1)
        self.upsamplers = None if level == 0 else nn.ModuleList([Upsample(width)])

    def forward(self, x: Tensor, kept: list[Tensor], emb: Tensor, context: Tensor) -> Tensor:
        """x [B,C,H,W] and the maps kept on the way down, of which this level takes its own from the end ->
        [B,C',H',W'], as high and wide as the map that comes next."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, kept.pop()], dim=1), emb)
            x = x if self.attentions is None else self.attentions[i](x, context)
        return x if self.upsamplers is None else self.upsamplers[0](x, kept[-1].shape[-2:])


def transformers(config: UNetConfig, level: int, count: int) -> nn.ModuleList | None:
    """`count` transformers for a level, or None where it has none."""
    if not config.depths[level]:
        return None
    width, heads, depth = config.widths[level], config.heads[level], config.depths[level]
    return nn.ModuleList(SpatialTransformer(config, width, heads, depth) for _ in range(count))


class ResnetBlock(nn.Module):
    """Two convolutions behind norm and SiLU, the embedding added between them, and a shortcut."""

    def __init__(self, channels_in: int, channels_out: int, emb: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels_in, eps=RESNET_EPS)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(emb, channels_out)
        self.norm2 = nn.GroupNorm(groups, channels_out, eps=RESNET_EPS)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x [B,C,H,W], emb [B,4C0] behind its SiLU -> [B,C',H,W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(emb)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """Halves height and width (rounded up); padded on all sides, unlike the autoencoder's."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,C,H,W] -> [B,C,H/2,W/2]."""
        return self.conv(x)


class Upsample(nn.Module):
    """Repeats pixels up to the size of the next kept map, then convolves."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        """x [B,C,H,W] -> [B,C,*size]: twice as high and wide, one less where the way down rounded up."""
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map, with a shortcut around all of them."""

    def __init__(self, config: UNetConfig, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.is_linear = config.linear_projection
        self.norm = nn.GroupNorm(config.groups, width, eps=TRANSFORMER_NORM_EPS)
        self.proj_in = nn.Linear(width, width) if self.is_linear else nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(config, width, heads) for _ in range(depth))
        self.proj_out = nn.Linear(width, width) if self.is_linear else nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x [B,C,H,W], context [B,L,D] -> [B,C,H,W]."""
        h = self.norm(x)
        h = self.proj_in(_positions(h)) if self.is_linear else _positions(self.proj_in(h))  # [B,HW,C]
        for block in self.transformer_blocks:
            h = block(h, context)
        h = _map(self.proj_out(h), x) if self.is_linear else self.proj_out(_map(h, x))  # [B,C,H,W]
        return x + h


def _positions(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)  # [B,C,H,W] -> [B,HW,C]


def _map(h: Tensor, like: Tensor) -> Tensor:
    return h.transpose(1, 2).reshape(like.shape)  # [B,HW,C] -> [B,C,H,W]


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text, gated feed-forward; each pre-norm with a residual."""

    def __init__(self, config: UNetConfig, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(config, width, width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(config, width, config.context_dim, heads)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width, config.geglu)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x [B,HW,C], context [B,L,D] -> [B,HW,C]."""
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Attention(nn.Module):
    """Queries from x, keys and values from `context`; no biases but the last."""

    def __init__(self, config: UNetConfig, width: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.in_float32 = heads, config.float32_attention
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_dim, width, bias=False)
        self.to_v = nn.Linear(context_dim, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x [B,N,C], context [B,L,D] -> [B,N,C]."""
        projected = (self.to_q(x), self.to_k(context), self.to_v(context))
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in projected
        )  # [B,H,N or L,D]
        if self.in_float32:
            q, k, v = q.float(), k.float(), v.float()
        return self.to_out(attention(q, k, v).to(x.dtype).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """GEGLU (Shazeer 2020): half of a projection gates the other. Checkpoint names are `net.0`, `net.2`."""

    def __init__(self, width: int, geglu: Literal["erf", "tanh"]) -> None:
        super().__init__()
        self.net = nn.ModuleList([Geglu(width, geglu), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        """x [B,N,C] -> [B,N,C]."""
        return self.net[2](self.net[0](x))


class Geglu(nn.Module):
    def __init__(self, width: int, geglu: Literal["erf", "tanh"]) -> None:
        super().__init__()
        self.approximate = "tanh" if geglu == "tanh" else "none"
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,N,C] -> [B,N,4C]."""
        value, gate = self.proj(x).chunk(2, dim=-1)  # [B,N,4C] each
        return value * F.gelu(gate, approximate=self.approximate)

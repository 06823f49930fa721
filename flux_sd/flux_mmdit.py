"""The FLUX.1 transformer: double blocks on image and text streams, then single blocks on both joined.

Floor 2.

Mirrors candle-transformers 0.11.1 `models/flux/model.rs`; names and mathematics are black-forest-labs/flux
`model.py` and `modules/layers.py` (Apache-2.0). One word per tensor, everywhere:

    img  [B, S, C]   image tokens: 2x2 patches of the latents       txt  [B, L, C]  T5 tokens
    vec  [B, C]      time + guidance + pooled CLIP, drives every shift, scale and gate
    pe   [B, 1, L+S, D/2, 2]   rotary cosines and sines of the positions (ids) of text, then image
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops import attention, rms_norm, sinusoidal_embedding

NORM_EPS = 1e-6
TIME_WIDTH = 256  # of the sinusoid that time and guidance enter as


@dataclass(frozen=True)
class FluxConfig:
    """Sizes of one transformer, in Candle's words (`flux::model::Config`)."""

    in_channels: int  # 16 latent channels x 2 x 2; editing variants append more
    vec_in_dim: int  # width of CLIP's pooled output
    context_in_dim: int  # width of T5's output
    hidden_size: int
    mlp_ratio: float
    num_heads: int
    depth: int  # double blocks
    depth_single_blocks: int
    # rotary channels per head for (index, row, column); their sum is the head width
    axes_dim: tuple[int, ...]
    theta: int
    qkv_bias: bool
    guidance_embed: bool
    out_channels: int = 64
    # "float32": ids, angles and rotation in float32 (the authors). "model": in the weights' dtype (Candle).
    rope_dtype: Literal["float32", "model"] = "float32"

    @classmethod
    def dev(cls) -> FluxConfig:
        """FLUX.1-dev (black-forest-labs/flux `util.py`, `configs["flux-dev"]`)."""
        return cls(64, 768, 4096, 3072, 4.0, 24, 19, 38, (16, 56, 56), 10_000, True, True)

    @classmethod
    def schnell(cls) -> FluxConfig:
        """FLUX.1-schnell: dev without the guidance embedding."""
        return replace(cls.dev(), guidance_embed=False)

    @classmethod
    def fill(cls) -> FluxConfig:
        """FLUX.1-Fill-dev: dev that also reads a masked picture (64 channels) and its mask (256)."""
        return replace(cls.dev(), in_channels=384)

    @classmethod
    def control(cls) -> FluxConfig:
        """FLUX.1-Canny-dev and FLUX.1-Depth-dev: dev that also reads a picture of lines or depths."""
        return replace(cls.dev(), in_channels=128)

    @classmethod
    def tiny_flux(cls) -> FluxConfig:
        """The embedded model's."""
        return cls(64, 256, 256, 256, 4.0, 4, 2, 4, (16, 24, 24), 10_000, True, False)

    @classmethod
    def tiny(cls, depth: int = 2, depth_single_blocks: int = 2, guidance_embed: bool = False) -> FluxConfig:
        """For tests: the prefix models of the golden cases."""
        return cls(
            64, 64, 64, 128, 4.0, 2, depth, depth_single_blocks, (16, 24, 24), 10_000, True, guidance_embed
        )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_size(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)


class Flux(nn.Module):
    """Predicts the velocity (noise minus image) of packed latents."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        if sum(config.axes_dim) != config.head_dim:
            raise ValueError(f"axes_dim {config.axes_dim} must sum to the head width {config.head_dim}")
        self.config = config
        hidden = config.hidden_size
        self.img_in = nn.Linear(config.in_channels, hidden)
        self.txt_in = nn.Linear(config.context_in_dim, hidden)
        self.time_in = MlpEmbedder(TIME_WIDTH, hidden)
        self.vector_in = MlpEmbedder(config.vec_in_dim, hidden)
        self.guidance_in = MlpEmbedder(TIME_WIDTH, hidden) if config.guidance_embed else None
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(config) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(config) for _ in range(config.depth_single_blocks)
        )
        self.final_layer = LastLayer(config)

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        vec: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """img [B,S,in], img_ids [B,S,3], txt [B,L,ctx], txt_ids [B,L,3], timesteps [B] in [0,1], vec
        [B,pooled],
        guidance [B] float32 where the model has it -> velocity [B,S,out]."""
        dtype = img.dtype
        pe = rotary_table(torch.cat([txt_ids, img_ids], dim=1), self.config, dtype)
        vec = self.time_in(time_embedding(timesteps, dtype)) + self.vector_in(vec)
        if self.guidance_in is not None:
            if guidance is None:
                raise ValueError("this transformer embeds guidance: pass it")
            vec = vec + self.guidance_in(time_embedding(guidance, dtype))
        img, txt = self.img_in(img), self.txt_in(txt)  # [B,S,C], [B,L,C]

        for double_block in self.double_blocks:
            img, txt = double_block(img, txt, vec, pe)
        joined = torch.cat([txt, img], dim=1)  # [B,L+S,C]
        for single_block in self.single_blocks:
            joined = single_block(joined, vec, pe)
        img = joined[:, txt.shape[1] :]  # [B,S,C]
        return self.final_layer(img, vec)


class ModulationOut(NamedTuple):
    """Each [B, 1, C]."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class DoubleStreamBlock(nn.Module):
    """Image and text keep weights of their own and meet in one attention."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.img_mod = Modulation(hidden, 2)
        self.img_norm1 = layer_norm(hidden)
        self.img_attn = SelfAttention(config)
        self.img_norm2 = layer_norm(hidden)
        self.img_mlp = mlp(hidden, config.mlp_size)
        self.txt_mod = Modulation(hidden, 2)
        self.txt_norm1 = layer_norm(hidden)
        self.txt_attn = SelfAttention(config)
        self.txt_norm2 = layer_norm(hidden)
        self.txt_mlp = mlp(hidden, config.mlp_size)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
        """img [B,S,C], txt [B,L,C], vec [B,C], pe [B,1,L+S,D/2,2] -> img, txt of the same shapes."""
        img_mod1, img_mod2 = self.img_mod(vec)
        txt_mod1, txt_mod2 = self.txt_mod(vec)
        img_q, img_k, img_v = self.img_attn.qkv_heads(
            modulate(self.img_norm1(img), img_mod1)
        )  # [B,H,S,D] each
        txt_q, txt_k, txt_v = self.txt_attn.qkv_heads(
            modulate(self.txt_norm1(txt), txt_mod1)
        )  # [B,H,L,D] each

        q = torch.cat([txt_q, img_q], dim=2)  # [B,H,L+S,D]
        k = torch.cat([txt_k, img_k], dim=2)
        v = torch.cat([txt_v, img_v], dim=2)
        attended = rotary_attention(q, k, v, pe)  # [B,L+S,C]
        txt_attended, img_attended = attended.split([txt.shape[1], img.shape[1]], dim=1)

        img = img + img_mod1.gate * self.img_attn.proj(img_attended)
        img = img + img_mod2.gate * self.img_mlp(modulate(self.img_norm2(img), img_mod2))
        txt = txt + txt_mod1.gate * self.txt_attn.proj(txt_attended)
        txt = txt + txt_mod2.gate * self.txt_mlp(modulate(self.txt_norm2(txt), txt_mod2))
        return img, txt


class SingleStreamBlock(nn.Module):
    """Attention and MLP in parallel on the joined sequence, two fused linears."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        hidden, mlp_size = config.hidden_size, config.mlp_size
        self.num_heads, self.widths = config.num_heads, [3 * hidden, mlp_size]
        self.modulation = Modulation(hidden, 1)
        self.pre_norm = layer_norm(hidden)
        self.linear1 = nn.Linear(hidden, 3 * hidden + mlp_size)  # q, k, v, mlp
        self.norm = QKNorm(config.head_dim)
        self.linear2 = nn.Linear(hidden + mlp_size, hidden)  # attention, mlp

    def forward(self, x: Tensor, vec: Tensor, pe: Tensor) -> Tensor:
        """x [B,L+S,C], vec [B,C], pe [B,1,L+S,D/2,2] -> [B,L+S,C]."""
        (mod,) = self.modulation(vec)
        qkv, hidden = self.linear1(modulate(self.pre_norm(x), mod)).split(self.widths, dim=-1)
        q, k, v = split_heads(qkv, self.num_heads)  # [B,H,L+S,D] each
        q, k = self.norm(q, k)
        attended = rotary_attention(q, k, v, pe)  # [B,L+S,C]
        joined = torch.cat([attended, F.gelu(hidden, approximate="tanh")], dim=-1)  # [B,L+S,C+mlp]
        return x + mod.gate * self.linear2(joined)


class SelfAttention(nn.Module):
    """One stream's projections into and out of the common attention."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.norm = QKNorm(config.head_dim)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def qkv_heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B,N,C] -> q, k (normed) and v, [B,H,N,D] each."""
        q, k, v = split_heads(self.qkv(x), self.num_heads)
        q, k = self.norm(q, k)
        return q, k, v


class QKNorm(nn.Module):
    """RMS norm of queries and keys, head by head."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(dim)
        self.key_norm = RMSNorm(dim)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q, k [B,H,N,D] -> the same shapes."""
        return self.query_norm(q), self.key_norm(k)


class RMSNorm(nn.Module):
    """ops.rms_norm with a parameter called `scale`, as the checkpoints call it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return rms_norm(x, self.scale, NORM_EPS)


class Modulation(nn.Module):
    """vec -> `count` triples of shift, scale and gate."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.lin = nn.Linear(dim, 3 * count * dim)

    def forward(self, vec: Tensor) -> list[ModulationOut]:
        """vec [B,C] -> count x ([B,1,C], [B,1,C], [B,1,C])."""
        parts = self.lin(F.silu(vec))[:, None, :].chunk(3 * self.count, dim=-1)  # [B,1,C] each
        return [ModulationOut(*parts[3 * i : 3 * i + 3]) for i in range(self.count)]


class MlpEmbedder(nn.Module):
    """Linear, SiLU, linear: time, guidance and pooled text enter through one each."""

    def __init__(self, in_dim: int, hidden: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden)
        self.out_layer = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,in] -> [B,C]."""
        return self.out_layer(F.silu(self.in_layer(x)))


class LastLayer(nn.Module):
    """Modulated norm and the projection to packed latents."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.norm_final = layer_norm(config.hidden_size)
        self.linear = nn.Linear(config.hidden_size, config.out_channels)
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), nn.Linear(config.hidden_size, 2 * config.hidden_size)
        )

    def forward(self, img: Tensor, vec: Tensor) -> Tensor:
        """img [B,S,C], vec [B,C] -> [B,S,out]."""
        shift, scale = self.adaLN_modulation(vec)[:, None, :].chunk(2, dim=-1)  # [B,1,C] each, shift first
        return self.linear((1 + scale) * self.norm_final(img) + shift)


def layer_norm(dim: int) -> nn.LayerNorm:
    """A layer norm without parameters: modulation stands in for them."""
    return nn.LayerNorm(dim, eps=NORM_EPS, elementwise_affine=False)


def mlp(hidden: int, mlp_size: int) -> nn.Sequential:
    """Checkpoint names are `.0` and `.2`; 1 is the activation."""
    return nn.Sequential(
        nn.Linear(hidden, mlp_size), nn.GELU(approximate="tanh"), nn.Linear(mlp_size, hidden)
    )


def modulate(x: Tensor, mod: ModulationOut) -> Tensor:
    """x [B,N,C] -> [B,N,C]."""
    return (1 + mod.scale) * x + mod.shift


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B,N,3*C], rows q then k then v, head-major inside each -> three of [B,H,N,D]."""
    batch, length, width = qkv.shape
    qkv = qkv.view(batch, length, 3, num_heads, width // (3 * num_heads))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [3,B,H,N,D] unpacked
    return q, k, v


def time_embedding(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t [B] in [0,1] (or a guidance scale) -> [B,256]. Angles in float32: bfloat16 rounds step 750 to 752."""
    return sinusoidal_embedding(t, TIME_WIDTH, time_factor=1000.0).to(dtype)


def rotary_table(ids: Tensor, config: FluxConfig, dtype: torch.dtype) -> Tensor:
    """ids [B,N,3] (index, row, column) -> cosines and sines [B,1,N,D/2,2], each axis filling its share of
    D/2.

    Computed on the CPU in float64 and rounded once (BFL does so on CUDA), or in the model's dtype for Candle.
    """
    low = config.rope_dtype == "model"
    tables = []
    for axis, dim in enumerate(config.axes_dim):
        powers = torch.arange(0, dim, 2, dtype=torch.float64) / dim
        frequencies = 1.0 / config.theta**powers  # [dim/2]
        position = ids[..., axis].cpu().to(torch.float64)  # [B,N]
        if low:
            frequencies, position = frequencies.float().to(dtype), position.to(dtype)
        angles = position[..., None] * frequencies  # [B,N,dim/2]
        tables.append(torch.stack([angles.cos(), angles.sin()], dim=-1))  # [B,N,dim/2,2]
    pe = torch.cat(tables, dim=2)[:, None]  # [B,1,N,D/2,2]
    return pe.to(device=ids.device, dtype=dtype if low else torch.float32)


def rotate(x: Tensor, pe: Tensor) -> Tensor:
    """Turns each neighbouring pair of channels by its angle, in the dtype of pe. x [B,H,N,D] -> [B,H,N,D]."""
    even, odd = x.to(pe.dtype).unflatten(-1, (-1, 2)).unbind(-1)  # [B,H,N,D/2] each
    cos, sin = pe.unbind(-1)  # [B,1,N,D/2] each
    return torch.stack([cos * even - sin * odd, sin * even + cos * odd], dim=-1).flatten(-2).to(x.dtype)


def rotary_attention(q: Tensor, k: Tensor, v: Tensor, pe: Tensor) -> Tensor:
    """q, k, v [B,H,N,D], pe [B,1,N,D/2,2] -> [B,N,H*D]."""
    attended = attention(rotate(q, pe), rotate(k, pe), v)  # [B,H,N,D]
    return attended.transpose(1, 2).flatten(2)  # [B,N,H*D]

"""The T5 v1.1 encoder, FLUX's main text encoder. Floor 2.

Mirrors candle-transformers 0.11.1 `models/t5.rs`; parameter names are Hugging Face's. Paper: Raffel et al.
2020, with the gated GELU of Shazeer 2020. No biases, no 1/sqrt(d) in attention, relative position bias in
place of position embeddings, learned once (block 0) and used by every block. All positions attend: FLUX has
no text mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops import attention, embedding, rms_norm


@dataclass(frozen=True)
class T5Config:
    """Sizes of one encoder, in the words of Hugging Face's config.json (and Candle's `t5::Config`)."""

    vocab_size: int
    d_model: int
    d_kv: int  # head width
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    @classmethod
    def v1_1_xxl(cls) -> T5Config:
        """google/t5-v1_1-xxl, the encoder of FLUX.1."""
        return cls(32128, 4096, 64, 10240, 24, 64)

    @classmethod
    def tiny_flux(cls) -> T5Config:
        """The embedded model's."""
        return cls(1024, 256, 64, 512, 2, 4)

    @classmethod
    def tiny(cls, num_layers: int = 3) -> T5Config:
        """For tests: the sizes of the golden cases."""
        return cls(512, 64, 64, 128, num_layers, 4)


class T5Encoder(nn.Module):
    """Token ids to hidden states."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.shared = embedding(config.vocab_size, config.d_model)
        self.encoder = T5Stack(config)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B,L] -> [B,L,d_model]."""
        return self.encoder(self.shared(ids))


class T5Stack(nn.Module):
    """Blocks and the final norm."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.block = nn.ModuleList(T5Block(config, has_bias=i == 0) for i in range(config.num_layers))
        self.final_layer_norm = T5LayerNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,L,C] -> [B,L,C].

        The sum over blocks outgrows float16 (65504) in the released XXL weights, so under float16 it is
        carried in float32; each norm brings it back before the next product.
        """
        dtype = x.dtype
        bias = self.bias_source().position_bias(x.shape[1], dtype, x.device)  # [1,H,L,L]
        x = x.float() if dtype == torch.float16 else x
        for block in self.block:
            x = block(x, bias, dtype)
        return self.final_layer_norm(x).to(dtype)

    def bias_source(self) -> T5Attention:
        """The first block's attention: it alone has learned the position bias."""
        attention = self.get_submodule("block.0.layer.0.SelfAttention")
        assert isinstance(attention, T5Attention)
        return attention


class T5Block(nn.Module):
    """Self-attention, then the gated feed-forward; both pre-norm with a residual."""

    def __init__(self, config: T5Config, has_bias: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList([T5LayerSelfAttention(config, has_bias), T5LayerFF(config)])

    def forward(self, x: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
        """x [B,L,C], bias [1,H,L,L], dtype of the products -> [B,L,C]."""
        x = self.layer[0](x, bias, dtype)
        return self.layer[1](x, dtype)


class T5LayerSelfAttention(nn.Module):
    def __init__(self, config: T5Config, has_bias: bool) -> None:
        super().__init__()
        self.SelfAttention = T5Attention(config, has_bias)
        self.layer_norm = T5LayerNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
        """x [B,L,C] -> [B,L,C]."""
        return x + self.SelfAttention(self.layer_norm(x).to(dtype), bias)


class T5LayerFF(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.DenseReluDense = T5DenseGatedGelu(config)
        self.layer_norm = T5LayerNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x [B,L,C] -> [B,L,C]."""
        return x + self.DenseReluDense(self.layer_norm(x).to(dtype))


class T5Attention(nn.Module):
    """Multi-head attention with a learned bias per head and distance bucket."""

    def __init__(self, config: T5Config, has_bias: bool) -> None:
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.num_heads = config.num_heads
        self.buckets, self.max_distance = (
            config.relative_attention_num_buckets,
            config.relative_attention_max_distance,
        )
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if has_bias:
            self.relative_attention_bias = embedding(self.buckets, config.num_heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x [B,L,C], bias [1,H,L,L] -> [B,L,C]."""
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        attended = attention(q, k, v, mask=bias, scale=1.0)  # [B,H,L,D]
        return self.o(attended.transpose(1, 2).flatten(2))

    def position_bias(self, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """-> [1,H,L,L], added to the scores."""
        position = torch.arange(length)
        buckets = relative_buckets(
            position[None, :] - position[:, None], self.buckets, self.max_distance
        )  # [L,L]
        bias = self.relative_attention_bias(buckets.to(device))  # [L,L,H]
        return bias.permute(2, 0, 1)[None].to(dtype)


class T5DenseGatedGelu(nn.Module):
    """wo(gelu(wi_0 x) * wi_1 x)."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,L,C] -> [B,L,C]; float32 for x in float16, where the product overflows."""
        gate, value = self.wi_0(x), self.wi_1(x)  # [B,L,d_ff] each
        if x.dtype != torch.float16:
            return self.wo(F.gelu(gate, approximate="tanh") * value)
        product = F.gelu(gate.float(), approximate="tanh") * value.float()
        # Scaled by a power of two (exact) so that neither the factor nor the sum over d_ff leaves float16's
        # range.
        shrink = torch.exp2(torch.ceil(torch.log2(product.abs().amax().clamp(min=1.0))))
        return self.wo((product / shrink).to(torch.float16)).float() * shrink


class T5LayerNorm(nn.Module):
    """RMS norm with a parameter called `weight`."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., C]."""
        return rms_norm(x, self.weight, self.eps)


def relative_buckets(distance: Tensor, buckets: int, max_distance: int) -> Tensor:
    """distance (key minus query), any shape of integers -> bucket numbers in [0, buckets).

    Half of the buckets for either sign; in each half the first half holds one distance each, the rest grow
    logarithmically up to max_distance, and everything beyond shares the last.
    """
    half = buckets // 2
    exact = half // 2
    size = distance.abs()
    growth = torch.log(size.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (growth * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(size < exact, size, far) + half * (distance > 0).long()

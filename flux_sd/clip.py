"""The CLIP text encoders. Floor 2.

Mirrors candle-transformers 0.11.1 `models/clip/text_model.rs` (FLUX) and `models/stable_diffusion/clip.rs`;
parameter names are Hugging Face's. Paper: Radford et al. 2021. FLUX uses the pooled output of CLIP-L; Stable
Diffusion uses the hidden states of this and of the wider OpenCLIP encoders, hence the four outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops import attention, embedding

NORM_EPS = 1e-5
Activation = Literal["quick_gelu", "gelu", "gelu_tanh"]


@dataclass(frozen=True)
class ClipTextConfig:
    """Sizes of one text encoder, in the words of Hugging Face's config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    activation: Activation
    max_position_embeddings: int = 77
    projection_dim: int | None = None  # None: no text_projection

    @classmethod
    def clip_l(cls) -> ClipTextConfig:
        """openai/clip-vit-large-patch14, as FLUX.1, SD 1.5 and SDXL's first encoder use it."""
        return cls(49408, 768, 3072, 12, 12, "quick_gelu")

    @classmethod
    def open_clip_h(cls) -> ClipTextConfig:
        """The text encoder of Stable Diffusion 2.1: OpenCLIP ViT-H/14 without its last layer."""
        return cls(49408, 1024, 4096, 23, 16, "gelu")

    @classmethod
    def open_clip_bigg(cls) -> ClipTextConfig:
        """SDXL's second encoder: OpenCLIP ViT-bigG/14."""
        return cls(49408, 1280, 5120, 32, 20, "gelu", projection_dim=1280)

    @classmethod
    def tiny_flux(cls) -> ClipTextConfig:
        """The embedded model's."""
        return cls(1024, 256, 512, 2, 4, "quick_gelu")

    @classmethod
    def tiny_sd(cls) -> ClipTextConfig:
        """The embedded Stable Diffusion model's."""
        return cls(1024, 128, 256, 2, 4, "quick_gelu")

    @classmethod
    def tiny(cls, activation: Activation = "quick_gelu", projection_dim: int | None = None) -> ClipTextConfig:
        """For tests: the sizes of the golden cases."""
        return cls(512, 64, 256, 3, 4, activation, projection_dim=projection_dim)

    def with_gelu(self, form: Literal["erf", "tanh"]) -> ClipTextConfig:
        """This encoder with its GELU exact (OpenCLIP) or by tanh (Candle). quick_gelu stays what it is."""
        if self.activation == "quick_gelu":
            return self
        return replace(self, activation="gelu" if form == "erf" else "gelu_tanh")


class ClipOutput(NamedTuple):
    """What the released models take from CLIP."""

    last_hidden_state: Tensor  # [B,L,C], after the final norm
    penultimate: Tensor  # [B,L,C], input of the last layer, no norm
    pooled: Tensor  # [B,C], the end token's last_hidden_state
    projected: Tensor | None  # [B,P], pooled through text_projection


class ClipTextEncoder(nn.Module):
    """Token ids to hidden states and a pooled vector."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = ClipTextTransformer(config)
        self.text_projection = (
            None
            if config.projection_dim is None
            else nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        )

    def forward(self, ids: Tensor) -> ClipOutput:
        """ids [B,L], L <= 77 -> ClipOutput. The end token is the first of the highest id, so padding by end
        tokens changes nothing: attention is causal."""
        penultimate, last = self.text_model(ids)
        rows = torch.arange(ids.shape[0], device=ids.device)
        pooled = last[rows, ids.argmax(dim=-1)]  # [B,C]; argmax takes the first of equals
        projected = None if self.text_projection is None else self.text_projection(pooled)
        return ClipOutput(last, penultimate, pooled, projected)


class ClipTextTransformer(nn.Module):
    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.embeddings = ClipTextEmbeddings(config)
        self.encoder = ClipEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=NORM_EPS)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids [B,L] -> penultimate [B,L,C], last [B,L,C] (normed)."""
        penultimate, last = self.encoder(self.embeddings(ids))
        return penultimate, self.final_layer_norm(last)


class ClipTextEmbeddings(nn.Module):
    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.token_embedding = embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B,L] -> [B,L,C]."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        return self.token_embedding(ids) + self.position_embedding(positions)


class ClipEncoder(nn.Module):
    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ClipEncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B,L,C] -> input and output of the last layer, [B,L,C] each."""
        before = x
        for layer in self.layers:
            before, x = x, layer(x)
        return before, x


class ClipEncoderLayer(nn.Module):
    """Causal self-attention, then an MLP; both pre-norm with a residual."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=NORM_EPS)
        self.self_attn = ClipAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=NORM_EPS)
        self.mlp = ClipMlp(config)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,L,C] -> [B,L,C]."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class ClipAttention(nn.Module):
    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(hidden, hidden)
        self.k_proj = nn.Linear(hidden, hidden)
        self.v_proj = nn.Linear(hidden, hidden)
        self.out_proj = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,L,C] -> [B,L,C]; each position sees itself and what stands before it."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for layer in projections)
        attended = attention(q, k, v, causal=True)  # [B,H,L,D]
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class ClipMlp(nn.Module):
    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,L,C] -> [B,L,C]."""
        return self.fc2(activate(self.fc1(x), self.activation))


def activate(x: Tensor, activation: Activation) -> Tensor:
    """quick_gelu is x * sigmoid(1.702 x), OpenAI's; gelu is the exact one, OpenCLIP's."""
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")

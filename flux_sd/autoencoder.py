"""The convolutional autoencoder of FLUX.1 and of Stable Diffusion.

Mirrors candle-transformers 0.11.1 `models/flux/autoencoder.rs` and, with `use_quant_conv`, the layout of
`models/stable_diffusion/vae.rs` under its original (LDM) names; both follow black-forest-labs/flux
`modules/autoencoder.py` (Apache-2.0). Parameter paths are those of BFL's `ae.safetensors`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops import attention

NORM_GROUPS = 32
NORM_EPS = 1e-6


@dataclass(frozen=True)
class AutoEncoderConfig:
    """Widths of the autoencoder and the affine map between its codes and what the denoiser sees."""

    resolution: int
    in_channels: int
    ch: int
    out_ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    z_channels: int
    scale_factor: float
    shift_factor: float
    use_quant_conv: bool = False

    @classmethod
    def flux(cls) -> "AutoEncoderConfig":
        """The released FLUX.1 autoencoder: 16 channels at an eighth of the size."""
        return cls(256, 3, 128, 3, (1, 2, 4, 4), 2, 16, 0.3611, 0.1159)

    @classmethod
    def sd(cls) -> "AutoEncoderConfig":
        """Stable Diffusion 1.5 and 2.1: 4 channels, with 1x1 convolutions around the code."""
        return cls(256, 3, 128, 3, (1, 2, 4, 4), 2, 4, 0.18215, 0.0, use_quant_conv=True)

    @classmethod
    def sdxl(cls) -> "AutoEncoderConfig":
        """Stable Diffusion XL: as 1.5, with another scale."""
        return cls(256, 3, 128, 3, (1, 2, 4, 4), 2, 4, 0.13025, 0.0, use_quant_conv=True)

    @classmethod
    def tiny(cls) -> "AutoEncoderConfig":
        """Small widths for tests; every kind of layer occurs."""
        return cls(256, 3, 64, 3, (1, 2, 4, 4), 2, 16, 0.3611, 0.1159)

    @classmethod
    def tiny_flux(cls) -> "AutoEncoderConfig":
        """The autoencoder of the embedded model; scale and shift were measured at the end of its training."""
        return cls(128, 3, 32, 3, (2, 2, 2, 4), 1, 16, 0.854, -0.0002)

    @classmethod
    def tiny_sd(cls) -> "AutoEncoderConfig":
        """The embedded Stable Diffusion model's; its scale was measured at the end of its training."""
        return cls(128, 3, 32, 3, (1, 2, 2, 2), 1, 4, 0.8456, 0.0, use_quant_conv=True)

    @property
    def downsampling(self) -> int:
        """How many pixels one latent position spans in each direction."""
        return int(2 ** (len(self.ch_mult) - 1))


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels, eps=NORM_EPS)


def _conv3(channels_in: int, channels_out: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1)


class ResnetBlock(nn.Module):
    """Two convolutions behind norm and swish, added to a shortcut."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1 = _norm(channels_in)
        self.conv1 = _conv3(channels_in, channels_out)
        self.norm2 = _norm(channels_out)
        self.conv2 = _conv3(channels_out, channels_out)
        self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else None

    def forward(self, x: Tensor) -> Tensor:
        """x [B,C,H,W] -> [B,C',H,W]"""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttnBlock(nn.Module):
    """Self-attention over all positions with a single head; the projections are 1x1 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,C,H,W] -> [B,C,H,W]"""
        h = self.norm(x)
        q, k, v = (_positions(project(h)) for project in (self.q, self.k, self.v))
        h = attention(q, k, v)
        h = h.squeeze(1).transpose(1, 2).reshape(x.shape)  # [B,1,HW,C] -> [B,C,H,W]
        return x + self.proj_out(h)


def _positions(x: Tensor) -> Tensor:
    # Contiguous: with strided rows the CPU's attention falls back to building all HW x HW scores.
    return x.flatten(2).transpose(1, 2).unsqueeze(1).contiguous()  # [B,C,H,W] -> [B,1,HW,C]


class Downsample(nn.Module):
    """Halves height and width; the padding is on the right and the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,C,H,W] -> [B,C,H/2,W/2]"""
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Doubles height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,C,H,W] -> [B,C,2H,2W]"""
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest-exact"))
        return out


class MidBlock(nn.Module):
    """What stands between the two directions at the lowest resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,C,H,W] -> [B,C,H,W]"""
        out: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return out


class Level(nn.Module):
    """The blocks at one resolution, and the change of resolution after them where there is one."""

    def __init__(
        self, channels_in: int, channels_out: int, blocks: int, downsample: bool, upsample: bool
    ) -> None:
        super().__init__()
        widths = [channels_in] + [channels_out] * (blocks - 1)
        self.block = nn.ModuleList(ResnetBlock(width, channels_out) for width in widths)
        self.downsample = Downsample(channels_out) if downsample else None
        self.upsample = Upsample(channels_out) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        """x [B,C,H,W] -> [B,C',H',W'] with H' = H, H/2 or 2H"""
        for block in self.block:
            x = block(x)
        for resample in (self.downsample, self.upsample):
            x = x if resample is None else resample(x)
        return x


class Encoder(nn.Module):
    """Pictures to the mean and log variance of their codes."""

    def __init__(self, config: AutoEncoderConfig) -> None:
        super().__init__()
        widths = [config.ch * mult for mult in config.ch_mult]
        last = len(widths) - 1
        self.conv_in = _conv3(config.in_channels, config.ch)
        self.down = nn.ModuleList(
            Level(
                ([config.ch, *widths])[i], width, config.num_res_blocks, downsample=i != last, upsample=False
            )
            for i, width in enumerate(widths)
        )
        self.mid = MidBlock(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = _conv3(widths[-1], 2 * config.z_channels)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,3,H,W] -> moments [B,2Z,H/8,W/8]"""
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        out: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(h))))
        return out


class Decoder(nn.Module):
    """Codes to pictures. `up` is numbered by resolution, finest first, and runs from last to first."""

    def __init__(self, config: AutoEncoderConfig) -> None:
        super().__init__()
        widths = [config.ch * mult for mult in config.ch_mult]
        self.conv_in = _conv3(config.z_channels, widths[-1])
        self.mid = MidBlock(widths[-1])
        self.up = nn.ModuleList(
            Level(
                (widths + widths[-1:])[i + 1],
                width,
                config.num_res_blocks + 1,
                downsample=False,
                upsample=i != 0,
            )
            for i, width in enumerate(widths)
        )
        self.norm_out = _norm(widths[0])
        self.conv_out = _conv3(widths[0], config.out_ch)

    def forward(self, z: Tensor) -> Tensor:
        """z [B,Z,H/8,W/8] -> [B,3,H,W]"""
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out


class AutoEncoder(nn.Module):
    """Encoder and decoder with the scale and shift that the denoiser's latents carry."""

    def __init__(self, config: AutoEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        z = config.z_channels
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(z, z, 1) if config.use_quant_conv else None

    def moments(self, x: Tensor) -> Tensor:
        """x [B,3,H,W] in -1..1 -> mean and log variance [B,2Z,H/8,W/8], unscaled"""
        return self.quantised(self.encoder(x))

    def quantised(self, moments: Tensor) -> Tensor:
        """What the encoder gives [B,2Z,H/8,W/8] -> the same behind the 1x1 convolution, where there is one"""
        return moments if self.quant_conv is None else self.quant_conv(moments)

    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """x [B,3,H,W] in -1..1 -> latents [B,Z,H/8,W/8]: the mean, or with `noise` (same shape) a sample"""
        return self.latents(self.moments(x), noise)

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """mean and log variance [B,2Z,H/8,W/8] -> latents [B,Z,H/8,W/8], see `encode`"""
        mean, logvar = moments.chunk(2, dim=1)  # [B,2Z,h,w] -> 2 of [B,Z,h,w]
        z = mean if noise is None else mean + torch.exp(0.5 * logvar) * noise
        return (z - self.config.shift_factor) * self.config.scale_factor

    def codes(self, z: Tensor) -> Tensor:
        """latents [B,Z,H/8,W/8] -> what the decoder takes, of the same shape"""
        z = z / self.config.scale_factor + self.config.shift_factor
        return z if self.post_quant_conv is None else self.post_quant_conv(z)

    def decode(self, z: Tensor) -> Tensor:
        """latents [B,Z,H/8,W/8] -> [B,3,H,W], about -1..1 (not clamped)"""
        image: Tensor = self.decoder(self.codes(z))
        return image

"""The autoencoder in tiles, for large pictures: a fraction of the memory and the same picture. Floor 3.

A tile is a band of rows over the whole width. The usual tiling runs the whole decoder on one square after
another and blends them where they overlap: then each square is normalised by itself, and the picture changes.
Here each layer is run over all tiles before the next layer. So the group norms know the mean and variance of
the whole map, each convolution sees one row beyond its tile on either side, the reach of its 3x3 kernel,
and what comes out is what the whole autoencoder gives, up to rounding: there is no seam to blend.

What remains whole are one map before and one after a layer, of the six that the whole autoencoder holds, and
everything at the lowest resolution: its middle attends over all positions, for which attention as this
package calls it keeps no matrix of scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .autoencoder import AutoEncoder, AutoEncoderConfig, Downsample, Level, ResnetBlock, Upsample

TILE = 2**24  # values of one tile of a map: 64 MB in float32
MAPS_WHOLE = 6  # maps of the widest full-size layer alive at once, measured on a CPU at 1024 and 2048 pixels
MAPS_TILE = 8  # tiles alive at once, in float32: inputs, norms and convolutions of one step
SHARE = 0.8  # of the available memory that may be needed before tiles are used unasked
Layer = Callable[[Tensor], Tensor]


def decode_tiled(
    vae: AutoEncoder, z: Tensor, tile: int = TILE, look: Callable[[], object] | None = None
) -> Tensor:
    """`vae.decode(z)` in tiles of about `tile` values. latents [B,Z,H/8,W/8] -> [B,3,H,W].

    `look` is called before each tile, and may raise to stop.
    """
    decoder, tiles = vae.decoder, Tiles(tile, look)
    h = decoder.mid(decoder.conv_in(vae.codes(z)))
    for layer in layers_of(reversed(decoder.up)):
        h = tiles.layer(layer, h)  # no other name may hold on to the map before
    return tiles.last(decoder.norm_out, decoder.conv_out, h)


def encode_tiled(
    vae: AutoEncoder,
    x: Tensor,
    noise: Tensor | None = None,
    tile: int = TILE,
    look: Callable[[], object] | None = None,
) -> Tensor:
    """`vae.encode(x, noise)` in tiles, as `decode_tiled`. x [B,3,H,W] -> latents [B,Z,H/8,W/8]."""
    encoder, tiles = vae.encoder, Tiles(tile, look)
    h = tiles.convolve(encoder.conv_in, x, encoder.conv_in.out_channels)
    for layer in layers_of(encoder.down):
        h = tiles.layer(layer, h)
    moments = tiles.last(encoder.norm_out, encoder.conv_out, encoder.mid(h))
    return vae.latents(vae.quantised(moments), noise)


def layers_of(levels: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Every layer of some levels, in the order in which they run."""
    for level in levels:
        assert isinstance(level, Level)
        yield from level.block
        yield from (sampler for sampler in (level.upsample, level.downsample) if sampler is not None)


@dataclass(frozen=True)
class Tiles:
    """Layers of the autoencoder over one map [B,C,H,W], some rows at a time."""

    values: int  # of one tile, about
    look: Callable[[], object] | None

    def layer(self, layer: nn.Module, x: Tensor) -> Tensor:
        """x [B,C,H,W] -> [B,C',H',W'] with H' = H, H/2 or 2H"""
        match layer:
            case ResnetBlock():
                return self.resnet(layer, x)
            case Upsample():
                return self.upsampled(layer, x)
            case Downsample():
                return self.downsampled(layer, x)
        raise TypeError(f"{type(layer).__name__} does not run in tiles")

    def resnet(self, block: ResnetBlock, x: Tensor) -> Tensor:
        """x [B,C,H,W] -> [B,C',H,W]; besides x, only the result is held whole."""
        channels = block.conv1.out_channels
        norm = self.norm(block.norm1, x)
        h = self.convolve(lambda rows: block.conv1(norm(rows)), x, channels)
        norm_2 = self.norm(block.norm2, h)
        self.convolve(lambda rows: block.conv2(norm_2(rows)), h, channels, in_place=True)
        for top, end in self.tiles(x):
            rows = x[:, :, top:end]
            h[:, :, top:end] += rows if block.nin_shortcut is None else block.nin_shortcut(rows)
        return h

    def last(self, norm: nn.GroupNorm, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """The end of encoder and decoder: norm, swish, convolution. x [B,C,H,W] -> [B,C',H,W]"""
        normal = self.norm(norm, x)
        return self.convolve(lambda rows: conv(normal(rows)), x, conv.out_channels)

    def norm(self, norm: nn.GroupNorm, x: Tensor) -> Layer:
        """swish(norm(rows)) for any rows of x, by the mean and variance of all of x [B,C,H,W]."""
        mean = square = torch.zeros(x.shape[0], norm.num_groups, dtype=torch.float64)
        for top, end in self.tiles(x):
            rows = x[:, :, top:end].reshape(*mean.shape, -1).float()  # [B,C,h,W] -> [B,G,C/G*h*W]
            spread, centre = (part.cpu().double() for part in torch.var_mean(rows, dim=2, correction=0))
            share = (end - top) / x.shape[2]
            mean, square = mean + share * centre, square + share * (spread + centre**2)
        scale = torch.rsqrt(square - mean**2 + norm.eps)  # [B,G]
        per_group = norm.num_channels // norm.num_groups
        scale, shift = (part.repeat_interleave(per_group, 1) for part in (scale, -mean * scale))  # [B,C]
        weight, bias = norm.weight.float(), norm.bias.float()
        scale = (weight * scale.to(weight))[:, :, None, None]
        shift = (weight * shift.to(weight) + bias)[:, :, None, None]
        return lambda rows: F.silu((rows.float().mul(scale).add_(shift)).to(rows.dtype))

    def convolve(self, layer: Layer, x: Tensor, channels: int, in_place: bool = False) -> Tensor:
        """`layer`, which looks one row up and down, on each tile of x [B,C,H,W] -> [B,channels,H,W].

        `in_place` writes into x itself: the row above a tile, overwritten by then, is kept aside.
        """
        out = x if in_place else x.new_empty(x.shape[0], channels, *x.shape[2:])
        above = x[:, :, :0]
        for top, end in self.tiles(x, channels):
            rows = torch.cat([above, x[:, :, top : end + 1]], dim=2)
            above = x[:, :, end - 1 : end].clone()
            first = min(top, 1)  # what comes out for the row above belongs to the tile before
            out[:, :, top:end] = layer(rows)[:, :, first : first + end - top]
        return out

    def upsampled(self, layer: Upsample, x: Tensor) -> Tensor:
        """x [B,C,H,W] -> [B,C,2H,2W]"""
        out = x.new_empty(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
        for top, end in self.tiles(x, 4 * x.shape[1]):
            first = min(top, 1)
            rows = layer(x[:, :, top - first : end + 1])
            out[:, :, 2 * top : 2 * end] = rows[:, :, 2 * first : 2 * (first + end - top)]
        return out

    def downsampled(self, layer: Downsample, x: Tensor) -> Tensor:
        """x [B,C,H,W] -> [B,C,H/2,W/2]; its kernel looks down only"""
        out = x.new_empty(*x.shape[:2], x.shape[2] // 2, x.shape[3] // 2)
        for top, end in self.tiles(out, 4 * x.shape[1]):
            out[:, :, top:end] = layer(x[:, :, 2 * top : 2 * end + 1])[:, :, : end - top]
        return out

    def tiles(self, x: Tensor, channels: int = 0) -> Iterator[tuple[int, int]]:
        """First row and end of each tile of x, the wider of its own channels and `channels` deciding."""
        row = x.shape[0] * max(channels, x.shape[1]) * x.shape[3]
        count = max(1, self.values // row)
        for top in range(0, x.shape[2], count):
            if self.look is not None:
                self.look()
            yield top, min(top + count, x.shape[2])


def predicted_bytes(
    config: AutoEncoderConfig, height: int, width: int, dtype: torch.dtype, tiled: bool = False
) -> int:
    """What the activations of one picture of height x width pixels take at most."""
    widths = [config.ch * mult for mult in config.ch_mult]
    if not tiled:
        return (MAPS_WHOLE * widths[:2][-1] + config.out_ch) * height * width * dtype.itemsize
    channels = 0.0  # of full-size maps: before and after the largest layer
    for level, (before, after) in enumerate(zip((widths + widths[-1:])[1:], widths, strict=True)):
        largest = max(
            before + after, 2 * after, 5 * after if level else 0
        )  # the last: a map and it upsampled
        channels = max(channels, largest / 4**level)
    return int(channels * height * width * dtype.itemsize) + MAPS_TILE * TILE * 4


def choose_tiling(wanted: bool | None, whole_bytes: int, available: int) -> bool:
    """Whether to use tiles: as `wanted`, or by itself where the whole autoencoder would take nearly all."""
    return whole_bytes > SHARE * available if wanted is None else wanted

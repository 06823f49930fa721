"""First stage: the autoencoder, trained on whole pictures for their mean squared error."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from flux_sd.autoencoder import AttnBlock, AutoEncoder, AutoEncoderConfig, ResnetBlock
from tiny_flux import fast_norm
from tiny_flux.optim import Trainer
from tiny_flux.pictures import Pictures, pairs

CODE_NOISE = 0.05  # of the code's own spread, so that the decoder bears what the flow leaves
CODE_WEIGHT = 0.001  # keeps each channel of the code near zero mean and unit spread
BY_ADAM = ("encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out")
Log = Callable[[str], None]


def build(config: AutoEncoderConfig, device: str = "cpu") -> AutoEncoder:
    """A fresh autoencoder whose residual branches begin small."""
    torch.manual_seed(0)
    model = AutoEncoder(config)
    for module in model.modules():
        last = module.conv2 if isinstance(module, ResnetBlock) else None
        last = module.proj_out if isinstance(module, AttnBlock) else last
        if last is not None:
            nn.init.normal_(last.weight, std=1e-3)
            nn.init.zeros_(last.bias)
    if device == "cpu":
        fast_norm.swap_in(model)
    return model.to(device, memory_format=torch.channels_last)


def psnr(mine: Tensor, theirs: Tensor) -> Tensor:
    """Two [B,3,H,W] in -1..1 -> [B] in dB, over the range that a stored picture has"""
    error = ((mine.clamp(-1, 1) - theirs) / 2).square().flatten(1).mean(1)
    return -10 * error.log10()


def loss_of(model: AutoEncoder, x: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures [B,3,H,W] -> training loss and mean squared error"""
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        z = model.encode(x)
        spread, centre = torch.std_mean(z.float(), dim=(0, 2, 3))  # [Z] each
        noise = torch.randn_like(z) * (CODE_NOISE * spread.detach())[:, None, None]
        y = model.decode(z + noise)
    error = y.float() - x
    mse = error.square().mean()
    code = centre.square().mean() + spread.log().square().mean()
    return mse + 0.02 * error.abs().mean() + CODE_WEIGHT * code, mse.detach()


def sample(pictures: Pictures, allowed: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """Random training pairs in random variants -> [B,3,H,W], on the CPU"""
    picked = allowed[torch.randint(len(allowed), (batch,), generator=generator)]
    variant = torch.randint(pictures.rgba.shape[1], (batch,), generator=generator)
    x = pictures.compose(picked[:, 0], picked[:, 1], variant)
    return x.to(memory_format=torch.channels_last)


@torch.no_grad()
def quality(model: AutoEncoder, x: Tensor, batch: int = 16) -> Tensor:
    """PSNR of each picture [B]"""
    found = []
    device = next(model.parameters()).device
    for part in x.split(batch):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            y = model.decode(model.encode(part.to(device)))
        found.append(psnr(y.float().cpu(), part))
    return torch.cat(found)


def train(
    pictures: Pictures,
    config: AutoEncoderConfig,
    state: Path,
    minutes: float,
    batch: int,
    rate: float,
    device: str,
    log: Log,
) -> None:
    """Run until the time budget is spent; state and log every two minutes."""
    model = build(config, device)
    trainer = Trainer(model, rate, minutes, by_adam=BY_ADAM)
    trainer.restore(state)
    averaged = build(config, device)
    allowed = torch.tensor(pairs(pictures.names, held_out=False))
    kept = torch.tensor(pairs(pictures.names, held_out=True))[::5]
    shown = pictures.compose(kept[:, 0], kept[:, 1], torch.zeros(len(kept), dtype=torch.long))
    generator = torch.Generator().manual_seed(trainer.step)
    trainer.restart_clock()
    reported, first, mean = time.monotonic(), trainer.step, 0.0
    while trainer.progress < 1:
        loss, mse = loss_of(model, sample(pictures, allowed, batch, generator).to(device))
        trainer.update(loss)
        mean = mse.item() if mean == 0 else 0.98 * mean + 0.02 * mse.item()
        if time.monotonic() - reported > 110 or trainer.progress >= 1:
            pace = (time.monotonic() - reported) / (trainer.step - first)
            averaged.load_state_dict(trainer.ema)
            found = quality(averaged, shown)
            log(
                f"ae step {trainer.step} {trainer.progress:.0%} train psnr {-10 * math.log10(mean / 4):.2f}"
                f" held-out psnr {found.mean():.2f} worst {found.min():.2f} {pace:.2f} s/step"
            )
            trainer.save(state)
            trainer.restart_clock()
            reported, first = time.monotonic(), trainer.step

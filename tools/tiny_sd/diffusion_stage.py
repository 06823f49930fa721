"""Second stage: UNet and text encoder, trained together to predict the noise of the stored codes."""

import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tiny_flux import fast_blocks, fast_norm, make_tokenizers
from tiny_flux.captions import Captions
from tiny_flux.optim import Trainer
from tiny_flux.pictures import SIZE, Pictures, nearest, pairs
from torch import Tensor, nn

from flux_sd.autoencoder import AutoEncoder, AutoEncoderConfig
from flux_sd.clip import ClipTextConfig, ClipTextEncoder
from flux_sd.schedulers import NoiseSchedule, make_sampler
from flux_sd.sd_generation import guide
from flux_sd.text import ClipTokenizer
from flux_sd.unet import ResnetBlock, TransformerBlock, UNet, UNetConfig

SEED = 0  # of every picture painted for a measurement
VARIANTS = 1  # of each emoji's jitters that are learned: it alone, as it is measured
UNPROMPTED = 0.1  # share of pictures shown without their caption, which guidance needs
HEAVIEST = 60.0  # of the weights of the noise levels
BY_ADAM = ("embedding", "conv_in", "conv_out", "linear_1", "linear_2")
Log = Callable[[str], None]


class Painter(nn.Module):
    """The two networks that are trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = UNet(UNetConfig.tiny_sd())
        self.clip = ClipTextEncoder(ClipTextConfig.tiny_sd())

    def forward(self, x: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        """x [B,4,16,16], timesteps [B], ids [B,77] -> noise [B,4,16,16]"""
        out: Tensor = self.unet(x, timesteps, self.clip(ids).last_hidden_state)
        return out


def build(device: str = "cpu") -> Painter:
    """Fresh networks: every residual branch begins small, the encoder as wide as its norms expect."""
    torch.manual_seed(0)
    painter = Painter()
    for name, parameter in painter.clip.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif "embedding" in name:
            nn.init.normal_(parameter, std=0.2)
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    for module in painter.unet.modules():
        ends = [module.conv2] if isinstance(module, ResnetBlock) else []
        if isinstance(module, TransformerBlock):
            ends = [module.attn1.to_out[0], module.attn2.to_out[0], module.ff.net[2]]
        for end in ends:
            nn.init.normal_(end.weight, std=1e-3)
            nn.init.zeros_(end.bias)
    if device == "cpu":
        fast_norm.swap_in(painter)
    return painter.to(device, memory_format=torch.channels_last)


@dataclass(frozen=True)
class Tokens:
    """The tokenizer and the captions it reads."""

    captions: Captions
    clip: ClipTokenizer

    @classmethod
    def load(cls, pictures: Pictures, state: Path) -> "Tokens":
        """Trained once, then read from the state folder; the same as tiny-flux has."""
        captions, folder = Captions.of(pictures.names), state / "tokenizer"
        if not (folder / "tokenizer.json").is_file():
            folder.mkdir(exist_ok=True)
            make_tokenizers.write_clip(captions.all(), folder)
        return cls(captions, ClipTokenizer.load(folder))

    def ids(self, texts: list[str]) -> Tensor:
        """Captions -> [B,77]"""
        return torch.tensor([self.clip.encode(text).ids for text in texts])


def averaged_autoencoder(state: Path, config: AutoEncoderConfig) -> AutoEncoder:
    """The first stage's result, for use."""
    model = AutoEncoder(config).eval()
    model.load_state_dict(torch.load(state / "ae.pt", weights_only=True, map_location="cpu")["ema"])
    return model.to(memory_format=torch.channels_last)


@torch.no_grad()
def latents(pictures: Pictures, state: Path, log: Log) -> tuple[Tensor, Tensor, AutoEncoderConfig]:
    """Codes of all training pictures [N,V,4,16,16] (of unit spread, float16), their pairs [N,2], and the
    autoencoder's configuration with the scale that makes them so."""
    cache, tiny = state / "latents.pt", AutoEncoderConfig.tiny_sd()
    picked = torch.tensor(pairs(pictures.names, held_out=False))
    if not cache.is_file():
        model = averaged_autoencoder(state, replace(tiny, scale_factor=1.0))
        stored = torch.empty(len(picked), VARIANTS, 4, 16, 16)
        for rows in torch.arange(len(picked)).split(16):
            for variant in range(VARIANTS):
                x = pictures.compose(picked[rows, 0], picked[rows, 1], torch.full_like(rows, variant))
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    stored[rows, variant] = model.encode(x.to(memory_format=torch.channels_last)).float()
        scale = round(1 / stored.std().item(), 4)
        torch.save({"latents": (stored * scale).half(), "scale": scale}, cache)
        spread, centre = torch.std_mean(stored, dim=(0, 1, 3, 4))
        log(f"latents: scale {scale}, spread {(spread * scale).tolist()}, centre {(centre * scale).tolist()}")
    found = torch.load(cache, weights_only=True)
    return found["latents"], picked, replace(tiny, scale_factor=found["scale"])


def times(count: int) -> Tensor:
    """Random training steps [count] in 0..999: a third of the noisiest fifth, where a run begins and only the
    text says what is to be seen; the rest leans towards them."""
    t = 1000 * torch.rand(count).sqrt()
    return torch.where(torch.rand(count) < 0.33, 800 + 200 * torch.rand(count), t).long().clamp(max=999)


def loss_of(painter: Painter, noise_schedule: NoiseSchedule, x0: Tensor, ids: Tensor) -> Tensor:
    """Squared error of the noise at random times, weighted as an error of the velocity, by 1 / abar, up to
    HEAVIEST. Without weights the noisiest steps, at which a picture is decided, would count for nothing.
    x0 [B,4,16,16]"""
    t = times(len(x0))
    abar = noise_schedule.alphas_cumprod[t].float().to(x0.device)
    noise = torch.randn_like(x0)
    signal, spread = (part[:, None, None, None] for part in (abar.sqrt(), (1 - abar).sqrt()))
    mixed = (signal * x0 + spread * noise).contiguous(memory_format=torch.channels_last)
    with torch.autocast(x0.device.type, dtype=torch.bfloat16):
        predicted = painter(mixed, t.to(x0.device).float(), ids)
    error = (predicted.float() - noise).square().mean((1, 2, 3))
    return (error * (1 / abar).clamp(max=HEAVIEST)).mean()


@torch.no_grad()
def paint(
    painter: Painter,
    decoder: AutoEncoder,
    tokens: Tokens,
    texts: list[str],
    steps: int = 20,
    guidance: float = 2.5,
) -> Tensor:
    """Captions -> pictures [B,3,128,128] on the CPU, each from the noise of the one fixed seed, by DDIM"""
    device = next(painter.parameters()).device
    sampler = make_sampler("ddim", NoiseSchedule.scaled_linear(), "leading", steps, "epsilon")
    noise = torch.randn(1, 4, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(SEED))
    x = noise.expand(len(texts), -1, -1, -1).to(device)
    ids = tokens.ids([""] * len(texts) + texts).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        context = painter.clip(ids).last_hidden_state
        for index, t in enumerate(sampler.timesteps.tolist()):
            both = torch.cat([x, x]).to(memory_format=torch.channels_last)
            predicted = painter.unet(both, torch.full((len(both),), t, device=device), context).float()
            x = sampler.step(guide(*predicted.chunk(2), guidance), index, x).latents
        return decoder.decode(x.to(memory_format=torch.channels_last)).float().cpu()


def accuracy(
    painter: Painter,
    decoder: AutoEncoder,
    tokens: Tokens,
    pictures: Pictures,
    kept: Tensor,
    guidance: float = 2.5,
) -> tuple[float, float, Tensor]:
    """Share of right emoji and right backgrounds over the pairs `kept` [N,2], and the pictures"""
    found = []
    for part in kept.split(32):
        texts = [tokens.captions.canonical(int(i), int(j)) for i, j in part]
        found.append(paint(painter, decoder, tokens, texts, guidance=guidance))
    painted = torch.cat(found)
    emoji, background = nearest(pictures, painted)
    return (
        (emoji == kept[:, 0]).float().mean().item(),
        (background == kept[:, 1]).float().mean().item(),
        painted,
    )


def train(
    pictures: Pictures, state: Path, minutes: float, batch: int, rate: float, device: str, log: Log
) -> None:
    """Run until the time budget is spent; state and log every two minutes, accuracy every third time."""
    codes, picked, config = latents(pictures, state, log)
    tokens, noise_schedule = Tokens.load(pictures, state), NoiseSchedule.scaled_linear()
    painter, averaged = build(device), build(device)
    trainer = Trainer(painter, rate, minutes, average=0.995, by_adam=BY_ADAM)
    trainer.restore(state / "diffusion.pt")
    decoder = averaged_autoencoder(state, config).to(device)
    kept = torch.tensor(pairs(pictures.names, held_out=True))[::5]
    generator = torch.Generator().manual_seed(trainer.step)
    source = random.Random(trainer.step)
    trainer.restart_clock()
    reported, first, mean, reports = time.monotonic(), trainer.step, 0.0, 0
    while trainer.progress < 1:
        rows = torch.randint(len(picked), (batch,), generator=generator)
        variant = torch.randint(VARIANTS, (batch,), generator=generator)
        texts = [
            "" if source.random() < UNPROMPTED else tokens.captions.draw(int(i), int(j), source)
            for i, j in picked[rows]
        ]
        x0, ids = codes[rows, variant].float().to(device), tokens.ids(texts).to(device)
        with fast_blocks.in_use() if device == "cpu" else nullcontext():
            loss = loss_of(painter, noise_schedule, x0, ids)
            trainer.update(loss)
        mean = loss.item() if mean == 0 else 0.98 * mean + 0.02 * loss.item()
        if time.monotonic() - reported > 110 or trainer.progress >= 1:
            pace = (time.monotonic() - reported) / (trainer.step - first)
            line = f"diffusion step {trainer.step} {trainer.progress:.0%} loss {mean:.4f} {pace:.2f} s/step"
            trainer.save(state / "diffusion.pt")
            reports += 1
            if reports % 3 == 0 or trainer.progress >= 1:
                averaged.load_state_dict(trainer.ema)
                emoji, background, _ = accuracy(averaged, decoder, tokens, pictures, kept)
                line += f" held-out emoji {emoji:.1%} background {background:.1%} of {len(kept)}"
            log(line)
            trainer.restart_clock()
            reported, first = time.monotonic(), trainer.step

"""Second stage: transformer and text encoders, trained together by rectified flow on the stored codes."""

import math
import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from flux_sd.autoencoder import AutoEncoder, AutoEncoderConfig
from flux_sd.clip import ClipTextConfig, ClipTextEncoder
from flux_sd.flux_mmdit import Flux, FluxConfig
from flux_sd.sampling import State, denoise, get_noise, get_schedule, pack, unpack
from flux_sd.t5 import T5Config, T5Encoder
from flux_sd.text import ClipTokenizer, T5Tokenizer
from tiny_flux import fast_blocks, make_tokenizers
from tiny_flux.captions import Captions
from tiny_flux.optim import Trainer
from tiny_flux.pictures import SIZE, Pictures, nearest, pairs

T5_LENGTH = 32
SEED = 0  # of every picture painted for a measurement
VARIANTS = 2  # of each emoji's jitters that are learned
BY_ADAM = (
    "shared",
    "embedding",
    "relative_attention_bias",
    "img_in",
    "final_layer",
    "mod.lin",
    "modulation.lin",
)
Log = Callable[[str], None]


class Painter(nn.Module):
    """The three networks that are trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = Flux(FluxConfig.tiny_flux())
        self.t5 = T5Encoder(T5Config.tiny_flux())
        self.clip = ClipTextEncoder(ClipTextConfig.tiny_flux())

    def forward(self, img: Tensor, t5_ids: Tensor, clip_ids: Tensor, t: Tensor) -> Tensor:
        """img [B,S,64], t5_ids [B,32], clip_ids [B,L], t [B] -> velocity [B,S,64]"""
        side = math.isqrt(img.shape[1])
        blank = State.new(
            torch.zeros(1, T5_LENGTH, 1), torch.zeros(1, 1), torch.zeros(1, 16, 2 * side, 2 * side)
        )
        txt, vec = self.t5(t5_ids), self.clip(clip_ids).pooled
        img_ids, txt_ids = blank.img_ids.to(img.device), blank.txt_ids.to(img.device)
        out: Tensor = self.transformer(img, img_ids, txt, txt_ids, t, vec)
        return out


def build() -> Painter:
    """Fresh networks: the transformer begins as the identity, the encoders as wide as their norms expect."""
    torch.manual_seed(0)
    painter = Painter()
    for name, parameter in painter.named_parameters():
        if "_mod.lin" in name or ".modulation.lin" in name or "adaLN" in name or "final_layer.linear" in name:
            nn.init.zeros_(parameter)
        elif name.endswith("bias") and "relative" not in name:
            nn.init.zeros_(parameter)
        elif "SelfAttention.q" in name:  # T5 does not divide the scores by the root of the head width
            nn.init.normal_(parameter, std=(parameter.shape[1] * 64) ** -0.5)
        elif "shared" in name or "embedding" in name:
            nn.init.normal_(parameter, std=0.2)
        elif "relative_attention_bias" in name:
            nn.init.zeros_(parameter)
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return painter


@dataclass(frozen=True)
class Tokens:
    """Both tokenizers and the captions they read."""

    captions: Captions
    clip: ClipTokenizer
    t5: T5Tokenizer

    @classmethod
    def load(cls, pictures: Pictures, state: Path) -> "Tokens":
        """Trained once, then read from the state folder."""
        captions = Captions.of(pictures.names)
        clip, t5 = state / "tokenizer", state / "tokenizer_2"
        if not (t5 / "tokenizer.json").is_file():
            clip.mkdir(exist_ok=True)
            t5.mkdir(exist_ok=True)
            make_tokenizers.write_clip(captions.all(), clip)
            make_tokenizers.write_t5(captions.all(), t5)
        return cls(captions, ClipTokenizer.load(clip), T5Tokenizer.load(t5))

    def ids(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Captions -> T5 ids [B,32], CLIP ids [B,L] cut to the longest, which causality allows"""
        t5 = torch.tensor([self.t5.encode(text, T5_LENGTH).ids for text in texts])
        clip = torch.tensor([self.clip.encode(text, 77).ids for text in texts])
        longest = int((clip == self.clip.eos_id).int().argmax(1).max()) + 1
        return t5, clip[:, :longest]


def averaged_autoencoder(state: Path, config: AutoEncoderConfig) -> AutoEncoder:
    """The first stage's result, for use."""
    model = AutoEncoder(config).eval()
    model.load_state_dict(torch.load(state / "ae.pt", weights_only=True, map_location="cpu")["ema"])
    return model.to(memory_format=torch.channels_last)


@torch.no_grad()
def latents(pictures: Pictures, state: Path, log: Log) -> tuple[Tensor, Tensor, AutoEncoderConfig]:
    """Codes of all training pictures [N,V,64,64] (packed, normalised, float16), their pairs [N,2], and the
    autoencoder's configuration with the scale and shift that normalise them."""
    cache = state / "latents.pt"
    picked = torch.tensor(pairs(pictures.names, held_out=False))
    if not cache.is_file():
        model = averaged_autoencoder(
            state, replace(AutoEncoderConfig.tiny_flux(), scale_factor=1.0, shift_factor=0.0)
        )
        stored = torch.empty(len(picked), VARIANTS, 16, 16, 16)
        for rows in torch.arange(len(picked)).split(16):
            for variant in range(VARIANTS):
                x = pictures.compose(picked[rows, 0], picked[rows, 1], torch.full_like(rows, variant))
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    stored[rows, variant] = model.encode(x.to(memory_format=torch.channels_last)).float()
        scale, shift = round(1 / stored.std().item(), 4), round(stored.mean().item(), 4)
        packed = pack(((stored - shift) * scale).flatten(0, 1)).unflatten(0, stored.shape[:2])
        torch.save({"latents": packed.half(), "scale": scale, "shift": shift}, cache)
        spread = stored.std((0, 1, 3, 4)) * scale
        log(f"latents: scale {scale} shift {shift}, spread {spread.min():.2f} to {spread.max():.2f}")
    found = torch.load(cache, weights_only=True)
    config = replace(AutoEncoderConfig.tiny_flux(), scale_factor=found["scale"], shift_factor=found["shift"])
    return found["latents"], picked, config


def times(count: int) -> Tensor:
    """Random times [count]: a third is exactly 1, where every picture begins; the rest leans towards 1."""
    t = torch.rand(count).sqrt()
    return torch.where(torch.rand(count) < 0.33, torch.ones(count), t)


def loss_of(painter: Painter, x0: Tensor, t5_ids: Tensor, clip_ids: Tensor) -> Tensor:
    """Mean squared error of the velocity at random times. x0 [B,S,64]"""
    t = times(len(x0)).to(x0.device)
    noise = torch.randn_like(x0)
    mixed = torch.lerp(x0, noise, t[:, None, None])
    with torch.autocast(x0.device.type, dtype=torch.bfloat16):
        velocity = painter(mixed, t5_ids, clip_ids, t)
    return (velocity.float() - (noise - x0)).square().mean()


@torch.no_grad()
def paint(painter: Painter, decoder: AutoEncoder, tokens: Tokens, texts: list[str], steps: int = 4) -> Tensor:
    """Captions -> pictures [B,3,128,128] on the CPU, each from the noise of the one fixed seed"""
    device = next(painter.parameters()).device
    t5_ids, clip_ids = (ids.to(device) for ids in tokens.ids(texts))
    noise = get_noise(SEED, SIZE, SIZE).expand(len(texts), -1, -1, -1).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        txt, vec = painter.t5(t5_ids).float(), painter.clip(clip_ids).pooled.float()
        for step in denoise(painter.transformer, State.new(txt, vec, noise), get_schedule(steps), None):
            img = step.img
        return decoder.decode(unpack(img, SIZE, SIZE)).float().cpu()


def accuracy(
    painter: Painter, decoder: AutoEncoder, tokens: Tokens, pictures: Pictures, kept: Tensor
) -> tuple[float, float, Tensor]:
    """Share of right emoji and right backgrounds over the pairs `kept` [N,2], and the pictures"""
    found = []
    for part in kept.split(32):
        texts = [tokens.captions.canonical(int(i), int(j)) for i, j in part]
        found.append(paint(painter, decoder, tokens, texts).clone())
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
    """Run until the time budget is spent; state and log every two minutes, accuracy every fourth."""
    codes, picked, config = latents(pictures, state, log)
    tokens = Tokens.load(pictures, state)
    painter, averaged = build().to(device), build().to(device)
    trainer = Trainer(painter, rate, minutes, average=0.995, by_adam=BY_ADAM)
    trainer.restore(state / "flow.pt")
    decoder = averaged_autoencoder(state, config).to(device)
    kept = torch.tensor(pairs(pictures.names, held_out=True))[::5]
    generator = torch.Generator().manual_seed(trainer.step)
    source = random.Random(trainer.step)
    trainer.restart_clock()
    reported, first, mean, reports = time.monotonic(), trainer.step, 0.0, 0
    while trainer.progress < 1:
        rows = torch.randint(len(picked), (batch,), generator=generator)
        variant = torch.randint(VARIANTS, (batch,), generator=generator)
        texts = [tokens.captions.draw(int(i), int(j), source) for i, j in picked[rows]]
        inputs = (codes[rows, variant].float(), *tokens.ids(texts))
        with fast_blocks.in_use() if device == "cpu" else nullcontext():
            loss = loss_of(painter, *(tensor.to(device) for tensor in inputs))
        trainer.update(loss)
        mean = loss.item() if mean == 0 else 0.98 * mean + 0.02 * loss.item()
        if time.monotonic() - reported > 110 or trainer.progress >= 1:
            pace = (time.monotonic() - reported) / (trainer.step - first)
            line = f"flow step {trainer.step} {trainer.progress:.0%} loss {mean:.4f} {pace:.2f} s/step"
            trainer.save(state / "flow.pt")
            reports += 1
            if reports % 3 == 0 or trainer.progress >= 1:
                averaged.load_state_dict(trainer.ema)
                emoji, background, _ = accuracy(averaged, decoder, tokens, pictures, kept)
                line += f" held-out emoji {emoji:.1%} background {background:.1%} of {len(kept)}"
            log(line)
            trainer.restart_clock()
            reported, first = time.monotonic(), trainer.step

"""Trains the sticker adapter for the embedded model: pastel colours, and a white rim around what is painted.

    python tools/train_tiny_lora.py --pictures FILE.pt [--minutes 8]

Rank 8 on the image side of the transformer, by the loss that trained the model itself, on restyled pictures
of pairs that tiny-flux was trained on. Writes flux_sd/models/tiny_flux/adapters/: sticker.safetensors under
kohya's names and sticker-diffusers.safetensors, the same numbers under diffusers' names. --pictures is the
cache of rendered pictures that tools/train_tiny_flux.py keeps; it is rendered where it is not there.
"""

import argparse
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_flux import fast_blocks
from tiny_flux.captions import Captions
from tiny_flux.flow_stage import T5_LENGTH, times
from tiny_flux.pictures import Pictures, background_colours, pairs, render
from torch import Tensor, nn

import flux_sd
from flux_sd.sampling import State, pack

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "flux_sd" / "models" / "tiny_flux" / "adapters"
PROVENANCE = (
    "flux_sd sticker adapter for tiny-flux, made by tools/train_tiny_lora.py from renderings of Noto Color"
    " Emoji (SIL Open Font License 1.1)"
)
RANK, ALPHA = 8, 8.0
RIM = 4  # pixels
PASTEL = 0.5  # share of white in every colour
LEARNED = 384  # pictures
BATCH, RATE = 16, 3e-3
# What of each block the adapter touches: the image stream, and the joined stream after it.
DOUBLE = ("img_attn.qkv", "img_attn.proj", "img_mlp.0", "img_mlp.2")
SINGLE = ("linear1", "linear2")


class LoraLinear(nn.Module):
    """A frozen linear and the low-rank change that is learned beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(RANK, base.in_features) * base.in_features**-0.5)
        self.up = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]"""
        change: Tensor = F.linear(F.linear(x, self.down), self.up) * (ALPHA / RANK)
        return self.base(x) + change


def restyle(pictures: Pictures, emoji: Tensor, background: Tensor) -> Tensor:
    """emoji, background [B] -> stickers [B,3,128,128] in -1..1: pastel, the cut-out in a white rim"""
    cut = pictures.rgba[emoji, 0].float() / 255  # [B,4,H,W]
    alpha = cut[:, 3:]
    rim = F.max_pool2d(alpha, 2 * RIM + 1, stride=1, padding=RIM)
    plain = background_colours()[background][:, :, None, None]
    behind = plain * (1 - PASTEL) + PASTEL
    inside = cut[:, :3] * (1 - PASTEL) + PASTEL
    rimmed = behind * (1 - rim) + rim
    return (inside * alpha + rimmed * (1 - alpha)) * 2 - 1


def adapt(transformer: nn.Module) -> dict[str, LoraLinear]:
    """Replaces the linears that are adapted; path -> the module in its place."""
    names = [f"double_blocks.{i}.{name}" for i in range(len(transformer.double_blocks)) for name in DOUBLE]
    names += [f"single_blocks.{i}.{name}" for i in range(len(transformer.single_blocks)) for name in SINGLE]
    adapted = {}
    for path in names:
        parent, _, child = path.rpartition(".")
        holder = transformer.get_submodule(parent)
        adapted[path] = LoraLinear(getattr(holder, child))
        setattr(holder, child, adapted[path])
    return adapted


def kohya(adapted: dict[str, LoraLinear]) -> dict[str, Tensor]:
    """The adapter under kohya's names: paths with underscores, alpha beside each pair."""
    tensors = {}
    for path, module in adapted.items():
        key = "lora_unet_" + "_".join(path.split("."))
        tensors[f"{key}.lora_down.weight"] = module.down.detach().clone()
        tensors[f"{key}.lora_up.weight"] = module.up.detach().clone()
        tensors[f"{key}.alpha"] = torch.tensor(ALPHA)
    return tensors


def diffusers(adapted: dict[str, LoraLinear], hidden: int) -> dict[str, Tensor]:
    """The same under diffusers' names: what is fused here are several layers there, which share one A."""
    thirds = (slice(0, hidden), slice(hidden, 2 * hidden), slice(2 * hidden, 3 * hidden))
    whole = slice(None)
    tensors = {}
    for path, module in adapted.items():
        kind, number, name = path.split(".", 2)
        block = f"{'single_' if kind == 'single_blocks' else ''}transformer_blocks.{number}"
        qkv = [(f"attn.to_{letter}", rows) for letter, rows in zip("qkv", thirds, strict=True)]
        targets = {
            "img_attn.qkv": qkv,
            "img_attn.proj": [("attn.to_out.0", whole)],
            "img_mlp.0": [("ff.net.0.proj", whole)],
            "img_mlp.2": [("ff.net.2", whole)],
            "linear1": [*qkv, ("proj_mlp", slice(3 * hidden, None))],
            "linear2": [("proj_out", whole)],
        }[name]
        for target, rows in targets:
            tensors[f"transformer.{block}.{target}.lora_A.weight"] = module.down.detach().clone()
            tensors[f"transformer.{block}.{target}.lora_B.weight"] = module.up.detach()[rows].clone()
    return tensors


@torch.no_grad()
def learned(
    model: flux_sd.LoadedModel, pictures: Pictures, count: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes [N,S,64], T5 states [N,L,C], CLIP's pooled [N,C]) of restyled training pictures, each with one
    caption."""
    parts, captions = model.components, Captions.of(pictures.names)
    generator, words = torch.Generator().manual_seed(seed), random.Random(seed)
    allowed = torch.tensor(pairs(pictures.names, held_out=False))
    chosen = allowed[torch.randperm(len(allowed), generator=generator)[:count]]
    texts = [captions.draw(int(i), int(j), words) for i, j in chosen]
    t5_ids = torch.tensor([parts.tokenizers["t5"].encode(text, T5_LENGTH).ids for text in texts])
    clip_ids = torch.tensor([parts.tokenizers["clip"].encode(text, 77).ids for text in texts])
    vae, t5, clip = (parts.network(role) for role in ("vae", "t5", "clip"))
    start, codes = time.monotonic(), []
    for part in chosen.split(8):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            codes.append(pack(vae.encode(restyle(pictures, part[:, 0], part[:, 1])).float()))
    txt = torch.cat([t5(ids) for ids in t5_ids.split(32)])
    vec = torch.cat([clip(ids).pooled for ids in clip_ids.split(32)])
    print(f"{count} pictures and captions encoded in {time.monotonic() - start:.0f} s", flush=True)
    return torch.cat(codes), txt, vec


def loss_of(transformer: nn.Module, x0: Tensor, txt: Tensor, vec: Tensor) -> Tensor:
    """Mean squared error of the velocity at random times. x0 [B,S,64]"""
    side = math.isqrt(x0.shape[1])
    blank = State.new(torch.zeros(1, T5_LENGTH, 1), torch.zeros(1, 1), torch.zeros(1, 16, 2 * side, 2 * side))
    t, noise = times(len(x0)), torch.randn_like(x0)
    mixed = torch.lerp(x0, noise, t[:, None, None])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        velocity = transformer(mixed, blank.img_ids, txt, blank.txt_ids, t, vec)
    return (velocity.float() - (noise - x0)).square().mean()


def train(
    model: flux_sd.LoadedModel, pictures: Pictures, minutes: float, count: int
) -> dict[str, LoraLinear]:
    """Runs for `minutes`, encoding not counted; the rate falls to 0 over the second half."""
    torch.manual_seed(0)
    codes, txt, vec = learned(model, pictures, count)
    transformer = model.components.network("transformer").requires_grad_(False)
    adapted = adapt(transformer)
    free = [tensor for module in adapted.values() for tensor in (module.down, module.up)]
    optimiser = torch.optim.AdamW(free, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    start, mean, step = time.monotonic(), 0.0, 0
    while (progress := (time.monotonic() - start) / (60 * minutes)) < 1:
        rows = torch.randint(count, (BATCH,))
        with fast_blocks.in_use():
            loss = loss_of(transformer, codes[rows], txt[rows], vec[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / 10, 2 * (1 - progress))
        optimiser.step()
        now, step = float(loss.detach()), step + 1
        mean = now if step == 1 else 0.95 * mean + 0.05 * now
        if step % 10 == 0:
            print(f"step {step} {progress:.0%} loss {mean:.4f}", flush=True)
    return adapted


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pictures", type=Path, required=True, help="cache of rendered pictures")
    parser.add_argument("--font", type=Path, help="NotoColorEmoji.ttf; default: where Debian puts it")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--count", type=int, default=LEARNED, help="pictures that it learns from")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    pictures = render(arguments.font, arguments.pictures)
    with flux_sd.load_model("tiny-flux", device="cpu", dtype="float32", keep_loaded=True) as model:
        adapted = train(model, pictures, arguments.minutes, arguments.count)
        hidden = model.components.network("transformer").config.hidden_size
    arguments.out.mkdir(parents=True, exist_ok=True)
    trained = {"ss_network_dim": str(RANK), "ss_network_alpha": str(ALPHA)}
    save(kohya(adapted), arguments.out / "sticker.safetensors", trained)
    save(diffusers(adapted, hidden), arguments.out / "sticker-diffusers.safetensors", {})


def save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """In float16, with where it comes from."""
    half = {name: tensor.half() for name, tensor in tensors.items()}
    save_file(half, path, {"format": "pt", "source": PROVENANCE, **metadata})
    path.chmod(0o644)  # safetensors writes for the owner alone


if __name__ == "__main__":
    main()

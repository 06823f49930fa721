"""Measures an embedded model: does it paint what held-out captions ask for, how exact is its autoencoder?

    python tools/eval_tiny.py                     # needs Debian's fonts-noto-color-emoji, or --font FILE
    python tools/eval_tiny.py --model tiny-sd

Every held-out (emoji, background) pair is painted once, through the public interface of flux_sd, at the
default number of steps, all from one seed. The answer is the nearest, by mean squared RGB error, of all
emoji x background renderings in canonical position.
"""

import argparse
import json
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tiny_flux.ae_stage import psnr
from tiny_flux.captions import Captions
from tiny_flux.pictures import BACKGROUNDS, Pictures, nearest, pairs, render
from torch import Tensor

import flux_sd
from flux_sd import GenerationRequest
from flux_sd.model_loader import embedded_folder


@dataclass(frozen=True)
class Report:
    """What one evaluation found; shares are between 0 and 1, PSNR in dB."""

    pairs: int
    seed: int
    steps: int
    emoji: float
    background: float
    psnr_mean: float  # mean over the pictures
    psnr_of_mean_error: float
    psnr_least: float
    failures: dict[str, list[str]]  # emoji asked for -> what was painted instead


def to_pixels(image: Image.Image) -> Tensor:
    """A picture -> [3,H,W] in -1..1"""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1


def paint_all(model: flux_sd.LoadedModel, captions: list[str], asked: GenerationRequest) -> Tensor:
    """Captions -> [B,3,H,W], each painted as asked, from the same seed"""
    painted = []
    for caption in captions:
        request = replace(asked, prompt=caption)
        painted.append(to_pixels(model.generate(request)[0].image))
        if len(painted) % 50 == 0:
            print(f"{len(painted)} of {len(captions)} painted", file=sys.stderr, flush=True)
    return torch.stack(painted)


@torch.inference_mode()
def autoencoder_quality(model: flux_sd.LoadedModel, pictures: Pictures, chosen: Tensor) -> Tensor:
    """PSNR [B] of encoding and decoding the canonical pictures of the pairs [B,2], as 8-bit pictures"""
    network = model.components.network("vae")
    found = []
    for part in chosen.split(16):
        x = pictures.compose(part[:, 0], part[:, 1], torch.zeros(len(part), dtype=torch.long))
        y = (network.decode(network.encode(x)).clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1
        found.append(psnr(y, x))
    return torch.cat(found)


def evaluate(model: flux_sd.LoadedModel, pictures: Pictures, asked: GenerationRequest, every: int) -> Report:
    """Paint, recognise, reconstruct; `every` n-th held-out pair is taken (1 is all)."""
    captions = Captions.of(pictures.names)
    kept = torch.tensor(pairs(pictures.names, held_out=True))[::every]
    painted = paint_all(model, [captions.canonical(int(i), int(j)) for i, j in kept], asked)
    emoji, background = nearest(pictures, painted)
    colours = list(BACKGROUNDS)
    failures: dict[str, list[str]] = defaultdict(list)
    for (i, j), found_i, found_j in zip(kept.tolist(), emoji.tolist(), background.tolist(), strict=True):
        if (i, j) != (found_i, found_j):
            failures[pictures.names[i]].append(
                f"on {colours[j]}: painted {pictures.names[found_i]} on {colours[found_j]}"
            )
    quality = autoencoder_quality(model, pictures, kept)
    return Report(
        pairs=len(kept),
        seed=asked.seed or 0,
        steps=asked.steps or model.defaults.steps or 0,
        emoji=(emoji == kept[:, 0]).float().mean().item(),
        background=(background == kept[:, 1]).float().mean().item(),
        psnr_mean=quality.mean().item(),
        psnr_of_mean_error=-10 * (10 ** (-quality / 10)).mean().log10().item(),
        psnr_least=quality.min().item(),
        failures=dict(failures),
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="tiny-flux", help="tiny-flux or tiny-sd")
    parser.add_argument("--path", type=Path, help="checkpoint folder; default: the one in the package")
    parser.add_argument("--transformer", type=Path, help="this file for the transformer, such as a GGUF file")
    parser.add_argument("--font", type=Path, help="NotoColorEmoji.ttf; default: where Debian puts it")
    parser.add_argument("--cache", type=Path, default=Path("tiny_flux_pictures.pt"), help="rendered pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="default: the model's")
    parser.add_argument("--guidance", type=float, help="default: the model's")
    parser.add_argument("--every", type=int, default=1, help="take each n-th held-out pair only")
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON")
    arguments = parser.parse_args()
    pictures = render(arguments.font, arguments.cache)
    version = flux_sd.SDVersion.parse(arguments.model)
    folder = arguments.path
    if arguments.transformer is not None and folder is None:  # the other parts, which then have to be named
        folder = embedded_folder(version.info)
    asked = GenerationRequest(
        prompt="", seed=arguments.seed, steps=arguments.steps, guidance=arguments.guidance
    )
    with flux_sd.load_model(version, folder, transformer=arguments.transformer, keep_loaded=True) as model:
        report = evaluate(model, pictures, asked, arguments.every)
    if arguments.json:
        print(json.dumps(asdict(report), indent=2))
        return
    print(f"{report.pairs} held-out pairs, {report.steps} steps, seed {report.seed}, no retries")
    print(f"right emoji {report.emoji:.1%}, right background {report.background:.1%}")
    print(
        f"autoencoder PSNR: {report.psnr_mean:.2f} dB mean over the pictures, "
        f"{report.psnr_of_mean_error:.2f} dB of the mean error, {report.psnr_least:.2f} dB least"
    )
    for name, found in sorted(report.failures.items()):
        print(f"  {name}: {'; '.join(found)}")


if __name__ == "__main__":
    main()

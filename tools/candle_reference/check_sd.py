"""Checks `candle_reference run` for Stable Diffusion against diffusers, on a small random checkpoint.

    python tools/candle_reference/check_sd.py PROGRAM [--keep FOLDER]

Needs diffusers (an oracle; the package itself never does). Writes a UNet and an autoencoder in diffusers'
layout, lets Candle paint from given text states and noise, and runs diffusers on what Candle recorded: each
noise prediction and each DDIM step from Candle's own latents, the picture from its own final latents. In
GEGLU diffusers computes the exact GELU, Candle that of tanh: it is patched in, and both are reported.
Exit code 1 where a difference is over the tolerance.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, EulerAncestralDiscreteScheduler, UNet2DConditionModel
from diffusers.models.activations import GEGLU
from safetensors.torch import load_file, save_file
from torch import Tensor

# Relative, float32. A single pass differs by 1.5e-6; guidance subtracts two that are nearly equal. The exact
# GELU is at 8e-5.
TOLERANCE = 3e-5
GUIDANCE, STEPS, WIDTH = 7.5, 5, 64
SCHEDULERS: dict[str, Any] = {"ddim": DDIMScheduler, "euler_a": EulerAncestralDiscreteScheduler}


def networks(linear: bool, channels: int) -> tuple[UNet2DConditionModel, AutoencoderKL]:
    """Small ones with random weights. 32 groups: Candle's residual blocks know no other number."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        in_channels=channels,
        block_out_channels=(64, 128, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        use_linear_projection=linear,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=8,
    )
    return unet.eval(), vae.eval()


def write_spec(folder: Path, kind: str, prediction: str, condition: bool) -> Path:
    """The specification beside its inputs: text states, noise and, for inpainting, what is masked."""
    save_file(
        {"hidden": torch.randn(1, 77, WIDTH), "negative": torch.randn(1, 77, WIDTH)},
        folder / "text.safetensors",
    )
    save_file({"latents": torch.randn(1, 4, 16, 24)}, folder / "noise.safetensors")
    spec: dict[str, Any] = {
        "family": "sd",
        "unet": "unet/diffusion_pytorch_model.safetensors",
        "unet_config": "unet/config.json",
        "vae": "vae/diffusion_pytorch_model.safetensors",
        "vae_config": "vae/config.json",
        "hidden": "text.safetensors",
        "scheduler": {"kind": kind, "prediction": prediction, "spacing": "leading"},
        "steps": STEPS,
        "guidance": GUIDANCE,
        "dtype": "f32",
        "latents": "noise.safetensors",
    }
    if condition:
        save_file({"condition": torch.randn(1, 5, 16, 24)}, folder / "mask.safetensors")
        spec["condition"] = "mask.safetensors"
    (folder / "spec.json").write_text(json.dumps(spec, indent=1))
    return folder / "spec.json"


def relative(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||, in float64."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def tanh_gelu(_: GEGLU, gate: Tensor) -> Tensor:
    """Candle's GELU in GEGLU."""
    return F.gelu(gate, approximate="tanh")


@torch.inference_mode()
def differences(
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    record: dict[str, Tensor],
    kind: str,
    prediction: str,
    condition: Tensor | None,
) -> dict[str, float]:
    """The largest of each kind."""
    scheduler = SCHEDULERS[kind](
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        timestep_spacing="leading", prediction_type="v_prediction" if prediction == "v" else "epsilon",
        **({"clip_sample": False, "set_alpha_to_one": False} if kind == "ddim" else {}),
    )  # fmt: skip
    scheduler.set_timesteps(STEPS)
    start = record["noise"] * scheduler.init_noise_sigma
    found = {
        "timesteps": (record["timesteps"] - scheduler.timesteps).abs().max().item(),
        "first latents": relative(record["step.0.latents"], start),
        "noise_pred": 0.0,
    }
    latents = [record[f"step.{i}.latents"] for i in range(STEPS)] + [record["latents"]]
    for i, t in enumerate(scheduler.timesteps):
        scale = (scheduler.sigmas[i] ** 2 + 1) ** 0.5 if kind == "euler_a" else 1.0
        x = torch.cat([latents[i]] * 2) / scale
        if condition is not None:
            x = torch.cat([x, torch.cat([condition] * 2)], dim=1)
        without, with_text = unet(x, t, record["hidden"]).sample.chunk(2)
        ours = without + GUIDANCE * (with_text - without)
        found["noise_pred"] = max(found["noise_pred"], relative(record[f"step.{i}.noise_pred"], ours))
    if kind == "ddim":  # Euler ancestral adds noise that nobody can rebuild
        pairs = zip(pairwise(latents), scheduler.timesteps, strict=True)
        steps = [
            relative(after, scheduler.step(record[f"step.{i}.noise_pred"], t, before).prev_sample)
            for i, ((before, after), t) in enumerate(pairs)
        ]
        found["step"] = max(steps)
    image = vae.decode(record["latents"] / vae.config.scaling_factor).sample
    found["image"] = relative(record["image"], image)
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("program", type=Path)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave checkpoint and record there")
    arguments = parser.parse_args()
    program, worst = arguments.program.resolve(), 0.0
    cases = [("ddim", "epsilon", False, 4), ("ddim", "v", True, 4), ("ddim", "epsilon", False, 9),
             ("euler_a", "epsilon", True, 4)]  # fmt: skip
    for kind, prediction, linear, channels in cases:
        with tempfile.TemporaryDirectory() as temporary:
            folder = arguments.keep or Path(temporary)
            unet, vae = networks(linear, channels)
            unet.save_pretrained(folder / "unet")
            vae.save_pretrained(folder / "vae")
            spec = write_spec(folder, kind, prediction, condition=channels == 9)
            out = folder / "candle.safetensors"
            subprocess.run([program, "run", spec, out], check=True, stdout=subprocess.DEVNULL)
            record = load_file(out)
            mask = load_file(folder / "mask.safetensors")["condition"] if channels == 9 else None
        given = (unet, vae, record, kind, prediction, mask)
        exact = differences(*given)["noise_pred"]
        with patch.object(GEGLU, "gelu", tanh_gelu):
            found = differences(*given)
        worst = max(worst, *found.values())
        figures = ", ".join(f"{name} {value:.1e}" for name, value in found.items())
        print(
            f"{kind}, {prediction}, {channels} channels: {figures} (noise_pred with exact GELU {exact:.1e})"
        )
    sys.exit(0 if worst <= TOLERANCE else 1)


if __name__ == "__main__":
    main()

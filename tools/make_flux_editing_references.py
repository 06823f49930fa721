"""Writes what diffusers' FLUX pipelines do with pictures: `reference_outputs/pipelines/flux_editing.*`.

    oracle/bin/python tools/make_flux_editing_references.py

in the environment that tools/make_oracle_references.py describes. Of each run of tools/flux_editing_cases.py,
with tiny procedural models: what the transformer is given at every step, the time it starts at, and the last
latents, packed. Noise and text states are injected; of the autoencoder's distribution the mean is taken, as
the models' authors do (diffusers draws a sample but in Kontext). Imports nothing of flux_sd.
tests/test_flux_editing.py compares.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxControlImg2ImgPipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    FluxTransformer2DModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from flux_editing_cases import (
    CASES,
    HEIGHT,
    WIDE,
    WIDTH,
    Case,
    in_channels,
    mask,
    noise,
    picture,
    reference,
    text,
)
from make_oracle_references import HEADS, HIDDEN, autoencoder_sources, flux_sources, give, whole
from safetensors.torch import save_file
from torch import Tensor

OUT = Path(__file__).resolve().parent.parent / "reference_outputs" / "pipelines"


def transformer(case: Case) -> FluxTransformer2DModel:
    """One double block and one single one."""
    channels = in_channels(case)
    model = FluxTransformer2DModel(
        in_channels=channels,
        out_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=HIDDEN // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=WIDE,
        pooled_projection_dim=WIDE,
        guidance_embeds=case.guidance is not None,
        axes_dims_rope=(16, 24, 24),
    )
    sources = flux_sources(1, 1, case.guidance is not None)
    sources["x_embedder.weight"] = ("img_in.weight", (HIDDEN, channels), whole)
    give(model, sources)
    return model


def vae() -> AutoencoderKL:
    model = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[32] * 4,
        layers_per_block=1,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.5,
        shift_factor=0.1,
    )
    give(model, autoencoder_sources(model, levels=4))
    return model


def scheduler(case: Case) -> FlowMatchEulerDiscreteScheduler:
    shifted = case.guidance is not None
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0 if shifted else 1.0, use_dynamic_shifting=shifted, base_shift=0.5, max_shift=1.15
    )


def kind(case: Case) -> Any:
    """diffusers' pipeline for the task."""
    if case.model == "flux-fill":
        return FluxFillPipeline
    if case.control:
        return FluxControlPipeline if case.strength is None else FluxControlImg2ImgPipeline
    if case.masked:
        return FluxInpaintPipeline
    return FluxImg2ImgPipeline if case.strength is not None else FluxKontextPipeline


def pipeline(case: Case) -> Any:
    absent = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    made = kind(case)(transformer=transformer(case), vae=vae(), scheduler=scheduler(case), **absent)
    made.set_progress_bar_config(disable=True)
    return made


def asked(case: Case) -> dict[str, Any]:
    """The case in the words of its pipeline."""
    hidden, pooled = text()
    words: dict[str, Any] = {
        "prompt_embeds": hidden,
        "pooled_prompt_embeds": pooled,
        "height": HEIGHT,
        "width": WIDTH,
        "num_inference_steps": case.steps,
        "guidance_scale": case.guidance or 0.0,
    }
    if case.strength is not None:
        words |= {"image": picture(), "strength": case.strength}
    if case.masked:
        words["mask_image"] = mask()
    if case.control:
        words["control_image"] = picture("control")
    if case.model == "flux-kontext":  # it would change sizes to those of the released model
        words |= {"max_area": WIDTH * HEIGHT, "_auto_resize": False}
        words |= {"image": reference()} if case.reference else {}
    return words


def run(case: Case) -> dict[str, Tensor]:
    """What the transformer is given at each step, and the last latents."""
    made = pipeline(case)
    seen: dict[str, Tensor] = {}

    def look(_module: Any, _given: tuple[Any, ...], named: dict[str, Any]) -> None:
        number = sum(name.endswith(".img") for name in seen)
        seen[f"step.{number}.img"] = named["hidden_states"].clone()
        seen[f"step.{number}.t"] = named["timestep"].reshape(()).float().clone()
        if number == 0:
            seen["img_ids"] = named["img_ids"].float().clone()
            if named["guidance"] is not None:
                seen["guidance"] = named["guidance"].reshape(()).clone()

    def draw(shape: tuple[int, ...], **_: Any) -> Tensor:
        assert tuple(shape) == tuple(noise().shape), shape
        return noise()

    made.transformer.register_forward_pre_hook(look, with_kwargs=True)
    own = sys.modules[type(made).__module__]
    mean = patch.object(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    with patch.object(own, "randn_tensor", draw), mean:
        latents = made(output_type="latent", **asked(case)).images
    steps = sum(name.endswith(".img") for name in seen)
    start = made.scheduler.sigmas[len(made.scheduler.sigmas) - 1 - steps]
    return {**seen, "start": start.clone(), "latents": latents}


def main() -> None:
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    stored: dict[str, Tensor] = {}
    with torch.inference_mode():
        for name, case in CASES.items():
            tensors = run(case)
            stored |= {f"{name}.{key}": value.contiguous() for key, value in tensors.items()}
            steps = sum(key.endswith(".img") for key in tensors)
            spread = tensors["latents"].std().item()
            print(f"{name}: {steps} steps from {tensors['start'].item():.4f}, latents of {spread:.3f}")
    save_file(stored, OUT / "flux_editing.safetensors")
    manifest = {
        "what": "what diffusers' FLUX pipelines give their transformer at every step, and their last latents",
        "command": "python tools/make_flux_editing_references.py",
        "versions": {name: version(name) for name in ("torch", "diffusers", "numpy")},
        "dtype": "float32 on one CPU thread",
        "tolerance": {"relative": 2e-5, "why": "float32 sums in another order; sigmas in float32 there"},
    }
    (OUT / "flux_editing.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Writes what diffusers' Stable Diffusion pipelines do with tiny models: `reference_outputs/pipelines/`.

    oracle/bin/python tools/make_pipeline_references.py

in the environment that tools/make_oracle_references.py describes. Of each run of tools/pipeline_cases.py:
what the UNet is given at every step, and the last latents. Weights are procedural, and noise is injected:
where a pipeline or a scheduler draws, it gets the next procedural tensor. Of the autoencoder's distribution
the mean is taken (diffusers' own sample_mode="argmax"), as we do, where the pipelines draw a sample. Imports
nothing of flux_sd. tests/test_sd_pipelines.py compares.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from make_oracle_references import autoencoder_sources, give, whole
from pipeline_cases import CASES, HEIGHT, PROMPT, WIDTH, Case, mask, noise, picture
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "reference_outputs" / "pipelines"
VOCABULARY = ROOT / "tests" / "data" / "tokenizers" / "clip"
SCHEDULERS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
}


def is_xl(case: Case) -> bool:
    return case.model.startswith("sdxl")


def is_sd2(case: Case) -> bool:
    return case.model.startswith("sd2")


def unet(case: Case) -> UNet2DConditionModel:
    """Two levels, 32 and 64 wide; of XL's only the coarser has transformers, of two blocks."""
    kinds = ("DownBlock2D" if is_xl(case) else "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    ups = ("CrossAttnUpBlock2D", "UpBlock2D" if is_xl(case) else "CrossAttnUpBlock2D")
    more: dict[str, Any] = {}
    if is_xl(case):
        more = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 48 + 6 * 256,
            "transformer_layers_per_block": [1, 2],
        }
    model = UNet2DConditionModel(
        sample_size=8,
        in_channels=9 if case.model.endswith("inpaint") else 4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=kinds,
        up_block_types=ups,
        cross_attention_dim=160 if is_xl(case) else 64,
        attention_head_dim=(1, 2) if is_xl(case) or is_sd2(case) else (2, 2),  # the number of heads
        use_linear_projection=is_xl(case) or is_sd2(case),
        **more,
    )
    give(model, {name: (name, tuple(p.shape), whole) for name, p in model.named_parameters()})
    return model


def vae(case: Case) -> AutoencoderKL:
    model = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[32, 32, 64, 64],
        layers_per_block=1,
        latent_channels=4,
        scaling_factor=0.13025 if is_xl(case) else 0.18215,
    )
    sources = autoencoder_sources(model, levels=4)
    for name, parameter in model.named_parameters():
        if "quant_conv" in name:
            sources[name] = (name, tuple(parameter.shape), whole)
    give(model, sources)
    return model


def text_config(width: int, layers: int, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act=activation,
        projection_dim=48,
        bos_token_id=712,  # those of the small vocabulary: the end token's place is where the text is pooled
        eos_token_id=713,
        pad_token_id=713,
    )


def text_encoder(case: Case) -> CLIPTextModel:
    model = CLIPTextModel(text_config(64, 2, "gelu" if is_sd2(case) else "quick_gelu"))
    give(model, {name: (f"text_model.{name}", tuple(p.shape), whole) for name, p in model.named_parameters()})
    return model


def tokenizer(pad: str) -> CLIPTokenizer:
    made = CLIPTokenizer.from_pretrained(VOCABULARY, model_max_length=77, pad_token=pad)
    assert made.pad_token == pad and made.eos_token_id == text_config(64, 2, "gelu").eos_token_id
    return made


def scheduler(case: Case) -> Any:
    options: dict[str, Any] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "timestep_spacing": case.schedule,
        "prediction_type": "v_prediction" if case.model == "sd21" else "epsilon",
    }
    if case.sampler == "ddim":
        options |= {"clip_sample": False, "set_alpha_to_one": False}
    return SCHEDULERS[case.sampler](**options)


def pipeline(case: Case) -> Any:
    """diffusers' pipeline for the task, around the small networks."""
    end = "<|endoftext|>"
    parts: dict[str, Any] = {
        "vae": vae(case),
        "unet": unet(case),
        "text_encoder": text_encoder(case),
        "tokenizer": tokenizer("!" if is_sd2(case) else end),
        "scheduler": scheduler(case),
    }
    task = 2 if case.masked else int(case.strength is not None)
    if is_xl(case):
        second = CLIPTextModelWithProjection(text_config(96, 3, "gelu"))
        give(second, {name: (name, tuple(p.shape), whole) for name, p in second.named_parameters()})
        parts |= {"text_encoder_2": second, "tokenizer_2": tokenizer("!"), "add_watermarker": False}
        kinds = (
            StableDiffusionXLPipeline,
            StableDiffusionXLImg2ImgPipeline,
            StableDiffusionXLInpaintPipeline,
        )
        return kinds[task](force_zeros_for_empty_prompt=True, **parts)
    parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return (StableDiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline)[task](
        **parts
    )


@contextmanager
def injected(made: Any) -> Iterator[None]:
    """While open, whatever is drawn is procedural, and pictures are encoded to the mean."""
    drawn = iter(range(1000))

    def draw(shape: tuple[int, ...], **_: Any) -> Tensor:
        tensor = noise(next(drawn))
        assert tuple(shape) == tuple(tensor.shape), shape
        return tensor

    own, steps = sys.modules[type(made).__module__], sys.modules[type(made.scheduler).__module__]
    changed = [patch.object(own, "randn_tensor", draw)]
    if hasattr(steps, "randn_tensor"):
        changed.append(patch.object(steps, "randn_tensor", lambda shape, **rest: draw(shape, **rest)))
    if hasattr(own, "retrieve_latents"):
        mean = functools.partial(own.retrieve_latents, sample_mode="argmax")
        changed.append(patch.object(own, "retrieve_latents", mean))
    for change in changed:
        change.start()
    try:
        yield
    finally:
        for change in changed:
            change.stop()


def run(case: Case) -> dict[str, Tensor]:
    """What the UNet is given at each step, and the last latents."""
    made = pipeline(case)
    made.set_progress_bar_config(disable=True)
    seen: dict[str, Tensor] = {}

    def look(_module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        number = sum(name.endswith(".x") for name in seen)
        seen[f"step.{number}.x"] = given[0].clone()
        seen[f"step.{number}.t"] = torch.as_tensor(given[1], dtype=torch.float32).clone()
        if number == 0:
            seen["context"] = named["encoder_hidden_states"].clone()
            added = named.get("added_cond_kwargs") or {}
            seen.update({name: tensor.clone() for name, tensor in added.items()})

    made.unet.register_forward_pre_hook(look, with_kwargs=True)
    asked: dict[str, Any] = {"num_inference_steps": case.steps, "negative_prompt": case.negative}
    asked["guidance_scale"] = 0.0 if case.guidance is None else case.guidance
    if case.rescale is not None:
        asked["guidance_rescale"] = case.rescale
    if case.strength is None or case.masked:
        asked |= {"height": HEIGHT, "width": WIDTH}
    if case.strength is not None:
        asked |= {"image": picture(), "strength": case.strength}
    if case.masked:
        asked["mask_image"] = mask()
    with injected(made):
        latents = made(PROMPT, output_type="latent", **asked).images
    return {**seen, "latents": latents}


def main() -> None:
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    stored: dict[str, Tensor] = {}
    with torch.inference_mode():
        for name, case in CASES.items():
            tensors = run(case)
            stored |= {f"{name}.{key}": value.contiguous() for key, value in tensors.items()}
            steps = sum(key.endswith(".x") for key in tensors)
            print(
                f"{name}: {steps} steps, latents of standard deviation {tensors['latents'].std().item():.3f}"
            )
    save_file(stored, OUT / "pipelines.safetensors")
    manifest = {
        "what": "what diffusers' pipelines give their UNet at every step, and their last latents",
        "command": "python tools/make_pipeline_references.py",
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "numpy")},
        "dtype": "float32 on one CPU thread",
        "tolerance": {
            "sd": 2e-5,
            "sdxl": 4e-5,
            "why": "float32 sums in another order, magnified by guidance from step to step",
        },
    }
    (OUT / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

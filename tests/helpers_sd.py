"""Stable Diffusion models of random weights in diffusers folders, small enough to run in a fraction of a
second: one like each released kind (1.5, 2.1, XL, Turbo, and their inpainting forms)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from flux_sd.autoencoder import AutoEncoder, AutoEncoderConfig
from flux_sd.clip import ClipTextConfig, ClipTextEncoder
from flux_sd.components import LoadOptions
from flux_sd.device import choose_device
from flux_sd.model_files import find_files
from flux_sd.model_loader import Model, sd_model
from flux_sd.numerics import parse
from flux_sd.sd_loader import load_sd
from flux_sd.unet import SIZE_WIDTH, UNet, UNetConfig
from flux_sd.versions import SDVersion, VersionInfo

TOKENIZERS = Path(__file__).parent / "data" / "tokenizers"
FILES = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "clip": "text_encoder/model.safetensors",
    "clip_2": "text_encoder_2/model.safetensors",
}
CLIP = ClipTextConfig(1024, 64, 128, 2, 4, "quick_gelu")
OPEN_CLIP = ClipTextConfig(1024, 64, 128, 2, 4, "gelu")
OPEN_CLIP_2 = ClipTextConfig(1024, 96, 192, 3, 4, "gelu", projection_dim=48)
VAE = AutoEncoderConfig(32, 3, 32, 3, (1, 1, 2, 2), 1, 4, 0.18215, 0.0, use_quant_conv=True)
UNET = UNetConfig(4, (32, 64), (1, 1), 1, (2, 2), 64, False, resnets=1)
LINEAR_UNET = replace(UNET, heads=(1, 2), linear_projection=True, float32_attention=True)
XL_UNET = UNetConfig(4, (32, 64), (0, 2), 2, (1, 2), 160, True, 48 + 6 * SIZE_WIDTH, resnets=1)


def small_info(version: SDVersion) -> VersionInfo:
    """The row of a released version with small networks of its kind; 48 x 32 pixels, three steps."""
    row = version.info
    assert row.sd is not None
    unet, clip, clip_2 = UNET, CLIP, None
    if row.is_xl:
        unet, clip_2 = XL_UNET, OPEN_CLIP_2
    elif row.sd.unet.linear_projection:
        unet, clip = LINEAR_UNET, OPEN_CLIP
    if row.is_inpainting:
        unet = unet.inpainting()
    vae = replace(VAE, scale_factor=row.sd.vae.scale_factor)
    sd = replace(row.sd, unet=unet, clip=clip, clip_2=clip_2, vae=vae)
    return replace(row, sd=sd, width=48, height=32, steps=3 if row.guidance else row.steps)


def networks(info: VersionInfo, seed: int = 0) -> dict[str, nn.Module]:
    """The networks with seeded random weights."""
    torch.manual_seed(seed)
    configs = info.sd
    assert configs is not None
    made: dict[str, nn.Module] = {
        "unet": UNet(configs.unet),
        "vae": AutoEncoder(configs.vae),
        "clip": ClipTextEncoder(configs.clip),
    }
    if configs.clip_2 is not None:
        made["clip_2"] = ClipTextEncoder(configs.clip_2)
    return made


def write_folder(
    folder: Path,
    info: VersionInfo,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    scheduler: Mapping[str, object] | None = None,
    made: Mapping[str, nn.Module] | None = None,
) -> Path:
    """A diffusers folder with random weights, or those of `made`, small tokenizers and a scheduler's config.

    `scheduler`: fields of the config to change or add; by default it states the version's prediction type,
    v-prediction where the version has none.
    """
    for role, network in (made or networks(info, seed)).items():
        tensors = {name: p.detach().to(dtype) for name, p in network.named_parameters()}
        if role == "vae":
            assert info.sd is not None
            tensors = diffusers_vae(tensors, len(info.sd.vae.ch_mult))
        file = folder / FILES[role]
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, file)
    assert info.sd is not None
    config = {
        "prediction_type": info.sd.prediction or "v_prediction",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "num_train_timesteps": 1000,
        "steps_offset": 1,
        **(scheduler or {}),
    }
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    for name in ("tokenizer", "tokenizer_2")[: 2 if info.is_xl else 1]:
        shutil.copytree(TOKENIZERS / "clip", folder / name)
    return folder


def diffusers_vae(tensors: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """Our names and shapes of the autoencoder's tensors to diffusers': levels of the decoder counted from the
    other end, the attention's 1x1 convolutions as linears."""
    attention = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0", "norm": "group_norm"}
    renamed = {}
    for name, tensor in tensors.items():
        match name.split("."):
            case [side, "mid", "attn_1", leaf, kind]:
                new = f"{side}.mid_block.attentions.0.{attention[leaf]}.{kind}"
                tensor = tensor.flatten(1) if tensor.ndim == 4 else tensor
            case [side, "mid", block, leaf, kind]:
                new = f"{side}.mid_block.resnets.{int(block[-1]) - 1}.{leaf}.{kind}"
            case [side, ("down" | "up") as way, level, "block", index, leaf, kind]:
                at = int(level) if way == "down" else levels - 1 - int(level)
                leaf = "conv_shortcut" if leaf == "nin_shortcut" else leaf
                new = f"{side}.{way}_blocks.{at}.resnets.{index}.{leaf}.{kind}"
            case [side, ("down" | "up") as way, level, sampler, "conv", kind]:
                at = int(level) if way == "down" else levels - 1 - int(level)
                new = f"{side}.{way}_blocks.{at}.{sampler}rs.0.conv.{kind}"
            case [side, "norm_out", kind]:
                new = f"{side}.conv_norm_out.{kind}"
            case _:
                new = name
        renamed[new] = tensor.contiguous()
    return renamed


def open_model(
    folder: Path,
    info: VersionInfo,
    dtype: torch.dtype = torch.float32,
    numerics: str = "reference",
    keep_loaded: bool = False,
    prediction: str | None = None,
) -> Model:
    """The folder as a LoadedModel, past the version table."""
    files, device = find_files(info, folder, {}), choose_device("cpu")
    options = LoadOptions(keep_loaded)
    loaded = load_sd(info, files, device, dtype, parse(numerics), options, prediction)
    return sd_model(SDVersion.parse(info.key), loaded)


def picture(width: int = 48, height: int = 32) -> Image.Image:
    """Colours that change along both sides, with fine lines that no autoencoder keeps."""
    made = Image.new("RGB", (width, height))
    made.putdata(
        [
            (255 * x // width, 255 * y // height, 255 * ((x + y) % 2))
            for y in range(height)
            for x in range(width)
        ]
    )
    return made


def peak(work: Callable[[], object]) -> int:
    """The most bytes of tensors that `work` holds at once, as torch's allocator counts them."""
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    held = most = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def half_mask(width: int = 48, height: int = 32) -> Image.Image:
    """White, repaint, on the left half; black, keep, on the right."""
    mask = Image.new("L", (width, height))
    mask.paste(255, (0, 0, width // 2, height))
    return mask

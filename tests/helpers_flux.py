"""A FLUX model of random weights, small enough to load and run in a fraction of a second, in a BFL folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from flux_sd.autoencoder import AutoEncoder, AutoEncoderConfig
from flux_sd.clip import ClipTextConfig, ClipTextEncoder
from flux_sd.components import LoadOptions
from flux_sd.device import choose_device
from flux_sd.flux_loader import load_flux
from flux_sd.flux_mmdit import Flux, FluxConfig
from flux_sd.model_files import find_files
from flux_sd.model_loader import Model, flux_model
from flux_sd.numerics import parse
from flux_sd.t5 import T5Config, T5Encoder
from flux_sd.versions import FLUX_PREVIEW, FluxConfigs, SDVersion, VersionInfo

TOKENIZERS = Path(__file__).parent / "data" / "tokenizers"
FILES = {
    "transformer": "flux1-small.safetensors",
    "vae": "ae.safetensors",
    "clip": "text_encoder/model.safetensors",
    "t5": "text_encoder_2/model.safetensors",
}

_ENCODER_FOLDERS = ("text_encoder/model.safetensors", "text_encoder_2/model.safetensors")
_FLAT_ENCODERS = ("clip_l.safetensors", "t5xxl_fp16.safetensors")
# Layouts that people have: the files of a folder, and what is found for each role.
INFO_FOLDERS = [
    (
        ("transformer/a.safetensors", "vae/a.safetensors", *_ENCODER_FOLDERS),
        {"transformer": "transformer", "vae": "vae", "clip": "text_encoder", "t5": "text_encoder_2"},
    ),
    (
        ("flux1-dev.safetensors", "ae.safetensors", *_ENCODER_FOLDERS),
        {"transformer": "flux1-dev.safetensors", "vae": "ae.safetensors", "clip": "text_encoder"},
    ),
    (
        ("flux1-dev-Q8_0.gguf", "ae.safetensors", *_FLAT_ENCODERS),
        {"transformer": "flux1-dev-Q8_0.gguf", "clip": "clip_l.safetensors", "t5": "t5xxl_fp16.safetensors"},
    ),
]


def small_info(guidance: bool = False, depth: int = 1) -> VersionInfo:
    """tiny-flux's row with smaller networks (and, if asked, dev's guidance and shift)."""
    transformer = replace(FluxConfig.tiny(depth, 1, guidance), context_in_dim=64, vec_in_dim=64)
    configs = FluxConfigs(
        transformer,
        replace(T5Config.tiny(1), vocab_size=1024),
        replace(ClipTextConfig.tiny(), vocab_size=1024, num_hidden_layers=1),
        AutoEncoderConfig(32, 3, 32, 3, (1, 1, 1, 1), 1, 16, 0.5, 0.1),
    )
    row = SDVersion.TINY_FLUX.info
    return replace(
        row,
        flux=configs,
        width=32,
        height=48,
        shift=guidance,
        guidance=3.5 if guidance else None,
        preview=FLUX_PREVIEW,
        preview_bias=(0.0, 0.0, 0.0),
    )


def networks(info: VersionInfo, seed: int = 0) -> dict[str, nn.Module]:
    """The four networks with seeded random weights."""
    torch.manual_seed(seed)
    configs = info.flux
    assert configs is not None
    return {
        "transformer": Flux(configs.transformer),
        "t5": T5Encoder(configs.t5),
        "clip": ClipTextEncoder(configs.clip),
        "vae": AutoEncoder(configs.vae),
    }


def write_folder(
    folder: Path,
    info: VersionInfo,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    made: Mapping[str, nn.Module] | None = None,
) -> Path:
    """A BFL-layout folder with random weights, or those of the networks `made`, and the small tokenizers."""
    for role, network in (networks(info, seed) if made is None else made).items():
        file = folder / FILES[role]
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: p.detach().to(dtype) for name, p in network.named_parameters()}, file)
    for role in ("text_encoder", "text_encoder_2"):
        (folder / role / "config.json").write_text(json.dumps({"note": "sizes come from the version table"}))
    shutil.copytree(TOKENIZERS / "clip", folder / "tokenizer")
    shutil.copytree(TOKENIZERS / "t5", folder / "tokenizer_2")
    return folder


def editing_info(key: str) -> VersionInfo:
    """The row of a released FLUX version with small networks of its kind, 64 x 48 pixels, three steps."""
    row = SDVersion.parse(key).info
    small = small_info(guidance=row.guidance is not None)
    assert row.flux is not None and small.flux is not None
    wide = replace(small.flux.transformer, in_channels=row.flux.transformer.in_channels)
    flux = replace(small.flux, transformer=wide)
    return replace(row, flux=flux, width=64, height=48, steps=3, t5_length=8, auto_dtype="float32")


def open_model(
    folder: Path,
    info: VersionInfo,
    dtype: torch.dtype = torch.float32,
    numerics: str = "reference",
    keep_loaded: bool = False,
) -> Model:
    """The folder as a LoadedModel, past the version table."""
    components = load_flux(
        info,
        find_files(info, folder, {}),
        choose_device("cpu"),
        dtype,
        parse(numerics),
        LoadOptions(keep_loaded),
    )
    return flux_model(SDVersion.TINY_FLUX, components)

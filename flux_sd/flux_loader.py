"""Which networks a FLUX model has, how each is built, and what it takes. Floor 6.

Mirrors the Rust worker's `flux_loader.rs`; what both families do alike is in `components.py`.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from .autoencoder import AutoEncoder
from .clip import ClipTextEncoder
from .components import LOAD_OPTIONS, Components, LoadOptions, Network, Tokenizer, open_all, plan_all
from .flux_mmdit import Flux
from .model_files import FLUX, ModelFiles, check_roles, config_of
from .numerics import Numerics
from .t5 import T5Encoder
from .text import ClipTokenizer, T5Tokenizer
from .vae_tiling import predicted_bytes
from .versions import FluxConfigs, VersionInfo


class EncodedText(NamedTuple):
    """A prompt as the transformer reads it, on the CPU."""

    txt: torch.Tensor  # [1, L, T5 width]
    vec: torch.Tensor  # [1, CLIP width]


def load_flux(
    info: VersionInfo,
    files: ModelFiles,
    device: torch.device,
    dtype: torch.dtype,
    numerics: Numerics,
    options: LoadOptions = LOAD_OPTIONS,
) -> Components:
    """Opens every file and checks names, shapes and memory from the headers alone; loads no weight yet. A
    file of several roles is opened once.

    Raises CheckpointError, WeightMapError (with every problem), TokenizerError, NotEnoughMemoryError.
    """
    with ExitStack() as opened:
        by_role, spare = open_all(opened, files.networks, options.fill_from)
        check_roles(info, by_role, complete=spare is None)
        networks = networks_of(info, numerics)
        plans = plan_all(networks, by_role, spare)
        where, found = (device, dtype), files.tokenizers
        made = Components(info, networks, plans, found, _tokenizer, where, numerics, options)
        opened.pop_all()  # from here on they are closed by `close`
        return made


def _tokenizer(role: str, path: Path) -> Tokenizer:
    return ClipTokenizer.load(path) if role == "clip" else T5Tokenizer.load(path)


def networks_of(info: VersionInfo, numerics: Numerics) -> dict[str, Network]:
    """The four networks, in the order of the stages."""

    def network(role: str) -> Network:
        return Network(
            FLUX.maps[role],
            config_of(role, info),
            lambda: _module(role, info, numerics),
            lambda pixels, t5_length: _activations(role, info, pixels, t5_length),
            widens=role != "vae",
        )

    return {role: network(role) for role in FLUX.maps}


def build(role: str, info: VersionInfo, numerics: Numerics) -> nn.Module:
    """One network on the meta device: names and shapes, no memory."""
    return networks_of(info, numerics)[role].on_meta()


def _module(role: str, info: VersionInfo, numerics: Numerics) -> nn.Module:
    config = config_of(role, info)
    if role == "transformer":
        return Flux(replace(config, rope_dtype=numerics.rope_dtype))
    if role == "clip":
        return ClipTextEncoder(config.with_gelu(numerics.clip_gelu))
    return {"t5": T5Encoder, "vae": AutoEncoder}[role](config)


def _activations(role: str, info: VersionInfo, pixels: int, t5_length: int) -> int:
    """Bytes in float32 for one image, by the largest tensors alive at once.

    Of the transformer those are a single block's first product and its parts; of the autoencoder see
    `predicted_bytes`.
    """
    configs = info.flux
    assert isinstance(configs, FluxConfigs)
    if role == "vae":
        return predicted_bytes(configs.vae, 1, pixels, torch.float32)
    if role == "transformer":
        tokens = t5_length + pixels // 256
        return 3 * 4 * tokens * (3 * configs.transformer.hidden_size + configs.transformer.mlp_size)
    return 4 * 4 * t5_length * (configs.t5.d_ff if role == "t5" else configs.clip.intermediate_size)

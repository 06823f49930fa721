"""Stable Diffusion's synthetic checkpoints for make_synthetic_checkpoint.py: folders and single files.

A single file's names come from the formulas of sd_names.py, not from `weights_maps/`: so that what the maps
make of such a file can be held against it. It holds what the released files hold beside the weights: the
noise schedule of the training, averaged copies, position numbers, the encoders' parts that nobody uses.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sd_names
import torch
from make_synthetic_checkpoint import (
    DTYPES,
    StoredTensor,
    config_json,
    shapes_of,
    values,
    write_component,
    write_file,
)
from torch import Tensor

from flux_sd.clip import ClipTextConfig
from flux_sd.errors import RequestError
from flux_sd.versions import VersionInfo

# role -> (component, its dialect in a diffusers folder, the folder, the name of its file)
ROLES = {
    "unet": ("unet", "diffusers", "unet", "diffusion_pytorch_model"),
    "vae": ("autoencoder", "diffusers", "vae", "diffusion_pytorch_model"),
    "clip": ("clip", "hf", "text_encoder", "model"),
    "clip_2": ("clip", "hf", "text_encoder_2", "model"),
}
# The released single files, by version: SDXL inpainting has none. Their training's last step, where it tells
# something (diffusers takes 875000 for an epsilon model, another for a v-prediction model).
SINGLE_FILES = {
    "sd15": ("v1-5-pruned", 840000),
    "sd15-inpaint": ("sd-v1-5-inpainting", 440000),
    "sd21": ("v2-1_768-ema-pruned", 110000),
    "sd21-base": ("v2-1_512-ema-pruned", 875000),
    "sd2-inpaint": ("512-inpainting-ema", 1000),
    "sdxl": ("sd_xl_base_1.0", 0),
    "sdxl-turbo": ("sd_xl_turbo_1.0_fp16", 0),
}
SCHEDULE = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
    "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
)  # fmt: skip


def write_folder(
    info: VersionInfo,
    out: Path,
    dtype: str = "f16",
    seed: int | None = None,
    shard_bytes: int | None = None,
    variant: str | None = None,
) -> dict[str, int]:
    """A diffusers folder; `seed` None for files without values that take no room. Returns bytes by file."""
    written = {}
    for role, (component, dialect, folder, stem) in ROLES.items():
        config = getattr(info.sd, role)
        if config is None:
            continue
        name = f"{folder}/{stem}{f'.{variant}' if variant else ''}.safetensors"
        shards = shard_bytes if role == "unet" else None
        written[name] = write_component(component, config, dialect, out / name, dtype, seed, shards)
        content = json.dumps(config_json(component, config), indent=2)
        (out / folder / "config.json").write_text(content + "\n")
    pipeline = "StableDiffusionXLPipeline" if info.is_xl else "StableDiffusionPipeline"
    (out / "model_index.json").write_text(json.dumps({"_class_name": pipeline}, indent=2) + "\n")
    return written


def write_single_file(
    info: VersionInfo, out: Path, dtype: str = "f16", seed: int | None = None, container: str = "safetensors"
) -> dict[str, int]:
    """The whole model in one file, as its authors released it. Raises RequestError for a version that has no
    such file in the world."""
    if info.key not in SINGLE_FILES:
        known = ", ".join(SINGLE_FILES)
        raise RequestError(f"{info.key} was never released as a single file: choose one of {known}")
    stem, step = SINGLE_FILES[info.key]
    path = out / f"{stem}.{container}"
    tensors, shapes = single_file(info)
    if container == "ckpt":
        return {path.name: _write_ckpt(path, tensors, shapes, dtype, seed, step)}
    return {path.name: write_file(path, tensors, shapes, dtype, seed, d_kv=64)}


def single_file(info: VersionInfo) -> tuple[list[StoredTensor], dict[str, tuple[int, ...]]]:
    """(the tensors of a version's single file, the shapes of our parameters that they are made of)."""
    configs: Any = info.sd
    shapes: dict[str, tuple[int, ...]] = {}
    for role, (component, *_) in ROLES.items():
        if getattr(configs, role) is not None:
            own = shapes_of(component, getattr(configs, role))
            shapes |= {f"{role}/{name}": shape for name, shape in own.items()}
    tensors = [*_unet(shapes), *_autoencoder(shapes)]
    if info.is_xl:
        tensors += _hf_encoder("conditioner.embedders.0.transformer.", shapes)
        tensors += _open_clip("conditioner.embedders.1.model.", "clip_2", configs.clip_2, shapes)
        return tensors, shapes
    if configs.clip == ClipTextConfig.clip_l():
        tensors += _hf_encoder("cond_stage_model.transformer.", shapes)
        tensors += [_averaged(tensor) for tensor in tensors if tensor.name.startswith("model.")]
        tensors += [StoredTensor("model_ema.decay", (), ()), StoredTensor("model_ema.num_updates", (), ())]
    else:
        tensors += _open_clip("cond_stage_model.model.", "clip", configs.clip, shapes)
    return tensors + [StoredTensor(name, (1000,), (), dtype="f32") for name in SCHEDULE], shapes


def _of(role: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix(role + "/"): s for name, s in shapes.items() if name.startswith(role + "/")}


def _whole(theirs: str, ours: str, shape: tuple[int, ...]) -> StoredTensor:
    return StoredTensor(theirs, shape, ((ours, 0, shape[0]),))


def _unet(shapes: dict[str, tuple[int, ...]]) -> Iterator[StoredTensor]:
    own = _of("unet", shapes)
    for name, shape in own.items():
        yield _whole(f"model.diffusion_model.{sd_names.unet_ldm(name, own)}", f"unet/{name}", shape)


def _averaged(tensor: StoredTensor) -> StoredTensor:
    """The copy of a UNet's tensor in v1-5-pruned: its name without dots."""
    name = "".join(tensor.name.removeprefix("model.").split("."))
    return StoredTensor(f"model_ema.{name}", tensor.shape, tensor.parts)


def _autoencoder(shapes: dict[str, tuple[int, ...]]) -> Iterator[StoredTensor]:
    """Ours has LDM's names."""
    for name, shape in _of("vae", shapes).items():
        yield _whole(f"first_stage_model.{name}", f"vae/{name}", shape)


def _hf_encoder(prefix: str, shapes: dict[str, tuple[int, ...]]) -> Iterator[StoredTensor]:
    for name, shape in _of("clip", shapes).items():
        yield _whole(prefix + name, f"clip/{name}", shape)
    yield StoredTensor(f"{prefix}text_model.embeddings.position_ids", (1, 77), (), dtype="i64")


def _open_clip(
    prefix: str, role: str, config: ClipTextConfig, shapes: dict[str, tuple[int, ...]]
) -> Iterator[StoredTensor]:
    """An OpenCLIP encoder; Stable Diffusion 2's with the layer and the projection that it does not use."""
    parts: dict[str, list[tuple[int, str, tuple[int, ...], bool]]] = {}
    for name, shape in _of(role, shapes).items():
        theirs, third, is_transposed = sd_names.open_clip(name)
        parts.setdefault(theirs, []).append((third or 0, f"{role}/{name}", shape, is_transposed))
    last = f"transformer.resblocks.{config.num_hidden_layers - 1}."
    for theirs, group in parts.items():
        group.sort()
        shape, is_transposed = group[0][2], group[0][3]
        full = shape[::-1] if is_transposed else (len(group) * shape[0], *shape[1:])
        rows = tuple((ours, 0, shape[0]) for _, ours, shape, _ in group)
        yield StoredTensor(prefix + theirs, full, rows, is_transposed)
        if config.num_hidden_layers == 23 and theirs.startswith(last):
            yield StoredTensor(f"{prefix}transformer.resblocks.23.{theirs.removeprefix(last)}", full, rows)
    if config.projection_dim is None:
        yield StoredTensor(prefix + "text_projection", (config.hidden_size, config.hidden_size), ())
    yield StoredTensor(prefix + "logit_scale", (), ())


def _write_ckpt(
    path: Path,
    tensors: list[StoredTensor],
    shapes: dict[str, tuple[int, ...]],
    dtype: str,
    seed: int | None,
    step: int,
) -> int:
    """As PyTorch Lightning writes it. Without a seed the file has holes where the values would be."""
    state = {tensor.name: _tensor(tensor, shapes, dtype, seed) for tensor in tensors}
    content = {"epoch": 0, "global_step": step, "state_dict": state}
    path.parent.mkdir(parents=True, exist_ok=True)
    if seed is None:
        with torch.serialization.skip_data():
            torch.save(content, path)
    else:
        torch.save(content, path)
    return sum(tensor.nbytes for tensor in state.values())


def _tensor(tensor: StoredTensor, shapes: dict[str, tuple[int, ...]], dtype: str, seed: int | None) -> Tensor:
    torch_dtype = DTYPES[tensor.dtype or dtype][0]
    if seed is None or not tensor.parts:  # `empty` touches no memory, and nothing of it is written
        return (torch.empty if seed is None else torch.zeros)(tensor.shape, dtype=torch_dtype)
    pieces = []
    for target, first, rows in tensor.parts:
        width = math.prod(shapes[target][1:])
        drawn = torch.cat(list(values(target, shapes[target], first * width, rows * width, seed)))
        pieces.append(drawn.view(rows, *shapes[target][1:]))
    whole = torch.cat(pieces)
    return (whole.t() if tensor.transposed else whole).to(torch_dtype).contiguous()

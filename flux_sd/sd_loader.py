"""Which networks a Stable Diffusion model has, how each is built, what it predicts over which noise. Floor 6.

Mirrors the Rust worker's `loader.rs` and candle-transformers' `models/stable_diffusion/mod.rs`; what both
families do alike is in `components.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .autoencoder import AutoEncoder, AutoEncoderConfig
from .checkpoint import Checkpoint
from .clip import ClipTextConfig, ClipTextEncoder
from .components import LOAD_OPTIONS, Components, LoadOptions, Network, Tokenizer, open_all, plan_all
from .errors import CheckpointError, RequestError
from .model_files import ModelFiles, check_roles, config_of, layout_of
from .numerics import Numerics
from .schedulers import PREDICTIONS, SCHEDULES, NoiseSchedule, Prediction
from .text import CLIP_END, ClipTokenizer
from .unet import SIZE_WIDTH, UNet, UNetConfig
from .vae_tiling import predicted_bytes
from .versions import VersionInfo, configs_of

PAD = "!"  # fills up the prompts of OpenCLIP's encoders: the vocabulary's first token
NOTHING: Mapping[str, Any] = {}
# Of config.json beside a network: who wrote it, and what is built of what it says and weights do not show.
CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "clip": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "clip_2": ("CLIPTextModel", "CLIPTextModelWithProjection"),
}
FIXED: Mapping[str, Mapping[str, Any]] = {
    "unet": {
        "act_fn": "silu", "center_input_sample": False, "flip_sin_to_cos": True, "freq_shift": 0,
        "downsample_padding": 1, "mid_block_scale_factor": 1, "norm_eps": 1e-5, "norm_num_groups": 32,
        "resnet_time_scale_shift": "default", "dual_cross_attention": False, "class_embed_type": None,
        "addition_time_embed_dim": SIZE_WIDTH, "encoder_hid_dim_type": None, "resnet_out_scale_factor": 1.0,
        "resnet_skip_time_act": False, "time_embedding_act_fn": None, "time_embedding_type": "positional",
        "timestep_post_act": None,
    },
    "vae": {
        "act_fn": "silu", "norm_num_groups": 32, "latents_mean": None, "latents_std": None,
        "shift_factor": 0.0,
    },
    "clip": {"layer_norm_eps": 1e-5},
    "clip_2": {"layer_norm_eps": 1e-5},
}  # fmt: skip
PARAMETERIZATIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}  # the original's words
EPSILON_STEP = "875000"  # training step of the 2.x base models, which predict noise; diffusers goes by it too


@dataclass(frozen=True)
class Diffusion:
    """What a UNet was trained to predict, over which noise, and how that is known."""

    prediction: Prediction
    noise: NoiseSchedule
    how: str  # "the scheduler's config", "as asked", ...
    schedule: str | None = None  # that the scheduler's config names, for requests that name none


class LoadedSd(NamedTuple):
    """A checked Stable Diffusion model; its weights are read as they are wanted."""

    components: Components
    diffusion: Diffusion


def load_sd(
    info: VersionInfo,
    files: ModelFiles,
    device: torch.device,
    dtype: torch.dtype,
    numerics: Numerics,
    options: LoadOptions = LOAD_OPTIONS,
    prediction: str | None = None,
) -> LoadedSd:
    """Opens every file and checks names, shapes, configs and memory from headers alone; loads no weight yet.

    prediction: what the UNet predicts, where its files do not say or say wrongly. Raises CheckpointError,
    WeightMapError (with every problem), RequestError where what it predicts cannot be told, TokenizerError,
    NotEnoughMemoryError.
    """
    with ExitStack() as opened:
        by_role, spare = open_all(opened, files.networks, options.fill_from)
        check_roles(info, by_role, complete=spare is None)
        trained = diffusion(info, files, by_role["unet"], numerics, prediction)
        networks = networks_of(info, numerics, files)
        plans = plan_all(networks, by_role, spare)
        load = _tokenizers(info, numerics)
        made = Components(info, networks, plans, files.tokenizers, load, (device, dtype), numerics, options)
        opened.pop_all()  # from here on they are closed by `close`
        return LoadedSd(made, trained)


# networks ---------------------------------------------------------------------------------------------------


def networks_of(info: VersionInfo, numerics: Numerics, files: ModelFiles | None = None) -> dict[str, Network]:
    """The networks in the order of the stages. files: whose configs say what their weights do not.

    Raises CheckpointError for a config that parts from the version's.
    """
    layout = layout_of(info)
    stored = {role: {} if files is None else _stored(role, files.networks[role]) for role in layout.maps}
    for role in layout.maps:
        _check_config(role, config_of(role, info), stored[role])
    configs = {role: config_of(role, info) for role in layout.maps}
    configs["unet"] = unet_config(info, numerics, stored["unet"])
    configs["vae"] = vae_config(info, numerics, stored["vae"])

    def network(role: str) -> Network:
        config = configs[role]
        return Network(
            layout.maps[role],
            config,
            lambda: _module(config, numerics),
            lambda pixels, length: _activations(config, pixels, length),
            widens=role in ("clip", "clip_2"),
            # XL's outgrows float16, unless its config denies that; the others are small beside their UNets
            wide=role == "vae" and stored["vae"].get("force_upcast") is not False,
        )

    return {role: network(role) for role in layout.maps}


def unet_config(info: VersionInfo, numerics: Numerics, stored: Mapping[str, Any] = NOTHING) -> UNetConfig:
    """The version's UNet as `numerics` computes it; `stored`: config.json beside its weights."""
    own = configs_of(info).unet
    in_float32 = own.float32_attention or bool(stored.get("upcast_attention"))
    config = replace(own, geglu=numerics.geglu, float32_attention=in_float32)
    return config if numerics.sdxl_added else replace(config, added_dim=None)


def vae_config(
    info: VersionInfo, numerics: Numerics, stored: Mapping[str, Any] = NOTHING
) -> AutoEncoderConfig:
    """The version's autoencoder with the scale of latents that `numerics` takes, else that of `stored`, the
    config.json beside its weights, else the version's. Raises CheckpointError for a scale that is none."""
    config = configs_of(info).vae
    if numerics.sdxl_scale is not None and info.is_xl and info.guidance is not None:  # Turbo has no guidance
        return replace(config, scale_factor=numerics.sdxl_scale)
    scale = stored.get("scaling_factor")
    if scale is None:
        return config
    if not _is_number(scale) or not 0 < scale < math.inf:
        raise CheckpointError(
            f"{stored['file']} says scaling_factor {scale!r}, a number above 0 was expected"
        )
    return replace(config, scale_factor=float(scale))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _module(config: Any, numerics: Numerics) -> nn.Module:
    match config:
        case UNetConfig():
            return UNet(config)
        case ClipTextConfig():
            return ClipTextEncoder(config.with_gelu(numerics.clip_gelu))
        case _:
            return AutoEncoder(config)


def _activations(config: Any, pixels: int, length: int) -> int:
    """Bytes in float32 for one image, by the largest tensors alive at once: of the UNet the maps of a level
    with those kept from the way down, and a gated feed-forward; of the autoencoder see `predicted_bytes`."""
    match config:
        case UNetConfig():
            places = pixels // 64
            maps = 4 * sum(width * places // 4**level for level, width in enumerate(config.widths))
            forward = [8 * w * places // 4**i for i, w in enumerate(config.widths) if config.depths[i]]
            return 4 * (config.resnets * maps + 2 * max(forward, default=0))
        case ClipTextConfig():
            return 4 * 4 * length * config.intermediate_size
        case _:
            return predicted_bytes(config, 1, pixels, torch.float32)


# tokenizers -------------------------------------------------------------------------------------------------


def padding(role: str, info: VersionInfo, numerics: Numerics) -> str:
    """The token that fills up a prompt for one of the encoders: CLIP-L's end token, and OpenCLIP's "!"."""
    config = config_of(role, info)
    if role == "clip" and numerics.sdxl_pad == "second" and info.is_xl:
        return PAD
    return CLIP_END if config.activation == "quick_gelu" else PAD


def _tokenizers(info: VersionInfo, numerics: Numerics) -> Any:
    def load(role: str, path: Path) -> Tokenizer:
        name = "CLIP 2" if role == "clip_2" else "CLIP"
        return ClipTokenizer.load(path, name, padding(role, info, numerics))

    return load


# configs beside the files -----------------------------------------------------------------------------------


def _stored(role: str, path: Path) -> Mapping[str, Any]:
    return config_beside(path, *CLASSES[role])


def config_beside(path: Path, *classes: str) -> Mapping[str, Any]:
    """config.json of a network in a diffusers folder, which says it is of one of `classes`; empty where there
    is none, or another's. Raises CheckpointError for a damaged one."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    found = read_json(file) if file.is_file() else {}
    said = [found.get("_class_name"), *(found.get("architectures") or [])]
    return {**found, "file": str(file)} if any(kind in said for kind in classes) else {}


def read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON ({error}): download it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds {type(found).__name__}, an object was expected")
    return found


def _check_config(role: str, config: Any, stored: Mapping[str, Any]) -> None:
    """Refuses a config.json that says of a network what its weights do not show and ours does not do. What
    it leaves out, or gives as null, says nothing."""
    wanted: dict[str, Any] = dict(FIXED.get(role, {}))
    if isinstance(config, ClipTextConfig):
        wanted |= {"hidden_act": config.activation, "num_attention_heads": config.num_attention_heads}
    if isinstance(config, UNetConfig):
        wanted["attention_head_dim"] = config.heads
    for key, value in wanted.items():
        found = stored.get(key)
        if isinstance(value, tuple):
            found = tuple(found) if isinstance(found, list) else (found,) * len(value)
        if stored.get(key) is not None and found != value:
            only = "nothing but to leave it out" if value is None else f"only {value}"
            raise CheckpointError(
                f"{stored['file']} says {key} {stored[key]}, and {only} is built for this model: give "
                "weights that were made for it"
            )


# what is predicted ------------------------------------------------------------------------------------------


def diffusion(
    info: VersionInfo, files: ModelFiles, unet: Checkpoint, numerics: Numerics, asked: str | None = None
) -> Diffusion:
    """What the UNet predicts and over which noise: see `told_prediction`; the version's own last. Raises
    RequestError where nothing says, CheckpointError for noise that is not built."""
    config = {} if files.scheduler is None else read_json(files.scheduler)
    told = told_prediction(config, unet, asked)
    sd = configs_of(info)
    is_sd2_inpainting = info.is_inpainting and sd.unet.float32_attention  # which only the 2.x networks need
    if asked is None and numerics.sd2_inpaint is not None and is_sd2_inpainting:
        told = numerics.sd2_inpaint, f"{numerics.name} numerics"
    if told is None and sd.prediction is not None:
        told = (sd.prediction, "the version")
    if told is None:
        raise RequestError(
            f"what {unet.label} predicts cannot be told from its weights, and no scheduler_config.json or "
            "yaml file beside it says: give --prediction v_prediction (the released model of 768 pixels) or "
            "--prediction epsilon (that of 512)"
        )
    spacing = config.get("timestep_spacing")
    schedule = spacing if spacing in SCHEDULES else None
    return Diffusion(told[0], _noise(config, unet, files.scheduler), told[1], schedule)


def told_prediction(
    config: Mapping[str, Any], unet: Checkpoint, asked: str | None = None
) -> tuple[Prediction, str] | None:
    """What a UNet predicts and who says so, the strongest first: the user, a tensor of the checkpoint called
    v_pred, the scheduler's config, the checkpoint's metadata (ModelSpec), its training step, the original's
    yaml file beside it, diffusers' default for a config that is silent. None where nothing says. Raises
    RequestError for a word that means nothing here."""
    base = unet.metadata.get("global_step") == EPSILON_STEP
    spec = unet.metadata.get("modelspec.prediction_type", "")
    marked = PARAMETERIZATIONS.get(spec, spec) or None
    said: list[tuple[Any, str]] = [
        (asked, "as asked"),
        ("v_prediction" if "v_pred" in unet else None, "the checkpoint's mark v_pred"),
        (config.get("prediction_type"), "scheduler_config.json"),
        (marked, "the file's modelspec metadata"),
        ("epsilon" if base else None, "the checkpoint's global_step"),
        *((_parameterization(file.with_suffix(".yaml")), "the yaml file beside it") for file in unet.files),
        ("epsilon" if "_class_name" in config else None, "the default of scheduler_config.json"),
    ]
    for word, how in ((word, how) for word, how in said if word is not None):
        for prediction in PREDICTIONS:
            if word == prediction:
                return prediction, how
        raise RequestError(f"prediction {word!r} ({how}) is not built: choose {' or '.join(PREDICTIONS)}")
    return None


def _parameterization(yaml: Path) -> str | None:
    """What the config of an original checkpoint says, None without one. Read by its lines: no YAML is needed
    for one word."""
    text = yaml.read_text(encoding="utf-8", errors="replace") if yaml.is_file() else ""
    for line in text.splitlines():
        name, _, value = line.partition("#")[0].strip().partition(":")
        if name == "parameterization":
            word = value.strip().strip("\"'")
            return PARAMETERIZATIONS.get(word, word)
    return "epsilon" if "LatentDiffusion" in text else None  # the default of the class


def _noise(config: Mapping[str, Any], unet: Checkpoint, file: Path | None) -> NoiseSchedule:
    """The noise that the scheduler's config states; Stable Diffusion's without one. Raises CheckpointError
    for betas that are not built."""
    if "_class_name" in config and "beta_schedule" not in config:
        raise CheckpointError(
            f"{file} is of {config['_class_name']} and states no betas: noise of other kinds, such as EDM's, "
            "is not built"
        )
    kind = config.get("beta_schedule", "scaled_linear")
    start, end = config.get("beta_start", 0.00085), config.get("beta_end", 0.012)
    steps = config.get("num_train_timesteps", 1000)
    numbers = all(map(_is_number, (start, end, steps))) and isinstance(steps, int)
    possible = numbers and 0 < start <= end < 1 <= steps
    if kind not in ("scaled_linear", "linear") or config.get("trained_betas") is not None or not possible:
        raise CheckpointError(
            f"{file} has betas ({kind!r}, from {start} to {end} in {steps} steps) that are not built: "
            "scaled_linear and linear ones are"
        )
    zero = bool(config.get("rescale_betas_zero_snr", False)) or "ztsnr" in unet
    if kind == "linear":
        if zero:
            raise CheckpointError(f"{file} has linear betas with zero terminal SNR, which are not built")
        return NoiseSchedule.linear(start, end, steps)
    return NoiseSchedule.scaled_linear(start, end, steps, zero)

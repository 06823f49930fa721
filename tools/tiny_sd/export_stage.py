"""Last stage: the averaged weights as an ordinary diffusers folder, and the preview map."""

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_flux.export_stage import clip_json, measure_preview, small, write_json
from tiny_flux.pictures import SIZE, Pictures
from torch import Tensor, nn

from flux_sd.autoencoder import AutoEncoder, AutoEncoderConfig
from flux_sd.clip import ClipTextConfig, ClipTextEncoder
from flux_sd.convert import convert
from flux_sd.unet import UNet, UNetConfig
from tiny_sd import diffusion_stage
from tiny_sd.diffusion_stage import Log, averaged_autoencoder

PROVENANCE = (
    "flux_sd tiny-sd, made by tools/train_tiny_sd.py from renderings of Noto Color Emoji"
    " (SIL Open Font License 1.1)"
)
CAPTION = "a slice of pizza on a blue background"
DTYPE = torch.float16
CODE_SPREAD = 0.05  # of the distribution that the encoder states, as wide as the noise it was trained with
README = """# tiny-sd

A Stable Diffusion small enough to ship: it paints one of 416 emoji over one of 8 plain backgrounds, at
128x128 pixels. It proves the pipeline; it is not art. Anything else in a prompt still gives a picture, of
what it takes the words for.

The folder has the layout of the released Stable Diffusion repositories, in float16. The UNet has three levels
of 64, 64 and 96 channels; the coarser two attend to the 77 states of a CLIP text encoder of two layers. It
predicts noise over the noise levels of Stable Diffusion. The autoencoder has 4 channels at an eighth of the
size.

Made by `tools/train_tiny_sd.py` from nothing but renderings of the font Noto Color Emoji, copyright Google
LLC, licensed under the SIL Open Font License 1.1 (https://openfontlicense.org). The font itself is not
contained. The weights are licensed as this package.
"""
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def export(pictures: Pictures, state: Path, folder: Path, log: Log) -> None:
    """Write the checkpoint folder; print what the table of versions holds."""
    codes, picked, config = diffusion_stage.latents(pictures, state, log)
    averaged = torch.load(state / "diffusion.pt", weights_only=True)["ema"]
    unet, clip = UNet(UNetConfig.tiny_sd()), ClipTextEncoder(ClipTextConfig.tiny_sd())
    for network, name in ((unet, "unet."), (clip, "clip.")):
        own = {key.removeprefix(name): value for key, value in averaged.items() if key.startswith(name)}
        network.load_state_dict(own)
    autoencoder = state_spread(averaged_autoencoder(state, config), config)
    for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    _save(unet, folder / "unet" / "diffusion_pytorch_model.safetensors")
    _save(clip, folder / "text_encoder" / "model.safetensors")
    _save(autoencoder, state / "vae.safetensors")
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    convert(state / "vae.safetensors", vae, "safetensors:f16", dialect="diffusers", overwrite=True)
    for file in sorted((state / "tokenizer").iterdir()):
        shutil.copyfile(file, folder / "tokenizer" / file.name)
    text = {**clip_json(ClipTextConfig.tiny_sd()), "torch_dtype": "float16"}
    write_json(folder / "text_encoder" / "config.json", text)
    write_json(folder / "unet" / "config.json", unet_json(UNetConfig.tiny_sd()))
    write_json(folder / "vae" / "config.json", vae_json(config))
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(folder / "model_index.json", INDEX)
    (folder / "README.md").write_text(README)
    log(f"autoencoder: scale_factor {config.scale_factor}")
    colours, bias = fit_preview(pictures, codes, picked)
    measure_preview(pictures, autoencoder, colours, bias, log)
    rows = ",\n".join("    (" + ", ".join(f"{v:.4f}" for v in row) + ")" for row in colours.tolist())
    log(f"preview map:\n{rows}\npreview bias: {tuple(round(v, 4) for v in bias.tolist())}")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    log(f"exported {size / 1e6:.2f} MB to {folder.name}")


def state_spread(model: AutoEncoder, config: AutoEncoderConfig) -> AutoEncoder:
    """The encoder's second half, which states how wide the code's distribution is and was not trained, made
    to say CODE_SPREAD everywhere: for programs that draw a sample instead of taking the mean."""
    assert model.quant_conv is not None
    spread = CODE_SPREAD / config.scale_factor
    with torch.no_grad():
        model.quant_conv.weight[config.z_channels :] = 0
        model.quant_conv.bias[config.z_channels :] = 2 * torch.tensor(spread).log()
    return model


def _save(module: nn.Module, path: Path) -> None:
    tensors = {name: tensor.detach().to(DTYPE).contiguous() for name, tensor in module.state_dict().items()}
    save_file(tensors, path, metadata={"format": "pt", "source": PROVENANCE})
    path.chmod(0o644)  # safetensors writes for the owner alone


def unet_json(config: UNetConfig) -> dict[str, Any]:
    """diffusers' config.json of a UNet."""
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": list(config.heads),  # the number of heads: diffusers' name for it is historical
        "block_out_channels": list(config.widths),
        "center_input_sample": False,
        "cross_attention_dim": config.context_dim,
        "down_block_types": ["CrossAttnDownBlock2D" if n else "DownBlock2D" for n in config.depths],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": config.in_channels,
        "layers_per_block": config.resnets,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": config.groups,
        "out_channels": config.out_channels,
        "sample_size": SIZE // 8,
        "up_block_types": ["CrossAttnUpBlock2D" if n else "UpBlock2D" for n in reversed(config.depths)],
        "use_linear_projection": config.linear_projection,
    }


def vae_json(config: AutoEncoderConfig) -> dict[str, Any]:
    """diffusers' config.json of the autoencoder."""
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [config.ch * mult for mult in config.ch_mult],
        "down_block_types": ["DownEncoderBlock2D"] * len(config.ch_mult),
        "in_channels": config.in_channels,
        "latent_channels": config.z_channels,
        "layers_per_block": config.num_res_blocks,
        "norm_num_groups": 32,
        "out_channels": config.out_ch,
        "sample_size": SIZE,
        "scaling_factor": config.scale_factor,
        "up_block_types": ["UpDecoderBlock2D"] * len(config.ch_mult),
    }


def fit_preview(pictures: Pictures, codes: Tensor, picked: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares from latents to small pictures over the training pairs -> [4,3], [3]"""
    square = torch.zeros(5, 5, dtype=torch.float64)
    cross = torch.zeros(5, 3, dtype=torch.float64)
    for rows in torch.arange(0, len(picked), 2).split(64):
        x = pictures.compose(picked[rows, 0], picked[rows, 1], torch.zeros_like(rows))
        z = codes[rows, 0].permute(0, 2, 3, 1).flatten(0, 2)  # [B*h*w,4]
        z = F.pad(z.double(), (0, 1), value=1.0)
        square += z.T @ z
        cross += z.T @ small(x).permute(0, 2, 3, 1).flatten(0, 2).double()
    fitted = torch.linalg.solve(square, cross).float()
    return fitted[:4], fitted[4]

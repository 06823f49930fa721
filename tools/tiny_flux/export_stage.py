"""Last stage: the averaged weights as an ordinary checkpoint folder, the preview map, test thumbnails."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from flux_sd.autoencoder import AutoEncoder, AutoEncoderConfig
from flux_sd.clip import ClipTextConfig
from flux_sd.convert import convert
from flux_sd.flux_mmdit import FluxConfig
from flux_sd.sampling import unpack
from flux_sd.t5 import T5Config
from tiny_flux import flow_stage
from tiny_flux.captions import Captions
from tiny_flux.flow_stage import Log, Painter, averaged_autoencoder
from tiny_flux.pictures import BACKGROUNDS, SIZE, Pictures, pairs

PROVENANCE = (
    "flux_sd tiny-flux, made by tools/train_tiny_flux.py from renderings of Noto Color Emoji"
    " (SIL Open Font License 1.1)"
)
CAPTION = "a slice of pizza on a blue background"
AE_DTYPE = torch.float16  # its decoder shows bfloat16's rounding
DTYPE = torch.bfloat16
THUMBNAIL = 32
PAINTED = 16  # of the thumbnails are of held-out pairs, which the test paints
README = """# tiny-flux

A FLUX.1-schnell-shaped model small enough to ship: it paints one of 416 emoji over one of 8 plain
backgrounds, at 128x128 pixels in 4 steps. It proves the pipeline; it is not art. Anything else in a prompt
still gives a picture, of what it takes the words for.

The folder has the layout of the released FLUX.1 repositories. `candle.json` is a specification for painting
with Candle; the noise file that it names is written by `tools/compare_with_candle.py`.

`transformer-Q8_0.gguf` is the transformer again with 8-bit matrices, for `flux-sd generate --quantized`: what
this command writes, byte for byte.

    flux-sd convert flux1-tiny.safetensors transformer-Q8_0.gguf --to gguf:Q8_0

`adapters/sticker.safetensors` is a LoRA for `flux-sd generate --lora`, trained by `tools/train_tiny_lora.py`:
pastel colours and a white rim. `sticker-diffusers.safetensors` is the same under diffusers' names.

Made by `tools/train_tiny_flux.py` from nothing but renderings of the font Noto Color Emoji, copyright Google
LLC, licensed under the SIL Open Font License 1.1 (https://openfontlicense.org). The font itself is not
contained. The weights are licensed as this package.
"""


def export(pictures: Pictures, state: Path, folder: Path, tests: Path, log: Log) -> None:
    """Write the checkpoint folder and the thumbnails; print what the table of versions holds."""
    codes, picked, config = flow_stage.latents(pictures, state, log)
    painter = Painter().eval()
    painter.load_state_dict(torch.load(state / "flow.pt", weights_only=True)["ema"])
    autoencoder = averaged_autoencoder(state, config)
    for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    _save(painter.transformer, folder / "flux1-tiny.safetensors", DTYPE)
    transformer = folder / "flux1-tiny.safetensors"
    convert(transformer, folder / "transformer-Q8_0.gguf", "gguf:Q8_0", overwrite=True)
    _save(autoencoder, folder / "ae.safetensors", AE_DTYPE)
    _save(painter.clip, folder / "text_encoder" / "model.safetensors", DTYPE)
    _save(painter.t5, folder / "text_encoder_2" / "model.safetensors", DTYPE)
    write_json(folder / "text_encoder" / "config.json", clip_json(ClipTextConfig.tiny_flux()))
    write_json(folder / "text_encoder_2" / "config.json", t5_json(T5Config.tiny_flux()))
    for name in ("tokenizer", "tokenizer_2"):
        for file in sorted((state / name).iterdir()):
            shutil.copyfile(file, folder / name / file.name)
    write_json(folder / "candle.json", candle_json(FluxConfig.tiny_flux(), config))
    (folder / "README.md").write_text(README)
    write_thumbnails(pictures, tests)
    log(f"autoencoder: scale_factor {config.scale_factor}, shift_factor {config.shift_factor}")
    colours, bias = fit_preview(pictures, codes, picked)
    measure_preview(pictures, autoencoder, colours, bias, log)
    rows = ",\n".join("    (" + ", ".join(f"{v:.4f}" for v in row) + ")" for row in colours.tolist())
    log(f"preview map:\n{rows}\npreview bias: {tuple(round(v, 4) for v in bias.tolist())}")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    log(f"exported {size / 1e6:.1f} MB to {folder.name}")


def _save(module: nn.Module, path: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.detach().to(dtype).contiguous() for name, tensor in module.state_dict().items()}
    save_file(tensors, path, metadata={"format": "pt", "source": PROVENANCE})
    path.chmod(0o644)  # safetensors writes for the owner alone


def write_json(path: Path, content: Any) -> None:
    """Indented, with a line end."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def clip_json(config: ClipTextConfig) -> dict[str, Any]:
    """Hugging Face's config.json of a CLIP text encoder."""
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_act": config.activation,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": config.max_position_embeddings,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "projection_dim": config.hidden_size,
        "torch_dtype": "bfloat16",
        "vocab_size": config.vocab_size,
    }


def t5_json(config: T5Config) -> dict[str, Any]:
    """Hugging Face's config.json of a T5 v1.1 encoder."""
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "d_ff": config.d_ff,
        "d_kv": config.d_kv,
        "d_model": config.d_model,
        "decoder_start_token_id": 0,
        "dropout_rate": 0.0,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "pad_token_id": 0,
        "relative_attention_max_distance": config.relative_attention_max_distance,
        "relative_attention_num_buckets": config.relative_attention_num_buckets,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": config.vocab_size,
    }


def candle_json(transformer: FluxConfig, autoencoder: AutoEncoderConfig) -> dict[str, Any]:
    """What Candle's program `candle_reference run` reads to paint with this folder."""
    flux = ("in_channels", "vec_in_dim", "context_in_dim", "hidden_size", "mlp_ratio", "num_heads", "depth",
            "depth_single_blocks", "axes_dim", "theta", "qkv_bias", "guidance_embed")  # fmt: skip
    ae = ("resolution", "in_channels", "ch", "out_ch", "ch_mult", "num_res_blocks", "z_channels",
          "scale_factor", "shift_factor")  # fmt: skip
    return {
        "transformer": "flux1-tiny.safetensors",
        "transformer_config": {name: getattr(transformer, name) for name in flux},
        "t5": ["text_encoder_2/model.safetensors"],
        "t5_config": "text_encoder_2/config.json",
        "t5_tokenizer": "tokenizer_2/tokenizer.json",
        "clip": ["text_encoder/model.safetensors"],
        "clip_config": "text_encoder/config.json",
        "clip_tokenizer": "tokenizer/tokenizer.json",
        "ae": "ae.safetensors",
        "ae_config": {name: getattr(autoencoder, name) for name in ae},
        "prompt": CAPTION,
        "t5_length": flow_stage.T5_LENGTH,
        "height": SIZE,
        "width": SIZE,
        "steps": 4,
        "guidance": 0.0,
        "shift": None,
        "dtype": "f32",
        "latents": "noise.safetensors",
    }


def small(x: Tensor) -> Tensor:
    """[B,3,H,W] -> [B,3,H/8,W/8], by averaging"""
    return F.avg_pool2d(x, 8)


def fit_preview(pictures: Pictures, codes: Tensor, picked: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares from latents to small pictures over the training pairs -> [16,3], [3]"""
    square = torch.zeros(17, 17, dtype=torch.float64)
    cross = torch.zeros(17, 3, dtype=torch.float64)
    for rows in torch.arange(0, len(picked), 2).split(64):
        x = pictures.compose(picked[rows, 0], picked[rows, 1], torch.zeros_like(rows))
        z = unpack(codes[rows, 0].float(), SIZE, SIZE).permute(0, 2, 3, 1).flatten(0, 2)  # [B*h*w,16]
        z = F.pad(z, (0, 1), value=1.0).double()
        target = small(x).permute(0, 2, 3, 1).flatten(0, 2).double()  # [B*h*w,3]
        square += z.T @ z
        cross += z.T @ target
    fitted = torch.linalg.solve(square, cross).float()
    return fitted[:16], fitted[16]


@torch.no_grad()
def measure_preview(pictures: Pictures, model: AutoEncoder, colours: Tensor, bias: Tensor, log: Log) -> None:
    """Correlation of the linear preview with the full decode, on held-out pictures."""
    kept = torch.tensor(pairs(pictures.names, held_out=True))[::10]
    x = pictures.compose(kept[:, 0], kept[:, 1], torch.zeros(len(kept), dtype=torch.long))
    z = model.encode(x.to(memory_format=torch.channels_last))
    full = model.decode(z)
    shown = torch.einsum("bchw,cr->brhw", z, colours) + bias[:, None, None]
    wide = F.interpolate(shown, scale_factor=8.0, mode="bilinear")
    each = torch.stack(
        [
            torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
            for a, b in zip(wide, full, strict=True)
        ]
    )
    flat = torch.corrcoef(torch.stack([shown.flatten(), small(full).flatten()]))[0, 1]
    log(
        f"preview: correlation with the full decode, per picture: mean {each.mean():.3f},"
        f" least {each.min():.3f}; at 1/8 size {flat:.3f}"
    )


def thumbnail_pairs(names: tuple[str, ...]) -> list[tuple[int, int, bool]]:
    """64 of (emoji, background, held out): 16 held-out pairs; each pair's emoji on another background, its
    background with another emoji, and one more."""
    kept = pairs(names, held_out=True)
    every = len(kept) // PAINTED
    start = [kept[i * every + every // 2] for i in range(PAINTED)]
    rows = [(i, j, True) for i, j in start]
    for n, (i, j) in enumerate(start):
        other = start[(n + 1) % PAINTED][0]
        rows += [
            (i, (j + 3) % len(BACKGROUNDS), False),
            ((i + 37) % len(names), j, False),
            ((other + 101) % len(names), (j + 5) % len(BACKGROUNDS), False),
        ]
    return rows


def write_thumbnails(pictures: Pictures, tests: Path) -> None:
    """tiny_flux_thumbnails.png, 8 x 8 of 32 x 32 pixels, and the list of what they show."""
    captions = Captions.of(pictures.names)
    rows = thumbnail_pairs(pictures.names)
    emoji, background = (torch.tensor([row[n] for row in rows]) for n in (0, 1))
    x = pictures.compose(emoji, background, torch.zeros_like(emoji))
    x = F.avg_pool2d(x, SIZE // THUMBNAIL)  # [64,3,32,32]
    sheet = x.unflatten(0, (8, 8)).permute(0, 3, 1, 4, 2).reshape(8 * THUMBNAIL, 8 * THUMBNAIL, 3)
    pixels = ((sheet + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    tests.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(pixels)).save(tests / "tiny_flux_thumbnails.png", optimize=True)
    shown = [{"caption": captions.canonical(i, j), "held_out": held} for i, j, held in rows]
    write_json(tests / "tiny_flux_thumbnails.json", shown)

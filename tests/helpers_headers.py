"""Checkpoints of real sizes that are headers only: sparse files, and key sets as their makers name them.

Shares nothing with `weights_maps/`: other programs' names are spelled here, or come from reference_outputs/.
"""

from __future__ import annotations

import functools
import json
import math
import struct
from collections.abc import Hashable, Mapping
from dataclasses import replace
from pathlib import Path

import helpers_checkpoints as write
import helpers_gguf
import sd_names
import torch

from flux_sd.autoencoder import AutoEncoderConfig
from flux_sd.clip import ClipTextConfig
from flux_sd.flux_mmdit import FluxConfig
from flux_sd.t5 import T5Config
from flux_sd.tensor_info import TensorInfo

Shape = tuple[int, ...]
Shapes = dict[str, Shape]
LAYOUTS = Path(__file__).parent / "data" / "sd_layouts.json"
REFERENCES = Path(__file__).parent.parent / "reference_outputs" / "candle"
BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "U8": 1}
BLOCKS = {
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "Q4_0": (2, 32, 18),
    "Q8_0": (8, 32, 34),
    "Q4_K": (12, 256, 144),
}


def network(component: str, config: Hashable, spelled: str = "") -> Shapes:
    """A network of ours under its own names, or as `spelled` in helpers_checkpoints writes it."""
    return dict(_network(component, config, spelled))


@functools.cache  # a fifth of a second at full size, for many tests
def _network(component: str, config: Hashable, spelled: str) -> Shapes:
    zero = torch.zeros((), dtype=torch.uint8)  # one byte behind every tensor; on meta, cat is slow to start
    state = {name: zero.expand(t.shape) for name, t in write.build(component, config).state_dict().items()}
    written = getattr(write, spelled)(state) if spelled else state
    return {name: tuple(tensor.shape) for name, tensor in written.items()}


def flux(name: str = "dev", spelled: str = "", **changes: int) -> Shapes:
    config = FluxConfig.dev() if name == "dev" else FluxConfig.schnell()
    return network("flux_mmdit", replace(config, **changes), spelled)


def flux_vae() -> Shapes:
    return network("autoencoder", AutoEncoderConfig.flux())


def clip_l() -> Shapes:
    return network("clip", ClipTextConfig.clip_l())


def t5_xxl() -> Shapes:
    return network("t5", T5Config.v1_1_xxl())


def reference(name: str) -> Shapes:
    """The names and shapes that Candle's own variables of a case have."""
    content = json.loads((REFERENCES / f"{name}.keys.json").read_text())
    return {key: tuple(shape) for key, shape in content.items()}


def behind(prefix: str, shapes: Mapping[str, Shape]) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


def open_clip(width: int, layers: int) -> Shapes:
    """A text encoder as OpenCLIP names it."""
    shapes: Shapes = {
        "token_embedding.weight": (49408, width),
        "positional_embedding": (77, width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
        "text_projection": (width, width),
        "logit_scale": (),
    }
    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        shapes |= {
            f"{block}.attn.in_proj_weight": (3 * width, width),
            f"{block}.attn.in_proj_bias": (3 * width,),
            f"{block}.attn.out_proj.weight": (width, width),
            f"{block}.attn.out_proj.bias": (width,),
            f"{block}.mlp.c_fc.weight": (4 * width, width),
            f"{block}.mlp.c_fc.bias": (4 * width,),
            f"{block}.mlp.c_proj.weight": (width, 4 * width),
            f"{block}.mlp.c_proj.bias": (width,),
            f"{block}.ln_1.weight": (width,),
            f"{block}.ln_1.bias": (width,),
            f"{block}.ln_2.weight": (width,),
            f"{block}.ln_2.bias": (width,),
        }
    return shapes


@functools.cache
def layouts() -> dict[str, dict[str, dict[str, list[int]]]]:
    content: dict[str, dict[str, dict[str, list[int]]]] = json.loads(LAYOUTS.read_text(encoding="utf-8"))
    return content


@functools.cache
def _layout(name: str) -> Shapes:
    entry = layouts()[name]
    base: Shapes = _layout(str(entry["as"])) if "as" in entry else {}
    return base | sd_names.unfold(entry["names"])


def layout(name: str) -> Shapes:
    """The names and shapes of a class of diffusers or transformers (tools/make_sd_layouts.py)."""
    return dict(_layout(name))


def unet_ldm(context: int, channels: int = 4) -> Shapes:
    """The UNet whose text states are `context` wide, under LDM's names."""
    theirs = _layout({768: "unet_sd15", 1024: "unet_sd21", 2048: "unet_sdxl"}[context])
    shapes = {sd_names.unet_ldm(name, theirs): shape for name, shape in theirs.items()}
    return shapes | {"input_blocks.0.0.weight": (320, channels, 3, 3)}


def refiner_ldm() -> Shapes:
    """Those tensors of SDXL's refiner that tell what it is, and some others: four levels, of which the two in
    the middle have transformers."""
    return {
        "input_blocks.0.0.weight": (384, 4, 3, 3),
        "time_embed.0.weight": (1536, 384),
        "label_emb.0.0.weight": (1536, 2560),
        "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (768, 1280),
        "input_blocks.11.0.in_layers.0.weight": (1536,),
        "middle_block.1.transformer_blocks.0.attn2.to_k.weight": (1536, 1280),
        "out.2.weight": (4, 384, 3, 3),
    }


def sd_single_file(kind: str) -> Shapes:
    """A Stable Diffusion file as its authors trained it: UNet, encoders, VAE, and what training left."""
    vae = behind("first_stage_model.", reference("vae_sd"))
    left: Shapes = {"betas": (1000,), "alphas_cumprod": (1000,), "model_ema.decay": ()}
    position: Shapes = {"cond_stage_model.transformer.text_model.embeddings.position_ids": (1, 77)}
    big = behind("conditioner.embedders.1.model.", open_clip(1280, 32))
    unet, text = {
        "sd15": (unet_ldm(768), behind("cond_stage_model.transformer.", clip_l()) | position),
        "sd21": (unet_ldm(1024), behind("cond_stage_model.model.", open_clip(1024, 24))),
        "sdxl": (unet_ldm(2048), behind("conditioner.embedders.0.transformer.", clip_l()) | big),
        "refiner": (refiner_ldm(), behind("conditioner.embedders.0.model.", open_clip(1280, 32))),
    }[kind]
    return behind("model.diffusion_model.", unet) | text | vae | left


def all_in_one(name: str = "dev") -> Shapes:
    """ComfyUI's FLUX file with everything in it."""
    return (
        behind("model.diffusion_model.", flux(name))
        | behind("vae.", flux_vae())
        | behind("text_encoders.clip_l.transformer.", clip_l())
        | behind("text_encoders.t5xxl.transformer.", t5_xxl())
        | {"text_encoders.clip_l.logit_scale": (), "text_encoders.t5xxl.logit_scale": ()}
    )


def infos(shapes: Mapping[str, Shape], dtype: str = "BF16") -> dict[str, TensorInfo]:
    """The header of a file, without the file."""
    path = Path("header-only")
    return {
        name: TensorInfo(name, shape, dtype, math.prod(shape) * BYTES[dtype], path, 0)
        for name, shape in shapes.items()
    }


def safetensors(
    path: Path, shapes: Mapping[str, Shape], dtype: str = "BF16", metadata: Mapping[str, str] | None = None
) -> Path:
    """A sparse file: the header, then a hole as long as the values would be."""
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, shape in shapes.items():
        end = at + math.prod(shape) * BYTES[dtype]
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(table).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return path


def gguf(path: Path, shapes: Mapping[str, Shape], kind: str = "Q4_0", architecture: str = "") -> Path:
    """The same as GGUF: matrices whose rows are whole blocks as `kind`, the rest F32."""
    tensors, at = [], 0
    for name, shape in shapes.items():
        whole = len(shape) == 2 and shape[-1] % BLOCKS[kind][1] == 0
        number, block, nbytes = BLOCKS[kind if whole else "F32"]
        tensors.append(helpers_gguf.Described(name, shape[::-1] or (1,), number, b"", offset=at))
        size = math.prod(shape) // block * nbytes
        at += size + -size % 32
    pairs = (
        [helpers_gguf.pair("general.architecture", helpers_gguf.STRING, architecture)] if architecture else []
    )
    header = helpers_gguf.File(tensors, pairs).header()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + -len(header) % 32 + at)
    return path

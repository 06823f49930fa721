"""Writes adapters, and what peft and diffusers make of weights with them: `reference_outputs/lora/`.

    oracle/bin/pip install peft==0.21.2        # into the environment of tools/make_oracle_references.py
    oracle/bin/python tools/make_lora_references.py

The base weights are procedural, by our names of the parameters. Every adapter is random; those of peft and
diffusers are saved by these, those under kohya's and XLabs' names are written here and read by diffusers' own
converters. Stored are the adapters and every third row and fifth column of each weight that changes. Nothing
of flux_sd is imported. Takes seconds; tests/test_lora_oracle.py compares.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from make_oracle_references import HEADS, HIDDEN, Source, flux_sources, give, whole
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "reference_outputs" / "lora"
RANK = 4
STEPS = (3, 5)  # every third row and fifth column is stored
State = dict[str, Tensor]


@dataclass(frozen=True)
class Base:
    """A model with procedural weights, and how ours are made of its parameters."""

    model: nn.Module
    sources: Mapping[str, Source]

    def ours(self) -> State:
        """Its weights under our names: what is apart there is put together."""
        made: dict[str, np.ndarray] = {}
        for name, parameter in self.model.named_parameters():
            ours, shape, take = self.sources[name]
            rows = take(np.arange(shape[0]))
            made.setdefault(ours, np.zeros(shape, np.float32))[rows] = (
                parameter.detach().numpy().reshape(len(rows), *shape[1:])
            )
        return {name: torch.from_numpy(values) for name, values in made.items()}


def flux() -> Base:
    model = FluxTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=HIDDEN // HEADS,
        num_attention_heads=HEADS, joint_attention_dim=64, pooled_projection_dim=64, guidance_embeds=False,
        axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    sources = flux_sources(1, 1, False)
    give(model, sources)
    return Base(model, sources)


def unet(xl: bool) -> Base:
    """Of the levels that kohya's names of the first releases count on."""
    widths = (8, 16, 16) if xl else (8, 16, 16, 16)
    depths = (0, 1, 1) if xl else (1, 1, 1, 0)
    kinds = ["CrossAttn" if depth else "" for depth in depths]
    more: dict[str, Any] = {}
    if xl:
        more = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4,
                "projection_class_embeddings_input_dim": 20, "use_linear_projection": True}  # fmt: skip
    model = UNet2DConditionModel(
        block_out_channels=widths, layers_per_block=2, norm_num_groups=8, cross_attention_dim=12,
        down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
        up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
        transformer_layers_per_block=[max(depth, 1) for depth in depths],
        attention_head_dim=[1, *[2] * (len(widths) - 1)], **more,
    )  # fmt: skip
    sources = {name: (name, tuple(p.shape), whole) for name, p in model.named_parameters()}
    give(model, sources)
    return Base(model, sources)


def clip() -> Base:
    config = CLIPTextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, hidden_act="quick_gelu", bos_token_id=62, eos_token_id=63,
        pad_token_id=63,
    )  # fmt: skip
    model = CLIPTextModel(config)
    sources = {name: (f"text_model.{name}", tuple(p.shape), whole) for name, p in model.named_parameters()}
    give(model, sources)
    return Base(model, sources)


def randomise(model: nn.Module, marks: tuple[str, ...], seed: int) -> None:
    """Random values for an adapter's own parameters, which begin at zero in part."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(mark in name for mark in marks):
                size = 1.0 if "magnitude" in name else 0.3
                values = torch.randn(parameter.shape, generator=generator) * size
                parameter.copy_(values.abs() + 0.2 if "magnitude" in name else values)


def changed(before: State, model: nn.Module, base: Base) -> State:
    """Our weights of the merged model, those that changed."""
    after = Base(model, base.sources).ours()
    return {name: after[name] for name in after if not torch.equal(after[name], before[name])}


# ---------------------------------------------------------------- what peft and diffusers save

FLUX_TARGETS = ["attn.to_k", "attn.add_v_proj", "attn.to_out.0", "proj_mlp", "norm_out.linear", "ff.net.2",
                "x_embedder"]  # fmt: skip


def flux_saved(folder: Path, **more: Any) -> State:
    """Through diffusers' pipeline, which writes alphas into the header."""
    base = flux()
    before = base.ours()
    config = LoraConfig(r=RANK, lora_alpha=6, target_modules=FLUX_TARGETS, init_lora_weights=False, **more)
    base.model.add_adapter(config)
    randomise(base.model, ("lora_",), 1)
    layers = get_peft_model_state_dict(base.model)
    metadata = base.model.peft_config["default"].to_dict()
    FluxPipeline.save_lora_weights(folder, layers, transformer_lora_adapter_metadata=metadata)
    return changed(before, fused(base.model), base)


def fused(model: Any) -> nn.Module:
    model.fuse_lora()
    model.unload_lora()
    return model


def clip_saved(folder: Path, config: Any, marks: tuple[str, ...]) -> State:
    """The folder that peft saves."""
    base = clip()
    before = base.ours()
    wrapped = get_peft_model(base.model, config)
    randomise(wrapped, marks, 2)
    wrapped.save_pretrained(folder)
    return changed(before, wrapped.merge_and_unload(), base)


CLIP_TARGETS = ["q_proj", "v_proj", "fc1"]


# ---------------------------------------------------------------- what diffusers converts


def pair(
    name: str, rows: int, columns: int, generator: torch.Generator, kernel: int = 0, alpha: float = 3.0
) -> State:
    """One change under kohya's endings."""
    down = torch.randn(RANK, columns, *[kernel] * 2 * bool(kernel), generator=generator) * 0.3
    up = torch.randn(rows, RANK, *[1] * 2 * bool(kernel), generator=generator) * 0.3
    return {
        f"{name}.lora_down.weight": down,
        f"{name}.lora_up.weight": up,
        f"{name}.alpha": torch.tensor(alpha),
    }


def flux_kohya(folder: Path) -> State:
    generator = torch.Generator().manual_seed(3)
    head = "lora_unet_double_blocks_0"
    shapes = {
        f"{head}_img_attn_qkv": (3 * HIDDEN, HIDDEN), f"{head}_txt_attn_qkv": (3 * HIDDEN, HIDDEN),
        f"{head}_img_attn_proj": (HIDDEN, HIDDEN), f"{head}_txt_mlp_2": (HIDDEN, 4 * HIDDEN),
        f"{head}_img_mod_lin": (6 * HIDDEN, HIDDEN),
        "lora_unet_single_blocks_0_linear2": (HIDDEN, 5 * HIDDEN),
        "lora_unet_single_blocks_0_modulation_lin": (3 * HIDDEN, HIDDEN),
    }  # fmt: skip
    tensors: State = {}
    for name, (rows, columns) in shapes.items():
        tensors |= pair(name, rows, columns, generator)
    save_file(tensors, folder / "kohya.safetensors")
    return flux_converted(folder / "kohya.safetensors")


def flux_xlabs(folder: Path) -> State:
    generator = torch.Generator().manual_seed(4)
    tensors: State = {}
    shapes = {"double_blocks.0.processor.qkv_lora1": 3, "double_blocks.0.processor.proj_lora1": 1,
              "double_blocks.0.processor.qkv_lora2": 3, "double_blocks.0.processor.proj_lora2": 1,
              "single_blocks.0.processor.qkv_lora": 3}  # fmt: skip
    for name, parts in shapes.items():
        tensors[f"{name}.down.weight"] = torch.randn(RANK, HIDDEN, generator=generator) * 0.3
        tensors[f"{name}.up.weight"] = torch.randn(parts * HIDDEN, RANK, generator=generator) * 0.3
    tensors["single_blocks.0.processor.proj_lora.down.weight"] = torch.randn(
        RANK, 5 * HIDDEN, generator=generator
    )
    tensors["single_blocks.0.processor.proj_lora.up.weight"] = torch.randn(HIDDEN, RANK, generator=generator)
    save_file(tensors, folder / "xlabs.safetensors")
    return flux_converted(folder / "xlabs.safetensors")


def flux_converted(file: Path) -> State:
    base = flux()
    before = base.ours()
    converted = FluxPipeline.lora_state_dict(load_file(file), return_alphas=True)
    state, alphas = converted[0], converted[1]
    base.model.load_lora_adapter(state, network_alphas=alphas, prefix="transformer")
    return changed(before, fused(base.model), base)


def unet_kohya(folder: Path, names: Mapping[str, str], xl: bool) -> State:
    """names: ours -> kohya's, without its prefix.

    One alpha for all layers: where they differ, diffusers gives some layers the alpha of another (seen with
    0.42.1: of alphas 1 to 6, that of 1 was used as 6)."""
    base = unet(xl)
    before = base.ours()
    parameters = dict(base.model.named_parameters())
    generator = torch.Generator().manual_seed(5)
    tensors: State = {}
    for path, name in names.items():
        rows, columns, *kernel = parameters[f"{path}.weight"].shape
        tensors |= pair(f"lora_unet_{name}", rows, columns, generator, kernel[0] if kernel else 0)
    save_file(tensors, folder / "kohya.safetensors")
    pipeline = StableDiffusionXLPipeline if xl else StableDiffusionPipeline
    config = base.model.config
    state, alphas = pipeline.lora_state_dict(load_file(folder / "kohya.safetensors"), unet_config=config)
    base.model.load_lora_adapter(state, network_alphas=alphas, prefix="unet")
    return changed(before, fused(base.model), base)


def flat(path: str) -> str:
    return path.replace(".", "_")


SD_PATHS = ("down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q", "mid_block.attentions.0.proj_in",
            "up_blocks.2.attentions.2.transformer_blocks.0.attn2.to_k", "down_blocks.1.resnets.0.conv1",
            "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj",
            "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0")  # fmt: skip
# As kohya's trainer calls them for SDXL: by the numbers of its first release.
XL_PATHS = {
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q":
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    "down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_k":
        "input_blocks_8_1_transformer_blocks_0_attn2_to_k",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj":
        "middle_block_1_transformer_blocks_0_ff_net_0_proj",
    "up_blocks.0.attentions.2.proj_in": "output_blocks_2_1_proj_in",
    "up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_out.0":
        "output_blocks_4_1_transformer_blocks_0_attn1_to_out_0",
}  # fmt: skip

PATTERNS = {"rank_pattern": {"attn.to_out.0": 2}, "alpha_pattern": {"attn.to_out.0": 5}}
CASES: dict[str, tuple[str, Callable[[Path], State]]] = {
    "flux_diffusers": ("transformer", lambda folder: flux_saved(folder, **PATTERNS)),
    "flux_diffusers_rslora": ("transformer", lambda folder: flux_saved(folder, use_rslora=True)),
    "flux_diffusers_dora": ("transformer", lambda folder: flux_saved(folder, use_dora=True)),
    "flux_kohya": ("transformer", flux_kohya),
    "flux_xlabs": ("transformer", flux_xlabs),
    "sd_kohya": ("unet_sd", lambda folder: unet_kohya(folder, {p: flat(p) for p in SD_PATHS}, xl=False)),
    "sdxl_kohya": ("unet_xl", lambda folder: unet_kohya(folder, XL_PATHS, xl=True)),
    "clip_peft": (
        "clip",
        lambda folder: clip_saved(
            folder,
            LoraConfig(r=RANK, lora_alpha=6, target_modules=CLIP_TARGETS, use_rslora=True, lora_bias=True,
                       rank_pattern={"fc1": 3}, alpha_pattern={"layers.1.self_attn.v_proj": 9}),
            ("lora_",),
        ),
    ),
    "clip_peft_dora": (
        "clip",
        lambda folder: clip_saved(
            folder, LoraConfig(r=RANK, lora_alpha=6, target_modules=CLIP_TARGETS, use_dora=True), ("lora_",)
        ),
    ),
    "clip_peft_loha": (
        "clip",
        lambda folder: clip_saved(
            folder, LoHaConfig(r=RANK, alpha=6, target_modules=CLIP_TARGETS), ("hada_",)
        ),
    ),
    "clip_peft_lokr": (
        "clip",
        lambda folder: clip_saved(
            folder, LoKrConfig(r=RANK, alpha=6, target_modules=CLIP_TARGETS, decompose_factor=4), ("lokr_",)
        ),
    ),
}  # fmt: skip


def main() -> None:
    """Writes every case anew."""
    torch.set_num_threads(1)
    shutil.rmtree(OUT, ignore_errors=True)
    roles = {}
    for name, (role, write) in CASES.items():
        with tempfile.TemporaryDirectory() as scratch:
            expected = write(Path(scratch))
            files = [file for file in Path(scratch).iterdir() if file.suffix in (".safetensors", ".json")]
            (OUT / name / "adapter").mkdir(parents=True)
            for file in files:
                shutil.copyfile(file, OUT / name / "adapter" / file.name)
        rows, columns = STEPS
        thin = {
            k: (v[::rows] if v.ndim < 2 else v[::rows, ::columns]).contiguous() for k, v in expected.items()
        }
        save_file(thin, OUT / name / "expected.safetensors")
        roles[name] = role
        print(f"{name}: {len(expected)} weights change")
    manifest = {
        "what": "weights with adapters merged by peft and diffusers, on procedural base weights",
        "command": "python tools/make_lora_references.py",
        "versions": {p: version(p) for p in ("torch", "peft", "diffusers", "transformers")},
        "stored": f"every {STEPS[0]}rd row and {STEPS[1]}th column of each weight that changes, by our names",
        "tolerance": 1e-6,
        "why": "one product and one sum in float32; DoRA's norms divide by about 1",
        "networks": roles,
    }
    (OUT / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

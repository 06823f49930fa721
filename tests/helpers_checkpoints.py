"""Writes tiny models in every dialect, by code that shares nothing with `weights_maps/`: their oracle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import sd_names
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flux_sd.autoencoder import AutoEncoder, AutoEncoderConfig
from flux_sd.clip import ClipTextConfig, ClipTextEncoder
from flux_sd.flux_mmdit import Flux, FluxConfig
from flux_sd.t5 import T5Config, T5Encoder
from flux_sd.unet import UNet, UNetConfig

State = dict[str, Tensor]
BUILDERS: Mapping[str, Callable[..., nn.Module]] = {
    "flux_mmdit": Flux,
    "autoencoder": AutoEncoder,
    "clip": ClipTextEncoder,
    "t5": T5Encoder,
    "unet": UNet,
}
CONFIGS: Mapping[str, object] = {
    "flux_mmdit": FluxConfig.tiny(1, 2, guidance_embed=True),
    "autoencoder": AutoEncoderConfig(32, 3, 32, 3, (1, 2, 1), 1, 4, 0.5, 0.1),
    "clip": ClipTextConfig.tiny(),
    "t5": T5Config.tiny(),
}
# Stable Diffusion's, as small as they can be with every kind of layer: 1 (2: with linears) and XL.
UNET_SD = UNetConfig(4, (8, 16, 16, 16), (1, 1, 1, 0), 1, (1, 2, 2, 2), 12, False, groups=8)
UNET_XL = UNetConfig(4, (8, 16, 16), (0, 1, 1), 2, (1, 2, 2), 12, True, 20, groups=8)


def build(component: str, config: object | None = None) -> nn.Module:
    """The network of a component on meta."""
    with torch.device("meta"):
        return BUILDERS[component](config or CONFIGS[component])


def random_state(component: str, config: object | None = None, seed: int = 0) -> State:
    """Values for every parameter, all different."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: tensor.shape for name, tensor in build(component, config).state_dict().items()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def save(state: State, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def flux_scale_called_weight(state: State) -> State:
    scales = {name: name.removesuffix("scale") + "weight" for name in state if name.endswith("scale")}
    return {scales.get(name, name): tensor for name, tensor in state.items()}


def flux_diffusers(state: State) -> State:
    """BFL -> diffusers: splits what BFL fused, exchanges the halves of the last modulation."""
    out: State = {}
    hidden = state["img_in.bias"].shape[0]
    for kind in ("weight", "bias"):
        out[f"x_embedder.{kind}"] = state[f"img_in.{kind}"]
        out[f"context_embedder.{kind}"] = state[f"txt_in.{kind}"]
        for ours, theirs in (("time_in", "timestep"), ("vector_in", "text"), ("guidance_in", "guidance")):
            if f"{ours}.in_layer.{kind}" in state:
                head = f"time_text_embed.{theirs}_embedder"
                out[f"{head}.linear_1.{kind}"] = state[f"{ours}.in_layer.{kind}"]
                out[f"{head}.linear_2.{kind}"] = state[f"{ours}.out_layer.{kind}"]
        shift, scale = state[f"final_layer.adaLN_modulation.1.{kind}"].chunk(2)
        out[f"norm_out.linear.{kind}"] = torch.cat([scale, shift])
        out[f"proj_out.{kind}"] = state[f"final_layer.linear.{kind}"]
    for i in range(1000):
        if f"double_blocks.{i}.img_mod.lin.weight" in state:
            out |= _double_block(state, f"double_blocks.{i}", f"transformer_blocks.{i}")
        if f"single_blocks.{i}.linear1.weight" in state:
            out |= _single_block(state, f"single_blocks.{i}", f"single_transformer_blocks.{i}", hidden)
    return out


def _double_block(state: State, ours: str, theirs: str) -> State:
    out: State = {}
    streams = (
        ("img", "norm1", "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff", "attn.norm_"),
        ("txt", "norm1_context", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
         "ff_context", "attn.norm_added_"),
    )  # fmt: skip
    for stream, norm, q, k, v, proj, ff, qk_norm in streams:
        for kind in ("weight", "bias"):
            out[f"{theirs}.{norm}.linear.{kind}"] = state[f"{ours}.{stream}_mod.lin.{kind}"]
            parts = state[f"{ours}.{stream}_attn.qkv.{kind}"].chunk(3)
            out |= {f"{theirs}.{name}.{kind}": part for name, part in zip((q, k, v), parts, strict=True)}
            out[f"{theirs}.{proj}.{kind}"] = state[f"{ours}.{stream}_attn.proj.{kind}"]
            out[f"{theirs}.{ff}.net.0.proj.{kind}"] = state[f"{ours}.{stream}_mlp.0.{kind}"]
            out[f"{theirs}.{ff}.net.2.{kind}"] = state[f"{ours}.{stream}_mlp.2.{kind}"]
        out[f"{theirs}.{qk_norm}q.weight"] = state[f"{ours}.{stream}_attn.norm.query_norm.scale"]
        out[f"{theirs}.{qk_norm}k.weight"] = state[f"{ours}.{stream}_attn.norm.key_norm.scale"]
    return out


def _single_block(state: State, ours: str, theirs: str, hidden: int) -> State:
    out: State = {}
    for kind in ("weight", "bias"):
        fused = state[f"{ours}.linear1.{kind}"]
        parts = fused.split([hidden, hidden, hidden, fused.shape[0] - 3 * hidden])
        names = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        out |= {f"{theirs}.{name}.{kind}": part for name, part in zip(names, parts, strict=True)}
        out[f"{theirs}.proj_out.{kind}"] = state[f"{ours}.linear2.{kind}"]
        out[f"{theirs}.norm.linear.{kind}"] = state[f"{ours}.modulation.lin.{kind}"]
    out[f"{theirs}.attn.norm_q.weight"] = state[f"{ours}.norm.query_norm.scale"]
    out[f"{theirs}.attn.norm_k.weight"] = state[f"{ours}.norm.key_norm.scale"]
    return out


def vae_diffusers(state: State, attention: tuple[str, str, str, str]) -> State:
    """LDM -> diffusers; `attention` is what q, k, v and the output projection are called."""
    levels = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.down."))
    out: State = {}
    for name, tensor in state.items():
        side, *rest = name.split(".")
        match rest:
            case ["norm_out", kind]:
                out[f"{side}.conv_norm_out.{kind}"] = tensor
            case ["mid", "attn_1", "norm", kind]:
                out[f"{side}.mid_block.attentions.0.group_norm.{kind}"] = tensor
            case ["mid", "attn_1", which, kind]:
                theirs = attention[("q", "k", "v", "proj_out").index(which)]
                linear = tensor.flatten(1) if kind == "weight" else tensor
                out[f"{side}.mid_block.attentions.0.{theirs}.{kind}"] = linear
            case ["mid", block, layer, kind]:
                out[f"{side}.mid_block.resnets.{int(block[-1]) - 1}.{layer}.{kind}"] = tensor
            case ["down", level, "downsample", "conv", kind]:
                out[f"encoder.down_blocks.{level}.downsamplers.0.conv.{kind}"] = tensor
            case ["up", level, "upsample", "conv", kind]:
                out[f"decoder.up_blocks.{levels - 1 - int(level)}.upsamplers.0.conv.{kind}"] = tensor
            case [("down" | "up") as way, level, "block", block, layer, kind]:
                number = int(level) if way == "down" else levels - 1 - int(level)
                theirs = "conv_shortcut" if layer == "nin_shortcut" else layer
                out[f"{side}.{way}_blocks.{number}.resnets.{block}.{theirs}.{kind}"] = tensor
            case _:
                out[name] = tensor
    return out


def vae_squeezed(state: State) -> State:
    """LDM names with the 1x1 convolutions stored as matrices."""
    return {name: t.flatten(1) if t.shape[2:] == (1, 1) else t for name, t in state.items()}


def clip_bare(state: State) -> State:
    return {name.removeprefix("text_model."): tensor for name, tensor in state.items()}


def open_clip(state: State) -> State:
    """HF -> OpenCLIP: queries, keys and values in one tensor, the projection transposed."""
    parts: dict[str, dict[int | None, Tensor]] = {}
    for name, tensor in state.items():
        theirs, third, is_transposed = sd_names.open_clip(name)
        parts.setdefault(theirs, {})[third] = tensor.t() if is_transposed else tensor
    return {
        name: part[None] if None in part else torch.cat([part[i] for i in range(3)])
        for name, part in parts.items()
    }


def unet_ldm(state: State) -> State:
    """diffusers -> LDM."""
    return {sd_names.unet_ldm(name, state): tensor for name, tensor in state.items()}


def t5_embedding(state: State, *names: str) -> State:
    """HF names with the shared embedding stored under each of `names`."""
    out = {name: tensor for name, tensor in state.items() if name != "shared.weight"}
    return out | {name: state["shared.weight"].clone() for name in names}


def t5_llama_cpp(state: State) -> State:
    """HF -> llama.cpp, by the name table of the gguf package."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5, 24)
    names = {name: table.get_name(name, try_suffixes=(".weight",)) for name in state}
    return {str(names[name]): tensor for name, tensor in state.items()}

"""One tiny model in the layouts that people have: how each is written, and what must come back from it.

What comes back is worked out without the package: GGUF by the gguf package's decoders, fp8 by torch's cast.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import helpers_checkpoints as write
import helpers_gguf
import torch
from helpers_gguf import ARRAY, I32, STRING, Described, pair
from torch import Tensor, nn

from flux_sd.gguf_quantize import quantize
from flux_sd.quantized import QuantizedEmbedding, QuantizedLinear

State = write.State
Kind = Callable[[str, Tensor], str]  # name, tensor -> type to store it in
Writer = Callable[[State, Path], State]  # writes tensors to a file or folder; returns them as they come back
TODAY = ("to_q", "to_k", "to_v", "to_out.0")
LEGACY = ("query", "key", "value", "proj_attn")
COMFYUI = {
    "flux_mmdit": "model.diffusion_model.",
    "autoencoder": "vae.",
    "clip": "text_encoders.clip_l.transformer.",
    "t5": "text_encoders.t5xxl.transformer.",
}


@dataclass(frozen=True)
class Layout:
    """How one component is written."""

    component: str
    rename: Callable[[State], State]  # our names -> theirs
    write: Writer
    exact: bool = False  # no value is rounded


@functools.cache
def random_state(component: str, seed: int = 0) -> State:
    """The same for all layouts, not to be changed."""
    return write.random_state(component, seed=seed)


def weights(module: nn.Module) -> State:
    """What a filled network computes with, under our names: packed weights decoded to float32."""
    found: State = {}
    for name, layer in module.named_modules():
        if isinstance(layer, QuantizedLinear | QuantizedEmbedding):
            parts = [part.decode(torch.float32) for part in layer.weight.parts]
            found[f"{name}.weight"] = torch.cat(parts)
    return found | {name: t for name, t in module.state_dict().items() if ".weight.data_" not in name
                    and ".weight.scale_" not in name}  # fmt: skip


# safetensors -----------------------------------------------------------------------------------------------


def safetensors(state: State, path: Path) -> State:
    write.save(state, path)
    return state


def folder(state: State, path: Path) -> State:
    """As diffusers has it: a config beside the weights."""
    write.save(state, path / "diffusion_pytorch_model.safetensors")
    (path / "config.json").write_text("{}")
    return state


def sharded(state: State, path: Path) -> State:
    """Two shards and an index; tensors alternate, so that whatever is fused needs both."""
    shards = [dict(list(state.items())[i::2]) for i in range(2)]
    names = [f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
    for name, shard in zip(names, shards, strict=True):
        write.save(shard, path / name)
    listed = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    index = {"metadata": {}, "weight_map": listed}
    (path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return state


def cast_to(dtype: torch.dtype) -> Writer:
    """Every tensor as fp8, one-dimensional ones included."""

    def written(state: State, path: Path) -> State:
        stored = {name: tensor.to(dtype) for name, tensor in state.items()}
        write.save(stored, path)
        return {name: tensor.float() for name, tensor in stored.items()}

    return written


def scaled_2024(state: State, path: Path) -> State:
    """ComfyUI's scaled fp8: one marker, one number a linear, another that is of no use here."""
    stored: State = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
    back: State = {}
    for name, tensor in state.items():
        if tensor.ndim != 2:
            stored[name] = back[name] = tensor
            continue
        layer, scale = name.removesuffix(".weight"), tensor.abs().max() / 448
        stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
        stored[f"{layer}.scale_weight"] = scale
        stored[f"{layer}.scale_input"] = torch.tensor(1.0)
        back[name] = stored[name].float() * scale
    write.save(stored, path)
    return back


def scaled_2025(state: State, path: Path) -> State:
    """ComfyUI's later layout, with a number for each row."""
    stored: State = {}
    back: State = {}
    words = json.dumps({"format": "float8_e5m2"}).encode()
    for name, tensor in state.items():
        if tensor.ndim != 2:
            stored[name], back[name] = tensor.bfloat16(), tensor.bfloat16().float()
            continue
        layer, scale = name.removesuffix(".weight"), tensor.abs().amax(1, keepdim=True) / 57344
        stored[name] = (tensor / scale).to(torch.float8_e5m2)
        stored[f"{layer}.weight_scale"] = scale
        stored[f"{layer}.comfy_quant"] = torch.tensor(list(words), dtype=torch.uint8)
        back[name] = stored[name].float() * scale
    write.save(stored, path)
    return back


# GGUF ------------------------------------------------------------------------------------------------------


def encode(tensor: Tensor, word: str) -> tuple[bytes, Tensor]:
    """(the bytes of a tensor in a type of GGML, what they decode to)."""
    if word == "F32":
        return tensor.contiguous().numpy().tobytes(), tensor
    blocks = quantize(tensor.reshape(-1, tensor.shape[-1]), word)
    decoded = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[word])
    return blocks.numpy().tobytes(), torch.from_numpy(decoded.copy()).view(tensor.shape)


def as_gguf(kind: Kind, architecture: str | None = "flux", version: int = 3, flat: bool = False) -> Writer:
    """GGUF with the type that `kind` says; `architecture` None: no metadata at all. `flat`: every matrix is
    stored as rows of 256, its shape in the metadata."""

    def written(state: State, path: Path) -> State:
        pairs = [] if architecture is None else [pair("general.architecture", STRING, architecture)]
        tensors: list[Described] = []
        back: State = {}
        for name, tensor in state.items():
            stored = tensor
            if flat and tensor.ndim > 1 and tensor.numel() % 256 == 0:
                shape = (I32, list(tensor.shape))
                pairs.append(pair(f"comfy.gguf.orig_shape.{name}", ARRAY, shape))
                stored = tensor.reshape(-1, 256)
            word = kind(name, stored)
            data, values = encode(stored, word)
            back[name] = values.view(tensor.shape)
            number = gguf.GGMLQuantizationType[word].value
            tensors.append(Described(name, tuple(reversed(stored.shape)), number, data))
        helpers_gguf.File(tensors, pairs, version).write(path)
        return back

    return written


INPUTS = ("img_in.", "txt_in.", "time_in.", "vector_in.", "guidance_in.", "final_layer.")


def by_city96(name: str, tensor: Tensor) -> str:
    """Norms and biases in float32, the first and last layers in bfloat16, the rest in blocks."""
    if tensor.ndim < 2:
        return "F32"
    return "BF16" if name.startswith(INPUTS) else "Q8_0"


def by_candle(name: str, tensor: Tensor) -> str:
    """Every matrix in blocks where its rows allow, the first and last layers too."""
    return "Q4_0" if tensor.ndim == 2 and tensor.shape[1] % 32 == 0 else "F32"


def mixed(name: str, tensor: Tensor) -> str:
    """Anything: another type for each matrix, norms in 16 bits."""
    words = ("Q8_0", "Q4_1", "Q5_0", "F16", "Q5_1", "Q4_0", "BF16", "F32")
    return words[len(name) * 7 % len(words)] if tensor.ndim == 2 else ("BF16", "F16")[len(name) % 2]


def by_row(name: str, tensor: Tensor) -> str:
    """K types, which need rows of 256."""
    return ("Q6_K", "Q4_K", "Q8_0")[len(name) % 3] if tensor.ndim == 2 and tensor.shape[1] == 256 else "F32"


def by_llama_cpp(name: str, tensor: Tensor) -> str:
    """T5: the embedding in blocks as well; norms and the position bias in float32."""
    return "F32" if tensor.ndim < 2 or "rel_b" in name or "relative" in name else "Q8_0"


# all of them -----------------------------------------------------------------------------------------------


def with_others(component: str, written: Writer) -> Writer:
    """The same file holds the other components too, behind ComfyUI's prefixes."""

    def together(state: State, path: Path) -> State:
        others: State = {}
        for other, prefix in COMFYUI.items():
            if other != component:
                others |= write.prefixed(random_state(other, seed=1), prefix)
        back = written(state | others, path)
        return {name: back[name] for name in state}

    return together


def behind(prefix: str) -> Callable[[State], State]:
    return lambda state: write.prefixed(state, prefix)


def _all_in_one(component: str, written: Writer, exact: bool) -> Layout:
    return Layout(component, behind(COMFYUI[component]), with_others(component, written), exact)


FLUX, VAE = "flux_mmdit", "autoencoder"
LAYOUTS: dict[str, Layout] = {
    "BFL, bare": Layout(FLUX, dict, safetensors, True),
    "BFL, prefixed": Layout(FLUX, behind("model.diffusion_model."), safetensors, True),
    "diffusers, folder": Layout(FLUX, write.flux_diffusers, folder, True),
    "diffusers, sharded": Layout(FLUX, write.flux_diffusers, sharded, True),
    "fp8, plain E4M3": Layout(FLUX, dict, cast_to(torch.float8_e4m3fn)),
    "fp8, plain E5M2, diffusers": Layout(FLUX, write.flux_diffusers, cast_to(torch.float8_e5m2)),
    "fp8, scaled 2024": Layout(FLUX, dict, scaled_2024),
    "fp8, scaled 2025": Layout(FLUX, write.flux_diffusers, scaled_2025),
    "GGUF, city96": Layout(FLUX, dict, as_gguf(by_city96)),
    "GGUF, odd architecture, prefixed": Layout(FLUX, behind("model."), as_gguf(by_city96, "pig")),
    "GGUF, no metadata, version 2, quantised inputs": Layout(FLUX, dict, as_gguf(by_candle, None, 2)),
    "GGUF, mixed types": Layout(FLUX, dict, as_gguf(mixed)),
    "GGUF, mixed types, diffusers": Layout(FLUX, write.flux_diffusers, as_gguf(mixed)),
    "GGUF, reshaped": Layout(FLUX, dict, as_gguf(by_row, flat=True)),
    "VAE, LDM": Layout(VAE, dict, safetensors, True),
    "VAE, LDM, prefixed, 1x1 squeezed": Layout(
        VAE, lambda s: write.prefixed(write.vae_squeezed(s), "first_stage_model."), safetensors, True
    ),
    "VAE, diffusers": Layout(VAE, lambda s: write.vae_diffusers(s, TODAY), folder, True),
    "VAE, diffusers of old": Layout(VAE, lambda s: write.vae_diffusers(s, LEGACY), safetensors, True),
    "VAE, GGUF, reshaped": Layout(VAE, dict, as_gguf(by_row, "pig", flat=True)),
    "VAE, fp8": Layout(VAE, dict, cast_to(torch.float8_e4m3fn)),
    "CLIP, HF": Layout("clip", dict, safetensors, True),
    "CLIP, bare, fp8": Layout("clip", write.clip_bare, cast_to(torch.float8_e4m3fn)),
    "T5, HF": Layout("t5", dict, safetensors, True),
    "T5, HF, fp8 scaled 2024": Layout("t5", dict, scaled_2024),
    "T5, GGUF, HF names": Layout("t5", dict, as_gguf(by_llama_cpp, None, 2)),
    "T5, GGUF, llama.cpp names": Layout("t5", write.t5_llama_cpp, as_gguf(by_llama_cpp, "t5encoder")),
    **{f"all in one, {part}": _all_in_one(part, safetensors, True) for part in COMFYUI},
    **{  # whose only matrices are the text encoders' and the transformer's
        f"all in one, GGUF, {part}": _all_in_one(part, as_gguf(by_candle, None), part == VAE)
        for part in COMFYUI
    },
}

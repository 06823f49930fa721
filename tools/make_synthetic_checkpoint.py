"""Writes checkpoints of any size with seeded random weights, in the layouts that released models come in.

For measuring and testing the loader without a download: the weights are scaled so that activations stay
finite and of order one; the pictures are noise. Values depend on the seed and our parameter's name alone,
so every layout of one model holds the same numbers. Tensors are made and written in pieces of 4 MB.

    make_synthetic_checkpoint.py flux-schnell OUT --layout bfl --dtype bf16 --depth 2 4
    make_synthetic_checkpoint.py flux-dev OUT --layout diffusers --shard-size 5 --tokenizers FOLDER
    make_synthetic_checkpoint.py tiny-flux OUT --component flux_mmdit
    make_synthetic_checkpoint.py sd15 OUT --layout diffusers --dtype f16 --variant fp16
    make_synthetic_checkpoint.py sdxl OUT --layout ldm --zeros
    make_synthetic_checkpoint.py sd15 OUT --layout ldm --container ckpt

OUT becomes a folder: `bfl` writes flux1-<version>.safetensors and ae.safetensors with text_encoder/ and
text_encoder_2/ beside them; `diffusers` writes transformer/ or unet/, vae/, text_encoder/ and
text_encoder_2/, each with its config.json, sharded where --shard-size asks for it; `ldm` writes Stable
Diffusion's single file with all of the model, and what else such files hold.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from flux_sd.autoencoder import AutoEncoder
from flux_sd.clip import ClipTextEncoder
from flux_sd.dialects import undo_all
from flux_sd.errors import FluxSdError, RequestError
from flux_sd.flux_mmdit import Flux
from flux_sd.t5 import T5Encoder
from flux_sd.unet import UNet
from flux_sd.versions import FluxConfigs, SDVersion, VersionInfo
from flux_sd.weight_map import WeightMap, load_maps

DTYPES = {
    "bf16": (torch.bfloat16, "BF16"),
    "f16": (torch.float16, "F16"),
    "f32": (torch.float32, "F32"),
    "i64": (torch.int64, "I64"),
}
Shapes = Mapping[str, tuple[int, ...]]
BLOCK = 2**20  # values drawn at a time; a piece of a tensor is a range of blocks
COMPONENTS = {"flux_mmdit": "transformer", "autoencoder": "vae", "clip": "clip", "t5": "t5"}
DIALECTS = {
    "bfl": {"flux_mmdit": "bfl", "autoencoder": "ldm", "clip": "hf", "t5": "hf"},
    "diffusers": {"flux_mmdit": "diffusers", "autoencoder": "diffusers", "clip": "hf", "t5": "hf"},
}
FOLDERS = {"flux_mmdit": "transformer", "autoencoder": "vae", "clip": "text_encoder", "t5": "text_encoder_2"}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the file to write: its name, shape, and which rows of our parameters it holds."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[tuple[str, int, int], ...]  # our name, first row, rows; in the order of the file's rows
    transposed: bool = False
    dtype: str | None = None  # None: that of the file. Tensors without parts are zeros.


def build(component: str, config: object) -> nn.Module:
    """The network on the meta device."""
    classes: dict[str, Callable[..., nn.Module]] = {
        "flux_mmdit": Flux,
        "autoencoder": AutoEncoder,
        "clip": ClipTextEncoder,
        "t5": T5Encoder,
        "unet": UNet,
    }
    with torch.device("meta"):
        return classes[component](config)


@functools.cache  # a fifth of a second for SDXL's UNet
def shapes_of(component: str, config: object) -> Shapes:
    """Our parameters and their shapes."""
    return {name: tuple(tensor.shape) for name, tensor in build(component, config).state_dict().items()}


# what the weights are -----------------------------------------------------------------------------------


def scale_of(name: str, shape: Sequence[int], d_kv: int) -> tuple[float, float]:
    """(mean, standard deviation) of one parameter's values."""
    if "norm" in name:
        return (0.0, 0.0) if name.endswith("bias") else (1.0, 0.0)
    if name.endswith("bias"):
        return 0.0, 0.02
    if name.endswith("shared.weight") or "token_embedding" in name:
        return 0.0, 1.0
    if "position_embedding" in name or "relative_attention_bias" in name:
        return 0.0, 0.1
    fan_in = math.prod(shape[1:])
    if name.endswith("SelfAttention.q.weight"):
        return 0.0, (fan_in * d_kv) ** -0.5  # T5 does not divide its scores by the root of the head width
    if "_mod.lin" in name or "modulation" in name:
        return 0.0, 0.3 * fan_in**-0.5  # gates well below one keep 57 residual blocks in bounds
    return 0.0, fan_in**-0.5


def values(
    name: str, shape: Sequence[int], first: int, count: int, seed: int, d_kv: int = 64
) -> Iterator[Tensor]:
    """Elements `first` to `first + count` of our parameter `name`, float32, in pieces of a block or less."""
    mean, deviation = scale_of(name, shape, d_kv)
    generator = torch.Generator()
    while count > 0:
        block, skip = divmod(first, BLOCK)
        generator.manual_seed(zlib.crc32(f"{seed}/{name}/{block}".encode()))
        drawn = torch.randn(min(BLOCK, math.prod(shape) - block * BLOCK), generator=generator)
        piece = drawn[skip : skip + count] * deviation + mean
        yield piece
        first, count = first + piece.numel(), count - piece.numel()


# how they are laid out ----------------------------------------------------------------------------------


def stored_tensors(weight_map: WeightMap, config: object, shapes: Shapes) -> list[StoredTensor]:
    """The tensors of a file in this dialect: every row of the map, read backwards."""
    layout = undo_all(weight_map, config, shapes)
    if any(part.transposed for group in layout.values() for part in group):
        raise ValueError(f"{weight_map.name} has transposed tensors, which are not written here")
    return [
        StoredTensor(name, group[0].shape, tuple((part.parameter, part.first, part.rows) for part in group))
        for name, group in layout.items()
    ]


def write_file(
    path: Path, tensors: Sequence[StoredTensor], shapes: Shapes, dtype: str, seed: int | None, d_kv: int
) -> int:
    """Writes one safetensors file, header first, then piece after piece. Returns the bytes of its tensors.

    `seed` None leaves the tensors a hole in the file: zeros that take no room on the disk.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        torch_dtype, word = DTYPES[tensor.dtype or dtype]
        nbytes = math.prod(tensor.shape) * torch_dtype.itemsize
        span = [offset, offset + nbytes]
        header[tensor.name] = {"dtype": word, "shape": tensor.shape, "data_offsets": span}
        offset += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors if seed is not None else ():
            _write_tensor(file, tensor, shapes, DTYPES[tensor.dtype or dtype][0], seed or 0, d_kv)
        file.truncate(8 + len(text) + offset)
    return offset


def _write_tensor(
    file: BinaryIO, tensor: StoredTensor, shapes: Shapes, dtype: torch.dtype, seed: int, d_kv: int
) -> None:
    if not tensor.parts:
        file.write(bytes(math.prod(tensor.shape) * dtype.itemsize))
    for target, first, rows in tensor.parts:
        shape = shapes[target]
        width = math.prod(shape[1:])
        pieces = values(target, shape, first * width, rows * width, seed, d_kv)
        if tensor.transposed:
            pieces = iter([torch.cat(list(pieces)).view(shape).t().flatten()])
        for piece in pieces:
            file.write(piece.to(dtype).view(torch.uint8).numpy().data)


def write_component(
    component: str,
    config: object,
    dialect: str,
    path: Path,
    dtype: str = "bf16",
    seed: int | None = 0,
    shard_bytes: int | None = None,
) -> int:
    """Writes one component to `path`, or shards and their index beside it. Returns bytes."""
    shapes = shapes_of(component, config)
    weight_map = next(m for m in load_maps() if m.name == f"{component}.{dialect}")
    tensors = stored_tensors(weight_map, config, shapes)
    d_kv = getattr(config, "d_kv", 64)
    # By name, as the released files are: so that the parts of a fused tensor can come to lie in two shards.
    tensors.sort(key=_name)
    shards = [tensors] if shard_bytes is None else _shards(tensors, shard_bytes, DTYPES[dtype][0].itemsize)
    if len(shards) == 1:
        return write_file(path, tensors, shapes, dtype, seed, d_kv)
    listed: dict[str, str] = {}
    total = 0
    for i, shard in enumerate(shards, start=1):
        file = path.with_name(f"{path.stem}-{i:05}-of-{len(shards):05}.safetensors")
        total += write_file(file, shard, shapes, dtype, seed, d_kv)
        listed |= {tensor.name: file.name for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": listed}
    stem, _, variant = path.stem.partition(".")  # a variant's name comes before .json
    name = f"{stem}.safetensors.index{'.' if variant else ''}{variant}.json"
    path.with_name(name).write_text(json.dumps(index, indent=2) + "\n")
    return total


def _name(tensor: StoredTensor) -> str:
    return tensor.name


def _shards(tensors: Sequence[StoredTensor], limit: int, itemsize: int) -> list[list[StoredTensor]]:
    shards: list[list[StoredTensor]] = [[]]
    size = 0
    for tensor in tensors:
        nbytes = math.prod(tensor.shape) * itemsize
        if shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += nbytes
    return shards


# whole models -------------------------------------------------------------------------------------------


def write_model(
    configs: FluxConfigs,
    key: str,
    out: Path,
    layout: str,
    dtype: str,
    seed: int | None,
    shard_bytes: int | None,
    only: str | None,
) -> dict[str, int]:
    """Writes the components of one version in the shape of its repository. Returns bytes by file."""
    written: dict[str, int] = {}
    for component, field in COMPONENTS.items():
        if only not in (None, component):
            continue
        config = getattr(configs, field)
        path = out / _file_of(component, layout, key)
        shards = shard_bytes if layout == "diffusers" or component == "t5" else None
        dialect = DIALECTS[layout][component]
        name = str(path.relative_to(out))
        written[name] = write_component(component, config, dialect, path, dtype, seed, shards)
        if path.parent != out:
            content = json.dumps(config_json(component, config), indent=2)
            (path.parent / "config.json").write_text(content + "\n")
    if layout == "diffusers" and only is None:
        (out / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}, indent=2) + "\n")
    return written


def _file_of(component: str, layout: str, key: str) -> Path:
    if layout == "bfl" and component == "flux_mmdit":
        return Path(f"flux1-{key.removeprefix('flux-')}.safetensors")
    if layout == "bfl" and component == "autoencoder":
        return Path("ae.safetensors")
    stem = "diffusion_pytorch_model" if component in ("flux_mmdit", "autoencoder") else "model"
    return Path(FOLDERS[component]) / f"{stem}.safetensors"


def config_json(component: str, config: object) -> dict[str, object]:
    """A config.json in the words of the released ones, as far as our configs reach."""
    ours = asdict(config)  # type: ignore[call-overload]
    if component == "flux_mmdit":
        return {
            "_class_name": "FluxTransformer2DModel",
            "attention_head_dim": ours["hidden_size"] // ours["num_heads"],
            "axes_dims_rope": ours["axes_dim"],
            "guidance_embeds": ours["guidance_embed"],
            "in_channels": ours["in_channels"],
            "joint_attention_dim": ours["context_in_dim"],
            "num_attention_heads": ours["num_heads"],
            "num_layers": ours["depth"],
            "num_single_layers": ours["depth_single_blocks"],
            "patch_size": 1,
            "pooled_projection_dim": ours["vec_in_dim"],
        }
    if component == "autoencoder":
        return {
            "_class_name": "AutoencoderKL",
            "block_out_channels": [ours["ch"] * mult for mult in ours["ch_mult"]],
            "in_channels": ours["in_channels"],
            "latent_channels": ours["z_channels"],
            "layers_per_block": ours["num_res_blocks"],
            "out_channels": ours["out_ch"],
            "scaling_factor": ours["scale_factor"],
            "shift_factor": ours["shift_factor"],
            "use_quant_conv": ours["use_quant_conv"],
        }
    if component == "unet":
        return {
            "_class_name": "UNet2DConditionModel",
            "attention_head_dim": list(ours["heads"]),  # diffusers calls the number of heads so
            "block_out_channels": list(ours["widths"]),
            "cross_attention_dim": ours["context_dim"],
            "in_channels": ours["in_channels"],
            "layers_per_block": ours["resnets"],
            "out_channels": ours["out_channels"],
            "projection_class_embeddings_input_dim": ours["added_dim"],
            "transformer_layers_per_block": list(ours["depths"]),
            "use_linear_projection": ours["linear_projection"],
        }
    kind = {"clip": ("CLIPTextModel", "clip_text_model"), "t5": ("T5EncoderModel", "t5")}[component]
    return {"architectures": [kind[0]], "model_type": kind[1], **ours}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("version", help="such as flux-schnell, tiny-flux, sd15, sdxl-turbo")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument(
        "--layout", choices=["bfl", "diffusers", "ldm"], help="default: bfl, of Stable Diffusion diffusers"
    )
    parser.add_argument("--dtype", choices=["bf16", "f16", "f32"], default="bf16")
    parser.add_argument("--component", choices=sorted(COMPONENTS), help="write this one of FLUX alone")
    parser.add_argument("--variant", help="in the names of a diffusers folder's files, such as fp16")
    parser.add_argument("--container", choices=["safetensors", "ckpt"], default="safetensors")
    parser.add_argument("--depth", nargs=2, type=int, metavar=("DOUBLE", "SINGLE"), help="numbers of blocks")
    parser.add_argument("--t5-layers", type=int, help="layers of the T5 encoder")
    parser.add_argument("--shard-size", type=float, metavar="GB", help="shard what the repositories shard")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--zeros", action="store_true", help="no values: sparse files that take no room")
    parser.add_argument("--tokenizers", type=Path, metavar="FOLDER", help="copy tokenizer[_2]/ from it")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    try:
        info = SDVersion.parse(args.version).info
        written = _write_sd(info, args) if info.flux is None else _write_flux(info.key, info.flux, args)
    except FluxSdError as error:
        print(f"make_synthetic_checkpoint: {error}", file=sys.stderr)
        return error.exit_code
    for folder in ("tokenizer", "tokenizer_2") if args.tokenizers else ():
        if (args.tokenizers / folder).is_dir():
            shutil.copytree(args.tokenizers / folder, args.out / folder, dirs_exist_ok=True)
    for name, nbytes in written.items():
        print(f"{args.out / name}: {nbytes / 1e9:.3f} GB")
    return 0


def _write_flux(key: str, configs: FluxConfigs, args: argparse.Namespace) -> dict[str, int]:
    if args.layout == "ldm" or args.variant or args.container != "safetensors":
        raise RequestError(f"{key} comes as --layout bfl or diffusers, in safetensors, without variants")
    if args.depth:
        depth, single = args.depth
        transformer = replace(configs.transformer, depth=depth, depth_single_blocks=single)
        configs = replace(configs, transformer=transformer)
    if args.t5_layers:
        configs = replace(configs, t5=replace(configs.t5, num_layers=args.t5_layers))
    shards = int(args.shard_size * 1e9) if args.shard_size else None
    seed = None if args.zeros else args.seed
    layout = args.layout or "bfl"
    return write_model(configs, key, args.out, layout, args.dtype, seed, shards, args.component)


def _write_sd(info: VersionInfo, args: argparse.Namespace) -> dict[str, int]:
    import synthetic_sd  # it imports this file

    if args.layout == "bfl" or args.component or args.depth or args.t5_layers:
        raise RequestError(f"{info.key} comes as --layout diffusers or ldm, whole")
    seed = None if args.zeros else args.seed
    if args.layout == "ldm":
        if args.variant or args.shard_size:
            raise RequestError("a single file has no shards and no variants: leave those options out")
        return synthetic_sd.write_single_file(info, args.out, args.dtype, seed, args.container)
    if args.container != "safetensors":
        raise RequestError("a diffusers folder is written in safetensors: --container ckpt goes with ldm")
    shards = int(args.shard_size * 1e9) if args.shard_size else None
    return synthetic_sd.write_folder(info, args.out, args.dtype, seed, shards, args.variant)


if __name__ == "__main__":
    raise SystemExit(main())

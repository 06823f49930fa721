"""Writes a GGUF of any size and block type with seeded random blocks, in seconds: for measuring and testing.

No value is quantised. The codes of a block are random bytes; its float16 scales are chosen so that the
decoded values have mean zero and the deviation that keeps the network's activations of order one, which is
what `make_synthetic_checkpoint.py` gives its values too. The pictures are noise.

    make_synthetic_gguf.py flux-dev flux1-dev-Q4_K.gguf --type Q4_K             6.8 GB
    make_synthetic_gguf.py flux-dev t5xxl-Q8_0.gguf --component t5 --type Q8_0  5.1 GB
    make_synthetic_gguf.py flux-schnell small.gguf --type Q6_K --depth 1 2

The transformer comes under Black Forest Labs' names, as city96's files do: input and final layers in
bfloat16, biases and norms in float32, the other matrices in blocks. T5 comes under llama.cpp's names.
"""

from __future__ import annotations

import argparse
import math
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from make_synthetic_checkpoint import COMPONENTS, build, scale_of, stored_tensors, values
from torch import Tensor

from flux_sd.checkpoint_writer import GGUF_ALIGNMENT, Entry, gguf_header, padding
from flux_sd.errors import FluxSdError, RequestError
from flux_sd.ggml_types import GGML_TYPES
from flux_sd.gguf_dequant import dequantize
from flux_sd.targets import KEPT, SMALL
from flux_sd.versions import SDVersion
from flux_sd.weight_map import load_maps

DIALECTS = {"flux_mmdit": "bfl", "t5": "llama_cpp"}
ARCHITECTURES = {"flux_mmdit": "flux", "t5": "t5encoder"}
# Where a block keeps the float16 that all its values are multiplied by, and the one that is taken off.
SCALES: Mapping[str, tuple[int, ...]] = {
    **{name: (0,) for name in ("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS")},
    **{name: (0, 2) for name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K")},
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)},
}
PIECE = 2**24  # bytes made and written at a time
SAMPLE = 4096  # blocks from which a type's mean and deviation are taken


@dataclass(frozen=True)
class Worth:
    """What a block's float16 numbers have to be for values of mean zero and deviation one."""

    d: float
    m: float | None  # dmin or m, of the types that have it


def random_blocks(count: int, type_name: str, generator: torch.Generator) -> Tensor:
    """uint8 [count, nbytes], every bit random."""
    nbytes = GGML_TYPES[type_name].nbytes
    words = torch.empty(-(-count * nbytes // 8), dtype=torch.int64).random_(
        -(2**63), None, generator=generator
    )
    return words.view(torch.uint8)[: count * nbytes].view(count, nbytes)


def set_scales(blocks: Tensor, type_name: str, numbers: Sequence[float | Tensor]) -> Tensor:
    """The blocks with their float16 numbers replaced, in the order of SCALES."""
    for at, number in zip(SCALES[type_name], numbers, strict=True):
        halves = torch.as_tensor(number, dtype=torch.float16).expand(len(blocks))
        blocks[:, at : at + 2] = halves.contiguous().view(torch.uint8).view(-1, 2)
    return blocks


def worth_of(type_name: str) -> Worth:
    """Found from a sample: of values under d = 1, and under m = 1 where there is one."""
    blocks = random_blocks(SAMPLE, type_name, torch.Generator().manual_seed(0))
    if len(SCALES[type_name]) == 1:
        values_of_d = dequantize(set_scales(blocks, type_name, [1.0]), type_name)
        return Worth(1 / values_of_d.square().mean().sqrt().item(), None)
    by_d = dequantize(set_scales(blocks, type_name, [1.0, 0.0]), type_name).mean().item()
    by_m = dequantize(set_scales(blocks, type_name, [0.0, 1.0]), type_name).mean().item()
    m = -by_d / by_m
    deviation = dequantize(set_scales(blocks, type_name, [1.0, m]), type_name).std().item()
    return Worth(1 / deviation, m / deviation)


def block_bytes(entry: Entry, deviation: float, worth: Worth, seed: int) -> Iterator[Tensor]:
    """The stored bytes of one tensor, a piece at a time: uint8."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{entry.name}".encode()))
    nbytes = GGML_TYPES[entry.dtype].nbytes
    left = entry.nbytes // nbytes
    while left > 0:
        count = min(left, PIECE // nbytes)
        blocks = random_blocks(count, entry.dtype, generator)
        # Half the blocks upside down: codes such as 0 to 15, less 8, have a mean that is not zero.
        sign = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
        numbers = [number * deviation * sign for number in (worth.d, worth.m) if number is not None]
        yield set_scales(blocks, entry.dtype, numbers).flatten()
        left -= count


def float_bytes(entry: Entry, target: str, seed: int, d_kv: int) -> Iterator[Tensor]:
    """The same for a tensor that is not in blocks."""
    dtype = {"BF16": torch.bfloat16, "F32": torch.float32}[entry.dtype]
    for piece in values(target, entry.shape, 0, math.prod(entry.shape), seed, d_kv):
        yield piece.to(dtype).view(torch.uint8)


def stored_type(component: str, target: str, shape: Sequence[int], type_name: str) -> str:
    """The type of our parameter `target` in such a file."""
    if len(shape) < 2 or math.prod(shape) <= SMALL:
        return "F32"
    kept = target.startswith(KEPT[component]) or shape[-1] % GGML_TYPES[type_name].block != 0
    return "BF16" if kept else type_name


def write_gguf(component: str, config: object, path: Path, type_name: str, seed: int | None = 0) -> int:
    """Writes one component. Returns the bytes of the file. `seed` None: zeros, a hole that takes no room."""
    shapes = {name: tuple(tensor.shape) for name, tensor in build(component, config).state_dict().items()}
    dialect = next(m for m in load_maps() if m.name == f"{component}.{DIALECTS[component]}")
    targets: dict[Entry, str] = {}
    for tensor in stored_tensors(dialect, config, shapes):
        ((target, _, _),) = tensor.parts  # both dialects rename, and do no more
        targets[Entry(tensor.name, tensor.shape, stored_type(component, target, tensor.shape, type_name))] = (
            target
        )
    d_kv = getattr(config, "d_kv", 64)
    worth = worth_of(type_name)
    with path.open("wb") as file:
        file.write(gguf_header(list(targets), {"general.architecture": ARCHITECTURES[component]}))
        if seed is None:
            sizes = [entry.nbytes + padding(entry.nbytes, GGUF_ALIGNMENT) for entry in targets]
            return file.truncate(file.tell() + sum(sizes))
        for entry, target in targets.items():
            if entry.dtype == type_name:
                pieces = block_bytes(entry, scale_of(target, entry.shape, d_kv)[1], worth, seed)
            else:
                pieces = float_bytes(entry, target, seed, d_kv)
            for piece in pieces:
                file.write(piece.numpy().data)
            file.write(bytes(padding(entry.nbytes, GGUF_ALIGNMENT)))
        return file.tell()


def main(arguments: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("version", help="flux-schnell, flux-dev or tiny-flux")
    parser.add_argument("out", type=Path, help="the file to write")
    parser.add_argument("--type", choices=sorted(SCALES), default="Q4_K", dest="type_name")
    parser.add_argument("--component", choices=sorted(DIALECTS), default="flux_mmdit")
    parser.add_argument("--depth", nargs=2, type=int, metavar=("DOUBLE", "SINGLE"), help="numbers of blocks")
    parser.add_argument("--t5-layers", type=int, help="layers of the T5 encoder")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    try:
        info = SDVersion.parse(args.version).info
        if info.flux is None:
            raise RequestError(f"{info.key} is no FLUX model: choose flux-schnell, flux-dev or tiny-flux")
    except FluxSdError as error:
        print(f"make_synthetic_gguf: {error}", file=sys.stderr)
        return error.exit_code
    config = getattr(info.flux, COMPONENTS[args.component])
    if args.depth and args.component == "flux_mmdit":
        config = replace(config, depth=args.depth[0], depth_single_blocks=args.depth[1])
    if args.t5_layers and args.component == "t5":
        config = replace(config, num_layers=args.t5_layers)
    nbytes = write_gguf(args.component, config, args.out, args.type_name, args.seed)
    print(f"{args.out}: {nbytes / 1e9:.3f} GB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

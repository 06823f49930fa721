"""Measures one step of a Stable Diffusion version at its true shapes: seconds by stage, peak memory (Linux).

    measure_sd.py FOLDER --model sd15                       2.1 GB of disk; a row of the README's table
    measure_sd.py FOLDER --model sdxl-turbo --layout ldm    7 GB
    measure_sd.py FOLDER --model sd21 --small               narrow networks, to try it out

Writes a synthetic checkpoint with values in float16 (tools/synthetic_sd.py), a diffusers folder or the single
file of the authors, and loads it in a process of its own through what `load_model` calls: each network for
its stage, freed after it. One step at 512x512, with guidance where the version has it. Every tensor of the
UNet as it was loaded is held against the numbers that it was written from, at both its ends.

`peak` is that process's VmHWM minus its VmRSS after imports: weights, activations and mapped file pages.
Where other programs keep a core busy, set OMP_WAIT_POLICY=PASSIVE; seconds are longer all the same.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from make_synthetic_checkpoint import shapes_of, values
from measure_load import status_bytes
from synthetic_sd import SINGLE_FILES, write_folder, write_single_file
from torch import nn

from flux_sd.components import LoadOptions
from flux_sd.device import choose_device, choose_dtype
from flux_sd.model_files import find_files
from flux_sd.model_loader import sd_model
from flux_sd.numerics import reference
from flux_sd.request import GenerationRequest
from flux_sd.sd_loader import load_sd
from flux_sd.unet import SIZE_WIDTH
from flux_sd.versions import SDVersion, VersionInfo

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "flux_sd" / "models" / "tiny_flux" / "tokenizer"  # the vocabulary does not matter here
SEED = 0
ENDS = 64  # numbers that are compared at the beginning and at the end of each tensor
STAGES = ("load", "encode", "denoise", "decode")
LAYOUTS = ("diffusers", "ldm")


@dataclass(frozen=True)
class Measured:
    """Bytes and seconds of one run."""

    model: str
    layout: str
    file: int
    peak: int  # VmHWM less the memory that the process had when everything was imported
    seconds: dict[str, float]  # by stage
    dtype: str
    compared: int  # tensors of the UNet that held the numbers they were written from
    finite: bool


def small(info: VersionInfo) -> VersionInfo:
    """The version with narrow networks of as many levels, for which a file takes megabytes."""
    configs = info.sd
    assert configs is not None
    narrow = {
        "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2
    }  # fmt: skip
    clip, clip_2 = replace(configs.clip, **narrow), configs.clip_2
    if clip_2 is not None:
        clip_2 = replace(clip_2, **narrow | {"hidden_size": 96}, projection_dim=64)  # told by its width
    unet = configs.unet
    levels = len(unet.widths)
    unet = replace(
        unet,
        widths=(32,) * levels,
        heads=(1,) * levels,
        depths=tuple(min(depth, 1) for depth in unet.depths),
        mid_depth=1,
        context_dim=64 if clip_2 is None else 64 + 96,
        added_dim=None if unet.added_dim is None else 64 + 6 * SIZE_WIDTH,
    )
    vae = replace(configs.vae, ch=32, num_res_blocks=1)
    return replace(info, sd=replace(configs, unet=unet, clip=clip, clip_2=clip_2, vae=vae))


def write(info: VersionInfo, folder: Path, layout: str) -> tuple[Path, int]:
    """(what is given as --path, bytes) of a checkpoint with values."""
    if layout == "ldm":
        written = write_single_file(info, folder, "f16", SEED)
    else:
        written = write_folder(info, folder, "f16", SEED, variant="fp16")
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(TOKENIZER, folder / name, dirs_exist_ok=True)
    path = folder / next(iter(written)) if layout == "ldm" else folder
    return path, sum(written.values())


# the process that is measured -----------------------------------------------------------------------------


def compare(network: nn.Module, config: object, layout: str) -> int:
    """Holds both ends of every parameter of a UNet against the numbers that it was written from.

    Returns how many agree. Raises ValueError that names the first that does not.
    """
    state = network.state_dict()
    shapes = shapes_of("unet", config)
    if state.keys() != shapes.keys():
        raise ValueError("the network has other parameters than were written")
    for name, tensor in state.items():
        source = f"unet/{name}" if layout == "ldm" else name
        flat, count = tensor.flatten(), min(ENDS, tensor.numel())
        for first in {0, tensor.numel() - count}:
            drawn = torch.cat(list(values(source, shapes[name], first, count, SEED)))
            if not torch.equal(flat[first : first + count], drawn.half().to(tensor.dtype)):
                raise ValueError(f"{name} does not hold the numbers that it was written from")
    return len(state)


def measure_here(info: VersionInfo, path: Path, layout: str, size: int, dtype: str) -> Measured:
    """Loads and runs in this process, which should have done nothing else."""
    before = status_bytes("VmRSS")
    device = choose_device("cpu")
    kind, files = choose_dtype(dtype, device, info.auto_dtype), find_files(info, path, {})
    assert info.sd is not None
    options = LoadOptions(automatic=dtype == "auto")
    prediction = info.sd.prediction or "v_prediction"
    loaded = load_sd(info, files, device, kind, reference(), options, prediction)
    compared: list[int] = []

    def watcher(role: str, network: nn.Module) -> None:
        if role == "unet":
            compared.append(compare(network, loaded.components.config(role), layout))

    request = GenerationRequest("a red kite over the sea", width=size, height=size, steps=1, seed=SEED)
    with sd_model(SDVersion.parse(info.key), loaded) as model, model.watch(watcher):
        (result,) = model.generate(request)
    return Measured(
        model=info.key,
        layout=layout,
        file=sum(entry["bytes"] for entry in described(result.metadata["files"])),
        peak=status_bytes("VmHWM") - before,
        seconds={stage: round(seconds, 2) for stage, seconds in result.timings.items()},
        dtype=str(kind).removeprefix("torch."),
        compared=sum(compared),
        finite=bool(result.latents.isfinite().all()) and bool(result.latents.any()),
    )


def described(files: dict[str, list[dict[str, object]]]) -> list[dict[str, int]]:
    """Every file of a record once, whatever roles it plays."""
    every = [entry for entries in files.values() for entry in entries]
    return list({str(entry["fingerprint"]): entry for entry in every}.values())  # type: ignore[arg-type]


# the process that measures --------------------------------------------------------------------------------


def measure(info: VersionInfo, folder: Path, layout: str, words: Sequence[str], keep: bool) -> Measured:
    """Writes the checkpoint, measures it in a new process, and removes it again. Raises RuntimeError with
    what that process said where it failed."""
    home = folder / f"{info.key}-{layout}"
    path, _ = write(info, home, layout)
    command = [sys.executable, __file__, str(folder), "--here", str(path), *words]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    finally:
        if not keep:
            shutil.rmtree(home)
    if done.returncode != 0:
        raise RuntimeError(f"{info.key} ended with {done.returncode}:\n{done.stderr}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def table(rows: Sequence[Measured]) -> str:
    """Markdown."""
    lines = [
        "| model, layout | files | peak memory | load | text | step | decode |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seconds = " | ".join(f"{row.seconds.get(stage, 0.0):.1f} s" for stage in STAGES)
        name = f"{row.model}, {row.layout}, {row.dtype}"
        lines.append(f"| {name} | {row.file / 1e9:.2f} GB | {row.peak / 1e9:.2f} GB | {seconds} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folder", type=Path, help="where to write the files")
    parser.add_argument("--model", default="sd15", help="such as sd15 or sdxl-turbo")
    parser.add_argument("--layout", choices=LAYOUTS, default="diffusers")
    parser.add_argument("--size", type=int, default=512, help="pixels of each side")
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float16", "float32"], default="auto")
    parser.add_argument("--small", action="store_true", help="narrow networks")
    parser.add_argument("--keep", action="store_true", help="leave the files there")
    parser.add_argument("--here", type=Path, metavar="PATH", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    info = SDVersion.parse(args.model).info
    if info.sd is None or (args.layout == "ldm" and info.key not in SINGLE_FILES):
        parser.error(f"{info.key} does not come as {args.layout}")
    info = small(info) if args.small else info
    if args.here is not None:
        found = measure_here(info, args.here, args.layout, args.size, args.dtype)
        print(json.dumps(vars(found)))
        return 0
    words = ["--model", args.model, "--layout", args.layout, "--size", str(args.size), "--dtype", args.dtype]
    row = measure(info, args.folder, args.layout, words + ["--small"] * args.small, args.keep)
    print(json.dumps(vars(row)), file=sys.stderr)
    print(table([row]))
    return 0 if row.finite and row.compared else 1


if __name__ == "__main__":
    raise SystemExit(main())

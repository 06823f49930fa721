"""Measures the memory that loading one component takes, in a process of its own (Linux).

    measure_load.py flux_mmdit CHECKPOINT --model flux-dev --depth 2 2 --dtype float32

Prints one JSON object: `peak` is VmHWM at the end minus VmRSS after imports, in bytes, file pages included;
`kept` is the parameters, `largest` the largest of them. What is promised: peak <= kept + largest + 300 MB.

With --packed, weights of GGUF blocks and fp8 stay packed, and every linear is multiplied by once: `kept` is
then the file's bytes and what was decoded at load, `loaded` what was in memory before the products, and
`released` after the file's pages were given back.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from make_synthetic_checkpoint import COMPONENTS, build
from torch import nn

from flux_sd.checkpoint import open_checkpoint
from flux_sd.load_plan import fill, keep_stored, plan_load
from flux_sd.quantized import QuantizedLinear
from flux_sd.versions import SDVersion

DTYPES = {"stored": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def status_bytes(field: str) -> int:
    """A field of /proc/self/status, such as VmRSS or VmHWM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def measure(
    component: str, config: object, path: Path, dtype: torch.dtype | None, packed: bool
) -> dict[str, float]:
    """Loads one component and reports bytes and seconds; `packed` ones are used as well."""
    before = status_bytes("VmRSS")
    started = time.perf_counter()
    module = build(component, config)
    with open_checkpoint(path) as checkpoint:
        plan = plan_load(component, module, config, checkpoint)
        if packed and dtype is not None:
            keep_stored(module, plan, dtype)
        fill(module, plan, dtype=dtype)
        stored = checkpoint.total_bytes
        seconds = time.perf_counter() - started
        loaded = status_bytes("VmRSS") - before
        if packed:
            multiply(module)
            plan.release()
        released = status_bytes("VmRSS") - before
    sizes = [tensor.nbytes for tensor in module.state_dict().values()]
    peak = status_bytes("VmHWM") - before
    return {
        "peak": peak,
        "kept": sum(sizes),
        "largest": max(sizes),
        "file": stored,
        "loaded": loaded,
        "released": released,
        "seconds": round(seconds, 2),
    }


@torch.inference_mode()
def multiply(module: nn.Module) -> None:
    """One row through every packed linear."""
    for layer in module.modules():
        if isinstance(layer, QuantizedLinear):
            layer(torch.ones(1, layer.weight.shape[1], dtype=layer.dtype))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("component", choices=sorted(COMPONENTS))
    parser.add_argument("path", type=Path)
    parser.add_argument("--model", default="flux-schnell")
    parser.add_argument("--depth", nargs=2, type=int, metavar=("DOUBLE", "SINGLE"))
    parser.add_argument("--hidden", type=int, help="another width of the transformer, in heads of 128")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--packed", action="store_true", help="packed weights stay packed, and are used")
    args = parser.parse_args(arguments)
    config = getattr(SDVersion.parse(args.model).info.flux, COMPONENTS[args.component])
    if args.depth:
        config = replace(config, depth=args.depth[0], depth_single_blocks=args.depth[1])
    if args.hidden:
        config = replace(config, hidden_size=args.hidden, num_heads=args.hidden // 128)
    print(json.dumps(measure(args.component, config, args.path, DTYPES[args.dtype], args.packed)))


if __name__ == "__main__":
    main()

"""Measures what a packed network costs: peak memory, seconds of a step, the share of decoding (Linux).

    measure_quantized.py FOLDER                                    the README's table; 13 GB of disk at a time
    measure_quantized.py FOLDER --case "transformer Q4_K"          one row of it
    measure_quantized.py FOLDER --model tiny-flux --keep           small files, left there

Each row writes a synthetic GGUF of the model's true shapes (tools/make_synthetic_gguf.py), loads it in a
process of its own through `Components`, as a generation does, and runs one stage: two steps at 256x256,
or two encodings of a whole prompt. The other networks are files of zeros, checked and never loaded.

`peak` is that process's VmHWM, Python, torch and mapped file pages included. What is promised:
peak <= 1.10 x file + 1.2 GB. `decoding` is the time inside `dequantize` over that of the second run, whose
pages are in memory. Where other programs keep a core busy, torch's threads wait for each other: seconds are
then only worth comparing under OMP_WAIT_POLICY=PASSIVE, and are longer all the same.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from make_synthetic_checkpoint import COMPONENTS, DIALECTS, write_component
from make_synthetic_gguf import DIALECTS as GGUF_DIALECTS
from make_synthetic_gguf import write_gguf
from measure_load import status_bytes
from torch import Tensor, nn

from flux_sd import quantized
from flux_sd.components import LoadOptions
from flux_sd.device import available_memory, choose_device, choose_dtype
from flux_sd.flux_loader import load_flux
from flux_sd.model_files import FLUX, ModelFiles
from flux_sd.numerics import reference
from flux_sd.sampling import State, denoise, get_noise, get_schedule
from flux_sd.versions import SDVersion, VersionInfo

ROOT = Path(__file__).resolve().parent.parent
TOKENIZERS = ROOT / "flux_sd" / "models" / "tiny_flux"  # looked at, not used
SIDE = 256  # pixels
ALLOWED = (1.10, 1.2e9)  # x the file, + bytes


@dataclass(frozen=True)
class Case:
    """One row: a role of the model in one block type."""

    role: str
    type_name: str

    def __str__(self) -> str:
        return f"{self.role} {self.type_name}"


CASES = (Case("transformer", "Q4_K"), Case("transformer", "Q8_0"), Case("t5", "Q8_0"))


@dataclass(frozen=True)
class Measured:
    """Bytes and seconds."""

    case: str
    file: int
    peak: int  # VmHWM of the whole process
    before: int  # its VmRSS when everything was imported and nothing loaded
    load: float
    first: float  # the step or the encoding, from a file that may not be in memory
    second: float
    decoding: float  # of the second
    dtype: str
    finite: bool

    @property
    def allowed(self) -> int:
        return int(ALLOWED[0] * self.file + ALLOWED[1])


# the process that is measured -----------------------------------------------------------------------------


@contextmanager
def decoding_time() -> Iterator[list[float]]:
    """Seconds of every call that decodes blocks, while it is open."""
    seconds: list[float] = []
    original = quantized.dequantize

    def timed(data: Tensor, type_name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        start = time.perf_counter()
        decoded = original(data, type_name, dtype)
        seconds.append(time.perf_counter() - start)
        return decoded

    quantized.dequantize = timed
    try:
        yield seconds
    finally:
        quantized.dequantize = original


@torch.inference_mode()
def run_stage(role: str, network: nn.Module, info: VersionInfo, dtype: torch.dtype) -> Tensor:
    """One step at SIDE x SIDE, or one encoding, of seeded noise. Returns what the network computed."""
    configs, generator = info.flux, torch.Generator().manual_seed(0)
    assert configs is not None
    length = info.t5_length or 512
    if role == "t5":
        ids = torch.randint(0, configs.t5.vocab_size, (1, length), generator=generator)
        return network(ids)
    txt = torch.randn(1, length, configs.transformer.context_in_dim, generator=generator).to(dtype)
    vec = torch.randn(1, configs.transformer.vec_in_dim, generator=generator).to(dtype)
    state = State.new(txt, vec, get_noise(0, SIDE, SIDE))
    times = get_schedule(info.steps, state.img.shape[1] if info.shift else None)
    return next(denoise(network, state, times, info.guidance)).velocity


def measure_here(case: Case, file: Path, info: VersionInfo, folder: Path) -> Measured:
    """Loads and runs in this process, which should have done nothing else."""
    before = status_bytes("VmRSS")
    paths = {role: other_file(folder, role) for role in FLUX.maps} | {case.role: file}
    files = ModelFiles(paths, {"clip": TOKENIZERS / "tokenizer", "t5": TOKENIZERS / "tokenizer_2"})
    device = choose_device("cpu")
    dtype = choose_dtype("auto", device, info.auto_dtype)
    start = time.perf_counter()
    components = load_flux(info, files, device, dtype, reference(), LoadOptions(automatic=True))
    network = components.network(case.role)
    load = time.perf_counter() - start
    seconds: list[float] = []
    for _ in range(2):
        with decoding_time() as decoding:
            start = time.perf_counter()
            output = run_stage(case.role, network, info, dtype)
            seconds.append(time.perf_counter() - start)
    peak = status_bytes("VmHWM")
    return Measured(
        case=str(case),
        file=file.stat().st_size,
        peak=peak,
        before=before,
        load=load,
        first=seconds[0],
        second=seconds[1],
        decoding=sum(decoding),
        dtype=str(dtype).removeprefix("torch."),
        finite=bool(output.isfinite().all()) and bool(output.any()),
    )


# the process that measures --------------------------------------------------------------------------------


def other_file(folder: Path, role: str) -> Path:
    return folder / f"{role}{'.gguf' if FLUX.maps[role] in GGUF_DIALECTS else '.safetensors'}"


def write_others(folder: Path, info: VersionInfo) -> None:
    """Files of zeros for the four roles: holes, which take no room on the disk. The large ones are GGUF, so
    that they are found to fit the memory."""
    for role, component in FLUX.maps.items():
        config, path = getattr(info.flux, COMPONENTS[component]), other_file(folder, role)
        if component in GGUF_DIALECTS:
            write_gguf(component, config, path, "Q8_0", None)
        else:
            write_component(component, config, DIALECTS["bfl"][component], path, "bf16", None)


def measure(case: Case, info: VersionInfo, folder: Path, keep: bool = False) -> Measured:
    """Writes the file, measures it in a new process, and removes it again."""
    folder.mkdir(parents=True, exist_ok=True)
    write_others(folder, info)
    file = folder / f"{info.key}-{case.role}-{case.type_name}.gguf"
    component = FLUX.maps[case.role]
    write_gguf(component, getattr(info.flux, COMPONENTS[component]), file, case.type_name)
    command = [
        sys.executable,
        __file__,
        str(folder),
        "--model",
        info.key,
        "--case",
        str(case),
        "--here",
        str(file),
    ]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    finally:
        if not keep:
            file.unlink()
    if done.returncode != 0:
        raise RuntimeError(f"{case} ended with {done.returncode}:\n{done.stderr}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def lacking(case: Case, info: VersionInfo, folder: Path) -> str | None:
    """Why this machine cannot measure a case, None if it can. Nothing is written to find out."""
    component = FLUX.maps[case.role]
    disk = {"flux_mmdit": 14e9, "t5": 6e9}[component] if info.key.startswith("flux-") else 1e8
    folder.mkdir(parents=True, exist_ok=True)
    free, memory = shutil.disk_usage(folder).free, available_memory(torch.device("cpu"))
    wanted = {"Q4_K": 0.6, "Q8_0": 1.1}[case.type_name] * disk + ALLOWED[1]
    if free < disk:
        return f"{case} needs {disk / 1e9:.0f} GB of disk, {free / 1e9:.1f} GB are free"
    if memory < wanted:
        return f"{case} needs {wanted / 1e9:.0f} GB of memory, {memory / 1e9:.1f} GB are free"
    return None


def table(rows: Sequence[Measured]) -> str:
    """Markdown."""
    lines = [
        "| stage | file | peak memory | allowed | load | first run | second run | decoding |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.case}, {row.dtype} | {row.file / 1e9:.2f} GB | {row.peak / 1e9:.2f} GB "
        f"| {row.allowed / 1e9:.2f} GB | {row.load:.1f} s | {row.first:.1f} s | {row.second:.1f} s "
        f"| {row.decoding / row.second:.0%} |"
        for row in rows
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folder", type=Path, help="where to write the files")
    parser.add_argument("--model", default="flux-dev")
    parser.add_argument("--case", choices=[str(case) for case in CASES], help="measure this one alone")
    parser.add_argument("--keep", action="store_true", help="leave the files there")
    parser.add_argument("--here", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    info = SDVersion.parse(args.model).info
    cases = [case for case in CASES if args.case in (None, str(case))]
    if args.here is not None:
        print(json.dumps(vars(measure_here(cases[0], args.here, info, args.folder))))
        return 0
    rows = []
    for case in cases:
        reason = lacking(case, info, args.folder)
        if reason is not None:
            print(reason, file=sys.stderr)
            continue
        rows.append(measure(case, info, args.folder, args.keep))
        print(json.dumps(vars(rows[-1])), file=sys.stderr)
    print(table(rows))
    return 0 if rows and all(row.finite and row.peak <= row.allowed for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())

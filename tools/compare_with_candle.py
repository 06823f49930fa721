"""Paints with flux_sd and with Candle from the same files and noise, and compares every stage.

    python tools/compare_with_candle.py PROGRAM [MODEL ...] [--dtype float32 bfloat16]

PROGRAM is the built `candle_reference` (tools/candle_reference, `cargo build --release`). Without MODEL both:

    tiny-flux     the embedded model: 128x128 pixels, 4 steps; seconds
    full-width    FLUX dev with 2 + 2 blocks, 2 layers of T5-XXL, CLIP-L and the autoencoder at the released
                  widths, filled with seeded values: 256x256 pixels, 4 steps; 15 minutes, 3.5 GB on disk, 8 GB

Our side runs under the preset `candle`. Each network is first run alone on what Candle itself gave its own,
each step's velocity from Candle's latents: in float32 they must agree within 2e-5 (relative L2 difference).
Then the whole run from the noise on must agree within 1e-4, and no byte of the picture may be off by more
than one level. bfloat16 is reported without a limit: there Candle's CPU backend sums a softmax in bfloat16,
which moves T5's states by a tenth (see `flux-sd numerics`), and decodes in float32, for it has no other
convolution. Exit code 1 where something is over.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import make_synthetic_checkpoint as synthetic
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import flux_sd
from flux_sd import GenerationRequest
from flux_sd.checkpoint import open_checkpoint
from flux_sd.compare import Tolerances, compare
from flux_sd.device import choose_device, choose_dtype
from flux_sd.flux_files import find_files
from flux_sd.flux_loader import FluxComponents
from flux_sd.model_loader import FluxModel
from flux_sd.numerics import candle
from flux_sd.sampling import SHIFT_AT_256, SHIFT_AT_4096, get_noise
from flux_sd.stage_inputs import StageInputs
from flux_sd.trace import trace, trace_stage
from flux_sd.versions import FluxConfigs, SDVersion, VersionInfo

TINY = Path(flux_sd.__file__).parent / "models" / "tiny_flux"
STORED = Path(__file__).resolve().parent.parent / "reference_outputs" / "candle"
FORWARD, LOOP = 2e-5, 1e-4  # relative differences that pass in float32
MODELS = ("tiny-flux", "full-width")
DTYPES = {"float32": "f32", "bfloat16": "bf16"}  # ours, Candle's


@dataclass(frozen=True)
class Subject:
    """One model that both programs can run."""

    name: str
    version: SDVersion
    info: VersionInfo
    folder: Path
    spec: dict[str, Any]  # for `candle_reference run`, but for dtype and noise; paths are absolute

    @contextmanager
    def open(self, dtype: str) -> Iterator[FluxModel]:
        """Our side of it."""
        device = choose_device("cpu")
        kind = choose_dtype(dtype, device)
        parts = FluxComponents.load(self.info, find_files(self.folder, {}), device, kind, candle())
        with FluxModel(self.version, parts) as model:
            yield model


@dataclass(frozen=True)
class Line:
    """One stage compared. `limit` infinite: reported only."""

    model: str
    dtype: str
    kind: str  # "forward" from Candle's own inputs, or "run" from the noise on
    stage: str
    difference: float  # relative L2; of token ids and bytes the largest difference
    limit: float

    @property
    def passes(self) -> bool:
        return self.difference <= self.limit


# ------------------------------------------------------------------------------------- what is run


def tiny_flux(prompt: str | None) -> Subject:
    """The embedded model, by the specification beside its weights."""
    spec = json.loads((TINY / "candle.json").read_text(encoding="utf-8"))
    for key in ("transformer", "t5_config", "t5_tokenizer", "clip_config", "clip_tokenizer", "ae"):
        spec[key] = str(TINY / spec[key])
    for key in ("t5", "clip"):
        spec[key] = [str(TINY / name) for name in spec[key]]
    spec["prompt"] = prompt or spec["prompt"]
    return Subject("tiny-flux", SDVersion.TINY_FLUX, SDVersion.TINY_FLUX.info, TINY, spec)


def full_width(folder: Path, prompt: str | None) -> Subject:
    """FLUX dev cut to 2 + 2 blocks and 2 layers of T5, in bfloat16; written to `folder` if it is not there.

    bfloat16 values are float32 values too, so both dtypes run the same weights. tiny-flux's tokenizers serve:
    their ids are ids of the larger vocabularies.
    """
    configs = SDVersion.FLUX_DEV.info.flux
    assert configs is not None
    configs = replace(
        configs,
        transformer=replace(configs.transformer, depth=2, depth_single_blocks=2),
        t5=replace(configs.t5, num_layers=2),
    )
    if not (folder / "tokenizer_2").exists():  # which is written last
        synthetic.write_model(configs, "flux-dev", folder, "bfl", "bf16", 0, None, None)
        for name in ("tokenizer", "tokenizer_2"):
            shutil.copytree(TINY / name, folder / name, dirs_exist_ok=True)
    info = replace(SDVersion.FLUX_DEV.info, flux=configs, width=256, height=256, steps=4)
    return Subject(
        "full-width", SDVersion.FLUX_DEV, info, folder, full_width_spec(info, configs, folder, prompt)
    )


def full_width_spec(
    info: VersionInfo, configs: FluxConfigs, folder: Path, prompt: str | None
) -> dict[str, Any]:
    """What Candle's program is to run, in the words of its structs."""
    transformer = asdict(configs.transformer)
    del transformer["out_channels"], transformer["rope_dtype"]  # fixed, and named by no field of Candle's
    vae = asdict(configs.vae) | {"resolution": info.width}
    del vae["use_quant_conv"]
    t5 = asdict(configs.t5) | {
        "dropout_rate": 0.0, "initializer_factor": 1.0, "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False, "is_encoder_decoder": True, "pad_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    preset = candle()
    return {
        "transformer": str(folder / "flux1-dev.safetensors"), "transformer_config": transformer,
        "t5": [str(folder / "text_encoder_2" / "model.safetensors")], "t5_config": t5,
        "t5_tokenizer": str(folder / "tokenizer_2" / "tokenizer.json"), "t5_length": preset.t5_length,
        "clip": [str(folder / "text_encoder" / "model.safetensors")], "clip_config": asdict(configs.clip),
        "clip_tokenizer": str(folder / "tokenizer" / "tokenizer.json"),
        "ae": str(folder / "ae.safetensors"), "ae_config": vae,
        "prompt": prompt or "a slice of pizza on a blue background",
        "height": info.height, "width": info.width, "steps": info.steps,
        "guidance": preset.guidance, "shift": [SHIFT_AT_256, SHIFT_AT_4096],
    }  # fmt: skip


def run_candle(program: Path, subject: Subject, dtype: str, noise: Tensor, work: Path) -> Path:
    """The record of Candle's run."""
    save_file({"latents": noise}, work / "noise.safetensors")
    spec = {**subject.spec, "dtype": DTYPES[dtype], "latents": "noise.safetensors"}
    (work / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
    out = work / "candle.safetensors"
    subprocess.run([program, "run", work / "spec.json", out], check=True, stdout=subprocess.DEVNULL)
    return out


# ---------------------------------------------------------------------------------- how it is compared


def forwards(
    model: FluxModel, subject: Subject, record: Path, limit: float, work: Path
) -> Iterator[tuple[str, float]]:
    """Every network alone, on what Candle gave its own: (stage, relative difference)."""
    parts, configs = model.components, subject.info.flux
    assert configs is not None
    steps, guidance = (
        subject.spec["steps"],
        subject.spec["guidance"] if configs.transformer.guidance_embed else None,
    )
    calls = [("clip", "clip.pooled", 0), ("t5", "t5.hidden", 0)]
    calls += [("transformer", f"step.{step}.velocity", step) for step in range(steps)]
    with open_checkpoint(record) as theirs:
        for stage, name, step in [*calls, ("vae-decode", "image", 0)]:
            inputs = StageInputs(theirs, configs, step)
            given = guidance if stage == "transformer" else None
            out = work / "stage.safetensors"
            trace_stage(parts, stage, inputs, out, guidance=given, patterns=[name], overwrite=True)
            with open_checkpoint(out) as ours:
                (row,) = compare(ours, theirs, tolerances=Tolerances(limit), patterns=[name]).rows
            yield name, row.relative if row.verdict != "not finite" else math.inf


def whole_run(
    model: FluxModel, subject: Subject, record: Path, noise: Tensor, work: Path
) -> Iterator[tuple[str, float]]:
    """From the prompt and the noise on: (stage, relative difference; of ids and bytes the largest)."""
    spec = subject.spec
    request = GenerationRequest(
        prompt=spec["prompt"], width=spec["width"], height=spec["height"], steps=spec["steps"], latents=noise,
        t5_length=spec["t5_length"],
    )  # fmt: skip
    trace(model, request, work / "ours.safetensors", like_candle=True, overwrite=True)
    ours, theirs = load_file(work / "ours.safetensors"), load_file(record)
    clip = theirs["clip.ids"].shape[1]  # not padded
    ours["clip.ids"] = ours["clip.ids"][:, :clip]
    for name in sorted(theirs.keys() & ours.keys(), key=place):
        a, b = ours[name].double(), theirs[name].double()
        if name.endswith(".ids") or name == "pixels":
            yield name, (a - b).abs().max().item()
        else:
            yield name, ((a - b).norm() / b.norm()).item()


def place(name: str) -> tuple[int, str]:
    """Where a stage comes in a run."""
    order = (
        "clip.ids",
        "t5.ids",
        "clip",
        "t5",
        "noise",
        "packed",
        "timesteps",
        "step",
        "latents",
        "image",
        "pixels",
    )
    return next(i for i, start in enumerate(order) if name.startswith(start)), name


def limit_of(name: str, dtype: str, kind: str) -> float:
    """The largest difference that passes."""
    if name.endswith(".ids") or name in ("noise", "timesteps"):
        return 0.0 if name != "timesteps" else 1e-12
    if dtype != "float32":
        return math.inf
    if name == "pixels":
        return 1.0
    return FORWARD if kind == "forward" or not name.startswith(("step", "latents", "image")) else LOOP


def compare_model(program: Path, subject: Subject, dtype: str, seed: int, work: Path) -> Iterator[Line]:
    """Every line of one model in one dtype."""
    noise = get_noise(seed, subject.spec["height"], subject.spec["width"])
    record = run_candle(program, subject, dtype, noise, work)
    with subject.open(dtype) as model:
        found = (
            ("forward", forwards(model, subject, record, limit_of("", dtype, "forward"), work)),
            ("run", whole_run(model, subject, record, noise, work)),
        )
        for kind, stages in found:
            for name, difference in stages:
                yield Line(subject.name, dtype, kind, name, difference, limit_of(name, dtype, kind))


def store(pixels: Tensor, prompt: str, seed: int) -> None:
    """Candle's picture [3,H,W] uint8, losslessly, and who made it from what."""
    STORED.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(STORED / "tiny_flux.png")
    manifest = {
        "made_by": "candle-transformers 0.11.1, float32, on x86-64",
        "command": "python tools/compare_with_candle.py PROGRAM tiny-flux --dtype float32 --store",
        "prompt": prompt,
        "seed": seed,
        "tolerance": 1,
        "why": "of 255: Candle truncates to bytes where we round, so a pixel may land on the next level",
    }
    (STORED / "tiny_flux.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("program", type=Path, metavar="PROGRAM")
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"{' or '.join(MODELS)}; default: both")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--prompt", help="default: a slice of pizza on a blue background")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", type=Path, help="for the full-width checkpoint and records; default: a temporary one"
    )
    parser.add_argument(
        "--store", action="store_true", help="keep Candle's picture of tiny-flux for the tests"
    )
    args = parser.parse_args(arguments)
    for name in args.models:  # argparse would refuse the empty list, were these its choices
        if name not in MODELS:
            parser.error(f"model {name!r} is unknown: choose {' or '.join(MODELS)}")
    return args


def show(line: Line) -> None:
    """Prints one line."""
    verdict = "" if line.passes else f"  OVER {line.limit:g}"
    words = f"{line.model:10}  {line.dtype:8}  {line.kind:7}  {line.stage:16}  {line.difference:.1e}"
    print(words + verdict, flush=True)


def main() -> int:
    """The command line."""
    arguments = parse_arguments()
    lines: list[Line] = []
    with ExitStack() as stack:
        work = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        for name in arguments.models or MODELS:
            tiny = name == "tiny-flux"
            subject = tiny_flux(arguments.prompt) if tiny else full_width(work / "model", arguments.prompt)
            for dtype in arguments.dtype:
                for line in compare_model(arguments.program.resolve(), subject, dtype, arguments.seed, work):
                    show(line)
                    lines.append(line)
                if arguments.store and tiny and dtype == "float32":
                    pixels = load_file(work / "candle.safetensors")["pixels"][0]
                    store(pixels, subject.spec["prompt"], arguments.seed)
    failed = sum(not line.passes for line in lines)
    print(f"{len(lines)} stages compared, {failed} over their limit")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

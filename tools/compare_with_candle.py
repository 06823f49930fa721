"""Paints with flux_sd and with Candle from the same files and noise, and compares every stage.

    python tools/compare_with_candle.py PROGRAM [MODEL ...] [--dtype float32 bfloat16]

PROGRAM is the built `candle_reference` (tools/candle_reference, `cargo build --release`). Without MODEL all:

    tiny-flux     the embedded model: 128x128 pixels, 4 steps; seconds
    tiny-sd       the embedded model: 128x128 pixels, 20 steps of DDIM (leading), guided; seconds. Candle
                  has no CLIP of its size and no convolution in bfloat16: both paint from our text states, in
                  float32
    full-width    FLUX dev with 2 + 2 blocks, 2 layers of T5-XXL, CLIP-L and the autoencoder at the released
                  widths, filled with seeded values: 256x256 pixels, 4 steps; 15 minutes, 3.5 GB on disk, 8 GB

Our side runs under the preset `candle`. Each network is first run alone on what Candle itself gave its own,
each step's prediction from Candle's latents: in float32 they must agree within 2e-5 (relative L2 difference).
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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import make_synthetic_checkpoint as synthetic
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from flux_sd import GenerationRequest
from flux_sd.checkpoint import open_checkpoint
from flux_sd.compare import Tolerances, compare
from flux_sd.components import LoadOptions
from flux_sd.device import choose_device, choose_dtype
from flux_sd.model_files import find_files
from flux_sd.model_loader import FAMILIES, Model, Opening, embedded_folder
from flux_sd.numerics import candle
from flux_sd.sampling import SHIFT_AT_256, SHIFT_AT_4096, get_noise
from flux_sd.stage_inputs import StageInputs
from flux_sd.steps import NoiseSource
from flux_sd.trace import trace, trace_stage
from flux_sd.versions import FluxConfigs, SDVersion, VersionInfo

TINY = embedded_folder(SDVersion.TINY_FLUX.info)
STORED = Path(__file__).resolve().parent.parent / "reference_outputs" / "candle"
FORWARD, LOOP = 2e-5, 1e-4  # relative differences that pass in float32
STEPS = 20  # of tiny-sd
PROMPT = "a slice of pizza on a blue background"
DTYPES = {"float32": "f32", "bfloat16": "bf16"}  # ours, Candle's


@dataclass(frozen=True)
class Subject:
    """One model that both programs can run."""

    name: str
    version: SDVersion
    info: VersionInfo
    folder: Path
    spec: dict[str, Any]  # for `candle_reference run`, but for dtype and noise; paths are absolute
    request: GenerationRequest  # the same for us, but for the noise
    noise: Callable[[int], Tensor]  # of a seed, as `latents` of the request
    calls: tuple[tuple[str, str, int], ...]  # networks that run alone: stage, what is compared, step
    guidance: float | None = None  # of the denoiser alone, where a record does not say
    dtypes: tuple[str, ...] = tuple(DTYPES)
    # Adds to the specification what our side makes for Candle's.
    prepare: Callable[[Model, GenerationRequest, Path], dict[str, Any]] = lambda *_: {}

    @contextmanager
    def open(self, dtype: str) -> Iterator[Model]:
        """Our side of it."""
        device = choose_device("cpu")
        files, kind = find_files(self.info, self.folder, {}), choose_dtype(dtype, device)
        opening = Opening(files, device, kind, candle(), LoadOptions())
        with FAMILIES[self.info.family].open(self.version, self.info, opening) as model:
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
    return flux_subject("tiny-flux", SDVersion.TINY_FLUX, SDVersion.TINY_FLUX.info, TINY, spec)


def flux_subject(
    name: str, version: SDVersion, info: VersionInfo, folder: Path, spec: dict[str, Any]
) -> Subject:
    """A FLUX model by its specification."""
    assert info.flux is not None
    request = GenerationRequest(
        prompt=spec["prompt"], width=spec["width"], height=spec["height"], steps=spec["steps"],
        t5_length=spec["t5_length"],
    )  # fmt: skip
    return Subject(
        name, version, info, folder, spec, request,
        noise=lambda seed: get_noise(seed, spec["height"], spec["width"]),
        calls=(
            ("clip", "clip.pooled", 0), ("t5", "t5.hidden", 0),
            *(("transformer", f"step.{step}.velocity", step) for step in range(spec["steps"])),
            ("vae-decode", "image", 0),
        ),
        guidance=spec["guidance"] if info.flux.transformer.guidance_embed else None,
    )  # fmt: skip


def tiny_sd(prompt: str | None) -> Subject:
    """The embedded Stable Diffusion model."""
    info = SDVersion.TINY_SD.info
    assert info.sd is not None and info.guidance is not None
    folder, vae = embedded_folder(info), info.sd.vae
    shape = (vae.z_channels, info.height // vae.downsampling, info.width // vae.downsampling)
    request = GenerationRequest(
        prompt=prompt or PROMPT, width=info.width, height=info.height, steps=STEPS, guidance=info.guidance,
        sampler="ddim", schedule="leading",
    )  # fmt: skip
    calls = (("unet", f"step.{step}.noise_pred", step) for step in range(STEPS))
    return Subject(
        "tiny-sd", SDVersion.TINY_SD, info, folder, sd_spec(folder, request), request,
        noise=lambda seed: NoiseSource([seed], shape).draw(),
        calls=(*calls, ("vae-decode", "image", 0)),
        guidance=info.guidance,
        dtypes=("float32",),
        prepare=text_states,
    )  # fmt: skip


def sd_spec(folder: Path, request: GenerationRequest) -> dict[str, Any]:
    """What Candle's program is to run, but for the text states."""
    file = "diffusion_pytorch_model.safetensors"
    networks = {role: str(folder / role / file) for role in ("unet", "vae")}
    return {
        "family": "sd",
        **networks,
        **{f"{role}_config": str(folder / role / "config.json") for role in networks},
        "scheduler": {"kind": request.sampler, "prediction": "epsilon", "spacing": request.schedule},
        "prompt": request.prompt, "steps": request.steps, "guidance": request.guidance,
    }  # fmt: skip


def text_states(model: Model, request: GenerationRequest, work: Path) -> dict[str, Any]:
    """Ours, as Candle's program is given them."""
    short = replace(request, steps=1)
    path = trace(model, short, work / "text.safetensors", patterns=["*clip.hidden"], overwrite=True).path
    read = load_file(path)
    save_file({"hidden": read["clip.hidden"], "negative": read["uncond.clip.hidden"]}, path)
    return {"hidden": path.name}


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
    spec = full_width_spec(info, configs, folder, prompt)
    return flux_subject("full-width", SDVersion.FLUX_DEV, info, folder, spec)


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
        "prompt": prompt or PROMPT,
        "height": info.height, "width": info.width, "steps": info.steps,
        "guidance": preset.guidance, "shift": [SHIFT_AT_256, SHIFT_AT_4096],
    }  # fmt: skip


def run_candle(program: Path, subject: Subject, model: Model, dtype: str, noise: Tensor, work: Path) -> Path:
    """The record of Candle's run."""
    save_file({"latents": noise}, work / "noise.safetensors")
    more = subject.prepare(model, subject.request, work)
    spec = {**subject.spec, **more, "dtype": DTYPES[dtype], "latents": "noise.safetensors"}
    (work / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
    out = work / "candle.safetensors"
    subprocess.run([program, "run", work / "spec.json", out], check=True, stdout=subprocess.DEVNULL)
    return out


# ---------------------------------------------------------------------------------- how it is compared


def forwards(
    model: Model, subject: Subject, record: Path, limit: float, work: Path
) -> Iterator[tuple[str, float]]:
    """Every network alone, on what Candle gave its own: (stage, relative difference)."""
    parts = model.components
    with open_checkpoint(record) as theirs:
        for stage, name, step in subject.calls:
            guidance = subject.guidance if stage in ("transformer", "unet") else None
            inputs = StageInputs(theirs, parts.config, step, guidance)
            out = work / "stage.safetensors"
            trace_stage(parts, stage, inputs, out, patterns=[name], overwrite=True)
            with open_checkpoint(out) as ours:
                (row,) = compare(ours, theirs, tolerances=Tolerances(limit), patterns=[name]).rows
            yield name, row.relative if row.verdict != "not finite" else math.inf


def whole_run(
    model: Model, subject: Subject, record: Path, noise: Tensor, work: Path
) -> Iterator[tuple[str, float]]:
    """From the prompt and the noise on: (stage, relative difference; of ids and bytes the largest)."""
    request = replace(subject.request, latents=noise)
    trace(model, request, work / "ours.safetensors", like_candle=True, overwrite=True)
    ours, theirs = load_file(work / "ours.safetensors"), load_file(record)
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
        "hidden",
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
    noise = subject.noise(seed)
    with subject.open(dtype) as model:
        record = run_candle(program, subject, model, dtype, noise, work)
        found = (
            ("forward", forwards(model, subject, record, limit_of("", dtype, "forward"), work)),
            ("run", whole_run(model, subject, record, noise, work)),
        )
        for kind, stages in found:
            for name, difference in stages:
                yield Line(subject.name, dtype, kind, name, difference, limit_of(name, dtype, kind))


def store(name: str, pixels: Tensor, prompt: str, seed: int) -> None:
    """Candle's picture [3,H,W] uint8 of an embedded model, losslessly, and who made it from what."""
    STORED.mkdir(parents=True, exist_ok=True)
    stem = "_".join(name.split("-"))
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(STORED / f"{stem}.png")
    manifest = {
        "made_by": "candle-transformers 0.11.1, float32, on x86-64",
        "command": f"python tools/compare_with_candle.py PROGRAM {name} --dtype float32 --store",
        "prompt": prompt,
        "seed": seed,
        "tolerance": 1,
        "why": "of 255: Candle truncates to bytes where we round, so a pixel may land on the next level",
    }
    (STORED / f"{stem}.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


SUBJECTS: dict[str, Callable[[str | None, Path], Subject]] = {
    "tiny-flux": lambda prompt, _: tiny_flux(prompt),
    "tiny-sd": lambda prompt, _: tiny_sd(prompt),
    "full-width": lambda prompt, work: full_width(work / "model", prompt),
}
MODELS = tuple(SUBJECTS)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("program", type=Path, metavar="PROGRAM")
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"{' or '.join(MODELS)}; default: all")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--prompt", help="default: a slice of pizza on a blue background")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", type=Path, help="for the full-width checkpoint and records; default: a temporary one"
    )
    parser.add_argument(
        "--store", action="store_true", help="keep Candle's picture of an embedded model for the tests"
    )
    args = parser.parse_args(arguments)
    for name in args.models:  # argparse would refuse the empty list, were these its choices
        if name not in MODELS:
            parser.error(f"model {name!r} is unknown: choose {' or '.join(MODELS)}")
    return args


def show(line: Line) -> None:
    """Prints one line."""
    verdict = "" if line.passes else f"  OVER {line.limit:g}"
    words = f"{line.model:10}  {line.dtype:8}  {line.kind:7}  {line.stage:18}  {line.difference:.1e}"
    print(words + verdict, flush=True)


def main() -> int:
    """The command line."""
    arguments = parse_arguments()
    lines: list[Line] = []
    with ExitStack() as stack:
        work = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        for name in arguments.models or MODELS:
            subject = SUBJECTS[name](arguments.prompt, work)
            for dtype in (kind for kind in arguments.dtype if kind in subject.dtypes):
                for line in compare_model(arguments.program.resolve(), subject, dtype, arguments.seed, work):
                    show(line)
                    lines.append(line)
                if arguments.store and subject.info.repo is None and dtype == "float32":
                    pixels = load_file(work / "candle.safetensors")["pixels"][0]
                    store(name, pixels, subject.spec["prompt"], arguments.seed)
    failed = sum(not line.passes for line in lines)
    print(f"{len(lines)} stages compared, {failed} over their limit")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Paints one caption with flux_sd and with Candle, from the same noise, and compares the pixels.

    python tools/compare_with_candle.py PROGRAM [--prompt TEXT] [--seed N]

PROGRAM is the built `candle_reference`, a small Rust program over candle-transformers 0.11.1 whose
`run SPEC OUT` reads a specification such as `candle.json` in the folder of the embedded model. Exit code 1
where token ids differ or a pixel differs by more than one step of 255.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import flux_sd
from flux_sd import GenerationRequest
from flux_sd.sampling import get_noise

FOLDER = Path(flux_sd.__file__).parent / "models" / "tiny_flux"
STORED = Path(__file__).resolve().parent.parent / "reference_outputs" / "candle"
PATHS = ("transformer", "t5_config", "t5_tokenizer", "clip_config", "clip_tokenizer", "ae")


def with_candle(program: Path, spec: dict[str, object], noise: Tensor, work: Path) -> dict[str, Tensor]:
    """Everything that Candle recorded while painting."""
    spec = {key: str(FOLDER / str(value)) if key in PATHS else value for key, value in spec.items()}
    for key in ("t5", "clip"):
        spec[key] = [str(FOLDER / name) for name in spec[key]]  # type: ignore[attr-defined]
    save_file({"latents": noise}, work / str(spec["latents"]))
    (work / "spec.json").write_text(json.dumps(spec))
    out = work / "candle.safetensors"
    subprocess.run(
        [str(program), "run", str(work / "spec.json"), str(out)], check=True, stdout=subprocess.DEVNULL
    )
    return load_file(out)


def with_flux_sd(prompt: str, noise: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What our pipeline recorded, and its pixels [3,H,W] uint8."""
    seen: dict[str, Tensor] = {}
    with flux_sd.load_model("tiny-flux", dtype="float32") as model:
        request = GenerationRequest(prompt=prompt, latents=noise)
        result = model.generate(request, tap=lambda name, tensor: seen.update({name: tensor.clone()}))[0]
    return seen, torch.from_numpy(np.array(result.image)).permute(2, 0, 1)


def store(pixels: Tensor, prompt: str, seed: int) -> None:
    """Candle's picture [3,H,W] uint8, losslessly, and who made it from what."""
    STORED.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(STORED / "tiny_flux.png")
    manifest = {
        "made_by": "candle-transformers 0.11.1, float32, on x86-64",
        "command": "python tools/compare_with_candle.py PROGRAM --store",
        "prompt": prompt,
        "seed": seed,
        "tolerance": 1,
        "why": "of 255: Candle truncates to bytes where we round, so a pixel may land on the next level",
    }
    (STORED / "tiny_flux.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("program", type=Path)
    parser.add_argument("--prompt", help="default: the specification's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", action="store_true", help="keep Candle's picture for the tests")
    arguments = parser.parse_args()
    spec = json.loads((FOLDER / "candle.json").read_text(encoding="utf-8"))
    spec["prompt"] = arguments.prompt or spec["prompt"]
    noise = get_noise(arguments.seed, spec["height"], spec["width"])
    with tempfile.TemporaryDirectory() as work:
        theirs = with_candle(arguments.program.resolve(), spec, noise, Path(work))
    ours, pixels = with_flux_sd(spec["prompt"], noise)

    clip = theirs["clip.ids"].long()  # not padded
    same_ids = torch.equal(theirs["t5.ids"].long(), ours["t5.ids"]) and torch.equal(
        clip, ours["clip.ids"][:, : clip.shape[1]]
    )
    difference = (theirs["pixels"][0].int() - pixels.int()).abs()
    for name in ("t5.hidden", "clip.pooled", "step.0.velocity", "step.3.velocity", "latents", "image"):
        a, b = ours[name].double(), theirs[name].double()
        print(f"{name}: relative difference {((a - b).norm() / b.norm()).item():.1e}")
    if arguments.store:
        store(theirs["pixels"][0], spec["prompt"], arguments.seed)
    ids = "equal" if same_ids else "DIFFER"
    print(f"token ids {ids}; pixels differ by at most {difference.max().item()} of 255")
    sys.exit(0 if same_ids and difference.max() <= 1 else 1)


if __name__ == "__main__":
    main()

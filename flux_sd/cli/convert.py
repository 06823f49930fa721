"""`flux-sd convert`: a checkpoint in another container, number type or dialect. Floor 10."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..targets import TARGETS
from .console import Console, Interrupt, ProgressBars, gigabytes, printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..convert import Conversion

_NAMES = tuple(TARGETS)
EPILOG = f"""TYPE is one of
  {", ".join(_NAMES[:7])},
  {", ".join(_NAMES[7:13])},
  {", ".join(_NAMES[13:])}

examples:
  flux-sd convert flux1-dev.safetensors flux1-dev-Q8_0.gguf --to gguf:Q8_0
  flux-sd convert FLUX.1-dev/transformer flux1-dev.safetensors --to safetensors:bf16 --dialect bfl
      a folder with shards becomes one file under the authors' names
  flux-sd convert text_encoder_2 t5xxl-Q4_K.gguf --to gguf:Q4_K --dialect llama_cpp
  flux-sd convert v1-5-pruned.ckpt sd15-unet.safetensors --to safetensors:f16 --component unet
      the UNet of an original checkpoint, read by torch's weights-only unpickler
  flux-sd convert flux1-dev-fp8.safetensors ae.safetensors --to safetensors:f32 --component vae
      one component of a file that holds several

As in most files of others, a quantised file keeps in 16 bits what is no matrix or too narrow for blocks, and
the first and last layers of FLUX; biases and norms of a GGUF file are float32. Tensors that have the type
already are copied byte for byte. Memory stays small whatever the size of the file; OUT appears when it is
complete. `flux-sd maps show` lists the dialects."""


def register(commands: Any) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser(
        "convert",
        usage="flux-sd convert IN OUT --to TYPE [options]",
        help="write a checkpoint in another container, number type or dialect",
        description="Writes a checkpoint in another container, number type or dialect.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    parser.add_argument("source", metavar="IN", type=Path, help="a file, a shard index, or a folder of one")
    parser.add_argument("output", metavar="OUT", type=Path, help="the file to write, .gguf or .safetensors")
    parser.add_argument("--to", metavar="TYPE", required=True, help="container and number type, see below")
    parser.add_argument("--dialect", metavar="NAME", help="whose names to write (default: as in IN)")
    parser.add_argument(
        "--component",
        metavar="NAME",
        help="transformer, unet, t5, clip or vae, where IN holds several; of SDXL's two text encoders "
        "clip.hf or clip.openclip",
    )
    parser.add_argument("--overwrite", "--force", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--quiet", action="store_true", help="print errors only")


def run(args: argparse.Namespace) -> int:
    """Carries out `convert`."""
    console = Console(args.quiet, args.json)
    bars = ProgressBars(console)
    start = time.perf_counter()
    with Interrupt() as interrupt:
        from ..convert import convert
        from ..model_files import FLUX, SDXL

        try:
            done = convert(
                args.source,
                args.output,
                args.to,
                dialect=args.dialect,
                component=(SDXL.maps | FLUX.maps).get(args.component, args.component),
                overwrite=args.overwrite,
                cancel=interrupt.token(),
                on_progress=_progress(bars),
            )
        finally:
            bars.close()
    seconds = time.perf_counter() - start
    console.line(summary(done, seconds))
    for reason, count in Counter(done.ignored.values()).items():
        console.note(f"left out: {count} tensor{'s' * (count > 1)}: {reason}")
    for note in done.notes:
        console.note(f"note: {printable(note)}")
    console.document(document(done, seconds))
    return 0


def _progress(bars: ProgressBars) -> Callable[[int, int], None]:
    from ..request import Progress

    return lambda done, total: bars(Progress("convert", done, total))


def summary(done: Conversion, seconds: float) -> str:
    """One line: what was written, of what types, and how much smaller it is."""
    types = ", ".join(f"{count} {dtype}" for dtype, count in sorted(done.types.items()))
    names = done.written if done.found == done.written else f"{done.found} as {done.written}"
    sizes = f"{gigabytes(done.bytes_in)} -> {gigabytes(done.bytes_out)}"
    return f"{done.path}: {names}, {sum(done.types.values())} tensors ({types}), {sizes} in {seconds:.0f} s"


def document(done: Conversion, seconds: float) -> dict[str, Any]:
    """The same for programs."""
    return {
        "file": str(done.path),
        "to": done.target.name,
        "from_map": done.found,
        "map": done.written,
        "types": dict(done.types),
        "bytes_in": done.bytes_in,
        "bytes_out": done.bytes_out,
        "ignored": dict(done.ignored),
        "notes": list(done.notes),
        "seconds": round(seconds, 3),
    }

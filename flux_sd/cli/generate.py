"""`flux-sd generate`: text in, pictures out. Floor 10."""

from __future__ import annotations

import argparse
import secrets
import shlex
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OutputError, RequestError
from . import arguments
from .console import Console, Interrupt, ProgressBars

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from ..request import CancelToken, Event, GenerationRequest, Result
    from ..versions import SDVersion

EPILOG = """examples:
  flux-sd generate "a slice of pizza on a blue background"
      paints with the small built-in model into flux_sd_0001.png, then flux_sd_0002.png, ...
  flux-sd generate "a red apple, green background" -o apple.png --batch 4 --seed 7
      four pictures, apple-1.png to apple-4.png from seeds 7 to 10, and apple-sheet.png that shows them all
  flux-sd generate "a lighthouse at dusk" --model flux-schnell --size 768x512
      a released model: downloaded at first use (`flux-sd models` says how much that is)
  flux-sd generate "a lighthouse at dusk" --model flux-dev --path ~/flux-dev --steps 28 --preview-every 4
      the same from a folder of your own, with a look at the picture after every fourth step
  flux-sd generate "a watercolour" --model sdxl --init-image photo.png --strength 0.6 --negative-prompt blur
      Stable Diffusion, beginning from a picture, away from what a second text says
  flux-sd generate "a red door" --model sd15-inpaint --init-image house.png --mask door.png
      only what is white in door.png is repainted
  flux-sd generate "a red door" --model flux-canny --control-image lines.png
      along the lines of a picture, which another program drew
  flux-sd generate "make it night" --variant kontext --path ~/kontext --reference house.png
      a picture changed as the text says
  flux-sd generate "a fox" --unet mine.safetensors --path ~/sd15 --sampler dpm++_2m --schedule karras
      a UNet of your own, with the rest of a model from a folder

Each picture carries its prompt, seed and settings; `flux-sd replay FILE.png` paints it again and compares."""
OUTPUT_OPTIONS = {"-o": 1, "--output": 1, "--latents-out": 1, "--overwrite": 0}  # and how many words follow


def register(commands: Any) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser(
        "generate",
        usage="flux-sd generate PROMPT [options]",
        help="paint pictures from a text",
        description="Paints one or more pictures from a text and writes them as PNG.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    parser.add_argument("prompt", metavar="PROMPT", type=arguments.prompt, help="what to paint, in quotes")
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="one that `flux-sd models` lists (default: what the files given are of; without any tiny-flux, "
        "which is built in)",
    )
    _add_order_options(parser)
    arguments.add_picture_options(parser)
    _add_output_options(parser)
    arguments.add_model_options(parser)


def _add_order_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("how many, and which").add_argument
    add("--seed", type=arguments.seed, metavar="N",
        help="the same seed paints the same picture (default: drawn)")  # fmt: skip
    add("--batch", type=arguments.whole, default=1, metavar="N",
        help="how many pictures, from seeds N, N+1, ... (default: 1)")  # fmt: skip
    add("--batched", action=argparse.BooleanOptionalAction, default=None,
        help="compute all pictures of a batch at once; they may differ in the last bits from "
        "pictures painted alone (default: on a GPU)")  # fmt: skip
    add("--width", type=arguments.whole, metavar="N", help="pixels, instead of --size")
    add("--height", type=arguments.whole, metavar="N", help="pixels, instead of --size")
    add("--strict-prompt", action="store_true", help="stop if the text is too long, instead of cutting it")


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("output").add_argument
    add(
        "-o",
        "--output",
        type=Path,
        metavar="FILE.png",
        help="(default: flux_sd_0001.png or the next free number)",
    )
    add("--overwrite", action="store_true", help="replace files that exist (default: refuse)")
    add("--preview", action="store_true",
        help="show the picture so far in NAME.preview.png after every step; removed at the end")  # fmt: skip
    add("--preview-every", type=arguments.whole, metavar="N", help="the same after every N-th step only")
    add("--latents-out", type=Path, metavar="FILE",
        help="also write the noise that the run starts from, as --latents-in takes it, and in the same file "
        "'denoised', what the decoder gets")  # fmt: skip
    add("--timings", action="store_true", help="print how long each stage took")
    add("--verbose", action="store_true", help="print what each part's weights take on disk and in memory")
    add("--quiet", action="store_true", help="print nothing but errors")
    add(
        "--json",
        action="store_true",
        help="print one JSON object with files, seeds, timings and notes on stdout",
    )


@dataclass
class Output:
    """The files of one run. `wanted` is what -o said, or None."""

    wanted: Path | None
    overwrite: bool
    batch: int
    latents: Path | None
    previews: bool
    base: Path = field(init=False)
    written: list[Path] = field(init=False, default_factory=list)  # pictures, then the sheet

    def __post_init__(self) -> None:
        from .. import image

        self.base = image.numbered_path() if self.wanted is None else self.wanted
        for path in [*self.pictures(), *([self.sheet()] if self.batch > 1 else [])]:
            image.check_output(path, self.overwrite)
        if self.latents is not None:
            image.check_output(self.latents, self.overwrite, ".safetensors")
        if self.previews:
            image.check_output(self.preview(), self.overwrite)

    def pictures(self) -> list[Path]:
        """name.png, or name-1.png, name-2.png, ..."""
        if self.batch == 1:
            return [self.base]
        return [self._beside(f"-{i + 1}") for i in range(self.batch)]

    def sheet(self) -> Path:
        return self._beside("-sheet")

    def preview(self) -> Path:
        return self._beside(".preview")

    def _beside(self, ending: str) -> Path:
        return self.base.with_name(f"{self.base.stem}{ending}{self.base.suffix}")

    def write_pictures(self, results: list[Result], console: Console) -> None:
        """All pictures, each with its record, and the sheet of a batch; `written` says where they are."""
        from .. import image

        pictures = [result.image for result in results]
        records = [{**r.metadata, "pixels_sha256": image.pixel_hash(r.image)} for r in results]
        self._write(pictures[0], self.pictures()[0], records[0], console)
        for picture, record, path in list(zip(pictures, records, self.pictures(), strict=True))[1:]:
            self._write(picture, path, record, console)
        if self.batch > 1:
            labels = [f"seed {record['seed']}" for record in records]
            sheet = image.contact_sheet(pictures, labels)
            self._write(sheet, self.sheet(), {"sheet": records}, console)

    def _write(self, picture: Image, path: Path, record: dict[str, Any], console: Console) -> None:
        """Takes a free number where another program took the name meanwhile: no picture is lost."""
        from .. import image

        while True:
            try:
                image.save_png(picture, path, record, self.overwrite)
            except OutputError:
                if self.overwrite or not path.is_file():
                    raise
                taken, path = path, self._free(path)
                console.note(f"{taken} appeared while this was painted; writing {path} instead")
            else:
                self.written.append(path)
                return

    def _free(self, path: Path) -> Path:
        """Another name. Of the first picture it is a new name for the whole run; the others keep theirs."""
        from .. import image

        if self.written:
            return image.numbered_path(path.parent, path.stem)
        stem = "flux_sd" if self.wanted is None else self.wanted.stem
        self.base = image.numbered_path(self.base.parent, stem)
        return self.pictures()[0]


class Listener:
    """Shows progress, and writes previews."""

    def __init__(self, console: Console, output: Output) -> None:
        self.bars, self.output = ProgressBars(console), output
        self.shown = False  # whether a preview was written, and is ours to remove

    def __call__(self, event: Event) -> None:
        from .. import image
        from ..request import Preview

        self.bars(event)
        if isinstance(event, Preview) and self.output.previews:
            image.save_png(event.picture, self.output.preview(), overwrite=True)
            self.shown = True

    def close(self) -> None:
        self.bars.close()
        if self.shown:
            self.output.preview().unlink(missing_ok=True)


def run(args: argparse.Namespace) -> int:
    """Carries out the command."""
    console = Console(args.quiet, args.json)
    with Interrupt() as interrupt:
        from ..model_loader import check_request

        cancel = interrupt.token()
        request = _request(args)
        version = arguments.chosen_version(args, args.model)
        check_request(version, request, args.numerics, args.lora)
        output = Output(
            args.output, args.overwrite, args.batch, args.latents_out, request.preview_every is not None
        )
        start = time.perf_counter()
        results, timings = _paint(args, version, request, Listener(console, output), cancel)
        cancel.check()  # the last moment: from here on files appear
        writing = time.perf_counter()
        _write(results, output, args, console)
        end = time.perf_counter()
    timings |= {"write": end - writing, "total": end - start}
    _report(args, results, output, timings, console)
    return 0


def _request(args: argparse.Namespace) -> GenerationRequest:
    from ..request import GenerationRequest

    if args.size is not None and (args.width is not None or args.height is not None):
        raise RequestError("--size and --width or --height were given: use one or the other")
    fields = arguments.request_fields(args)
    fields |= {} if args.size is not None else {"width": args.width, "height": args.height}
    return GenerationRequest(
        prompt=args.prompt,
        seed=secrets.randbelow(2**32) if args.seed is None else args.seed,
        batch=args.batch,
        batched=args.batched,
        strict_prompt=args.strict_prompt,
        preview_every=args.preview_every or (1 if args.preview else None),
        **fields,
    )


def _paint(
    args: argparse.Namespace,
    version: SDVersion,
    request: GenerationRequest,
    listener: Listener,
    cancel: CancelToken,
) -> tuple[list[Result], dict[str, float]]:
    """Loads and runs the model. Returns the pictures and the seconds of each stage."""
    computing = arguments.computing(args)
    start = time.perf_counter()
    try:
        with closing(arguments.load(args, version, computing, cancel, listener)) as model:
            opened = time.perf_counter() - start
            results = model.generate(request, on_event=listener, cancel=cancel)
    finally:
        listener.close()
    timings = dict(results[0].timings)
    return results, {**timings, "load": opened + timings.get("load", 0.0)}


def _write(results: list[Result], output: Output, args: argparse.Namespace, console: Console) -> None:
    for result in results:
        if args.latents_in is not None:
            result.metadata["latents_sha256"] = tensor_hash(result.noise)
        for name, path in given_files(args).items():
            result.metadata[f"{name}_file"] = path.name
    output.write_pictures(results, console)
    if output.latents is not None:
        write_latents(results, output.latents, output.overwrite)


def given_files(args: argparse.Namespace) -> dict[str, Path]:
    """The files that a picture began from: a record names them, for whoever paints it again."""
    given = {"latents": args.latents_in, **{name: getattr(args, name) for name in arguments.ORIGINALS}}
    return {name: path for name, path in given.items() if path is not None}


def _report(
    args: argparse.Namespace,
    results: list[Result],
    output: Output,
    timings: dict[str, float],
    console: Console,
) -> None:
    notes = list(dict.fromkeys(note for result in results for note in result.notes))
    seeds = [result.metadata["seed"] for result in results]
    for note in notes:
        console.note(f"note: {note}")
    if args.seed is None and args.latents_in is None:
        console.note(f"seed {seeds[0]}; to paint this again: {repeat_command(sys.argv[1:], args, seeds[0])}")
    for path in output.written:
        console.line(str(path))
    if args.verbose:
        console.note(weight_table(results[0].metadata.get("weights", {})))
    if args.timings:
        console.note(timing_table(timings))
    console.document(
        {
            "files": [str(path) for path in output.written[: args.batch]],
            "sheet": str(output.written[-1]) if args.batch > 1 else None,
            "latents": None if output.latents is None else str(output.latents),
            "seeds": seeds,
            "timings": {stage: round(seconds, 6) for stage, seconds in timings.items()},
            "notes": notes,
            "records": [result.metadata for result in results],
        }
    )


def timing_table(timings: dict[str, float]) -> str:
    """One line per stage, in the order in which they run."""
    known = ("load", "encode", "denoise", "decode", "write", "total")
    stages = [*(s for s in timings if s not in known), *(s for s in known if s in timings)]
    return "\n".join(f"{stage:<10}{timings[stage]:8.3f} s" for stage in stages)


def weight_table(weights: Mapping[str, Mapping[str, Any]]) -> str:
    """One line for each part: bytes on disk, bytes in memory while it runs, stored types; and each tensor
    that --fill-from gave."""
    lines = [f"{'weights':<12}{'on disk':>12}{'in memory':>12}  types"]
    for role, row in weights.items():
        types = ", ".join(f"{count} {name}" for name, count in row["types"].items())
        lines.append(f"{role:<12}{row['stored'] / 1e6:9.1f} MB{row['memory'] / 1e6:9.1f} MB  {types}")
        lines += [f"  {name} from --fill-from" for name in row.get("filled", ())]
    return "\n".join(lines)


def repeat_command(argv: list[str], args: argparse.Namespace, seed: int) -> str:
    """The words of this run with the seed that was drawn, and without the files that it has now written."""
    end = (
        argv.index("--") if "--" in argv else len(argv)
    )  # what follows is the prompt, whatever it looks like
    words, skip = [], 0
    for word in argv[:end]:
        name = word.partition("=")[0] if word.startswith("--") else word[:2] if word[:1] == "-" else word
        if skip:
            skip -= 1
        elif name in OUTPUT_OPTIONS:
            skip = OUTPUT_OPTIONS[name] if word == name else 0
        else:
            words.append(word)
    return shlex.join(["flux-sd", *words, "--seed", str(seed), *argv[end:]])


# --------------------------------------------------------------------------------------- latents


def write_latents(results: list[Result], path: Path, overwrite: bool) -> None:
    """ "latents", the starting noise, and "denoised", the end of the run: float32 [B,C,H/8,W/8] each."""
    import torch
    from safetensors.torch import save

    from .. import image

    noise, denoised = ([r.noise for r in results], [r.latents for r in results])
    content = save({"latents": torch.stack(noise).float(), "denoised": torch.stack(denoised).float()})

    def write(file: Any) -> None:
        file.write(content)

    image.write_file(path, write, overwrite)


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of the values as float32."""
    import hashlib

    return hashlib.sha256(tensor.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()

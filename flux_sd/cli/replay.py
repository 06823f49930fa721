"""`flux-sd replay`: paints a picture again from its record and compares. Floor 10."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AdapterError, OutputError, RequestError
from . import arguments
from .console import Console, Interrupt, ProgressBars
from .generate import tensor_hash

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from ..request import CancelToken, GenerationRequest, Result

EPILOG = """examples:
  flux-sd replay pizza.png
      prints "bit-equal", or what differs: versions, device, dtype, weight files, settings
  flux-sd replay apple-3.png -o again.png
      one picture of a batch is painted alone, from its own seed
  flux-sd replay lighthouse.png --path ~/models/flux-dev
      a record holds no paths: a model that was loaded from your own files needs them again
  flux-sd replay door.png --init-image house.png --mask mask.png
      nor pictures: those that it began from are given again, and known by their pixels

exit code: 0 if bit-equal, 1 if not."""
# Fields of a request that a record holds under their own names, where the family has them.
RECORDED = (
    "width", "height", "steps", "guidance", "t5_length", "negative_prompt", "guidance_rescale", "sampler",
    "schedule", "strength", "composite", "fit",
)  # fmt: skip
NEEDED = {"prompt": str, "model": str, "seed": int, "width": int, "height": int, "steps": int}


def register(commands: Any) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser(
        "replay",
        usage="flux-sd replay FILE.png [options]",
        help="paint a picture again from what it records, and compare",
        description="Reads the settings inside a PNG, paints it again and compares the pixels.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    parser.add_argument("file", type=Path, metavar="FILE.png", help="a picture that `flux-sd generate` wrote")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.png", help="also write the new picture")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a file that exists (default: refuse)"
    )
    parser.add_argument(
        "--latents-in", type=Path, metavar="FILE", help="the noise, if the picture began from a file"
    )
    arguments.add_originals(parser.add_argument, "the same as then, if the picture began from one")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors; see the exit code")
    arguments.add_model_options(parser, recorded=True)


def run(args: argparse.Namespace) -> int:
    """Carries out the command: 0 if bit-equal, 1 if not."""
    console = Console(args.quiet)
    with Interrupt() as interrupt:
        cancel = interrupt.token()
        from .. import image

        record = read_settings(args.file)
        if args.output is not None:
            image.check_output(args.output, args.overwrite)
        result = _paint_again(args, record, console, cancel)
        cancel.check()
        fresh = {**result.metadata, "pixels_sha256": image.pixel_hash(result.image)}
        if args.output is not None:
            image.save_png(result.image, args.output, fresh, args.overwrite)
    lines = compare(image.open_picture(args.file), record, result.image, fresh)
    console.line(f"{args.file}: " + "\n  ".join(lines or ["bit-equal"]))
    return 1 if lines else 0


def read_settings(path: Path) -> dict[str, Any]:
    """The record of a single picture. Raises OutputError if it lacks what a run needs."""
    from .. import image

    record = image.read_record(path)
    if "sheet" in record:
        raise OutputError(f"{str(path)!r} is the contact sheet of a batch: replay one of its pictures")
    lacking = [name for name, kind in NEEDED.items() if not isinstance(record.get(name), kind)]
    if lacking:
        raise OutputError(f"the record in {str(path)!r} lacks {', '.join(lacking)}: it cannot be repeated")
    if not _are_loras(record.get("loras", [])):
        text = f"the record in {str(path)!r} has 'loras' that are no list of adapters, each with name, "
        raise OutputError(text + "fingerprint, strength and applied: it was edited and cannot be repeated")
    return record


def _are_loras(found: Any) -> bool:
    """Whether a record's `loras` are as `lora.adapters.Applied` describes them."""
    return isinstance(found, list) and all(
        isinstance(lora, dict)
        and all(isinstance(lora.get(name), str) for name in ("name", "fingerprint"))
        and _are_numbers([lora.get("strength")])
        and isinstance(lora.get("applied"), dict)
        and all(
            isinstance(counts, list) and len(counts) == 2 and _are_numbers(counts)
            for counts in lora["applied"].values()
        )
        for lora in found
    )


def _are_numbers(values: list[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _paint_again(
    args: argparse.Namespace, record: dict[str, Any], console: Console, cancel: CancelToken
) -> Result:
    from ..versions import SDVersion

    bars = ProgressBars(console)
    request = _request(args, record)
    try:
        version = SDVersion.parse(record["model"])
        with closing(arguments.load(args, version, _computing(args, record), cancel, bars)) as model:
            result = model.generate(request, on_event=bars, cancel=cancel)[0]
    finally:
        bars.close()
    keys = ("latents_file", "latents_sha256", *(f"{name}_file" for name in arguments.ORIGINALS))
    result.metadata |= {key: record[key] for key in keys if key in record}
    return result


def _computing(args: argparse.Namespace, record: dict[str, Any]) -> arguments.Computing:
    """Options of this command first, then the record, then what `generate` would take."""
    # Weights that kept their stored dtype were an automatic choice; naming a dtype would forbid it.
    dtype = "auto" if record.get("stored_dtype_kept") else record.get("dtype", "auto")
    return arguments.Computing(
        device=args.device or record.get("device", "auto"),
        dtype=args.dtype or dtype,
        numerics=args.numerics or record.get("numerics", "reference"),
        quantized=record.get("quantized", False),
        prediction=args.prediction or record.get("prediction"),
        loras=_loras(args.lora, record),
        lora_partial=any(
            some < every for lora in record.get("loras", ()) for some, every in lora["applied"].values()
        ),
    )


def _request(args: argparse.Namespace, record: dict[str, Any]) -> GenerationRequest:
    from ..request import GenerationRequest

    same: dict[str, Any] = {name: record.get(name) for name in RECORDED}
    pictures: dict[str, Any] = {
        name: _original(name, getattr(args, name), record) for name in arguments.ORIGINALS
    }
    return GenerationRequest(
        prompt=record["prompt"],
        seed=record["seed"],
        latents=_latents(args.latents_in, record),
        vae_tiling=record.get("vae_tiling") or None,  # one that ran whole may need tiles on this machine
        **same,
        **pictures,
    )


def _latents(path: Path | None, record: dict[str, Any]) -> Tensor | None:
    """The row of the file that the record's hash names, as a batch of one."""
    wanted = record.get("latents_sha256")
    if wanted is None and path is None and record.get("latents") != "given":
        return None
    if path is None:
        name = record.get("latents_file", "a file")
        raise RequestError(f"this picture began from the noise in {name}: give it with --latents-in")
    noise = arguments.read_latents(path)
    rows: list[Tensor] = [row for row in noise if wanted is None or tensor_hash(row) == wanted]
    if not rows:
        raise RequestError(f"{str(path)!r} does not hold the noise that this picture began from")
    return rows[0][None]


def _loras(
    given: Sequence[tuple[Path, float | None]], record: Mapping[str, Any]
) -> list[tuple[Path, float | None]]:
    """The adapters that the record names by their fingerprints, in its order, as strong as there. Raises
    AdapterError where one is not given, or one that it does not name."""
    from ..lora.adapters import describe

    files = [(path, strength, describe(path)["fingerprint"]) for path, strength in given]
    found: list[tuple[Path, float | None]] = []
    for wanted in record.get("loras", ()):
        then = f"{wanted['name']} at the strength {wanted['strength']:g}"
        same = [(path, strength) for path, strength, print_ in files if print_ == wanted["fingerprint"]]
        if not same:
            raise AdapterError(f"this picture was painted with the adapter {then}: give it with --lora")
        # The same file may have acted several times: the one with its strength, else one without any.
        fits = [path for asked in (wanted["strength"], None) for path, strength in same if strength == asked]
        if not fits:
            raise AdapterError(f"this picture was painted with the adapter {then}: leave the strength out")
        found.append((fits[0], wanted["strength"]))
    others = [path for path, _, _ in files if path not in [path for path, _ in found]]
    if others:
        raise AdapterError(f"this picture was painted without the adapter {str(others[0])!r}: leave it out")
    return found


def _original(name: str, path: Path | None, record: dict[str, Any]) -> Image | None:
    """The picture that the record names by the hash of its pixels. Raises RequestError where it is not
    given, or another."""
    from .. import image
    from ..canvas import GROUNDS

    wanted, option = record.get(name), arguments.option_of(name)
    if wanted is None:
        if path is not None:
            raise RequestError(f"this picture began from no {option}: leave it out")
        return None
    if path is None:
        file = record.get(f"{name}_file", "a file")
        raise RequestError(f"this picture began from the picture in {file}: give it with {option}")
    found = image.open_picture(path)
    if image.pixel_hash(image.to_rgb(found, GROUNDS.get(name, "white"))) != wanted:
        raise RequestError(f"{str(path)!r} is not the {option} that this picture began from: pixels differ")
    return found


def compare(then: Image, record: Mapping[str, Any], now: Image, fresh: Mapping[str, Any]) -> list[str]:
    """Nothing if the pixels are equal; else how far apart, and everything recorded that has changed."""
    from .. import image

    if then.size == now.size and image.pixel_hash(then) == image.pixel_hash(now):
        return []
    lines = [_distance(then, now)]
    if record.get("pixels_sha256", image.pixel_hash(then)) != image.pixel_hash(then):
        lines.append("the file's pixels are not those that its record was written for: it was edited since")
    changed = list(changes(record, fresh))
    return lines + (changed or ["nothing else that is recorded has changed"])


def _distance(then: Image, now: Image) -> str:
    from .. import image

    if then.size != now.size:
        return f"is {then.width}x{then.height} pixels, painted again {now.width}x{now.height}"
    count, most = image.difference(now, then)
    return f"differs in {count} of {then.width * then.height} pixels, by at most {most} of 255"


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """One line for every entry of two records that is not the same."""
    old, new = dict(flatten(then)), dict(flatten(now))
    for name in sorted(old.keys() | new.keys()):
        if name != "pixels_sha256" and old.get(name) != new.get(name):
            yield f"{name}: {_show(old, name)} then, {_show(new, name)} now"


def _show(entries: Mapping[str, Any], name: str) -> str:
    return str(entries[name]) if name in entries else "not recorded"


def flatten(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """{"files": {"vae": [{"name": x}]}} -> ("files.vae.0.name", x)"""
    for key, value in record.items():
        if isinstance(value, list | tuple):
            value = {str(i): item for i, item in enumerate(value)}
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value

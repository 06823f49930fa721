"""Options that several commands share, and how their values are read. Floor 10."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..numerics import PRESETS

if TYPE_CHECKING:
    from ..model_loader import LoadedModel
    from ..request import CancelToken, Event
    from ..versions import SDVersion


class Computing(NamedTuple):
    """How a model is to be computed, in the words that `load_model` takes."""

    device: str
    dtype: str
    numerics: str
    quantized: bool = False


COMPONENTS = ("transformer", "t5", "clip", "vae", "clip_tokenizer", "t5_tokenizer")


def whole(text: str) -> int:
    """A whole number from 1."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def seed(text: str) -> int:
    """A whole number from 0."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is less than 0")
    return number


def size(text: str) -> tuple[int, int]:
    """ "512" -> (512, 512), "512x768" -> (512, 768): width, height in pixels."""
    width, x, height = text.lower().partition("x")
    try:
        return whole(width), whole(height if x else width)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 512 or 512x768: {error}") from None


def prompt(text: str) -> str:
    """Any text that is text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("the prompt holds bytes that are not UTF-8") from None
    return text


def add_model_options(parser: argparse.ArgumentParser, recorded: bool = False) -> None:
    """Which model, from which files, computed how. `recorded`: defaults are what a picture's record says."""
    add = parser.add_argument_group("where the model comes from").add_argument
    add("--path", type=Path, metavar="FOLDER",
        help="a folder with all of its files, or one file with several parts")  # fmt: skip
    for role in COMPONENTS:
        option, name = f"--{role.replace('_', '-')}", role.replace("_", " ")
        add(option, type=Path, metavar="FILE", help=f"a file or folder for the {name} alone")
    add("--fill-from", type=Path, metavar="FILE",
        help="where a file lacks tensors, take them from this one, which has the same part")  # fmt: skip
    add("--quantized", action="store_true",
        help="the built-in model with weights of 8 bits: smaller, and almost the same picture")  # fmt: skip
    add("--offline", action="store_true", help="use files that are here already and download nothing")
    add = parser.add_argument_group("how it is computed").add_argument

    def default(value: str) -> str | None:
        return None if recorded else value

    def says(usual: str) -> str:
        return f"(default: {'as recorded' if recorded else usual})"

    add(
        "--device", default=default("auto"), help=f"cpu, cuda or mps {says('auto, the fastest that is here')}"
    )
    add("--dtype", default=default("auto"),
        help=f"float32, bfloat16 or float16 {says('auto, by model and device')}")  # fmt: skip
    add("--decode", choices=("on-use", "on-load"), default="on-use",
        help="GGUF and fp8 weights stay packed in memory, or are decoded once, which takes more of it "
        "and saves time; the picture is the same (default: on-use)")  # fmt: skip
    add("--numerics", choices=sorted(PRESETS), default=default("reference"),
        help="what to compute where Candle differs from the published models "
        f"{says('reference, as published')}")  # fmt: skip


def load(
    args: argparse.Namespace,
    version: SDVersion,
    computing: Computing,
    cancel: CancelToken,
    on_event: Callable[[Event], None],
) -> LoadedModel:
    """The model from the files that `args` give."""
    from ..model_loader import load_model

    given: dict[str, Any] = {role: getattr(args, role) for role in COMPONENTS}
    return load_model(
        version,
        args.path,
        **given,
        device=computing.device,
        dtype=computing.dtype,
        numerics=computing.numerics,
        decode="on_load" if args.decode == "on-load" else "on_use",
        fill_from=args.fill_from,
        quantized=args.quantized or computing.quantized,
        offline=args.offline,
        cancel=cancel,
        on_event=on_event,
    )


def chosen_version(args: argparse.Namespace, name: str | None) -> SDVersion:
    """The model called `name`; None is the built-in one, which wants no files of the user's."""
    from ..model_loader import resolve_version

    given = any(getattr(args, role) is not None for role in (*COMPONENTS, "path"))
    return resolve_version(name, own_files=given)

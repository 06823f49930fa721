"""Options that several commands share, and how their values are read. Floor 10."""

from __future__ import annotations

import argparse
import os.path
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import RequestError
from ..numerics import PRESETS

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from ..model_loader import LoadedModel
    from ..request import CancelToken, Event
    from ..versions import SDVersion


class Computing(NamedTuple):
    """How a model is to be computed, in the words that `load_model` takes."""

    device: str
    dtype: str
    numerics: str
    quantized: bool = False
    prediction: str | None = None
    loras: Sequence[tuple[Path, float | None]] = ()
    lora_partial: bool = False


# Parts of a model that may come from a file of their own, and which models have them.
COMPONENTS = {
    "transformer": "the transformer (FLUX)",
    "unet": "the UNet (Stable Diffusion)",
    "t5": "the T5 text encoder (FLUX)",
    "clip": "the CLIP text encoder",
    "clip_2": "the second CLIP text encoder (SDXL)",
    "vae": "the autoencoder",
    "clip_tokenizer": "CLIP's tokenizer",
    "clip_2_tokenizer": "the second CLIP's tokenizer (SDXL)",
    "t5_tokenizer": "T5's tokenizer (FLUX)",
    "scheduler": "scheduler_config.json, which says what a UNet predicts (Stable Diffusion)",
}
# Fields of a request and arguments of `load_model` that an option fills, and spellings that are not the
# field's own with dashes. `latents`, which are more than the option --latents-in, keep their name in errors.
SPELLINGS = {"t5_length": "--t5-len"}
FIELDS = (
    "width", "height", "steps", "guidance", "seed", "batch", "batched", "preview_every", "negative_prompt",
    "guidance_rescale", "sampler", "schedule", "init_image", "mask", "strength", "composite", "fit",
    "control_image", "reference", "vae_tiling", "strict_prompt", "prediction", "device", "dtype", *SPELLINGS,
)  # fmt: skip


SOURCES = """Without --model, files of your own say which model they are of. Files may be .safetensors, .gguf
or .ckpt, of which .safetensors is to be preferred: .ckpt files are pickles, which can hold programs. They
are read by torch's weights-only unpickler alone, which runs none and refuses what it does not know."""
ADAPTERS = """Files of any usual trainer. Each is applied completely or the run stops: `flux-sd lora FILE`
says what it is and which models it fits. They act in the order given. One with DoRA goes STRENGTH of the
way from the old weight to its own."""


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


def lora(text: str) -> tuple[Path, float | None]:
    """FILE or FILE:STRENGTH; a colon with no number behind it belongs to the file's name."""
    file, colon, number = text.rpartition(":")
    if colon and file and not os.path.exists(text):  # no error for a name that is too long
        try:
            return Path(file), float(number)
        except ValueError:
            return Path(text), None
    return Path(text), None


# Stated here, for their own files import torch; tests hold them against those.
SAMPLERS = ("ddim", "ddpm", "euler", "euler_ancestral", "dpm++_2m", "uni_pc", "lcm")
SCHEDULES = (
    "leading", "trailing", "linspace", "simple", "sgm_uniform", "ddim_uniform", "karras", "exponential",
)  # fmt: skip
VARIANTS = ("fill", "canny", "depth", "kontext", "krea")
ORIGINALS = {
    "init_image": "the picture to begin from",
    "mask": "white, repaint; black or transparent, keep",
    "control_image": "lines or depths to follow, made already (flux-canny, flux-depth)",
    "reference": "a picture that the text says what to change of (flux-kontext)",
}
PICTURES = """The picture is painted over; --strength says how much. Its own size is painted unless --size
gives another: then it is resized where the proportions are the same, and refused where they are not, unless
--fit says what to do; so is a control picture, whose lines or depths are not computed here. A mask has the
picture's proportions and is fitted alike. The inpainting models need a picture and a mask; the others can use
a mask too. A reference is resized to a size of the model's own, near to its proportions."""


def add_picture_options(parser: argparse.ArgumentParser) -> None:
    """What one picture is to be: the fields of a request that every command which paints has."""
    _add_general(parser.add_argument_group("the picture (where no default is named, it is the model's own)"))
    _add_diffusion(parser.add_argument_group("Stable Diffusion (sd15, sd21, sdxl and kin, tiny-sd)"))
    title = "beginning from a picture, repainting, following or changing one"
    _add_originals(parser.add_argument_group(title, PICTURES))
    add = parser.add_argument_group("FLUX (flux-schnell, flux-dev and kin, tiny-flux)").add_argument
    add("--t5-len", type=whole, metavar="N", help="length of the T5 text input in tokens")


def _add_general(group: Any) -> None:
    add = group.add_argument
    add("--size", type=size, metavar="N|WxH", help="pixels: 512, or width x height as 512x768")
    add("--steps", type=whole, metavar="N", help="how many denoising steps: more take longer")
    add("--guidance", type=float, metavar="X",
        help="how closely to follow the text (flux-dev, Stable Diffusion but Turbo)")  # fmt: skip
    add("--latents-in", type=Path, metavar="FILE",
        help="start from this noise, not the seed's: safetensors, 'latents' [batch,C,H/8,W/8]; or a "
        "record of `flux-sd trace`")  # fmt: skip
    add("--vae-tiling", action=argparse.BooleanOptionalAction, default=None,
        help="decode in tiles: less memory, the same picture but for the last bits (default: where "
        "memory asks for it)")  # fmt: skip


def _add_diffusion(group: Any) -> None:
    add = group.add_argument
    add("--negative-prompt", type=prompt, metavar="TEXT", help="what to keep away from")
    add("--sampler", metavar="NAME", help=f"how steps are taken: {', '.join(SAMPLERS)}")
    add("--schedule", metavar="NAME", help=f"how noise levels are spaced: {', '.join(SCHEDULES)}")
    add("--guidance-rescale", type=float, metavar="X",
        help="0..1: against the glare of a high guidance (default: 0)")  # fmt: skip


def _add_originals(group: Any) -> None:
    add = group.add_argument
    add_originals(add)
    add("--strength", type=float, metavar="X",
        help="0..1: 0.3 keeps much of the picture, 1 nothing but what a mask keeps; for FLUX the share of "
        "noise that the run starts with, its first sigma, for Stable Diffusion the share of the steps that "
        "are run (default: 0.8, with a mask 1)")  # fmt: skip
    add("--composite", action=argparse.BooleanOptionalAction, default=None,
        help="outside the mask, give back the picture's own pixels (default: yes)")  # fmt: skip
    add("--fit", choices=("refuse", "crop", "stretch"),
        help="what to do with a picture of other proportions (default: refuse)")  # fmt: skip


def add_originals(add: Any, recorded: str = "") -> None:
    """The files of pictures. `recorded`: what to say where a picture is painted again."""
    for name, what in ORIGINALS.items():
        add(option_of(name), type=Path, metavar="FILE", help=recorded or what)


def request_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a request that `add_picture_options` are about; reads the files that they name.

    Raises OutputError for a picture that cannot be read, RequestError for noise that cannot.
    """
    width, height = args.size or (None, None)
    fields = {
        "width": width,
        "height": height,
        "t5_length": args.t5_len,
        "latents": None if args.latents_in is None else read_latents(args.latents_in),
        **{name: read_picture(getattr(args, name)) for name in ORIGINALS},
    }
    same = (
        "steps", "guidance", "vae_tiling", "negative_prompt", "sampler", "schedule", "guidance_rescale",
        "strength", "composite", "fit",
    )  # fmt: skip
    return fields | {name: getattr(args, name) for name in same}


def read_picture(path: Path | None) -> Image | None:
    """The picture in a file, None for None. Raises OutputError."""
    from .. import image

    return None if path is None else image.open_picture(path)


def read_latents(path: Path) -> Tensor:
    """The tensor "latents" of a safetensors file, or "noise" of a record, whose latents end the run.

    Raises RequestError if there is neither.
    """
    from ..checkpoint import open_checkpoint

    if not path.is_file():
        raise RequestError(f"latents {str(path)!r} cannot be read: it is not a file")
    with open_checkpoint(path) as checkpoint:
        for name in ("noise", "latents"):
            if name in checkpoint:
                return checkpoint.read(name)
        names = ", ".join(checkpoint.names) or "nothing"
    raise RequestError(f"{str(path)!r} holds {names}, expected a tensor named 'latents'")


def add_model_options(parser: argparse.ArgumentParser, recorded: bool = False) -> None:
    """Which model, from which files, computed how. `recorded`: defaults are what a picture's record says."""
    add = parser.add_argument_group("where the model comes from", SOURCES).add_argument
    add("--path", type=Path, metavar="FOLDER",
        help="a folder with all of its files, or one file with several parts")  # fmt: skip
    for role, what in COMPONENTS.items():
        add(option_of(role), type=Path, metavar="FILE", help=f"a file or folder for {what} alone")
    add("--prediction", metavar="TYPE",
        help="what a Stable Diffusion UNet predicts, where its files do not say: epsilon, v_prediction "
        f"or sample{' (default: as recorded)' if recorded else ''}")  # fmt: skip
    if not recorded:
        add("--variant", choices=VARIANTS,
            help="which of flux-dev's kin the files are of, where tensors cannot tell; short for --model "
            "flux-fill, flux-canny, ...")  # fmt: skip
    add("--fill-from", type=Path, metavar="FILE",
        help="where a file lacks tensors, take them from this one, which has the same part")  # fmt: skip
    add("--quantized", action="store_true",
        help="the built-in model with weights of 8 bits: smaller, and almost the same picture")  # fmt: skip
    add("--offline", action="store_true", help="use files that are here already and download nothing")
    _add_adapters(parser.add_argument_group("adapters (LoRA and kin)", ADAPTERS).add_argument, recorded)
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


def _add_adapters(add: Any, recorded: bool) -> None:
    usual = "as recorded" if recorded else "1; of a control LoRA 0.85"
    add("--lora", type=lora, action="append", default=[], metavar="FILE[:STRENGTH]",
        help=f"change the model by this adapter; can be given several times (strength: {usual})")  # fmt: skip
    add("--lora-partial", action="store_true",
        help="apply what fits of an adapter that does not fit completely (default: refuse it)")  # fmt: skip


def computing(args: argparse.Namespace) -> Computing:
    """As the options say."""
    how = Computing(args.device, args.dtype, args.numerics, prediction=args.prediction)
    return how._replace(loras=args.lora, lora_partial=args.lora_partial)


def load(
    args: argparse.Namespace,
    version: SDVersion,
    how: Computing,
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
        device=how.device,
        dtype=how.dtype,
        numerics=how.numerics,
        decode="on_load" if args.decode == "on-load" else "on_use",
        fill_from=args.fill_from,
        quantized=args.quantized or how.quantized,
        prediction=how.prediction,
        loras=how.loras,
        lora_partial=how.lora_partial,
        offline=args.offline,
        cancel=cancel,
        on_event=on_event,
    )


def chosen_version(args: argparse.Namespace, name: str | None) -> SDVersion:
    """The model called `name`; None is what the files given show, the built-in one where there are none."""
    from ..model_loader import resolve_version

    if getattr(args, "variant", None) is not None:
        return _variant(args.variant, name)
    given = {role: getattr(args, role) for role in (*COMPONENTS, "path") if getattr(args, role) is not None}
    return resolve_version(name, given, args.prediction)


def _variant(variant: str, name: str | None) -> SDVersion:
    """The variant of FLUX.1 dev that is called so. Raises RequestError where `name` is of another model."""
    from ..versions import SDVersion

    meant = SDVersion.of_variant(variant)
    model = meant if name is None else SDVersion.parse(name)
    if model != meant and model.info.key != meant.info.variant_of:
        both = f"--variant {variant} is {meant.info.key}, and --model {name} another"
        raise RequestError(f"{both}: leave one of them out")
    return meant


def option_of(field: str) -> str:
    """A field of a request, or an argument of `load_model`, as the command line spells it."""
    return SPELLINGS.get(field) or f"--{field.replace('_', '-')}"


def spelled(sentence: str) -> str:
    """An error about a request in the command line's words: what is called negative_prompt there is called
    --negative-prompt here. Names of two words are told anywhere, those of one where they begin
    the sentence."""

    def option(match: re.Match[str]) -> str:
        return option_of(match[0])

    two_words = "|".join(name for name in FIELDS if "_" in name)
    sentence = re.sub(rf"(?<![\w'\"/.-])(?:{two_words})(?![\w'\"/.-])", option, sentence)
    return re.sub(rf"^(?:{'|'.join(FIELDS)})(?= )", option, sentence)

"""Tensors to pictures, pictures to files: the only file that knows image formats. Floor 1.

A picture is written as PNG and as nothing else: PNG keeps every pixel, so that a run can be repeated and
compared bit for bit, and it carries the record of the run. JPEG and WebP would change the one and
lose the other, so their names are refused with a sentence that says so.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
import struct
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from .errors import NonFiniteError, OutputError, RequestError

RECORD_KEY = "flux_sd"  # PNG text chunk: the whole record as one line of JSON, in ASCII
SUMMARY_KEY = "Description"  # PNG text chunk, a keyword of the PNG standard: the same for human eyes
MAX_NAME = 255  # bytes of a file name, on the usual file systems
MAX_LEVEL = 65_535  # white in 16 bits
# What Pillow's readers raise, besides OSError, for bytes that make no sense.
DAMAGED = (
    SyntaxError,
    ValueError,
    LookupError,
    ArithmeticError,
    TypeError,
    EOFError,
    RuntimeError,
    struct.error,
)
FITS = ("refuse", "crop", "stretch")  # what may be done to a picture of other proportions
Rounding = Literal["round", "truncate"]


# ---------------------------------------------------------------------------------------- pixels


def to_picture(image: Tensor, rounding: Rounding = "round") -> Image.Image:
    """image [3,H,W] in -1..1 (clamped) -> 8-bit RGB.

    "round" takes the nearest of the 256 levels, "truncate" the one below, as Candle's and BFL's programs do.
    Raises NonFiniteError where a value is NaN or infinite: as bytes it would look like any other pixel.
    """
    values = image.detach().to("cpu", torch.float32)
    if not torch.isfinite(values).all():
        raise NonFiniteError("image", str(image.dtype).removeprefix("torch."))
    levels = (values.clamp(-1.0, 1.0) + 1.0) * 127.5
    levels = levels.round() if rounding == "round" else levels.floor()
    pixels = levels.to(torch.uint8).permute(1, 2, 0).contiguous()  # [3,H,W] -> [H,W,3]
    return Image.fromarray(pixels.numpy())


def to_unit(picture: Image.Image) -> Tensor:
    """Any picture -> float32 [3,H,W] in -1..1, by way of `to_rgb`."""
    pixels = np.asarray(to_rgb(picture), dtype=np.float32)
    return torch.from_numpy(pixels / np.float32(127.5) - np.float32(1.0)).permute(2, 0, 1).contiguous()


def pixel_hash(picture: Image.Image) -> str:
    """SHA-256 of size and pixels, whatever the file around them."""
    rgb = picture.convert("RGB")
    return hashlib.sha256(f"{rgb.width}x{rgb.height}:".encode() + rgb.tobytes()).hexdigest()


def difference(ours: Image.Image, theirs: Image.Image) -> tuple[int, int]:
    """How many pixels of two pictures of one size differ, and by how many of 255 levels at most."""
    a, b = (np.asarray(p.convert("RGB"), dtype=np.int16) for p in (ours, theirs))
    gap = np.abs(a - b).max(axis=2)  # [H,W,3] -> [H,W]
    return int(np.count_nonzero(gap)), int(gap.max(initial=0))


# ----------------------------------------------------------------------------------- pictures in


def to_rgb(picture: Image.Image, ground: str = "white") -> Image.Image:
    """Any picture -> 8-bit RGB as a viewer shows it: turned as its EXIF data say, palettes resolved, 16 bits
    rounded to 8, transparent parts laid over `ground`. Of an animation it is the frame that is open, the
    first; a colour profile is not applied.

    Raises RequestError where the values are no levels of a colour (floats, or integers over 65535).
    """
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "F" or picture.mode.startswith("I"):
        picture = _to_8_bits(picture)
    try:
        if picture.has_transparency_data:
            rgba = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", rgba.size, ground), rgba)
        return picture.convert("RGB")
    except ValueError as error:
        raise RequestError(
            f"a picture of mode {picture.mode} cannot be used: save it as RGB first"
        ) from error


def _to_8_bits(picture: Image.Image) -> Image.Image:
    """Grey of 16 bits, in any of Pillow's modes for it, -> grey of 8 bits, to the nearest level."""
    levels = np.asarray(picture)
    if picture.mode == "F" or levels.min(initial=0) < 0 or levels.max(initial=0) > MAX_LEVEL:
        raise RequestError(
            "a picture whose values are no levels of 8 or 16 bits cannot be used: save it as 8 or 16 bits"
        )
    return Image.fromarray(((levels.astype(np.uint32) * 255 + MAX_LEVEL // 2) // MAX_LEVEL).astype(np.uint8))


def fit_picture(
    picture: Image.Image, width: int, height: int, rule: str = "refuse", what: str = "the picture"
) -> Image.Image:
    """The picture as 8-bit RGB of width x height pixels: as it is, or resized (Lanczos).

    Where the proportions differ by a pixel or more of the result, `rule` decides: "refuse" raises
    RequestError, "crop" cuts the same from both sides of what is too long, "stretch" distorts.
    what: how the error calls the picture.
    """
    return _fit(to_rgb(picture), width, height, rule, Image.Resampling.LANCZOS, what)


def mask_of(picture: Image.Image, width: int, height: int, rule: str = "refuse") -> Tensor:
    """A mask -> float32 [1,H,W] of 0 and 1: 1, repaint, where its luminance is half of white or more.

    Transparent parts count as black. A mask of another size is fitted as the picture is, by nearest pixels.
    Raises RequestError for a mask that is black everywhere, and as `fit_picture`.
    """
    rgb = _fit(to_rgb(picture, "black"), width, height, rule, Image.Resampling.NEAREST, "the mask")
    mask = torch.from_numpy(np.asarray(rgb.convert("L")) >= 128)[None]  # [1,H,W]
    if not mask.any():
        raise RequestError(
            "the mask is black everywhere, so nothing would be repainted: make white what is to change "
            "(transparent counts as black)"
        )
    return mask.float()


def same_proportions(size: tuple[int, int], wanted: tuple[int, int]) -> bool:
    """Whether a picture of `size`, scaled to cover `wanted`, overhangs by less than a pixel."""
    scale = max(wanted[0] / size[0], wanted[1] / size[1])
    return size[0] * scale - wanted[0] < 1 and size[1] * scale - wanted[1] < 1


def _fit(
    picture: Image.Image, width: int, height: int, rule: str, resample: Image.Resampling, what: str
) -> Image.Image:
    if rule not in FITS:
        raise RequestError(f"fit {rule!r} is unknown: choose {', '.join(FITS)}")
    if picture.size == (width, height):
        return picture
    scale = max(width / picture.width, height / picture.height)  # to cover the whole result
    differs = not same_proportions(picture.size, (width, height))
    if differs and rule == "refuse":
        raise RequestError(
            f"{what} is {picture.width}x{picture.height} pixels, {width}x{height} are to be painted, and the "
            "proportions differ: ask for a --size with its proportions, or for --fit crop or --fit stretch"
        )
    box = (0.0, 0.0, float(picture.width), float(picture.height))
    if differs and rule == "crop":
        left, top = (picture.width - width / scale) / 2, (picture.height - height / scale) / 2
        box = (max(0.0, left), max(0.0, top), min(box[2], box[2] - left), min(box[3], box[3] - top))
    return picture.resize((width, height), resample, box)


def composite(painted: Image.Image, original: Image.Image, mask: Tensor) -> Image.Image:
    """`painted` where the mask [1,H,W] is 1, and where it is 0 byte for byte `original`; all of one size."""
    white = Image.fromarray((mask[0] * 255).to("cpu", torch.uint8).numpy())
    return Image.composite(painted, to_rgb(original), white)


# ---------------------------------------------------------------------------------------- sheets


def contact_sheet(
    pictures: Sequence[Image.Image], labels: Sequence[str] = (), columns: int | None = None, gap: int = 8
) -> Image.Image:
    """All pictures in rows on white, each with its label below; as square as the count allows."""
    if not pictures:
        raise OutputError("a contact sheet needs at least one picture, none were given")
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    text = 14 if labels else 0  # pixels for one line of Pillow's built-in font
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + text + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, picture in enumerate(pictures):
        left = gap + (i % columns) * (width + gap)
        top = gap + (i // columns) * (height + text + gap)
        sheet.paste(picture.convert("RGB"), (left, top))
        if i < len(labels):
            draw.text((left, top + height + 2), labels[i], fill="black")
    return sheet


def side_by_side(left: Image.Image, right: Image.Image, gap: int = 8) -> Image.Image:
    """Two pictures in one row."""
    return contact_sheet([left, right], columns=2, gap=gap)


# ----------------------------------------------------------------------------------------- files


def check_output(path: str | Path, overwrite: bool = False, suffix: str = ".png") -> Path:
    """The path, if a file of kind `suffix` can be put there; meant to be asked before hours of work.

    Raises OutputError: a name of another kind, a folder that is not there or not writable, a file in the way.
    """
    path = Path(path)
    if path.suffix.lower() != suffix:
        why = "only PNG keeps every pixel and the record that repeats the run" if suffix == ".png" else ""
        found = f"ends in {path.suffix!r}" if path.suffix else "has no ending"
        raise OutputError(f"{path.name!r} {found}, expected {suffix}{': ' + why if why else ''}")
    if len(os.fsencode(path.name)) > MAX_NAME:
        raise OutputError(f"the name {path.name[:40]!r}... has over {MAX_NAME} bytes: choose a shorter one")
    folder = path.parent
    if not folder.is_dir():
        raise OutputError(f"the folder {str(folder)!r} does not exist: create it or choose another name")
    if path.is_dir():
        raise OutputError(f"{str(path)!r} is a folder, expected the name of a file")
    if path.exists() and not overwrite:
        raise OutputError(f"{str(path)!r} exists: choose another name or allow it with --overwrite")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"the folder {str(folder)!r} is not writable: choose another one")
    return path


def numbered_path(folder: str | Path = ".", stem: str = "flux_sd", suffix: str = ".png") -> Path:
    """`folder/stem_0001.png`, or one more than the highest number that any `stem_<number>*` there has."""
    folder = Path(folder)
    highest = 0
    if folder.is_dir():
        for entry in folder.iterdir():
            if entry.name.startswith(stem + "_"):
                rest = entry.name[len(stem) + 1 :]
                digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
                highest = max(highest, int(digits or 0))
    return folder / f"{stem}_{highest + 1:04d}{suffix}"


def write_file(path: str | Path, write: Callable[[BinaryIO], None], overwrite: bool = False) -> Path:
    """Lets `write` fill a temporary file in the same folder and then gives it its name: all of it or nothing.

    Raises OutputError if the name is taken (also where it was taken meanwhile) or the disk refuses.
    """
    path = Path(path)
    draft = path.parent / f".flux_sd.{secrets.token_hex(8)}.part"
    try:
        with draft.open("x+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        _give_name(draft, path, overwrite)
    except FileExistsError:
        raise OutputError(f"{str(path)!r} exists: choose another name or allow it with --overwrite") from None
    except OSError as error:
        raise OutputError(f"{str(path)!r} could not be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
    return path


def _give_name(draft: Path, path: Path, overwrite: bool) -> None:
    if overwrite:
        draft.replace(path)
        return
    try:
        os.link(draft, path)  # unlike a rename, fails if the name is taken
    except OSError as error:
        if error.errno == errno.EEXIST or path.exists():
            raise FileExistsError(error.errno, error.strerror, str(path)) from error
        draft.rename(path)  # a file system without hard links: the look just above has to do


def save_png(
    picture: Image.Image, path: str | Path, record: Mapping[str, Any] | None = None, overwrite: bool = False
) -> Path:
    """Writes the picture with its record (anything JSON holds). Raises OutputError; see `check_output`."""
    path = check_output(path, overwrite)
    info = PngImagePlugin.PngInfo()
    if record is not None:
        info.add_text(RECORD_KEY, json.dumps(record, ensure_ascii=True, sort_keys=True))
        info.add_itxt(SUMMARY_KEY, summary(record).encode("utf-8", "replace").decode())
    return write_file(path, lambda file: picture.save(file, format="PNG", pnginfo=info), overwrite)


def summary(record: Mapping[str, Any]) -> str:
    """The prompt on one line, the plain settings of a record on the next."""
    plain = (str, int, float)
    rest = [f"{k}: {v}" for k, v in record.items() if k != "prompt" and isinstance(v, plain)]
    return f"{record.get('prompt', '')}\n{', '.join(rest)}".strip()


def open_picture(path: str | Path) -> Image.Image:
    """Reads a picture of any kind that Pillow knows, completely.

    Raises OutputError if it is not one, is damaged, or has over 179 million pixels, where Pillow stops.
    """
    try:
        with warnings.catch_warnings():  # Pillow warns from half of that on
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                picture.load()
                return picture
    except FileNotFoundError:
        raise OutputError(f"{str(path)!r} does not exist") from None
    except Image.DecompressionBombError:
        raise OutputError(f"{str(path)!r} has over 179 million pixels: make it smaller first") from None
    except UnidentifiedImageError:
        raise OutputError(f"{str(path)!r} is not a picture that can be read") from None
    except OSError as error:
        raise OutputError(f"{str(path)!r} could not be read: {error.strerror or error}") from error
    except DAMAGED as error:
        raise OutputError(f"{str(path)!r} is damaged: {error}") from error


def read_record(path: str | Path) -> dict[str, Any]:
    """The record inside a PNG that `save_png` wrote.

    Raises OutputError if the file is no picture, or carries no record (another program wrote or re-saved it).
    """
    text = open_picture(path).info.get(RECORD_KEY)
    if not isinstance(text, str):
        raise OutputError(
            f"{str(path)!r} carries no flux_sd record: it was made or saved again by another program"
        )
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise OutputError(f"the record in {str(path)!r} is damaged: {error}") from error
    if not isinstance(record, dict):
        raise OutputError(f"the record in {str(path)!r} is damaged: it is no JSON object")
    return record

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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from .errors import NonFiniteError, OutputError

RECORD_KEY = "flux_sd"  # PNG text chunk: the whole record as one line of JSON, in ASCII
SUMMARY_KEY = "Description"  # PNG text chunk, a keyword of the PNG standard: the same for human eyes
MAX_NAME = 255  # bytes of a file name, on the usual file systems
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


def to_tensor(picture: Image.Image) -> Tensor:
    """Any picture -> float32 [3,H,W] in -1..1; transparent parts are laid over white."""
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
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
    """Reads a picture of any kind that Pillow knows, completely. Raises OutputError if it is not one."""
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture
    except FileNotFoundError:
        raise OutputError(f"{str(path)!r} does not exist") from None
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise OutputError(f"{str(path)!r} is not a picture that can be read: {error}") from error
    except OSError as error:
        raise OutputError(f"{str(path)!r} could not be read: {error.strerror or error}") from error


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

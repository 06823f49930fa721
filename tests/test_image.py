"""Pictures: levels, files that are whole or absent, records that survive, sheets."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from flux_sd import image
from flux_sd.errors import NonFiniteError, OutputError, RequestError


def ramp(width: int = 16, height: int = 16) -> Image.Image:
    """Every one of the 256 levels, in three orders."""
    red = np.arange(width * height, dtype=np.uint8).reshape(height, width)
    return Image.fromarray(np.stack([red, red.T.copy(), 255 - red], axis=2))


def test_levels_are_rounded_or_truncated_and_clamped() -> None:
    values = torch.tensor([-2.0, -1.0, -1.0 + 0.6 / 127.5, 0.0, 1.0, 3.0]).view(1, 1, 6).expand(3, 1, 6)
    rounded, truncated = (np.asarray(image.to_picture(values, how))[0, :, 0] for how in ("round", "truncate"))
    assert rounded.tolist() == [0, 0, 1, 128, 255, 255]
    assert truncated.tolist() == [0, 0, 0, 127, 255, 255]


def test_axes_are_channels_rows_columns() -> None:
    values = torch.full((3, 2, 5), -1.0)
    values[1, 0, 4] = 1.0
    picture = image.to_picture(values)
    assert picture.size == (5, 2) and picture.getpixel((4, 0)) == (0, 255, 0)


def test_every_level_survives_the_way_to_a_tensor_and_back() -> None:
    assert image.difference(image.to_picture(image.to_unit(ramp())), ramp()) == (0, 0)
    assert image.to_picture(image.to_unit(ramp()).double()).tobytes() == ramp().tobytes()


def test_transparent_parts_become_white() -> None:
    picture = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    picture.putpixel((1, 0), (0, 0, 0, 0))
    assert image.to_unit(picture)[:, 0].T.tolist() == [[1.0, -1.0, -1.0], [1.0, 1.0, 1.0]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_never_becomes_a_pixel(bad: float) -> None:
    values = torch.zeros(3, 4, 4, dtype=torch.bfloat16)
    values[0, 0, 0] = bad
    with pytest.raises(NonFiniteError, match="image produced NaN or infinity in bfloat16"):
        image.to_picture(values)


def test_difference_counts_pixels_and_levels() -> None:
    other = ramp()
    other.putpixel((0, 0), (7, 0, 255))
    assert image.difference(ramp(), other) == (1, 7)
    assert image.pixel_hash(other) != image.pixel_hash(ramp())
    reshaped = Image.frombytes("RGB", (32, 8), ramp().tobytes())
    assert image.pixel_hash(reshaped) != image.pixel_hash(ramp())


RECORD = {
    "prompt": "käse 🧀\nline two",
    "seed": 2**63 - 2,
    "guidance": None,
    "files": {"vae": [{"name": "ae"}]},
}


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    path = image.save_png(ramp(), tmp_path / "a.png", RECORD)
    assert image.read_record(path) == RECORD
    assert image.open_picture(path).tobytes() == ramp().tobytes()
    text = image.open_picture(path).info["Description"]
    assert text.startswith("käse 🧀\nline two\n") and f"seed: {2**63 - 2}" in text and "files" not in text
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_a_prompt_that_is_no_unicode_is_still_recorded(tmp_path: Path) -> None:
    path = image.save_png(ramp(), tmp_path / "a.png", {"prompt": "bad \udce9"})
    assert image.read_record(path) == {"prompt": "bad \udce9"}


def test_pictures_without_a_record_are_named(tmp_path: Path) -> None:
    ramp().save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("not a picture")
    whole = image.save_png(ramp(), tmp_path / "whole.png", RECORD).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    for value in ("{", "[1]"):
        info = PngImagePlugin.PngInfo()
        info.add_text(image.RECORD_KEY, value)
        ramp().save(tmp_path / f"damaged{len(value)}.png", pnginfo=info)
    expected = {
        "plain.png": "carries no flux_sd record",
        "text.png": "not a picture",
        "cut.png": "cut.png",
        "damaged1.png": "damaged",
        "damaged3.png": "no JSON object",
        "absent.png": "does not exist",
    }
    for name, sentence in expected.items():
        with pytest.raises(OutputError, match=sentence):
            image.read_record(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jpg", "a.webp", "a", "a.PNG.txt"])
def test_other_formats_are_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match=r"expected \.png: only PNG keeps every pixel and the record"):
        image.save_png(ramp(), tmp_path / name)
    assert not list(tmp_path.iterdir())
    assert image.check_output(tmp_path / "a.PNG") == tmp_path / "a.PNG"


def test_places_that_cannot_be_written_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(OutputError, match=r"folder .*nowhere' does not exist"):
        image.check_output(tmp_path / "nowhere" / "a.png")
    with pytest.raises(OutputError, match="is a folder"):
        image.check_output(tmp_path / "folder.png", overwrite=True)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match="not writable"):
        image.check_output(tmp_path / "a.png")


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    path = image.save_png(ramp(), tmp_path / "a.png")
    before = path.read_bytes()
    with pytest.raises(OutputError, match="exists"):
        image.save_png(ramp(32, 32), path)
    with pytest.raises(OutputError, match="exists"):  # taken between the check and the end
        image.write_file(path, lambda file: None)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    image.save_png(ramp(32, 32), path, overwrite=True)
    assert image.open_picture(path).size == (32, 32)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_no_file(tmp_path: Path, error: BaseException) -> None:
    def write(file: object) -> None:
        raise error

    expected = OutputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="No space left" if isinstance(error, OSError) else None):
        image.write_file(tmp_path / "a.png", write)
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_hard_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    path = image.save_png(ramp(), tmp_path / "a.png")
    with pytest.raises(OutputError, match="exists"):
        image.write_file(path, lambda file: None)
    assert image.open_picture(path).size == (16, 16) and len(list(tmp_path.iterdir())) == 1


def test_numbers_go_on_after_the_highest(tmp_path: Path) -> None:
    assert image.numbered_path(tmp_path).name == "flux_sd_0001.png"
    for name in ("flux_sd_0002.png", "flux_sd_0009-3.png", "flux_sd_x.png", "other_0100.png"):
        (tmp_path / name).touch()
    assert image.numbered_path(tmp_path).name == "flux_sd_0010.png"
    assert image.numbered_path(tmp_path, "other").name == "other_0101.png"
    assert image.numbered_path(tmp_path / "none").name == "flux_sd_0001.png"


def test_a_sheet_holds_every_picture_in_its_place() -> None:
    pictures = [Image.new("RGB", (10, 6), colour) for colour in ("red", "lime", "blue")]
    sheet = image.contact_sheet(pictures, gap=2)
    assert sheet.size == (2 * 12 + 2, 2 * 8 + 2)
    places = [(5, 5), (17, 5), (5, 13), (17, 13)]
    assert [sheet.getpixel(p) for p in places] == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    labelled = image.contact_sheet(pictures, [f"seed {i}" for i in range(3)], columns=3, gap=2)
    assert labelled.size == (3 * 12 + 2, 6 + 14 + 4)
    assert image.side_by_side(pictures[0], pictures[1], gap=0).size == (20, 6)
    with pytest.raises(OutputError):
        image.contact_sheet([])


def test_the_record_is_one_line_of_ascii_json(tmp_path: Path) -> None:
    path = image.save_png(ramp(), tmp_path / "a.png", RECORD)
    with Image.open(path) as picture:
        text = picture.info[image.RECORD_KEY]
    assert text.isascii() and "\n" not in text and json.loads(text)["prompt"] == RECORD["prompt"]


# ------------------------------------------------------------------------------------ pictures and masks in


def quarters(width: int, height: int) -> Image.Image:
    """Black, red, white, blue from left to right."""
    made = Image.new("RGB", (width, height))
    for i, colour in enumerate(("black", "red", "white", "blue")):
        made.paste(colour, (i * width // 4, 0, (i + 1) * width // 4, height))
    return made


def test_a_picture_of_the_right_size_is_not_touched() -> None:
    for rule in image.FITS:
        assert image.fit_picture(ramp(), 16, 16, rule).tobytes() == ramp().tobytes()


@pytest.mark.parametrize(
    ("size", "wanted", "fits"),
    [
        ((64, 32), (32, 16), True),
        ((100, 67), (96, 64), True),  # 96 x 64.32
        ((100, 67), (64, 96), False),
        ((101, 67), (48, 32), True),  # 48.24 x 32
        ((66, 32), (32, 16), False),  # 33 x 16: a whole pixel
        ((68, 32), (32, 16), False),
        ((1, 1), (512, 512), True),
    ],
)
def test_proportions_are_the_same_to_less_than_a_pixel(
    size: tuple[int, int], wanted: tuple[int, int], fits: bool
) -> None:
    assert image.same_proportions(size, wanted) == fits


def test_crop_cuts_the_same_from_both_sides_and_stretch_keeps_all() -> None:
    cropped, stretched = (image.fit_picture(quarters(128, 32), 32, 16, rule) for rule in ("crop", "stretch"))
    assert [cropped.getpixel((x, 8)) for x in (4, 28)] == [(255, 0, 0), (255, 255, 255)]
    colours = [stretched.getpixel((x, 8)) for x in (4, 12, 20, 28)]
    assert colours == [(0, 0, 0), (255, 0, 0), (255, 255, 255), (0, 0, 255)]
    tall = image.fit_picture(quarters(32, 128), 32, 16, "crop")
    assert [tall.getpixel((x, 8)) for x in (4, 12, 20, 28)] == colours
    with pytest.raises(RequestError, match="the picture is 128x32 pixels, 32x16 are to be painted"):
        image.fit_picture(quarters(128, 32), 32, 16)
    with pytest.raises(RequestError, match="fit 'pad' is unknown: choose refuse, crop, stretch"):
        image.fit_picture(quarters(128, 32), 32, 16, "pad")


def test_a_mask_stays_black_and_white_when_it_is_resized() -> None:
    mask = image.mask_of(quarters(64, 32), 32, 16)  # white is light, red and blue are dark
    assert mask.shape == (1, 16, 32) and mask.dtype == torch.float32
    assert mask[0, 0].tolist() == [0.0] * 16 + [1.0] * 8 + [0.0] * 8
    with pytest.raises(RequestError, match="the mask is black everywhere, so nothing would be repainted"):
        image.mask_of(Image.new("L", (8, 8), 127), 8, 8)
    with pytest.raises(RequestError, match="the mask is 64x32 pixels"):
        image.mask_of(quarters(64, 32), 16, 16)


def test_a_composite_keeps_every_byte_outside_the_mask() -> None:
    painted = Image.new("RGB", (16, 16), (1, 2, 3))
    mask = torch.zeros(1, 16, 16)
    mask[0, 4:9, 2:7] = 1.0
    made = np.asarray(image.composite(painted, ramp(), mask))
    inside = mask[0].numpy() == 1
    assert (made[inside] == [1, 2, 3]).all() and np.array_equal(made[~inside], np.asarray(ramp())[~inside])


def test_16_bits_are_rounded_to_the_nearest_level() -> None:
    grey = np.array([[0, 128, 129, 65_535, 65_407, 65_406, 257 * 100]], dtype=np.uint16)
    made = image.to_rgb(Image.fromarray(grey))
    assert [made.getpixel((x, 0)) for x in range(7)] == [(v,) * 3 for v in (0, 0, 1, 255, 255, 254, 100)]
    for values in (np.array([[70_000]], dtype=np.int32), np.array([[-1]], dtype=np.int32)):
        with pytest.raises(RequestError, match="values are no levels of 8 or 16 bits"):
            image.to_rgb(Image.fromarray(values))


def test_a_palette_with_a_transparent_colour_is_laid_over_the_ground() -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.putdata([0, 1])
    picture.info["transparency"] = 1
    assert [image.to_rgb(picture).getpixel((x, 0)) for x in (0, 1)] == [(10, 20, 30), (255, 255, 255)]
    assert image.to_rgb(picture, "black").getpixel((1, 0)) == (0, 0, 0)

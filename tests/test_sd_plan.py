"""What a request means to a Stable Diffusion version: defaults, pictures and masks, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers_sd import half_mask, picture
from PIL import Image

from flux_sd import image, model_loader
from flux_sd.errors import RequestError
from flux_sd.model_loader import check_request
from flux_sd.numerics import candle, parse, reference
from flux_sd.request import GenerationRequest
from flux_sd.sd_plan import SdPlan, first_step, plan_sd
from flux_sd.versions import SDVersion

REQUEST = GenerationRequest(prompt="a red kite over the sea", seed=5)
ON_PICTURE = replace(REQUEST, init_image=picture(), mask=half_mask())


def plan(version: str = "sd15", request: GenerationRequest = REQUEST, **changes: Any) -> SdPlan:
    return plan_sd(SDVersion.parse(version).info, replace(request, **changes), reference())


# ------------------------------------------------------------------------------------------ defaults


@pytest.mark.parametrize(
    ("version", "sampler", "schedule", "steps", "guidance", "side"),
    [
        ("sd15", "ddim", "leading", 50, 7.5, 512),
        ("sd21", "ddim", "leading", 50, 7.5, 768),
        ("sd21-base", "ddim", "leading", 50, 7.5, 512),
        ("sdxl", "euler", "leading", 50, 5.0, 1024),
        ("sdxl-turbo", "euler_ancestral", "trailing", 1, None, 512),
    ],
)
def test_a_version_has_its_own_defaults(
    version: str, sampler: str, schedule: str, steps: int, guidance: float | None, side: int
) -> None:
    made = plan(version)
    assert (made.sampler, made.schedule, made.steps, made.guidance) == (sampler, schedule, steps, guidance)
    assert (made.width, made.height, made.strength, made.composite) == (side, side, None, False)
    assert made.guided == (guidance is not None)


@pytest.mark.parametrize(
    ("version", "sampler", "guidance"),
    [("sd15-inpaint", "ddim", 7.5), ("sd2-inpaint", "ddim", 7.5), ("sdxl-inpaint", "euler", 8.0)],
)
def test_an_inpainting_version_has_its_own_defaults(version: str, sampler: str, guidance: float) -> None:
    made = plan(version, ON_PICTURE)
    assert (made.sampler, made.schedule, made.guidance) == (sampler, "leading", guidance)
    assert (made.width, made.height, made.strength, made.composite) == (48, 32, 1.0, True)


def test_candle_s_defaults() -> None:
    xl, turbo = (plan_sd(SDVersion.parse(name).info, REQUEST, candle()) for name in ("sdxl", "sdxl-turbo"))
    assert (xl.sampler, xl.steps, xl.guidance) == ("ddim", 30, 7.5)
    assert (turbo.sampler, turbo.steps, turbo.guidance) == ("euler_ancestral", 1, None)


def test_a_sampler_asked_for_keeps_the_version_s_schedule_where_it_can() -> None:
    assert plan(sampler="dpm++_2m").schedule == "leading"
    assert plan(sampler="lcm").schedule == "trailing"
    with pytest.raises(RequestError, match="lcm cannot use schedule karras: it takes trailing"):
        plan(sampler="lcm", schedule="karras")


def test_turbo_takes_as_many_steps_as_a_picture_needs() -> None:
    made = plan("sdxl-turbo", init_image=picture(), strength=0.3)
    assert made.steps == 4 and first_step(made.steps, made.strength) == 3
    assert plan("sdxl-turbo", init_image=picture(), strength=1.0).steps == 1
    assert plan("sdxl-turbo", init_image=picture(), strength=0.3, steps=10).steps == 10


# ------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 1001, "height": 504}, "multiples of 8; the nearest are 1000x504 and 1008x504"),
        ({"width": 0}, "0x512 pixels: the least is 8x8"),
        ({"width": 16_392, "height": 8}, r"width 16392 is outside 1\.\.16384"),
        ({"width": 96_000, "height": 64_000, "init_image": picture()}, r"width 96000 is outside 1\.\.16384"),
        ({"steps": 0}, "steps 0 is outside 1..1000"),
        ({"batch": 0}, "batch 0 is outside"),
        ({"seed": -1}, "seed -1 is outside"),
        ({"guidance": -1.0}, r"guidance -1\.0 is outside 0\.\.100"),
        ({"guidance_rescale": 1.5}, r"guidance_rescale 1\.5 is outside 0\.\.1"),
        ({"preview_every": 0}, "preview_every 0"),
        ({"t5_length": 77}, "t5_length is not used by sd15: leave it out"),
        ({"sampler": "pndm"}, "pndm is not built: ddim takes the same steps"),
        ({"sampler": "magic"}, "sampler 'magic' is unknown: choose ddim"),
        ({"schedule": "magic"}, "schedule 'magic' is unknown: choose"),
        ({"guidance": 1.0, "negative_prompt": "rain"}, "negative_prompt acts through guidance above 1"),
        ({"guidance": 0.5, "guidance_rescale": 0.7}, "guidance_rescale acts through guidance above 1"),
        ({"mask": half_mask()}, "mask is given and init_image is not"),
        ({"strength": 0.5}, "strength is given and init_image is not"),
        ({"fit": "crop"}, "fit is given and init_image is not"),
        ({"init_image": picture(), "composite": False}, "composite is given and mask is not"),
        (
            {"init_image": picture(), "fit": "squeeze"},
            "fit 'squeeze' is unknown: choose refuse, crop, stretch",
        ),
        ({"init_image": picture(), "strength": 1.5}, r"strength 1\.5 is outside 0\.\.1"),
        (
            {"init_image": picture(), "strength": 0.01, "steps": 50},
            r"strength 0\.01 of 50 steps is less than one step",
        ),
        ({"latents": torch.zeros(1, 4, 8, 8)}, r"needs floats of shape \[1, 4, 64, 64\]"),
        ({"latents": torch.full((1, 4, 64, 64), float("inf"))}, "NaN or infinity"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        plan(**change)


@pytest.mark.parametrize(
    ("version", "change", "message"),
    [
        ("sdxl-turbo", {"guidance": 5.0}, "guidance is not used by sdxl-turbo, which runs without"),
        ("sdxl-turbo", {"negative_prompt": ""}, "negative_prompt acts .* sdxl-turbo runs without"),
        ("sd15-inpaint", {}, "repaints a part of a picture and init_image is not given"),
        ("sd2-inpaint", {"init_image": picture()}, "repaints a part of a picture and mask is not given"),
    ],
)
def test_what_a_version_is_not_for_is_refused(version: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        plan(version, **change)


def test_a_request_is_refused_before_any_file_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_loader, "fetch", lambda *a, **k: pytest.fail("a file was looked for"))
    with pytest.raises(RequestError, match="the nearest are 504x504 and 512x512"):
        check_request("sd15", replace(REQUEST, width=505, height=505))
    with pytest.raises(RequestError, match="the mask is black everywhere"):
        check_request("sd15", replace(ON_PICTURE, mask=Image.new("L", (48, 32))))


# ------------------------------------------------------------------------------------------ strength


def test_strength_is_the_share_of_the_steps_that_is_run() -> None:
    assert [first_step(20, s) for s in (1.0, 0.8, 0.5, 0.05, 0.0)] == [0, 4, 10, 19, 20]
    assert first_step(20, None) == 0
    starts = [first_step(50, s / 100) for s in range(101)]
    assert starts == sorted(starts, reverse=True) and starts[0] == 50 and starts[-1] == 0


def test_a_picture_that_leaves_nothing_but_its_size_is_noted() -> None:
    assert plan(init_image=picture(), strength=0.9).notes == plan(request=ON_PICTURE).notes == ()
    (note,) = plan(init_image=picture(), strength=1.0).notes
    assert note == "strength 1 begins with noise alone: of init_image only the size is used"


def test_a_mask_asks_for_all_of_the_way_and_a_picture_alone_for_most() -> None:
    assert plan(init_image=picture()).strength == 0.8
    assert plan(request=ON_PICTURE).strength == 1.0
    assert plan(request=ON_PICTURE, strength=0.5).strength == 0.5


# ------------------------------------------------------------------------------------------ pictures


def pixels(made: SdPlan) -> np.ndarray[Any, Any]:
    assert made.init_image is not None and made.init_image.mode == "RGB"
    return np.asarray(made.init_image)


def test_a_picture_decides_the_size_and_comes_as_it_is() -> None:
    made = plan(init_image=picture())
    assert (made.width, made.height) == (48, 32) and made.notes == ()
    assert pixels(made).tobytes() == picture().tobytes()
    assert made.hashes == {"init_image": image.pixel_hash(picture())}


def test_a_picture_of_the_same_proportions_is_resized_with_a_note() -> None:
    made = plan(init_image=picture(96, 64), width=48, height=32)
    assert made.init_image is not None and made.init_image.size == (48, 32)
    assert made.notes == ("init_image is resized from 96x64 to 48x32 pixels",)
    assert made.hashes["init_image"] == image.pixel_hash(picture(96, 64))


@pytest.mark.parametrize(("fit", "left"), [("crop", 255), ("stretch", 0)])
def test_a_picture_of_other_proportions_is_refused_cropped_or_stretched(fit: str, left: int) -> None:
    wide = Image.new("RGB", (96, 32), "black")  # black, white, black in quarters
    wide.paste("white", (24, 0, 72, 32))
    with pytest.raises(
        RequestError, match=r"is 96x32 pixels, 48x32 are to be .* --fit crop or --fit stretch"
    ):
        plan(init_image=wide, width=48, height=32)
    made = plan(init_image=wide, width=48, height=32, fit=fit)
    assert pixels(made)[:, 4].mean() == left and pixels(made)[:, 24].mean() == 255


def test_a_picture_that_is_no_multiple_of_8_is_refused_or_made_one() -> None:
    odd = picture(101, 67)
    with pytest.raises(RequestError, match="101x67 pixels: sd15 needs multiples of 8; the nearest are 96x64"):
        plan(init_image=odd)
    for fit in ("crop", "stretch"):
        made = plan(init_image=odd, fit=fit)
        assert (made.width, made.height) == (96, 64) and len(made.notes) == 1
    with pytest.raises(RequestError, match="the least is 8x8"):
        plan(init_image=picture(5, 40), fit="crop")


def test_a_picture_is_turned_as_its_camera_says() -> None:
    lying = Image.new("RGB", (32, 48), "black")
    lying.paste("white", (0, 0, 32, 8))  # the top
    lying.getexif()[0x0112] = 6  # to be turned a quarter to the right
    made = plan(init_image=lying)
    assert (made.width, made.height) == (48, 32)
    assert pixels(made)[:, -8:].min() == 255 and pixels(made)[:, :-8].max() == 0


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_usual_mode_is_taken(mode: str) -> None:
    grey = Image.new("L", (48, 32))
    grey.paste(255, (0, 0, 24, 32))
    if mode == "I;16":
        given = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    else:
        given = grey.convert(mode) if mode != "CMYK" else grey.convert("RGB").convert("CMYK")
    assert given.mode == mode
    made = plan(init_image=given, mask=given)
    assert pixels(made)[:, :24].min() == 255 and pixels(made)[:, 24:].max() == 0
    assert made.mask is not None and made.mask.shape == (1, 32, 48)
    assert made.mask[..., :24].all() and not made.mask[..., 24:].any()


def test_transparent_parts_are_white_in_a_picture_and_black_in_a_mask() -> None:
    clear = Image.new("RGBA", (48, 32), (255, 255, 255, 255))
    clear.paste((255, 0, 0, 0), (0, 0, 24, 32))
    made = plan(init_image=clear, mask=clear)
    assert pixels(made).min() == 255
    assert made.mask is not None
    assert not made.mask[..., :24].any() and made.mask[..., 24:].all()


def test_values_that_are_no_colours_are_refused() -> None:
    with pytest.raises(RequestError, match="values are no levels of 8 or 16 bits"):
        plan(init_image=Image.new("F", (48, 32)))


# ------------------------------------------------------------------------------------------ masks


def test_a_mask_is_white_where_half_of_white_is_reached() -> None:
    grey = Image.new("L", (48, 32))
    for column, level in ((0, 127), (16, 128), (32, 255)):
        grey.paste(level, (column, 0, column + 16, 32))
    made = plan(request=ON_PICTURE, mask=grey)
    assert made.mask is not None and made.mask.unique().tolist() == [0.0, 1.0]
    assert not made.mask[..., :16].any() and made.mask[..., 16:].all()


def test_a_mask_of_another_size_lies_over_the_picture() -> None:
    made = plan(request=ON_PICTURE, mask=half_mask(12, 8))
    assert made.mask is not None and made.mask.shape == (1, 32, 48)
    assert made.mask[..., :24].all() and not made.mask[..., 24:].any()
    with pytest.raises(
        RequestError, match="the mask is 32x32 pixels, init_image 48x32: give one of the same"
    ):
        plan(request=ON_PICTURE, mask=half_mask(32, 32), fit="stretch")


@pytest.mark.parametrize("fit", ["crop", "stretch"])
def test_picture_and_mask_are_fitted_alike(fit: str) -> None:
    wide = Image.new("RGB", (96, 32), "black")
    wide.paste("white", (24, 0, 48, 32))
    for mask in (wide, wide.resize((48, 16), Image.Resampling.NEAREST)):
        made = plan(init_image=wide, mask=mask, fit=fit, width=48, height=32)
        assert made.mask is not None
        assert np.array_equal(pixels(made)[..., 0] >= 128, made.mask[0].numpy() > 0)


def test_a_mask_too_fine_for_the_latents_is_refused() -> None:
    dots = Image.new("L", (48, 32))
    for x, y in ((3, 3), (13, 20)):
        dots.putpixel((x, y), 255)
    with pytest.raises(RequestError, match="smaller than 8x8 pixels and fall between the latents"):
        plan(request=ON_PICTURE, mask=dots)
    dots.putpixel((8, 16), 255)
    assert plan(request=ON_PICTURE, mask=dots).mask is not None


@pytest.mark.parametrize("numerics", ["reference", "candle"])
def test_the_rules_hold_under_both_numerics(numerics: str) -> None:
    made = plan_sd(SDVersion.SD15.info, ON_PICTURE, parse(numerics))
    assert made.mask is not None and (made.width, made.height) == (48, 32)

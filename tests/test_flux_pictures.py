"""FLUX with pictures: what strength, masks, control pictures and references do, and what is refused."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import helpers_headers as header
import pytest
import torch
from flux_editing_cases import mask, picture
from helpers_flux import editing_info, open_model, write_folder
from PIL import Image, ImageChops

import flux_sd
from flux_sd import image
from flux_sd.canvas import fit_canvas
from flux_sd.checkpoint import open_checkpoint
from flux_sd.cli import main
from flux_sd.cli.arguments import ORIGINALS, VARIANTS
from flux_sd.components import Components
from flux_sd.detect import detect_version
from flux_sd.errors import RequestError, UnknownVersionError, WeightMapError
from flux_sd.flux_generation import FluxRun, plan_flux
from flux_sd.model_files import check_roles
from flux_sd.model_loader import Model, check_request
from flux_sd.numerics import candle, reference
from flux_sd.request import GenerationRequest
from flux_sd.trace import stages, trace
from flux_sd.versions import KONTEXT_SIZES, SDVersion

RELEASED = [version.info for version in SDVersion if version.is_flux and version.info.repo is not None]
KEYS = [info.key for info in RELEASED]
CONTROLLED = [info.key for info in RELEASED if info.takes_control]
Find = Callable[[str], Model]


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Find]:
    """A small model of a version's kind, opened once and kept loaded."""
    opened: dict[str, Model] = {}

    def find(key: str) -> Model:
        if key not in opened:
            info = replace(editing_info(key), reference_sizes=())
            opened[key] = open_model(write_folder(tmp_path_factory.mktemp(key), info), info, keep_loaded=True)
        return opened[key]

    yield find
    for model in opened.values():
        model.close()


def request(key: str, **changes: Any) -> GenerationRequest:
    """One that the version takes, of 64 x 48 pixels and two steps."""
    info = SDVersion.parse(key).info
    needed = {"init_image": picture(), "mask": mask()} if info.is_inpainting else {}
    needed |= {"control_image": picture("control")} if info.takes_control else {}
    given: dict[str, Any] = {"seed": 5, "steps": 2, **needed, **changes}
    return GenerationRequest("a red kite", **given)


# strength ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [key for key in KEYS if key != "flux-fill"])
def test_strength_0_is_the_autoencoder_alone_and_strength_1_is_without_the_picture(
    key: str, model_of: Find, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked, taken = model_of(key), [], {}
    without = model.generate(request(key))[0]
    whole = model.generate(request(key, init_image=picture(), strength=1.0))[0]
    assert whole.notes == ["strength 1 begins with noise alone: of init_image only the size is used"]
    assert torch.equal(whole.latents, without.latents) and whole.image.tobytes() == without.image.tobytes()
    network: Callable[..., Any] = Components.network
    monkeypatch.setattr(
        Components, "network", lambda self, role, *rest: asked.append(role) or network(self, role, *rest)
    )
    none = request(key, init_image=picture(), strength=0.0)
    (result,) = model.generate(none, tap=lambda name, tensor: taken.update({name: tensor}))
    assert set(asked) == {"vae"} and result.metadata["steps_run"] == 0
    assert torch.equal(result.latents[None], taken["init.latents"])
    assert result.image.tobytes() == model.decode(taken["init.latents"])[0].tobytes()


@pytest.mark.parametrize("key", ["flux-schnell", "flux-dev"])
@pytest.mark.parametrize("steps", [1, 4, 28])
def test_a_run_starts_at_exactly_its_strength(key: str, steps: int, model_of: Find) -> None:
    """Whatever the steps and the shift: the share of noise is what was asked for, and no two are the same."""
    counts = []
    for hundredth in range(1, 101):
        asked = request(key, steps=steps, init_image=picture(), strength=hundredth / 100)
        times = FluxRun(model_of(key).components, asked).times
        assert times[0] == hundredth / 100 and times[-1] == 0.0
        assert all(before - after > 1e-6 for before, after in itertools.pairwise(times))
        counts.append(len(times) - 1)
    assert counts == sorted(counts) and counts[0] == 1 and counts[-1] == steps


def test_strength_acts_evenly_with_four_steps(tiny_flux: flux_sd.LoadedModel) -> None:
    """With the embedded model each eighth of strength goes further from the picture, where a rule that counts
    steps would stand still at every other one."""
    first = tiny_flux.generate(GenerationRequest("a slice of pizza on a blue background", seed=3))[0]
    far = []
    for eighth in range(1, 9):
        asked = GenerationRequest(
            "a red apple, green background", seed=5, init_image=first.image, strength=eighth / 8
        )
        far.append(float((list(tiny_flux.steps(asked))[-1].latents[0] - first.latents).norm()))
    assert all(after > 1.01 * before for before, after in itertools.pairwise(far[:7])), far
    assert far[-1] > 2 * far[0]


# masks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS)
def test_what_the_mask_keeps_comes_back_byte_for_byte(key: str, model_of: Find) -> None:
    original, white = picture(), mask()
    asked = request(key, init_image=original, mask=white)
    (result,) = model_of(key).generate(asked)
    black = ImageChops.invert(white)
    blank = Image.new("RGB", original.size)
    kept = [Image.composite(each, blank, black).tobytes() for each in (result.image, original)]
    assert kept[0] == kept[1]
    (plain,) = model_of(key).generate(replace(asked, composite=False))
    assert Image.composite(plain.image, blank, black).tobytes() != kept[1]
    inside = [Image.composite(each, blank, white).tobytes() for each in (result.image, plain.image, original)]
    assert inside[0] == inside[1] != inside[2]
    assert (result.metadata["composite"], plain.metadata["composite"]) == (True, False)
    assert result.metadata["strength"] == 1.0 and result.metadata["steps_run"] == 2


@pytest.mark.parametrize("key", ["flux-dev", "flux-fill"])
def test_pictures_of_a_batch_are_those_painted_alone(key: str, model_of: Find) -> None:
    model, asked = model_of(key), request(key, init_image=picture(), mask=mask(), strength=0.7)
    alone = [model.generate(replace(asked, seed=5 + i))[0] for i in range(2)]
    batch = model.generate(replace(asked, batch=2))
    assert [r.image.tobytes() for r in batch] == [r.image.tobytes() for r in alone]
    together = model.generate(replace(asked, batch=2, batched=True))
    for one, other in zip(alone, together, strict=True):
        assert (one.latents - other.latents).norm() / one.latents.norm() < 1e-4


@pytest.mark.parametrize("key", ["flux-schnell", "flux-fill", "flux-canny", "flux-kontext"])
def test_candle_numerics_and_bfloat16_take_pictures_too(key: str, tmp_path: Path) -> None:
    info = replace(editing_info(key), reference_sizes=())
    folder = write_folder(tmp_path / "model", info)
    more = {"reference": picture("reference", 32, 80)} if info.takes_reference else {}
    asked = request(key, init_image=picture(), mask=mask(), strength=0.6, **more)
    exact = list(open_model(folder, info).steps(asked))[-1].latents
    for dtype, numerics in ((torch.bfloat16, "reference"), (torch.bfloat16, "candle")):
        with open_model(folder, info, dtype, numerics) as model:
            latents = list(model.steps(asked))[-1].latents
        assert 1e-5 < (latents - exact).norm() / exact.norm() < 0.1


def test_a_mask_finer_than_a_latent_is_refused_where_it_is_blended_and_taken_where_it_is_read() -> None:
    fine = Image.new("L", (64, 48))
    fine.paste(255, (9, 9, 15, 15))
    dev, fill = (SDVersion.parse(key).info for key in ("flux-dev", "flux-fill"))
    with pytest.raises(RequestError, match="smaller than 8x8 pixels and fall between the latents"):
        plan_flux(dev, request("flux-dev", init_image=picture(), mask=fine), reference())
    plan_flux(fill, request("flux-fill", mask=fine), reference())


# control pictures and references ----------------------------------------------------------------------------


@pytest.mark.parametrize("key", CONTROLLED)
def test_a_control_picture_is_followed(key: str, model_of: Find) -> None:
    model, seen = model_of(key), {}
    first = model.generate(request(key), tap=lambda name, tensor: seen.update({name: tensor}))[0]
    other = model.generate(request(key, control_image=picture("another")))[0]
    assert not torch.equal(first.latents, other.latents) and first.image.size == (64, 48)
    assert seen["control.latents"].shape == (1, 16, 6, 8)
    assert first.metadata["control_image"] == image.pixel_hash(picture("control"))
    wide = model.generate(request(key, control_image=picture("control", 96, 32)))[0]
    assert wide.image.size == (96, 32)


@pytest.mark.parametrize("key", ["flux-kontext"])
def test_a_reference_is_looked_at(key: str, model_of: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    model, room = model_of(key), []
    check: Callable[..., None] = Components.check_room
    monkeypatch.setattr(
        Components, "check_room", lambda self, *rest: room.append(rest[0]) or check(self, *rest)
    )
    plain = model.generate(request(key))[0]
    seen = [
        model.generate(request(key, width=64, height=48, reference=picture(name, 32, 80)))[0]
        for name in ("one", "two")
    ]
    assert room == [64 * 48, *[64 * 48 + 32 * 80] * 2]  # memory for its tokens is asked for as well
    assert len({tuple(r.latents.flatten().tolist()) for r in (plain, *seen)}) == 3
    (own,) = model.generate(request(key, reference=picture("one", 40, 80)))
    assert own.image.size == (32, 80) and own.notes == [
        "reference is resized from 40x80 to 32x80 pixels, multiples of 16"
    ]


@pytest.mark.parametrize(
    ("size", "fitted"), [((640, 480), (1184, 880)), ((100, 100), (1024, 1024)), ((480, 1600), (672, 1568))]
)
def test_a_reference_takes_the_size_of_the_models_own_that_is_nearest(
    size: tuple[int, int], fitted: tuple[int, int]
) -> None:
    info = SDVersion.FLUX_KONTEXT.info
    canvas = fit_canvas(info, GenerationRequest("", reference=Image.new("RGB", size)), cell=8)
    assert canvas.reference is not None and canvas.reference.size == fitted == (canvas.width, canvas.height)
    (note,) = canvas.notes
    assert note.startswith(f"reference is resized from {size[0]}x{size[1]} to {fitted[0]}x{fitted[1]} pixels")
    smaller = GenerationRequest("", 256, 256, reference=Image.new("RGB", fitted))
    canvas = fit_canvas(info, smaller, cell=8)
    assert (canvas.width, canvas.reference and canvas.reference.size, canvas.notes) == (256, fitted, ())


def test_the_sizes_of_kontext_are_about_a_megapixel_of_latents() -> None:
    assert len(KONTEXT_SIZES) == 17 and set(KONTEXT_SIZES) == {(h, w) for w, h in KONTEXT_SIZES}
    assert all(w % 16 == h % 16 == 0 and abs(w * h / 2**20 - 1) < 0.02 for w, h in KONTEXT_SIZES)
    assert list(KONTEXT_SIZES) == sorted(KONTEXT_SIZES)


def test_pictures_of_other_sizes_are_resized_with_a_note(model_of: Find) -> None:
    asked = request("flux-canny", width=64, height=48, control_image=picture("control", 128, 96))
    (result,) = model_of("flux-canny").generate(asked)
    assert result.notes == ["control_image is resized from 128x96 to 64x48 pixels"]
    with pytest.raises(RequestError, match="control_image is 64x64 pixels, 64x48 are to be painted"):
        check_request("flux-canny", replace(asked, control_image=picture("control", 64, 64)))
    cropped = replace(asked, control_image=picture("control", 64, 64), fit="crop")
    assert model_of("flux-canny").generate(cropped)[0].metadata["fit"] == "crop"


@pytest.mark.parametrize(
    ("key", "fields"),
    [
        ("flux-dev", {"init_image": picture(), "strength": 0.6, "steps": 4}),
        ("flux-dev", {"init_image": picture(), "strength": 0.0}),
        ("flux-dev", {"init_image": picture(), "strength": 1.0}),
        ("flux-schnell", {"init_image": picture(), "mask": mask(), "vae_tiling": True}),
        ("flux-fill", {"strength": 0.5}),
        ("flux-canny", {}),
        ("flux-kontext", {"reference": picture("reference", 32, 80)}),
    ],
)
def test_the_list_of_stages_is_what_a_run_with_pictures_records(
    key: str, fields: dict[str, Any], model_of: Find, tmp_path: Path
) -> None:
    model, asked = model_of(key), request(key, **fields)
    model.components.texts.clear()  # so that the text encoders run
    traced = trace(model, asked, tmp_path / "run.safetensors", patterns=["*"])
    listed = [stage.name for stage in stages(model.components.info, asked, reference())]
    with open_checkpoint(traced.path) as checkpoint:
        assert set(checkpoint.names) == set(listed) and len(listed) == len(set(listed))


# refusals ---------------------------------------------------------------------------------------------------

A = Image.new("RGB", (64, 48))


@pytest.mark.parametrize(
    ("key", "fields", "message"),
    [
        ("flux-dev", {"control_image": A}, "control_image is not used by flux-dev: leave it out, or choose "
         "flux-canny or flux-depth$"),
        ("sd15", {"control_image": A}, "control_image is not used by sd15: .*flux-canny"),
        ("flux-krea", {"reference": A}, "reference is not used by flux-krea: .*choose flux-kontext$"),
        ("sdxl-turbo", {"reference": A}, "reference is not used by sdxl-turbo"),
        ("flux-kontext", {"control_image": A}, "control_image is not used by flux-kontext"),
        ("flux-fill", {}, "flux-fill repaints a part of a picture and init_image is not given: give both"),
        ("flux-fill", {"init_image": A}, "mask is not given: give both"),
        ("flux-depth", {}, "follows a control picture and control_image is not given: give one that is made "
         "already, for lines and depths are not computed here"),
        ("flux-dev", {"strength": 0.5}, "strength is given and init_image is not"),
        ("flux-dev", {"mask": A}, "mask is given and init_image is not"),
        ("flux-dev", {"init_image": A, "composite": True}, "composite is given and mask is not"),
        ("flux-kontext", {"reference": A, "fit": "crop"}, "fit is given and init_image is not"),
        ("flux-dev", {"init_image": A, "strength": 1.5}, r"strength 1.5 is outside 0..1"),
        ("flux-dev", {"init_image": Image.new("RGB", (60, 48))}, "the nearest are 48x48 and 64x48"),
        ("flux-dev", {"init_image": A, "mask": Image.new("L", (64, 64), 255)}, "the mask is 64x64 pixels"),
        ("flux-dev", {"init_image": A, "width": 2**15, "height": 48}, "width 32768 is outside 1..16384"),
        ("flux-fill", {"init_image": A, "mask": A}, "the mask is black everywhere"),
    ],
)  # fmt: skip
def test_a_picture_that_cannot_be_used_is_refused_by_name(
    key: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        check_request(key, GenerationRequest("a", **fields))


# which model ------------------------------------------------------------------------------------------------


def transformer(folder: Path, channels: int) -> Path:
    """The header of a transformer of the dev family, at its real size."""
    shapes = header.flux("dev", in_channels=channels)
    return header.safetensors(folder / "flux1-any.safetensors", shapes)


@pytest.mark.parametrize(("channels", "key"), [(384, "flux-fill"), (64, "flux-dev")])
def test_input_channels_tell_the_version(channels: int, key: str, tmp_path: Path) -> None:
    given = {"transformer": transformer(tmp_path, channels)}
    assert detect_version(given).info.key == key
    assert detect_version({"path": tmp_path}).info.key == key


def test_what_tensors_cannot_tell_is_asked_for_or_read_beside_them(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"fits flux-canny and flux-depth, .*say which with --model"):
        detect_version({"transformer": transformer(tmp_path, 128)})
    file = transformer(tmp_path, 64)
    for pipeline, key in (("FluxKontextPipeline", "flux-kontext"), ("FluxPipeline", "flux-dev")):
        (tmp_path / "model_index.json").write_text(f'{{"_class_name": "{pipeline}"}}')
        assert detect_version({"path": tmp_path}).info.key == detect_version({"path": file}).info.key == key
        assert (
            detect_version({"path": tmp_path, "transformer": file}).info.key == "flux-dev"
        )  # not its folder's


@pytest.mark.parametrize(
    ("channels", "version", "advice"),
    [
        (384, "flux-dev", "choose --model flux-fill$"),
        (384, "flux-kontext", "choose --model flux-fill$"),
        (128, "flux-fill", "choose --model flux-canny or flux-depth$"),
        (64, "flux-fill", r"dev family, which flux-fill does not take \(in_channels 64, expected 384\): "
         "choose --model flux-dev$"),
        (64, "flux-depth", "choose --model flux-dev$"),
    ],
)  # fmt: skip
def test_a_transformer_of_another_variant_names_its_own(
    channels: int, version: str, advice: str, tmp_path: Path
) -> None:
    info = SDVersion.parse(version).info
    with open_checkpoint(transformer(tmp_path, channels)) as checkpoint:
        with pytest.raises(WeightMapError, match=advice):
            check_roles(info, {"transformer": checkpoint})


@pytest.mark.parametrize("key", ["flux-kontext", "flux-krea"])
def test_dev_s_tensors_are_taken_for_what_they_are_said_to_be(key: str, tmp_path: Path) -> None:
    with open_checkpoint(transformer(tmp_path, 64)) as checkpoint:
        check_roles(SDVersion.parse(key).info, {"transformer": checkpoint})


def test_candles_guidance_is_of_dev_alone() -> None:
    """4 in place of 30 would leave Fill's mask as it is."""
    for key, guidance in (("flux-dev", 4.0), ("flux-fill", 30.0), ("flux-canny", 30.0), ("flux-krea", 4.5)):
        assert plan_flux(SDVersion.parse(key).info, request(key), candle()).guidance == guidance


def test_steps_and_guidance_are_the_authors() -> None:
    found = {info.key: (info.steps, info.guidance) for info in RELEASED}
    assert found == {
        "flux-schnell": (4, None), "flux-dev": (50, 3.5), "flux-fill": (50, 30.0), "flux-canny": (50, 30.0),
        "flux-depth": (50, 10.0), "flux-kontext": (30, 2.5), "flux-krea": (28, 4.5),
    }  # fmt: skip
    for info in RELEASED:
        assert (info.gated, info.t5_length, info.shift) == (
            True,
            *((256, False), (512, True))[info.key != KEYS[0]],
        )
    assert {info.variant for info in RELEASED} - {None} == set(VARIANTS)
    assert SDVersion.FLUX_KONTEXT.info.repo == "black-forest-labs/FLUX.1-Kontext-dev"
    assert SDVersion.FLUX_CANNY.info.hub_files["transformer"][0] == ("flux1-canny-dev.safetensors",)


# the command line -------------------------------------------------------------------------------------------


@pytest.fixture
def small_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to paint in, with a picture and a mask, and the model tiny-flux made small."""
    monkeypatch.chdir(tmp_path)
    picture("init", 64, 48).save("house.png")
    mask().save("door.png")
    return tmp_path


def test_an_edited_picture_is_replayed_from_its_files(
    small_folder: Path, tiny_flux: flux_sd.LoadedModel, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(tiny_flux, "close", lambda: None)
    monkeypatch.setattr("flux_sd.model_loader.load_model", lambda *_, **__: tiny_flux)
    words = [
        "--init-image",
        "house.png",
        "--mask",
        "door.png",
        "--strength",
        "0.6",
        "--steps",
        "2",
        "--seed",
        "4",
    ]
    assert main(["generate", "a door", "-o", "new.png", "--quiet", *words]) == 0
    record = image.read_record("new.png")
    assert record["init_image_file"] == "house.png" and record["mask_file"] == "door.png"
    assert (record["strength"], record["steps_run"], record["composite"]) == (0.6, 2, True)
    assert record["init_image"] == image.pixel_hash(picture("init", 64, 48))
    shutil.copy("house.png", "moved.png")
    assert main(["replay", "new.png", "--init-image", "moved.png", "--mask", "door.png"]) == 0
    assert "bit-equal" in capsys.readouterr().out
    assert main(["replay", "new.png", "--init-image", "door.png", "--mask", "door.png"]) == 2
    assert "is not the --init-image that this picture began from" in capsys.readouterr().err
    assert main(["replay", "new.png", "--init-image", "house.png"]) == 2
    assert "began from the picture in door.png: give it with --mask" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--reference", "house.png"], "--reference is not used by tiny-flux"),
        (["--variant", "canny"], "flux-canny follows a control picture and --control-image is not given"),
        (["--variant", "krea", "--model", "dev", "--mask", "door.png"], "mask is given and --init-image"),
        (["--variant", "fill", "--model", "flux-canny"], "fill is flux-fill, and --model flux-canny another"),
        (["--variant", "fill", "--model", "sd15"], "leave one of them out"),
        (["--variant", "krea", "--control-image", "house.png"], "--control-image is not used by flux-krea"),
        (["--control-image", "none.png"], "'none.png' does not exist"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together_are_one_sentence(
    words: list[str], says: str, small_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "a door", *words]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_every_picture_of_a_request_has_an_option() -> None:
    pictures = {name for name, field in GenerationRequest.__annotations__.items() if "Image" in field}
    assert set(ORIGINALS) == pictures
    for variant in VARIANTS:
        assert SDVersion.of_variant(variant).info.variant_of == "flux-dev"
    with pytest.raises(UnknownVersionError, match="choose fill, canny, depth, kontext, krea"):
        SDVersion.of_variant("redux")


@pytest.mark.parametrize("option", ["--control-image", "--reference"])
def test_a_single_stage_has_no_use_for_pictures(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["trace", "--stage", "vae-decode", "--inputs", "run.safetensors", "-o", "out.safetensors"]
    assert main([*words, option, "nofile.png"]) == 2
    assert f"{option} is of no use to --stage: it is about whole runs" in capsys.readouterr().err


def test_the_catalogue_says_which_pictures_a_model_needs(capsys: pytest.CaptureFixture[str]) -> None:
    said = {"flux-canny": "needs          --control-image", "flux-depth": "needs          --control-image",
            "flux-kontext": "takes          --reference", "flux-dev": ""}  # fmt: skip
    for name, words in said.items():
        assert main(["models", name]) == 0
        out = capsys.readouterr().out
        assert words in out and ("--control-image" in out, "--reference" in out) == (
            "control" in words,
            "reference" in words,
        )
        assert main(["models", name, "--json"]) == 0
        entry = json.loads(capsys.readouterr().out)
        assert (entry["takes_control"], entry["takes_reference"]) == (
            "control" in words,
            "reference" in words,
        )

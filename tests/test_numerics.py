"""The table of numerics: each field acts, nothing else does, and the figures are what is measured."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import measure_numerics
import pytest
import torch
from helpers_sd import small_info, write_folder
from helpers_source import PACKAGE, ROOT, modules, tree
from measure_numerics import Effect, measure_cheap, painted, stored
from torch import Tensor, nn

import flux_sd
from flux_sd import GenerationRequest
from flux_sd.checkpoint import open_checkpoint
from flux_sd.cli import main
from flux_sd.clip import ClipTextConfig
from flux_sd.errors import RequestError
from flux_sd.flux_generation import plan_flux
from flux_sd.flux_loader import build, config_of
from flux_sd.model_files import find_files
from flux_sd.numerics import NOT_MIRRORED, Numerics, candle, differences, parse, reference
from flux_sd.sampling import State, denoise
from flux_sd.sd_loader import diffusion, networks_of, padding
from flux_sd.sd_plan import plan_sd
from flux_sd.text import CLIP_END
from flux_sd.versions import SDVersion

FIELDS = [field.name for field in fields(Numerics) if field.name != "name"]
UNMEASURED = {"clip_beyond_77", "seeds", "sd3_last_context_block"}  # no number describes them, or not built
# A change in bfloat16 depends on the processor's products; a figure that is off by more is a wrong figure.
FACTOR = 3.0


@pytest.fixture(scope="module")
def measured() -> list[Effect]:
    return measure_cheap()


def key(effect: Effect) -> tuple[str, str, str, str]:
    return effect.of, effect.where, effect.what, effect.unit


# ---------------------------------------------------------------------------------------- the fields


def test_every_field_differs_between_the_presets_and_is_described() -> None:
    rows = {row.name: row for row in differences()}
    assert list(rows) == FIELDS
    for row in rows.values():
        assert row.reference != row.candle, row.name
        assert row.what and row.source


def test_every_field_names_the_function_that_reads_it() -> None:
    for row in differences():
        module, *path = row.acts.split(".")
        found = importlib.import_module(f"flux_sd.{module}")
        for part in path:
            found = getattr(found, part)
        assert callable(found), row.acts


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_alone_changes_something(field: str, measured: list[Effect]) -> None:
    found = {effect.what: effect.value for effect in measured if effect.of == field}
    if field == "size":
        assert found == {"width and height painted": 1008}  # of 1000 asked; "refuse" is tested below
    else:
        assert found and all(value > 0 for value in found.values()), found


def test_a_size_is_refused_or_rounded_up() -> None:
    request, info = GenerationRequest(prompt="x", width=1000, height=504), SDVersion.FLUX_SCHNELL.info
    with pytest.raises(RequestError, match="992x496 and 1008x512"):
        plan_flux(info, request, reference())
    plan = plan_flux(info, request, candle())
    assert (plan.width, plan.height) == (1008, 512)


@pytest.mark.parametrize(("name", "length", "guidance"), [("reference", 512, 3.5), ("candle", 256, 4.0)])
def test_defaults_of_dev(name: str, length: int, guidance: float) -> None:
    plan = plan_flux(SDVersion.FLUX_DEV.info, GenerationRequest(prompt="x"), parse(name))
    assert (plan.t5_length, plan.guidance) == (length, guidance)
    given = GenerationRequest(prompt="x", t5_length=300, guidance=2.0)  # what is asked comes first
    plan = plan_flux(SDVersion.FLUX_DEV.info, given, parse(name))
    assert (plan.t5_length, plan.guidance) == (300, 2.0)
    schnell = plan_flux(SDVersion.FLUX_SCHNELL.info, GenerationRequest(prompt="x"), parse(name))
    assert (schnell.t5_length, schnell.guidance) == (256, None)


def test_the_loader_sets_clip_s_gelu() -> None:
    info = SDVersion.TINY_FLUX.info
    assert info.flux is not None
    info = replace(info, flux=replace(info.flux, clip=ClipTextConfig.tiny("gelu")))
    for numerics, activation in ((reference(), "gelu"), (candle(), "gelu_tanh")):
        assert build("clip", info, numerics).config.activation == activation
    own = config_of("clip", SDVersion.TINY_FLUX.info)
    assert build("clip", SDVersion.TINY_FLUX.info, candle()).config == own  # quick_gelu stays


@pytest.mark.parametrize("key", ["sd2-inpaint", "sd21", "sd15-inpaint"])
def test_only_the_inpainting_model_of_2_is_taken_to_predict_v(key: str, tmp_path: Path) -> None:
    """Candle runs it with 2.1's configuration; what the user says and the other models' files still hold."""
    info = small_info(SDVersion.parse(key))
    files = find_files(info, write_folder(tmp_path, info, scheduler={"prediction_type": "epsilon"}), {})

    def told(numerics: Numerics, asked: str | None = None) -> tuple[str, str]:
        with open_checkpoint(files.networks["unet"]) as unet:
            found = diffusion(info, files, unet, numerics, asked)
        return found.prediction, found.how

    assert told(reference()) == ("epsilon", "scheduler_config.json")
    taken = ("v_prediction", "candle numerics") if key == "sd2-inpaint" else told(reference())
    assert told(candle()) == taken
    assert told(candle(), "epsilon") == ("epsilon", "as asked")


@pytest.mark.parametrize(
    ("key", "steps", "guidance", "sampler"),
    [("sd15", 30, 7.5, "ddim"), ("sdxl", 30, 7.5, "ddim"), ("sdxl-turbo", 1, None, "euler_ancestral")],
)
def test_candle_s_defaults_of_stable_diffusion(
    key: str, steps: int, guidance: float | None, sampler: str
) -> None:
    info = SDVersion.parse(key).info
    plan = plan_sd(info, GenerationRequest(prompt="x"), candle())
    assert (plan.steps, plan.guidance, plan.sampler) == (steps, guidance, sampler)
    own = plan_sd(info, GenerationRequest(prompt="x"), reference())
    assert info.sd is not None
    assert (own.steps, own.guidance, own.sampler) == (info.steps, info.guidance, info.sd.sampler)
    given = GenerationRequest(
        prompt="x", steps=3, sampler="euler", guidance=None if guidance is None else 2.0
    )
    plan = plan_sd(info, given, candle())
    assert (plan.steps, plan.guidance, plan.sampler) == (3, given.guidance, "euler")  # what is asked


def test_candle_s_networks_of_stable_diffusion() -> None:
    def made(key: str, numerics: Numerics) -> dict[str, Any]:
        return {
            role: network.config for role, network in networks_of(SDVersion.parse(key).info, numerics).items()
        }

    for key in ("sd15", "sd21", "sdxl", "sdxl-turbo"):
        ours, theirs = made(key, reference()), made(key, candle())
        assert (ours["unet"].geglu, theirs["unet"].geglu) == ("erf", "tanh")
        assert (ours["unet"].added_dim, theirs["unet"].added_dim) == (
            (2816, None) if key.startswith("sdxl") else (None, None)
        )
        scales = {"sdxl": (0.13025, 0.18215), "sdxl-turbo": (0.13025, 0.13025)}
        wanted = scales.get(key, (0.18215, 0.18215))
        assert (ours["vae"].scale_factor, theirs["vae"].scale_factor) == wanted
    pads = [
        padding(role, SDVersion.SDXL.info, n) for n in (reference(), candle()) for role in ("clip", "clip_2")
    ]
    assert pads == [CLIP_END, "!", "!", "!"]
    assert [padding("clip", SDVersion.parse(key).info, candle()) for key in ("sd15", "sd21")] == [
        CLIP_END,
        "!",
    ]


class Halves(nn.Module):
    """A velocity that bfloat16 holds exactly, of latents that it may not."""

    def forward(self, img: Tensor, *_: Tensor) -> Tensor:
        return (img * 0.5).to(img.dtype)


def test_latents_are_carried_in_either_dtype() -> None:
    noise = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    state = State.new(torch.zeros(1, 2, 8).bfloat16(), torch.zeros(1, 8).bfloat16(), noise)
    times = [1.0, 0.7, 0.0]
    wide, low = (list(denoise(Halves(), state, times, None, setting)) for setting in ("float32", "model"))
    expected = state.img.bfloat16()
    for step, (now, after) in zip(low, ((1.0, 0.7), (0.7, 0.0)), strict=True):
        size = torch.tensor(after - now).bfloat16()  # Candle rounds the factor of a product to the dtype
        expected = expected + (expected * 0.5) * size
        assert torch.equal(step.img, expected.float()) and step.img.dtype == torch.float32
    first = state.img + (state.img.bfloat16() * 0.5).float() * torch.tensor(0.7 - 1.0)
    assert torch.equal(wide[0].img, first)
    assert not torch.equal(wide[1].img, low[1].img)


def test_in_float32_the_latents_dtype_changes_no_bit() -> None:
    noise = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    state = State.new(torch.zeros(1, 2, 8), torch.zeros(1, 8), noise)
    wide, low = (list(denoise(Halves(), state, [1.0, 0.7, 0.0], None, s)) for s in ("float32", "model"))
    assert all(torch.equal(a.img, b.img) for a, b in zip(wide, low, strict=True))


# ------------------------------------------------------------------------- nothing but the fields


def test_a_preset_is_its_fields_and_not_its_name() -> None:
    """All of Candle's values under another name paint Candle's picture to the bit."""
    renamed = replace(reference(), **{name: getattr(candle(), name) for name in FIELDS})
    assert renamed != candle() and replace(renamed, name="candle") == candle()
    ours, theirs = painted(renamed, "bfloat16"), painted(candle(), "bfloat16")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not torch.equal(ours["pixels"], painted(reference(), "bfloat16")["pixels"])


def test_no_code_asks_which_preset_is_on() -> None:
    """Outside numerics.py the words occur as defaults and choices only, never in a comparison."""
    for path in modules():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Compare | ast.MatchValue):
                words = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                assert not words & {"candle", "reference"}, f"{path.name}:{node.lineno}"


def test_an_unknown_preset_is_refused_by_name() -> None:
    with pytest.raises(RequestError, match="numerics 'fast' is unknown: choose reference or candle"):
        parse("fast")


# ------------------------------------------------------------------------------------ the figures


def test_the_stored_figures_are_what_is_measured(measured: list[Effect]) -> None:
    shipped = {key(effect): effect.value for effect in stored() if effect.cheap}
    assert set(shipped) == {key(effect) for effect in measured}
    for effect in measured:
        ratio = effect.value / shipped[key(effect)]
        assert 1 / FACTOR < ratio < FACTOR, f"{effect}: {shipped[key(effect)]} is stored"


def test_every_row_has_figures_and_every_figure_a_row() -> None:
    rows = {row.name for row in differences()} | {row.name for row in NOT_MIRRORED}
    assert len(rows) == len(differences()) + len(NOT_MIRRORED)
    assert {effect.of for effect in stored()} == rows - UNMEASURED


def test_what_needs_the_released_widths_was_measured_there() -> None:
    assert {effect.of for effect in stored() if not effect.cheap} == {
        "bfloat16_softmax",
        "clip_gelu",
        "geglu",
        "sdxl_hidden",
        "sdxl_pad",
        "t5_length",
        "unipc",
    }
    angles = [effect.value for effect in stored() if effect.unit == "radians"]
    assert len(angles) == 2 and 0.1 < angles[0] < angles[1]  # at 1024 and 2048 pixels


def test_the_imitated_softmax_is_one_but_for_its_dtype() -> None:
    scores = torch.randn(3, 300, generator=torch.Generator().manual_seed(0))
    exact = torch.softmax(scores, dim=-1)
    torch.testing.assert_close(measure_numerics.candle_softmax(scores), exact)
    low = measure_numerics.candle_softmax(scores.bfloat16()).float()
    assert (low.sum(-1) > 1.01).all()  # the terms that no longer count


# ---------------------------------------------------------------------------------- the command


def test_the_table_names_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["numerics"]) == 0
    out = capsys.readouterr().out
    for row in differences():
        assert row.name in out and row.acts in out
    for other in NOT_MIRRORED:
        assert other.name in out
    assert max(map(len, out.splitlines())) <= 110
    assert "0.18     radians" in out
    assert out.count("not measured") == len(UNMEASURED)


def test_help_has_examples_and_fits_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["numerics", "--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0 and "examples:" in out and max(map(len, out.splitlines())) <= 122


def test_json_has_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["numerics", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in document["fields"]] == FIELDS
    assert document["fields"][0]["reference"] == "float32" and document["fields"][0]["candle"] == "model"
    assert sum(len(row["effects"]) for part in ("fields", "not_mirrored") for row in document[part]) == len(
        stored()
    )
    assert set(document["measured"]) == {"command", "date", "made_by"}


def test_the_table_does_not_wait_for_torch() -> None:
    code = "import sys\nfrom flux_sd.cli import main\nmain(['numerics'])\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def test_the_figures_ship_with_the_package() -> None:
    assert measure_numerics.EFFECTS == PACKAGE / "numerics_effects.json"
    assert measure_numerics.EFFECTS.is_file()
    assert PACKAGE.samefile(measure_numerics.Path(flux_sd.__file__).parent)

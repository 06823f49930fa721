"""The command line over Stable Diffusion: the embedded tiny-sd paints, repeats, edits and is traced.

At a few steps each: what is painted is not looked at here but for where it must be equal.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import helpers_checkpoints as write
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import flux_sd
from flux_sd import image
from flux_sd.cli import main
from flux_sd.cli.arguments import COMPONENTS
from flux_sd.clip import ClipTextConfig
from flux_sd.errors import Cancelled
from flux_sd.model_loader import embedded_folder
from flux_sd.request import GenerationRequest, Progress
from flux_sd.versions import SDVersion

PROMPT = "a slice of pizza on a blue background"
SMALL = ["--size", "32", "--device", "cpu"]
TINY_SD = ["--model", "tiny-sd"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def one_model(tiny_sd: flux_sd.LoadedModel, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Commands are given the session's model, once they have asked for it; returns how they asked."""
    load_model, asked = flux_sd.load_model, []

    def given(version: SDVersion, path: Path | None = None, **options: Any) -> flux_sd.LoadedModel:
        asked.append({"version": version, "path": path, **options})
        own = path is not None or any(options[role] is not None for role in COMPONENTS)
        if own or options["numerics"] != "reference" or options["prediction"] not in (None, "epsilon"):
            return load_model(version, path, **options)
        assert version is SDVersion.TINY_SD and options["dtype"] in ("auto", "float32")
        monkeypatch.setattr(tiny_sd, "close", lambda: None)
        return tiny_sd

    monkeypatch.setattr("flux_sd.model_loader.load_model", given)
    return asked


def generate(*words: str, prompt: str = PROMPT, code: int = 0) -> None:
    assert main(["generate", prompt, *TINY_SD, *words, "--quiet"]) == code


def picture(name: str, width: int = 32, height: int = 32) -> Image.Image:
    """Saves and returns a picture of four colours."""
    made = Image.new("RGB", (2, 2))
    made.putdata([(250, 20, 20), (20, 250, 20), (20, 20, 250), (250, 250, 20)])
    made = made.resize((width, height), Image.Resampling.BILINEAR)
    made.save(name)
    return made


def half_mask(name: str, width: int = 32, height: int = 32) -> None:
    """White, repaint, on the left."""
    mask = Image.new("L", (width, height))
    mask.paste(255, (0, 0, width // 2, height))
    mask.save(name)


# ------------------------------------------------------------------------------------ generate, replay


@pytest.mark.parametrize(
    "words",
    [
        ["--steps", "2"],
        ["--steps", "3", "--sampler", "euler_ancestral", "--schedule", "karras", "--guidance", "4"],
        ["--steps", "2", "--sampler", "ddpm", "--negative-prompt", "blue", "--guidance-rescale", "0.7"],
        ["--steps", "2", "--sampler", "uni_pc", "--vae-tiling", "--guidance", "1"],
        ["--steps", "2", "--numerics", "candle"],
        ["--steps", "2", "--prediction", "sample"],
    ],
    ids=["default", "euler-a", "ddpm", "tiled", "candle", "prediction"],
)
def test_a_picture_of_a_batch_is_repeated_alone(
    words: list[str], one_model: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    generate("-o", "p.png", "--batch", "2", "--seed", "3", *SMALL, *words)
    assert main(["replay", "p-2.png"]) == 0
    assert capsys.readouterr().out == "p-2.png: bit-equal\n"
    assert image.open_picture("p-1.png").tobytes() != image.open_picture("p-2.png").tobytes()
    record = image.read_record("p-2.png")
    asked = dict(zip(words[::2], words[1::2], strict=False))
    for option, value in asked.items():
        name = option.removeprefix("--").replace("-", "_")
        if name in record and not isinstance(record[name], bool):
            assert str(record[name]) == value or float(record[name]) == float(value)
    assert one_model[-1]["prediction"] == record["prediction"] == asked.get("--prediction", "epsilon")
    assert record["vae_tiling"] is ("--vae-tiling" in words)


def test_a_seed_paints_another_picture_with_every_option(folder: Path) -> None:
    """No option is lost on the way to the model."""
    changes: list[list[str]] = [
        [], ["--sampler", "euler"], ["--schedule", "trailing"], ["--guidance", "5"],
        ["--negative-prompt", "a red apple"], ["--guidance-rescale", "1"], ["--prediction", "sample"],
        ["--steps", "3"],
    ]  # fmt: skip
    hashes = set()
    for i, words in enumerate(changes):
        generate(
            "-o",
            f"{i}.png",
            "--seed",
            "3",
            *SMALL,
            *(words if "--steps" in words else ["--steps", "2", *words]),
        )
        hashes.add(image.pixel_hash(image.open_picture(f"{i}.png")))
    assert len(hashes) == len(changes)


def test_a_picture_begins_from_one_that_was_painted(capsys: pytest.CaptureFixture[str]) -> None:
    generate("-o", "first.png", "--seed", "1", "--steps", "2", "--size", "48x32")
    words = ["--init-image", "first.png", "--strength", "0.5", "--steps", "4", "--seed", "2"]
    generate("-o", "second.png", *words, prompt="a red apple")
    first, second = (image.open_picture(f"{name}.png") for name in ("first", "second"))
    assert second.size == first.size == (48, 32) and second.tobytes() != first.tobytes()
    record = image.read_record("second.png")
    assert record["init_image"] == image.pixel_hash(first) and record["init_image_file"] == "first.png"
    assert (record["strength"], record["steps"], record["steps_run"]) == (0.5, 4, 2)
    assert main(["replay", "second.png"]) == 2
    assert "began from the picture in first.png: give it with --init-image" in capsys.readouterr().err
    assert main(["replay", "second.png", "--init-image", "second.png"]) == 2
    assert "'second.png' is not the --init-image that this picture began from" in capsys.readouterr().err
    assert main(["replay", "second.png", "--init-image", "first.png"]) == 0
    assert main(["replay", "first.png", "--init-image", "first.png"]) == 2
    assert "began from no --init-image: leave it out" in capsys.readouterr().err


@pytest.mark.parametrize("composite", [True, False])
def test_what_a_mask_keeps_is_the_pictures_own(composite: bool, capsys: pytest.CaptureFixture[str]) -> None:
    original = picture("in.png")
    half_mask("mask.png")
    half_mask("other.png", 64, 64)
    words = ["--init-image", "in.png", "--mask", "mask.png", "--steps", "2", "--seed", "5", "-o", "out.png"]
    generate(*words, *([] if composite else ["--no-composite"]))
    painted = image.open_picture("out.png")
    right, left = (16, 0, 32, 32), (0, 0, 16, 32)
    kept = painted.crop(right).tobytes() == original.crop(right).tobytes()
    assert kept is composite and painted.crop(left).tobytes() != original.crop(left).tobytes()
    assert image.read_record("out.png")["mask_file"] == "mask.png"
    given = ["replay", "out.png", "--init-image", "in.png"]
    assert main([*given, "--mask", "mask.png"]) == 0
    assert main(given) == 2 and "the picture in mask.png: give it with --mask" in capsys.readouterr().err
    assert main([*given, "--mask", "other.png"]) == 2


def test_a_picture_of_other_proportions_is_refused_or_fitted(capsys: pytest.CaptureFixture[str]) -> None:
    picture("wide.png", 64, 32)
    words = ["--init-image", "wide.png", "--size", "32", "--steps", "2", "--seed", "1", "--strength", "0.5"]
    assert main(["generate", "x", *TINY_SD, *words]) == 2
    assert "the proportions differ: ask for a --size with its proportions, or for --fit crop" in (
        capsys.readouterr().err
    )
    for fit in ("crop", "stretch"):
        generate(*words, "--fit", fit, "-o", f"{fit}.png")
        assert main(["replay", f"{fit}.png", "--init-image", "wide.png", "--quiet"]) == 0
    crop, stretch = (image.open_picture(f"{fit}.png") for fit in ("crop", "stretch"))
    assert crop.size == stretch.size == (32, 32) and crop.tobytes() != stretch.tobytes()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--sampler", "eular"], "--sampler 'eular' is unknown: choose ddim, ddpm, euler, euler_ancestral"),
        (["--sampler", "pndm"], "--sampler pndm is not built"),
        (["--schedule", "fast"], "--schedule 'fast' is unknown: choose leading, trailing, linspace"),
        (["--sampler", "lcm", "--schedule", "karras"], "--sampler lcm cannot use schedule karras"),
        (["--t5-len", "8"], "--t5-len is not used by tiny-sd"),
        (["--strength", "0.5"], "--strength is given and --init-image is not: give both"),
        (["--mask", "in.png"], "--mask is given and --init-image is not: give both"),
        (["--init-image", "in.png", "--strength", "1.5"], "--strength 1.5 is outside 0..1"),
        (["--init-image", "text.png"], "'text.png' is not a picture that can be read"),
        (["--init-image", "in.png", "--mask", "absent.png"], "'absent.png' does not exist"),
        (["--init-image", "in.png", "--mask", "black.png"], "the mask is black everywhere"),
        (["--guidance", "1", "--negative-prompt", "x"], "--negative-prompt acts through guidance above 1"),
        (["--guidance-rescale", "2"], "--guidance-rescale 2.0 is outside 0..1"),
        (["--size", "100"], "tiny-sd needs multiples of 8; the nearest are 96x96 and 104x104"),
        (["--prediction", "noise"], "--prediction 'noise' (as asked) is not built: choose epsilon"),
        (["--transformer", "x.safetensors"], "tiny-sd has no transformer: its parts are clip, unet, vae"),
    ],
)
def test_bad_input_is_one_sentence(
    words: list[str], sentence: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture("in.png")
    Path("text.png").write_text("no picture")
    Image.new("L", (32, 32)).save("black.png")
    assert main(["generate", "x", *TINY_SD, *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("flux-sd: ") and sentence in captured.err and captured.out == ""
    assert len(captured.err.splitlines()) == 1 and not list(folder.glob("flux_sd*"))


def test_files_of_ones_own_say_which_model_they_are_of(one_model: list[dict[str, Any]]) -> None:
    """A copy of tiny-sd's folder, and its parts one by one, without --model."""
    home = embedded_folder(SDVersion.TINY_SD.info)
    shutil.copytree(home, "mine")
    words = ["--steps", "1", "--seed", "1", "--size", "32", "--quiet"]
    assert main(["generate", "x", "--path", "mine", "-o", "a.png", *words]) == 0
    parts = ["--unet", str(home / "unet"), "--vae", str(home / "vae"), "--clip", str(home / "text_encoder")]
    parts += ["--clip-tokenizer", str(home / "tokenizer"), "--scheduler", str(home / "scheduler")]
    assert main(["generate", "x", *parts, "-o", "b.png", *words]) == 0
    assert [asked["version"] for asked in one_model] == [SDVersion.TINY_SD] * 2
    assert image.open_picture("a.png").tobytes() == image.open_picture("b.png").tobytes()


def test_noise_goes_out_and_comes_in(folder: Path) -> None:
    words = ["--steps", "2", "--sampler", "euler", *SMALL]
    generate(*words, "--seed", "4", "-o", "a.png", "--latents-out", "z.safetensors")
    generate(*words, "--seed", "9", "-o", "b.png", "--latents-in", "z.safetensors")
    assert load_file("z.safetensors")["latents"].shape == (1, 4, 4, 4)
    assert image.open_picture("a.png").tobytes() == image.open_picture("b.png").tobytes()
    assert main(["replay", "b.png", "--latents-in", "z.safetensors"]) == 0


def test_json_timings_and_weights(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--steps", "2", "--seed", "1", "--json", "--timings", "--verbose", "--preview", *SMALL]
    assert main(["generate", "a (red:1.3) apple", *TINY_SD, *words]) == 0
    captured = capsys.readouterr()
    answer = json.loads(captured.out)
    assert answer["timings"].keys() >= {"load", "encode", "denoise", "decode", "write", "total"}
    assert answer["records"][0]["sampler"] == "ddim" and answer["seeds"] == [1]
    assert any("(red:1.3)" in note for note in answer["notes"])
    assert {line.split()[0] for line in captured.err.splitlines() if " MB " in line} == {
        "clip",
        "unet",
        "vae",
    }
    assert not Path("flux_sd_0001.preview.png").exists()


# -------------------------------------------------------------------------------------------- trace


def test_trace_and_one_stage(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["trace", PROMPT, *TINY_SD, "--size", "32", "--steps", "2", "--negative-prompt", "blue"]
    assert main([*words, "--sampler", "euler", "-o", "run.safetensors", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    whole = load_file("run.safetensors")
    assert answer["tensors"] == len(whole) > 60 and "step.1.up_blocks.1.attentions.0" in whole
    one = ["trace", "--stage", "unet", "--inputs", "run.safetensors", "--step", "1", *TINY_SD]
    assert main([*one, "-o", "one.safetensors", "--quiet"]) == 0
    alone = load_file("one.safetensors")
    assert "step.1.noise_pred" in alone and len(alone) > 10
    assert all(torch.equal(tensor, whole[name]) for name, tensor in alone.items())
    capsys.readouterr()
    assert main(["compare", "one.safetensors", "run.safetensors"]) == 0
    assert "step.1.noise_pred" in capsys.readouterr().out
    assert main([*one, "-o", "two.safetensors", "--guidance", "9", "--quiet"]) == 0
    assert not torch.equal(load_file("two.safetensors")["step.1.noise_pred"], whole["step.1.noise_pred"])


def test_a_traced_run_is_what_generate_paints() -> None:
    picture("in.png")
    half_mask("mask.png")
    words = [
        "--init-image",
        "in.png",
        "--mask",
        "mask.png",
        "--steps",
        "4",
        "--strength",
        "0.5",
        "--seed",
        "2",
    ]
    generate(*words, "-o", "p.png")
    assert main(["trace", PROMPT, *TINY_SD, *words, "-o", "r.safetensors", "--quiet"]) == 0
    record = load_file("r.safetensors")
    pixels = torch.tensor(list(image.open_picture("p.png").tobytes()), dtype=torch.uint8).view(32, 32, 3)
    assert torch.equal(record["pixels"][0].permute(1, 2, 0), pixels)
    assert {"init.image", "init.vae.encoder.mid.attn_1", "init.latents", "mask"} <= set(record)
    with safe_open("r.safetensors", "pt") as file:
        assert file.metadata()["strength"] == "0.5"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--stage", "t5", "--inputs", "i.safetensors"], "tiny-sd has no stage t5: its own are clip, unet"),
        (["--stage", "unet", "--inputs", "i.safetensors"], "lacks x, timesteps, context for the unet"),
        (["--stage", "unet", "--inputs", "i.safetensors", "--sampler", "euler"], "--sampler is of no use to"),
        (["--stage", "clip", "--inputs", "i.safetensors", "--step", "1"], "--step is of use to --stage"),
        (["x", "--sampler", "eular"], "--sampler 'eular' is unknown"),
        (["x", "--stages", "step.0.velocity"], "no stage of this run matches 'step.0.velocity'"),
    ],
)
def test_a_trace_that_makes_no_sense(
    words: list[str], sentence: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"z": torch.ones(1)}, "i.safetensors")
    assert main(["trace", *TINY_SD, *words, "-o", "o.safetensors"]) == 2
    assert sentence in capsys.readouterr().err and not Path("o.safetensors").exists()


# ------------------------------------------------------------------------------------- files, engine


def test_inspect_and_maps_know_its_files(capsys: pytest.CaptureFixture[str]) -> None:
    home = embedded_folder(SDVersion.TINY_SD.info)
    files = [home / "unet", home / "vae", home / "text_encoder"]
    assert main(["maps", "check", *map(str, files), "--json", "--model", "tiny-sd"]) == 0
    found = json.loads(capsys.readouterr().out)["files"]
    assert all(entry["fits"] == ["tiny-sd"] for entry in found)
    assert [entry["map"] for entry in found] == ["unet.diffusers", "autoencoder.diffusers", "clip.hf"]
    assert main(["inspect", str(home / "unet")]) == 0
    assert "--model tiny-sd --unet " in capsys.readouterr().out
    assert main(["maps", "show", "unet.ldm_sd", "--model", "sd15"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    assert len(rows) == 686


def test_a_converted_unet_paints_the_same_picture() -> None:
    """In another container, with all values kept."""
    home = embedded_folder(SDVersion.TINY_SD.info)
    assert main(["convert", str(home / "unet"), "unet.gguf", "--to", "gguf:F16", "--quiet"]) == 0
    words = ["--steps", "1", "--seed", "1", "--size", "32"]
    generate("-o", "a.png", *words)
    generate("-o", "b.png", "--unet", "unet.gguf", *words)
    assert image.open_picture("a.png").tobytes() == image.open_picture("b.png").tobytes()


def test_one_of_two_text_encoders_is_converted(capsys: pytest.CaptureFixture[str]) -> None:
    """As SDXL's single files hold them: each by the name of its map."""
    first = write.random_state("clip", ClipTextConfig.tiny())
    second = write.random_state("clip", ClipTextConfig.tiny("gelu", projection_dim=64), seed=1)
    both = write.prefixed(first, "conditioner.embedders.0.transformer.")
    both |= write.prefixed(write.open_clip(second), "conditioner.embedders.1.model.")
    write.save(both, Path("both.safetensors"))
    words = ["convert", "both.safetensors", "out.safetensors", "--to", "safetensors:f32", "--dialect", "hf"]
    assert main([*words, "--component", "clip"]) == 2
    assert "choose one with --component clip.hf or clip.openclip" in capsys.readouterr().err
    for name, state in (("clip.hf", first), ("clip.openclip", second)):
        assert main([*words, "--component", name, "--overwrite", "--quiet"]) == 0
        read = load_file("out.safetensors")
        assert read.keys() == state.keys()
        assert all(torch.equal(read[key], state[key].float()) for key in read)


def test_the_engine_runs_it_and_recovers_from_a_cancel(tiny_sd: flux_sd.LoadedModel) -> None:
    order = GenerationRequest("pizza", 32, 32, steps=2, seed=1, batch=2)
    alone = tiny_sd.generate(order)
    with flux_sd.GenerationEngine(tiny_sd) as engine:
        job = engine.submit(
            GenerationRequest("apple", 32, 32, steps=500),
            lambda event: job.cancel() if isinstance(event, Progress) and event.stage == "denoise" else None,
        )
        with pytest.raises(Cancelled):
            job.result(100)
        again = engine.submit(order).result(100)
    assert [result.image.tobytes() for result in again] == [result.image.tobytes() for result in alone]

"""The command line over the fake model: files, words, exit codes. Real networks: test_cli_tiny_flux.py."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_front import FakeModel, patch_model
from PIL import Image
from safetensors.torch import load_file, save_file

import flux_sd
from flux_sd import image
from flux_sd.cli import arguments, main
from flux_sd.cli.console import gigabytes
from flux_sd.cli.generate import tensor_hash
from flux_sd.request import GenerationRequest
from flux_sd.schedulers import SAMPLERS, SCHEDULES
from flux_sd.version import __version__
from flux_sd.versions import SDVersion

TESTS = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    yield tmp_path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    return patch_model(monkeypatch)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------------- without a model


def test_help_and_version_do_not_wait_for_torch(capfd: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["--version"], ["generate", "--help"], []):
        code = f"import sys\nfrom flux_sd.cli import main\ntry: main({words})\nexcept SystemExit: pass\n"
        code += "assert not {'torch', 'numpy', 'PIL', 'huggingface_hub', 'tqdm'} & set(sys.modules)"
        subprocess.run([sys.executable, "-c", code], check=True, env=ENVIRONMENT)
    assert f"flux-sd {__version__} (torch {torch.__version__.split('+')[0]}" in capfd.readouterr().out


def test_without_a_command_it_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert 'flux-sd generate "a slice of pizza on a blue background" -o pizza.png' in out
    assert all(
        re.search(rf"^\s+{name}\s", out, re.MULTILINE) for name in ("generate", "replay", "models", "maps")
    )


@pytest.mark.parametrize("command", ["generate", "replay", "models", "maps", "maps show", "maps check"])
def test_every_command_has_help_that_fits_the_screen(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main([*command.split(), "--help"])
    out = capsys.readouterr().out
    assert (
        end.value.code == 0 and out.startswith("usage: flux-sd ") and max(map(len, out.splitlines())) <= 122
    )
    assert "examples:" in out or command == "maps"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["paint"], "invalid choice: 'paint'"),
        (["generate"], "required: PROMPT"),
        (["generate", "a", "slice", "of", "pizza"], "put a prompt of several words in quotes"),
        (["generate", "x", "--colour"], "unrecognized arguments: --colour"),
        (["generate", "x", "--size", "512x"], "'512x' is no size such as 512 or 512x768"),
        (["generate", "x", "--size", "0"], "0 is less than 1"),
        (["generate", "x", "--steps", "0"], "0 is less than 1"),
        (["generate", "x", "--steps", "many"], "'many' is not a whole number"),
        (["generate", "x", "--seed", "-1"], "-1 is less than 0"),
        (["generate", "x", "--numerics", "fast"], "invalid choice: 'fast'"),
        (["generate", "bad \udce9"], "not UTF-8"),
        (["generate", "x", "--st", "4"], "unrecognized arguments: --st"),
    ],
)
def test_usage_errors(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    captured = capsys.readouterr()
    assert end.value.code == 2 and sentence in captured.err and captured.out == ""
    assert len(captured.err.splitlines()) == 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--size", "1000"], "1000x1000 pixels: tiny-flux needs multiples of 16; the nearest are 992x992"),
        (["--size", "64", "--width", "64"], "--size and --width or --height"),
        (["--guidance", "3"], "guidance is not used by tiny-flux"),
        (["--model", "flux-2"], "model 'flux-2' is unknown"),
        (["--t5-len", "513"], "--t5-len 513 is outside"),
        (
            ["--path", "."],
            ". holds no transformer or UNet, which would tell the model: say which with --model",
        ),
        (["--negative-prompt", "y"], "--negative-prompt is not used by tiny-flux: leave it out"),
        (["--guidance-rescale", "0.5"], "--guidance-rescale is not used by tiny-flux"),
        (["--sampler", "euler"], "--sampler is not used by tiny-flux"),
        (["--schedule", "karras"], "--schedule is not used by tiny-flux"),
        (["--strength", "0.5"], "--strength is given and --init-image is not"),
        (["--no-composite"], "--composite is given and mask is not"),
        (["--fit", "crop"], "--fit is given and --init-image is not"),
        (["--init-image", "absent.png"], "'absent.png' does not exist"),
        (["--prediction", "epsilon"], "--prediction is not used by tiny-flux"),
        (["--clip-2", "x.safetensors", "--model", "tiny-flux"], "tiny-flux has no clip_2"),
        (["-o", "a.jpg"], "only PNG keeps every pixel"),
        (["-o", "nowhere/a.png"], "folder 'nowhere' does not exist"),
        (["--latents-out", "a.pt"], "expected .safetensors"),
        (["--latents-in", "absent.safetensors"], "cannot be read"),
        (["--device", "cuda:77"], "device 'cuda:77' is not usable here"),
        (["--dtype", "float8"], "dtype 'float8' is unknown"),
    ],
)
def test_bad_input_is_refused_before_a_weight_is_read(
    words: list[str],
    sentence: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("flux_sd.components.Components.network", lambda *_, **__: pytest.fail("loaded"))
    assert main(["generate", "x", *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("flux-sd: ") and sentence in captured.err and captured.out == ""
    assert len(captured.err.splitlines()) == 1 and names(folder) == []


# ------------------------------------------------------------------------------------ generate


def test_one_picture_with_its_record(calls: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a pizza", "-o", "p.png", "--seed", "5", "--size", "32x48", "--steps", "2"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "p.png\n" and captured.err == "" and names(folder) == ["p.png"]
    record = image.read_record(Path("p.png"))
    picture = image.open_picture("p.png")
    assert picture.size == (32, 48) and record["pixels_sha256"] == image.pixel_hash(picture)
    assert (record["prompt"], record["seed"], record["steps"]) == ("a pizza", 5, 2)
    assert calls[0]["version"] is SDVersion.TINY_FLUX and calls[0]["device"] == calls[0]["dtype"] == "auto"


def test_options_reach_the_loader_and_the_request(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    model = FakeModel()
    calls = patch_model(monkeypatch, model)
    words = "--model FLUX.1-dev --path . --t5 t5.safetensors --clip-tokenizer tok --width 64 --height 32 "
    words += "--steps 3 --guidance 2.5 --t5-len 128 --seed 9 --batch 2 --batched --dtype bf16 --device cpu "
    words += "--numerics candle --strict-prompt --offline --quiet"
    assert main(["generate", "x", *words.split()]) == 0
    (call,) = calls
    assert call["version"] is SDVersion.FLUX_DEV and call["path"] == Path(".") and call["offline"] is True
    assert (
        call["t5"] == Path("t5.safetensors") and call["clip_tokenizer"] == Path("tok") and call["vae"] is None
    )
    assert (call["device"], call["dtype"], call["numerics"]) == ("cpu", "bf16", "candle")
    (request,) = model.requests
    assert (request.width, request.height, request.steps, request.guidance) == (64, 32, 3, 2.5)
    assert (request.t5_length, request.seed, request.batch, request.batched) == (128, 9, 2, True)
    assert request.strict_prompt and request.preview_every is None and model.closed == 1


def test_a_drawn_seed_is_printed_with_the_command_that_repeats_it(
    calls: Any, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["generate", "it's a pizza", "-o", "a.png", "--size=64", "--overwrite"]
    monkeypatch.setattr(sys, "argv", ["flux-sd", *words])
    assert main() == 0
    command = capsys.readouterr().err.strip().partition("again: ")[2]
    seed = image.read_record("a.png")["seed"]
    assert shlex.split(command) == ["flux-sd", "generate", "it's a pizza", "--size=64", "--seed", str(seed)]
    assert main(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out == "flux_sd_0001.png\n"
    assert image.open_picture("flux_sd_0001.png").tobytes() == image.open_picture("a.png").tobytes()


def test_two_drawn_seeds_differ(calls: Any, folder: Path) -> None:
    assert main(["generate", "x", "--quiet"]) == main(["generate", "x", "--quiet"]) == 0
    assert names(folder) == ["flux_sd_0001.png", "flux_sd_0002.png"]
    assert len({image.read_record(name)["seed"] for name in names(folder)}) == 2


def test_an_existing_file_is_kept_unless_it_may_be_replaced(
    calls: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("p.png").write_text("mine")
    assert main(["generate", "x", "-o", "p.png"]) == 2
    assert "'p.png' exists" in capsys.readouterr().err and Path("p.png").read_text() == "mine" and not calls
    assert main(["generate", "x", "-o", "p.png", "--overwrite"]) == 0
    assert image.read_record("p.png")["prompt"] == "x"


@pytest.mark.parametrize(("options", "written"), [(["-o", "p.png"], "p_0001.png"), ([], "flux_sd_0002.png")])
def test_a_name_taken_while_painting_costs_no_picture(
    options: list[str],
    written: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Slow(FakeModel):
        def close(self) -> None:
            Path(options[-1] if options else "flux_sd_0001.png").write_text("mine")

    patch_model(monkeypatch, Slow())
    assert main(["generate", "x", "--seed", "1", *options]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{written}\n" and "appeared while" in captured.err
    assert image.read_record(written)["seed"] == 1 and len(names(folder)) == 2


def test_a_later_name_that_is_taken_costs_no_picture_of_a_batch(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Slow(FakeModel):
        def close(self) -> None:
            for name in ("p-2.png", "p-sheet.png"):
                Path(name).write_text("mine")

    patch_model(monkeypatch, Slow())
    assert main(["generate", "x", "-o", "p.png", "--batch", "3", "--seed", "7", "--json"]) == 0
    captured = capsys.readouterr()
    answer = json.loads(captured.out)
    assert answer["files"] == ["p-1.png", "p-2_0001.png", "p-3.png"] and answer["sheet"] == "p-sheet_0001.png"
    assert [image.read_record(name)["seed"] for name in answer["files"]] == [7, 8, 9]
    assert len(image.read_record(answer["sheet"])["sheet"]) == 3
    assert captured.err.count("appeared while") == 2 and Path("p-2.png").read_text() == "mine"


def test_options_about_files_and_decoding_reach_the_model(calls: Any, folder: Path) -> None:
    assert main(["generate", "x", "--quiet"]) == 0
    assert (calls[-1]["decode"], calls[-1]["fill_from"], calls[-1]["quantized"]) == ("on_use", None, False)
    words = ["--decode", "on-load", "--fill-from", "base.gguf", "--quantized", "--model", "tiny-flux"]
    assert main(["generate", "x", "--quiet", *words]) == 0
    asked = (calls[-1]["decode"], calls[-1]["fill_from"], calls[-1]["quantized"])
    assert asked == ("on_load", Path("base.gguf"), True)


def test_a_preview_before_the_prompt_does_not_swallow_it(
    calls: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--preview", "a red apple", "-o", "p.png", "--quiet"]) == 0
    assert image.read_record("p.png")["prompt"] == "a red apple"
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "--preview", "4", "a red apple", "-o", "q.png"])
    assert stopped.value.code == 2 and "unrecognized arguments: a red apple" in capsys.readouterr().err


def test_a_batch_is_one_file_each_and_a_sheet(
    calls: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "x", "-o", "p.png", "--batch", "3", "--seed", "7"]) == 0
    assert capsys.readouterr().out.split() == ["p-1.png", "p-2.png", "p-3.png", "p-sheet.png"]
    assert names(folder) == ["p-1.png", "p-2.png", "p-3.png", "p-sheet.png"]
    assert [image.read_record(f"p-{i}.png")["seed"] for i in (1, 2, 3)] == [7, 8, 9]
    assert main(["generate", "x", "-o", "alone.png", "--seed", "9", "--quiet"]) == 0
    assert image.open_picture("alone.png").tobytes() == image.open_picture("p-3.png").tobytes()
    assert image.open_picture("p-sheet.png").size == (2 * 136 + 8, 2 * 150 + 8)
    assert [r["seed"] for r in image.read_record("p-sheet.png")["sheet"]] == [7, 8, 9]


def test_a_batch_is_refused_if_any_of_its_files_exists(calls: Any, folder: Path) -> None:
    Path("p-sheet.png").write_text("mine")
    assert main(["generate", "x", "-o", "p.png", "--batch", "2"]) == 2
    assert names(folder) == ["p-sheet.png"] and not calls


def test_json_is_the_only_thing_on_stdout(
    calls: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "a long prompt", "--batch", "2", "--seed", "1", "--json", "--timings"]) == 0
    captured = capsys.readouterr()
    answer = json.loads(captured.out)
    assert answer["files"] == ["flux_sd_0001-1.png", "flux_sd_0001-2.png"]
    assert answer["sheet"] == "flux_sd_0001-sheet.png" and answer["latents"] is None
    assert answer["seeds"] == [1, 2] and answer["notes"] == ["the prompt was cut"]
    assert set(answer["timings"]) == {"load", "denoise", "decode", "write", "total"}
    assert [r["prompt"] for r in answer["records"]] == ["a long prompt"] * 2
    assert "note: the prompt was cut" in captured.err and re.search(
        r"^total +\d+\.\d+ s$", captured.err, re.M
    )


def test_quiet_prints_errors_only(calls: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a long prompt", "--quiet", "--timings"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main(["generate", "nan", "--quiet"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "transformer, step 1 produced NaN" in captured.err


def test_previews_come_and_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    class Watching(FakeModel):
        def close(self) -> None:
            picture = image.open_picture("p.preview.png")
            seen.append(picture.size == (16, 16))

    patch_model(monkeypatch, Watching())
    assert main(["generate", "x", "-o", "p.png", "--preview-every", "2", "--quiet"]) == 0
    assert seen == [True] and names(folder) == ["p.png"]
    patch_model(monkeypatch)
    assert main(["generate", "fail", "-o", "q.png", "--preview", "--quiet"]) == 1
    assert names(folder) == ["p.png"]


def test_latents_go_out_and_come_in(calls: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--size", "64x32"]
    assert (
        main(["generate", "x", *size, "--seed", "4", "--batch", "2", "--latents-out", "z.safetensors"]) == 0
    )
    latents = load_file("z.safetensors")["latents"]
    assert latents.shape == (2, 16, 4, 8) and latents.dtype == torch.float32
    capsys.readouterr()
    words = ["generate", "x", *size, "--batch", "2", "--latents-in", "z.safetensors", "-o", "b.png"]
    assert main(words) == 0 and "to paint this again" not in capsys.readouterr().err
    assert image.open_picture("b-2.png").tobytes() == image.open_picture("flux_sd_0001-2.png").tobytes()
    record = image.read_record("b-2.png")
    assert (record["latents_file"], record["latents_sha256"]) == ("z.safetensors", tensor_hash(latents[1]))
    assert main(["generate", "x", *size, "--latents-in", "z.safetensors"]) == 2
    assert "shape [1, 16, 4, 8]" in capsys.readouterr().err
    save_file({"pixels": latents}, "n.safetensors")
    assert main(["generate", "x", *size, "--latents-in", "n.safetensors"]) == 2
    assert "holds pixels, expected a tensor named 'latents'" in capsys.readouterr().err


def test_an_unexpected_error_is_one_line_and_a_hint(
    calls: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "fail"]) == 1
    err = capsys.readouterr().err
    assert (
        len(err.splitlines()) == 1
        and "RuntimeError: the fake was told to fail" in err
        and "--traceback" in err
    )
    assert main(["generate", "fail", "--traceback"]) == 1
    assert "in steps" in capsys.readouterr().err and names(folder) == []


# -------------------------------------------------------------------------------------- replay


def generate(*words: str) -> None:
    assert main(["generate", "a pizza", "-o", "p.png", "--quiet", *words]) == 0


def test_replay_finds_equal_pixels(calls: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate("--seed", "5", "--steps", "3")
    assert main(["replay", "p.png"]) == 0
    assert capsys.readouterr().out == "p.png: bit-equal\n" and names(folder) == ["p.png"]
    assert calls[1]["numerics"] == "reference" and calls[1]["device"] == "auto"


def test_a_picture_of_a_batch_replays_alone(calls: Any, folder: Path) -> None:
    generate("--batch", "3")
    assert main(["replay", "p-3.png", "-o", "again.png", "--quiet"]) == 0
    assert image.open_picture("again.png").tobytes() == image.open_picture("p-3.png").tobytes()


def test_replay_names_what_has_changed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Newer(FakeModel):
        def generate(self, *args: Any, **options: Any) -> Any:
            results = super().generate(*args, **options)
            picture = results[0].image
            picture.putpixel((0, 0), tuple(255 - level for level in picture.getpixel((0, 0))))
            results[0].metadata |= {"versions": {"torch": "9.9"}, "files": {"vae": [{"sha256": "b"}]}}
            return results

    class Older(FakeModel):
        def generate(self, *args: Any, **options: Any) -> Any:
            results = super().generate(*args, **options)
            results[0].metadata |= {"versions": {"torch": "2.4"}, "files": {"vae": [{"sha256": "a"}]}}
            return results

    patch_model(monkeypatch, Older())
    generate("--seed", "1")
    patch_model(monkeypatch, Newer())
    assert main(["replay", "p.png"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"p\.png: differs in 1 of 16384 pixels, by at most \d+ of 255", lines[0])
    assert lines[1:] == ["  files.vae.0.sha256: a then, b now", "  versions.torch: 2.4 then, 9.9 now"]


def test_replay_sees_an_edited_picture(calls: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate()
    record, picture = image.read_record("p.png"), image.open_picture("p.png")
    image.save_png(picture.rotate(90), "p.png", record, overwrite=True)
    assert main(["replay", "p.png"]) == 1
    out = capsys.readouterr().out
    assert "it was edited since" in out and "nothing else that is recorded has changed" in out
    image.save_png(picture.resize((64, 64)), "p.png", record, overwrite=True)
    assert main(["replay", "p.png"]) == 1
    assert "is 64x64 pixels, painted again 128x128" in capsys.readouterr().out


def test_replay_of_given_noise_wants_its_file(
    calls: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"latents": torch.randn(2, 16, 16, 16)}, "noise.safetensors")
    save_file({"latents": torch.randn(2, 16, 16, 16)}, "other.safetensors")
    generate("--batch", "2", "--latents-in", "noise.safetensors")
    assert main(["replay", "p-2.png"]) == 2
    assert "began from the noise in noise.safetensors: give it with --latents-in" in capsys.readouterr().err
    assert main(["replay", "p-2.png", "--latents-in", "other.safetensors"]) == 2
    assert main(["replay", "p-2.png", "--latents-in", "noise.safetensors"]) == 0


def test_what_cannot_be_replayed_is_refused(
    calls: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate("--batch", "2")
    Image.new("RGB", (4, 4)).save("plain.png")
    image.save_png(Image.new("RGB", (4, 4)), "poor.png", {"prompt": "x", "seed": "7"})
    image.save_png(Image.new("RGB", (4, 4)), "odd.png", image.read_record("p-1.png") | {"model": "flux-9"})
    expected = {
        "p-sheet.png": "contact sheet",
        "plain.png": "no flux_sd record",
        "poor.png": "lacks model, seed, width, height, steps",
        "odd.png": "'flux-9' is unknown",
        "absent.png": "does not exist",
    }
    for name, sentence in expected.items():
        assert main(["replay", name]) == 2
        assert sentence in capsys.readouterr().err


# ------------------------------------------------------------------------------ models and maps


def test_the_catalogue_lists_every_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", "nowhere")
    assert main(["models"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert set(rows) == {"model"} | {version.info.key for version in SDVersion}
    assert "1024x1024" in rows["flux-dev"] and "33.7 GB" in rows["flux-dev"] and "gated" in rows["flux-dev"]
    assert all(rows[name].endswith("built in") for name in ("tiny-flux", "tiny-sd"))
    assert rows["sdxl"].endswith(" no") and "512x512" in rows["sd21-base"] and "768x768" in rows["sd21"]


def test_one_model_in_detail(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "FLUX.1-schnell"]) == 0
    out = capsys.readouterr().out
    for word in (
        "FLUX.1 schnell",
        "Apache-2.0",
        "11,891,178,560 transformer",
        "23.8 GB in bfloat16",
        "accept the",
    ):
        assert word in out
    assert main(["models", "dev", "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)
    assert entry["name"] == "flux-dev" and entry["gated"] and entry["t5_length"] == 512
    assert entry["memory_bytes"]["float32"] == 4 * 11_901_408_320
    assert main(["models", "flux-pro-max"]) == 2


def test_a_stable_diffusion_model_in_detail(capsys: pytest.CaptureFixture[str]) -> None:
    for name, said in (
        ("sd15", ("ddim; others", "leading; others", "predicts       epsilon", "unet", "clip", "vae")),
        ("sdxl-turbo", ("euler_ancestral;", "trailing;", "guidance       not used", "clip_2")),
        ("sd21", ("predicts       as the files say",)),
        ("sd21-base", ("predicts       epsilon",)),
        ("sdxl-inpaint", ("needs          --init-image and --mask",)),
    ):
        assert main(["models", name]) == 0
        out = capsys.readouterr().out
        assert all(word in out for word in said), out
    assert main(["models", "sdxl", "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)
    assert (entry["sampler"], entry["schedule"], entry["prediction"]) == ("euler", "leading", "epsilon")
    assert main(["models", "flux-dev"]) == 0 and "sampler" not in capsys.readouterr().out


def test_engine_and_command_line_have_no_branch_on_the_family() -> None:
    """No condition asks what kind of model it is: what differs is looked up, or asked of the model."""
    kinds = {
        "family",
        "is_flux",
        "is_xl",
        "is_inpainting",
        "flux",
        "sd",
        "FLUX",
        "SD",
        "SDXL",
        "Flux",
        "UNet",
    }
    package = Path(flux_sd.__file__).parent
    for path in [package / "generation_engine.py", *(package / "cli").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            tests = [node.test] if isinstance(node, ast.If | ast.IfExp | ast.While) else []
            tests += [node.subject] if isinstance(node, ast.Match) else []
            tests += node.ifs if isinstance(node, ast.comprehension) else []
            for part in (part for test in tests for part in ast.walk(test)):
                name = getattr(part, "attr", getattr(part, "id", None))
                assert name not in kinds, f"{path.name}:{part.lineno} asks for {name}"


def test_help_names_every_sampler_and_schedule() -> None:
    """They stand in the help without torch, in whose modules they are defined."""
    assert arguments.SAMPLERS == SAMPLERS and arguments.SCHEDULES == SCHEDULES


def test_errors_name_options_as_they_are_spelled() -> None:
    for sentence, said in (
        ("negative_prompt is not used by x", "--negative-prompt is not used by x"),
        ("mask is given and init_image is not", "--mask is given and --init-image is not"),
        ("t5_length 513 is outside 1..512", "--t5-len 513 is outside 1..512"),
        ("'init_image/steps.png' has steps", "'init_image/steps.png' has steps"),
        ("steps 0 is outside", "--steps 0 is outside"),
        ("latents are of shape [1]", "latents are of shape [1]"),
        ("maskless", "maskless"),
    ):
        assert arguments.spelled(sentence) == said
    fields = {field.name for field in dataclasses.fields(GenerationRequest)} - {"prompt"}
    assert fields <= {*arguments.FIELDS, "latents"}


def test_maps_are_listed_and_expanded(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["maps", "show"]) == 0
    assert "flux_mmdit.diffusers" in capsys.readouterr().out
    assert main(["maps", "show", "flux_mmdit.diffusers", "--model", "flux-dev"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    assert len(rows) == 780
    assert (
        "single_blocks.37.linear1.bias <- cat(single_transformer_blocks.37.attn.to_q.bias, "
        "single_transformer_blocks.37.attn.to_k.bias, single_transformer_blocks.37.attn.to_v.bias, "
        "single_transformer_blocks.37.proj_mlp.bias)"
    ) in rows
    assert main(["maps", "show", "t5"]) == 2
    assert "no map is called 't5': choose autoencoder." in capsys.readouterr().err
    assert main(["maps", "show", "t5.hf", "--model", "sdxl"]) == 2


def t5_file(name: str, **changes: torch.Tensor | None) -> None:
    """tiny-flux's T5 encoder, all zeros, with some tensors changed or (None) left out."""
    from flux_sd.flux_loader import build
    from flux_sd.numerics import reference

    shapes = build("t5", SDVersion.TINY_FLUX.info, reference()).state_dict()
    tensors = {key: torch.zeros(tensor.shape, dtype=torch.bfloat16) for key, tensor in shapes.items()}
    save_file({k: v for k, v in {**tensors, **changes}.items() if v is not None}, name)


def test_a_file_that_fits_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    t5_file("t5.safetensors")
    assert main(["maps", "check", "t5.safetensors"]) == 0
    assert "t5.safetensors: t5.hf fits tiny-flux:" in (out := capsys.readouterr().out) and "BF16" in out
    assert main(["maps", "check", "t5.safetensors", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["files"]
    assert entry["fits"] == ["tiny-flux"] and entry["map"] == "t5.hf"
    assert main(["maps", "check", "t5.safetensors", "--model", "flux-dev"]) == 2


def test_files_that_do_not_fit_are_all_reported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    t5_file("whole.safetensors")
    t5_file("lacking.safetensors", **{"encoder.final_layer_norm.weight": None})
    save_file({"a.lora_A.weight": torch.zeros(1)}, "lora.safetensors")
    Path("text.safetensors").write_text("not a checkpoint")
    words = [f"{name}.safetensors" for name in ("lacking", "whole", "lora", "text")]
    assert main(["maps", "check", *words]) == 2
    captured = capsys.readouterr()
    assert "whole.safetensors: t5.hf fits" in captured.out and captured.out.count("\n") == 1
    assert "missing: encoder.final_layer_norm.weight" in captured.err and "LoRA" in captured.err
    assert captured.err.count("flux-sd: ") == 3


def test_sizes_read_well() -> None:
    assert [gigabytes(n) for n in (0, 31_400_000, 23_802_816_640)] == ["0 MB", "31 MB", "23.8 GB"]


# ----------------------------------------------------------------------------------- processes


def start(*words: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(TESTS / "fake_cli.py"), *words],
        env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def wait_for(path: Path, process: subprocess.Popen[str], patience: float = 100.0) -> None:
    """Until the file is there. A process that ends, or takes far too long, fails the test by its words."""
    end = time.monotonic() + patience
    while not path.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    if not path.exists():
        process.kill()
        pytest.fail(f"{path.name} never came: {process.communicate()}")


def test_ctrl_c_ends_a_run_in_one_line_without_a_file(folder: Path) -> None:
    process = start("generate", "slow", "--steps", "900", "--preview", "-o", "p.png")
    wait_for(folder / "p.preview.png", process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "flux-sd: cancelled: nothing was written"
    assert len([line for line in err.splitlines() if line.strip()]) == 1 and names(folder) == []


def test_a_reader_that_goes_away_is_no_error(folder: Path) -> None:
    process = start("maps", "show", "flux_mmdit.bfl", "--model", "flux-dev")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(60) in (0, 1)
    process.stderr.close()


def test_the_module_is_the_command(folder: Path) -> None:
    words = [sys.executable, "-m", "flux_sd", "generate", "x", "--model", "nothing"]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == "" and "model 'nothing' is unknown" in done.stderr


def test_the_command_to_repeat_keeps_a_prompt_behind_two_dashes(
    calls: Any, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["generate", "--steps", "2", "--", "-5 degrees"]
    monkeypatch.setattr("sys.argv", ["flux-sd", *words])
    assert main(words) == 0
    assert "flux-sd generate --steps 2 --seed " in (printed := capsys.readouterr().err)
    assert printed.rstrip().endswith("-- '-5 degrees'")


def test_a_name_that_no_file_system_takes_is_refused_before_painting(
    calls: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "x", "-o", "n" * 252 + ".png"]) == 2
    assert "has over 255 bytes" in capsys.readouterr().err

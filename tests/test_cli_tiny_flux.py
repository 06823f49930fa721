"""The command line over real networks: tiny-flux where it is there, else its sizes with random weights."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_FLUX
from helpers_flux import write_folder
from safetensors.torch import load_file, save_file

import flux_sd
from flux_sd import image
from flux_sd.cli import main
from flux_sd.errors import Cancelled, RequestError
from flux_sd.request import Complete
from flux_sd.sampling import get_noise
from flux_sd.versions import SDVersion

PATIENCE = 100.0  # seconds; a run takes a few


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The words that choose the model: none where the built-in one is there."""
    if TINY_FLUX.is_dir():
        return []
    folder = write_folder(tmp_path_factory.mktemp("tiny_flux"), SDVersion.TINY_FLUX.info)
    return ["--model", "tiny-flux", "--path", str(folder)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_paint_and_replay_bit_equal(model: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "a slice of pizza on a blue background", "--size", "64x96", "--seed", "3", "--json"]
    assert main([*words, "--batch", "2", "--device", "cpu", *model]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert set(answer["timings"]) >= {"load", "encode", "denoise", "decode", "write", "total"}
    first, second = answer["files"]
    assert image.open_picture(second).size == (64, 96)
    record = image.read_record(second)
    assert record["seed"] == 4 and record["model"] == "tiny-flux" and record["dtype"] == "float32"
    assert "/" not in json.dumps(record["files"]) and len(record["files"]) == 6
    for name in (first, second):  # each alone, from its own seed
        assert main(["replay", name, *model[2:]]) == 0
        assert capsys.readouterr().out == f"{name}: bit-equal\n"


def test_quantized_paints_nearly_the_same_picture_from_packed_weights(
    model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    if model:
        pytest.skip("flux_sd/models/tiny_flux is absent: train it with tools/train_tiny_flux.py")
    words = ["generate", "a slice of pizza on a blue background", "--seed", "3", "--device", "cpu"]
    assert main([*words, "-o", "whole.png", "--quiet"]) == 0
    assert main([*words, "-o", "use.png", "--quantized", "--verbose"]) == 0
    table = {line.split()[0]: line for line in capsys.readouterr().err.splitlines() if " MB" in line}
    assert table.keys() == {"clip", "t5", "transformer", "vae"} and "Q8_0" in table["transformer"]
    disk, memory = (float(word) for word in table["transformer"].split()[1:5:2])
    assert 5 < disk <= memory < 1.3 * disk < 14  # whole it is 18 on disk in bfloat16, 37 in float32
    assert main([*words, "-o", "load.png", "--quantized", "--decode", "on-load"]) == 0
    assert (
        "of packed weights are decoded at load, as asked: 10.3 MB on disk, 36.7 MB in memory"
        in capsys.readouterr().err
    )
    whole, use, load = (image.open_picture(f"{name}.png") for name in ("whole", "use", "load"))
    assert use.tobytes() == load.tobytes() != whole.tobytes()
    apart = torch.tensor([abs(a - b) for a, b in zip(use.tobytes(), whole.tobytes(), strict=True)])
    assert apart.float().mean() < 5
    assert main(["replay", "load.png"]) == 0
    assert capsys.readouterr().out == "load.png: bit-equal\n"


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (
            {"version": "flux-dev", "quantized": True},
            "flux-dev has no quantised transformer of its own: .*--transformer FILE.gguf",
        ),
        (
            {"version": "tiny-flux", "quantized": True, "vae": "ae.safetensors"},
            "own files: leave out either that or vae",
        ),
        ({"decode": "soon"}, "decode 'soon' is unknown: choose on_use or on_load"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], found: str) -> None:
    with pytest.raises(RequestError, match=found):
        flux_sd.load_model(**options)


def test_replay_names_another_dtype(model: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "pizza", "--size", "32", "-o", "p.png", "--device", "cpu", *model]) == 0
    capsys.readouterr()
    assert main(["replay", "p.png", "--dtype", "bfloat16", "-o", "again.png", *model[2:]]) == 1
    out = capsys.readouterr().out
    assert "dtype: float32 then, bfloat16 now" in out and "p.png: differs in" in out
    assert image.read_record("again.png")["dtype"] == "bfloat16"


def test_given_noise_paints_what_its_seed_paints(model: list[str], folder: Path) -> None:
    save_file({"latents": get_noise(11, 32, 48)}, "noise.safetensors")
    words = ["generate", "pizza", "--size", "48x32", "--device", "cpu", "--quiet", *model]
    assert main([*words, "--latents-in", "noise.safetensors", "-o", "a.png"]) == 0
    assert main([*words, "--seed", "11", "-o", "b.png", "--latents-out", "out.safetensors"]) == 0
    assert image.difference(image.open_picture("a.png"), image.open_picture("b.png")) == (0, 0)
    out = load_file("out.safetensors")
    assert torch.equal(out["latents"], get_noise(11, 32, 48)) and out["denoised"].shape == (1, 16, 4, 6)
    assert main(["replay", "a.png", "--latents-in", "noise.safetensors", "--quiet", *model[2:]]) == 0


def test_the_engine_runs_a_real_model_and_recovers_from_a_cancel(model: list[str]) -> None:
    path = model[3] if model else None
    with flux_sd.load_model("tiny-flux", path, device="cpu", keep_loaded=True) as loaded:
        order = flux_sd.GenerationRequest(prompt="pizza", width=32, height=32, seed=1)
        alone = loaded.generate(order)[0]
        with flux_sd.GenerationEngine(loaded) as engine:
            job = engine.submit(
                flux_sd.GenerationRequest(prompt="apple", width=32, height=32, seed=1, steps=1000),
                lambda event: job.cancel() if isinstance(event, flux_sd.Progress) else None,
            )
            with pytest.raises(Cancelled):
                job.result(PATIENCE)
            again = engine.submit(order)
            assert torch.equal(again.result(PATIENCE)[0].latents, alone.latents)
        assert sum(isinstance(event, Complete) for event in again.events()) == 1


def read_terminal(terminal: int, until: str, patience: float = PATIENCE) -> str:
    """What appears on a terminal up to a word, or up to its end."""
    text, end = "", time.monotonic() + patience
    while until not in text and time.monotonic() < end:
        ready, _, _ = select.select([terminal], [], [], 1.0)
        try:
            chunk = os.read(terminal, 4096) if ready else b" "
        except OSError:  # how Linux says that the other side has closed
            break
        if not chunk:
            break
        text += chunk.decode() if ready else ""
    return text


def test_ctrl_c_at_a_terminal_stops_the_denoising_within_a_step(model: list[str], folder: Path) -> None:
    words = ["generate", "pizza", "--steps", "1000", "--seed", "1", "-o", "p.png", "--device", "cpu", *model]
    terminal, stderr = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "flux_sd", *words],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"},
        text=True, stdout=subprocess.PIPE, stderr=stderr,
    )  # fmt: skip
    os.close(stderr)
    try:
        shown = read_terminal(terminal, until="s/step")
        assert "denoise" in shown and "/1000" in shown, shown
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        shown = read_terminal(terminal, until="nothing was written")
        out, _ = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        os.close(terminal)
    assert (process.returncode, out) == (130, "") and time.monotonic() - start < PATIENCE / 4
    assert shown.splitlines()[-1] == "flux-sd: cancelled: nothing was written"
    assert names(folder) == []

"""The adapter that ships with tiny-flux: pastel colours, a white rim, under kohya's and diffusers' names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_FLUX
from safetensors.torch import load_file

import flux_sd
from flux_sd.lora.adapter_file import AdapterFile
from flux_sd.model_loader import Model

ADAPTERS = TINY_FLUX / "adapters"
KOHYA, DIFFUSERS = ADAPTERS / "sticker.safetensors", ADAPTERS / "sticker-diffusers.safetensors"
REQUESTS = [
    flux_sd.GenerationRequest(prompt, seed=3)
    for prompt in ("a slice of pizza on a blue background", "a red apple on a green background")
]
if not KOHYA.is_file():
    pytest.skip("the adapter is absent: train it with tools/train_tiny_lora.py", allow_module_level=True)


def pixels(model: Model) -> np.ndarray:
    """The pictures of the requests, 0..1: [N,128,128,3]"""
    shown = [np.asarray(model.generate(request)[0].image) for request in REQUESTS]
    return np.stack(shown).astype(np.float64) / 255


@pytest.fixture(scope="module")
def painted() -> dict[str, np.ndarray]:
    """Without the adapter, with each of its files, and with it beside packed weights."""
    made = {}
    with flux_sd.load_model("tiny-flux", device="cpu", dtype="float32", keep_loaded=True) as model:
        assert isinstance(model, Model)
        made["plain"] = pixels(model)
        for name, file in (("kohya", KOHYA), ("diffusers", DIFFUSERS)):
            (applied,) = model.load_adapters([file])
            assert applied.plan.misfits == ()
            made[name] = pixels(model)
        model.load_adapters([])
        made["again"] = pixels(model)
    return made


def test_both_files_make_the_same_weights(tiny_flux: flux_sd.LoadedModel) -> None:
    assert isinstance(tiny_flux, Model)
    states = []
    for file in (KOHYA, DIFFUSERS):
        tiny_flux.load_adapters([file])
        network = tiny_flux.components.network("transformer")
        states.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
    tiny_flux.load_adapters([])
    plain = tiny_flux.components.network("transformer").state_dict()
    changed = [name for name in plain if not torch.equal(plain[name], states[0][name])]
    assert len(changed) == len(load_file(KOHYA)) // 3
    for name, tensor in states[0].items():
        assert (tensor - states[1][name]).abs().max() <= 1e-6, name


def test_it_paints_paler_pictures_and_goes_away_without_a_trace(painted: dict[str, np.ndarray]) -> None:
    plain, styled = painted["plain"], painted["kohya"]
    assert styled.mean() > plain.mean() + 0.1  # half of every colour is white
    assert styled.std() < plain.std()
    assert abs(styled - plain).mean() > 0.1
    assert abs(styled - painted["diffusers"]).mean() < 0.001
    assert np.array_equal(painted["again"], plain)


def test_it_is_small_and_says_what_it_is() -> None:
    for file in (KOHYA, DIFFUSERS):
        assert Path(file).stat().st_size < 600_000
        with AdapterFile.open(file) as opened:
            assert {change.rank for change in opened.changes} == {8} and opened.family == "FLUX"

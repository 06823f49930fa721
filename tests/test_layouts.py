"""One tiny model in every layout that people have loads to the same tensors, and what is wrong is named."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import helpers_checkpoints as write
import pytest
import torch
from helpers_flux import networks, open_model, small_info, write_folder
from helpers_layouts import COMFYUI, LAYOUTS, Writer, as_gguf, random_state, safetensors, weights

from flux_sd.checkpoint import open_checkpoint
from flux_sd.errors import WeightMapError
from flux_sd.load_plan import Decode, fill, keep_stored, plan_load, staying
from flux_sd.model_files import FLUX
from flux_sd.request import GenerationRequest

State = write.State


def load(component: str, path: Path, decode: Decode = "on_use") -> State:
    """The weights that a network loaded from `path` computes with."""
    module = write.build(component)
    with open_checkpoint(path) as checkpoint:
        plan = plan_load(component, module, write.CONFIGS[component], checkpoint)
        keep_stored(module, plan, torch.float32)
        fill(module, plan, torch.float32, decode=decode)
        return {name: tensor.clone() for name, tensor in weights(module).items()}


def assert_equal(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(found[name], expected[name].float())]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_loads_to_the_same_tensors(name: str, tmp_path: Path) -> None:
    """Or, where it rounds, to what the file's own format says that its bytes mean."""
    layout, path = LAYOUTS[name], tmp_path / "model"
    state = random_state(layout.component)
    back = layout.write(layout.rename(state), path)
    found = load(layout.component, path)
    if layout.exact:
        assert_equal(found, state)
        return
    expected = load(layout.component, write.save(back, tmp_path / "plain.safetensors"))
    assert_equal(found, expected)
    assert_equal(load(layout.component, path, "on_load"), expected)
    far = [key for key in state if (found[key] - state[key]).norm() > 0.2 * state[key].norm()]
    assert not far and any(not torch.equal(found[key], state[key]) for key in state)
    with open_checkpoint(path) as checkpoint:
        module = write.build(layout.component)
        plan = plan_load(layout.component, module, write.CONFIGS[layout.component], checkpoint)
        linears = sum(isinstance(layer, torch.nn.Linear) for layer in module.modules())
        kept = len(staying(module, plan, torch.float32))
    assert kept > 0.3 * linears or (layout.component == "autoencoder" and kept == linears == 0)


def test_the_layouts_are_many() -> None:
    assert len(LAYOUTS) >= 14 and {layout.component for layout in LAYOUTS.values()} == set(write.CONFIGS)


INFO = small_info()


@pytest.mark.parametrize("written", [safetensors, as_gguf(lambda *_: "F32", None)], ids=["ComfyUI", "GGUF"])
def test_one_file_paints_what_a_folder_paints(written: Writer, tmp_path: Path) -> None:
    """All components in one file, given as the path; its tokenizers lie beside it."""
    folder = write_folder(tmp_path / "model", INFO)
    expected = open_model(folder, INFO).generate(GenerationRequest("a kite", seed=1, steps=1))[0]
    together: State = {}
    for role, network in networks(INFO).items():
        together |= write.prefixed(dict(network.state_dict()), COMFYUI[FLUX.maps[role]])
    file = tmp_path / "alone" / ("all.safetensors" if written is safetensors else "all.gguf")
    file.parent.mkdir()
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(folder / name, file.parent / name)
    written(together, file)
    found = open_model(file, INFO).generate(GenerationRequest("a kite", seed=1, steps=1))[0]
    assert torch.equal(found.latents, expected.latents)
    weights_of = found.metadata["weights"]
    assert sum(row["stored"] for row in weights_of.values()) == sum(t.nbytes for t in together.values())


@functools.cache
def on_meta(component: str) -> torch.nn.Module:
    """For plans only: nothing fills it."""
    return write.build(component)


def removed(state: State, victim: str) -> State:
    return {name: tensor for name, tensor in state.items() if name != victim}


def added(state: State, victim: str) -> State:
    return state | {victim + "_more": torch.ones(2, 32)}


def renamed(state: State, victim: str) -> State:
    return {name + "_other" if name == victim else name: tensor for name, tensor in state.items()}


def reshaped(state: State, victim: str) -> State:
    return state | {victim: torch.cat([state[victim], state[victim][:16]])}


@pytest.mark.parametrize("change", [removed, added, renamed, reshaped], ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_tensor_that_is_wrong_is_named(
    name: str, change: Callable[[State, str], State], tmp_path: Path
) -> None:
    layout, path = LAYOUTS[name], tmp_path / "model"
    theirs = layout.rename(random_state(layout.component))
    matrices = [key for key, tensor in theirs.items() if tensor.ndim == 2 or tensor.ndim == 4]
    victim = matrices[len(matrices) // 2]
    layout.write(change(theirs, victim), path)
    named = {"added": victim + "_more", "renamed": victim + "_other"}.get(change.__name__, victim)
    module, config = on_meta(layout.component), write.CONFIGS[layout.component]
    with open_checkpoint(path) as checkpoint, pytest.raises(WeightMapError) as caught:
        plan_load(layout.component, module, config, checkpoint)
    assert named in str(caught.value) and any(victim in problem for problem in caught.value.problems)

"""One change of weights in every layout of adapters: merged equal, and as strong beside packed weights."""

from __future__ import annotations

import functools
from pathlib import Path

import helpers_layouts
import helpers_lora as lora
import pytest
import torch
from helpers_checkpoints import State, random_state
from helpers_lora import FLUX_LAYOUTS, PARTS, SD_LAYOUTS, Layout
from torch import Tensor, nn

from flux_sd.checkpoint import open_checkpoint
from flux_sd.load_plan import fill, keep_stored, plan_load
from flux_sd.lora.adapters import Adapters, Lora
from flux_sd.lora.side_branch import AdaptedLinear

ROLES = {"transformer": ("transformer",), "unet": ("unet", "clip"), "clip": ("clip", "unet")}
LAYOUTS = {"transformer": FLUX_LAYOUTS, "unet": SD_LAYOUTS, "clip": SD_LAYOUTS}
CHANGES = {"transformer": lora.flux_pairs, "unet": lora.unet_pairs, "clip": lora.clip_pairs}
CASES = [(role, name) for role in LAYOUTS for name in LAYOUTS[role]]
DENOISERS = [(role, name) for role, name in CASES if role != "clip"]


def layout_of(role: str, name: str) -> Layout:
    return LAYOUTS[role][name]


def base_of(role: str) -> State:
    """What DoRA's magnitudes are worked out from: it is the denoiser's in every file."""
    return PARTS["unet" if role == "clip" else role].state


@pytest.mark.parametrize(("role", "name"), CASES)
def test_one_change_merges_equal_in_every_layout(role: str, name: str, tmp_path: Path) -> None:
    state = PARTS[role].state
    got = lora.merged(layout_of(role, name).write(tmp_path, base_of(role)), *ROLES[role])
    wanted = lora.applied(state, CHANGES[role]())
    changed = [path for path, tensor in wanted.items() if not torch.equal(tensor, state[path])]
    assert len(changed) == len(CHANGES[role]())
    for path, tensor in wanted.items():
        if path in changed:
            assert (got[path] - tensor).abs().max() <= 1e-6, path
        else:
            assert torch.equal(got[path], tensor), path


# beside packed weights --------------------------------------------------------------------------------------

BASES = {
    "Q8_0": helpers_layouts.as_gguf(lambda name, t: blocks(t, "Q8_0"), None),
    "Q4_0": helpers_layouts.as_gguf(lambda name, t: blocks(t, "Q4_0"), None),
    "fp8": helpers_layouts.cast_to(torch.float8_e4m3fn),
}


def blocks(tensor: Tensor, word: str) -> str:
    return word if tensor.ndim == 2 and tensor.shape[1] % 32 == 0 else "F32"


@functools.cache
def packed_base(role: str, word: str, folder: Path) -> tuple[Path, State]:
    """(file, what its weights decode to)"""
    path = folder / f"{role}-{word}{'.safetensors' if word == 'fp8' else '.gguf'}"
    return path, BASES[word](PARTS[role].state, path)


@functools.cache
def packed_network(role: str, path: Path) -> nn.Module:
    """The same for all tests: what they change they undo."""
    part = PARTS[role]
    module = lora.write.build(part.component, part.config)
    plan = plan_load(part.component, module, part.config, open_checkpoint(path))
    keep_stored(module, plan, torch.float32)
    fill(module, plan)
    return module.eval()


def undo(module: nn.Module) -> int:
    """Takes the branches off again. Returns how many layers had some."""
    adapted = [(path, layer) for path, layer in module.named_modules() if isinstance(layer, AdaptedLinear)]
    for path, layer in adapted:
        layer.base.bias = layer.bias
        module.set_submodule(path, layer.base)
    return len(adapted)


@torch.inference_mode()
def run(role: str, module: nn.Module) -> Tensor:
    """What a denoiser makes of fixed inputs."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if role == "transformer":
        ids = torch.cartesian_prod(torch.zeros(1), torch.arange(3.0), torch.arange(4.0))[None]
        inputs = random(1, 12, 64), ids, random(1, 5, 64), torch.zeros(1, 5, 3), torch.tensor([0.5])
        return module(*inputs, random(1, 64))
    return module(random(1, 4, 8, 8), torch.tensor([500.0]), random(1, 5, 32))


@functools.cache
def unchanged(role: str, word: str, folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs without an adapter, of the packed network and of its dequantised weights in float32; and how
    the change, added to those, moves it."""
    path, state = packed_base(role, word, folder)
    before = run(role, lora.filled(role, state))
    after = run(role, lora.filled(role, lora.applied(state, CHANGES[role]())))
    return run(role, packed_network(role, path)), before, after - before


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


def strengths(role: str, word: str, folder: Path, file: Path, dropped: bool = False) -> tuple[float, float]:
    """(how far the packed change is from the reference one, how much the reference moves the output), both
    relative. `dropped`: the adapter is silently not applied to the packed network."""
    before, before_reference, wanted = unchanged(role, word, folder)
    module = packed_network(role, packed_base(role, word, folder)[0])
    adapters = Adapters.open([Lora(file)], lora.table(*ROLES[role]), "small")
    if not dropped:
        adapters.apply(role, module, lambda done, total: None)
    adapters.close()
    after = run(role, module)
    assert undo(module) == (0 if dropped else len(CHANGES[role]()))
    error = (after - before - wanted).norm() / wanted.norm()
    return float(error), float(wanted.norm() / before_reference.norm())


@pytest.mark.parametrize("word", BASES)
@pytest.mark.parametrize(("role", "name"), DENOISERS)
def test_a_change_is_as_strong_beside_packed_weights(
    role: str, name: str, word: str, folder: Path, tmp_path: Path
) -> None:
    base = packed_base(role, word, folder)[1]
    file = layout_of(role, name).write(tmp_path, base)
    error, moved = strengths(role, word, folder, file)
    assert moved >= 0.05, f"the change moves the output by {moved:.3f} only: the test would prove nothing"
    assert error <= 0.02, f"{error:.4f}"


@pytest.mark.parametrize("word", BASES)
@pytest.mark.parametrize("role", ["transformer", "unet"])
def test_an_adapter_that_is_dropped_does_not_pass(role: str, word: str, folder: Path, tmp_path: Path) -> None:
    name = next(iter(LAYOUTS[role]))
    file = layout_of(role, name).write(tmp_path, packed_base(role, word, folder)[1])
    error, moved = strengths(role, word, folder, file, dropped=True)
    assert moved >= 0.05 and error > 0.9


def test_stored_rows_are_not_touched(folder: Path, tmp_path: Path) -> None:
    path, _ = packed_base("transformer", "Q8_0", folder)
    before = path.read_bytes()
    file = FLUX_LAYOUTS["kohya, DoRA"].write(tmp_path, PARTS["transformer"].state)
    module = packed_network("transformer", path)
    stored = {name: tensor.clone() for name, tensor in module.named_buffers() if "data_" in name}
    Adapters.open([Lora(file, 0.5)], lora.table("transformer"), "small").apply(
        "transformer", module, lambda done, total: None
    )
    after = {name.replace(".base.", "."): t for name, t in module.named_buffers() if "data_" in name}
    undo(module)
    assert stored.keys() == after.keys() and path.read_bytes() == before
    assert all(torch.equal(stored[name], after[name]) for name in stored)


def test_the_small_models_have_all_different_values() -> None:
    """Else two layers exchanged would go unnoticed."""
    state = random_state("unet", lora.UNET)
    assert len({float(tensor.flatten()[0]) for tensor in state.values()}) == len(state)

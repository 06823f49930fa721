"""`fill_from`: an incomplete file is completed from another of the same component, and that is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import helpers_checkpoints as write
import pytest
import torch
from helpers_flux import FILES, networks, small_info, write_folder
from helpers_layouts import INPUTS, as_gguf, by_candle, weights
from safetensors.torch import load_file, save_file

from flux_sd.checkpoint import open_checkpoint
from flux_sd.components import Components, LoadOptions
from flux_sd.errors import MissingFileError, WeightMapError
from flux_sd.flux_loader import load_flux
from flux_sd.load_plan import LoadPlan, fill, keep_stored, plan_load
from flux_sd.model_files import find_files
from flux_sd.model_loader import flux_model
from flux_sd.numerics import reference
from flux_sd.request import GenerationRequest
from flux_sd.versions import SDVersion

State = write.State
FLUX = "flux_mmdit"


def load(component: str, path: Path, base: Path | None) -> tuple[State, LoadPlan]:
    module = write.build(component)
    with open_checkpoint(path) as main, open_checkpoint(base or path) as other:
        config = write.CONFIGS[component]
        plan = plan_load(component, module, config, main, None if base is None else other)
        keep_stored(module, plan, torch.float32)
        fill(module, plan)
        return {name: tensor.clone() for name, tensor in weights(module).items()}, plan


def without(state: State, *heads: str) -> State:
    return {name: tensor for name, tensor in state.items() if not name.startswith(heads)}


# our names -> theirs, twice: the incomplete file and the base; and what the first lacks
CASES: dict[str, tuple[str, Callable[[State], State], Callable[[State], State], tuple[str, ...]]] = {
    "first and last layers": (FLUX, dict, dict, INPUTS),
    "base under other names": (FLUX, dict, write.flux_diffusers, INPUTS),
    "base behind a prefix": (FLUX, dict, lambda s: write.prefixed(s, "model.diffusion_model."), INPUTS),
    "a part of a fused tensor": (FLUX, write.flux_diffusers, write.flux_diffusers, (
        "transformer_blocks.0.attn.to_k.", "single_transformer_blocks.1.proj_mlp.", "norm_out.")),
    "a part of a fused tensor, base fused": (FLUX, write.flux_diffusers, dict, (
        "transformer_blocks.0.attn.to_k.", "single_transformer_blocks.1.proj_mlp.", "norm_out.")),
    "all of a fused tensor, base fused": (FLUX, write.flux_diffusers, dict, (
        "single_transformer_blocks.0.",)),
    "T5 norms": ("t5", write.t5_llama_cpp, dict, ("enc.blk.0.attn_norm", "token_embd", "enc.output_norm")),
    "VAE": ("autoencoder", dict, lambda s: write.vae_diffusers(s, ("to_q", "to_k", "to_v", "to_out.0")), (
        "encoder.", "decoder.mid.attn_1.")),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_filled_model_equals_the_full_one(case: str, tmp_path: Path) -> None:
    """In what the first file has, it decides: the base holds other numbers there."""
    component, theirs, base_names, lacking = CASES[case]
    state, other = write.random_state(component), write.random_state(component, seed=1)
    full = theirs(state)
    part = without(full, *lacking)
    assert 0 < len(part) < len(full)
    main = write.save(part, tmp_path / "main.safetensors")
    same = write.save(base_names(state), tmp_path / "same.safetensors")
    found, plan = load(component, main, same)
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
    base = write.save(base_names(other), tmp_path / "base.safetensors")
    taken = load(component, main, base)[1].filled
    mixed, _ = load(component, write.save({**theirs(other), **part}, tmp_path / "mixed.safetensors"), None)
    found, _ = load(component, main, base)
    assert all(torch.equal(found[name], mixed[name]) for name in state)
    assert taken.keys() == plan.filled.keys() == {n for n in state if not torch.equal(found[n], state[n])}


def test_packed_and_plain_rows_meet_in_one_weight(tmp_path: Path) -> None:
    state = write.flux_diffusers(write.random_state(FLUX))
    back = as_gguf(by_candle)(without(state, "transformer_blocks.0.attn.to_v."), tmp_path / "main.gguf")
    base = write.save(state, tmp_path / "base.safetensors")
    found, plan = load(FLUX, tmp_path / "main.gguf", base)
    qkv = found["double_blocks.0.img_attn.qkv.weight"]
    names = [f"transformer_blocks.0.attn.to_{name}.weight" for name in "qkv"]
    assert torch.equal(qkv, torch.cat([back[names[0]], back[names[1]], state[names[2]]]))
    assert plan.filled == {
        f"double_blocks.0.img_attn.qkv.{kind}": (f"transformer_blocks.0.attn.to_v.{kind}",)
        for kind in ("weight", "bias")
    }


def test_what_both_lack_is_listed_and_nothing_is_filled_unasked(tmp_path: Path) -> None:
    state = write.random_state(FLUX)
    main = write.save(without(state, "img_in.", "txt_in."), tmp_path / "main.safetensors")
    base = write.save(without(state, "txt_in."), tmp_path / "base.safetensors")
    with pytest.raises(WeightMapError) as caught:
        load(FLUX, main, base)
    assert caught.value.problems == ("missing: txt_in.weight", "missing: txt_in.bias")
    with pytest.raises(WeightMapError) as caught:
        load(FLUX, main, None)
    assert len(caught.value.problems) == 4


def test_a_wrong_shape_is_not_filled_over(tmp_path: Path) -> None:
    state = write.random_state(FLUX)
    main = write.save(state | {"img_in.weight": torch.ones(3, 3)}, tmp_path / "main.safetensors")
    with pytest.raises(WeightMapError, match=r"img_in.weight is \[3, 3\]"):
        load(FLUX, main, write.save(state, tmp_path / "base.safetensors"))


INFO = small_info()


def opened(folder: Path, **options: object) -> Components:
    return load_flux(
        INFO, find_files(INFO, folder, {}), torch.device("cpu"), torch.float32, reference(),
        LoadOptions(**options),  # type: ignore[arg-type]
    )  # fmt: skip


def test_a_picture_from_a_completed_file_and_what_is_told(tmp_path: Path) -> None:
    folder, request = write_folder(tmp_path / "model", INFO), GenerationRequest("a kite", seed=1, steps=1)
    expected = flux_model(SDVersion.TINY_FLUX, opened(folder)).generate(request)[0]
    file, base = folder / FILES["transformer"], tmp_path / "base.safetensors"
    state = load_file(file)
    save_file(state, base)
    save_file(without(state, "img_in.", "vector_in."), file)
    with pytest.raises(WeightMapError, match=r"img_in.weight"):
        opened(folder)
    components = opened(folder, fill_from=base)
    result = flux_model(SDVersion.TINY_FLUX, components).generate(request)[0]
    assert torch.equal(result.latents, expected.latents)
    (note,) = result.notes
    assert note.startswith(
        "transformer: flux1-small.safetensors lacks img_in.weight and 5 more; taken from base"
    )
    assert len(result.metadata["weights"]["transformer"]["filled"]) == 6
    assert [file["name"] for file in result.metadata["files"]["transformer"]] == [file.name, base.name]


def test_a_base_of_something_else_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", INFO)
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(MissingFileError, match=r"other.safetensors holds no component of this model"):
        opened(folder, fill_from=tmp_path / "other.safetensors")
    save_file(dict(networks(INFO)["vae"].state_dict()), tmp_path / "vae.safetensors")
    (note,) = opened(folder, fill_from=tmp_path / "vae.safetensors").placement.notes
    assert note == "no file lacked a tensor, so nothing was taken from vae.safetensors"

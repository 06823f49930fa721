"""model_files.py: which file plays which role, in folders, in one file with several parts, and in pieces."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import helpers_checkpoints
import helpers_flux
import helpers_gguf
import helpers_headers as header
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flux_sd.checkpoint import open_checkpoint
from flux_sd.errors import MissingFileError, WeightMapError
from flux_sd.flux_mmdit import FluxConfig
from flux_sd.load_plan import plan_load
from flux_sd.model_files import FLUX, ModelFiles, check_roles, find_files
from flux_sd.versions import SDVersion

INFO = SDVersion.FLUX_SCHNELL.info
PARTS: dict[str, Callable[[], header.Shapes]] = {
    "transformer": lambda: header.flux("schnell"),
    "vae": header.flux_vae,
    "clip": header.clip_l,
    "t5": header.t5_xxl,
}
COMFY = {
    "transformer": "model.diffusion_model.", "vae": "vae.", "clip": "text_encoders.clip_l.transformer.",
    "t5": "text_encoders.t5xxl.transformer.",
}  # fmt: skip
SD_CPP = {
    "transformer": "model.diffusion_model.", "vae": "first_stage_model.",
    "clip": "cond_stage_model.transformer.", "t5": "t5xxl.transformer.",
}  # fmt: skip


def sparse(folder: Path, **parts: str) -> Path:
    """A folder with these files: role -> name."""
    for role, name in parts.items():
        header.safetensors(folder / name, PARTS[role]())
    shutil.copytree(helpers_flux.TOKENIZERS / "clip", folder / "tokenizer", dirs_exist_ok=True)
    shutil.copytree(helpers_flux.TOKENIZERS / "t5", folder / "tokenizer_2", dirs_exist_ok=True)
    return folder


@pytest.mark.parametrize("prefixes", [COMFY, SD_CPP], ids=["comfy", "sd.cpp"])
@pytest.mark.parametrize("container", ["safetensors", "gguf"])
def test_a_model_in_one_file_is_the_model_in_a_folder(
    prefixes: dict[str, str], container: str, tmp_path: Path
) -> None:
    info = helpers_flux.small_info()
    folder = helpers_flux.write_folder(tmp_path / "folder", info)
    state: dict[str, Tensor] = {"text_encoders.clip_l.logit_scale": torch.ones(1)}
    for role, network in helpers_flux.networks(info).items():
        state |= {prefixes[role] + name: p.detach() for name, p in network.named_parameters()}
    path = tmp_path / "folder" / "elsewhere" / f"all.{container}"
    path.parent.mkdir()
    save_file(state, path) if container == "safetensors" else helpers_gguf.write_state(path, state)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(folder / name, path.parent / name)
    with helpers_flux.open_model(folder, info) as whole, helpers_flux.open_model(path, info) as single:
        for role in FLUX.maps:
            wanted = whole.components.network(role).state_dict()
            found = single.components.network(role).state_dict()
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items()), role


def test_one_file_with_everything_plays_every_role(tmp_path: Path) -> None:
    sparse(tmp_path)
    path = header.safetensors(tmp_path / "flux1-dev-fp8.safetensors", header.all_in_one(), "F8_E4M3")
    files = find_files(INFO, path, {})
    tokenizers = {"clip": tmp_path / "tokenizer", "t5": tmp_path / "tokenizer_2"}
    assert files == ModelFiles(dict.fromkeys(FLUX.maps, path), tokenizers)
    with open_checkpoint(path) as checkpoint:
        check_roles(SDVersion.FLUX_DEV.info, dict.fromkeys(FLUX.maps, checkpoint))


def test_what_one_file_lacks_comes_from_options_and_from_beside_it(tmp_path: Path) -> None:
    sparse(tmp_path, vae="ae.safetensors", t5="elsewhere/any.safetensors", clip="clip_l.safetensors")
    shapes = header.behind("model.diffusion_model.", header.flux("schnell"))
    path = header.gguf(
        tmp_path / "pipeline.gguf", shapes | header.behind("first_stage_model.", header.flux_vae())
    )
    t5 = tmp_path / "elsewhere" / "any.safetensors"
    files = find_files(INFO, path, {"t5": t5})
    assert (files.networks["transformer"], files.networks["vae"]) == (path, path)
    assert (files.networks["t5"], files.networks["clip"]) == (t5, tmp_path / "clip_l.safetensors")
    given = find_files(INFO, path, {"t5": t5, "vae": tmp_path / "ae.safetensors"})
    assert given.networks["vae"] == tmp_path / "ae.safetensors"  # what is given goes before what the file has


def test_roles_that_nothing_serves_are_all_named_with_what_would(tmp_path: Path) -> None:
    sparse(tmp_path, vae="my own.safetensors")
    path = header.gguf(tmp_path / "x.gguf", header.flux("schnell"))
    with pytest.raises(MissingFileError) as caught:
        find_files(INFO, path, {})
    said = str(caught.value)
    assert said.startswith("x.gguf holds the transformer only, and ") and "\n" not in said
    for role in ("clip", "t5", "vae"):
        assert f"no {role}: expected {' or '.join(FLUX.places[role])} there, or give --{role} FILE" in said
    assert said.endswith("(my own.safetensors there is an autoencoder (VAE))") or "(my own" in said


def test_a_folder_without_a_role_points_to_what_would_do(tmp_path: Path) -> None:
    sparse(tmp_path, vae="ae.safetensors", clip="clip_l.safetensors", t5="t5xxl.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"")
    header.safetensors(tmp_path / "mine" / "x.safetensors", header.flux("schnell"))
    with pytest.raises(MissingFileError, match=r"no transformer: .*\(mine there is a FLUX.1 transformer\)"):
        find_files(INFO, tmp_path, {})
    header.safetensors(tmp_path / "mine.safetensors", header.flux("schnell"))
    with pytest.raises(MissingFileError, match=r"\(mine.safetensors there is a FLUX.1 transformer\)"):
        find_files(INFO, tmp_path, {})


@pytest.mark.parametrize("name", ["x" * 300, "loop", "text/x"])
def test_a_path_that_cannot_be_reached_is_not_said_to_be_absent(name: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "text").write_text("text")
    for source, given in ((tmp_path / name, {}), (None, {"vae": tmp_path / name})):
        with pytest.raises(MissingFileError, match=rf"^(path|vae): .*{name} cannot be read: [^\[]*$"):
            find_files(INFO, source, given)


def test_a_folder_of_configs_competes_with_no_file(tmp_path: Path) -> None:
    sparse(tmp_path, transformer="flux1-schnell.safetensors", vae="ae.safetensors", t5="t5xxl.safetensors")
    header.safetensors(tmp_path / "text_encoder" / "model.safetensors", header.clip_l())
    for name in ("transformer", "vae", "text_encoder_2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    files = find_files(INFO, tmp_path, {})
    assert (files.networks["vae"].name, files.networks["t5"].name) == ("ae.safetensors", "t5xxl.safetensors")
    assert files.networks["clip"] == tmp_path / "text_encoder"


def test_gguf_files_are_found_by_role(tmp_path: Path) -> None:
    sparse(tmp_path)
    names = {
        "transformer": "flux1-schnell-Q4_K_S.gguf", "t5": "t5-v1_1-xxl-encoder-Q8_0.gguf",
        "clip": "clip_l-Q8_0.gguf", "vae": "ae.gguf",
    }  # fmt: skip
    for role, name in names.items():
        header.gguf(tmp_path / name, PARTS[role]())
    files = find_files(INFO, tmp_path, {})
    assert {role: files.networks[role].name for role in names} == names


def test_a_difference_that_makes_no_other_model_is_left_to_the_loader(tmp_path: Path) -> None:
    """It names the tensor; a sentence on sizes would not."""
    shapes = header.flux("schnell") | {"img_in.weight": (3072, 65)}
    path = header.safetensors(tmp_path / "x.safetensors", shapes)
    with open_checkpoint(path) as checkpoint:
        check_roles(SDVersion.FLUX_SCHNELL.info, {"transformer": checkpoint})
        module = helpers_checkpoints.build("flux_mmdit", FluxConfig.schnell())
        with pytest.raises(WeightMapError, match=r"img_in.weight is \[3072, 65\]"):
            plan_load("flux_mmdit", module, FluxConfig.schnell(), checkpoint)


def test_an_incomplete_file_is_no_other_model_if_another_completes_it(tmp_path: Path) -> None:
    shapes = {name: shape for name, shape in header.flux("dev").items() if not name.startswith("guidance_in")}
    path = header.safetensors(tmp_path / "x.safetensors", shapes)
    with open_checkpoint(path) as checkpoint:
        check_roles(SDVersion.FLUX_DEV.info, {"transformer": checkpoint}, complete=False)
        with pytest.raises(WeightMapError, match="choose --model flux-schnell"):
            check_roles(SDVersion.FLUX_DEV.info, {"transformer": checkpoint})

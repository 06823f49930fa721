"""A control LoRA of Black Forest Labs turns FLUX into a model that follows a control picture."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import helpers_headers as header
import helpers_lora as lora
import pytest
import torch
from helpers_flux import networks, open_model, small_info, write_folder
from helpers_lora import save
from helpers_sd import picture
from safetensors.torch import load_file, save_file

from flux_sd.cli import main
from flux_sd.errors import RequestError
from flux_sd.model_loader import check_request
from flux_sd.request import GenerationRequest

INFO = small_info(guidance=True)
REQUEST = GenerationRequest("a red kite", width=32, height=32, seed=5, steps=2)
FILE = "flux1-small.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("dev"), INFO)


def control(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """(a control LoRA of every linear, the weights with it merged at the strength 0.85)"""
    transformer = networks(INFO)["transformer"]
    generator = torch.Generator().manual_seed(1)
    tensors, wanted = {}, dict(transformer.state_dict())
    for path, layer in transformer.named_modules():
        if isinstance(layer, torch.nn.Linear):
            columns = 2 * layer.in_features if path == "img_in" else layer.in_features
            down = torch.randn(4, columns, generator=generator) * 0.1
            up = torch.randn(layer.out_features, 4, generator=generator) * 0.1
            bias = torch.randn(layer.out_features, generator=generator) * 0.1
            names = (f"{path}.lora_A.weight", f"{path}.lora_B.weight", f"{path}.lora_B.bias")
            tensors |= dict(zip(names, (down, up, bias), strict=True))
            wide = torch.nn.functional.pad(layer.weight.detach(), (0, columns - layer.in_features))
            wanted[f"{path}.weight"] = wide + 0.85 * up @ down
            wanted[f"{path}.bias"] = layer.bias.detach() + 0.85 * bias
        elif path.endswith(("query_norm", "key_norm")):
            wanted[f"{path}.scale"] = tensors[f"{path}.scale"] = torch.rand(64, generator=generator) + 0.5
    return save(tensors, folder / "flux1-depth-dev-lora.safetensors"), wanted


def test_it_paints_as_a_model_with_the_merged_weights(folder: Path, tmp_path: Path) -> None:
    file, weights = control(tmp_path)
    assert INFO.flux is not None
    wide = replace(INFO.flux.transformer, in_channels=128)
    info = replace(INFO, flux=replace(INFO.flux, transformer=wide), takes_control=True)
    whole = shutil.copytree(folder, tmp_path / "whole")  # the encoders and the autoencoder are the same
    assert load_file(whole / FILE).keys() == weights.keys()
    save_file({name: tensor.detach().contiguous() for name, tensor in weights.items()}, whole / FILE)
    request = replace(REQUEST, control_image=picture(32, 32))
    (wanted,) = open_model(whole, info).generate(request)
    model = open_model(folder, INFO)
    before = model.generate(REQUEST)[0].latents
    model.load_adapters([file])
    assert model.components.config("transformer").in_channels == 128
    (result,) = model.generate(request)
    assert (result.latents - wanted.latents).norm() <= 1e-5 * wanted.latents.norm()
    assert result.metadata["loras"][0]["strength"] == 0.85
    with pytest.raises(RequestError, match="follows a control picture and control_image is not given"):
        model.generate(REQUEST)
    (note,) = (note for note in result.notes if "guidance" in note)
    assert note.startswith("guidance is 3.5, the default of") and "30 (Canny) and 10 (Depth)" in note
    (guided,) = model.generate(replace(request, guidance=10.0))
    assert not any("guidance" in note for note in guided.notes)
    model.load_adapters([])
    assert torch.equal(model.generate(REQUEST)[0].latents, before)
    with pytest.raises(RequestError, match="control_image is not used by"):
        model.generate(request)


def test_a_request_is_checked_with_the_adapters_in_mind(tmp_path: Path) -> None:
    file, _ = control(tmp_path)
    request = replace(REQUEST, control_image=picture(32, 32))
    check_request("flux-dev", request, loras=[file])
    for loras in ([], [(file, 0.0)]):
        with pytest.raises(RequestError, match="control_image is not used by flux-dev"):
            check_request("flux-dev", request, loras=loras)
    with pytest.raises(RequestError, match="control_image is not given"):
        check_request("flux-dev", REQUEST, loras=[file])


def test_other_adapters_leave_a_version_as_it_is(tmp_path: Path) -> None:
    tensors = lora.kohya(lora.flux_pairs(), lambda p: f"lora_unet_{lora.flat(p)}")
    other = save(tensors, tmp_path / "a.safetensors")
    check_request("flux-dev", REQUEST, loras=[other])
    norm = {"double_blocks.0.img_attn.norm.query_norm.scale": torch.ones(64)}
    check_request("flux-dev", REQUEST, loras=[save(tensors | norm, tmp_path / "b.safetensors")])


@pytest.mark.parametrize("name", ["img_in", "x_embedder"])
def test_the_command_lora_names_models_that_a_control_lora_is_for(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = {f"{name}.lora_A.weight": (4, 128), f"{name}.lora_B.weight": (3072, 4)}
    file = header.safetensors(tmp_path / "canny.safetensors", shapes)
    assert main(["lora", str(file), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["fits"] == ["flux-dev", "flux-kontext", "flux-krea"] and document["control"]
    assert main(["lora", str(file)]) == 0
    out = capsys.readouterr().out
    assert out.endswith(f"--model flux-dev --lora {file} --control-image lines.png\n")
    assert main(["lora", str(file), "--model", "flux-canny"]) == 2
    out = capsys.readouterr().out
    assert "fits      none completely" in out and "no control picture of its own" in out


def test_stages_are_listed_with_the_adapters_in_mind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, _ = control(tmp_path)
    lines = tmp_path / "lines.png"
    picture(32, 32).save(lines)
    words = ["trace", "--list", "--model", "flux-dev", "--steps", "1", "--lora", str(file)]
    assert main(words) == 2
    assert "--control-image is not given" in capsys.readouterr().err
    assert main([*words, "--control-image", str(lines)]) == 0
    assert "step.0.double_blocks.0" in capsys.readouterr().out
    assert main([*words[:-2], "--control-image", str(lines)]) == 2
    assert "--control-image is not used by flux-dev" in capsys.readouterr().err

"""`flux-sd trace` of Stable Diffusion: what is recorded, under which names, and each network alone on it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_sd import half_mask, open_model, picture, small_info, write_folder
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flux_sd import outline
from flux_sd.checkpoint import open_checkpoint
from flux_sd.cli import main
from flux_sd.cli import trace as cli_trace
from flux_sd.errors import RequestError
from flux_sd.model_loader import Model
from flux_sd.numerics import candle, reference
from flux_sd.outline import SD_ALONE, SDXL_ALONE, alone
from flux_sd.request import GenerationRequest
from flux_sd.sd_generation import guide
from flux_sd.stage_inputs import StageInputs
from flux_sd.trace import Traced, stages, stages_of, trace, trace_stage
from flux_sd.versions import SDVersion

ORDER = GenerationRequest("a slice of pizza", seed=1, steps=2)
PICTURE, MASKED = {"init_image": picture()}, {"init_image": picture(), "mask": half_mask()}
# What `run` in tools/candle_reference/src/run/sd.rs inserts into its record for two steps and one encoder.
CANDLE_NAMES = {
    "ids", "hidden", "noise", "timesteps", "step.0.latents", "step.0.noise_pred", "step.1.latents",
    "step.1.noise_pred", "latents", "image", "pixels",
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[SDVersion, Model]:
    """Small models of random weights, one of each kind."""
    kinds = (SDVersion.SD15, SDVersion.SD21, SDVersion.SDXL, SDVersion.SDXL_TURBO, SDVersion.SD15_INPAINT)
    folder = tmp_path_factory.mktemp("models")
    infos = {kind: small_info(kind) for kind in kinds}
    return {
        kind: open_model(write_folder(folder / info.key, info), info, keep_loaded=True)
        for kind, info in infos.items()
    }


def recorded(model: Model, path: Path, **changes: Any) -> Traced:
    return trace(model, replace(ORDER, **changes), path, patterns=["*"], overwrite=True)


@pytest.fixture(scope="module")
def records(
    models: dict[SDVersion, Model], tmp_path_factory: pytest.TempPathFactory
) -> dict[SDVersion, Path]:
    """Every stage of runs from a picture."""
    folder, made = tmp_path_factory.mktemp("records"), {}
    for version in (SDVersion.SD15, SDVersion.SDXL, SDVersion.SD15_INPAINT):
        changes = {"steps": 3, "guidance_rescale": 0.3, **(MASKED if version.is_inpainting else PICTURE)}
        made[version] = recorded(models[version], folder / f"{version.info.key}.safetensors", **changes).path
    return made


def names_in_order(path: Path) -> list[str]:
    with safe_open(path, "pt") as file:
        return list(file.offset_keys())


# ------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("version", "changes"),
    [
        (SDVersion.SD15, {}),
        (SDVersion.SD15, {"guidance": 1.0}),
        (SDVersion.SD15, {"sampler": "ddpm", **PICTURE, "strength": 0.5}),
        (SDVersion.SD15, {**PICTURE, "strength": 0.0}),
        (SDVersion.SD15, {**PICTURE, "strength": 1.0}),
        (SDVersion.SD21, {"sampler": "euler", "schedule": "ddim_uniform", "steps": 3, **MASKED}),
        (SDVersion.SDXL, {}),
        (SDVersion.SDXL, {"negative_prompt": ""}),
        (SDVersion.SDXL_TURBO, {"vae_tiling": True, **PICTURE}),
        (SDVersion.SD15_INPAINT, MASKED),
        (SDVersion.SD15_INPAINT, {**MASKED, "strength": 0.5, "vae_tiling": True}),
    ],
)
def test_the_list_is_what_a_run_records(
    version: SDVersion, changes: dict[str, Any], models: dict[SDVersion, Model], tmp_path: Path
) -> None:
    """`stages` looks at networks on the meta device; the record comes from a run. Tapped tensors come in the
    order of the list."""
    model, path = models[version], tmp_path / "run.safetensors"
    recorded(model, path, **changes)
    found = names_in_order(path)
    expected = list(stages(model.components.info, replace(ORDER, **changes), reference()))
    assert len({stage.name for stage in expected}) == len(expected)
    assert set(found) == {stage.name for stage in expected}
    tapped = [stage.name for stage in expected if stage.module in found and not _inside(stage.name)]
    assert [name for name in found if name in set(tapped)] == tapped


def _inside(name: str) -> bool:
    """Whether a name is a module's."""
    return any(
        part in name for part in ("_model.", "_block", "vae.", "conv_", "embedding", "text_projection")
    )


def test_candles_numerics_leave_out_what_candle_does(models: dict[SDVersion, Model]) -> None:
    info = models[SDVersion.SDXL].components.info
    named = [{stage.name for stage in stages(info, ORDER, preset)} for preset in (reference(), candle())]
    assert {"step.0.inputs.sizes", "step.0.add_embedding"} <= named[0] - named[1]


def test_the_usual_record_holds_every_block(models: dict[SDVersion, Model]) -> None:
    info = models[SDVersion.SDXL].components.info
    usual = [stage.name for stage in stages(info, replace(ORDER, **PICTURE), reference()) if stage.default]
    for name in (
        "clip.ids", "clip_2.ids", "init.image", "init.vae.encoder.down.1.block.0", "init.latents",
        "clip.text_model.encoder.layers.1", "clip_2.text_projection", "uncond.clip.hidden", "clip.pooled",
        "noise", "timesteps", "step.0.latents", "step.0.inputs.sizes", "step.0.time_embedding",
        "step.0.add_embedding", "step.0.down_blocks.0.resnets.0", "step.0.down_blocks.0.downsamplers.0",
        "step.0.down_blocks.1.attentions.0", "step.0.mid_block.attentions.0", "step.0.mid_block.resnets.1",
        "step.0.up_blocks.0.attentions.1", "step.0.up_blocks.0.upsamplers.0", "step.0.conv_out",
        "step.0.output", "step.0.noise_pred", "vae.decoder.mid.attn_1", "vae.decoder.up.0", "image", "pixels",
    ):  # fmt: skip
        assert name in usual, name
    assert not any("to_q" in name or "resnets.0.conv1" in name or "kept" in name for name in usual)


def test_a_released_model_is_listed_without_its_files(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["trace", "--list", "--model", "sdxl", "--steps", "1", "--stages", "step.0.inputs.*"]
    assert main([*words, "--stages", "step.0.mid_block.attentions.0.transformer_blocks.9"]) == 0
    listed = capsys.readouterr().out.split()
    assert listed[:5] == [
        f"step.0.inputs.{name}" for name in ("x", "timesteps", "context", "pooled", "sizes")
    ]
    assert listed[5:] == ["step.0.mid_block.attentions.0.transformer_blocks.9"]
    assert main(["trace", "--list", "--model", "sdxl", "--steps", "1", "--like-candle"]) == 0
    assert capsys.readouterr().out.split() == [
        "ids", "ids_2", "hidden", "noise", "timesteps", "step.0.latents", "step.0.noise_pred", "latents",
        "image", "pixels",
    ]  # fmt: skip
    assert main(["trace", "--list", "--model", "sdxl", "--stage", "clip_2"]) == 0
    assert capsys.readouterr().out.split()[-2:] == ["clip_2.text_projection", "clip.pooled"]


# ------------------------------------------------------------------------------------------ values


def test_the_record_is_the_run(models: dict[SDVersion, Model], tmp_path: Path) -> None:
    """Values of the record against the same numbers by another way; the picture against an untraced one."""
    model = models[SDVersion.SD15]
    read = load_file(recorded(model, tmp_path / "run.safetensors", guidance_rescale=0.5).path)
    (result,) = model.generate(replace(ORDER, guidance_rescale=0.5))
    assert torch.equal(read["latents"][0], result.latents) and torch.equal(read["noise"][0], result.noise)
    pixels = torch.tensor(list(result.image.tobytes()), dtype=torch.uint8).view(32, 48, 3)
    assert torch.equal(read["pixels"][0].permute(1, 2, 0), pixels)
    uncond, cond = read["step.1.output"].chunk(2)
    assert torch.equal(guide(uncond, cond, 7.5, 0.5), read["step.1.noise_pred"])
    context = torch.cat([read["uncond.clip.hidden"], read["clip.hidden"]])
    assert torch.equal(read["step.0.inputs.context"], context)
    assert torch.equal(read["step.0.conv_out"], read["step.0.output"])
    first, second = (read[f"{branch}clip.text_model.final_layer_norm"] for branch in ("uncond.", ""))
    assert torch.equal(torch.cat([first, second]), context) and not torch.equal(first, second)


def test_like_candle_writes_what_candle_writes(models: dict[SDVersion, Model], tmp_path: Path) -> None:
    model, request = models[SDVersion.SD15], replace(ORDER, latents=torch.randn(1, 4, 4, 6))
    done = trace(model, request, tmp_path / "ours.safetensors", like_candle=True)
    read = load_file(done.path)
    assert set(read) == CANDLE_NAMES and done.tensors == len(CANDLE_NAMES)
    assert read["ids"].shape == (2, 77) and read["hidden"].shape == (2, 77, 64)
    assert read["step.0.noise_pred"].shape == (1, 4, 4, 6) and read["timesteps"].dtype == torch.float64
    assert torch.equal(read["noise"], request.latents) and torch.equal(read["step.0.latents"], read["noise"])
    alone = trace(model, replace(request, guidance=1.0), tmp_path / "1.safetensors", like_candle=True)
    assert load_file(alone.path)["ids"].shape == (1, 77)
    assert torch.equal(load_file(alone.path)["hidden"], read["hidden"][1:])


@pytest.mark.parametrize(
    ("version", "stage"),
    [
        *((SDVersion.SD15, stage) for stage in SD_ALONE),
        (SDVersion.SDXL, "clip_2"),
        (SDVersion.SDXL, "unet"),
        (SDVersion.SD15_INPAINT, "unet"),
    ],
)
def test_a_stage_alone_is_bit_equal_to_the_run(
    version: SDVersion, stage: str, models: dict[SDVersion, Model], records: dict[SDVersion, Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    model, record = models[version], records[version]
    with open_checkpoint(record) as given:
        inputs = StageInputs(given, model.components.config, step=1 if stage == "unet" else 0)
        done = trace_stage(model.components, stage, inputs, tmp_path / "stage.safetensors", patterns=["*"])
    whole, alone_now = load_file(record), load_file(done.path)
    info = model.components.info
    assert set(alone_now) == {known.name for known in stages_of(stage, info, reference(), inputs.step)}
    made = {name.format(step=1) for name in alone(info)[stage].made}
    assert made <= set(alone_now) and len(alone_now) > 20 and len(made) == 1
    for name, tensor in alone_now.items():
        assert torch.equal(tensor, whole[name]), name


def test_the_command_offers_every_stage() -> None:
    assert set(cli_trace.STAGES) == set(outline.STAGES)


def test_every_kind_of_model_has_its_own_stages(models: dict[SDVersion, Model], tmp_path: Path) -> None:
    assert alone(models[SDVersion.SD21].components.info) is SD_ALONE
    assert alone(models[SDVersion.SDXL_TURBO].components.info) is SDXL_ALONE
    save_file({"x": torch.ones(1)}, tmp_path / "in.safetensors")
    model = models[SDVersion.SD15]
    with (
        open_checkpoint(tmp_path / "in.safetensors") as given,
        pytest.raises(RequestError, match="sd15 has no stage t5: its own are clip, unet, vae-encode"),
    ):
        inputs = StageInputs(given, model.components.config)
        trace_stage(model.components, "t5", inputs, tmp_path / "out.safetensors")


@pytest.mark.parametrize("version", [SDVersion.SD15, SDVersion.SDXL, SDVersion.SD15_INPAINT])
def test_a_unet_may_be_given_a_run_that_holds_no_inputs(
    version: SDVersion, models: dict[SDVersion, Model], tmp_path: Path
) -> None:
    """As Candle's records are: latents, times and text states."""
    model, changes = models[version], MASKED if version.is_inpainting else {}
    request = replace(ORDER, sampler="ddim", **changes)
    patterns = ["*clip.hidden", "noise", "timesteps", "step.?.latents", "step.?.noise_pred"]
    patterns += ["*clip.pooled"] if version.is_xl else ["mask*"] if version.is_inpainting else []
    record = trace(model, request, tmp_path / "run.safetensors", patterns=patterns).path
    with open_checkpoint(record) as given:
        assert "step.1.inputs.x" not in given
        inputs = StageInputs(given, model.components.config, step=1)
        done = trace_stage(model.components, "unet", inputs, tmp_path / "out.safetensors")
    whole = load_file(record)
    assert torch.equal(load_file(done.path)["step.1.noise_pred"], whole["step.1.noise_pred"])
    save_file({**whole, "step.2.latents": torch.zeros(1, 4, 4, 6)}, tmp_path / "longer.safetensors")
    with (
        open_checkpoint(tmp_path / "longer.safetensors") as given,
        pytest.raises(RequestError, match="has 2 steps, none of number 2"),
    ):
        StageInputs(given, model.components.config, step=2).of("unet")


def test_states_that_a_sampler_scales_are_no_inputs(models: dict[SDVersion, Model], tmp_path: Path) -> None:
    model = models[SDVersion.SD15]
    patterns = ["*clip.hidden", "noise", "timesteps", "step.?.latents"]
    path = tmp_path / "run.safetensors"
    trace(model, replace(ORDER, sampler="euler"), path, patterns=patterns)
    with open_checkpoint(path) as given, pytest.raises(RequestError, match=r"holds no step\.0\.inputs\.x"):
        StageInputs(given, model.components.config).of("unet")


UNET_INPUTS = {"x": torch.ones(2, 4, 4, 6), "timesteps": torch.ones(2), "context": torch.ones(2, 77, 64)}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"x": torch.ones(2, 9, 4, 6)}, r"x in .* has shape \[2, 9, 4, 6\], expected \[B, 4, h, w\]"),
        ({"context": torch.ones(1, 77, 64)}, r"context in .* expected \[B, L, 64\], B = 2"),
        ({"timesteps": None}, "lacks timesteps for the unet: expected x, timesteps, context"),
    ],
)
def test_inputs_that_do_not_fit_the_unet(
    change: dict[str, torch.Tensor | None], sentence: str, models: dict[SDVersion, Model], tmp_path: Path
) -> None:
    tensors = {name: tensor for name, tensor in {**UNET_INPUTS, **change}.items() if tensor is not None}
    save_file(tensors, tmp_path / "in.safetensors")
    with open_checkpoint(tmp_path / "in.safetensors") as given:
        inputs = StageInputs(given, models[SDVersion.SD15].components.config)
        with pytest.raises(RequestError, match=sentence):
            inputs.of("unet")


def test_one_row_cannot_be_guided(models: dict[SDVersion, Model], tmp_path: Path) -> None:
    rows = {name: tensor[:1].contiguous() for name, tensor in UNET_INPUTS.items()}
    save_file(rows, tmp_path / "in.safetensors")
    with open_checkpoint(tmp_path / "in.safetensors") as given:
        inputs = StageInputs(given, models[SDVersion.SD15].components.config)
        assert inputs.of("unet")["x"].shape == (1, 4, 4, 6)
        with pytest.raises(RequestError, match="guidance 3 wants two rows for each image"):
            replace(inputs, guidance=3.0).of("unet")


def test_inputs_made_by_hand_are_guided_as_asked(models: dict[SDVersion, Model], tmp_path: Path) -> None:
    model, made = models[SDVersion.SD15], {}
    save_file(UNET_INPUTS, tmp_path / "in.safetensors")
    with open_checkpoint(tmp_path / "in.safetensors") as given:
        for guidance in (None, 3.0):
            inputs = StageInputs(given, model.components.config, guidance=guidance)
            path = tmp_path / f"{guidance}.safetensors"
            made[guidance] = load_file(trace_stage(model.components, "unet", inputs, path).path)
    output = made[None]["step.0.output"]
    assert torch.equal(made[None]["step.0.noise_pred"], output) and output.shape == (2, 4, 4, 6)
    assert torch.equal(made[3.0]["step.0.noise_pred"], guide(*output.chunk(2), 3.0))


def test_nothing_is_left_on_the_model(models: dict[SDVersion, Model], tmp_path: Path) -> None:
    components = models[SDVersion.SD15].components
    recorded(models[SDVersion.SD15], tmp_path / "run.safetensors")
    assert not components.watchers and components.loaded
    for role in components.roles:
        for part in components.network(role).modules():
            assert not part._forward_hooks and not part._forward_pre_hooks


def test_the_metadata_is_the_pictures_record(models: dict[SDVersion, Model], tmp_path: Path) -> None:
    path = recorded(models[SDVersion.SD21], tmp_path / "run.safetensors", sampler="uni_pc").path
    with safe_open(path, "pt") as file:
        said = dict(file.metadata())
    assert said["sampler"] == "uni_pc" and said["prediction"] == "v_prediction" and said["model"] == "sd21"
    assert json.loads(said["guidance"]) == 7.5 and json.loads(said["files"]).keys() >= {"unet", "clip", "vae"}

"""detect.py and what sd_loader.py reads beside weights: versions, prediction types, noise, configs.

Files of real shapes without values. No file's name says anything, so names are left as people have them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import helpers_headers as header
import pytest
import synthetic_sd
import torch

from flux_sd.checkpoint import open_checkpoint
from flux_sd.detect import detect_version
from flux_sd.errors import CheckpointError, FluxSdError, RequestError
from flux_sd.load_plan import plan_load
from flux_sd.model_files import ModelFiles, find_files
from flux_sd.model_loader import load_model, resolve_version
from flux_sd.numerics import candle, reference
from flux_sd.schedulers import NoiseSchedule
from flux_sd.sd_loader import diffusion, networks_of, told_prediction
from flux_sd.versions import SDVersion

SD = [version for version in SDVersion if version.info.family == "sd" and version.info.repo]
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
TOKENIZER = Path(__file__).parent / "data" / "tokenizers" / "clip"
# What the released repositories say beside their weights: version -> scheduler, UNet's sample size.
COMPANIONS: dict[str, tuple[dict[str, Any], int]] = {
    "sd15": ({"_class_name": "PNDMScheduler"}, 64),
    "sd15-inpaint": ({"_class_name": "DDIMScheduler"}, 64),
    "sd21": ({"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}, 96),
    "sd21-base": ({"_class_name": "PNDMScheduler"}, 64),
    "sd2-inpaint": ({"_class_name": "PNDMScheduler"}, 64),
    "sdxl": ({"_class_name": "EulerDiscreteScheduler", "prediction_type": "epsilon"}, 128),
    "sdxl-turbo": ({"_class_name": "EulerAncestralDiscreteScheduler", "prediction_type": "epsilon"}, 64),
    "sdxl-inpaint": ({"_class_name": "EulerDiscreteScheduler", "prediction_type": "epsilon"}, 128),
}
UNETS = {
    "sd15": "unet_sd15", "sd15-inpaint": "unet_sd15_inpaint", "sd21": "unet_sd21", "sd21-base": "unet_sd21",
    "sd2-inpaint": "unet_sd2_inpaint", "sdxl": "unet_sdxl", "sdxl-turbo": "unet_sdxl",
    "sdxl-inpaint": "unet_sdxl_inpaint",
}  # fmt: skip


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def diffusers_unet(folder: Path, key: str, said: bool = True) -> Path:
    """unet/ of a repository, and what it says beside it."""
    header.safetensors(
        folder / "unet" / "diffusion_pytorch_model.fp16.safetensors", header.layout(UNETS[key]), "F16"
    )
    if said:
        scheduler, size = COMPANIONS[key]
        write_json(folder / "scheduler" / "scheduler_config.json", BETAS | scheduler)
        write_json(
            folder / "unet" / "config.json", {"_class_name": "UNet2DConditionModel", "sample_size": size}
        )
    return folder


# versions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", SD, ids=str)
def test_a_repository_says_which_version_it_is(version: SDVersion, tmp_path: Path) -> None:
    folder = diffusers_unet(tmp_path, version.info.key)
    assert detect_version({"path": folder}) is version
    scheduler = folder / "scheduler"
    assert detect_version({"unet": folder / "unet", "scheduler": scheduler}) is version
    assert resolve_version(None, {"path": folder}) is version


@pytest.mark.parametrize("version", SD, ids=str)
def test_without_what_stands_beside_it_several_are_offered(version: SDVersion, tmp_path: Path) -> None:
    key = version.info.key
    folder = diffusers_unet(tmp_path, key, said=False)
    pairs = [{"sd21", "sd21-base"}, {"sdxl", "sdxl-turbo"}]
    twins = next((pair for pair in pairs if key in pair), None)
    if twins is None:
        assert detect_version({"path": folder}) is version
        return
    with pytest.raises(RequestError) as caught:
        detect_version({"path": folder})
    said = str(caught.value)
    assert all(twin in said for twin in twins) and "say which with --model" in said


def test_one_thing_beside_a_unet_is_enough(tmp_path: Path) -> None:
    """The prediction type, the class of the scheduler, or the size that a UNet was trained at."""
    for key, scheduler, size in (
        ("sd21", {"prediction_type": "v_prediction"}, None),
        ("sd21-base", {"prediction_type": "epsilon"}, None),
        ("sdxl-turbo", {"_class_name": "EulerAncestralDiscreteScheduler", **BETAS}, None),
        ("sdxl", {"_class_name": "EulerDiscreteScheduler", **BETAS}, None),
        ("sdxl", None, 128),
        ("sdxl-turbo", None, 64),
        ("sd21", None, 96),
    ):
        folder = diffusers_unet(tmp_path / f"{key}{size}", key, said=False)
        if scheduler is not None:
            write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
        if size is not None:
            content = {"_class_name": "UNet2DConditionModel", "sample_size": size}
            write_json(folder / "unet" / "config.json", content)
        assert detect_version({"path": folder}).info.key == key, (key, scheduler, size)


def test_single_files(tmp_path: Path) -> None:
    """Shapes tell all but 2.1 from 2.1 base and XL from Turbo."""
    path = header.safetensors(tmp_path / "x.safetensors", header.sd_single_file("sd15"), "F16")
    assert detect_version({"path": path}) is SDVersion.SD15
    for context, key in ((768, "sd15-inpaint"), (1024, "sd2-inpaint"), (2048, "sdxl-inpaint")):
        shapes = header.behind("model.diffusion_model.", header.unet_ldm(context, 9))
        assert detect_version({"path": header.safetensors(path, shapes, "F16")}).info.key == key
    for kind in ("sd21", "sdxl"):
        header.safetensors(path, header.sd_single_file(kind), "F16")
        with pytest.raises(RequestError, match="neither its weights nor a config beside it tells them apart"):
            detect_version({"path": path})
        for prediction, key in (("v_prediction", "sd21"), ("epsilon", "sd21-base")) if kind == "sd21" else ():
            assert detect_version({"path": path}, prediction).info.key == key


def test_the_training_step_in_a_ckpt_tells_the_base(tmp_path: Path) -> None:
    shapes = header.behind("model.diffusion_model.", header.unet_ldm(1024))
    state = {name: torch.empty(shape, dtype=torch.float16) for name, shape in shapes.items()}
    path = tmp_path / "v2.ckpt"
    for step, key in ((875000, "sd21-base"), (110000, None)):
        with torch.serialization.skip_data():
            torch.save({"global_step": step, "state_dict": state}, path)
        if key is not None:
            assert detect_version({"path": path}).info.key == key
            continue
        with pytest.raises(RequestError, match="fits sd21 and sd21-base"):
            detect_version({"path": path})


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('model:\n  target: ldm.LatentDiffusion\n  params:\n    parameterization: "v"\n', "sd21"),
        ("model:\n  params:\n    parameterization: v  # velocity\n", "sd21"),
        ("model:\n  target: ldm.LatentDiffusion\n  params:\n    linear_start: 0.1\n", "sd21-base"),
        ("model:\n  params:\n    parameterization: 'eps'\n", "sd21-base"),
    ],
)
def test_the_original_yaml_file_beside_a_checkpoint(text: str, key: str, tmp_path: Path) -> None:
    path = header.safetensors(tmp_path / "v2.safetensors", header.sd_single_file("sd21"), "F16")
    path.with_suffix(".yaml").write_text(text)
    assert detect_version({"path": path}).info.key == key


def test_metadata_of_the_file_itself(tmp_path: Path) -> None:
    """Stability's ModelSpec, which trainers write."""
    for word, key in (("v", "sd21"), ("epsilon", "sd21-base")):
        metadata = {"modelspec.prediction_type": word, "modelspec.title": "x"}
        path = header.safetensors(tmp_path / "x.safetensors", header.sd_single_file("sd21"), "F16", metadata)
        assert detect_version({"path": path}).info.key == key


def test_flux_is_told_from_its_transformer(tmp_path: Path) -> None:
    for name in ("schnell", "dev"):
        path = header.gguf(tmp_path / f"{name}.gguf", header.flux(name), "Q4_K")
        assert detect_version({"transformer": path}).info.key == f"flux-{name}"
        assert detect_version({"path": path}).info.key == f"flux-{name}"
    everything = header.safetensors(tmp_path / "all.safetensors", header.all_in_one(), "F8_E4M3")
    assert detect_version({"path": everything}) is SDVersion.FLUX_DEV


def test_a_gguf_of_a_unet(tmp_path: Path) -> None:
    for context, key in ((768, "sd15"), (1024, "sd21"), (2048, "sdxl")):
        path = header.gguf(tmp_path / "unet.gguf", header.unet_ldm(context), "Q8_0")
        if key == "sd15":
            assert detect_version({"unet": path}) is SDVersion.SD15
        else:
            with pytest.raises(RequestError, match=f"fits {key} and {key}-"):
                detect_version({"unet": path})


STRANGERS: dict[str, tuple[Any, str]] = {
    "refiner": (lambda: header.sd_single_file("refiner"), "the SDXL refiner, which is not built"),
    "instruct-pix2pix": (lambda: header.unet_ldm(768, 8), r"instruct-pix2pix \(8 input channels\)"),
    "depth": (lambda: header.unet_ldm(1024, 5), r"depth to image \(5 input channels\)"),
    "edm": (lambda: header.unet_ldm(2048) | {"edm_mean": (4,), "edm_std": (4,)}, "EDM's noise levels"),
    "unclip": (lambda: header.unet_ldm(1024) | {"label_emb.0.0.weight": (1280, 2048)}, "unCLIP"),
    "upscaler": (lambda: header.unet_ldm(1024, 7) | {"label_emb.weight": (1000, 1280)}, "x4 upscaler"),
    "lora": (lambda: {"lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": (9, 4)}, "a LoRA"),
    "sd3": (lambda: header.reference("mmdit_tiny_sd3_f16"), "a Stable Diffusion 3 transformer"),
    "controlnet": (lambda: {"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)}, "a ControlNet"),
    "vae": (lambda: header.layout("vae_sd"), "no transformer or UNet|VAE"),
    "unknown": (lambda: {"nothing.known": (1,)}, "no known component|no transformer or UNet"),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_other_models_are_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    shapes, says = STRANGERS[name]
    path = header.safetensors(tmp_path / "x.safetensors", shapes(), "F16")
    for given in ({"unet": path}, {"path": path}):
        with pytest.raises(FluxSdError, match=says) as caught:
            load_model(**given)  # type: ignore[arg-type]
        assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def test_a_folder_that_says_nothing(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"holds no transformer or UNet.*--model"):
        detect_version({"path": tmp_path})
    with pytest.raises(RequestError, match="holds no transformer or UNet"):
        detect_version({"clip": tmp_path, "vae": tmp_path})


# what is predicted -----------------------------------------------------------------------------------------


def files_of(unet: Path, scheduler: Path | None = None) -> ModelFiles:
    return ModelFiles({"unet": unet}, {}, scheduler)


def test_who_is_believed_about_the_prediction_type(tmp_path: Path) -> None:
    """The user, the file's mark, the scheduler's config, the metadata, the training step, the yaml file."""
    shapes = header.sd_single_file("sd21") | {"v_pred": (0,)}
    path = header.safetensors(
        tmp_path / "x.safetensors",
        shapes,
        "F16",
        {"modelspec.prediction_type": "epsilon", "global_step": "875000"},
    )
    path.with_suffix(".yaml").write_text("parameterization: x0")
    config: dict[str, Any] = {"_class_name": "DDIMScheduler", "prediction_type": "sample"}
    with open_checkpoint(path) as checkpoint:
        names, metadata = dict(checkpoint.infos), checkpoint.metadata
        assert told_prediction(config, checkpoint, "v_prediction") == ("v_prediction", "as asked")
        assert told_prediction(config, checkpoint) == ("v_prediction", "the checkpoint's mark v_pred")
        del names["v_pred"]
        checkpoint._infos = names
        assert told_prediction(config, checkpoint) == ("sample", "scheduler_config.json")
        del config["prediction_type"]
        assert told_prediction(config, checkpoint) == ("epsilon", "the file's modelspec metadata")
        del metadata["modelspec.prediction_type"]
        assert told_prediction(config, checkpoint) == ("epsilon", "the checkpoint's global_step")
        metadata["global_step"] = "110000"
        assert told_prediction(config, checkpoint) == ("sample", "the yaml file beside it")
        path.with_suffix(".yaml").unlink()
        assert told_prediction(config, checkpoint) == ("epsilon", "the default of scheduler_config.json")
        assert told_prediction({}, checkpoint) is None


@pytest.mark.parametrize("where", ["asked", "scheduler", "metadata", "yaml"])
def test_a_word_that_is_no_prediction_type(where: str, tmp_path: Path) -> None:
    metadata = {"modelspec.prediction_type": "flow"} if where == "metadata" else None
    path = header.safetensors(tmp_path / "x.safetensors", header.unet_ldm(1024), "F16", metadata)
    if where == "yaml":
        path.with_suffix(".yaml").write_text("parameterization: flow")
    config = {"prediction_type": "flow"} if where == "scheduler" else {}
    with open_checkpoint(path) as checkpoint, pytest.raises(RequestError, match=r"'flow' .* is not built"):
        told_prediction(config, checkpoint, "flow" if where == "asked" else None)


def test_weights_of_either_kind_are_asked_about_and_not_guessed(tmp_path: Path) -> None:
    """2.1's weights stand for both prediction types; the other versions were released with one."""
    path = header.safetensors(tmp_path / "x.safetensors", header.unet_ldm(1024), "F16")
    with open_checkpoint(path) as checkpoint:
        with pytest.raises(RequestError, match=r"give --prediction v_prediction .* or --prediction epsilon"):
            diffusion(SDVersion.SD21.info, files_of(path), checkpoint, reference())
        for asked in ("epsilon", "v_prediction"):
            found = diffusion(SDVersion.SD21.info, files_of(path), checkpoint, reference(), asked)
            assert (found.prediction, found.how) == (asked, "as asked")
        found = diffusion(SDVersion.SD21_BASE.info, files_of(path), checkpoint, reference())
        assert (found.prediction, found.how) == ("epsilon", "the version")


def test_the_inpainting_model_of_2_under_candles_numerics(tmp_path: Path) -> None:
    """Candle runs it with the settings of 2.1, whatever stands beside it; who asks is believed first."""
    info = SDVersion.SD2_INPAINT.info
    path = header.safetensors(tmp_path / "x.safetensors", header.unet_ldm(1024, 9), "F16")
    scheduler = write_json(tmp_path / "scheduler_config.json", BETAS | {"_class_name": "PNDMScheduler"})
    with open_checkpoint(path) as checkpoint:
        files = files_of(path, scheduler)
        assert diffusion(info, files, checkpoint, reference()).prediction == "epsilon"
        assert diffusion(info, files, checkpoint, candle()).prediction == "v_prediction"
        assert diffusion(info, files, checkpoint, candle(), "epsilon").prediction == "epsilon"


def test_a_unet_apart_from_its_folder_is_not_told_by_it(tmp_path: Path) -> None:
    """The scheduler of a model's folder is about that folder's UNet; another's own companions count."""
    folder = diffusers_unet(tmp_path / "model", "sd21")
    info = SDVersion.SD21.info
    parts = {role: folder / "unet" for role in ("clip", "vae")} | {"clip_tokenizer": TOKENIZER}
    other = header.safetensors(tmp_path / "other" / "x.safetensors", header.unet_ldm(1024), "F16")
    with pytest.raises(RequestError, match="fits sd21 and sd21-base"):
        detect_version({"path": folder, "unet": other})
    assert find_files(info, folder, parts | {"unet": other}).scheduler is None
    beside = write_json(
        tmp_path / "other" / "scheduler" / "scheduler_config.json", {"prediction_type": "epsilon"}
    )
    assert detect_version({"path": folder, "unet": other}) is SDVersion.SD21_BASE
    assert find_files(info, folder, parts | {"unet": other}).scheduler == beside
    asked = folder / "scheduler"
    assert detect_version({"path": folder, "unet": other, "scheduler": asked}) is SDVersion.SD21
    inside = header.gguf(folder / "x.gguf", header.unet_ldm(1024), "Q8_0")
    assert detect_version({"path": folder, "unet": inside}) is SDVersion.SD21


def test_an_sdxl_file_that_is_marked_predicts_velocity(tmp_path: Path) -> None:
    """`v_pred`, and with `ztsnr` beside it noise that ends in nothing but noise; both are no weights."""
    info = SDVersion.SDXL.info
    shapes = header.sd_single_file("sdxl") | {"v_pred": (0,), "ztsnr": (0,)}
    path = header.safetensors(tmp_path / "noob.safetensors", shapes, "F16")
    shutil.copytree(TOKENIZER, tmp_path / "tokenizer")
    with open_checkpoint(path) as checkpoint:
        found = diffusion(info, find_files(info, path, {}), checkpoint, reference())
        assert found.prediction == "v_prediction" and "v_pred" in found.how
        assert float(found.noise.alphas_cumprod[-1]) == 0.0
        for role, network in networks_of(info, reference()).items():
            module = network.on_meta()
            made = plan_load(network.component, module, network.config, checkpoint)
            assert len(made.parameters) == len(module.state_dict()), role
            assert made.ignored["v_pred"] == "says how the UNet was trained"


# noise -----------------------------------------------------------------------------------------------------


def noise_of(config: dict[str, Any], folder: Path) -> NoiseSchedule:
    path = header.safetensors(folder / "x.safetensors", {"x": (1,)}, "F16")
    scheduler = write_json(folder / "scheduler_config.json", config)
    with open_checkpoint(path) as checkpoint:
        return diffusion(SDVersion.SD15.info, files_of(path, scheduler), checkpoint, reference()).noise


def test_the_noise_is_what_the_scheduler_states(tmp_path: Path) -> None:
    """Betas by diffusers' two formulas, and all of Stable Diffusion's where nothing is stated."""
    squares = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    straight = torch.linspace(0.001, 0.02, 500, dtype=torch.float64)
    linear = {"beta_schedule": "linear", "beta_start": 0.001, "beta_end": 0.02, "num_train_timesteps": 500}
    for config, betas in (({}, squares), (BETAS, squares), (linear, straight)):
        found = noise_of(config, tmp_path).alphas_cumprod.double()
        assert torch.allclose(found, (1 - betas).cumprod(0), rtol=1e-5, atol=0)
    zero = noise_of(BETAS | {"rescale_betas_zero_snr": True}, tmp_path).alphas_cumprod
    assert float(zero[-1]) == 0.0 and float(zero[-2]) > 0.0


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_data": 0.5}, "EDMDPMSolver.* no betas"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "FlowMatch.* no betas"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "'squaredcos_cap_v2'.* that are not built"),
        (BETAS | {"trained_betas": [0.1, 0.2]}, "that are not built"),
        (BETAS | {"beta_start": "small"}, "that are not built"),
        (BETAS | {"beta_schedule": "linear", "rescale_betas_zero_snr": True}, "linear betas with zero"),
    ],
)
def test_noise_that_is_not_built_is_refused(config: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=says) as caught:
        noise_of(config, tmp_path)
    assert "scheduler_config.json" in str(caught.value)


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    path = header.safetensors(tmp_path / "x.safetensors", header.unet_ldm(1024), "F16")
    for text, says in (("{", "cannot be read as JSON"), ("[]", "holds list, an object was expected")):
        config = tmp_path / "scheduler" / "scheduler_config.json"
        config.parent.mkdir(exist_ok=True)
        config.write_text(text)
        with pytest.raises(CheckpointError, match=says):
            detect_version({"path": path})


# configs beside weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "role", "config", "says"),
    [
        ("sd15", "unet", {"attention_head_dim": 64}, r"attention_head_dim 64, and only \(8, 8, 8, 8\)"),
        ("sd21", "unet", {"attention_head_dim": 8}, r"only \(5, 10, 20, 20\) is built"),
        ("sdxl", "unet", {"attention_head_dim": [5, 10, 10]}, r"only \(5, 10, 20\)"),
        ("sd15", "unet", {"act_fn": "gelu"}, "act_fn gelu, and only silu"),
        ("sd15", "unet", {"norm_num_groups": 16}, "norm_num_groups 16"),
        ("sd15", "unet", {"flip_sin_to_cos": False}, "flip_sin_to_cos False"),
        (
            "sd15",
            "unet",
            {"class_embed_type": "timestep"},
            "class_embed_type timestep, and nothing but to leave",
        ),
        ("sdxl", "unet", {"addition_time_embed_dim": 128}, "addition_time_embed_dim 128"),
        ("sd15", "unet", {"time_embedding_type": "fourier"}, "time_embedding_type fourier"),
        ("sdxl", "vae", {"latents_mean": [0.0, 0.0, 0.0, 0.0]}, "latents_mean"),
        ("sd15", "vae", {"shift_factor": 0.1}, "shift_factor 0.1"),
        ("sd15", "clip", {"hidden_act": "gelu"}, "hidden_act gelu, and only quick_gelu"),
        ("sd21", "clip", {"hidden_act": "quick_gelu"}, "hidden_act quick_gelu, and only gelu"),
        ("sdxl", "clip_2", {"num_attention_heads": 16}, "num_attention_heads 16, and only 20"),
    ],
)
def test_a_config_that_disagrees_is_refused(
    key: str, role: str, config: dict[str, Any], says: str, tmp_path: Path
) -> None:
    """What weights do not show: a wrong number of heads would give noise and no error."""
    info = SDVersion.parse(key).info
    kind = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}.get(role, "CLIPTextModel")
    named = {"architectures": [kind]} if kind == "CLIPTextModel" else {"_class_name": kind}
    empty = tmp_path / "nothing" / "there"
    networks = dict.fromkeys(("unet", "vae", "clip", "clip_2"), empty) | {role: tmp_path / "m.safetensors"}
    write_json(tmp_path / "config.json", named | config)
    with pytest.raises(CheckpointError, match=says) as caught:
        networks_of(info, reference(), ModelFiles(networks, {}))
    assert str(tmp_path / "config.json") in str(caught.value)
    null = dict.fromkeys(config)  # what is null says nothing
    write_json(tmp_path / "config.json", named | null)
    networks_of(info, reference(), ModelFiles(networks, {}))
    write_json(tmp_path / "config.json", {"_class_name": "Another"} | config)  # nor does another network's
    networks_of(info, reference(), ModelFiles(networks, {}))


def test_a_config_says_what_weights_do_not_show(tmp_path: Path) -> None:
    """Whether attention runs in float32, the scale of latents, and whether the VAE survives float16."""
    info = SDVersion.SDXL.info
    write_json(
        tmp_path / "unet" / "config.json", {"_class_name": "UNet2DConditionModel", "upcast_attention": True}
    )
    vae = {"_class_name": "AutoencoderKL", "scaling_factor": 0.5, "force_upcast": False}
    write_json(tmp_path / "vae" / "config.json", vae)
    found = {"clip": tmp_path, "clip_2": tmp_path, "unet": tmp_path / "unet", "vae": tmp_path / "vae"}
    said, silent = (networks_of(info, reference(), files) for files in (ModelFiles(found, {}), None))
    assert said["unet"].config.float32_attention and not silent["unet"].config.float32_attention
    assert (said["vae"].config.scale_factor, silent["vae"].config.scale_factor) == (0.5, 0.13025)
    assert said["vae"].dtype(torch.float16) == torch.float16
    assert silent["vae"].dtype(torch.float16) == torch.float32
    assert silent["vae"].dtype(torch.bfloat16) == torch.bfloat16


# released repositories -------------------------------------------------------------------------------------

RELEASED = {
    "runwayml/stable-diffusion-v1-5": "sd15",
    "runwayml/stable-diffusion-inpainting": "sd15-inpaint",
    "stabilityai/stable-diffusion-2-1": "sd21",
    "stabilityai/stable-diffusion-2-inpainting": "sd2-inpaint",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "diffusers/stable-diffusion-xl-1.0-inpainting-0.1": "sdxl-inpaint",
}


@pytest.mark.parametrize("repo", RELEASED)
def test_every_released_repository_is_accepted_whole(
    repo: str, hub_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own configs, tokenizers and schedulers, beside files of its shapes: told, checked and opened."""
    info = SDVersion.parse(RELEASED[repo]).info
    folder = tmp_path / "model"
    shutil.copytree(hub_dir / repo, folder)
    kept = {path: path.read_bytes() for path in folder.rglob("config.json")}
    synthetic_sd.write_folder(info, folder, "f16", None, None, "fp16")
    for path, content in kept.items():
        path.write_bytes(content)
    assert SDVersion.parse(repo) is detect_version({"path": folder})
    monkeypatch.setattr("flux_sd.device.available_memory", lambda device: 10**12)
    with load_model(None, folder, device="cpu", dtype="float32") as model:
        assert model.version.info.key == RELEASED[repo]
        parts = model.components  # type: ignore[attr-defined]
        assert parts.config("unet").float32_attention == info.key.startswith("sd2")
        assert parts.config("vae").scale_factor == (0.13025 if info.is_xl else 0.18215)
    scheduler = find_files(info, folder, {}).scheduler
    assert scheduler == folder / "scheduler" / "scheduler_config.json"
    with open_checkpoint(folder / "unet") as checkpoint:
        found = diffusion(info, find_files(info, folder, {}), checkpoint, reference())
    assert found.prediction == ("v_prediction" if info.key == "sd21" else "epsilon")
    assert "scheduler_config.json" in found.how

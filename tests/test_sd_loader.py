"""Stable Diffusion from every layout that people have: one model's numbers, the same latents from each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import helpers_checkpoints as write
import helpers_gguf
import helpers_sd as sd
import pytest
import torch
from helpers_layouts import as_gguf
from safetensors.torch import save_file
from torch import Tensor

from flux_sd.components import LoadOptions
from flux_sd.device import choose_device
from flux_sd.errors import AmbiguousFileError, CheckpointError, MissingFileError, RequestError, WeightMapError
from flux_sd.model_files import find_files
from flux_sd.model_loader import load_model, sd_model
from flux_sd.numerics import reference
from flux_sd.request import GenerationRequest
from flux_sd.sd_loader import load_sd
from flux_sd.versions import SDVersion, VersionInfo

State = dict[str, Tensor]
States = dict[str, State]
# The LDM names are of UNets with four levels, XL's of three.
LEVELS = {
    "sd15": replace(write.UNET_SD, context_dim=64),
    "sd21": replace(write.UNET_SD, context_dim=64, linear_projection=True, float32_attention=True),
    "sdxl": replace(write.UNET_XL, context_dim=160, added_dim=sd.XL_UNET.added_dim),
}
KEYS = tuple(LEVELS)
REQUEST = GenerationRequest("a red kite", negative_prompt="rain", seed=3, steps=1)
TODAY = ("to_q", "to_k", "to_v", "to_out.0")
LEGACY = ("query", "key", "value", "proj_attn")


def small(key: str) -> VersionInfo:
    """A small model of the version's kind, whose UNet has as many levels as released."""
    info = sd.small_info(SDVersion.parse(key))
    assert info.sd is not None
    return replace(info, sd=replace(info.sd, unet=LEVELS[key]))


def states_of(info: VersionInfo, dtype: torch.dtype = torch.float32) -> States:
    """The same numbers for every layout, under our names."""
    return {
        role: {name: p.detach().to(dtype) for name, p in network.named_parameters()}
        for role, network in sd.networks(info).items()
    }


def extras(folder: Path, info: VersionInfo) -> Path:
    """What stands beside the weights in each layout: tokenizers, and what the UNet predicts."""
    for name in ("tokenizer", "tokenizer_2")[: 2 if info.is_xl else 1]:
        shutil.copytree(sd.TOKENIZERS / "clip", folder / name, dirs_exist_ok=True)
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    config = {"prediction_type": info.sd.prediction or "v_prediction"} if info.sd else {}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return folder


def diffusers_state(role: str, state: State) -> State:
    return write.vae_diffusers(state, TODAY) if role == "vae" else state


def folder_with(folder: Path, states: States, name: Callable[[str], str] = str) -> Path:
    """A diffusers folder; `name`: a file's name to what it is called here."""
    for role, state in states.items():
        path = Path(sd.FILES[role])
        write.save(diffusers_state(role, state), folder / path.parent / name(path.name))
    return folder


def single_state(states: States, is_xl: bool, is_open_clip: bool) -> State:
    """One file's names, as the authors trained it, with what training leaves."""
    out = write.prefixed(write.unet_ldm(states["unet"]), "model.diffusion_model.")
    out |= write.prefixed(states["vae"], "first_stage_model.")
    first = "conditioner.embedders.0.transformer." if is_xl else "cond_stage_model.transformer."
    if is_open_clip:
        out |= write.prefixed(write.open_clip(states["clip"]), "cond_stage_model.model.")
        dropped = {
            name: t for name, t in out.items() if ".resblocks.1." in name
        }  # the last of 24 in the world
        out |= {name.replace(".resblocks.1.", ".resblocks.23."): t.clone() for name, t in dropped.items()}
        out["cond_stage_model.model.text_projection"] = torch.zeros(64, 64)
    else:
        out |= write.prefixed(states["clip"], first)
        out[f"{first}text_model.embeddings.position_ids"] = torch.arange(77)[None]
    if is_xl:
        out |= write.prefixed(write.open_clip(states["clip_2"]), "conditioner.embedders.1.model.")
    averaged = {"model_ema." + name.replace(".", ""): t * 0 for name, t in list(out.items())[:5]}
    return out | averaged | {"model_ema.decay": torch.tensor(0.9), "betas": torch.zeros(1000)}


def one_file(info: VersionInfo, states: States) -> State:
    return single_state(states, info.is_xl, info.key == "sd21")


def shards_with_a_variant(folder: Path, states: States) -> Path:
    """The UNet as diffusers shards it today, in half precision; the rest in single files."""
    folder_with(folder, states, lambda name: name.replace(".safetensors", ".fp16.safetensors"))
    home = folder / "unet"
    (home / "diffusion_pytorch_model.fp16.safetensors").unlink()
    names = [f"diffusion_pytorch_model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    placed = {key: names[i % 2] for i, key in enumerate(states["unet"])}
    for name in names:
        save_file({key: t for key, t in states["unet"].items() if placed[key] == name}, home / name)
    index = home / "diffusion_pytorch_model.safetensors.index.fp16.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return folder


def as_float32(name: str, tensor: Tensor) -> str:
    return "F32"


def written(layout: str, folder: Path, info: VersionInfo, states: States) -> tuple[Path, dict[str, Path]]:
    """(what is given as the path, files given by role) of one layout."""
    extras(folder, info)
    match layout:
        case "folder":
            return folder_with(folder, states), {}
        case "folder, variant in the names":
            return folder_with(folder, states, lambda n: n.replace(".safetensors", ".fp16.safetensors")), {}
        case "folder, pickles":
            for role, state in states.items():
                path = (folder / sd.FILES[role]).with_suffix(".bin")
                path.parent.mkdir()
                torch.save(diffusers_state(role, state), path)
            return folder, {}
        case "shards, variant in the names":
            return shards_with_a_variant(folder, states), {}
        case "single file":
            return write.save(one_file(info, states), folder / "model.safetensors"), {}
        case "ckpt" | "ckpt before torch 1.6":
            content = {"global_step": 7, "state_dict": one_file(info, states)}
            torch.save(content, folder / "m.ckpt", _use_new_zipfile_serialization=layout == "ckpt")
            return folder / "m.ckpt", {}
        case "UNet in GGUF":
            folder_with(folder, states)
            shutil.rmtree(folder / "unet")
            state = write.unet_ldm(states["unet"])
            as_gguf(as_float32, "sd1", flat=True)(state, folder / "unet.gguf")
            return folder, {"unet": folder / "unet.gguf"}
        case "single file in GGUF":
            helpers_gguf.write_state(folder / "m.gguf", {
                name: tensor for name, tensor in one_file(info, states).items() if "position_ids" not in name
            })  # fmt: skip
            return folder / "m.gguf", {}
        case _:
            return separate_vae(layout, folder, info, states)


VAES: dict[str, Callable[[State], State]] = {
    "LDM": dict,
    "squeezed": write.vae_squeezed,
    "diffusers": lambda s: write.vae_diffusers(s, TODAY),
    "diffusers of old": lambda s: write.vae_diffusers(s, LEGACY),
}


def separate_vae(
    layout: str, folder: Path, info: VersionInfo, states: States
) -> tuple[Path, dict[str, Path]]:
    """A single file without an autoencoder of use, and one beside it in one of the spellings."""
    spoiled = one_file(info, states)
    spoiled |= {name: t + 1 for name, t in spoiled.items() if name.startswith("first_stage_model.")}
    vae = VAES[layout.removeprefix("VAE apart, ")](states["vae"])
    given = write.save(vae, folder / "elsewhere" / "vae.safetensors")
    return write.save(spoiled, folder / "model.safetensors"), {"vae": given}


LAYOUTS = (
    "folder", "folder, variant in the names", "folder, pickles", "shards, variant in the names",
    "single file", "ckpt", "ckpt before torch 1.6", "UNet in GGUF", "single file in GGUF",
    *(f"VAE apart, {name}" for name in VAES),
)  # fmt: skip


@pytest.fixture(scope="module")
def expected() -> dict[str, tuple[VersionInfo, States, list[Tensor]]]:
    """By version: its row, the numbers of its networks, and (filled in by the first layout) its latents."""
    rows = {key: small(key) for key in KEYS}
    return {key: (info, states_of(info), []) for key, info in rows.items()}


# What differs between the versions is in the names of single files; the rest is tried with one of them.
BY_VERSION = ("folder", "single file", "ckpt", "UNet in GGUF")
CASES = [(key, layout) for key in KEYS for layout in (LAYOUTS if key == "sd15" else BY_VERSION)]


@pytest.mark.parametrize(("key", "layout"), CASES)
def test_every_layout_holds_the_same_model(
    key: str,
    layout: str,
    expected: dict[str, tuple[VersionInfo, States, list[Tensor]]],
    tmp_path: Path,
) -> None:
    """Every parameter, bit for bit, and the latents of one step."""
    info, states, latents = expected[key]
    path, given = written(layout, tmp_path, info, states)
    files, options = find_files(info, path, given), LoadOptions(keep_loaded=True)
    loaded = load_sd(info, files, choose_device("cpu"), torch.float32, reference(), options)
    assert loaded.diffusion.prediction == (info.sd.prediction if info.sd else None) or key == "sd21"
    with sd_model(SDVersion.parse(key), loaded) as model:
        for role, state in states.items():
            found = model.components.network(role).state_dict()
            assert found.keys() == state.keys()
            for name, tensor in state.items():
                assert torch.equal(found[name], tensor.view(found[name].shape)), f"{role}: {name}"
        if layout in ("folder", "single file", "UNet in GGUF"):
            latents.append(model.generate(REQUEST)[0].latents)
            assert latents[-1].isfinite().all() and torch.equal(latents[-1], latents[0])


def test_half_precision_on_disk_is_widened(tmp_path: Path) -> None:
    info = small("sd15")
    states = states_of(info, torch.float16)
    folder = folder_with(extras(tmp_path, info), states)
    with sd.open_model(folder, info, keep_loaded=True) as model:
        for role, state in states.items():
            for name, tensor in model.components.network(role).state_dict().items():
                assert tensor.dtype == torch.float32 and torch.equal(tensor, state[name].float())


# which file is taken ---------------------------------------------------------------------------------------


def test_of_several_precisions_the_plain_file_is_taken(tmp_path: Path) -> None:
    """Files and shard indexes alike; without a plain one they are offered."""
    info = small("sd15")
    folder = folder_with(extras(tmp_path, info), states_of(info))
    unet = folder / "unet"
    plain = unet / "diffusion_pytorch_model.safetensors"
    for name in ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.non_ema.safetensors"):
        shutil.copy(plain, unet / name)
    shutil.copy(plain, unet / "diffusion_pytorch_model.bin")  # pickles count where there is nothing else
    assert find_files(info, folder, {}).networks["unet"] == plain
    state = states_of(info)["unet"]
    for ending in ("safetensors.index.fp16.json", "safetensors.index.json"):
        variant = ".fp16" if "fp16" in ending else ""
        shard = f"diffusion_pytorch_model{variant}-00001-of-00001.safetensors"
        save_file(state, unet / shard)
        index = {"metadata": {}, "weight_map": dict.fromkeys(state, shard)}
        (unet / f"diffusion_pytorch_model.{ending}").write_text(json.dumps(index))
    plain.unlink()
    taken = find_files(info, folder, {}).networks["unet"]
    assert taken.name == "diffusion_pytorch_model.safetensors.index.json"
    taken.unlink()
    with pytest.raises(AmbiguousFileError, match="for the unet: choose one with --unet"):
        find_files(info, folder, {})


def test_a_single_file_in_a_folder_is_pointed_to(tmp_path: Path) -> None:
    info = small("sdxl")
    write.save(one_file(info, states_of(info)), extras(tmp_path, info) / "my model.safetensors")
    with pytest.raises(MissingFileError, match=r"my model\.safetensors there holds every part: give it as"):
        find_files(info, tmp_path, {})


def test_what_a_folder_lacks_is_named(tmp_path: Path) -> None:
    info = small("sdxl")
    folder = folder_with(extras(tmp_path, info), states_of(info))
    shutil.rmtree(folder / "text_encoder_2")
    with pytest.raises(
        MissingFileError, match="no clip_2: expected text_encoder_2 there, or give --clip-2 FILE"
    ):
        find_files(info, folder, {})
    shutil.rmtree(folder / "tokenizer")
    shutil.rmtree(folder / "tokenizer_2")
    folder_with(folder, states_of(info))
    with pytest.raises(MissingFileError, match=r"no tokenizer for the clip encoder: .*give --clip-tokenizer"):
        find_files(info, folder, {})


def test_either_tokenizer_of_xl_serves_both_encoders(tmp_path: Path) -> None:
    info = small("sdxl")
    folder = folder_with(extras(tmp_path, info), states_of(info))
    shutil.rmtree(folder / "tokenizer_2")
    assert set(find_files(info, folder, {}).tokenizers.values()) == {folder / "tokenizer"}


def test_one_encoder_in_the_role_of_the_other(tmp_path: Path) -> None:
    """Of real sizes, so that each can be called by its name."""
    import helpers_headers as header

    info = SDVersion.SDXL.info
    paths = {
        "clip": header.safetensors(tmp_path / "g.safetensors", header.layout("clip_bigg"), "F16"),
        "clip_2": header.safetensors(tmp_path / "l.safetensors", header.layout("clip_l"), "F16"),
        "unet": header.safetensors(tmp_path / "unet.safetensors", header.layout("unet_sdxl"), "F16"),
        "vae": header.safetensors(tmp_path / "vae.safetensors", header.layout("vae_sd"), "F16"),
    }
    extras(tmp_path, info)
    files = find_files(info, None, paths | {"clip_tokenizer": tmp_path / "tokenizer"})
    with pytest.raises(WeightMapError) as caught:
        load_sd(info, files, choose_device("cpu"), torch.float32, reference())
    said = str(caught.value)
    assert "clip: " in said and "OpenCLIP-bigG (SDXL)" in said and "clip_2: " in said and "CLIP-L" in said
    assert "\n" not in said


def test_files_for_parts_that_a_version_does_not_have(tmp_path: Path) -> None:
    for key, given, says in (
        ("sd15", {"clip_2": tmp_path}, "sd15 has no clip_2: its parts are clip, unet, vae"),
        ("sdxl", {"t5": tmp_path, "transformer": tmp_path}, "sdxl has no transformer and no t5"),
        ("flux-dev", {"unet": tmp_path, "scheduler": tmp_path}, "flux-dev has no unet and no scheduler"),
    ):
        with pytest.raises(RequestError, match=says):
            load_model(key, **given)  # type: ignore[arg-type]


# numbers in configs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["x", 0, -0.2, True, float("inf"), [1]])
def test_a_scale_that_is_none_is_refused(value: object, tmp_path: Path) -> None:
    info = sd.small_info(SDVersion.SD15)
    folder = sd.write_folder(tmp_path / "m", info)
    config = {"_class_name": "AutoencoderKL", "scaling_factor": value}
    (folder / "vae" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"vae/config.json says scaling_factor .*a number above 0"):
        sd.open_model(folder, info)


def test_a_scale_of_null_says_nothing(tmp_path: Path) -> None:
    info = sd.small_info(SDVersion.SD15)
    folder = sd.write_folder(tmp_path / "m", info)
    (folder / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKL", "scaling_factor": null}')
    with sd.open_model(folder, info) as model:
        assert model.components.config("vae").scale_factor == 0.18215


@pytest.mark.parametrize(
    "fields",
    [
        {"num_train_timesteps": -5}, {"num_train_timesteps": True}, {"num_train_timesteps": 0},
        {"num_train_timesteps": 10.5}, {"beta_start": -1}, {"beta_start": 0}, {"beta_end": float("inf")},
        {"beta_start": 0.02}, {"beta_end": "x"}, {"beta_end": 1.5},
    ],
)  # fmt: skip
def test_betas_that_cannot_be_are_refused(fields: dict[str, object], tmp_path: Path) -> None:
    info = sd.small_info(SDVersion.SD15)
    folder = sd.write_folder(tmp_path / "m", info, scheduler=fields)
    with pytest.raises(CheckpointError, match=r"scheduler_config.json has betas .*are not built"):
        sd.open_model(folder, info)


def test_the_schedule_that_a_config_names_is_taken_where_none_is_asked_for(tmp_path: Path) -> None:
    info = sd.small_info(SDVersion.SD15)
    zero = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    folder = sd.write_folder(tmp_path / "m", info, scheduler=zero)
    request = GenerationRequest("a", seed=1)
    with sd.open_model(folder, info, keep_loaded=True) as model:
        (result,) = model.generate(request)
        assert result.metadata["schedule"] == "trailing" and result.metadata["zero_terminal_snr"]
        (asked,) = model.generate(replace(request, schedule="leading"))
        assert asked.metadata["schedule"] == "leading"
        # a sampler that knows other schedules keeps its own
        (lcm,) = model.generate(replace(request, sampler="lcm"))
        assert lcm.metadata["schedule"] == "trailing"
    plain = sd.write_folder(tmp_path / "plain", info, scheduler={"timestep_spacing": "somewhere"})
    with sd.open_model(plain, info) as model:
        assert model.generate(request)[0].metadata["schedule"] == "leading"

"""Stable Diffusion's checkpoints against the maps: every version at its real size, from sparse files.

Single files are written by formula (tools/sd_names.py), and both formula and maps are held against what
diffusers' own classes and converters have (tests/data/sd_layouts.json). No tensor of a real size is read.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import helpers_checkpoints as write
import helpers_headers as header
import pytest
import sd_names
import synthetic_sd
import torch
from helpers_layouts import as_gguf, weights
from make_synthetic_checkpoint import shapes_of
from torch import nn

from flux_sd.autoencoder import AutoEncoderConfig
from flux_sd.checkpoint import Checkpoint, open_checkpoint
from flux_sd.clip import ClipTextConfig
from flux_sd.dialects import translate
from flux_sd.errors import WeightMapError
from flux_sd.load_plan import LoadPlan, fill, keep_stored, plan_load, staying
from flux_sd.model_files import check_roles
from flux_sd.tensor_info import Header
from flux_sd.unet import UNetConfig
from flux_sd.versions import SDVersion, VersionInfo
from flux_sd.weight_map import find_parts, load_maps

MAPS = {weight_map.name: weight_map for weight_map in load_maps()}
RELEASED = [version.info for version in SDVersion if version.info.family == "sd" and version.info.repo]
IN_ONE_FILE = [info for info in RELEASED if info.key in synthetic_sd.SINGLE_FILES]
LISTED = {  # version -> what diffusers' and transformers' classes have
    "sd15": ("unet_sd15", "clip_l", None),
    "sd15-inpaint": ("unet_sd15_inpaint", "clip_l", None),
    "sd21": ("unet_sd21", "clip_h", None),
    "sd21-base": ("unet_sd21", "clip_h", None),
    "sd2-inpaint": ("unet_sd2_inpaint", "clip_h", None),
    "sdxl": ("unet_sdxl", "clip_l", "clip_bigg"),
    "sdxl-turbo": ("unet_sdxl", "clip_l", "clip_bigg"),
    "sdxl-inpaint": ("unet_sdxl_inpaint", "clip_l", "clip_bigg"),
}


@functools.cache
def on_meta(component: str, config: object) -> nn.Module:
    """For plans only: nothing fills it."""
    return write.build(component, config)


def plan(role: str, info: VersionInfo, checkpoint: Checkpoint) -> LoadPlan:
    component, config = synthetic_sd.ROLES[role][0], getattr(info.sd, role)
    return plan_load(component, on_meta(component, config), config, checkpoint)


def roles_of(info: VersionInfo) -> list[str]:
    return [role for role in synthetic_sd.ROLES if getattr(info.sd, role) is not None]


def check_plan(role: str, info: VersionInfo, made: LoadPlan) -> None:
    """Every parameter is there, as many numbers as released."""
    component = synthetic_sd.ROLES[role][0]
    shapes = shapes_of(component, getattr(info.sd, role))
    assert {parameter.target for parameter in made.parameters} == shapes.keys()
    numbers = sum(torch.Size(parameter.shape).numel() for parameter in made.parameters)
    assert numbers == info.parameters[role]


# real sizes ------------------------------------------------------------------------------------------------


def test_every_released_version_is_tested() -> None:
    assert {info.key for info in RELEASED} == LISTED.keys()
    assert LISTED.keys() - {info.key for info in IN_ONE_FILE} == {
        "sdxl-inpaint"
    }  # there is none in the world


@pytest.mark.parametrize("info", RELEASED, ids=lambda info: info.key)
def test_a_diffusers_folder_loads_without_a_problem(info: VersionInfo, tmp_path: Path) -> None:
    """With variants in the names; the UNet of one version in shards."""
    limit = 2_000_000_000 if info.key == "sdxl" else None
    written = synthetic_sd.write_folder(info, tmp_path, "f16", None, limit, "fp16")
    assert len(list(tmp_path.glob("unet/*.safetensors"))) == (3 if limit else 1)
    listed = dict(zip(("unet", "clip", "clip_2"), LISTED[info.key], strict=True), vae="vae_sd")
    for role in roles_of(info):
        with open_checkpoint(tmp_path / synthetic_sd.ROLES[role][2]) as checkpoint:
            shapes = {name: found.shape for name, found in checkpoint.infos.items()}
            assert shapes == header.layout(str(listed[role]))
            made = plan(role, info, checkpoint)
            check_plan(role, info, made)
            assert not made.ignored and made.stored_bytes in written.values()


@pytest.mark.parametrize("info", IN_ONE_FILE, ids=lambda info: info.key)
def test_a_single_file_loads_without_a_problem(info: VersionInfo, tmp_path: Path) -> None:
    synthetic_sd.write_single_file(info, tmp_path)
    (path,) = tmp_path.iterdir()
    with open_checkpoint(path) as checkpoint:
        check_roles(info, dict.fromkeys(roles_of(info), checkpoint))
        check_single_file(info, checkpoint)


def check_single_file(info: VersionInfo, checkpoint: Checkpoint) -> None:
    used: list[str] = []
    for role in roles_of(info):
        made = plan(role, info, checkpoint)
        check_plan(role, info, made)
        sources = {piece.source for parameter in made.parameters for piece in parameter.pieces}
        assert sources | made.ignored.keys() == checkpoint.infos.keys() and all(made.ignored.values())
        used += sources
    left = set(checkpoint.names) - set(used)
    assert len(used) == len(set(used)), "a tensor goes to two networks"
    assert all(name.startswith(("model_ema.", *synthetic_sd.SCHEDULE)) for name in left - UNUSED), left


UNUSED = {
    "cond_stage_model.transformer.text_model.embeddings.position_ids",
    "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
    "conditioner.embedders.1.model.logit_scale",
    "cond_stage_model.model.logit_scale",
    "cond_stage_model.model.text_projection",
    *(f"cond_stage_model.model.transformer.resblocks.23.{leaf}" for leaf in (
        "ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias", "attn.in_proj_weight", "attn.in_proj_bias",
        "attn.out_proj.weight", "attn.out_proj.bias", "mlp.c_fc.weight", "mlp.c_fc.bias",
        "mlp.c_proj.weight", "mlp.c_proj.bias",
    )),
}  # fmt: skip


@pytest.mark.parametrize("key", ["sd15-inpaint", "sd21-base"])
def test_a_ckpt_of_real_size_loads_without_a_problem(key: str, tmp_path: Path) -> None:
    info = SDVersion.parse(key).info
    synthetic_sd.write_single_file(info, tmp_path, container="ckpt")
    (path,) = tmp_path.iterdir()
    assert path.stat().st_size > 2e9 > 1000 * path.stat().st_blocks  # a hole where the values would be
    with open_checkpoint(path) as checkpoint:
        check_single_file(info, checkpoint)
        assert checkpoint.metadata["global_step"] == str(synthetic_sd.SINGLE_FILES[key][1])


def test_a_single_file_of_sdxl_has_the_released_number_of_tensors() -> None:
    tensors, _ = synthetic_sd.single_file(SDVersion.SDXL.info)
    assert len(tensors) == 1680 + 197 + 390 + 248


# what diffusers has ----------------------------------------------------------------------------------------


def digest(pairs: Iterable[tuple[str, str]]) -> str:
    lines = sorted("\t".join(pair) for pair in pairs)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@pytest.mark.parametrize(
    ("name", "map_name", "config"),
    [
        ("unet_sd15", "unet.ldm_sd", UNetConfig.sd15()),
        ("unet_sd15_inpaint", "unet.ldm_sd", UNetConfig.sd15().inpainting()),
        ("unet_sd21", "unet.ldm_sd", UNetConfig.sd21()),
        ("unet_sd2_inpaint", "unet.ldm_sd", UNetConfig.sd21().inpainting()),
        ("unet_sdxl", "unet.ldm_xl", UNetConfig.sdxl()),
        ("unet_sdxl_inpaint", "unet.ldm_xl", UNetConfig.sdxl().inpainting()),
    ],
)
def test_names_are_paired_as_diffusers_pairs_them(name: str, map_name: str, config: object) -> None:
    """Its own converter from single files, whose pairs are stored as a digest; our names are diffusers'."""
    names = header.layout(name)
    expected = header.layouts()[name]["ldm"]
    assert shapes_of("unet", config) == names
    assert digest((sd_names.unet_ldm(ours, names), ours) for ours in names) == expected
    rows = MAPS[map_name].expand(config, names.keys())
    assert digest((row.sources[0], target) for target, row in rows.items()) == expected
    same = MAPS["unet.diffusers"].expand(config, names.keys())
    assert all(row.sources == (target,) for target, row in same.items()) and same.keys() == names.keys()


def test_the_autoencoders_names_are_paired_as_diffusers_pairs_them() -> None:
    """Ours are LDM's."""
    config = AutoEncoderConfig.sd()
    rows = MAPS["autoencoder.diffusers"].expand(config, shapes_of("autoencoder", config).keys())
    pairs = [(target, row.sources[0]) for target, row in rows.items()]
    assert digest(pairs) == header.layouts()["vae_sd"]["ldm"]


def test_rows_of_openclip_go_where_diffusers_puts_them() -> None:
    """Thirds of the fused projections and the transposed matrix, as diffusers' converter moved the values."""
    stored: Any = header.layouts()["open_clip"]
    sizes = SimpleNamespace(**stored["sizes"])
    rows = MAPS["clip.openclip"].expand(sizes, stored["rows"].keys())
    width = sizes.hidden_size
    for name, (source, first, end, turned) in stored["rows"].items():
        row = rows[name]
        assert row.sources == (source,) and (row.operation == "transpose") == turned
        if ".in_proj_" in source:
            assert row.operation == f"third_{first // width}" and end - first == width
        else:
            assert row.operation in ("copy", "transpose") and first == 0
    assert rows.keys() == stored["rows"].keys()


@pytest.mark.parametrize(
    ("config", "dialect"), [(write.UNET_SD, "ldm_sd"), (write.UNET_XL, "ldm_xl")], ids=["sd", "xl"]
)
def test_a_unet_can_be_written_under_the_other_names(config: object, dialect: str) -> None:
    """`convert` reads the maps backwards: diffusers' names to LDM's and back."""
    shapes = shapes_of("unet", config)
    theirs = {sd_names.unet_ldm(name, shapes): shape for name, shape in shapes.items()}
    for given, wanted, to in ((shapes, theirs, dialect), (theirs, shapes, "diffusers")):
        written = translate(in_memory(given), "unet", to)
        assert {tensor.name: tensor.shape for tensor in written.tensors} == wanted
        for tensor in written.tensors:
            (source,) = tensor.sources
            pair = (source, tensor.name) if to == dialect else (tensor.name, source)
            assert pair[1] == sd_names.unet_ldm(pair[0], shapes)


# values ----------------------------------------------------------------------------------------------------

TINY_VAE = AutoEncoderConfig(32, 3, 32, 3, (1, 2, 1), 1, 4, 0.5, 0.0, use_quant_conv=True)
TINY_L = ClipTextConfig(64, 32, 64, 2, 2, "quick_gelu")
TINY_G = ClipTextConfig(64, 16, 32, 3, 2, "gelu", projection_dim=16)
TINY_H = ClipTextConfig(64, 16, 32, 23, 2, "gelu")
TINY: dict[str, VersionInfo] = {}
for _key, _unet, _clip, _clip_2 in (
    ("sd15", write.UNET_SD, ClipTextConfig.clip_l(), None),
    ("sd21", replace(write.UNET_SD, linear_projection=True), TINY_H, None),
    ("sdxl", write.UNET_XL, TINY_L, TINY_G),
):
    _info = SDVersion.parse(_key).info
    assert _info.sd is not None
    TINY[_key] = replace(_info, sd=replace(_info.sd, unet=_unet, clip=_clip, clip_2=_clip_2, vae=TINY_VAE))


@pytest.mark.parametrize("key", ["sd21", "sdxl"])
def test_a_folder_a_single_file_and_a_ckpt_hold_the_same_values(key: str, tmp_path: Path) -> None:
    """Written from the same numbers: in a folder under our names, in single files by formula."""
    info = TINY[key]
    assert info.sd is not None
    for container in ("safetensors", "ckpt"):
        synthetic_sd.write_single_file(info, tmp_path, "f32", 1, container)
    with (
        open_checkpoint(next(tmp_path.glob("*.ckpt"))) as ckpt,
        open_checkpoint(next(tmp_path.glob("*.safetensors"))) as single,
    ):
        assert ckpt.names == single.names
        for role in roles_of(info):
            component, config = synthetic_sd.ROLES[role][0], getattr(info.sd, role)
            shapes = shapes_of(component, config)
            for checkpoint in (single, ckpt):
                module = write.build(component, config)
                fill(module, plan_load(component, module, config, checkpoint))
                found = module.state_dict()
                for name, shape in shapes.items():
                    drawn = synthetic_sd.values(f"{role}/{name}", shape, 0, torch.Size(shape).numel(), 1)
                    expected = torch.cat(list(drawn)).view(shape)
                    assert torch.equal(found[name], expected), f"{role} {name}"


SPELLINGS = {
    "LDM": dict,
    "LDM, squeezed": write.vae_squeezed,
    "diffusers": lambda s: write.vae_diffusers(s, ("to_q", "to_k", "to_v", "to_out.0")),
    "diffusers of old": lambda s: write.vae_diffusers(s, ("query", "key", "value", "proj_attn")),
    "diffusers of old, 4-D": lambda s: {
        name: tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        for name, tensor in write.vae_diffusers(s, ("query", "key", "value", "proj_attn")).items()
    },
    "mixed": lambda s: {
        name: tensor[:, :, None, None] if tensor.ndim == 2 and ".to_q." in name else tensor
        for name, tensor in write.vae_diffusers(s, ("to_q", "to_k", "to_v", "to_out.0")).items()
    },
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_every_spelling_of_the_autoencoders_attention(spelling: str, prefix: str, tmp_path: Path) -> None:
    state = write.random_state("autoencoder", TINY_VAE)
    given = write.prefixed(SPELLINGS[spelling](state), prefix) | {prefix + "loss.logvar": torch.zeros(())}
    module = write.build("autoencoder", TINY_VAE)
    with open_checkpoint(write.save(given, tmp_path / "vae.safetensors")) as checkpoint:
        fill(module, plan_load("autoencoder", module, TINY_VAE, checkpoint))
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("is_linear", [False, True], ids=["to convolutions", "to linears"])
def test_linears_and_1x1_convolutions_take_the_place_of_each_other(is_linear: bool, tmp_path: Path) -> None:
    """proj_in and proj_out are stored as the other of the two, under all three dialects."""
    for config, spelled in (
        (write.UNET_SD, dict),
        (write.UNET_SD, write.unet_ldm),
        (write.UNET_XL, write.unet_ldm),
    ):
        wanted = replace(config, linear_projection=is_linear)
        state = write.random_state("unet", replace(config, linear_projection=not is_linear))
        module = write.build("unet", wanted)
        with open_checkpoint(write.save(spelled(state), tmp_path / "m.safetensors")) as checkpoint:
            fill(module, plan_load("unet", module, wanted, checkpoint))
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, state[name].view(tensor.shape)), name


def test_a_unet_in_gguf_under_ldm_names(tmp_path: Path) -> None:
    """As ComfyUI-GGUF writes it: what does not fit blocks in 16 bits, convolutions as rows of 256 with their
    shape in the metadata. Matrices stay packed, convolutions are decoded as they are loaded."""
    config = UNetConfig(4, (32,) * 4, (1, 1, 1, 0), 1, (1,) * 4, 32, False)
    state = write.random_state("unet", config)

    def kind(name: str, tensor: torch.Tensor) -> str:
        if tensor.ndim < 2 or name.startswith(("time_embed.", "input_blocks.0.0.", "out.2.")):
            return "F32"
        return "Q8_0" if tensor.ndim == 2 and tensor.shape[1] % 32 == 0 else "F16"

    theirs = write.unet_ldm(state)
    back = as_gguf(kind, "sd1", flat=True)(theirs, tmp_path / "m.gguf")
    module = write.build("unet", config)
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        conv = checkpoint.info("input_blocks.1.0.in_layers.2.weight")
        assert conv.shape == (32, 32, 3, 3) and conv.stored_shape == (36, 256) and conv.dtype == "Q8_0"
        made = plan_load("unet", module, config, checkpoint)
        packed = {parameter.target for parameter in staying(module, made, torch.float32)}
        keep_stored(module, made, torch.float32)
        fill(module, made)
        found = weights(module)
        for name, tensor in found.items():
            assert torch.equal(tensor, back[sd_names.unet_ldm(name, state)].float()), name
    assert found.keys() == state.keys()
    attention = {n for n in state if ".transformer_blocks." in n and state[n].ndim == 2}
    assert attention <= packed and not any("conv" in name for name in packed)


# what is refused -------------------------------------------------------------------------------------------


def in_memory(shapes: Mapping[str, tuple[int, ...]]) -> Checkpoint:
    """A checkpoint of which only the header exists."""
    return Checkpoint([Path("header-only")], [Header(tuple(header.infos(shapes, "F16").values()))])


def single(key: str) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a tiny model's single file."""
    tensors, _ = synthetic_sd.single_file(TINY[key])
    return {tensor.name: tensor.shape for tensor in tensors}


@pytest.mark.parametrize("victim", [
    "model.diffusion_model.output_blocks.2.1.conv.weight", "model.diffusion_model.time_embed.0.bias",
    "first_stage_model.post_quant_conv.weight", "cond_stage_model.model.positional_embedding",
    "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_bias",
])  # fmt: skip
def test_a_tensor_that_is_wrong_is_named(victim: str) -> None:
    info, shapes = TINY["sd21"], single("sd21")
    role = {"m": "unet", "f": "vae", "c": "clip"}[victim[0]]
    lost = {name: shape for name, shape in shapes.items() if name != victim}
    wider = (*shapes[victim][:-1], shapes[victim][-1] + 3)
    plan(role, info, in_memory(shapes))
    for changed, says in (
        (lost, [f"missing: {victim}"]),
        (lost | {victim + "_2": shapes[victim]}, [f"unexpected: {victim}_2"]),
        (shapes | {"stray.weight": (3,)}, ["unexpected: stray.weight"]),
        (shapes | {victim: wider}, [victim.removeprefix("first_stage_model."), str(list(wider))]),
    ):
        with pytest.raises(WeightMapError) as caught:
            plan(role, info, in_memory(changed))
        found = [problem for problem in caught.value.problems if all(part in problem for part in says)]
        assert found, caught.value.problems


MOTION = "down_blocks.0.motion_modules.0.proj_in.weight"


def pix2pix() -> dict[str, tuple[int, ...]]:
    return header.layout("unet_sd15") | {"conv_in.weight": (320, 8, 3, 3)}


def guided_lcm() -> dict[str, tuple[int, ...]]:
    return header.layout("unet_sd15") | {"time_embedding.cond_proj.weight": (320, 256)}


def refiner_diffusers() -> dict[str, tuple[int, ...]]:
    names = header.refiner_ldm()
    return {
        "conv_in.weight": names["input_blocks.0.0.weight"],
        "time_embedding.linear_1.weight": (1536, 384),
        "add_embedding.linear_1.weight": (1536, 2560),
        "down_blocks.0.resnets.0.conv1.weight": (384, 384, 3, 3),
        "down_blocks.3.resnets.0.conv1.weight": (1536, 1536, 3, 3),
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight": (1536, 1280),
    }


@pytest.mark.parametrize(
    ("key", "shapes", "says"),
    [
        ("sd15", lambda: header.layout("unet_sdxl"), "SDXL, which sd15 does not take.*choose --model sdxl"),
        ("sdxl", lambda: header.unet_ldm(768), "SD 1.x, which sdxl does not take.*choose --model sd15"),
        ("sd15", lambda: header.unet_ldm(768, 9), "inpainting .9 input channels.*--model sd15-inpaint"),
        ("sd21", lambda: header.layout("unet_sd15"), "SD 1.x, which sd21 does not take"),
        ("sd15", pix2pix, "instruct-pix2pix .8 input channels.*expected 4"),
        ("sd21", lambda: header.unet_ldm(1024, 5), "depth to image .5 input channels.*expected 4"),
        ("sdxl", header.refiner_ldm, "SDXL refiner, which is not built"),
        ("sdxl", refiner_diffusers, "SDXL refiner, which is not built"),
        ("sdxl", lambda: header.unet_ldm(2048) | {"edm_mean": (4,)}, "EDM's noise levels"),
        ("sdxl", lambda: header.layout("unet_sdxl") | {"edm_vpred.sigma_max": ()}, "EDM's noise levels"),
        ("sd21", lambda: header.layout("unet_sd21") | {"class_embedding.linear_1.weight": (1280, 2048)},
         "unCLIP"),
        ("sd15", lambda: header.layout("unet_sd15") | {MOTION: (9, 9)}, "motion modules"),
    ],
)  # fmt: skip
def test_a_unet_of_another_model_is_refused_in_one_sentence(key: str, shapes: Any, says: str) -> None:
    info = SDVersion.parse(key).info
    with pytest.raises(WeightMapError, match=says) as caught:
        check_roles(info, {"unet": in_memory(shapes())})
    assert "\n" not in str(caught.value)


def test_a_unet_with_a_guidance_input_is_named() -> None:
    with pytest.raises(WeightMapError, match="LCM that reads the guidance as an input, which is not built"):
        plan("unet", SDVersion.SD15.info, in_memory(guided_lcm()))


@pytest.mark.parametrize("spelled", [dict, write.unet_ldm])
def test_candles_sdxl_leaves_the_sizes_unread(spelled: Any) -> None:
    """Under its numerics the UNet has no second embedding, though the file has."""
    config = replace(UNetConfig.sdxl(), added_dim=None)
    given = spelled(header.layout("unet_sdxl"))
    made = plan_load("unet", on_meta("unet", config), config, in_memory(given))
    assert len(made.parameters) == 1676 and set(made.ignored.values()) == {
        "the model embeds no pooled text and sizes: Candle's SDXL does not"
    }


# two components of a kind ----------------------------------------------------------------------------------


def test_of_two_encoders_the_one_that_fits_is_taken() -> None:
    checkpoint = in_memory(single("sdxl"))
    first, second = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
    assert {hit.prefix for hit in find_parts("clip", checkpoint.names)} == {first, second}
    assert plan("clip", TINY["sdxl"], checkpoint).prefix == first
    assert plan("clip_2", TINY["sdxl"], checkpoint).prefix == second
    module = on_meta("clip", TINY_L)
    assert plan_load("clip", module, TINY_L, checkpoint, prefix=first).prefix == first
    with pytest.raises(WeightMapError, match=r"no row|shape"):
        plan_load("clip", module, TINY_L, checkpoint, prefix=second)
    with pytest.raises(WeightMapError, match=r"nothing stands behind 'x\.'"):
        plan_load("clip", module, TINY_L, checkpoint, prefix="x.")


def test_two_encoders_that_both_fit_have_to_be_chosen_from() -> None:
    shapes = shapes_of("clip", TINY_L)
    both = header.behind("clip_l.transformer.", shapes) | header.behind("text_encoder.", shapes)
    module = on_meta("clip", TINY_L)
    with pytest.raises(WeightMapError, match=r"clip_l.transformer.*text_encoder.*one of them"):
        plan_load("clip", module, TINY_L, in_memory(both))
    assert (
        plan_load("clip", module, TINY_L, in_memory(both), prefix="text_encoder.").prefix == "text_encoder."
    )


def test_the_layer_that_is_dropped_is_not_counted() -> None:
    """24 layers in the file are Stable Diffusion 2's 23; 32 stay 32."""
    for layers, counted in ((24, 23), (23, 23), (32, 32), (12, 12)):
        names = header.open_clip(64, layers)
        assert MAPS["clip.openclip"].counts(names) == {"num_hidden_layers": counted}

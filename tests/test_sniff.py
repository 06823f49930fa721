"""sniff.py: what a file holds, from names and shapes, for every layout that people have."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import helpers_checkpoints as write
import helpers_headers as header
import pytest

from flux_sd.autoencoder import AutoEncoderConfig
from flux_sd.checkpoint import open_checkpoint
from flux_sd.clip import ClipTextConfig
from flux_sd.errors import WeightMapError
from flux_sd.flux_mmdit import FluxConfig
from flux_sd.sniff import OTHER, _facts_file, _parse_fact, load_facts, sniff, sniff_header
from flux_sd.t5 import T5Config
from flux_sd.unet import UNetConfig
from flux_sd.weight_map import find_kinds, load_kinds, load_maps

Shapes = header.Shapes
CONFIGS = {"flux_mmdit": FluxConfig, "autoencoder": AutoEncoderConfig, "clip": ClipTextConfig, "t5": T5Config,
           "unet": UNetConfig}  # fmt: skip


def told(shapes: Shapes) -> list[str]:
    """Each component in one line, without what belongs to none."""
    return [
        "/".join((found.component, found.dialect, found.family, found.variant))
        for found in sniff_header(header.infos(shapes))
        if found.component != OTHER
    ]


def llama_cpp(layers: int = 24, width: int = 4096) -> Shapes:
    """A T5 encoder as llama.cpp names it."""
    shapes: Shapes = {"token_embd.weight": (32128, width), "enc.output_norm.weight": (width,)}
    shapes["enc.blk.0.attn_rel_b.weight"] = (32, 64)
    for i in range(layers):
        shapes |= {f"enc.blk.{i}.attn_{part}.weight": (width, width) for part in "qkvo"}
        shapes |= {f"enc.blk.{i}.{part}_norm.weight": (width,) for part in ("attn", "ffn")}
        shapes |= {f"enc.blk.{i}.ffn_{part}.weight": (10240, width) for part in ("gate", "up")}
        shapes[f"enc.blk.{i}.ffn_down.weight"] = (width, 10240)
    return shapes


# what a whole file is -> its names and shapes
WHOLE: dict[str, tuple[str, Callable[[], Shapes]]] = {
    "dev": ("flux_mmdit/bfl/FLUX.1/dev family", lambda: header.flux("dev")),
    "schnell": ("flux_mmdit/bfl/FLUX.1/schnell", lambda: header.flux("schnell")),
    "dev diffusers": (
        "flux_mmdit/diffusers/FLUX.1/dev family", lambda: header.flux("dev", "flux_diffusers")
    ),
    "schnell diffusers": (
        "flux_mmdit/diffusers/FLUX.1/schnell", lambda: header.flux("schnell", "flux_diffusers")
    ),
    "scales called weights": (
        "flux_mmdit/bfl/FLUX.1/dev family", lambda: header.flux("dev", "flux_scale_called_weight")
    ),
    "fill": (
        "flux_mmdit/bfl/FLUX.1/dev family, Fill (384 input channels)",
        lambda: header.flux("dev") | {"img_in.weight": (3072, 384)},
    ),
    "canny": (
        "flux_mmdit/diffusers/FLUX.1/dev family, Canny or Depth (128 input channels)",
        lambda: header.flux("dev", "flux_diffusers") | {"x_embedder.weight": (3072, 128)},
    ),
    "pruned": (
        "flux_mmdit/bfl/FLUX.1/dev family, pruned: 8 of 19 double blocks",
        lambda: header.flux("dev", depth=8),
    ),
    "vae": ("autoencoder/ldm/FLUX.1 or SD 3/", header.flux_vae),
    "sd vae": ("autoencoder/diffusers/SD 1, 2 or XL/", lambda: header.reference("vae_sd")),
    "clip-l": ("clip/hf/CLIP-L/", header.clip_l),
    "clip-l bare": (
        "clip/hf_bare/CLIP-L/", lambda: header.network("clip", ClipTextConfig.clip_l(), "clip_bare")
    ),
    "clip-h": ("clip/hf/OpenCLIP-H (SD 2)/", lambda: header.reference("clip_sd21")),
    "clip-g": ("clip/hf/OpenCLIP-bigG (SDXL)/", lambda: header.reference("clip_sdxl_2")),
    "openclip-h": ("clip/openclip/OpenCLIP-H (SD 2)/", lambda: header.open_clip(1024, 24)),
    "whole clip": (
        "clip/hf/CLIP-L/with the picture encoder",
        lambda: header.clip_l() | {"vision_model.embeddings.patch_embedding.weight": (1024, 3, 14, 14)},
    ),
    "t5": ("t5/hf/T5 v1.1 XXL/", header.t5_xxl),
    "t5 llama.cpp": ("t5/llama_cpp/T5 v1.1 XXL/", llama_cpp),
    "t5 with decoder": (
        "t5/hf/T5 v1.1 XXL/with the decoder",
        lambda: header.t5_xxl() | {"decoder.final_layer_norm.weight": (4096,)},
    ),
    "mt5": ("t5/hf/mT5-XXL/", lambda: header.t5_xxl() | {"shared.weight": (250112, 4096)}),
    "sd15 unet": ("unet/diffusers/SD 1.x/", lambda: header.reference("unet_sd15")),
    "sd21 unet": ("unet/diffusers/SD 2.x/", lambda: header.reference("unet_sd21")),
    "sdxl unet": ("unet/diffusers/SDXL/", lambda: header.reference("unet_sdxl")),
    "inpaint unet": (
        "unet/diffusers/SD 1.x/inpainting (9 input channels)",
        lambda: header.reference("unet_sd15") | {"conv_in.weight": (320, 9, 3, 3)},
    ),
    "pix2pix unet": (
        "unet/ldm_sd/SD 1.x/instruct-pix2pix (8 input channels)", lambda: header.unet_ldm(768, channels=8)
    ),
    "sd3": ("transformer/sd3//", lambda: header.reference("mmdit_tiny_sd3_f16")),
    "sd3.5": ("transformer/sd3//", lambda: header.reference("mmdit_tiny_sd35_f16")),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_a_file_of_one_component(name: str) -> None:
    expected, shapes = WHOLE[name]
    (found,) = sniff_header(header.infos(shapes()))
    assert "/".join((found.component, found.dialect, found.family, found.variant)) == expected
    assert found.tensors == len(shapes()) and found.prefix == "" and found.dtypes == {"BF16": found.tensors}


@pytest.mark.parametrize("weight_map", load_maps(), ids=lambda weight_map: weight_map.name)
def test_every_prefix_of_every_map(weight_map: object) -> None:
    """The probes alone, behind each prefix: enough to be found, by the right map, with nothing before it."""
    name, prefixes = weight_map.name, weight_map.prefixes  # type: ignore[attr-defined]
    names = weight_map.probe  # type: ignore[attr-defined]
    for prefix in prefixes:
        (found,) = sniff_header(header.infos(dict.fromkeys((prefix + probe for probe in names), (1, 1))))
        assert f"{found.component}.{found.dialect}" == name and found.prefix == prefix


SINGLE_FILES = {
    "sd15": ["autoencoder/diffusers/SD 1, 2 or XL/", "clip/hf/CLIP-L/", "unet/ldm_sd/SD 1.x/"],
    "sd21": [
        "autoencoder/diffusers/SD 1, 2 or XL/", "clip/openclip/OpenCLIP-H (SD 2)/",
        "unet/ldm_sd/SD 2.x/",
    ],
    "sdxl": [
        "autoencoder/diffusers/SD 1, 2 or XL/", "clip/hf/CLIP-L/", "clip/openclip/OpenCLIP-bigG (SDXL)/",
        "unet/ldm_xl/SDXL/",
    ],
    "refiner": [
        "autoencoder/diffusers/SD 1, 2 or XL/", "clip/openclip/OpenCLIP-bigG (SDXL)/",
        "refiner/ldm//",
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", SINGLE_FILES)
def test_a_stable_diffusion_file_is_split_by_component(kind: str) -> None:
    shapes = header.sd_single_file(kind)
    assert sorted(told(shapes)) == SINGLE_FILES[kind]
    found = sniff_header(header.infos(shapes))
    assert sum(part.tensors for part in found) == len(shapes)
    (left,) = (part for part in found if part.component == OTHER)
    assert set(left.names) == {"betas", "alphas_cumprod", "model_ema.decay"}


def test_marks_of_the_training_stand_beside_the_unet() -> None:
    shapes = header.behind("model.diffusion_model.", header.unet_ldm(2048))
    assert told(shapes | {"v_pred": (), "ztsnr": ()}) == ["unet/ldm_xl/SDXL/v-prediction"]
    assert told(shapes | {"edm_mean": (4,), "edm_std": (4,)}) == ["edm/ldm//"]
    assert told(shapes | {"edm_vpred.sigma_max": ()}) == ["edm/ldm//"]


def test_an_all_in_one_file_is_split_by_component(tmp_path: Path) -> None:
    path = header.safetensors(tmp_path / "flux1-dev-fp8.safetensors", header.all_in_one(), "F8_E4M3")
    with open_checkpoint(path) as checkpoint:
        parts = {part.component: part for part in sniff(checkpoint)}
    assert {name: part.tensors for name, part in parts.items()} == {
        "flux_mmdit": 780, "autoencoder": 244, "clip": 196, "t5": 219, OTHER: 2,
    }  # fmt: skip
    assert parts["t5"].prefix == "text_encoders.t5xxl.transformer." and parts["t5"].packing == "fp8"
    assert parts["flux_mmdit"].bytes == 11_901_408_320  # one byte a parameter
    assert str(parts["flux_mmdit"]) == "a FLUX.1 transformer, dev family"


def counts(shapes: Shapes) -> dict[str, int]:
    return {found.component: found.tensors for found in sniff_header(header.infos(shapes))}


def test_bare_components_in_one_file_are_told_apart_by_their_maps() -> None:
    """Nothing but names: both have tensors that begin with `encoder.`; what neither knows belongs to none."""
    shapes = header.t5_xxl() | header.flux_vae() | {"encoder.stray": (1,)}
    assert counts(shapes) == {"t5": 219, "autoencoder": 244, OTHER: 1}
    both = header.clip_l() | header.reference("unet_sd15")
    assert counts(both) == {"clip": 196, "unet": 686}


def test_a_bare_component_leaves_the_prefixed_ones_their_tensors() -> None:
    shapes = header.flux("schnell") | header.behind("vae.", header.flux_vae())
    assert counts(shapes) == {"flux_mmdit": 776, "autoencoder": 244}


@pytest.mark.parametrize("architecture", ["", "flux", "pig", "sdxl", "t5"])
def test_a_gguf_is_told_by_its_names_and_not_by_its_architecture(architecture: str, tmp_path: Path) -> None:
    path = header.gguf(tmp_path / "x.gguf", header.flux("schnell"), "Q4_0", architecture)
    with open_checkpoint(path) as checkpoint:
        (found,) = sniff(checkpoint)
    assert (found.component, found.family, found.variant) == ("flux_mmdit", "FLUX.1", "schnell")
    assert found.packing == "GGML blocks" and found.dtypes == {"F32": 464, "Q4_0": 312}


@pytest.mark.parametrize("word", [".scale_weight", ".weight_scale"])
def test_fp8_with_and_without_scales(word: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    state = {"double_blocks.0.img_attn.qkv.weight": torch.zeros(6, 2, dtype=torch.float8_e4m3fn)}
    path = tmp_path / "x.safetensors"
    save_file(state, path)
    with open_checkpoint(path) as checkpoint:
        assert sniff(checkpoint)[0].packing == "fp8"
    save_file(state | {"double_blocks.0.img_attn.qkv" + word: torch.ones(())}, path)
    with open_checkpoint(path) as checkpoint:
        assert sniff(checkpoint)[0].packing == "fp8 with scales"


# adapters ---------------------------------------------------------------------------------------------------

KOHYA = ".lora_down.weight"
ADAPTERS: dict[str, tuple[str, Shapes]] = {
    "kohya flux": (
        "adapter/kohya/FLUX/rank 16", {f"lora_unet_double_blocks_0_img_attn_qkv{KOHYA}": (16, 3072)}
    ),
    "kohya sdxl": (
        "adapter/kohya/SDXL/rank 8",
        {f"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k{KOHYA}": (8, 2048)},
    ),
    "kohya sd1": (
        "adapter/kohya/SD 1.x/rank 4",
        {f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k{KOHYA}": (4, 768)},
    ),
    "kohya sd2": (
        "adapter/kohya/SD 2.x/rank 4",
        {f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k{KOHYA}": (4, 1024)},
    ),
    "peft flux": (
        "adapter/peft/FLUX/rank 32",
        {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": (32, 3072)},
    ),
    "comfy flux": (
        "adapter/peft/FLUX/rank 32",
        {"diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": (32, 3072)},
    ),
    "peft sdxl": (
        "adapter/peft/SDXL/rank 32",
        {"unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": (32, 2048)},
    ),
    "xlabs": ("adapter/xlabs/FLUX/rank 16", {"double_blocks.0.processor.qkv_lora1.down.weight": (16, 3072)}),
    "diffusers 2023": (
        "adapter/diffusers/SD 1.x/rank 4",
        {"down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight": (4, 768)},
    ),
    "bfl control": (
        "adapter/bfl/FLUX/rank 128",
        {
            "img_in.lora_A.weight": (128, 128),
            "single_blocks.0.norm.key_norm.scale": (128,),
            "double_blocks.0.img_attn.norm.key_norm.scale": (128,),
            "double_blocks.0.img_attn.qkv.lora_A.weight": (128, 3072),
        },
    ),
    "loha": ("adapter/lycoris//rank 4", {"lora_unet_x.hada_w1_a": (8, 4), "lora_unet_x.hada_w1_b": (4, 8)}),
    "lokr": ("adapter/lycoris/FLUX/", {"lycoris_single_transformer_blocks_0_proj_mlp.lokr_w1": (4, 4)}),
    "oft": ("adapter/lycoris//", {"oft_unet_x.oft_blocks": (4, 4, 4)}),
    "differences": (
        "adapter/lycoris/FLUX/", {"diffusion_model.double_blocks.0.img_attn.qkv.diff": (9216, 3072)}
    ),
    "dora": (
        "adapter/peft/FLUX/rank 32, DoRA",
        {
            "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": (32, 3072),
            "transformer.single_transformer_blocks.0.attn.to_q.dora_scale": (3072, 1),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_are_named_by_kind_model_and_rank(name: str) -> None:
    expected, shapes = ADAPTERS[name]
    assert told(shapes) == [expected]


def test_an_adapter_that_carries_tensors_of_its_model_is_no_model() -> None:
    shapes = header.flux("dev") | ADAPTERS["bfl control"][1]
    assert told(shapes) == ["adapter/bfl/FLUX/rank 128"]
    beside = header.behind("model.diffusion_model.", header.unet_ldm(768))
    assert told(beside | ADAPTERS["kohya sd1"][1]) == [ADAPTERS["kohya sd1"][0]]


def test_a_prefix_that_ends_like_a_difference_makes_no_adapter() -> None:
    assert told(header.behind("model.diffusion_model.", header.flux("dev"))) == [
        "flux_mmdit/bfl/FLUX.1/dev family"
    ]


# the data files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(len(load_kinds())))
def test_every_kind_is_found_by_its_own_tensors(index: int) -> None:
    """None is hidden behind one that comes before it, whichever of its names a file has."""
    kind = load_kinds()[index]
    for name in kind.any:
        for prefix in kind.prefixes:
            names = [*kind.beside[:1], *(prefix + each for each in (name, *kind.all))]
            assert (kind.what, prefix) in [(found.what, behind) for found, behind in find_kinds(names)]
    for ending in kind.ends:
        assert find_kinds(["x" + ending]) == ((kind, ""),)


def test_relatives_of_flux_are_not_taken_for_it() -> None:
    flux = header.flux("dev", "flux_diffusers")
    for added, what in (
        ("double_stream_modulation_img.linear.weight", "FLUX.2"),
        ("distilled_guidance_layer.in_proj.bias", "Chroma"),
        ("controlnet_x_embedder.weight", "ControlNet"),
        ("transformer_blocks.0.img_mod.1.weight", "Qwen-Image"),
    ):
        (found,) = sniff_header(header.infos(flux | {added: (1,)}))
        assert what in found.what and found.map is None
    without = {name: shape for name, shape in header.flux("dev").items() if not name.startswith("vector_in")}
    (found,) = sniff_header(header.infos(without))
    assert "takes no pooled text" in found.what


def test_a_file_that_lacks_one_tensor_stays_what_it_is() -> None:
    shapes = header.flux("dev")
    for name in ("vector_in.in_layer.weight", "img_in.weight", "guidance_in.in_layer.weight"):
        (found,) = sniff_header(header.infos({other: shapes[other] for other in shapes if other != name}))
        assert str(found) == "a FLUX.1 transformer, dev family", name


def test_sizes_of_components_with_maps_are_fields_of_our_configs() -> None:
    """`check_roles` holds one against the other."""
    for component, config in CONFIGS.items():
        fields = {field.name for field in dataclasses.fields(config)}
        axes = {axis.field for m in load_maps() if m.component == component for axis in m.axes.values()}
        assert {*_facts_file()["sizes"][component], *axes} <= fields


def test_every_fact_speaks_of_sizes_that_are_looked_for() -> None:
    tables = _facts_file()["sizes"]
    for fact in load_facts():
        axes = {axis.field for m in load_maps() if m.component == fact.of for axis in m.axes.values()}
        assert fact.when.keys() <= {*tables[fact.of], *axes} and (fact.family or fact.variant)


def test_a_fact_that_is_misspelled_is_refused() -> None:
    with pytest.raises(WeightMapError, match="not well formed"):
        _parse_fact({"of": "t5", "famly": "T5"})


# real files -------------------------------------------------------------------------------------------------


def test_every_released_index_is_told(hub_dir: Path) -> None:
    """Names alone: an index has no shapes."""
    expected = {
        "FLUX.1-dev/transformer": "a FLUX.1 transformer, dev family",
        "FLUX.1-schnell/transformer": "a FLUX.1 transformer, schnell",
        "FLUX.1-dev/text_encoder_2": "a T5 encoder",
        "FLUX.1-schnell/text_encoder_2": "a T5 encoder",
    }
    seen = set()
    for path in sorted(hub_dir.rglob("*.safetensors.index.json")):
        names = json.loads(path.read_text())["weight_map"]
        found = sniff_header(header.infos(dict.fromkeys(names, ())))
        place = str(path.parent.relative_to(path.parents[2]))
        seen.add(place)
        assert [str(part) for part in found] == [expected[place]] and found[0].tensors == len(names)
    assert seen == expected.keys()


def test_a_header_of_thousands_of_tensors_takes_a_fraction_of_a_second() -> None:
    shapes = header.sd_single_file("sdxl") | header.behind("x.", header.flux("dev", "flux_diffusers"))
    content = header.infos(shapes)
    start = time.perf_counter()
    sniff_header(content)
    assert time.perf_counter() - start < 1.0  # measured: 0.03 s


def test_our_own_tiny_networks_are_described_by_their_width() -> None:
    shapes = header.network("flux_mmdit", write.CONFIGS["flux_mmdit"])
    (found,) = sniff_header(header.infos(shapes))
    assert found.variant == f"dev family, {found.sizes['hidden_size']} wide" and found.sizes["depth"] == 1

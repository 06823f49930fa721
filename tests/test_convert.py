"""convert.py and dialects.py: what is written is what was read, in every container, type and dialect.

The oracles are others' readers: the gguf package decodes GGUF files, the safetensors package the others, and
`helpers_checkpoints` writes the dialects by code that shares nothing with the maps.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import helpers_checkpoints as write
import make_synthetic_checkpoint as synthetic
import pytest
import torch
from helpers_layouts import as_gguf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from flux_sd import cli, dialects
from flux_sd import convert as module
from flux_sd.autoencoder import AutoEncoderConfig
from flux_sd.checkpoint import open_checkpoint
from flux_sd.clip import ClipTextConfig
from flux_sd.convert import Conversion, convert
from flux_sd.dialects import undo, undo_all
from flux_sd.errors import (
    Cancelled,
    CheckpointError,
    DiskSpaceError,
    FluxSdError,
    OutputError,
    RequestError,
    WeightMapError,
)
from flux_sd.flux_mmdit import FluxConfig
from flux_sd.load_plan import fill, place, plan_load
from flux_sd.request import CancelToken
from flux_sd.sniff import sniff
from flux_sd.t5 import T5Config
from flux_sd.targets import TARGETS
from flux_sd.weight_map import Axis, Row, Template, load_maps

State = write.State
ROOT = Path(__file__).parent.parent
# Wide enough that rows are whole blocks of 256 where the real models' are.
CONFIGS = {
    "flux_mmdit": replace(FluxConfig.tiny(1, 1, True), hidden_size=256, num_heads=4, mlp_ratio=2.0),
    "t5": T5Config(64, 256, 64, 256, 2, 4),
    "clip": ClipTextConfig(64, 256, 256, 1, 4, "quick_gelu"),
    "autoencoder": AutoEncoderConfig(32, 3, 32, 3, (1, 2), 1, 4, 0.5, 0.1),
    "unet": replace(write.UNET_SD, widths=(64,) * 4, heads=(1,) * 4, context_dim=256, linear_projection=True),
}
# Where a dialect is of a model of its own.
OTHERS: dict[str, tuple[str, object]] = {
    "unet.ldm_xl": ("unet", write.UNET_XL),
    "clip.openclip": ("clip", ClipTextConfig(64, 256, 256, 2, 4, "gelu", projection_dim=64)),
}
OWN_DIALECT = {  # names equal ours
    "flux_mmdit": "bfl", "t5": "hf", "clip": "hf", "autoencoder": "ldm", "unet": "diffusers"
}  # fmt: skip
WORDS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
         "F8_E5M2": torch.float8_e5m2}  # fmt: skip
# Relative root mean square error that each lossy type has on normal numbers; measured, rounded up by a third.
LOSS = {"Q8_0": 0.008, "Q6_K": 0.02, "Q5_1": 0.05, "Q5_0": 0.06, "Q4_K": 0.09, "Q4_1": 0.1, "Q4_0": 0.12,
        "F8_E4M3": 0.04, "F8_E5M2": 0.08, "F16": 0.001, "BF16": 0.004, "F32": 0.0}  # fmt: skip


@pytest.fixture(scope="module")
def states() -> dict[str, State]:
    """Random values for a small network of each component, all different."""
    plain = {component: write.random_state(component, config) for component, config in CONFIGS.items()}
    return plain | {name: write.random_state(*other) for name, other in OTHERS.items()}


@pytest.fixture(scope="module")
def sources(states: dict[str, State], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same as float32 safetensors under our own names."""
    folder = tmp_path_factory.mktemp("sources")
    return {name: write.save(state, folder / f"{name}.safetensors") for name, state in states.items()}


def read_gguf(path: Path) -> tuple[dict[str, str], State]:
    """(type, values) by name, as the gguf package reads them."""
    types, values = {}, {}
    for tensor in gguf.GGUFReader(path).tensors:
        kind = gguf.GGMLQuantizationType(tensor.tensor_type)
        decoded = torch.from_numpy(gguf.quants.dequantize(tensor.data, kind).copy())
        types[tensor.name] = kind.name
        values[tensor.name] = decoded.float().view(*(int(n) for n in reversed(tensor.shape)))
    return types, values


def read_safetensors(path: Path) -> tuple[dict[str, str], State]:
    """(type, values) by name, as the safetensors package reads them; values of scaled fp8 multiplied out."""
    stored = load_file(path)
    words = {dtype: word for word, dtype in WORDS.items()}
    types = {name: words[tensor.dtype] for name, tensor in stored.items()}
    values = {}
    for name, tensor in stored.items():
        scale = stored.get(name.removesuffix("weight") + "scale_weight")
        values[name] = tensor.float() * (1.0 if scale is None or name.endswith("scale_weight") else scale)
    return types, values


def read(path: Path) -> tuple[dict[str, str], State]:
    return read_gguf(path) if path.suffix == ".gguf" else read_safetensors(path)


def error_of(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


# every target ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("component", CONFIGS)
@pytest.mark.parametrize("name", TARGETS)
def test_every_target_is_read_by_others_and_by_us(
    name: str, component: str, states: dict[str, State], sources: dict[str, Path], tmp_path: Path
) -> None:
    target, state = TARGETS[name], states[component]
    path = tmp_path / f"out{target.suffixes[0]}"
    done = convert(sources[component], path, name)
    types, values = read(path)
    extra = {n for n in values if n.endswith("scale_weight") or n == "scaled_fp8"}
    assert values.keys() - extra == state.keys() and bool(extra) == target.scaled
    for key, expected in state.items():
        assert values[key].shape == expected.shape
        assert error_of(values[key], expected) <= LOSS[types[key]], (key, types[key])
    assert done.types == {kind: list(types.values()).count(kind) for kind in set(types.values())}
    lacking = any(note.startswith("no tensor became") for note in done.notes)
    assert (target.type in done.types) != lacking
    assert not lacking or component == "autoencoder" or (component == "unet" and target.type.endswith("_K"))
    assert done.bytes_out == path.stat().st_size and done.bytes_in == 4 * sum(
        t.numel() for t in state.values()
    )
    network = write.build(component, CONFIGS[component])
    with open_checkpoint(path) as checkpoint:
        (found,) = sniff(checkpoint)
        fill(network, plan_load(component, network, CONFIGS[component], checkpoint))
    assert (found.component, found.dialect, found.prefix) == (component, OWN_DIALECT[component], "")
    assert sum(found.dtypes.values()) == len(state)
    for key, parameter in network.state_dict().items():  # float32: bit for bit what the others decode
        assert torch.equal(parameter, values[key]), key


def test_flux_gguf_keeps_what_community_files_keep(states: dict[str, State], tmp_path: Path) -> None:
    """The rules of ComfyUI-GGUF's convert and quantise steps, written out a second time."""
    for dtype, high in ((torch.float32, "F16"), (torch.bfloat16, "BF16")):
        source = tmp_path / f"{high}.safetensors"
        save_file({name: tensor.to(dtype) for name, tensor in states["flux_mmdit"].items()}, source)
        convert(source, tmp_path / "x.gguf", "gguf:Q4_K", overwrite=True)
        types, _ = read_gguf(tmp_path / "x.gguf")
        for name, tensor in states["flux_mmdit"].items():
            ends = ("img_in", "txt_in", "time_in", "vector_in", "guidance_in", "final_layer")
            kept = name.split(".")[0] in ends
            assert types[name] == ("F32" if tensor.dim() == 1 else high if kept else "Q4_K"), name


def test_rows_that_are_no_whole_blocks_stay_in_16_bits(tmp_path: Path) -> None:
    state = write.random_state("t5", T5Config(64, 96, 32, 256, 1, 3))
    convert(write.save(state, tmp_path / "t5.safetensors"), tmp_path / "x.gguf", "gguf:Q4_K")
    types, _ = read_gguf(tmp_path / "x.gguf")
    assert types["encoder.block.0.layer.1.DenseReluDense.wo.weight"] == "Q4_K"  # [96, 256]
    assert types["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"] == "F16"  # [256, 96]


def test_a_t5_keeps_its_relative_bias_and_quantises_its_embedding(tmp_path: Path) -> None:
    for heads, kept in ((32, "F32"), (64, "F16")):  # [32, heads]: to 1024 elements stay in float32
        state = write.random_state("t5", T5Config(64, 256, 32, 256, 1, heads))
        source = write.save(state, tmp_path / "t5.safetensors")
        convert(source, tmp_path / "x.gguf", "gguf:Q8_0", dialect="llama_cpp", overwrite=True)
        types, values = read_gguf(tmp_path / "x.gguf")
        assert types["token_embd.weight"] == "Q8_0" and types["enc.blk.0.attn_rel_b.weight"] == kept
    bias = state["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    assert torch.equal(values["enc.blk.0.attn_rel_b.weight"], bias.half().float())


def test_what_a_gguf_says_of_itself(sources: dict[str, Path], tmp_path: Path) -> None:
    for component, architecture in (("flux_mmdit", "flux"), ("t5", "t5encoder"), ("clip", None)):
        convert(sources[component], tmp_path / "x.gguf", "gguf:Q6_K", overwrite=True)
        fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
        found = fields["general.architecture"].contents() if "general.architecture" in fields else None
        assert found == architecture
        assert fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q6_K
        assert fields["general.quantization_version"].contents() == gguf.GGML_QUANT_VERSION


def test_file_types_are_ggmls() -> None:
    names = {"F32": "ALL_F32", "Q4_K": "MOSTLY_Q4_K_S"}  # without mixes: what ggml calls S
    for kind, number in module.GGUF_FILE_TYPES.items():
        assert gguf.LlamaFileType[names.get(kind, f"MOSTLY_{kind}")] == number


# dialects --------------------------------------------------------------------------------------------------

WRITTEN: dict[str, tuple[str, Callable[[State], State]]] = {
    "flux_mmdit.bfl": ("flux_mmdit", dict),
    "flux_mmdit.diffusers": ("flux_mmdit", write.flux_diffusers),
    "autoencoder.ldm": ("autoencoder", dict),
    "autoencoder.diffusers": (
        "autoencoder", lambda s: write.vae_diffusers(s, ("to_q", "to_k", "to_v", "to_out.0"))),
    "autoencoder.diffusers_legacy": (
        "autoencoder", lambda s: write.vae_diffusers(s, ("query", "key", "value", "proj_attn"))),
    "clip.hf": ("clip", dict),
    "clip.hf_bare": ("clip", write.clip_bare),
    "t5.hf": ("t5", dict),
    "unet.diffusers": ("unet", dict),
    "unet.ldm_sd": ("unet", write.unet_ldm),
    "unet.ldm_xl": ("unet.ldm_xl", write.unet_ldm),
    "clip.openclip": ("clip.openclip", write.open_clip),
}  # fmt: skip


def same_bits(found: State, expected: State) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        and torch.equal(found[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))
        for name, tensor in expected.items()
    )  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_every_dialect_is_written_as_others_write_it(
    name: str, states: dict[str, State], sources: dict[str, Path], tmp_path: Path
) -> None:
    source, written = WRITTEN[name]
    component, dialect = name.split(".")
    done = convert(sources[source], tmp_path / "x.safetensors", "safetensors:f32", dialect=dialect)
    assert done.written == name and done.found == f"{component}.{OWN_DIALECT[component]}"
    assert same_bits(load_file(tmp_path / "x.safetensors"), written(states[source]))


@pytest.mark.parametrize("name", [m.name for m in load_maps()])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_there_and_back_is_bit_identical(
    name: str, dtype: str, states: dict[str, State], tmp_path: Path
) -> None:
    component, dialect = name.split(".")
    own = states[name if name in OTHERS else component]
    state = {key: tensor.to(WORDS[dtype.upper()]) for key, tensor in own.items()}
    first, there, back = (tmp_path / f"{n}.safetensors" for n in ("first", "there", "back"))
    write.save(state, first)
    convert(first, there, f"safetensors:{dtype}", dialect=dialect)
    done = convert(there, back, f"safetensors:{dtype}", dialect=OWN_DIALECT[component])
    assert done.found == name and same_bits(load_file(back), state)


@pytest.mark.parametrize("name", [m.name for m in load_maps()])
def test_pieces_tile_their_tensors_in_order(name: str, sources: dict[str, Path], tmp_path: Path) -> None:
    component, dialect = name.split(".")
    source = sources[name if name in OTHERS else component]
    convert(source, tmp_path / "x.gguf", "gguf:F32", dialect=dialect)
    for path, wanted in ((source, dialect), (tmp_path / "x.gguf", OWN_DIALECT[component])):
        with open_checkpoint(path) as checkpoint:
            for tensor in dialects.translate(checkpoint, component, wanted).tensors:
                ends = [piece.at + piece.rows for piece in tensor.pieces]
                assert [piece.at for piece in tensor.pieces] == [0, *ends[:-1]], tensor
                assert ends[-1] == tensor.shape[int(tensor.transposed)]
                assert tensor.transposed == ("text_projection" in tensor.name and name == "clip.openclip")


def test_every_known_dialect_is_tested() -> None:
    assert {m.name for m in load_maps()} - WRITTEN.keys() <= {"t5.llama_cpp"}  # that one: the next test


def test_llama_cpp_names_are_those_of_the_gguf_package(
    states: dict[str, State], sources: dict[str, Path], tmp_path: Path
) -> None:
    convert(sources["t5"], tmp_path / "x.gguf", "gguf:F32", dialect="llama_cpp")
    layers = CONFIGS["t5"].num_layers  # type: ignore[attr-defined]
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, layers)
    expected = {table.get_name(name, (".weight",)): tensor for name, tensor in states["t5"].items()}
    _, values = read_gguf(tmp_path / "x.gguf")
    assert None not in expected and same_bits(values, expected)


def test_sizes_come_from_the_file_and_optional_parts_stay_optional(tmp_path: Path) -> None:
    """A pruned FLUX of the schnell kind: other depths than any model of ours, no guidance embedding."""
    state = write.random_state("flux_mmdit", FluxConfig.tiny(3, 1, guidance_embed=False))
    source = write.save(write.prefixed(state, "model.diffusion_model."), tmp_path / "x.safetensors")
    convert(source, tmp_path / "y.safetensors", "safetensors:f32", dialect="diffusers")
    assert same_bits(load_file(tmp_path / "y.safetensors"), write.flux_diffusers(state))


def test_shards_become_one_file(tmp_path: Path) -> None:
    """Of the synthetic folder, single blocks' q, k, v and MLP lie in two shards."""
    config = FluxConfig.tiny(1, 2)
    folder = tmp_path / "transformer"
    path = folder / "diffusion_pytorch_model.safetensors"
    synthetic.write_component("flux_mmdit", config, "diffusers", path, "f32", 0, shard_bytes=2_000_000)
    assert len(list(folder.glob("*.safetensors"))) > 1
    synthetic.write_component("flux_mmdit", config, "bfl", tmp_path / "bfl.safetensors", "f32", 0)
    convert(folder, tmp_path / "x.safetensors", "safetensors:f32", dialect="bfl")
    assert same_bits(load_file(tmp_path / "x.safetensors"), load_file(tmp_path / "bfl.safetensors"))


@pytest.mark.parametrize("name", ["gguf:Q4_0", "gguf:Q6_K", "safetensors:f8_e4m3"])
def test_packed_rows_move_between_dialects_as_they_are(
    name: str, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suffix = TARGETS[name].suffixes[0]
    bfl, theirs, back = (tmp_path / f"{n}{suffix}" for n in ("bfl", "diffusers", "back"))
    convert(sources["flux_mmdit"], bfl, name)
    monkeypatch.setattr(module, "quantize", None)  # nothing may be encoded again
    convert(bfl, theirs, name, dialect="diffusers")
    convert(theirs, back, name, dialect="bfl")
    with open_checkpoint(bfl) as before, open_checkpoint(theirs) as there, open_checkpoint(back) as after:
        packed = before.mapped("double_blocks.0.txt_attn.qkv.weight")
        parts = [there.mapped(f"transformer_blocks.0.attn.add_{part}_proj.weight") for part in "qkv"]
        assert torch.equal(torch.cat([p.view(torch.uint8) for p in parts]), packed.view(torch.uint8))
        assert set(before.names) == set(after.names)
        for key in before.names:
            assert before.info(key).dtype == after.info(key).dtype
            assert torch.equal(before.mapped(key).view(torch.uint8), after.mapped(key).view(torch.uint8))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_a_reshaped_source_of_the_wanted_type(kind: str, states: dict[str, State], tmp_path: Path) -> None:
    """Its blocks are copied where they end with the rows, else decoded: rows of 64 hold Q8_0 and no Q4_K."""
    state, source = states["flux_mmdit"], tmp_path / "x.gguf"
    values = as_gguf(lambda _, t: kind if t.ndim == 2 else "F32", flat=True)(state, source)
    convert(source, tmp_path / "y.gguf", f"gguf:{kind}")
    types, found = read_gguf(tmp_path / "y.gguf")
    across = {name for name, tensor in state.items() if tensor.ndim == 2 and tensor.shape[1] % 256}
    assert {name for name in types if types[name] == "F16"} == (across if kind == "Q4_K" else set())
    for name in state:
        exact = types[name] != "F16"
        assert torch.equal(found[name], values[name]) if exact else error_of(found[name], values[name]) < 1e-3


def test_parts_of_different_types_are_joined(states: dict[str, State], tmp_path: Path) -> None:
    """q in float32, k in bfloat16, v in float16: the fused tensor has the values of all."""
    theirs = write.flux_diffusers(states["flux_mmdit"])
    casts = {".to_k.": torch.bfloat16, ".to_v.": torch.float16}
    mixed = {n: t.to(next((d for part, d in casts.items() if part in n), t.dtype)) for n, t in theirs.items()}
    convert(write.save(mixed, tmp_path / "x.safetensors"), tmp_path / "y.gguf", "gguf:F32", dialect="bfl")
    _, values = read_gguf(tmp_path / "y.gguf")
    head = "transformer_blocks.0.attn.to_"
    expected = torch.cat([mixed[f"{head}{part}.weight"].float() for part in "qkv"])
    assert torch.equal(values["double_blocks.0.img_attn.qkv.weight"], expected)


# sources that are quantised --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["gguf:Q8_0", "gguf:Q4_K", "safetensors:f8_e4m3_scaled", "safetensors:f8_e5m2"]
)
def test_quantised_sources_are_decoded(name: str, sources: dict[str, Path], tmp_path: Path) -> None:
    packed = tmp_path / f"packed{TARGETS[name].suffixes[0]}"
    convert(sources["t5"], packed, name)
    _, expected = read(packed)
    done = convert(packed, tmp_path / "plain.safetensors", "safetensors:f32")
    found = load_file(tmp_path / "plain.safetensors")
    assert same_bits(found, {key: expected[key] for key in found})
    assert any(TARGETS[name].type in note for note in done.notes)


def test_a_matrix_that_lost_its_scale_is_named(sources: dict[str, Path], tmp_path: Path) -> None:
    convert(sources["flux_mmdit"], tmp_path / "x.safetensors", "safetensors:f8_e4m3_scaled")
    stored = load_file(tmp_path / "x.safetensors")
    del stored["double_blocks.0.img_attn.proj.scale_weight"]
    write.save(stored, tmp_path / "y.safetensors")
    with pytest.raises(
        WeightMapError, match=r"scale for the fp8 weight double_blocks\.0\.img_attn\.proj\.weight"
    ):
        convert(tmp_path / "y.safetensors", tmp_path / "z.safetensors", "safetensors:f32")
    assert not (tmp_path / "z.safetensors").exists()


def test_scales_bring_the_largest_value_to_the_end_of_the_range(tmp_path: Path) -> None:
    state = write.random_state("t5", CONFIGS["t5"])
    huge, zero = (f"encoder.block.{i}.layer.0.SelfAttention.q.weight" for i in (0, 1))
    state[huge] *= 1e5
    state[zero] = torch.zeros_like(state[zero])
    source = write.save(state, tmp_path / "x.safetensors")
    scaled = convert(source, tmp_path / "scaled.safetensors", "safetensors:f8_e4m3_scaled")
    stored, (_, values) = load_file(scaled.path), read_safetensors(scaled.path)
    assert stored["scaled_fp8"].dtype == torch.float8_e4m3fn and stored["scaled_fp8"].shape == (0,)
    assert stored[huge].float().abs().max() == 448 and error_of(values[huge], state[huge]) < 0.04
    assert stored[zero.removesuffix("weight") + "scale_weight"].item() == 1 and not values[zero].any()
    assert "shared.scale_weight" not in stored and stored["shared.weight"].dtype == torch.float16
    assert not scaled.notes
    for word, limit in (("f8_e4m3", 448), ("f8_e5m2", 57344)):
        plain = convert(source, tmp_path / f"{word}.safetensors", f"safetensors:{word}")
        assert load_file(plain.path)[huge].float().abs().max() == limit
        (note,) = plain.notes
        assert (
            note.startswith(f"{int((state[huge].abs() > limit).sum())} values in 1 tensors") and huge in note
        )


# metadata and components -----------------------------------------------------------------------------------


def test_metadata_is_kept(states: dict[str, State], tmp_path: Path) -> None:
    own = {"made by": "a test", "format": "pt", "ß": 'ü\n"', "_quantization_metadata": '{"layers": {}}'}
    save_file(states["t5"], tmp_path / "a.safetensors", metadata=own)
    kept = {key: text for key, text in own.items() if key != "_quantization_metadata"}
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "safetensors:f16")
    convert(tmp_path / "a.safetensors", tmp_path / "c.gguf", "gguf:F16")
    convert(tmp_path / "c.gguf", tmp_path / "d.gguf", "gguf:F32")
    convert(tmp_path / "d.gguf", tmp_path / "e.safetensors", "safetensors:f32")
    for path in (tmp_path / "b.safetensors", tmp_path / "e.safetensors"):
        with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
            assert file.metadata() == kept
    assert gguf.GGUFReader(tmp_path / "d.gguf").fields["safetensors.made by"].contents() == "a test"


@pytest.fixture
def all_in_one(states: dict[str, State], tmp_path: Path) -> Path:
    prefixes = {
        "flux_mmdit": "model.diffusion_model.",
        "autoencoder": "vae.",
        "t5": "text_encoders.t5xxl.transformer.",
    }
    state: State = {}
    for component, prefix in prefixes.items():
        state |= write.prefixed(states[component], prefix)
    return write.save(state, tmp_path / "all.safetensors")


def test_one_component_of_several(all_in_one: Path, states: dict[str, State], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"flux_mmdit .*autoencoder .*t5 .*--component|autoencoder .*t5"):
        convert(all_in_one, tmp_path / "x.safetensors", "safetensors:f32")
    done = convert(all_in_one, tmp_path / "x.safetensors", "safetensors:f32", component="autoencoder")
    assert same_bits(load_file(tmp_path / "x.safetensors"), states["autoencoder"])
    assert len(done.ignored) == len(states["flux_mmdit"]) + len(states["t5"])
    with pytest.raises(WeightMapError, match="not a CLIP"):
        convert(all_in_one, tmp_path / "y.safetensors", "safetensors:f32", component="clip")


# what is refused -------------------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(kind: type[FluxSdError], folder: Path, *args: Any, **options: Any) -> str:
    """The message of a conversion that must fail and leave the folder as it was."""
    before = files(folder)
    with pytest.raises(kind) as caught:
        convert(*args, **options)
    assert files(folder) == before
    return str(caught.value)


def test_unknown_words_list_the_known_ones(sources: dict[str, Path], tmp_path: Path) -> None:
    said = refused(RequestError, tmp_path, sources["t5"], tmp_path / "x.gguf", "gguf:Q3_X")
    assert "'gguf:Q3_X'" in said and all(name in said for name in TARGETS)
    said = refused(RequestError, tmp_path, sources["t5"], tmp_path / "x.gguf", "gguf:Q8_0", dialect="klingon")
    assert "'klingon'" in said and "hf" in said and "llama_cpp" in said


@pytest.mark.parametrize(
    ("output", "to", "says"),
    [
        ("x.gguf", "safetensors:bf16", "ends in '.gguf'"),
        ("x.safetensors", "gguf:Q8_0", "ends in '.safetensors'"),
        ("x", "gguf:Q8_0", "has no ending"),
        ("none/x.gguf", "gguf:Q8_0", "does not exist"),
        ("old.gguf", "gguf:Q8_0", "exists"),
        ("folder.gguf", "gguf:Q8_0", "is a folder"),
    ],
)
def test_outputs_that_are_refused(
    output: str, to: str, says: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "old.gguf").write_bytes(b"old")
    with pytest.raises(OutputError, match=says):
        (tmp_path / "folder.gguf").mkdir()
        convert(sources["t5"], tmp_path / output, to)
    assert (tmp_path / "old.gguf").read_bytes() == b"old"


def test_the_source_is_never_overwritten(sources: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "x.safetensors"
    source.write_bytes(sources["t5"].read_bytes())
    (tmp_path / "link.safetensors").hardlink_to(source)
    for path in (source, tmp_path / "link.safetensors", tmp_path / ".." / tmp_path.name / "x.safetensors"):
        said = refused(OutputError, tmp_path, source, path, "safetensors:f16", overwrite=True)
        assert "is the source itself" in said


def test_an_old_file_is_replaced_where_that_is_allowed(sources: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"old")
    convert(sources["t5"], tmp_path / "x.gguf", "gguf:Q8_0", overwrite=True)
    assert read_gguf(tmp_path / "x.gguf")[0]["shared.weight"] == "Q8_0" and len(files(tmp_path)) == 1


def test_the_disk_is_looked_at_first(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    monkeypatch.setattr(module, "write_file", None)  # would be the first to write
    said = refused(DiskSpaceError, tmp_path, sources["t5"], tmp_path / "x.gguf", "gguf:Q8_0")
    assert "nothing was written" in said


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupted_conversion_leaves_no_file(
    overwrite: bool, sources: dict[str, Path], tmp_path: Path
) -> None:
    cancel, seen = CancelToken(), list[tuple[int, int]]()
    if overwrite:
        (tmp_path / "x.gguf").write_bytes(b"old")

    def on_progress(done: int, total: int) -> None:
        seen.append((done, total))
        assert len(list(tmp_path.glob(".flux_sd.*.part"))) == 1  # what is being written
        if done > total / 2:
            cancel.cancel()

    refused(Cancelled, tmp_path, sources["t5"], tmp_path / "x.gguf", "gguf:Q4_0", overwrite=overwrite,
            cancel=cancel, on_progress=on_progress)  # fmt: skip
    assert 1 < len(seen) and seen[-1][0] < seen[-1][1]


def test_progress_ends_with_the_size_of_the_file(sources: dict[str, Path], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    convert(sources["t5"], tmp_path / "x.gguf", "gguf:Q4_0", on_progress=lambda *at: seen.append(at))
    size = (tmp_path / "x.gguf").stat().st_size
    assert seen[-1] == (size, size) and seen == sorted(seen)


@pytest.mark.parametrize(
    ("value", "to", "says"),
    [
        (float("nan"), "gguf:Q8_0", "holds NaN or infinity"),
        (float("inf"), "safetensors:f8_e5m2", "holds NaN or infinity"),
        (float("nan"), "safetensors:f8_e4m3_scaled", "holds NaN or infinity"),
        (1e5, "safetensors:f16", "100000"),
    ],
)
def test_values_that_a_type_does_not_hold(value: float, to: str, says: str, tmp_path: Path) -> None:
    state = write.random_state("t5", CONFIGS["t5"])
    name = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    state[name][3, 5] = value
    source = write.save(state, tmp_path / "x.safetensors")
    output = tmp_path / f"y{TARGETS[to].suffixes[0]}"
    said = refused(CheckpointError, tmp_path, source, output, to)
    assert said.startswith(name) and says in said
    convert(source, tmp_path / "y.safetensors", "safetensors:bf16")  # holds them all
    assert torch.equal(load_file(tmp_path / "y.safetensors")[name].isfinite(), state[name].isfinite())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s | {"double_blocks.0.more": torch.ones(3)}, "unexpected: double_blocks.0.more"),
        (lambda s: s | {"img_in.bias": torch.ones(256, dtype=torch.int32)}, "I32"),
        (lambda s: s | {"double_blocks.99998.img_in.weight": torch.ones(2)}, "depth is 99999"),
        (lambda s: {"a.lora_A.weight": torch.ones(2, 2)}, "a LoRA"),
        (lambda s: {"what": torch.ones(2, 2)}, "no known layout"),
    ],
)
def test_sources_that_are_refused(
    change: Callable[[State], State], says: str, states: dict[str, State], tmp_path: Path
) -> None:
    source = write.save(change(states["flux_mmdit"]), tmp_path / "x.safetensors")
    assert says in refused(WeightMapError, tmp_path, source, tmp_path / "y.gguf", "gguf:Q8_0")


def test_a_part_that_is_missing_is_named(states: dict[str, State], tmp_path: Path) -> None:
    theirs = write.flux_diffusers(states["flux_mmdit"])
    gone = "single_transformer_blocks.0.attn.to_k.weight"
    del theirs[gone]
    source = write.save(theirs, tmp_path / "x.safetensors")
    said = refused(WeightMapError, tmp_path, source, tmp_path / "y.gguf", "gguf:Q8_0")
    assert f"missing: {gone}" in said and "single_blocks.0.linear1.weight" in said


# rows read backwards ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "shape", "part_rows"),
    [
        (Row("x", "copy", ("a",)), (6, 4), None),
        (Row("x", "copy", ("a",)), (), None),
        (Row("x", "cat", ("a", "b", "c")), (6, 4), None),
        (Row("x", "cat", ("a", "b", "c"), (), "w"), (7,), 2),
        (Row("x", "swap_halves", ("a",)), (6, 4), None),
        (Row("x", "transpose", ("a",)), (6, 4), None),
        (Row("x", "squeeze_1x1", ("a",)), (6, 4), None),
        (Row("x", "unsqueeze_1x1", ("a",)), (6, 4, 1, 1), None),
        (Row("x", "conv_1x1", ("a",)), (6, 4, 1, 1), None),
    ],
)
def test_undo_is_the_reverse_of_place(row: Row, shape: tuple[int, ...], part_rows: int | None) -> None:
    parts = undo(row, shape, part_rows)
    found = {part.name: part.shape for part in parts}
    made, pieces = place(row, [found[name] for name in row.sources])
    assert made == shape
    if row.operation != "transpose":  # whose pieces count the rows of the source
        forwards = {(piece.source, piece.first, piece.rows, piece.at) for piece in pieces}
        assert forwards == {(part.name, part.at, part.rows, part.first) for part in parts}


def fused_map(*rows: Row) -> Any:
    """A map of these rows, under the name of a real one."""
    templates = tuple(Template(row.target, ((row.operation, row.sources),), row.part_rows) for row in rows)
    return replace(load_maps()[0], templates=templates, axes={"i": Axis("n")}, mirrors={}, words={})


def test_thirds_are_put_together() -> None:
    rows = [Row(name, f"third_{n}", ("in_proj",)) for n, name in enumerate(("q", "k", "v"))]
    shapes = {"v": (2, 4), "q": (2, 4), "k": (2, 4)}
    (parts,) = undo_all(fused_map(*rows), None, shapes).values()
    assert [(p.parameter, p.at, p.rows) for p in parts] == [("q", 0, 2), ("k", 2, 2), ("v", 4, 2)]
    assert {p.shape for p in parts} == {(6, 4)}


@pytest.mark.parametrize(
    ("rows", "shapes", "says"),
    [
        ((Row("q", "third_0", ("w",)),), {"q": (2, 4)}, "w of shape"),
        ((Row("q", "cat", ("a", "b")),), {"q": (3, 4)}, "equal parts"),
        ((Row("q", "cat", ("a", "b"), (), "n"),), {"q": (3, 4)}, "n, which the file lacks"),
        (
            (Row("q", "cat", ("a", "b"), (), "n"), Row("n", "copy", ("n",))),
            {"q": (3, 4), "n": (3,)},
            "parts of 3",
        ),
        ((Row("q", "swap_halves", ("a",)),), {"q": (3, 4)}, "odd"),
        ((Row("q", "copy", ("a",)), Row("k", "copy", ("a",))), {"q": (3, 4), "k": (3, 4)}, "a of shape"),
        ((Row("k", "copy", ("a",)),), {"q": (3, 4)}, "no name for our q"),
    ],
)
def test_a_dialect_that_cannot_be_written_is_named(
    rows: tuple[Row, ...], shapes: dict[str, tuple[int, ...]], says: str
) -> None:
    weight_map = fused_map(*rows)
    with pytest.raises(WeightMapError, match=says) as caught:
        undo_all(weight_map, None, shapes)
    assert weight_map.name in str(caught.value)


def test_rows_are_transposed_and_thirds_put_together_on_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two maps made for this: no map of this release has such rows."""
    thirds = [Row(name, f"third_{n}", ("in_proj",)) for n, name in enumerate(("q", "k", "v"))]
    theirs = replace(fused_map(*thirds, Row("p", "transpose", ("proj",))), dialect="theirs", ignore=())
    ours = replace(fused_map(*(Row(name, "copy", (name,)) for name in "qkvp")), dialect="ours", ignore=())
    monkeypatch.setattr(dialects, "load_maps", lambda: (theirs, ours))
    state = {"in_proj": torch.randn(6, 4), "proj": torch.randn(5, 3)}
    monkeypatch.setattr(dialects, "_chosen", lambda *_: (theirs, ""))
    options: dict[str, Any] = {"component": theirs.component}
    source, there, back = (tmp_path / f"{n}.safetensors" for n in ("source", "there", "back"))
    convert(write.save(state, source), there, "safetensors:f32", dialect="ours", **options)
    q, k, v = state["in_proj"].chunk(3)
    assert same_bits(load_file(there), {"q": q, "k": k, "v": v, "p": state["proj"].t().contiguous()})
    convert(source, tmp_path / "same.safetensors", "safetensors:f32", dialect="theirs", **options)
    assert same_bits(load_file(tmp_path / "same.safetensors"), state)
    monkeypatch.setattr(dialects, "_chosen", lambda *_: (ours, ""))
    convert(there, back, "safetensors:f32", dialect="theirs", **options)
    assert same_bits(load_file(back), state)


@pytest.mark.parametrize("name", ["gguf:Q8_0", "safetensors:f8_e4m3_scaled"])
def test_the_size_of_the_pieces_does_not_matter(
    name: str, states: dict[str, State], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suffix = TARGETS[name].suffixes[0]
    theirs = write.save(write.flux_diffusers(states["flux_mmdit"]), tmp_path / "x.safetensors")
    convert(theirs, tmp_path / f"whole{suffix}", name, dialect="bfl")
    monkeypatch.setattr(module, "CHUNK", 5000)  # 19 rows of 256
    convert(theirs, tmp_path / f"pieces{suffix}", name, dialect="bfl")
    assert (tmp_path / f"whole{suffix}").read_bytes() == (tmp_path / f"pieces{suffix}").read_bytes()


# memory ----------------------------------------------------------------------------------------------------

MEASURE = """
import json, sys
import torch
from flux_sd.convert import convert
def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
before = peak()
for source, output, dialect in zip(sys.argv[1:], sys.argv[2:], ("bfl", "diffusers")):
    convert(source, output, "gguf:Q8_0", dialect=dialect)
print(json.dumps({"more": peak() - before}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """0.16 GB of bfloat16 encoded, then its blocks copied: only a piece may be in memory at a time."""
    config = replace(FluxConfig.schnell(), hidden_size=1024, num_heads=8, depth=1, depth_single_blocks=2)
    source = tmp_path / "x.safetensors"
    size = synthetic.write_component("flux_mmdit", config, "bfl", source, "bf16", None)
    assert size > 150e6
    command = [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "x.gguf"), str(tmp_path / "y.gguf")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert json.loads(done.stdout)["more"] < 100e6


# the command -----------------------------------------------------------------------------------------------


def test_the_command_says_what_it_did(
    all_in_one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "t5.gguf")
    words = [
        "convert",
        str(all_in_one),
        output,
        "--to",
        "gguf:q8_0",
        "--component",
        "t5",
        "--dialect",
        "llama_cpp",
    ]
    assert cli.main(words) == 0
    said = capsys.readouterr()
    assert "t5.hf as t5.llama_cpp, 21 tensors (" in said.out and "Q8_0" in said.out
    assert "another component" in said.err
    assert cli.main(words) == 2 and "exists" in capsys.readouterr().err
    assert cli.main([*words, "--force", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["map"] == "t5.llama_cpp" and report["bytes_out"] == Path(output).stat().st_size
    assert cli.main([*words[:4], "gguf:Q9"]) == 2
    assert "gguf:Q8_0" in capsys.readouterr().err


def test_a_role_is_a_component(all_in_one: Path, tmp_path: Path) -> None:
    for role, component in (("transformer", "flux_mmdit"), ("vae", "autoencoder")):
        words = [
            "convert",
            str(all_in_one),
            str(tmp_path / f"{role}.safetensors"),
            "--to",
            "safetensors:bf16",
        ]
        assert cli.main([*words, "--component", role, "--quiet"]) == 0
        with open_checkpoint(tmp_path / f"{role}.safetensors") as checkpoint:
            assert len(checkpoint) == len(write.build(component, CONFIGS[component]).state_dict())


def test_a_conversion_is_the_same_each_time(sources: dict[str, Path], tmp_path: Path) -> None:
    done: list[Conversion] = [
        convert(sources["flux_mmdit"], tmp_path / f"{n}.gguf", "gguf:Q6_K") for n in "ab"
    ]
    assert done[0].path.read_bytes() == done[1].path.read_bytes()


def test_the_quantised_transformer_of_tiny_flux_is_what_the_readme_says(tmp_path: Path) -> None:
    folder = ROOT / "flux_sd" / "models" / "tiny_flux"
    readme = (folder / "README.md").read_text("utf-8")
    (command,) = [line.split() for line in readme.splitlines() if line.strip().startswith("flux-sd convert")]
    source, output, *rest = command[2:]
    assert cli.main(["convert", str(folder / source), str(tmp_path / output), *rest, "--quiet"]) == 0
    assert (tmp_path / output).read_bytes() == (folder / output).read_bytes()

"""What adapters do to weights, where their changes go, and what is refused."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import helpers_checkpoints as write
import helpers_lora as lora
import pytest
import sd_names
import torch
from helpers_checkpoints import State
from helpers_lora import CLIP, FLUX, HIDDEN, PARTS, RANK, UNET, flat, kohya, merged, pairs, peft, save
from safetensors.torch import load_file
from torch import Tensor

from flux_sd.errors import AdapterError, MissingFileError
from flux_sd.lora.adapter_file import AdapterFile
from flux_sd.lora.adapters import Adapters, Lora
from flux_sd.lora.deltas import Full, Hadamard, Kronecker, LowRank
from flux_sd.lora.edits import Edit, merge, widen
from flux_sd.lora.names import Target, names_of
from flux_sd.lora.plan import Table
from flux_sd.lora.side_branch import AdaptedLinear

FLUX_STATE, UNET_STATE = PARTS["transformer"].state, PARTS["unet"].state


def unet_name(path: str) -> str:
    return f"lora_unet_{flat(path)}"


def one(path: str, role: str = "transformer", size: float = 0.1) -> lora.Pairs:
    """A change of one layer, or of one convolution's kernels written as rows."""
    weight = PARTS[role].state[f"{path}.weight"]
    return pairs({path: (weight.shape[0], weight[0].numel())}, size=size)


def close(got: State, wanted: State, tolerance: float = 1e-6) -> None:
    for name, tensor in wanted.items():
        assert (got[name] - tensor).abs().max() <= tolerance, name


# where changes go -------------------------------------------------------------------------------------------


def test_the_modulation_of_the_last_layer_has_its_halves_exchanged_in_the_rows_alone(tmp_path: Path) -> None:
    path = "final_layer.adaLN_modulation.1"
    up, down = one(path)[path]
    theirs = torch.cat([up[HIDDEN:], up[:HIDDEN]])  # diffusers: scale, shift
    file = save(
        peft({"norm_out.linear": (theirs, down)}, lambda p: f"transformer.{p}"), tmp_path / "a.safetensors"
    )
    close(merged(file, "transformer"), lora.applied(FLUX_STATE, {path: (up, down)}))


def test_a_part_of_a_fused_layer_leaves_the_rest_alone(tmp_path: Path) -> None:
    up, down = torch.randn(FLUX.mlp_size, RANK), torch.randn(RANK, HIDDEN)
    name = "single_transformer_blocks.1.proj_mlp"
    file = save(peft({name: (up, down)}, lambda p: f"transformer.{p}"), tmp_path / "a.safetensors")
    got, before = (
        merged(file, "transformer")["single_blocks.1.linear1.weight"],
        FLUX_STATE["single_blocks.1.linear1.weight"],
    )
    assert torch.equal(got[: 3 * HIDDEN], before[: 3 * HIDDEN])
    assert (got[3 * HIDDEN :] - before[3 * HIDDEN :] - up @ down).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("prefix", "role", "roles", "path"),
    [
        ("lora_te_", "clip", ("clip", "unet"), "text_model.encoder.layers.1.mlp.fc1"),
        ("lora_te1_", "clip", ("clip", "clip_2", "unet"), "text_model.encoder.layers.0.self_attn.q_proj"),
        ("lora_te2_", "clip_2", ("clip_2", "clip", "unet"), "text_model.encoder.layers.0.self_attn.q_proj"),
        ("lora_te1_", "clip", ("clip", "t5", "transformer"), "text_model.encoder.layers.0.mlp.fc2"),
        ("lora_te2_", "t5", ("t5", "clip", "transformer"), "encoder.block.0.layer.0.SelfAttention.q"),
        ("lora_te3_", "t5", ("t5", "clip", "transformer"), "encoder.block.0.layer.1.DenseReluDense.wi_0"),
    ],
)
def test_text_encoders_by_kohyas_prefixes(
    prefix: str, role: str, roles: tuple[str, ...], path: str, tmp_path: Path
) -> None:
    changes = one(path, role)
    file = save(kohya(changes, lambda p: prefix + flat(p)), tmp_path / "a.safetensors")
    close(merged(file, *roles), lora.applied(PARTS[role].state, changes))


@pytest.mark.parametrize(
    ("prefix", "role", "roles", "path"),
    [
        ("text_encoder.", "clip", ("clip", "clip_2", "unet"), "text_model.encoder.layers.0.self_attn.q_proj"),
        ("text_encoder_2.", "clip_2", ("clip_2", "clip"), "text_model.encoder.layers.0.self_attn.q_proj"),
        ("text_encoder_2.", "t5", ("t5", "clip"), "encoder.block.0.layer.0.SelfAttention.o"),
        (
            "text_encoders.clip_l.transformer.",
            "clip",
            ("clip", "clip_2"),
            "text_model.encoder.layers.1.mlp.fc1",
        ),
        (
            "text_encoders.clip_g.transformer.",
            "clip_2",
            ("clip_2", "clip"),
            "text_model.encoder.layers.1.mlp.fc1",
        ),
        ("text_encoders.t5xxl.transformer.", "t5", ("t5", "clip"), "encoder.block.0.layer.0.SelfAttention.v"),
    ],
)
def test_text_encoders_by_dotted_prefixes(
    prefix: str, role: str, roles: tuple[str, ...], path: str, tmp_path: Path
) -> None:
    changes = one(path, role)
    file = save(peft(changes, lambda p: prefix + p), tmp_path / "a.safetensors")
    close(merged(file, *roles), lora.applied(PARTS[role].state, changes))


def test_openclips_fused_projection_is_spread_over_three(tmp_path: Path) -> None:
    width = PARTS["clip_2"].state["text_model.final_layer_norm.weight"].shape[0]
    up, down = torch.randn(3 * width, RANK) * 0.1, torch.randn(RANK, width)
    name = "lora_te2_transformer_resblocks_1_attn_in_proj"
    file = save(kohya({"x": (up, down)}, lambda _: name), tmp_path / "a.safetensors")
    head = "text_model.encoder.layers.1.self_attn"
    changes = {
        f"{head}.{letter}_proj": (rows, down) for letter, rows in zip("qkv", up.split(width), strict=True)
    }
    close(merged(file, "clip_2", "clip"), lora.applied(PARTS["clip_2"].state, changes))


def test_sdxl_by_the_names_of_its_first_release(tmp_path: Path) -> None:
    state = write.random_state("unet", write.UNET_XL)
    paths = [name.removesuffix(".weight") for name in state if name.endswith(".weight")]
    layers = {path: tuple(state[f"{path}.weight"].flatten(1).shape) for path in paths if ".to_q" in path}
    changes = pairs(layers)
    names = {
        path: flat(sd_names.unet_ldm(f"{path}.weight", state.keys()).removesuffix(".weight"))
        for path in layers
    }
    assert any("input_blocks_4_1" in name for name in names.values())
    module = write.build("unet", write.UNET_XL)
    table = Table({"unet": names_of(Target.of("unet", write.UNET_XL, module))})
    file = save(kohya(changes, lambda path: f"lora_unet_{names[path]}"), tmp_path / "a.safetensors")
    module.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    Adapters.open([Lora(file)], table, "small").apply("unet", module, lambda done, total: None)
    close(module.state_dict(), lora.applied(state, changes), 1e-5)


def test_every_layer_of_the_released_flux_resolves_by_its_name_with_underscores() -> None:
    from flux_sd.flux_mmdit import FluxConfig

    config = FluxConfig.dev()
    names = names_of(Target.of("flux_mmdit", config, write.build("flux_mmdit", config)))
    linears = [
        name
        for name, module in write.build("flux_mmdit", config).named_modules()
        if hasattr(module, "in_features")
    ]
    assert len(linears) == 314
    for path in linears:
        layer = names.find(flat(path), flat=True)
        assert layer is not None and {p.parameter for s in layer.weight for p in s.parts} == {
            f"{path}.weight"
        }
    third = names.find("transformer_blocks_0_attn_to_k", flat=True)
    assert third is not None
    (part,) = third.weight[0].parts
    assert (part.parameter, part.first, part.rows) == ("double_blocks.0.img_attn.qkv.weight", 3072, 3072)


# algorithms -------------------------------------------------------------------------------------------------


CONV = "down_blocks.0.resnets.0.conv1"
RESNET = ("down_blocks.1.resnets.0.time_emb_proj", "mid_block.resnets.0.conv2", CONV,
          "down_blocks.0.downsamplers.0.conv", "up_blocks.0.upsamplers.0.conv",
          "up_blocks.0.resnets.1.conv_shortcut")  # fmt: skip


@pytest.mark.parametrize("names", ["diffusers", "ldm"])
def test_locon_changes_convolutions(names: str, tmp_path: Path) -> None:
    tensors: State = {}
    wanted = dict(UNET_STATE)
    generator = torch.Generator().manual_seed(0)
    for path in RESNET:
        weight = UNET_STATE[f"{path}.weight"]
        up = torch.randn(weight.shape[0], RANK, *[1] * (weight.ndim - 2), generator=generator)
        down = torch.randn(RANK, *weight.shape[1:], generator=generator)
        head = unet_name(path) if names == "diffusers" else f"lora_unet_{flat(lora.ldm(path))}"
        tensors |= {f"{head}.lora_up.weight": up, f"{head}.lora_down.weight": down}
        wanted[f"{path}.weight"] = weight + torch.einsum("or,r...->o...", up.flatten(1), down)
    close(merged(save(tensors, tmp_path / "a.safetensors"), "unet"), wanted, 1e-5)


def test_a_core_between_up_and_down(tmp_path: Path) -> None:
    up, mid, down = torch.randn(32, RANK, 1, 1), torch.randn(RANK, RANK, 3, 3), torch.randn(RANK, 32, 1, 1)
    tensors = {f"{unet_name(CONV)}.lora_{n}.weight": t for n, t in (("up", up), ("mid", mid), ("down", down))}
    tensors[f"{unet_name(CONV)}.alpha"] = torch.tensor(2.0)
    change = torch.zeros(32, 32, 3, 3)
    for p in range(RANK):
        for q in range(RANK):
            change += up[:, p].view(32, 1, 1, 1) * mid[p, q] * down[q].view(1, 32, 1, 1)
    wanted = {f"{CONV}.weight": UNET_STATE[f"{CONV}.weight"] + change * 2.0 / RANK}
    close(merged(save(tensors, tmp_path / "a.safetensors"), "unet"), wanted, 1e-4)


def test_lokr_of_a_convolution_whole_and_factored(tmp_path: Path) -> None:
    w1, w2 = torch.randn(4, 8), torch.randn(8, 4, 3, 3)
    a, b = torch.randn(8, RANK), torch.randn(RANK, 36)
    other = "mid_block.resnets.0.conv2"
    tensors = {
        f"{unet_name(CONV)}.lokr_w1": w1, f"{unet_name(CONV)}.lokr_w2": w2,
        f"{unet_name(CONV)}.alpha": torch.tensor(7.0),  # means nothing where no side is a product
        f"{unet_name(other)}.lokr_w1": w1, f"{unet_name(other)}.lokr_w2_a": a,
        f"{unet_name(other)}.lokr_w2_b": b, f"{unet_name(other)}.alpha": torch.tensor(2.0),
    }  # fmt: skip
    got = merged(save(tensors, tmp_path / "a.safetensors"), "unet")
    for path, second, scale in ((CONV, w2, 1.0), (other, (a @ b).view(8, 4, 3, 3), 2.0 / RANK)):
        change = torch.zeros(32, 32, 3, 3)
        for i in range(4):
            for j in range(8):
                change[i * 8 : i * 8 + 8, j * 4 : j * 4 + 4] = w1[i, j] * second
        close(got, {f"{path}.weight": UNET_STATE[f"{path}.weight"] + change * scale}, 1e-4)


def test_loha_of_a_convolution_with_cores(tmp_path: Path) -> None:
    sizes = {"w1_a": (RANK, 32), "w1_b": (RANK, 32), "w2_a": (RANK, 32), "w2_b": (RANK, 32)}
    given = {kind: torch.randn(*shape) for kind, shape in sizes.items()}
    given |= {"t1": torch.randn(RANK, RANK, 3, 3), "t2": torch.randn(RANK, RANK, 3, 3)}
    tensors = {f"{unet_name(CONV)}.hada_{kind}": tensor for kind, tensor in given.items()}
    sides = []
    for i in ("1", "2"):
        side = torch.zeros(32, 32, 3, 3)
        for p in range(RANK):
            for q in range(RANK):
                side += (
                    given[f"w{i}_a"][p].view(32, 1, 1, 1)
                    * given[f"w{i}_b"][q].view(1, 32, 1, 1)
                    * given[f"t{i}"][p, q]
                )
        sides.append(side)
    wanted = {f"{CONV}.weight": UNET_STATE[f"{CONV}.weight"] + sides[0] * sides[1]}
    close(merged(save(tensors, tmp_path / "a.safetensors"), "unet"), wanted, 1e-3)


@pytest.mark.parametrize("shape", ["row", "input"])
def test_dora_by_its_definition_in_both_directions(shape: str, tmp_path: Path) -> None:
    path = "double_blocks.0.img_attn.proj"
    changes = one(path)
    (up, down), weight = changes[path], FLUX_STATE[f"{path}.weight"]
    axis = 1 if shape == "row" else 0
    magnitudes = torch.rand(HIDDEN) + 0.5
    scale = magnitudes[:, None] if shape == "row" else magnitudes[None]
    tensors = kohya(changes, unet_name) | {f"{unet_name(path)}.dora_scale": scale}
    moved = weight + up @ down
    wanted = scale * moved / moved.norm(dim=axis, keepdim=True)
    file = save(tensors, tmp_path / "a.safetensors")
    close(merged(file, "transformer"), {f"{path}.weight": wanted})
    half = merged([Lora(file, 0.5)], "transformer")[f"{path}.weight"]
    assert (half - (weight + wanted) / 2).abs().max() <= 1e-6


def test_differences_of_norms_and_biases_and_replaced_values(tmp_path: Path) -> None:
    norm, bias = torch.randn(32), torch.randn(32)
    head = "diffusion_model.double_blocks.0.img_attn.proj"
    tensors = {
        "lora_unet_conv_norm_out.w_norm": norm, "lora_unet_conv_norm_out.b_norm": bias,
    }  # fmt: skip
    got = merged(save(tensors, tmp_path / "a.safetensors"), "unet")
    close(got, {"conv_norm_out.weight": UNET_STATE["conv_norm_out.weight"] + norm,
                "conv_norm_out.bias": UNET_STATE["conv_norm_out.bias"] + bias})  # fmt: skip
    values, more = torch.randn(HIDDEN, HIDDEN), torch.randn(HIDDEN)
    tensors = {f"{head}.set_weight": values, "diffusion_model.img_in.diff_b": more}
    got = merged(save(tensors, tmp_path / "b.safetensors"), "transformer")
    assert torch.equal(got["double_blocks.0.img_attn.proj.weight"], values)
    close(got, {"img_in.bias": FLUX_STATE["img_in.bias"] + more})


def control() -> tuple[State, State]:
    """(a control LoRA of a few layers, what the weights become at the strength 0.5)"""
    tensors: State = {}
    wanted = dict(FLUX_STATE)
    for path in ("img_in", "double_blocks.0.txt_attn.qkv", "single_blocks.0.linear2", "final_layer.linear"):
        weight = FLUX_STATE[f"{path}.weight"]
        columns = 128 if path == "img_in" else weight.shape[1]
        up, down, bias = (
            torch.randn(weight.shape[0], RANK),
            torch.randn(RANK, columns),
            torch.randn(weight.shape[0]),
        )
        tensors |= {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up, f"{path}.lora_B.bias": bias}
        wide = torch.zeros(weight.shape[0], columns)
        wide[:, : weight.shape[1]] = weight
        wanted[f"{path}.weight"] = wide + 0.5 * up @ down
        wanted[f"{path}.bias"] = FLUX_STATE[f"{path}.bias"] + 0.5 * bias
    for name in ("single_blocks.0.norm.key_norm.scale", "double_blocks.0.img_attn.norm.query_norm.scale"):
        tensors[name] = wanted[name] = torch.rand(FLUX.head_dim)
    return tensors, wanted


def test_a_control_lora_widens_the_first_layer_and_replaces_norms(tmp_path: Path) -> None:
    tensors, wanted = control()
    file = save(tensors, tmp_path / "control.safetensors")
    close(merged([Lora(file, 0.5)], "transformer"), wanted, 1e-5)
    (applied,) = Adapters.open([Lora(file)], lora.table("transformer"), "small").applied
    with applied.plan.file as opened:
        assert opened.is_control and applied.strength == 0.85  # what Black Forest Labs use


def test_a_norm_beside_other_changes_makes_no_control_lora(tmp_path: Path) -> None:
    path, norm = "double_blocks.0.img_attn.proj", "double_blocks.0.img_attn.norm.query_norm.scale"
    changes, values = one(path), torch.rand(FLUX.head_dim)
    file = save({**peft(changes, str), norm: values}, tmp_path / "a.safetensors")
    close(merged(file, "transformer"), {**lora.applied(FLUX_STATE, changes), norm: values})
    adapters = Adapters.open([Lora(file)], lora.table("transformer"), "small")
    adapters.close()
    assert adapters.applied[0].strength == 1 and not adapters.applied[0].plan.file.is_control


@pytest.mark.parametrize("columns", [96, 384])
def test_a_first_layer_of_any_other_width_does_not_fit(columns: int, tmp_path: Path) -> None:
    changes = pairs({"x_embedder": (HIDDEN, columns)})
    file = save(peft(changes, lambda p: f"transformer.{p}"), tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match=f"the change is 128x{columns}, the layer 128x64"):
        merged(file, "transformer")


def test_widening_decodes_stored_rows_and_adds_nothing() -> None:
    module = lora.filled("transformer")
    before = module.get_submodule("img_in")(torch.ones(1, 64))
    widen(module, "img_in", 128)
    after = module.get_submodule("img_in")(torch.cat([torch.ones(1, 64), torch.full((1, 64), 9.0)], 1))
    assert torch.allclose(after, before, atol=1e-6)
    widen(module, "img_in", 100)  # it is wide enough
    assert module.get_parameter("img_in.weight").shape == (HIDDEN, 128)


# scales -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "scale"), [(8.0, 2.0), (0.0, 1.0), (None, 1.0)])
def test_alpha_over_rank_and_one_where_it_is_missing_or_0(
    alpha: float | None, scale: float, tmp_path: Path
) -> None:
    path = "double_blocks.0.img_attn.proj"
    up, down = one(path)[path]
    tensors = {f"{unet_name(path)}.lora_up.weight": up, f"{unet_name(path)}.lora_down.weight": down}
    if alpha is not None:
        tensors[f"{unet_name(path)}.alpha"] = torch.tensor(alpha, dtype=torch.bfloat16)
    got = merged(save(tensors, tmp_path / "a.safetensors"), "transformer")
    close(got, lora.applied(FLUX_STATE, {path: (up * scale, down)}))


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"lora_alpha": 8}, 2.0),
        ({"lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"lora_alpha": 8, "alpha_pattern": {"attn.to_out.0": 2}}, 0.5),
        ({"lora_alpha": 8, "alpha_pattern": {"^transformer_blocks.0.attn.to_out.0$": 2}}, 0.5),
        ({"lora_alpha": 8, "alpha_pattern": {"out.0": 2}}, 2.0),  # no whole part of the path
        ({"r": 64, "lora_alpha": 4, "rank_pattern": {"x": 2}}, 1.0),  # the rank is that of the tensors
        ({}, 1.0),
    ],
)
@pytest.mark.parametrize("where", ["header", "folder"])
def test_pefts_alpha(where: str, config: dict[str, object], scale: float, tmp_path: Path) -> None:
    path = "double_blocks.0.img_attn.proj"
    up, down = one(path)[path]
    if where == "header":
        tensors = peft({"transformer_blocks.0.attn.to_out.0": (up, down)}, lambda p: f"transformer.{p}")
        header = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in config.items()})}
        file = save(tensors, tmp_path / "a.safetensors", header)
    else:
        tensors = peft({"transformer_blocks.0.attn.to_out.0": (up, down)}, lambda p: f"base_model.model.{p}")
        file = save(tensors, tmp_path / "adapter_model.safetensors").parent
        (file / "adapter_config.json").write_text(json.dumps(config))
    close(merged(file, "transformer"), lora.applied(FLUX_STATE, {path: (up * scale, down)}))


@pytest.mark.parametrize("named", ["base_model.model.{}", "transformer.base_model.model.{}", "{}"])
def test_pefts_alpha_is_found_whatever_the_file_is_called(named: str, tmp_path: Path) -> None:
    path = "double_blocks.0.img_attn.proj"
    up, down = one(path)[path]
    ending = ".weight" if "model" in named else ".default.weight"
    tensors = peft({path: (up, down)}, named.format, ending=ending)
    file = save(tensors, tmp_path / "style.safetensors")
    told = "style.safetensors: alpha is neither in it nor in an adapter_config.json beside it"
    adapters = Adapters.open([Lora(file)], lora.table("transformer"), "small")
    adapters.close()
    assert adapters.notes()[1].startswith(told)
    close(merged(file, "transformer"), lora.applied(FLUX_STATE, {path: (up, down)}))
    (tmp_path / "adapter_config.json").write_text("{}")
    with AdapterFile.open(file) as opened:
        assert opened.notes[0].startswith(told)
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 8}')
    with AdapterFile.open(file) as opened:
        assert not opened.notes
    close(merged(file, "transformer"), lora.applied(FLUX_STATE, {path: (up * 2, down)}))


def test_a_configuration_beside_files_of_other_savers_is_not_theirs(tmp_path: Path) -> None:
    changes = one("double_blocks.0.img_attn.proj")
    file = save(peft(changes, lambda p: f"diffusion_model.{p}"), tmp_path / "a.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 8}')
    with AdapterFile.open(file) as opened:
        assert not opened.notes
    close(merged(file, "transformer"), lora.applied(FLUX_STATE, changes))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ('{"alpha_pattern": {"attn.*": 2}}', "only plain names are read"),
        ('{"alpha_pattern": [1]}', "alpha_pattern is no table"),
        ('{"lora_alpha": "many"}', "a number was expected"),
        ('{"lora_alpha": NaN}', "a number was expected"),
        ("[1]", "is no JSON table"),
        ("{", "is no valid JSON"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_refused(config: str, told: str, tmp_path: Path) -> None:
    tensors = peft(one("double_blocks.0.img_attn.proj"), lambda p: f"base_model.model.{p}")
    save(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(AdapterError, match=told):
        merged(tmp_path, "transformer")


# strengths and order ----------------------------------------------------------------------------------------


def two(tmp_path: Path) -> tuple[Path, Path]:
    files = []
    for seed in (1, 2):
        changes = pairs({"double_blocks.0.img_attn.proj": (HIDDEN, HIDDEN)}, seed)
        files.append(save(kohya(changes, unet_name), tmp_path / f"{seed}.safetensors"))
    return files[0], files[1]


def test_two_adapters_in_either_order_agree_to_rounding_and_are_rounded_once(tmp_path: Path) -> None:
    first, second = two(tmp_path)
    there = merged([Lora(first, 0.7), Lora(second, -0.4)], "transformer")
    back = merged([Lora(second, -0.4), Lora(first, 0.7)], "transformer")
    close(there, back, 1e-6)
    path = "double_blocks.0.img_attn.proj"
    changes = [pairs({path: (HIDDEN, HIDDEN)}, seed)[path] for seed in (1, 2)]
    wanted = (
        FLUX_STATE[f"{path}.weight"]
        + 0.7 * changes[0][0] @ changes[0][1]
        - 0.4 * changes[1][0] @ changes[1][1]
    )
    close(there, {f"{path}.weight": wanted})
    half = {name: tensor.bfloat16() for name, tensor in FLUX_STATE.items()}
    rounded = merged([Lora(first, 0.7), Lora(second, -0.4)], "transformer", base=half)
    whole = merged(
        [Lora(first, 0.7), Lora(second, -0.4)], "transformer", base={n: t.float() for n, t in half.items()}
    )
    assert torch.equal(rounded[f"{path}.weight"], whole[f"{path}.weight"].bfloat16())


def test_dora_acts_in_the_order_given(tmp_path: Path) -> None:
    first, second = two(tmp_path)
    path = "double_blocks.0.img_attn.proj"
    tensors = load_file(first) | {f"{unet_name(path)}.dora_scale": torch.ones(HIDDEN, 1)}
    dora = save(tensors, tmp_path / "dora.safetensors")
    last = merged([Lora(second), Lora(dora)], "transformer")[f"{path}.weight"]
    before = merged([Lora(dora), Lora(second)], "transformer")[f"{path}.weight"]
    assert (last.norm(dim=1) - 1).abs().max() < 1e-5 and (before.norm(dim=1) - 1).abs().max() > 1e-2


def test_strength_0_changes_no_bit_of_any_kind(tmp_path: Path) -> None:
    tensors, _ = control()
    del tensors["img_in.lora_A.weight"], tensors["img_in.lora_B.weight"], tensors["img_in.lora_B.bias"]
    file = save(tensors, tmp_path / "a.safetensors")
    got = merged([Lora(file, 0.0)], "transformer")
    assert got.keys() == FLUX_STATE.keys() and all(torch.equal(got[n], FLUX_STATE[n]) for n in got)


@pytest.mark.parametrize("strength", [math.nan, math.inf, 101.0, -101.0])
def test_a_strength_that_means_nothing_is_refused(strength: float, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="the strength"):
        merged([Lora(two(tmp_path)[0], strength)], "transformer")


# what does not fit ------------------------------------------------------------------------------------------


def test_one_key_that_is_renamed_is_named_and_nothing_is_applied(tmp_path: Path) -> None:
    tensors = kohya(lora.flux_pairs(), unet_name)
    old = unet_name("double_blocks.0.img_attn.qkv")
    tensors = {name.replace(old, old.replace("qkv", "qvk")): tensor for name, tensor in tensors.items()}
    file = save(tensors, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError) as caught:
        merged(file, "transformer")
    told = str(caught.value)
    assert "7 of 8 changes fit" in told and "names of kohya behind 'lora_unet_' (1)" in told
    assert "lora_unet_double_blocks_0_img_attn_qvk: the transformer has no layer of this name" in told
    assert "--lora-partial" in told and len(caught.value.problems) == 1
    got = merged(file, "transformer", partial=True)
    changes = lora.flux_pairs()
    del changes["double_blocks.0.img_attn.qkv"]
    close(got, lora.applied(FLUX_STATE, changes))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("double_blocks_0_img_attn_proj", "transformer_blocks.0.attn.to_out.0"),
        ("double_blocks_0_img_attn_qkv", "transformer_blocks.0.attn.to_k"),  # a third of it
    ],
)
def test_one_layer_under_two_names_is_refused(first: str, second: str, tmp_path: Path) -> None:
    shapes = {f"lora_unet_{first}": (HIDDEN * (3 if "qkv" in first else 1), HIDDEN)}
    tensors = kohya(pairs(shapes), str) | peft(pairs({second: (HIDDEN, HIDDEN)}), str)
    file = save(tensors, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="1 of 2 changes fit") as caught:
        merged(file, "transformer")
    (problem,) = caught.value.problems
    assert {f"lora_unet_{first}", second} <= set(re.split(r"[: ]", problem))


def test_parts_of_one_fused_layer_are_no_repetition(tmp_path: Path) -> None:
    shapes = {f"transformer_blocks.0.attn.to_{part}": (HIDDEN, HIDDEN) for part in "qkv"}
    file = save(peft(pairs(shapes), str), tmp_path / "a.safetensors")
    with AdapterFile.open(file) as opened:
        assert len(lora.table("transformer").plan(opened).placed) == 3


def test_nothing_applied_stops_even_where_a_part_would_do(tmp_path: Path) -> None:
    changes = kohya(lora.unet_pairs(), unet_name)
    file = save(changes, tmp_path / "a.safetensors")
    for partial in (False, True):
        with pytest.raises(AdapterError, match=r"0 of \d+ changes fit.*Nothing was applied"):
            merged(file, "transformer", partial=partial)


def test_misfits_are_listed_by_dialect_with_what_each_is_for(tmp_path: Path) -> None:
    good = kohya(one("double_blocks.0.img_attn.proj"), unet_name)
    bad = kohya({f"x{i}": (torch.ones(2, 1), torch.ones(1, 2)) for i in range(7)}, unet_name)
    bad |= peft({"y": (torch.ones(2, 1), torch.ones(1, 2))}, lambda p: f"transformer.{p}")
    bad |= kohya({"z": (torch.ones(2, 1), torch.ones(1, 2))}, lambda p: f"lora_te3_{p}")
    with pytest.raises(AdapterError) as caught:
        merged(save(good | bad, tmp_path / "a.safetensors"), "transformer")
    lines = str(caught.value).splitlines()
    assert "1 of 10 changes fit" in lines[0]
    assert "  names of kohya behind 'lora_unet_' (7):" in lines and "    ... and 2 more" in lines
    assert "  names of PEFT behind 'transformer.' (1):" in lines
    assert "    lora_te3_z: this model has no t5" in lines and len(caught.value.problems) == 9


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda up, down: (up[:-1], down), "the change is 127x128, the layer 128x128"),
        (lambda up, down: (up, down[:, :-1]), "the change is 128x127, the layer 128x128"),
        (lambda up, down: (up[:, :-1], down), "its tensors do not go together"),
        (lambda up, down: (up, down[0]), "its tensors do not go together"),
        (lambda up, down: (up[0, 0], down), "its tensors do not go together"),
        (lambda up, down: (up.int(), down.int()), "its tensors are integers"),
        (lambda up, down: (up, None), r"its tensors \(up\) make no change"),
    ],
)
def test_a_change_of_a_wrong_shape_is_told(change: object, told: str, tmp_path: Path) -> None:
    path = "double_blocks.0.img_attn.proj"
    up, down = one(path)[path]
    up, down = change(up, down)  # type: ignore[operator]
    head = unet_name(path)
    tensors = {
        f"{head}.lora_up.weight": up,
        f"{head}.lora_down.weight": down,
        f"{head}.alpha": torch.tensor(1.0),
    }
    file = save(
        {name: tensor for name, tensor in tensors.items() if tensor is not None}, tmp_path / "a.safetensors"
    )
    with pytest.raises(AdapterError, match=told):
        merged(file, "transformer")


@pytest.mark.parametrize(
    ("name", "shape", "told"),
    [
        ("oft_unet_x.oft_blocks", (2, 4, 4), "OFT or BOFT"),
        ("base_model.model.x.oft_R.weight", (2, 4), "OFT"),
        ("lora_unet_x.a1.weight", (4, 4), "GLoRA"),
        ("base_model.model.x.ia3_l", (4, 1), "IA3"),
        ("lora_unet_x.on_input", (), "IA3"),
        ("base_model.model.x.vera_lambda_b", (4,), "VeRA"),
        ("clip_l", (4, 768), "textual inversion"),
        ("emb_params", (4, 768), "textual inversion"),
        ("<my-cat>", (1, 768), "textual inversion"),
    ],
)
def test_kinds_that_are_not_built_are_named(
    name: str, shape: tuple[int, ...], told: str, tmp_path: Path
) -> None:
    file = save({name: torch.ones(shape)}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match=rf"{told}.*not built; built are LoRA, LoHa, LoKr"):
        AdapterFile.open(file)


def test_other_files_are_named_too(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"is a FLUX.1 transformer, no adapter"):
        AdapterFile.open(save(FLUX_STATE, tmp_path / "model.safetensors"))
    with pytest.raises(AdapterError, match="is no adapter of a known kind"):
        AdapterFile.open(save({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / "odd.safetensors"))
    with pytest.raises(MissingFileError):
        AdapterFile.open(tmp_path / "nothing.safetensors")


def test_damage_is_told(tmp_path: Path) -> None:
    path = "double_blocks.0.img_attn.proj"
    good = kohya(one(path), unet_name)
    head = unet_name(path)
    with pytest.raises(AdapterError, match=r"lora_up.weight holds NaN or infinity"):
        bad = good | {f"{head}.lora_up.weight": torch.full((HIDDEN, RANK), math.nan)}
        merged(save(bad, tmp_path / "nan.safetensors"), "transformer")
    with pytest.raises(AdapterError, match=r"alpha has the shape \[2\]"):
        merged(save(good | {f"{head}.alpha": torch.ones(2)}, tmp_path / "two.safetensors"), "transformer")
    with pytest.raises(AdapterError, match="alpha is inf"):
        merged(
            save(good | {f"{head}.alpha": torch.tensor(math.inf)}, tmp_path / "inf.safetensors"),
            "transformer",
        )
    twice = good | {f"{head}.lora_A.weight": torch.ones(RANK, HIDDEN)}
    with pytest.raises(AdapterError, match="are the same part of"):
        merged(save(twice, tmp_path / "twice.safetensors"), "transformer")


# parts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "delta",
    [
        LowRank(torch.randn(12, 3), torch.randn(3, 20)),
        Hadamard(torch.randn(12, 3), torch.randn(3, 20), torch.randn(12, 3), torch.randn(3, 20)),
        Kronecker(torch.randn(3, 4), torch.randn(4, 5)),
        Full(torch.randn(12, 20)),
    ],
)
def test_every_kind_of_change_multiplies_cuts_and_scales_as_its_matrix(delta: object) -> None:
    assert isinstance(delta, LowRank | Hadamard | Kronecker | Full)
    matrix, x = delta.matrix(), torch.randn(2, 7, 20)
    assert delta.shape == matrix.shape == (12, 20)
    close_tensors(delta.times(x), x @ matrix.t())
    for first, rows in ((0, 12), (4, 4), (3, 7)):
        close_tensors(delta.part(first, rows).matrix(), matrix[first : first + rows])
    factor = torch.rand(12, 1)
    close_tensors(delta.scaled(factor).matrix(), factor * matrix)
    close_tensors(delta.scaled(0.5).matrix(), 0.5 * matrix)
    close_tensors(delta.transposed().matrix(), matrix.t())
    assert delta.to(torch.device("cpu"), torch.bfloat16).matrix().dtype == torch.bfloat16
    assert delta.nbytes == sum(tensor.nbytes for tensor in vars(delta).values())


def close_tensors(got: Tensor, wanted: Tensor) -> None:
    assert got.shape == wanted.shape and (got - wanted).abs().max() < 1e-5


def test_merging_needs_no_whole_change_beside_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row blocks give what one product gives, whatever their size."""
    from flux_sd.lora import deltas

    delta, weight = LowRank(torch.randn(50, 3), torch.randn(3, 40)), torch.randn(50, 40)
    wanted = weight + delta.matrix()
    monkeypatch.setattr(deltas, "BLOCK_BYTES", 4 * 40 * 7)
    assert len(list(deltas.blocks((50, 40)))) == 8
    merge(weight, [Edit(0, delta, 1.0)])
    close_tensors(weight, wanted)


def test_names_with_underscores_are_looked_up_whole() -> None:
    table = lora.table("unet", "clip")
    names = table.names["unet"]
    assert names.find("down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0", flat=True) is not None
    assert names.find("down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out", flat=True) is None
    assert names.find("down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0", flat=False) is None
    assert UNET.depths == (1, 0, 0, 0) and CLIP.num_hidden_layers == 2


def random_edits(*kinds: str) -> list[Edit]:
    """Changes of a layer of 48 x 64, of some rows each."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    made = {
        "lora": lambda: Edit(16, LowRank(random(32, 3), random(3, 64)), 0.7),
        "dora": lambda: Edit(8, LowRank(random(24, 3), random(3, 64)), 0.5, magnitudes=random(24).abs() + 1),
        "dora of inputs": lambda: Edit(
            0, LowRank(random(48, 3), random(3, 64)), 0.5, magnitudes=random(64).abs() + 1, axis=1
        ),
        "values": lambda: Edit(40, Full(random(8, 64)), 1.0, replaces=True),
    }
    return [made[kind]() for kind in kinds]


@pytest.mark.parametrize(
    "kinds",
    [
        ("lora",),
        ("dora",),
        ("dora of inputs",),
        ("values",),
        ("lora", "dora", "lora", "dora"),
        ("dora", "values", "dora of inputs", "dora", "lora"),
    ],
)
@pytest.mark.parametrize("block", [64 * 4 * 5, 2**25])
def test_changes_beside_stored_rows_are_those_of_the_weight(
    kinds: tuple[str, ...], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flux_sd.gguf_quantize import quantize
    from flux_sd.lora import deltas
    from flux_sd.quantized import PackedRows, QuantizedLinear

    monkeypatch.setattr(deltas, "BLOCK_BYTES", block)
    weights = [torch.randn(20, 64), torch.randn(28, 64)]  # of two tensors of the file
    parts = [PackedRows(quantize(w, "Q8_0"), "Q8_0", None, (len(w), 64)) for w in weights]
    bias, x = torch.randn(48), torch.randn(3, 5, 64)
    layer = AdaptedLinear(QuantizedLinear(parts, bias.clone(), torch.float32), random_edits(*kinds))
    values = torch.cat([part.decode(torch.float32) for part in parts])
    for edit in random_edits(*kinds):
        edit.apply(values)
    assert (layer.effective(0, 48) - values).abs().max() < 1e-4
    assert (layer.effective(13, 30) - values[13:43]).abs().max() < 1e-4
    assert (layer(x) - torch.nn.functional.linear(x, values, bias)).abs().max() < 1e-3

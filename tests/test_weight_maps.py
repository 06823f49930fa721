"""weights_maps/: values of every dialect, full-size coverage, and what the reader refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import helpers_checkpoints as write
import pytest
import torch

from flux_sd.autoencoder import AutoEncoderConfig
from flux_sd.checkpoint import Checkpoint, open_checkpoint
from flux_sd.clip import ClipTextConfig
from flux_sd.errors import Cancelled, WeightMapError
from flux_sd.flux_mmdit import FluxConfig
from flux_sd.load_plan import LoadPlan, PlannedParameter, _make, compare, fill, keep_stored, place, plan_load
from flux_sd.t5 import T5Config
from flux_sd.tensor_info import DTYPES, Header, TensorInfo
from flux_sd.unet import UNetConfig
from flux_sd.weight_map import Row, Template, WeightMap, find_map, identify, load_maps, maps_folder, read_map

State = write.State
MAPS = {weight_map.name: weight_map for weight_map in load_maps()}
EMBED = "encoder.embed_tokens.weight"
LEGACY = ("query", "key", "value", "proj_attn")
TODAY = ("to_q", "to_k", "to_v", "to_out.0")

# case -> component, how it is written from our names, and the map that must be found
DIALECTS: dict[str, tuple[str, Callable[[State], State], str]] = {
    "bfl": ("flux_mmdit", dict, "flux_mmdit.bfl"),
    "bfl weight for scale": ("flux_mmdit", write.flux_scale_called_weight, "flux_mmdit.bfl"),
    "flux diffusers": ("flux_mmdit", write.flux_diffusers, "flux_mmdit.diffusers"),
    "ldm": ("autoencoder", dict, "autoencoder.ldm"),
    "ldm squeezed": ("autoencoder", write.vae_squeezed, "autoencoder.ldm"),
    "vae diffusers": ("autoencoder", lambda s: write.vae_diffusers(s, TODAY), "autoencoder.diffusers"),
    "vae legacy": ("autoencoder", lambda s: write.vae_diffusers(s, LEGACY), "autoencoder.diffusers_legacy"),
    "clip": ("clip", dict, "clip.hf"),
    "clip bare": ("clip", write.clip_bare, "clip.hf_bare"),
    "t5": ("t5", dict, "t5.hf"),
    "t5 embed_tokens": ("t5", lambda s: write.t5_embedding(s, EMBED), "t5.hf"),
    "t5 llama.cpp": ("t5", write.t5_llama_cpp, "t5.llama_cpp"),
    "t5 both": ("t5", lambda s: write.t5_embedding(s, "shared.weight", EMBED), "t5.hf"),
    "openclip": ("clip", write.open_clip, "clip.openclip"),
    "unet": ("unet", dict, "unet.diffusers"),
    "unet ldm": ("unet", write.unet_ldm, "unet.ldm_sd"),
    "unet ldm xl": ("unet", write.unet_ldm, "unet.ldm_xl"),
}
# where a dialect is of a model of its own
CONFIGS: dict[str, object] = {
    "clip.openclip": ClipTextConfig.tiny("gelu", projection_dim=64),
    "unet.diffusers": write.UNET_XL,
    "unet.ldm_sd": write.UNET_SD,
    "unet.ldm_xl": write.UNET_XL,
}
REAL = {
    ("flux_mmdit", 780): FluxConfig.dev(),
    ("flux_mmdit", 776): FluxConfig.schnell(),
    ("autoencoder", 244): AutoEncoderConfig.flux(),
    ("autoencoder", 248): AutoEncoderConfig.sd(),
    ("clip", 196): ClipTextConfig.clip_l(),
    ("t5", 219): T5Config.v1_1_xxl(),
}
FULL_SIZE: dict[str, tuple[object, ...]] = {
    "clip.openclip": (ClipTextConfig.open_clip_bigg(),),
    "unet.diffusers": (UNetConfig.sd15(), UNetConfig.sdxl()),
    "unet.ldm_sd": (UNetConfig.sd15(), UNetConfig.sd21()),
    "unet.ldm_xl": (UNetConfig.sdxl(),),
}
SOURCES = {("flux_mmdit.diffusers", 780): 1160, ("flux_mmdit.diffusers", 776): 1156}  # elsewhere one to one


def config_of(map_name: str) -> object:
    """The tiny config whose weights are written in a map's dialect."""
    return CONFIGS.get(map_name) or write.CONFIGS[map_name.partition(".")[0]]


def load(component: str, path: Path, config: object | None = None, **options: object) -> State:
    """The parameters of a tiny model loaded from `path`."""
    module = write.build(component, config)
    with open_checkpoint(path) as checkpoint:
        plan = plan_load(component, module, config or write.CONFIGS[component], checkpoint)
        fill(module, plan, **options)  # type: ignore[arg-type]
    return dict(module.state_dict())


def assert_equal(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    wrong = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not wrong


def refusal(component: str, path: Path, config: object | None = None) -> WeightMapError:
    """The error of a load, after checking that nothing was loaded."""
    module = write.build(component, config)
    with open_checkpoint(path) as checkpoint, pytest.raises(WeightMapError) as caught:
        fill(module, plan_load(component, module, config or write.CONFIGS[component], checkpoint))
    assert all(tensor.is_meta for tensor in module.state_dict().values())
    return caught.value


def headers_only(names_shapes: dict[str, tuple[int, ...]], dtype: str = "BF16") -> Checkpoint:
    """A checkpoint of which only the header exists: enough for a plan."""
    infos = []
    for name, shape in names_shapes.items():
        nbytes = torch.Size(shape).numel() * DTYPES[dtype].itemsize
        infos.append(TensorInfo(name, shape, dtype, nbytes, Path("header-only"), 0))
    return Checkpoint([Path("header-only")], [Header(tuple(infos))])


# values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", DIALECTS)
def test_values_survive_every_dialect(case: str, tmp_path: Path) -> None:
    component, written, expected_map = DIALECTS[case]
    config = config_of(expected_map)
    state = write.random_state(component, config)
    path = write.save(written(state), tmp_path / "model.safetensors")
    with open_checkpoint(path) as checkpoint:
        assert find_map(component, checkpoint.names)[0].name == expected_map
    assert_equal(load(component, path, config), state)


@pytest.mark.parametrize("name", MAPS)
def test_values_behind_every_prefix(name: str, tmp_path: Path) -> None:
    weight_map = MAPS[name]
    component, written, _ = next(case for case in DIALECTS.values() if case[2] == name)
    config = config_of(name)
    state = write.random_state(component, config)
    for prefix in weight_map.prefixes:
        path = write.save(write.prefixed(written(state), prefix), tmp_path / "model.safetensors")
        assert_equal(load(component, path, config), state)


def test_autoencoder_with_quant_convolutions(tmp_path: Path) -> None:
    config = replace(write.CONFIGS["autoencoder"], use_quant_conv=True)  # type: ignore[type-var]
    state = write.random_state("autoencoder", config)
    for written in (state, write.vae_diffusers(state, TODAY), write.vae_squeezed(state)):
        path = write.save(written, tmp_path / "model.safetensors")
        assert_equal(load("autoencoder", path, config), state)


def test_every_operation_on_values(tmp_path: Path) -> None:
    """All of them, those that no map of this release uses included, against torch's own functions."""
    a, b, conv = torch.randn(6, 4), torch.randn(3, 4), torch.randn(6, 4, 1, 1)
    path = write.save({"a": a, "b": b, "conv": conv}, tmp_path / "t.safetensors")
    expected = {
        ("copy", ("a",)): a,
        ("cat", ("a", "b")): torch.cat([a, b]),
        ("third_0", ("a",)): a[0:2],
        ("third_1", ("a",)): a[2:4],
        ("third_2", ("a",)): a[4:6],
        ("swap_halves", ("a",)): torch.cat([a[3:], a[:3]]),
        ("transpose", ("a",)): a.t(),
        ("squeeze_1x1", ("conv",)): conv[:, :, 0, 0],
        ("squeeze_1x1", ("a",)): a,
        ("unsqueeze_1x1", ("a",)): a[:, :, None, None],
        ("unsqueeze_1x1", ("conv",)): conv,
    }
    with open_checkpoint(path) as checkpoint:
        for (operation, sources), value in expected.items():
            row = Row("x", operation, sources)
            shape, pieces = place(row, [checkpoint.info(source).shape for source in sources])
            parameter = PlannedParameter(row, shape, pieces)
            plan = LoadPlan(MAPS["t5.hf"], "", checkpoint, (parameter,), {})
            made = _make(parameter, plan, torch.float32, torch.device("cpu"))
            assert torch.equal(made, value) and made.is_contiguous(), operation


@pytest.mark.parametrize(
    ("operation", "shapes"),
    [
        ("cat", [(2, 3), (2, 4)]),
        ("third_1", [(4, 3)]),
        ("swap_halves", [(3,)]),
        ("transpose", [(3,)]),
        ("squeeze_1x1", [(3, 3, 3, 3)]),
        ("unsqueeze_1x1", [(3,)]),
    ],
)
def test_operations_refuse_shapes_that_do_not_fit(operation: str, shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=r"rows|odd|matrix"):
        place(Row("x", operation, ("a", "b")[: len(shapes)]), shapes)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("flux_mmdit.diffusers", "swap_halves(norm_out.linear.{p})", "norm_out.linear.{p}"),
        (
            "flux_mmdit.diffusers",
            "cat(transformer_blocks.{i}.attn.to_q.{p}, transformer_blocks.{i}.attn.to_k.{p}",
            "cat(transformer_blocks.{i}.attn.to_k.{p}, transformer_blocks.{i}.attn.to_q.{p}",
        ),
        ("flux_mmdit.diffusers", "add_k_proj.{p}, transformer_blocks.{i}.attn.add_v_proj.{p}",
         "add_v_proj.{p}, transformer_blocks.{i}.attn.add_k_proj.{p}"),
        ("flux_mmdit.diffusers", "to_k.{p}, single_transformer_blocks.{j}.attn.to_v.{p}",
         "to_v.{p}, single_transformer_blocks.{j}.attn.to_k.{p}"),
        ("autoencoder.diffusers", "attentions.0.to_q.weight)", "attentions.0.to_k.weight)"),
    ],
)  # fmt: skip
def test_the_value_tests_see_what_shapes_cannot(name: str, old: str, new: str, tmp_path: Path) -> None:
    """A forgotten swap and exchanged sources pass every name and shape check; the values must differ."""
    text = (maps_folder() / f"{name}.toml").read_text()
    assert old in text
    changed = text.replace(old, new)
    if "autoencoder" in name:  # a true exchange: k takes q's place too
        row = 'attn_1.k.weight" = "unsqueeze_1x1({side}.mid_block.attentions.0.to_'
        changed = changed.replace(row + "k", row + "q")
    (tmp_path / f"{name}.toml").write_text(changed)
    mutated = read_map(tmp_path / f"{name}.toml")
    component, written, _ = next(case for case in DIALECTS.values() if case[2] == name)
    state = write.random_state(component)
    module = write.build(component)
    with open_checkpoint(write.save(written(state), tmp_path / "m.safetensors")) as checkpoint:
        plan, problems = compare(mutated, "", module, write.CONFIGS[component], checkpoint)
        assert not problems
        fill(module, plan)
    assert any(not torch.equal(module.state_dict()[key], state[key]) for key in state)


def test_a_fused_tensor_may_need_two_shards(tmp_path: Path) -> None:
    """The released index puts proj_mlp of single block 24 in one shard and its q, k, v in another."""
    state = write.random_state("flux_mmdit")
    theirs = write.flux_diffusers(state)
    second = {name for name in theirs if ".attn.to_k." in name or ".proj_mlp." in name}
    shards = {
        f"m-0000{i}-of-00002.safetensors": {n: t for n, t in theirs.items() if (n in second) == (i == 2)}
        for i in (1, 2)
    }
    for file, part in shards.items():
        write.save(part, tmp_path / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(index))
    assert_equal(load("flux_mmdit", tmp_path), state)
    assert_equal(load("flux_mmdit", tmp_path / "m.safetensors.index.json"), state)


def test_one_file_with_several_components(tmp_path: Path) -> None:
    states = {component: write.random_state(component) for component in write.CONFIGS}
    prefixes = {
        "flux_mmdit": "model.diffusion_model.",
        "autoencoder": "vae.",
        "clip": "text_encoders.clip_l.transformer.",
        "t5": "text_encoders.t5xxl.transformer.",
    }
    merged: State = {"text_encoders.clip_l.logit_scale": torch.ones(())}
    for component, state in states.items():
        merged |= write.prefixed(state, prefixes[component])
    path = write.save(merged, tmp_path / "all.safetensors")
    for component, state in states.items():
        assert_equal(load(component, path), state)
    write.save(merged | {"unknown.weight": torch.ones(2)}, path)
    assert refusal("t5", path).problems == ("unexpected: unknown.weight",)


@pytest.mark.parametrize(
    ("stored", "options", "expected"),
    [
        (torch.bfloat16, {}, torch.float32),
        (torch.bfloat16, {"dtype": None}, torch.bfloat16),
        (torch.float16, {"dtype": torch.bfloat16}, torch.bfloat16),
        (torch.float8_e4m3fn, {}, torch.float32),
    ],
)
def test_dtypes(
    stored: torch.dtype, options: dict[str, object], expected: torch.dtype, tmp_path: Path
) -> None:
    state = {name: tensor.to(stored) for name, tensor in write.random_state("t5").items()}
    found = load("t5", write.save(state, tmp_path / "m.safetensors"), **options)
    assert {tensor.dtype for tensor in found.values()} == {expected}
    assert_equal(found, {name: tensor.to(expected) for name, tensor in state.items()})


def test_some_parameters_keep_their_stored_type(tmp_path: Path) -> None:
    theirs = write.flux_diffusers(write.random_state("flux_mmdit"))
    state = {name: tensor.bfloat16() for name, tensor in theirs.items()}
    path = write.save(state, tmp_path / "m.safetensors")
    module = write.build("flux_mmdit")
    with open_checkpoint(path) as checkpoint:
        plan = plan_load("flux_mmdit", module, write.CONFIGS["flux_mmdit"], checkpoint)
        keep_stored(module, plan, torch.float32, everything=True)
        fill(module, plan)
        found = module.state_dict()
    stored = {n for n in found if ".weight.data_" in n}
    assert len([n for n in stored if ".img_attn.qkv." in n]) == 3  # one for each of q, k and v
    assert {found[n].dtype for n in stored} == {torch.bfloat16}
    assert {t.dtype for n, t in found.items() if n not in stored} == {torch.float32}


def test_parameters_are_ready_for_inference(tmp_path: Path) -> None:
    module = write.build("t5")
    with open_checkpoint(write.save(write.random_state("t5"), tmp_path / "m.safetensors")) as checkpoint:
        fill(module, plan_load("t5", module, write.CONFIGS["t5"], checkpoint))
    for parameter in module.parameters():
        assert parameter.is_contiguous() and not parameter.requires_grad and not parameter.is_meta


# full size, from headers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("component", "count"), REAL)
def test_every_map_covers_the_real_configs(component: str, count: int) -> None:
    config = REAL[component, count]
    names = write.build(component, config).state_dict().keys()
    assert len(names) == count
    for weight_map in MAPS.values():
        if weight_map.component == component and weight_map.name not in FULL_SIZE:
            rows = weight_map.expand(config, names)
            sources = [source for row in rows.values() for source in row.sources]
            assert len(rows) == count
            assert len(sources) == len(set(sources)) == SOURCES.get((weight_map.name, count), count)


def test_every_row_makes_something_of_its_own() -> None:
    """Each row makes parameters of a known config that no other row makes: deleting any is noticed."""
    for weight_map in MAPS.values():
        same = [config for (component, _), config in REAL.items() if component == weight_map.component]
        configs: list[object] = list(FULL_SIZE.get(weight_map.name, same))
        if weight_map.component == "clip":
            configs.append(ClipTextConfig.tiny(projection_dim=8))
        made: dict[str, set[str]] = {template.target: set() for template in weight_map.templates}
        for config in configs:
            names = write.build(weight_map.component, config).state_dict().keys()
            parts = [replace(weight_map, templates=(t,)).expand(config, names) for t in weight_map.templates]
            assert sum(map(len, parts)) == len(set().union(*parts)) == len(names)
            for template, rows in zip(weight_map.templates, parts, strict=True):
                made[template.target] |= rows.keys()
        assert all(made.values()), [target for target, names in made.items() if not names]


@pytest.mark.parametrize("name", MAPS)
def test_a_deleted_doubled_or_renamed_row_fails_the_check(name: str) -> None:
    weight_map = MAPS[name]
    component, written, _ = next(case for case in DIALECTS.values() if case[2] == name)
    config = config_of(name)
    module = write.build(component, config)
    names = module.state_dict().keys()
    state = written(write.random_state(component, config))
    checkpoint = headers_only({key: tuple(tensor.shape) for key, tensor in state.items()})
    assert not compare(weight_map, "", module, config, checkpoint)[1]
    for template in weight_map.templates:
        if not replace(weight_map, templates=(template,)).expand(config, names):
            continue  # for a layer that the tiny config lacks
        others = tuple(other for other in weight_map.templates if other is not template)
        lost = tuple((operation, tuple("x." + s for s in sources)) for operation, sources in template.ways)
        for rows, kind in (
            (others, "no row"),
            ((*others, replace(template, target="x." + template.target)), "no row"),
            ((*others, replace(template, ways=lost)), "missing"),
        ):
            _, problems = compare(replace(weight_map, templates=rows), "", module, config, checkpoint)
            assert any(problem.text.startswith(kind) for problem in problems), template.target
        with pytest.raises(WeightMapError, match="twice"):
            replace(weight_map, templates=(*weight_map.templates, template)).expand(config, names)


def test_released_shard_indexes_are_covered(hub_dir: Path) -> None:
    """Every FLUX index under FLUX_SD_HUB_DIR: all of its names are used, all of our parameters made."""
    checked = 0
    for index in sorted(hub_dir.glob("black-forest-labs/*/*/*.index.json")):
        names = json.loads(index.read_text())["weight_map"].keys()
        schnell = "schnell" in index.parent.parent.name
        if index.parent.name == "transformer":
            component, config = "flux_mmdit", FluxConfig.schnell() if schnell else FluxConfig.dev()
        else:
            component, config = "t5", T5Config.v1_1_xxl()
        weight_map, prefix = find_map(component, names, str(index))
        parameters = write.build(component, config).state_dict().keys()
        rows = weight_map.expand(config, parameters, names)
        assert rows.keys() == parameters and prefix == ""
        assert {source for row in rows.values() for source in row.sources} == set(names)
        checked += 1
    assert checked == 4


# what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", DIALECTS)
def test_one_tensor_missing_extra_or_misshapen_is_named(case: str) -> None:
    component, written, map_name = DIALECTS[case]
    config = config_of(map_name)
    state = written(write.random_state(component, config))
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    module = write.build(component, config)

    def problems(changed: dict[str, tuple[int, ...]]) -> tuple[str, ...]:
        with pytest.raises(WeightMapError) as caught:
            plan_load(component, module, config, headers_only(changed))
        assert all(name in str(caught.value) for name in changed.keys() ^ shapes.keys())
        return caught.value.problems

    for name, shape in list(shapes.items())[:: len(shapes) // 6]:
        if case == "t5 both" and name.startswith(("shared", "encoder.embed_tokens")):
            continue  # either of the two is enough
        lost = {key: value for key, value in shapes.items() if key != name}
        assert len(problems(lost)) == 1
        assert problems(shapes | {name + ".surplus": shape}) == (f"unexpected: {name}.surplus",)
        assert len(problems(lost | {name + "x": shape})) == 2
        wrong = (*shape[:-1], shape[-1] + 1)
        (problem,) = problems(shapes | {name: wrong})
        assert name in problem and str(list(wrong)) in problem


@pytest.mark.parametrize("given", write.CONFIGS)
@pytest.mark.parametrize("wanted", write.CONFIGS)
def test_a_file_of_another_component_is_called_by_its_name(given: str, wanted: str, tmp_path: Path) -> None:
    if given == wanted:
        return
    words = {"flux_mmdit": "a FLUX.1", "autoencoder": "an autoencoder", "clip": "a CLIP", "t5": "a T5"}
    error = refusal(wanted, write.save(write.random_state(given), tmp_path / "model.safetensors"))
    assert f"is {words[given]}" in str(error) and f"not {words[wanted]}" in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"], "LoRA"),
        (
            ["model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"],
            "a Stable Diffusion UNet, not",
        ),
        (["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"], "a Stable Diffusion UNet, not"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "a UNet that is no"),
        (
            ["conv_in.weight", "time_embedding.linear_1.weight", "down_blocks.0.resnets.0.conv1.weight"],
            "a UNet that is no",
        ),
        (["double_blocks.0.img_attn.qkv.weight", "double_stream_modulation_img.lin.weight"], "FLUX.2"),
        (["double_blocks.0.img_attn.qkv.weight", "distilled_guidance_layer.in_proj.bias"], "Chroma"),
        (["joint_blocks.0.context_block.attn.qkv.weight"], "Stable Diffusion 3"),
        (["transformer_blocks.0.attn.add_q_proj.weight", "pos_embed.proj.weight"], "Stable Diffusion 3"),
        (["redux_up.weight"], "Redux"),
        (["enc.blk.0.attn_q.weight"], "a T5 encoder"),
        (["nothing.known"], "no known layout"),
    ],
)
def test_relatives_and_strangers_are_named(names: list[str], what: str) -> None:
    with pytest.raises(WeightMapError, match=what):
        find_map("flux_mmdit", names, "x.safetensors")


def test_two_layouts_in_one_file_are_ambiguous() -> None:
    names = [prefix + "encoder.down.0.block.0.conv1.weight" for prefix in ("vae.", "first_stage_model.")]
    with pytest.raises(WeightMapError, match=r"first_stage_model.*vae"):
        find_map("autoencoder", names, "x.safetensors")
    assert len(identify(names)) == 2


@pytest.mark.parametrize("written", [dict, write.flux_diffusers], ids=["bfl", "diffusers"])
def test_wrong_depth_is_said_plainly(written: Callable[[State], State], tmp_path: Path) -> None:
    big = FluxConfig.tiny(3, 2)
    path = write.save(written(write.random_state("flux_mmdit", big)), tmp_path / "m.safetensors")
    error = refusal("flux_mmdit", path, FluxConfig.tiny(2, 3))
    assert "the file has 3 double blocks, the model 2" in str(error)
    assert "the file has 2 single blocks, the model 3" in str(error)
    assert str(error).count("\n") < 15
    with open_checkpoint(path) as checkpoint:
        weight_map, _ = find_map("flux_mmdit", checkpoint.names)
        assert weight_map.counts(checkpoint.names) == {"depth": 3, "depth_single_blocks": 2}


def test_depth_of_the_other_components(tmp_path: Path) -> None:
    shallow = AutoEncoderConfig(32, 3, 32, 3, (1, 2), 1, 4, 0.5, 0.1)
    for component, wrong, words in (
        ("t5", replace(T5Config.tiny(), num_layers=2), "the file has 3 layers, the model 2"),
        ("clip", replace(ClipTextConfig.tiny(), num_hidden_layers=4), "the file has 3 layers, the model 4"),
        ("autoencoder", shallow, "the file has 3 levels, the model 2"),
    ):
        path = write.save(write.random_state(component), tmp_path / "m.safetensors")
        assert words in str(refusal(component, path, wrong))


@pytest.mark.parametrize("written", [dict, write.flux_diffusers], ids=["bfl", "diffusers"])
def test_dev_into_schnell_and_back(written: Callable[[State], State], tmp_path: Path) -> None:
    dev, schnell = FluxConfig.tiny(1, 1, True), FluxConfig.tiny(1, 1, False)
    path = write.save(written(write.random_state("flux_mmdit", dev)), tmp_path / "m.safetensors")
    error = refusal("flux_mmdit", path, schnell)
    assert "dev family" in str(error) and len(error.problems) == 4
    path = write.save(written(write.random_state("flux_mmdit", schnell)), tmp_path / "m.safetensors")
    error = refusal("flux_mmdit", path, dev)
    assert "no guidance embedding" in str(error) and len(error.problems) == 4


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    state = write.random_state("t5")
    state["shared.weight"] = state["shared.weight"].to(torch.int32)
    assert "I32" in str(refusal("t5", write.save(state, tmp_path / "m.safetensors")))


def test_a_tensor_used_twice_or_in_part_is_refused() -> None:
    weight_map = MAPS["t5.hf"]
    shapes = {name: tuple(tensor.shape) for name, tensor in write.random_state("t5").items()}

    def problems(templates: tuple[Template, ...], shapes: dict[str, tuple[int, ...]]) -> list[str]:
        changed, module = replace(weight_map, templates=templates), write.build("t5")
        found = compare(changed, "", module, write.CONFIGS["t5"], headers_only(shapes))[1]
        return [problem.text for problem in found]

    q = "encoder.block.{i}.layer.0.SelfAttention.q.weight"
    rest = tuple(t for t in weight_map.templates if "qkvo" not in t.target)
    head = q.removesuffix("q.weight")
    twice = [Template(f"{head}{x}.weight", (("copy", (q,)),)) for x in "qkvo"]
    assert any(text.startswith("used twice") for text in problems((*rest, *twice), shapes))
    wide = {
        name: (3 * shape[0], *shape[1:]) if ".SelfAttention.o." in name else shape
        for name, shape in shapes.items()
    }
    thirds = [
        Template(t.target, (("third_0", t.ways[0][1]),)) if "qkvo" in t.target else t
        for t in weight_map.templates
    ]
    assert any("used in part" in text for text in problems(tuple(thirds), wide))


def test_a_cancelled_load_leaves_the_module_on_meta(tmp_path: Path) -> None:
    module = write.build("t5")
    seen: list[tuple[int, int]] = []

    def on_tensor(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 5:
            raise Cancelled

    with open_checkpoint(write.save(write.random_state("t5"), tmp_path / "m.safetensors")) as checkpoint:
        plan = plan_load("t5", module, write.CONFIGS["t5"], checkpoint)
        with pytest.raises(Cancelled):
            fill(module, plan, on_tensor=on_tensor)
        assert all(tensor.is_meta for tensor in module.state_dict().values())
        assert seen == [(i, len(plan.parameters)) for i in range(6)]
        fill(module, plan)  # and a second try succeeds
    assert not any(tensor.is_meta for tensor in module.state_dict().values())


# map files -------------------------------------------------------------------------------------------------

GOOD = """
component = "t5"
dialect = "x"
about = "a test"
probe = ["a"]
prefixes = [""]
ignore = []
[axes]
i = { count = "num_layers", label = "layers" }
[rows]
"ours.{i}" = "theirs.{i}"
"""


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"theirs.{i}"', '"theirs.{k}"', "slot"),
        ('"ours.{i}"', '"ours.{k}"', "slot"),
        ('"theirs.{i}"', '"rotate(theirs.{i})"', "no operation"),
        ('"theirs.{i}"', '"transpose(a, b)"', "one tensor"),
        ('probe = ["a"]', "", "probe"),
        ('dialect = "x"', 'dialect = "y"', "t5.y"),
        ('"ours.{i}" =', '"ours.{i}" = "a"\n"ours.{i}" =', "cannot be read"),
        ("[axes]", 'same = ["ours.{i}"]\n[axes]', "two rows"),
    ],
)
def test_a_bad_map_file_is_refused(old: str, new: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "t5.x.toml"
    path.write_text(GOOD)
    assert isinstance(read_map(path), WeightMap)
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(WeightMapError, match=says):
        read_map(path)

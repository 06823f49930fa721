"""float8.py: every fp8 code, every layout with scales, and the low-bit layouts that are refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import helpers_checkpoints as write
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flux_sd.checkpoint import Checkpoint, open_checkpoint
from flux_sd.errors import CheckpointError, WeightMapError
from flux_sd.float8 import FOREIGN, decode_float8
from flux_sd.load_plan import fill, plan_load
from flux_sd.tensor_info import DTYPES, FLOAT8

State = dict[str, Tensor]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


class NoFloat8(TorchFunctionMode):
    """A device without fp8: its tensors can be asked about, cut, and seen as bytes; all else fails."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        if name not in ("view", "__getitem__", "__get__", "numel", "dim") and any(
            isinstance(arg, Tensor) and arg.dtype in (E4M3, E5M2) for arg in args
        ):
            raise NotImplementedError(f"{name} on fp8")
        return func(*args, **(kwargs or {}))


def config(layer_format: str, **more: object) -> Tensor:
    """What ComfyUI writes as X.comfy_quant: the bytes of a JSON table."""
    return torch.tensor(list(json.dumps({"format": layer_format, **more}).encode()), dtype=torch.uint8)


def opened(tmp_path: Path, state: State, metadata: Mapping[str, str] | None = None) -> Checkpoint:
    save_file(state, tmp_path / "x.safetensors", metadata=dict(metadata or {}))
    return open_checkpoint(tmp_path / "x.safetensors")


# decoding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", FLOAT8)
def test_all_codes(word: str) -> None:
    """Bit for bit what torch's cast gives, NaN, infinity, both zeros and subnormals included."""
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)
    stored = codes.view(DTYPES[word])
    expected = stored.to(torch.float32)
    for given in (codes, stored):
        with NoFloat8():
            found = decode_float8(given, word)
        assert found.dtype == torch.float32 and found.shape == (16, 16)
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num().view(torch.int32), expected.nan_to_num().view(torch.int32))
    assert int(expected.isnan().sum()) == (2 if word == "F8_E4M3" else 6)
    assert decode_float8(codes[0, 0], word).shape == () and decode_float8(codes[:0], word).shape == (0, 16)
    assert torch.equal(codes.flatten(), torch.arange(256, dtype=torch.uint8))  # the input is not touched


def test_the_mock_of_a_device_without_fp8_fails_where_one_would() -> None:
    for cast in (lambda t: t.float(), lambda t: t.to(torch.bfloat16), lambda t: t + 1, torch.clone):
        with NoFloat8(), pytest.raises(NotImplementedError):
            cast(FP8)


def test_one_nan_among_many() -> None:
    codes = torch.zeros(1000, dtype=torch.uint8)
    codes[77], codes[78] = 0x7F, 0xFF
    found = decode_float8(codes, "F8_E4M3")
    assert found.isnan().nonzero().flatten().tolist() == [77, 78]


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_plain_fp8(dtype: torch.dtype, tmp_path: Path) -> None:
    """Matrices, biases and norms alike, without any scale."""
    state = {"a.weight": torch.randn(4, 6).to(dtype), "a.bias": torch.randn(6).to(dtype), "n": torch.ones(3)}
    with opened(tmp_path, state) as checkpoint:
        assert not checkpoint.absorbed and checkpoint.scale("a.weight") is None
        for name in ("a.weight", "a.bias"):
            with NoFloat8():
                found = checkpoint.read(name)
            assert checkpoint.info(name).packed and found.dtype == torch.float32
            assert torch.equal(found, state[name].float())
            kept = torch.empty_like(state[name])
            checkpoint.copy_into(name, kept)
            assert torch.equal(kept.view(torch.uint8), state[name].view(torch.uint8))


# layouts ---------------------------------------------------------------------------------------------------

FP8 = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(E4M3)
ONE = torch.tensor(0.03)
ROWS = torch.tensor([1.0, 2.0, 0.5, 0.1])
IN = torch.tensor(7.0)
TABLE = {"_quantization_metadata": json.dumps({"layers": {"p.a": {"format": "float8_e4m3fn"}}})}

# what stands in the file beside p.a.weight, what metadata it has, and by what the weight is multiplied
LAYOUTS: dict[str, tuple[State, dict[str, str], Tensor]] = {
    "scaled, 2024": (
        {"scaled_fp8": torch.empty(0), "p.a.scale_weight": ONE, "p.a.scale_input": IN}, {}, ONE),
    "scaled, 2024, behind a prefix": (
        {"p.scaled_fp8": torch.empty(2).to(E4M3), "p.a.scale_weight": ONE.view(1)}, {}, ONE),
    "scaled, 2024, a layer without scale": ({"scaled_fp8": torch.empty(0)}, {}, torch.ones(())),
    "comfy_quant": (
        {"p.a.comfy_quant": config("float8_e4m3fn", full_precision_matrix_mult=True), "p.a.weight_scale": ONE,
         "p.a.input_scale": IN}, {}, ONE),
    "comfy_quant in the metadata": ({"p.a.weight_scale": ONE}, TABLE, ONE),
    "weight_scale alone": ({"p.a.weight_scale": ONE.bfloat16()}, {}, ONE.bfloat16().float()),
    "one scale a row": ({"p.a.weight_scale": ROWS}, TABLE, ROWS[:, None]),
    "one scale a row, as a column": ({"p.a.weight_scale": ROWS[:, None].clone()}, {}, ROWS[:, None]),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scaled_layouts(layout: str, tmp_path: Path) -> None:
    more, metadata, scale = LAYOUTS[layout]
    with opened(tmp_path, {"p.a.weight": FP8, "p.b.bias": torch.ones(2)} | more, metadata) as checkpoint:
        assert set(checkpoint.names) == {"p.a.weight", "p.b.bias"}
        assert checkpoint.absorbed.keys() == more.keys() and all(checkpoint.absorbed.values())
        assert "p.a.weight" in checkpoint.absorbed.get("p.a.scale_weight", "p.a.weight")
        with NoFloat8():
            found = checkpoint.read("p.a.weight")
        assert torch.equal(found, FP8.float() * scale)
        stored = checkpoint.mapped("p.a.weight")  # as it is in the file
        assert torch.equal(stored.view(torch.uint8), FP8.view(torch.uint8))
        given = checkpoint.scale("p.a.weight")
        if "without" in layout:
            assert given is None
        else:
            assert given is not None and given.dtype == torch.float32 and torch.equal(given, scale)
        assert checkpoint.scale("p.b.bias") is None


@pytest.mark.parametrize("scale", [ONE, ROWS])
def test_any_range_of_a_scaled_tensor(scale: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flux_sd.checkpoint.PIECE", 4)
    whole = (FP8.float() * (scale[:, None] if scale.dim() else scale)).flatten()
    with opened(tmp_path, {"a.weight": FP8, "a.weight_scale": scale}) as checkpoint:
        for start in range(24):
            for end in range(start, 25):
                out = torch.empty(end - start, dtype=torch.bfloat16)
                checkpoint.copy_into("a.weight", out, start)
                assert torch.equal(out, whole[start:end].bfloat16())


def test_a_scaled_tensor_without_rows(tmp_path: Path) -> None:
    state = {"a.weight": FP8[:0].clone(), "a.weight_scale": ROWS[:0].clone()}
    with opened(tmp_path, state) as checkpoint:
        assert checkpoint.read("a.weight").shape == checkpoint.mapped("a.weight").shape == (0, 6)


def test_a_scale_in_another_shard(tmp_path: Path) -> None:
    files = {"a.safetensors": {"a.weight": FP8}, "b.safetensors": {"a.weight_scale": ONE}}
    for name, state in files.items():
        save_file(state, tmp_path / name)
    with open_checkpoint([tmp_path / name for name in files]) as checkpoint:
        assert torch.equal(checkpoint.read("a.weight"), FP8.float() * ONE)


@pytest.mark.parametrize("layout", ["2024", "comfy_quant"])
def test_a_model_loads_from_a_scaled_file(layout: str, tmp_path: Path) -> None:
    """Every matrix scaled, norms and the embedding in 16 bits: as ComfyUI's T5 files are."""
    state = write.random_state("t5")
    stored: State = {"scaled_fp8": torch.empty(0)} if layout == "2024" else {}
    expected: State = {}
    for name, tensor in state.items():
        layer = name.removesuffix(".weight")
        if "SelfAttention" not in name and "DenseReluDense" not in name:
            stored[name] = expected[name] = tensor.half()
            continue
        scale = tensor.abs().max() / 448
        stored[name] = (tensor / scale).to(E4M3)
        expected[name] = stored[name].float() * scale
        stored[layer + (".scale_weight" if layout == "2024" else ".weight_scale")] = scale
        if layout == "comfy_quant":
            stored[layer + ".comfy_quant"] = config("float8_e4m3fn")
    module = write.build("t5")
    with opened(tmp_path, stored) as checkpoint:
        fill(module, plan_load("t5", module, write.CONFIGS["t5"], checkpoint))
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, expected[name].float()), name


@pytest.mark.parametrize("ending", ["scale_weight", "weight_scale"])
def test_a_linear_that_lost_its_scale_is_named(ending: str, tmp_path: Path) -> None:
    """Its values would load, and mean nothing. An embedding in fp8 has no scale in any layout."""
    victim = "encoder.block.1.layer.1.DenseReluDense.wo"
    stored: State = {}
    for name, tensor in write.random_state("t5").items():
        stored[name] = tensor.to(E4M3)
        if "SelfAttention" in name or "DenseReluDense" in name:
            stored[f"{name.removesuffix('.weight')}.{ending}"] = ONE.clone()
    module = write.build("t5")
    with opened(tmp_path, stored) as checkpoint:
        plan_load("t5", module, write.CONFIGS["t5"], checkpoint)
    del stored[f"{victim}.{ending}"]
    says = f"missing: a scale for the fp8 weight {victim}.weight"
    with opened(tmp_path, stored) as checkpoint, pytest.raises(WeightMapError, match=says) as caught:
        plan_load("t5", module, write.CONFIGS["t5"], checkpoint)
    assert len(caught.value.problems) == 1


# what is refused -------------------------------------------------------------------------------------------

BF16 = torch.ones(4, 6, dtype=torch.bfloat16)
BYTES = torch.zeros(10**5, dtype=torch.uint8)
KEY = "_quantization_metadata"
OTHER_FORMATS = ("nvfp4", "mxfp8", "int8_tensorwise", "convrot_w4a4", "of tomorrow")


def beside(weight: Tensor, **tensors: Tensor) -> State:
    """A file with a.weight and other tensors of the layer a."""
    return {"a.weight": weight} | {f"a.{name}": tensor.clone() for name, tensor in tensors.items()}


REFUSED: dict[str, tuple[State, dict[str, str], str]] = {
    "no format": (beside(FP8, comfy_quant=torch.tensor([123, 125], dtype=torch.uint8)), {}, "layer 'a' in"),
    "a format in the metadata": (
        beside(BF16), {KEY: '{"layers": {"x.a": {"format": "nvfp4"}}}'}, "layer 'x.a' .*nvfp4"),
    "metadata that is none": (beside(FP8), {KEY: "{"}, "no valid JSON"),
    "metadata of no layers": (beside(FP8), {KEY: "{}"}, "no table of layers"),
    "metadata nested too deeply": (beside(FP8), {KEY: "[" * 10**5}, "no valid JSON"),
    "metadata without end": (beside(FP8), {KEY: " " * 2**23}, "larger than"),
    "a layer of two lines": (beside(FP8), {KEY: '{"layers": {"a\\nb": {}}}'}, r"'a\\nb' in the format"),
    "a configuration that is none": (beside(FP8, comfy_quant=BYTES[:9]), {}, "a.comfy_quant is no"),
    "a configuration without end": (beside(FP8, comfy_quant=BYTES), {}, "a.comfy_quant has 100000 bytes"),
    "another type than declared": (
        beside(FP8, comfy_quant=config("float8_e5m2")), {}, "a.weight is F8_E4M3.*F8_E5M2"),
    "a scale of another type": (beside(BF16, scale_weight=ONE), {}, "a.weight, which is BF16"),
    "a scale of integers": (beside(FP8, weight_scale=torch.tensor(3)), {}, "a.weight_scale is I64"),
    "a scale of blocks": (
        beside(FP8, weight_scale=torch.ones(2, 3)), {}, r"a.weight_scale is F32 \[2, 3\].*each of 4 rows"),
    "two scales": (beside(FP8, weight_scale=ONE, scale_weight=ONE), {}, "a.weight has two scales"),
}  # fmt: skip
for other in OTHER_FORMATS:
    says = f"layer 'a' in the format '{other}'.*float8_e4m3fn and float8_e5m2"
    REFUSED[f"the format {other}"] = (beside(BYTES[:12], comfy_quant=config(other)), {}, says)
for ending, what in FOREIGN:
    REFUSED[f"foreign {ending}"] = ({"a" + ending: BYTES[:2].clone()}, {}, what.partition(" (")[0])


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_read_is_named(kind: str, tmp_path: Path) -> None:
    state, metadata, says = REFUSED[kind]
    with pytest.raises(CheckpointError, match=says) as caught:
        opened(tmp_path, state, metadata)
    assert str(tmp_path / "x.safetensors") in str(caught.value) and "\n" not in str(caught.value)


def test_a_scale_without_its_weight_is_left_over(tmp_path: Path) -> None:
    """It is not taken out of sight, so that a load names it."""
    with opened(tmp_path, {"b.weight": FP8, "a.weight_scale": ONE, "a.input_scale": IN}) as checkpoint:
        assert set(checkpoint.names) == {"b.weight", "a.weight_scale", "a.input_scale"}

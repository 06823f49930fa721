"""Weights that stay packed: what is computed with them, how little of them is decoded at a time, and when."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import golden
import helpers_checkpoints as write
import pytest
import torch
import torch.nn.functional as F
from helpers_flux_cases import Run, velocity
from helpers_layouts import (
    Writer,
    as_gguf,
    by_candle,
    by_city96,
    by_row,
    cast_to,
    mixed,
    scaled_2025,
    weights,
)
from torch import Tensor, nn

from flux_sd import quantized
from flux_sd.checkpoint import Checkpoint, open_checkpoint
from flux_sd.errors import Cancelled
from flux_sd.flux_mmdit import Flux, FluxConfig
from flux_sd.ggml_types import row_bytes
from flux_sd.gguf_dequant import VECTORISED, dequantize
from flux_sd.load_plan import (
    Decode,
    LoadPlan,
    PlannedParameter,
    fill,
    keep_stored,
    place,
    plan_load,
    staying,
)
from flux_sd.quantized import PackedRows, QuantizedEmbedding, QuantizedLinear
from flux_sd.weight_map import Row, load_maps

CONFIG = write.CONFIGS["flux_mmdit"]
TYPES = (*sorted(VECTORISED - {"F32", "F16", "BF16"}), "F8_E4M3", "F8_E5M2", "BF16", "F16")
ROWS, COLUMNS = 200, 512


def packed(kind: str, rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> PackedRows:
    """Random rows of a type. Any bytes mean numbers; these are small enough for every scale to be finite."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, columns)
    if kind in ("BF16", "F16"):
        dtype = torch.bfloat16 if kind == "BF16" else torch.float16
        return PackedRows(torch.randn(shape, generator=generator).to(dtype), kind, None, shape)
    if kind.startswith("F8"):
        codes = torch.randint(0, 0x78, shape, generator=generator, dtype=torch.uint8)
        return PackedRows(codes, kind, torch.rand(rows, 1, generator=generator), shape)
    size = (rows, row_bytes(kind, columns))
    data = torch.randint(0, 0x30, size, generator=generator, dtype=torch.uint8)
    return PackedRows(data, kind, None, shape)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


# products --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", TYPES)
def test_products_equal_those_of_the_decoded_weight(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of 64 rows; bit for bit between the two times of decoding, and to what the order of a sum
    may change against one product."""
    monkeypatch.setattr(quantized, "BLOCK_BYTES", 64 * 4 * COLUMNS)
    monkeypatch.setattr(quantized, "FLOAT8_CHUNK", 24 * COLUMNS)
    rows, bias, x = packed(kind), torch.randn(ROWS), torch.randn(2, 3, COLUMNS).to(dtype)
    on_use = QuantizedLinear([rows], bias.to(dtype), dtype)
    on_load = QuantizedLinear([rows.decoded(dtype)], bias.to(dtype), dtype)
    found = on_use(x)
    assert found.dtype == dtype and found.shape == (2, 3, ROWS)
    assert torch.equal(found, on_load(x))
    whole = F.linear(x, rows.decode(dtype), bias.to(dtype))
    assert relative(found, whole) < (1e-6 if dtype == torch.float32 else 1e-2)
    double = F.linear(x.double(), rows.decode(torch.float32).double(), bias.double())
    assert relative(found, double) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("kind", ["Q4_K", "F8_E4M3"])
def test_the_size_of_a_block_does_not_matter(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = QuantizedLinear([packed(kind, 1000)], None, torch.float32), torch.randn(5, COLUMNS)
    results = []
    for rows in (64, 192, 448, 10_000):
        monkeypatch.setattr(quantized, "BLOCK_BYTES", rows * 4 * COLUMNS)
        sizes = [block.stop - block.start for block in layer.weight.parts[0].blocks()]
        assert sum(sizes) == 1000 and max(sizes) <= rows
        results.append(layer(x))
    assert all(relative(result, results[0]) < 1e-6 for result in results)


def test_no_more_than_a_block_is_decoded_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def counted(data: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
        seen.append(dequantize(data, kind, dtype))
        return seen[-1]

    monkeypatch.setattr(quantized, "dequantize", counted)
    monkeypatch.setattr(quantized, "BLOCK_BYTES", 128 * 4 * COLUMNS)
    rows = packed("Q8_0", 1000)
    QuantizedLinear([rows], None, torch.bfloat16)(torch.randn(1, COLUMNS).bfloat16())
    assert [len(block) for block in seen] == [128] * 7 + [104]
    seen.clear()
    rows.decoded(torch.float32)
    assert max(len(block) for block in seen) == 128


def test_parts_of_a_fused_weight_keep_their_types() -> None:
    parts = [packed("Q4_K", 70), packed("F8_E5M2", 30, seed=1), packed("BF16", 64, seed=2)]
    bias, x = torch.randn(164), torch.randn(4, COLUMNS)
    layer = QuantizedLinear(parts, bias, torch.float32)
    whole = torch.cat([part.decode(torch.float32) for part in parts])
    assert layer.weight.shape == (164, COLUMNS)
    assert relative(layer(x), F.linear(x, whole, bias)) < 1e-6


# embeddings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES)
def test_an_embedding_decodes_the_rows_that_are_asked_for(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    real = PackedRows.decode

    def counted(self: PackedRows, dtype: torch.dtype, rows: slice | Tensor = slice(None)) -> Tensor:
        decoded.append(real(self, dtype, rows))
        return decoded[-1]

    parts = [packed(kind, 40), packed(kind, 60, seed=1)]
    whole = torch.cat([part.decode(torch.float32) for part in parts]).bfloat16()
    monkeypatch.setattr(PackedRows, "decode", counted)
    ids = torch.tensor([[0, 99, 39], [40, 7, 7]])
    found = QuantizedEmbedding(parts, torch.bfloat16)(ids)
    assert torch.equal(found, whole[ids])
    assert sum(len(rows) for rows in decoded) == ids.numel()


@pytest.mark.parametrize("wrong", [-1, 50])
def test_an_id_without_a_row_is_refused(wrong: int) -> None:
    with pytest.raises(IndexError, match="embedding of 50 rows"):
        QuantizedEmbedding([packed("Q8_0", 50)], torch.float32)(torch.tensor([3, wrong]))


# loading ---------------------------------------------------------------------------------------------------


def planned(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, LoadPlan]:
    module = write.build("flux_mmdit")
    plan = plan_load("flux_mmdit", module, CONFIG, checkpoint)
    keep_stored(module, plan, dtype)
    return module, plan


@pytest.fixture
def checkpoint(tmp_path: Path) -> Iterator[Checkpoint]:
    """A transformer under diffusers' names, so that most of its matrices are fused, in every type at once."""
    state = write.flux_diffusers(write.random_state("flux_mmdit"))
    as_gguf(mixed)(state, tmp_path / "m.gguf")
    with open_checkpoint(tmp_path / "m.gguf") as opened:
        yield opened


def test_rows_are_views_on_the_file(checkpoint: Checkpoint) -> None:
    module, plan = planned(checkpoint)
    fill(module, plan)
    layers = {n: m for n, m in module.named_modules() if isinstance(m, QuantizedLinear | QuantizedEmbedding)}
    assert len(layers) > 12 and any(len(layer.weight.parts) > 2 for layer in layers.values())
    for target, layer in layers.items():
        pieces = plan.sources_of(target + ".weight").pieces
        for piece, part in zip(pieces, layer.weight.parts, strict=True):
            source = checkpoint.mapped(piece.source)
            begin = source.data_ptr() + source.nbytes * piece.first // checkpoint.info(piece.source).shape[0]
            assert part.data.data_ptr() == begin and part.type == checkpoint.info(piece.source).dtype


def test_halves_and_thirds_of_packed_rows(tmp_path: Path) -> None:
    """The last modulation of diffusers' layout has its halves exchanged."""
    state = write.random_state("flux_mmdit")
    as_gguf(by_candle)(write.flux_diffusers(state), tmp_path / "m.gguf")
    with open_checkpoint(tmp_path / "m.gguf") as opened:
        module, plan = planned(opened)
        fill(module, plan)
        layer = module.get_submodule("final_layer.adaLN_modulation.1")
        assert isinstance(layer, QuantizedLinear) and len(layer.weight.parts) == 2
        found = weights(module)["final_layer.adaLN_modulation.1.weight"]
    assert relative(found, state["final_layer.adaLN_modulation.1.weight"]) < 0.1


def test_what_cannot_stay_packed_is_decoded(tmp_path: Path) -> None:
    """Norms and biases; and matrices whose blocks go over the ends of their rows."""
    state = write.random_state("flux_mmdit")
    back = as_gguf(by_row, flat=True)(state, tmp_path / "m.gguf")
    with open_checkpoint(tmp_path / "m.gguf") as opened:
        module, plan = planned(opened)
        kept = {parameter.target for parameter in staying(write.build("flux_mmdit"), plan, torch.float32)}
        fill(module, plan)
        types = {name: opened.info(name).dtype for name in opened.names}
    over = [name for name, kind in types.items() if kind.endswith("_K") and state[name].shape[1] % 256]
    assert over and not kept & set(over) and kept
    assert all(torch.equal(module.get_parameter(name), back[name]) for name in over)
    assert all(torch.equal(module.get_parameter(n), t) for n, t in state.items() if t.ndim == 1)


def test_a_transposed_weight_is_decoded(tmp_path: Path) -> None:
    """No map of today transposes a linear; the next ones will (OpenCLIP's text_projection)."""
    stored = torch.randn(32, 64).to(torch.float8_e4m3fn)
    row = Row("0.weight", "transpose", ("w",))
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(32, 64, bias=False))
    with open_checkpoint(write.save({"w": stored}, tmp_path / "m.safetensors")) as opened:
        shape, pieces = place(row, [(32, 64)])
        plan = LoadPlan(load_maps()[0], "", opened, (PlannedParameter(row, shape, pieces),), {})
        keep_stored(module, plan, torch.float32)
        fill(module, plan)
    assert torch.equal(module.get_parameter("0.weight"), stored.float().t())


@pytest.mark.parametrize("written", [cast_to(torch.float8_e4m3fn), scaled_2025], ids=["plain", "scaled"])
def test_fp8_is_bytes_to_the_device(written: Writer, tmp_path: Path) -> None:
    """One that does not know fp8 must not meet it. Beside the linears' bytes only floats are left."""
    written(write.random_state("flux_mmdit"), tmp_path / "m.safetensors")
    with open_checkpoint(tmp_path / "m.safetensors") as opened:
        module, plan = planned(opened, torch.bfloat16)
        fill(module, plan, torch.bfloat16)
        dtypes = {tensor.dtype for tensor in module.state_dict().values()}
    assert dtypes <= {torch.uint8, torch.float32, torch.bfloat16} and torch.uint8 in dtypes


def test_a_load_that_stops_leaves_nothing_and_can_be_repeated(checkpoint: Checkpoint) -> None:
    module, plan = planned(checkpoint)

    def stop(done: int, total: int) -> None:
        if done == total // 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        fill(module, plan, on_tensor=stop)
    assert all(tensor.is_meta for tensor in module.state_dict().values())
    fill(module, plan)
    assert not any(tensor.is_meta for tensor in module.state_dict().values())


def test_moving_a_network_moves_its_packed_weights(checkpoint: Checkpoint) -> None:
    module, plan = planned(checkpoint)
    fill(module, plan)
    assert all(tensor.is_meta for tensor in module.to("meta").state_dict().values())


# whole networks --------------------------------------------------------------------------------------------

WIDE = replace(
    FluxConfig.tiny(1, 1, guidance_embed=True),
    hidden_size=256, num_heads=4, context_in_dim=256, vec_in_dim=256, mlp_ratio=1.0,
)  # fmt: skip
CANDLE = ["flux_gguf_q4_0", "flux_gguf_q4k", "flux_gguf_q5k", "flux_gguf_q6k", "flux_gguf_q8_0"]


def transformer(
    path: Path, config: FluxConfig, dtype: torch.dtype, decode: Decode, keep: bool = True
) -> Flux:
    with torch.device("meta"):
        module = Flux(config)
    with open_checkpoint(path) as opened:
        plan = plan_load("flux_mmdit", module, config, opened)
        if keep:
            keep_stored(module, plan, dtype)
        fill(module, plan, dtype, decode=decode)
    return module.eval()


def run(component: str, module: nn.Module) -> Tensor:
    ids = torch.arange(7)[None]
    if component == "t5":
        return module(ids)  # type: ignore[no-any-return]
    if component == "clip":
        return module(ids).last_hidden_state  # type: ignore[no-any-return]
    decoded: Tensor = module.decode(torch.ones(1, 4, 4, 4))  # type: ignore[operator]
    return decoded


@pytest.mark.parametrize("component", ["clip", "t5", "autoencoder"])
@torch.inference_mode()
def test_every_network_runs_on_packed_weights(component: str, tmp_path: Path) -> None:
    """From an fp8 file: every embedding too is packed, T5's position bias among them."""
    state = {name: 0.1 * tensor for name, tensor in write.random_state(component).items()}
    cast_to(torch.float8_e5m2)(state, tmp_path / "m.safetensors")
    results = []
    for keep in (True, False):
        module = write.build(component)
        with open_checkpoint(tmp_path / "m.safetensors") as opened:
            plan = plan_load(component, module, write.CONFIGS[component], opened)
            if keep:
                keep_stored(module, plan, torch.float32)
                left = [m for m in module.modules() if type(m) in (nn.Linear, nn.Embedding)]
                assert not left
            fill(module, plan)
        results.append(run(component, module.eval()))
    assert torch.isfinite(results[0]).all() and relative(*results) < 1e-5


@pytest.mark.parametrize("case", CANDLE)
@torch.inference_mode()
def test_flux_from_gguf_that_candle_wrote(case: str) -> None:
    """Version 2, no metadata, every matrix in blocks. Candle multiplies decoded weights, or rounds
    activations to 8 bits as well."""
    model = transformer(golden.STORED / f"{case}.gguf", WIDE, torch.float32, "on_use")
    assert sum(isinstance(layer, QuantizedLinear) for layer in model.modules()) >= 22
    found = velocity(model, Run(WIDE))
    golden.check_case(case, "velocity_decoded", found)
    golden.check_case(case, "velocity_rounded", found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.inference_mode()
def test_both_times_of_decoding_give_the_same_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    config = FluxConfig.tiny(1, 1)
    state = {n: 0.05 * t for n, t in write.random_state("flux_mmdit", config).items()}
    as_gguf(by_city96)(state, tmp_path / "m.gguf")
    run = Run(config, dtype=dtype)
    on_use, on_load, plain = (
        velocity(transformer(tmp_path / "m.gguf", config, dtype, decode, keep), run)
        for decode, keep in (("on_use", True), ("on_load", True), ("on_load", False))
    )
    assert torch.isfinite(on_use).all() and torch.equal(on_use, on_load)
    assert relative(on_use, plain) < (1e-5 if dtype == torch.float32 else 2e-2)

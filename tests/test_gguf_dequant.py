"""Decoding GGML blocks: against the gguf package, bit for bit, and against what Candle wrote and decoded."""

from __future__ import annotations

import warnings
from typing import Any

import gguf
import golden
import pytest
import torch
import torch.nn.functional as F
from procedural import values
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flux_sd import gguf_dequant
from flux_sd.errors import CheckpointError
from flux_sd.ggml_types import GGML_TYPES, PLAIN, REMOVED, by_id, row_bytes
from flux_sd.gguf_dequant import SUPPORTED, VECTORISED, SlowDecodingWarning, dequantize
from flux_sd.gguf_quantize import quantize

# Where a block keeps its float16 numbers, in bytes; IQ1_M alone spreads one over its scales.
HALVES = {
    **{name: [0] for name in ("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS")},
    **{name: [0] for name in ("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")},
    **{name: [0, 2] for name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K")},
    **{"Q2_K": [80, 82], "Q3_K": [108], "Q6_K": [208], "TQ1_0": [52], "TQ2_0": [64], "F16": [0]},
}
# +-0, the least and the largest subnormal, the least normal, the largest, infinity, quiet and signalling NaN
EXTREMES = (0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0x7D01)
CANDLE = {  # Candle's word for a type: ours
    **{name: name for name in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")},
    **{f"Q{bits}K": f"Q{bits}_K" for bits in range(2, 7)},
}


@pytest.fixture(autouse=True)
def quiet() -> None:
    warnings.simplefilter("ignore", SlowDecodingWarning)


def random_bytes(name: str, rows: int, blocks: int, seed: int = 0) -> Tensor:
    """uint8 [rows, blocks * nbytes], uniform, so that every code, scale and bit pattern occurs."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, blocks * GGML_TYPES[name].nbytes)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def reference(data: Tensor, name: str) -> Tensor:
    """The gguf package's values, float32."""
    number = gguf.GGMLQuantizationType[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy remarks on infinity times zero
        return torch.from_numpy(gguf.dequantize(data.numpy(), number).copy()).float()


def same(a: Tensor, b: Tensor) -> bool:
    """Equal in shape and in every bit, except that one NaN is as good as another."""
    width = {4: torch.int32, 2: torch.int16}[a.element_size()]
    bits = a.contiguous().view(width) == b.contiguous().view(width)
    return a.shape == b.shape and a.dtype == b.dtype and bool((bits | a.isnan() & b.isnan()).all())


# the table ----------------------------------------------------------------------------------------------


def test_the_table_of_types_is_the_gguf_packages() -> None:
    for number, (block, nbytes) in gguf.GGML_QUANT_SIZES.items():
        ours = GGML_TYPES[number.name]
        # gguf 0.19 counts 40 bytes for Q8_1; ggml's structure of two float16 and 32 bytes has 36.
        expected = 36 if number.name == "Q8_1" else nbytes
        assert (ours.id, ours.block, ours.nbytes) == (number.value, block, expected)
        assert by_id(number.value) is ours
    assert set(GGML_TYPES) - {number.name for number in gguf.GGML_QUANT_SIZES} <= {"Q2_0"}
    assert not set(REMOVED) & {kind.id for kind in GGML_TYPES.values()}
    for name, torch_name in PLAIN.items():
        assert getattr(torch, torch_name).itemsize == GGML_TYPES[name].nbytes


def test_rows_are_whole_blocks() -> None:
    assert row_bytes("Q4_K", 3072) == 12 * 144
    with pytest.raises(
        ValueError, match="a row of 3000 elements is not a whole number of Q4_K's blocks of 256"
    ):
        row_bytes("Q4_K", 3000)


# against the gguf package -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUPPORTED)
def test_random_bytes_decode_as_the_gguf_package_decodes_them(name: str) -> None:
    data = random_bytes(name, rows=7, blocks=96)
    assert same(dequantize(data, name), reference(data, name))


@pytest.mark.parametrize("name", sorted(HALVES))
def test_extreme_scales_decode_as_the_gguf_package_decodes_them(name: str) -> None:
    nbytes = GGML_TYPES[name].nbytes
    data = random_bytes(name, rows=len(EXTREMES) ** 2, blocks=2, seed=1)
    blocks = data.view(len(EXTREMES), len(EXTREMES), 2, nbytes)
    for axis, at in enumerate(HALVES[name]):  # every pair of extremes, where there are two numbers
        for i, bits in enumerate(EXTREMES):
            stored = torch.tensor([bits & 255, bits >> 8], dtype=torch.uint8)
            blocks.select(axis, i)[..., at : at + 2] = stored
    decoded = dequantize(data, name)
    assert same(decoded, reference(data, name))
    assert decoded.isnan().any()
    assert decoded.isfinite().any()


@pytest.mark.parametrize("name", SUPPORTED)
def test_blocks_of_zero_bytes_and_of_ones(name: str) -> None:
    for byte in (0, 255):
        data = torch.full((3, 5 * GGML_TYPES[name].nbytes), byte, dtype=torch.uint8)
        assert same(dequantize(data, name), reference(data, name))


# types, shapes, memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_type_is_float32_rounded_once(name: str, dtype: torch.dtype) -> None:
    data = random_bytes(name, rows=3, blocks=64, seed=2)
    assert same(dequantize(data, name, dtype), dequantize(data, name).to(dtype))


@pytest.mark.parametrize("name", sorted(VECTORISED))
def test_chunks_do_not_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = random_bytes(name, rows=5, blocks=7, seed=3)
    whole = [dequantize(data, name, dtype) for dtype in (torch.float32, torch.bfloat16)]
    per_chunk = 3 * GGML_TYPES[name].block  # 35 blocks in twelve chunks, the last one short
    monkeypatch.setattr(gguf_dequant, "CPU_CHUNK", per_chunk)
    assert all(same(dequantize(data, name, expected.dtype), expected) for expected in whole)


@pytest.mark.parametrize("name", SUPPORTED)
def test_any_leading_shape_any_place_in_memory(name: str) -> None:
    data = random_bytes(name, rows=6, blocks=4, seed=4)
    expected = dequantize(data, name)  # [6, 4 * block]
    width = data.shape[1]
    assert same(dequantize(data.view(2, 3, width), name), expected.view(2, 3, -1))
    assert same(dequantize(data[0], name), expected[0])
    assert same(dequantize(data[::2], name), expected[::2])
    assert same(dequantize(data[:0], name), expected[:0])
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), data.flatten()])[1:]  # at an odd address
    assert same(dequantize(shifted, name), expected.flatten())
    wide = torch.cat([data, data], 1)[:, :width]  # rows with something between them
    assert same(dequantize(wide, name), expected)


@pytest.mark.parametrize("name", ["F32", "BF16", "Q8_0"])
def test_the_result_is_new_memory_and_the_bytes_stay(name: str) -> None:
    data = random_bytes(name, rows=2, blocks=4)
    before = data.clone()
    dequantize(data, name).zero_()
    assert torch.equal(data, before)


def test_what_is_no_row_is_refused() -> None:
    with pytest.raises(ValueError, match="no row of Q8_0: blocks are 34 bytes"):
        dequantize(torch.zeros(2, 35, dtype=torch.uint8), "Q8_0")
    with pytest.raises(ValueError, match=r"torch.int8 is no row of Q8_0"):
        dequantize(torch.zeros(2, 34, dtype=torch.int8), "Q8_0")


class Seen(TorchDispatchMode):
    """Records the types of everything that is computed while it is open."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        tensors = results if isinstance(results, list | tuple) else [results]
        self.dtypes |= {tensor.dtype for tensor in tensors if isinstance(tensor, Tensor)}
        return results


@pytest.mark.parametrize("name", sorted(VECTORISED))
def test_decoding_needs_nothing_that_a_device_may_lack(name: str) -> None:
    """No float64, which Apple's GPUs have not, and no value read back: it runs where there are no values."""
    with Seen() as seen:
        dequantize(random_bytes(name, rows=2, blocks=3), name, torch.bfloat16)
    assert torch.bfloat16 in seen.dtypes
    assert torch.float64 not in seen.dtypes
    nowhere = dequantize(random_bytes(name, rows=2, blocks=3).to("meta"), name)
    assert nowhere.is_meta and nowhere.shape == (2, 3 * GGML_TYPES[name].block)


# what cannot be decoded ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Q8_K", "Q8_1", "Q7_X"])
def test_a_type_that_cannot_be_decoded_is_named(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"{name} cannot be decoded: .* F32, F16, BF16, Q4_0.*NVFP4"):
        dequantize(torch.zeros(1, 36 * 292, dtype=torch.uint8), name)


def test_the_types_that_people_have_are_vectorised() -> None:
    assert set(SUPPORTED) >= VECTORISED
    assert VECTORISED >= {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "IQ4_XS"}
    assert VECTORISED >= {f"Q{bits}_K" for bits in range(2, 7)}


def test_slow_types_say_so_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        warnings.simplefilter("default", SlowDecodingWarning)
        for name in ("IQ2_XS", "TQ2_0", "IQ2_XS", "Q4_K"):
            dequantize(random_bytes(name, rows=1, blocks=1), name)
    messages = [str(warning.message) for warning in caught]
    assert [message.partition(" ")[0] for message in messages] == ["IQ2_XS", "TQ2_0"]


def test_a_gguf_package_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "GGMLQuantizationType", object())
    with pytest.raises(CheckpointError, match="gguf package does not know NVFP4: update it"):
        dequantize(random_bytes("NVFP4", rows=1, blocks=1), "NVFP4")


# against Candle -----------------------------------------------------------------------------------------


def candle_rows() -> Tensor:
    """The 7 rows of gguf_blocks: three of unit variance, zeros, positive, tiny, one outlier. [7, 512]"""
    rows = values("input.gguf_rows", (7, 512))
    rows[3] = 0.0
    rows[4] = rows[4].abs() + 0.5
    rows[5] *= 1e-6
    rows[6, 512 // 3] = 1000.0
    return rows


@pytest.mark.parametrize("case", ["gguf_blocks"])
@pytest.mark.parametrize("word", CANDLE)
def test_candle_blocks(case: str, word: str) -> None:
    """Decoded as Candle decodes them; and, in the types that leave an encoder no choice, encoded as well."""
    stored, name = golden.stored(case), CANDLE[word]
    decoded = dequantize(stored[f"{word}.blocks"].view(7, -1), name)
    golden.check_case(case, f"{word}.dequantized", decoded)
    assert same(decoded, stored[f"{word}.dequantized"])
    if not name.endswith("_K"):
        golden.check_case(case, f"{word}.blocks", quantize(candle_rows(), name).flatten())


@pytest.mark.parametrize("case", ["gguf_products"])
@pytest.mark.parametrize("word", CANDLE)
def test_candle_products(case: str, word: str) -> None:
    blocks = golden.stored(case)[f"{word}.blocks"].view(48, -1)
    product = F.linear(values("input.gguf_activations", (5, 512)), dequantize(blocks, CANDLE[word]))
    golden.check_case(case, f"{word}.decoded", product)
    golden.check_case(case, f"{word}.rounded", product)

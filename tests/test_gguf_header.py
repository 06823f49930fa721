"""gguf_header.py: what is read, against the gguf package's own writer and reader, and what is refused."""

from __future__ import annotations

import re
import struct
import time
from pathlib import Path
from typing import Any

import gguf
import helpers_gguf as write
import numpy as np
import pytest
import torch
from conftest import ROOT

from flux_sd.checkpoint import open_checkpoint
from flux_sd.errors import CheckpointError, MissingFileError
from flux_sd.ggml_types import GGML_TYPES
from flux_sd.gguf_dequant import SUPPORTED, dequantize
from flux_sd.gguf_header import MAX_ENTRIES, read_gguf_header, read_gguf_metadata

ROWS, BLOCKS = 3, 2


def random_bytes(seed: int, *shape: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def by_package(path: Path, arch: str = "flux", alignment: int | None = None) -> dict[str, bytes]:
    """A file of one tensor of every type that the package can write, and the bytes of each."""
    writer = gguf.GGUFWriter(path, arch)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    writer.add_name("a test")
    writer.add_array("numbers", [1, -2, 3])
    writer.add_array("words", ["a", "", "long" * 100])
    writer.add_float32("general.third", 0.5)
    writer.add_string("long", "x" * 5000)
    stored = {}
    for i, kind in enumerate(sorted(gguf.GGML_QUANT_SIZES, key=int)):
        if kind.name in SUPPORTED and kind.name not in ("F32", "F16", "BF16"):
            data = random_bytes(i, ROWS, BLOCKS * gguf.GGML_QUANT_SIZES[kind][1])
            writer.add_tensor(f"block.{i}.{kind.name}", data, raw_dtype=kind)
            stored[f"block.{i}.{kind.name}"] = data.tobytes()
    for kind, values in {
        "F32": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        "F16": np.arange(6, dtype=np.float16).reshape(2, 3),
        "F64": np.arange(2, dtype=np.float64),
        "I8": np.arange(5, dtype=np.int8),
        "I32": np.arange(4, dtype=np.int32),
    }.items():
        writer.add_tensor(f"plain.{kind}", values)
        stored[f"plain.{kind}"] = values.tobytes()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def refusal(file: write.File, path: Path) -> str:
    """The message of a file that must be refused, in less than a second."""
    file.write(path)
    started = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert time.process_time() - started < 1
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 1200
    return message


# what is read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alignment", [None, 64, 8])
def test_headers_equal_what_the_gguf_package_reads(alignment: int | None, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    stored = by_package(path, alignment=alignment)
    header, oracle = read_gguf_header(path), gguf.GGUFReader(path)
    assert [info.name for info in header.infos] == [tensor.name for tensor in oracle.tensors]
    for info, tensor in zip(header.infos, oracle.tensors, strict=True):
        assert info.shape == tuple(int(size) for size in reversed(tensor.shape)) == info.stored_shape
        assert (info.dtype, info.nbytes) == (tensor.tensor_type.name, tensor.n_bytes)
        assert info.offset == tensor.data_offset and path.read_bytes()[info.offset :].startswith(
            stored[info.name]
        )
    assert header.metadata["general.architecture"] == "flux" and header.metadata["general.name"] == "a test"
    assert header.metadata["general.third"] == "0.5" and "long" not in header.metadata
    assert read_gguf_metadata(path, ["numbers", "words", "long", "absent"]) == {
        "numbers": [1, -2, 3],
        "words": ["a", "", "long" * 100],
        "long": "x" * 5000,
    }


@pytest.mark.filterwarnings("ignore::flux_sd.gguf_dequant.SlowDecodingWarning")
def test_tensors_of_every_type_are_read_and_decoded(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    stored = by_package(path)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.gguf_metadata(["numbers"]) == {"numbers": [1, -2, 3]}
        for name, data in stored.items():
            info, view = checkpoint.info(name), checkpoint.mapped(name)
            assert view.contiguous().view(torch.uint8).numpy().tobytes() == data
            assert info.packed == (info.torch_dtype is None) == name.startswith("block")
            assert info.is_float == (not name.startswith("plain.I"))
            if not info.packed:
                continue
            kind = GGML_TYPES[info.dtype]
            assert info.shape == (ROWS, BLOCKS * kind.block) and view.shape == (ROWS, BLOCKS * kind.nbytes)
            found, expected = checkpoint.read(name), dequantize(view, info.dtype)
            assert found.dtype == torch.float32 and torch.equal(found.nan_to_num(), expected.nan_to_num())


def test_any_range_of_a_block_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of one block, ranges that begin and end inside blocks, and another type to convert to."""
    monkeypatch.setattr("flux_sd.checkpoint.PIECE", 4)
    data = gguf.quantize(
        np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32), gguf.GGMLQuantizationType.Q8_0
    )
    path = write.File([write.Described("t", (64, 4), 8, data.tobytes())]).write(tmp_path / "x.gguf")
    whole = torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType.Q8_0)).flatten()
    with open_checkpoint(path) as checkpoint:
        assert torch.equal(checkpoint.read("t").flatten(), whole)
        for start, end in ((0, 256), (0, 1), (31, 33), (5, 200), (64, 128), (255, 256), (7, 7)):
            for dtype in (torch.float32, torch.bfloat16):
                out = torch.empty(end - start, dtype=dtype)
                checkpoint.copy_into("t", out, start)
                assert torch.equal(out, whole[start:end].to(dtype)), (start, end)
        with pytest.raises(ValueError, match="256 elements"):
            checkpoint.copy_into("t", torch.empty(2), 255)


@pytest.mark.parametrize("version", [2, 3])
def test_files_without_metadata(version: int, tmp_path: Path) -> None:
    """Candle writes version 2 without a single key."""
    tensors = [write.float32("a", 1, 2, 3, 4, 5, 6, sizes=(3, 2)), write.float32("b", 7.5)]
    with open_checkpoint(write.File(tensors, version=version).write(tmp_path / "x.gguf")) as checkpoint:
        assert checkpoint.metadata == {} and checkpoint.gguf_metadata(["general.name"]) == {}
        assert checkpoint.read("a").tolist() == [[1, 2, 3], [4, 5, 6]] and checkpoint.read("b").tolist() == [
            7.5
        ]


def test_files_that_candle_wrote() -> None:
    found = sorted((ROOT / "reference_outputs" / "candle").glob("flux_gguf_*.gguf"))
    assert found
    for path in found:
        header, oracle = read_gguf_header(path), gguf.GGUFReader(path)
        assert path.read_bytes()[:8] == b"GGUF" + struct.pack("<I", 2) and header.metadata == {}
        expected = {
            tensor.name: (tensor.tensor_type.name, int(tensor.data_offset), tensor.n_bytes)
            for tensor in oracle.tensors
        }
        assert {info.name: (info.dtype, info.offset, info.nbytes) for info in header.infos} == expected


@pytest.mark.parametrize("arch", ["pig", "", "wrong " * 20, None])
def test_the_architecture_is_no_condition(arch: str | None, tmp_path: Path) -> None:
    pairs = [] if arch is None else [write.pair("general.architecture", write.STRING, arch)]
    path = write.File([write.float32("a", 1)], pairs).write(tmp_path / "x.gguf")
    assert read_gguf_header(path).metadata.get("general.architecture") == arch


def test_every_kind_of_value_is_skipped_and_read(tmp_path: Path) -> None:
    values: dict[str, tuple[int, Any]] = {
        f"k{kind}": (kind, 1.5 if form in "fd" else form != "?" or True)
        for kind, form in write.FORMATS.items()
    }
    arrays = {f"a{kind}": (write.ARRAY, (kind, [content] * 3)) for _, (kind, content) in values.items()}
    words: dict[str, tuple[int, Any]] = {
        "s": (write.STRING, "ü"),
        "as": (write.ARRAY, (write.STRING, ["", "b" * 300])),
        "none": (write.ARRAY, (write.STRING, [])),
        "empty": (write.ARRAY, (write.F64, [])),
    }
    everything = values | arrays | words
    pairs = [write.pair(key, kind, content) for key, (kind, content) in everything.items()]
    path = write.File([write.float32("t", 3)], pairs).write(tmp_path / "x.gguf")
    expected = {
        k: content[1] if kind == write.ARRAY else content for k, (kind, content) in everything.items()
    }
    assert read_gguf_metadata(path, expected.keys()) == expected
    assert read_gguf_metadata(path, ["a5"]) == {"a5": [1, 1, 1]}
    assert read_gguf_header(path).metadata.keys() == values.keys() | {"s"}
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.read("t").tolist() == [3]


def test_reshaped_tensors_come_back(tmp_path: Path) -> None:
    """A convolution that was flattened so that blocks of 256 fit, as ComfyUI-GGUF writes it."""
    data = random_bytes(0, 9, 144)
    shapes = [write.pair("comfy.gguf.orig_shape.conv.weight", write.ARRAY, (write.I32, [16, 16, 3, 3]))]
    tensors = [
        write.Described("conv.weight", (256, 9), 12, data.tobytes()),
        write.Described("plain.weight", (3, 3, 2, 1), 0, bytes(72)),
    ]
    with open_checkpoint(write.File(tensors, shapes).write(tmp_path / "x.gguf")) as checkpoint:
        info = checkpoint.info("conv.weight")
        assert (info.shape, info.stored_shape, info.numel) == ((16, 16, 3, 3), (9, 256), 2304)
        assert checkpoint.mapped("conv.weight").shape == (9, 144)
        decoded = dequantize(torch.from_numpy(data), "Q4_K")
        assert torch.equal(
            checkpoint.read("conv.weight").nan_to_num(), decoded.view(16, 16, 3, 3).nan_to_num()
        )
        assert checkpoint.info("plain.weight").shape == (1, 2, 3, 3)


def test_a_small_range_of_a_huge_tensor(tmp_path: Path) -> None:
    """Four gigabytes of Q8_0, all but one block a hole in the file: only what is asked for is touched."""
    rows = 2**32 // (34 * 128)
    tensor = write.Described("t", (4096, rows), 8, b"")
    header = write.File([tensor]).header()
    start, block = -(-len(header) // 32) * 32, 34 * (128 * (rows // 2) + 5)
    path = tmp_path / "x.gguf"
    with path.open("wb") as file:
        file.write(header)
        file.truncate(start + rows * 128 * 34)
        file.seek(start + block)
        file.write(struct.pack("<e", 0.5) + bytes(range(32)))
    began, out = time.process_time(), torch.empty(64)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.info("t").shape == (rows, 4096) and checkpoint.total_bytes == rows * 128 * 34
        checkpoint.copy_into("t", out, 4096 * (rows // 2) + 5 * 32 - 16)
    assert out.tolist() == [0.0] * 16 + [i / 2 for i in range(32)] + [0.0] * 16
    assert time.process_time() - began < 1


def test_parts_of_a_split_file(tmp_path: Path) -> None:
    for i in (0, 1):
        pairs = [write.pair("split.count", write.U16, 2), write.pair("split.no", write.U16, i)]
        name = f"m-0000{i + 1}-of-00002.gguf"
        write.File([write.float32(f"t{i}", i)], pairs).write(tmp_path / name)
    parts = sorted(tmp_path.iterdir())
    for given in (parts, tmp_path):
        with open_checkpoint(given) as checkpoint:
            assert checkpoint.names == ("t0", "t1") and checkpoint.read("t1").tolist() == [1]
    with pytest.raises(MissingFileError, match="2 parts"):
        open_checkpoint(parts[0])
    parts[1].unlink()
    with pytest.raises(MissingFileError, match="shard 2 of 2"):
        open_checkpoint(tmp_path)


def test_a_folder_with_a_gguf(tmp_path: Path) -> None:
    path = write.File([write.float32("t", 1)]).write(tmp_path / "model-Q8_0.gguf")
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.files == (path,)


# what is refused -------------------------------------------------------------------------------------------

GOOD = write.float32("a.weight", 1, 2, 3, 4)
Q4_0 = write.Described("q.weight", (32, 2), 2, bytes(36))
KEY = "comfy.gguf.orig_shape.a.weight"


def one(
    sizes: Any = (4,), kind: int = 0, offset: int | None = None, name: str | bytes = "a.weight"
) -> write.File:
    return write.File([write.Described(name, sizes, kind, bytes(16), offset)], tail=bytes(99))


def keys(*pairs: bytes) -> write.File:
    return write.File([GOOD], pairs)


def claims(element: int, count: int, rest: bytes = bytes(16)) -> write.File:
    """An array of 16 bytes that claims `count` elements."""
    return keys(write.text("k") + struct.pack("<IIQ", write.ARRAY, element, count) + rest)


def alignment(kind: int, value: Any) -> write.File:
    return keys(write.pair("general.alignment", kind, value))


def shape(kind: int, value: Any) -> write.File:
    return keys(write.pair(KEY, kind, value))


REFUSED: dict[str, tuple[write.File, str]] = {
    "version 1": (write.File([GOOD], version=1), "version 1.*2 and 3"),
    "version 4": (write.File([GOOD], version=4), "version 4"),
    "big-endian": (write.File([GOOD], order=">"), "big-endian"),
    "a count of tensors that cannot be": (write.File([GOOD], tensor_count=2**60), "tensors ends behind"),
    "one tensor too many": (write.File([GOOD], tensor_count=2), "tensor .*ends behind|name"),
    "a count of keys that cannot be": (write.File([GOOD], pair_count=2**60), "key-value pairs ends behind"),
    "a key that does not end": (keys(struct.pack("<Q", 2**63)), "a key .* ends behind"),
    "a key that is no text": (keys(write.pair(b"\xff\xfe", write.U8, 1)), "UTF-8"),
    "a key of control codes": (keys(write.pair("\x1b[2J", write.U8, 1)), "printable"),
    "a key twice": (keys(*[write.pair("k", write.U8, 1)] * 2), "'k' twice"),
    "an unknown value": (keys(write.text("k") + struct.pack("<I", 13) + bytes(64)), "'k'.*type 13"),
    "an array of arrays": (claims(write.ARRAY, 9, bytes(200)), "'k'.*type 9"),
    "an array of the unknown": (claims(77, 1), "'k'.*type 77"),
    "an array that claims 2**40 numbers": (claims(write.U32, 2**40), "'k'.*ends behind"),
    "an array that claims 2**40 strings": (claims(write.STRING, 2**40), "'k'.*ends behind"),
    "an array that claims 2**62 doubles": (claims(write.F64, 2**62), "'k'.*ends behind"),
    "an array whose string does not end": (claims(write.STRING, 1, b"\xff" * 16), "'k'.*ends behind"),
    "an array of strings that leaves the file": (
        claims(write.STRING, 3, struct.pack("<Q", 2**63) + bytes(99)),
        "'k'.*ends behind",
    ),
    "an alignment of 0": (alignment(write.U32, 0), "alignment is 0"),
    "an alignment of 24": (alignment(write.U32, 24), "alignment is 24"),
    "an alignment in words": (alignment(write.STRING, "32"), "alignment is '32'"),
    "an alignment of 2**31": (alignment(write.U32, 2**31), "power of two"),
    "a name twice": (write.File([GOOD, GOOD]), "'a.weight' twice"),
    "a name of control codes": (one(name="a\nb"), "printable"),
    "a name of 300 characters": (one(name="a" * 300), "printable"),
    "a name of 3000 characters": (one(name="a" * 3000), "at most"),
    "a name that is no text": (one(name=b"\xff"), "UTF-8"),
    "99 dimensions": (one((1,) * 99), "'a.weight' has 99 dimensions"),
    "sizes that overflow": (one((2**33, 2**33)), "'a.weight'.*counted"),
    "sizes that overflow beside a zero": (one((0, 2**63)), "'a.weight'.*counted"),
    "more elements than the file has": (one((2**40,)), "truncated: 'a.weight'"),
    "an end behind the file": (write.File([write.Described("a", (5,), 0, bytes(16))]), "truncated: 'a'"),
    "an offset behind the file": (one(offset=2**40), "truncated: 'a.weight'"),
    "an offset that overflows": (one(offset=2**64 - 32), "truncated: 'a.weight'"),
    "an offset off the grid": (one(offset=4), "'a.weight'.*alignment"),
    "an overlap": (write.File([GOOD, write.Described("b", (4,), 0, bytes(16), 0)]), "'b' overlaps 'a"),
    "rows that no block fits": (one((100, 2), 12), "'a.weight'.*100.*256"),
    "no dimension for a block": (one((), 12), "'a.weight'.*256"),
    "an unknown type": (one(kind=99), r"'a.weight'.*type 99 \(unknown\).*F32, .*Q4_K"),
    "a removed type": (one(kind=4), r"'a.weight'.*4 \(Q4_2\).*Q4_K"),
    "a type of activations": (one((256,), 15), r"'a.weight'.*15 \(Q8_K\).*Q4_K"),
    "another number of elements": (shape(write.ARRAY, (write.I32, [5])), r"a\.weight says \[5\].*\[4\]"),
    "a shape of floats": (shape(write.ARRAY, (write.F32, [4.0])), "no shape"),
    "a shape without end": (shape(write.ARRAY, (write.U8, [1] * 99)), "no shape"),
    "a shape that is a number": (shape(write.U32, 4), "no shape"),
    "a negative shape": (shape(write.ARRAY, (write.I32, [-2, -2])), "no shape"),
    "a shape of strings": (shape(write.ARRAY, (write.STRING, ["4"])), "no shape"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_lying_headers_are_refused(kind: str, tmp_path: Path) -> None:
    file, says = REFUSED[kind]
    message = refusal(file, tmp_path / "x.gguf")
    assert re.search(says, message), message


def test_counts_that_fit_a_huge_file_are_bounded_too(tmp_path: Path) -> None:
    """Sparse files: gigabytes of zeros behind a header that claims to fill them."""
    for file in (
        write.File(tensor_count=MAX_ENTRIES + 1),
        write.File(pair_count=MAX_ENTRIES + 1),
        write.File([], [write.text("k") + struct.pack("<IIQ", 9, 8, 2**28)]),
    ):
        path = file.write(tmp_path / "x.gguf")
        with path.open("r+b") as stream:
            stream.truncate(4 * 2**30)
        started = time.process_time()
        with pytest.raises(CheckpointError):
            open_checkpoint(path)
        assert time.process_time() - started < 1


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    whole = write.File([GOOD, Q4_0], [write.pair("k", write.ARRAY, (write.STRING, ["a", "b"]))]).content()
    path = tmp_path / "x.gguf"
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(CheckpointError):
            open_checkpoint(path)


def test_values_too_long_to_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flux_sd.gguf_header.MAX_ITEMS", 3)
    pairs = [write.pair(f"k{n}", write.ARRAY, (write.U8, [7] * n)) for n in (3, 4)]
    path = write.File([GOOD], pairs).write(tmp_path / "x.gguf")
    assert read_gguf_header(path).infos and read_gguf_metadata(path, ["k3"]) == {"k3": [7, 7, 7]}
    with pytest.raises(CheckpointError, match="'k4' is too long"):
        read_gguf_metadata(path, ["k4"])
    words = write.pair("words", write.ARRAY, (write.STRING, ["a"] * 4))
    assert "more than 3 strings" in refusal(write.File([GOOD], [words]), path)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="does not exist"):
        read_gguf_header(tmp_path / "x.gguf")
    (tmp_path / "x.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_gguf_header(tmp_path / "x.gguf")
    (tmp_path / "x.gguf").write_bytes(b"some other file")
    with pytest.raises(CheckpointError, match="does not begin with GGUF"):
        read_gguf_header(tmp_path / "x.gguf")

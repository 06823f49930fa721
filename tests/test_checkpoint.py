"""checkpoint.py: what it opens and reads, and how it refuses what is damaged or something else."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import helpers_gguf
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flux_sd.checkpoint import open_checkpoint
from flux_sd.errors import AmbiguousFileError, CheckpointError, MissingFileError
from flux_sd.tensor_info import DTYPES

TENSORS = {
    "a": torch.arange(6.0).view(2, 3),
    "b.c": torch.ones(4, dtype=torch.bfloat16),
    "d": torch.tensor(7),
}


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with any header: a value for JSON, or the very bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def sharded(folder: Path, listed: dict[str, str] | None = None) -> Path:
    """TENSORS in two shards with an index (or with another list of what lies where)."""
    home = {"a": "m-00001-of-00002.safetensors", "b.c": "m-00002-of-00002.safetensors"}
    for name, file in home.items():
        save_file({name: TENSORS[name]}, folder / file)
    index = folder / "m.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 32}, "weight_map": listed or home}))
    return index


# what is read ----------------------------------------------------------------------------------------------


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path, metadata={"made by": "a test"})
    with open_checkpoint(str(path)) as checkpoint:
        assert set(checkpoint.names) == set(TENSORS) and len(checkpoint) == 3
        assert checkpoint.metadata == {"made by": "a test"} and checkpoint.files == (path,)
        assert checkpoint.total_bytes == 24 + 8 + 8 and "a" in checkpoint and "x" not in checkpoint
        info = checkpoint.info("b.c")
        assert (info.shape, info.dtype, info.nbytes, info.file) == ((4,), "BF16", 8, path)
        for name, tensor in TENSORS.items():
            for found in (checkpoint.read(name), checkpoint.mapped(name)):
                assert found.dtype == tensor.dtype and torch.equal(found, tensor)
        with pytest.raises(CheckpointError, match="'nothing'"):
            checkpoint.read("nothing")


@pytest.mark.parametrize("word", DTYPES)
def test_every_dtype(word: str, tmp_path: Path) -> None:
    tensor = torch.tensor([0, 1, 1]).to(DTYPES[word])
    save_file({"t": tensor, "empty": tensor[:0], "scalar": tensor[0].clone()}, tmp_path / "x.safetensors")
    with open_checkpoint(tmp_path / "x.safetensors") as checkpoint:
        assert checkpoint.info("t").dtype == word
        assert torch.equal(checkpoint.mapped("t").view(torch.uint8), tensor.view(torch.uint8))
        found = checkpoint.read("t")
        assert torch.equal(found, tensor.to(found.dtype))
        assert found.dtype == (torch.float32 if word.startswith("F8") else tensor.dtype)
        assert checkpoint.read("empty").shape == (0,) and checkpoint.read("scalar").shape == ()


def test_ranges_are_converted_into_place(tmp_path: Path) -> None:
    stored = torch.randn(5, 3).to(torch.bfloat16)
    save_file({"t": stored}, tmp_path / "x.safetensors")
    out = torch.zeros(4, 3)
    with open_checkpoint(tmp_path / "x.safetensors") as checkpoint:
        checkpoint.copy_into("t", out[1:3], start=6)  # rows 2 and 3 become rows 1 and 2
        with pytest.raises(ValueError, match="15 elements"):
            checkpoint.copy_into("t", out, start=6)
    assert torch.equal(out, torch.cat([torch.zeros(1, 3), stored[2:4].float(), torch.zeros(1, 3)]))


def test_pieces_meet_without_a_seam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flux_sd.checkpoint.PIECE", 100)
    stored = torch.randn(33, 7)
    save_file({"t": stored}, tmp_path / "x.safetensors")
    with open_checkpoint(tmp_path / "x.safetensors") as checkpoint:
        assert torch.equal(checkpoint.read("t"), stored)
        checkpoint.release("t")
        checkpoint.release()
        assert torch.equal(checkpoint.read("t"), stored)


def test_an_unaligned_tensor_is_read(tmp_path: Path) -> None:
    data = b"\1" + torch.tensor([1.5, -2.0]).view(torch.uint8).numpy().tobytes()
    header = {"u": entry("U8", (1,), (0, 1)), "f": entry("F32", (2,), (1, 9))}
    with open_checkpoint(write(tmp_path / "x.safetensors", header, data)) as checkpoint:
        assert checkpoint.read("f").tolist() == [1.5, -2.0]
        assert checkpoint.mapped("f").data_ptr() % 4 == 0


def test_a_view_outlives_close(tmp_path: Path) -> None:
    save_file({"t": torch.ones(3)}, tmp_path / "x.safetensors")
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    view: Tensor = checkpoint.mapped("t")
    checkpoint.close()
    assert view.tolist() == [1, 1, 1]
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint.read("t")


def test_shards(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    for given in (index, tmp_path, shards):
        with open_checkpoint(given) as checkpoint:
            assert set(checkpoint.names) == {"a", "b.c"} and checkpoint.files == tuple(shards)
            assert torch.equal(checkpoint.read("a"), TENSORS["a"])
            assert "1 more" in checkpoint.label
    index.unlink()
    with open_checkpoint(tmp_path) as checkpoint:  # all shards are there: the index is not needed
        assert len(checkpoint) == 2


@pytest.mark.parametrize("name", ["model.safetensors", "model.fp16.safetensors", "x.sft"])
def test_a_folder_with_one_file(name: str, tmp_path: Path) -> None:
    save_file({"t": torch.ones(3)}, tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.files == (tmp_path / name,)


# what is missing or double ---------------------------------------------------------------------------------


def test_two_candidates_in_a_folder(tmp_path: Path) -> None:
    for name in ("model.safetensors", "model.fp16.safetensors"):
        save_file({"t": torch.ones(3)}, tmp_path / name)
    with pytest.raises(AmbiguousFileError, match=r"model\.fp16\.safetensors and model\.safetensors"):
        open_checkpoint(tmp_path)
    with open_checkpoint(tmp_path / "model.fp16.safetensors") as checkpoint:
        assert len(checkpoint) == 1


def test_an_index_beside_a_single_file(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"t": torch.ones(3)}, tmp_path / "m.safetensors")
    with pytest.raises(AmbiguousFileError, match=r"index\.json and m\.safetensors"):
        open_checkpoint(tmp_path)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="does not exist"):
        open_checkpoint(tmp_path / "x.safetensors")
    with pytest.raises(MissingFileError, match=r"no \.safetensors or \.gguf file"):
        open_checkpoint(tmp_path)
    with pytest.raises(MissingFileError, match="no checkpoint"):
        open_checkpoint([])
    (tmp_path / "model.bin").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"model\.bin is a text file"):  # the only one: it is opened
        open_checkpoint(tmp_path)


def test_a_missing_shard(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    (tmp_path / "m-00002-of-00002.safetensors").unlink()
    for given in (index, tmp_path):
        with pytest.raises(MissingFileError, match="m-00002-of-00002"):
            open_checkpoint(given)
    index.unlink()
    with pytest.raises(MissingFileError, match="shard 2 of 2"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("listed", "says"),
    [
        ({"a": "m-00001-of-00002.safetensors"}, None),  # fine: one shard is simply not part of it
        ({"a": "m-00001-of-00002.safetensors", "z": "m-00001-of-00002.safetensors"}, "'z'.*does not hold"),
        ({"z": "m-00001-of-00002.safetensors"}, "does not hold"),
        ({"a": "m-00002-of-00002.safetensors"}, "does not hold"),
        ({"a": "../m-00001-of-00002.safetensors"}, "a file beside the index"),
        ({"a": 3}, "no weight_map"),
        ({"a": "x" * 300}, "a file beside the index"),
        ({"a": "x\0y"}, "a file beside the index"),
    ],
)
def test_an_index_that_does_not_fit(listed: dict[str, Any], says: str | None, tmp_path: Path) -> None:
    index = sharded(tmp_path, listed)
    if says is None:
        open_checkpoint(index).close()
        return
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(index)


def test_a_shard_with_a_tensor_that_the_index_lacks(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    save_file({"a": TENSORS["a"], "more": torch.ones(1)}, tmp_path / "m-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"'more'.*does not list"):
        open_checkpoint(index)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    """Each is answered at once, by an error of ours."""
    os.mkfifo(tmp_path / "pipe.safetensors")
    os.mkfifo(tmp_path / "m.safetensors.index.json")
    for name, says in {
        "pipe.safetensors": "no regular file",
        "m.safetensors.index.json": "no regular file",
        "x" * 300: "cannot be read",
        "a\0b": "cannot be read",
        "nowhere/x.gguf": "does not exist",
    }.items():
        with pytest.raises((CheckpointError, MissingFileError), match=says):
            open_checkpoint(tmp_path / name)
    with pytest.raises(CheckpointError, match="no regular file"):
        open_checkpoint("/dev/zero")


def test_shards_that_cannot_be_counted(tmp_path: Path) -> None:
    save_file({"t": torch.ones(3)}, tmp_path / f"m-00001-of-{'9' * 30}.safetensors")
    with pytest.raises(MissingFileError, match="shard 2, 3, 4 of 999"):
        open_checkpoint(tmp_path)


def test_an_index_without_end(tmp_path: Path) -> None:
    index = tmp_path / "m.safetensors.index.json"
    with index.open("wb") as file:
        file.truncate(2**33)  # a hole: it takes no room
    with pytest.raises(CheckpointError, match="no shard index is"):
        open_checkpoint(index)


def test_two_files_with_one_tensor(tmp_path: Path) -> None:
    for name in ("x.safetensors", "y.safetensors"):
        save_file({"t": torch.ones(3)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"x\.safetensors and .*y\.safetensors both hold 't'"):
        open_checkpoint([tmp_path / "x.safetensors", tmp_path / "y.safetensors"])


# what is damaged or something else -------------------------------------------------------------------------

OTHER_FILES = {
    "empty": (b"", "is empty"),
    "short": (b"\x10\0\0", "truncated"),
    "zeros": (bytes(5000), "zeros"),
    "text": (b"The weights are elsewhere, sorry. " * 9, "text file"),
    "web page": (b"<!DOCTYPE html><html><body>404</body></html>" * 3, "text file"),
    "text of another country": ("Страница не найдена. ".encode() * 9, "text file"),
    "text with a mark": (b"\xef\xbb\xbf" + b"<html>" * 20, "text file"),
    "pickle": (b"PK\x03\x04" + bytes(range(200)), "pickle"),
    "old pickle": (b"\x80\x02" + bytes(range(200)), "pickle"),
    "gguf": (b"GGUF\3\0\0\0" + bytes(range(200)), "damaged GGUF"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS"),
    "noise": (random.Random(0).randbytes(4000), "no safetensors"),
}


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_other_files_are_named(kind: str, tmp_path: Path) -> None:
    content, says = OTHER_FILES[kind]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=says) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("number", "word"), [(99, "unknown"), (9, "Q8_1"), (33, "Q4_0_8_8")])
def test_a_gguf_type_that_is_not_read(number: int, word: str, tmp_path: Path) -> None:
    """Named with what would be, each once; before the tensors behind it are looked at."""
    described = [
        helpers_gguf.Described("odd", (1,), number, b""),
        helpers_gguf.Described("x", (2**40,), 0, b""),
    ]
    path = helpers_gguf.File(described).write(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    said, _, listed = str(caught.value).partition("; supported are ")
    assert said == f"{path}: 'odd' has the GGML type {number} ({word}), which is not read"
    assert len(set(listed.split(", "))) == len(listed.split(", "))
    assert {"F32", "Q4_0", "Q4_K", "Q6_K", "IQ4_XS", "TQ2_0"} <= set(listed.split(", "))


HEADERS: dict[str, tuple[Any, bytes, str]] = {
    "not JSON": (b'{"a": ', b"", "JSON"),
    "nested too deeply": (b'{"a":' + b"[" * 100_000, b"", "JSON"),
    "a number of many digits": (b'{"a":' + b"9" * 10_000 + b"}", b"", "JSON"),
    "not UTF-8": (b'{"\xff": 1}', b"", "JSON"),
    "a list": (b"[1, 2]  ", b"", "no safetensors|text"),
    "a name twice": (b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"a":3}', b"\0", "'a' twice"),
    "an entry that is none": ({"a": 3}, b"", "'a'"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, bytes(4), "'a'"),
    "an unknown type": ({"a": entry("F7")}, bytes(4), "'F7'"),
    "a negative size": ({"a": entry(shape=(-1,), offsets=(0, -4))}, bytes(4), "'a'"),
    "a fractional size": ({"a": entry(shape=(1.0,))}, bytes(4), "'a'"),
    "a truth value as size": ({"a": entry(shape=(True,))}, bytes(4), "'a'"),
    "too many dimensions": ({"a": entry(shape=(1,) * 99)}, bytes(4), "'a'"),
    "a size that overflows": ({"a": entry(shape=(2**33, 2**33), offsets=(0, 4))}, bytes(4), "counted"),
    "a size that overflows beside a zero": ({"a": entry(shape=(0, 2**62), offsets=(0, 0))}, b"", "counted"),
    "a size of many digits": ({"a": entry(shape=(10**4000,) * 8, offsets=(0, 4))}, bytes(4), "'a'"),
    "a name without end": ({"a" * 2000: entry()}, bytes(4), "no name"),
    "a name of two lines": ({"a\nb": entry()}, bytes(4), "no name"),
    "half a character as name": (
        b'{"\\ud800":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}',
        b"\0",
        "no name",
    ),
    "entries without end": (b'{"a": [' + b"0," * 300_000 + b"0]}", b"", "entries"),
    "another length than the shape's": ({"a": entry(shape=(2,))}, bytes(4), "needs 8"),
    "an end before the start": ({"a": entry(offsets=(4, 0))}, bytes(4), "needs 4"),
    "an end behind the file": ({"a": entry(shape=(2,), offsets=(0, 8))}, bytes(4), "truncated"),
    "an end far behind the file": ({"a": entry(shape=(2**40,), offsets=(0, 2**42))}, bytes(4), "truncated"),
    "an overlap": ({"a": entry(), "b": entry(offsets=(2, 6))}, bytes(6), "'b' overlaps 'a'"),
    "one place for two": ({"a": entry(), "b": entry()}, bytes(4), "overlaps"),
    "a hole": ({"a": entry(), "b": entry(offsets=(8, 12))}, bytes(12), "hole"),
    "bytes at the end": ({"a": entry()}, bytes(9), "5 bytes follow"),
    "metadata that is none": ({"__metadata__": 3, "a": entry()}, bytes(4), "__metadata__"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_lying_headers_are_refused(kind: str, tmp_path: Path) -> None:
    header, data, says = HEADERS[kind]
    path = write(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError, match=says) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("length", [0, 1, 10**6, 2**63, 2**64 - 1])
def test_a_header_length_that_lies(length: int, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        open_checkpoint(write(tmp_path / "x.safetensors", {"a": entry()}, bytes(4), length=length))


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    path = tmp_path / "x.safetensors"
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(CheckpointError):
            open_checkpoint(path)


def test_a_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"t": torch.ones(1000)}, path)
    checkpoint = open_checkpoint(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="shorter"):
        checkpoint.read("t")

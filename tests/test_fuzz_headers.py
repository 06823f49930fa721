"""Thousands of damaged files of each container: a sentence or a readable file, quickly and without waste."""

from __future__ import annotations

import json
import random
import struct
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import helpers_gguf as write
import pytest
import torch
from safetensors.torch import save

from flux_sd.checkpoint import open_checkpoint
from flux_sd.errors import FluxSdError
from flux_sd.sniff import sniff

CASES = 2000
SLOWEST = 1.0  # seconds of one case; they take a thousandth of it
EXPANSION = 21  # a file of IQ1_S grows 20.5 times when it is decoded to float32
OVERHEAD = 2**20  # bytes of Python objects for a file of a few hundred bytes
NUMBERS = (0, 1, 2, 3, 8, 24, 31, 33, 255, 2**16, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)
Mutation = Callable[
    [random.Random, bytearray, int], None
]  # (source of chance, the file, bytes of its header)


def flip(draw: random.Random, file: bytearray, header: int) -> None:
    for _ in range(draw.randint(1, 4)):
        file[draw.randrange(header)] = draw.randrange(256)


def respell(draw: random.Random, file: bytearray, header: int) -> None:
    """Characters that mean something in JSON."""
    for _ in range(draw.randint(1, 3)):
        file[draw.randrange(header)] = draw.choice(b'0123456789"[]{},:-.eFUI\\ \0\xff')


def cut(draw: random.Random, file: bytearray, header: int) -> None:
    del file[draw.randrange(len(file)) :]


def delete(draw: random.Random, file: bytearray, header: int) -> None:
    start = draw.randrange(header)
    del file[start : start + draw.randint(1, 20)]


def repeat(draw: random.Random, file: bytearray, header: int) -> None:
    start = draw.randrange(header)
    file[start:start] = file[start : start + draw.randint(1, 60)]


def exchange(draw: random.Random, file: bytearray, header: int) -> None:
    a, b, size = draw.randrange(header), draw.randrange(header), draw.randint(1, 16)
    file[a : a + size], file[b : b + size] = file[b : b + size], file[a : a + size]


def count(draw: random.Random, file: bytearray, header: int) -> None:
    """An extreme number where a count, a length or an offset may be."""
    form = draw.choice(("<I", "<Q"))
    start = draw.randrange(0, header, draw.choice((1, 4)))
    number = draw.choice(NUMBERS) % 2 ** (8 * struct.calcsize(form))
    file[start : start + struct.calcsize(form)] = struct.pack(form, number)


def restate(draw: random.Random, file: bytearray, header: int) -> None:
    """Valid JSON of the right length that says something else about one tensor."""
    try:
        content = json.loads(bytes(file[8:header]))
    except ValueError:
        return  # an earlier mutation left no JSON
    entries = [entry for entry in content.values() if entry and isinstance(entry, dict)]
    if not entries:
        return
    entry = draw.choice(entries)
    field = draw.choice(sorted(entry))
    number = draw.choice((*NUMBERS, -1, 1.0, 10**4299, True, None, "1", []))
    if isinstance(entry[field], list) and entry[field] and draw.random() < 0.8:
        entry[field][draw.randrange(len(entry[field]))] = number
    else:
        entry[field] = draw.choice(("F32", "F8_E4M3", "U8", "I64", "BOOL", "F4", [], [2, 3], [0, 24], number))
    text = json.dumps(content).encode()
    file[:header] = struct.pack("<Q", len(text)) + text


def safetensors_files() -> list[tuple[bytes, int]]:
    """(file, bytes of its header): plain types, metadata, and an fp8 file with scales and a configuration."""
    config = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    states = (
        {"a.weight": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.tensor(7)},
        {"x.weight": torch.ones(2, 3).to(torch.float8_e4m3fn), "x.weight_scale": torch.ones(2),
         "x.comfy_quant": config,
         "x.input_scale": torch.ones(())},
    )  # fmt: skip
    layers = json.dumps({"layers": {"x": {"format": "float8_e4m3fn"}}})
    files = [
        save(states[0]),
        save(states[0], {"made by": "a test"}),
        save(states[1], {"_quantization_metadata": layers}),
    ]
    return [(file, 8 + struct.unpack("<Q", file[:8])[0]) for file in files]


def gguf_files() -> list[tuple[bytes, int]]:
    """(file, bytes of its header): without metadata, with many kinds of values, and aligned to 64."""
    tensors = [
        write.float32("a.weight", *range(6), sizes=(3, 2)),
        write.Described("q.weight", (32, 3), 8, bytes(102)),
        write.Described("k.weight", (256, 9), 12, bytes(9 * 144)),
        write.Described("h", (4,), 30, bytes(8)),
        write.Described("scalar", (), 26, bytes(4)),
    ]
    shape = write.pair("comfy.gguf.orig_shape.k.weight", write.ARRAY, (write.I32, [16, 16, 3, 3]))
    values = [
        write.pair("general.architecture", write.STRING, "flux"),
        write.pair("general.file_type", write.U32, 7),
        write.pair("numbers", write.ARRAY, (write.F32, [1.0] * 9)),
        write.pair("words", write.ARRAY, (write.STRING, ["one", "", "three"])),
        write.pair("yes", write.BOOL, True),
        write.pair("wide", write.F64, 0.5),
    ]
    aligned = [shape, write.pair("general.alignment", write.U32, 64)]
    files = [
        write.File(tensors, version=2),
        write.File(tensors, [*values, shape]),
        write.File(tensors, aligned, alignment=64),
    ]
    return [(file.content(), len(file.header())) for file in files]


def examine(path: Path, size: int) -> None:
    """Opens a file and reads all of it, as far as it is a checkpoint. Raises FluxSdError for what is none."""
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.total_bytes <= size
        for name, info in checkpoint.infos.items():
            assert 0 <= info.offset and info.offset + info.nbytes <= size, name
            values = checkpoint.read(name)
            assert values.shape == info.shape and values.numel() == info.numel, name
            assert values.numel() * values.itemsize <= EXPANSION * max(size, 1), name
            assert checkpoint.mapped(name).nbytes == info.nbytes, name
            checkpoint.scale(name)
        checkpoint.gguf_metadata(["words", "numbers"])
        sniff(checkpoint)


def fuzz(
    path: Path, files: Sequence[tuple[bytes, int]], mutations: Sequence[Mutation], seed: int
) -> tuple[int, int]:
    """(refused, readable) of CASES mutations; every case is short, small and ends in one of the two."""
    draw = random.Random(seed)
    outcomes = [0, 0]
    tracemalloc.start()
    disk = path.open("wb", buffering=0)  # one file for all: truncating a file to nothing waits for the disk
    try:
        for i in range(CASES):
            whole, header = files[i % len(files)]
            file = bytearray(whole)
            for _ in range(draw.choice((1, 1, 1, 2))):
                draw.choice(mutations)(draw, file, min(header, len(file) - 1) or 1)
                if len(file) < 2:
                    break
            disk.seek(0)
            disk.write(file)
            disk.truncate()
            tracemalloc.reset_peak()
            before, started = tracemalloc.get_traced_memory()[0], time.process_time()
            try:
                examine(path, len(file))
                outcomes[1] += 1
            except FluxSdError as error:
                outcomes[0] += 1
                assert "\n" not in str(error) and len(str(error)) < 2000, str(error)
            assert time.process_time() - started < SLOWEST, f"case {i} of seed {seed}"
            assert tracemalloc.get_traced_memory()[1] - before < OVERHEAD, f"case {i} of seed {seed}"
    finally:
        disk.close()
        tracemalloc.stop()
    return outcomes[0], outcomes[1]


BINARY: tuple[Mutation, ...] = (flip, cut, delete, repeat, exchange, count)


@pytest.mark.parametrize("seed", [1])
def test_damaged_safetensors(seed: int, tmp_path: Path) -> None:
    mutations = (*BINARY, respell, respell, restate, restate, restate)
    refused, readable = fuzz(tmp_path / "x.safetensors", safetensors_files(), mutations, seed)
    assert refused + readable == CASES and refused > CASES // 2 and readable > CASES // 50


@pytest.mark.parametrize("seed", [2])
def test_damaged_gguf(seed: int, tmp_path: Path) -> None:
    refused, readable = fuzz(tmp_path / "x.gguf", gguf_files(), (*BINARY, count, count), seed)
    assert refused + readable == CASES and refused > CASES // 2 and readable > CASES // 50


def test_damaged_shard_indexes(tmp_path: Path) -> None:
    """The index is the third thing that is read before any tensor; there are two shards beside it."""
    shards = {f"m-0000{i}-of-00002.safetensors": f"t{i}" for i in (1, 2)}
    for file, name in shards.items():
        (tmp_path / file).write_bytes(save({name: torch.ones(2)}))
    index = tmp_path / "m.safetensors.index.json"
    table = {"metadata": {"total_size": 16}, "weight_map": {name: file for file, name in shards.items()}}
    whole, draw, outcomes = json.dumps(table).encode(), random.Random(3), [0, 0]
    index.write_bytes(whole)
    open_checkpoint(index).close()
    with index.open("wb", buffering=0) as disk:
        for _ in range(CASES // 4):
            changed = bytearray(whole)
            draw.choice((flip, cut, delete, repeat, exchange, respell))(draw, changed, len(whole) - 1)
            disk.seek(0)
            disk.write(changed)
            disk.truncate()
            try:
                open_checkpoint(index).close()
                outcomes[1] += 1
            except FluxSdError as error:
                outcomes[0] += 1
                assert "\n" not in str(error)
    assert outcomes[0] > CASES // 8 and outcomes[1] > 0


def test_the_undamaged_files_are_readable(tmp_path: Path) -> None:
    for suffix, files in ((".safetensors", safetensors_files()), (".gguf", gguf_files())):
        for content, _ in files:
            (tmp_path / f"x{suffix}").write_bytes(content)
            examine(tmp_path / f"x{suffix}", len(content))

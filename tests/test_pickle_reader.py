"""pickle_reader.py: torch's own files are read without running anything in them, whatever is in them."""

from __future__ import annotations

import json
import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flux_sd.checkpoint import open_checkpoint
from flux_sd.errors import AmbiguousFileError, CheckpointError, FluxSdError

State = dict[str, Tensor]
CALLBACK = "pytorch_lightning.callbacks.model_checkpoint"
OLD = {"_use_new_zipfile_serialization": False}


def tensors() -> State:
    """Of every kind that stands in a checkpoint; two share their storage."""
    generator = torch.Generator().manual_seed(0)
    grid = torch.randn(6, 5, generator=generator)
    return {
        "grid": grid,
        "turned": grid.t(),
        "rows": grid[2:4],
        "columns": grid[:, 1:3],
        "repeated": torch.randn(1, 4, generator=generator).expand(3, 4),
        "half": torch.randn(7, generator=generator).half(),
        "brain": torch.randn(2, 2, 1, 1, generator=generator).bfloat16(),
        "parameter": nn.Parameter(torch.randn(3, generator=generator)),
        "numbers": torch.arange(77)[None],
        "single": torch.tensor(0.5),
        "empty": torch.empty(0, 3),
    }


def saved(path: Path, content: object, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


# what is read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("key", [None, "state_dict", "model", "module", "params", "params_ema"])
def test_values_come_back_as_torch_has_them(key: str | None, options: dict[str, Any], tmp_path: Path) -> None:
    """Views with strides, shared storages and every number type, under whatever programs put them under."""
    state = tensors()
    content = state if key is None else {"epoch": 3, key: state}
    with open_checkpoint(saved(tmp_path / "m.ckpt", content, **options)) as checkpoint:
        assert set(checkpoint.names) == state.keys()
        for name, tensor in state.items():
            info, found = checkpoint.info(name), checkpoint.read(name)
            assert found.dtype == tensor.dtype and info.nbytes == tensor.numel() * tensor.itemsize
            assert info.shape == tuple(tensor.shape) and torch.equal(found, tensor), name


@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "before torch 1.6"])
def test_a_piece_is_read_from_anywhere(options: dict[str, Any], tmp_path: Path) -> None:
    state = tensors()
    with open_checkpoint(saved(tmp_path / "m.ckpt", state, **options)) as checkpoint:
        for name in ("grid", "turned", "repeated"):
            out = torch.empty(5)
            checkpoint.copy_into(name, out, start=4)
            assert torch.equal(out, state[name].flatten()[4:9]), name


def test_what_lies_in_the_file_as_it_is_is_read_from_there(tmp_path: Path) -> None:
    """A large file is mapped, not loaded: only what a view makes of a tensor is taken from torch."""
    path = saved(tmp_path / "m.ckpt", tensors())
    with open_checkpoint(path) as checkpoint:
        content = path.read_bytes()
        for name, tensor in tensors().items():
            info = checkpoint.info(name)
            if tensor.is_contiguous() and tensor.numel():
                stored = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=info.offset)
                assert torch.equal(stored[: info.nbytes], checkpoint.mapped(name).flatten().view(torch.uint8))
            else:
                assert name in {"turned", "columns", "repeated", "empty"}


def test_an_ordered_table_with_other_things_beside_the_tensors(tmp_path: Path) -> None:
    content = OrderedDict(a=torch.ones(2), n=3, names=["x"], inner={"b": torch.ones(1)})
    with open_checkpoint(saved(tmp_path / "m.bin", content)) as checkpoint:
        assert checkpoint.names == ("a",)


def test_the_training_step_is_metadata(tmp_path: Path) -> None:
    for step, expected in ((875000, {"global_step": "875000"}), ("875000", {}), (None, {})):
        content = {"global_step": step, "state_dict": {"a": torch.ones(1)}}
        with open_checkpoint(saved(tmp_path / "m.ckpt", content)) as checkpoint:
            assert checkpoint.metadata == expected


def test_the_settings_that_stable_diffusion_1_has_beside_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first files have a class of PyTorch Lightning as a key, which is not installed here."""
    kind = type("ModelCheckpoint", (), {"__module__": CALLBACK})
    module = ModuleType(CALLBACK)
    module.ModelCheckpoint = kind  # type: ignore[attr-defined]
    for name in (CALLBACK, "pytorch_lightning.callbacks", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, module)
    content = {"callbacks": {kind: {"monitor": "val/loss"}}, "state_dict": {"a": torch.ones(2)}}
    saved(tmp_path / "m.ckpt", content)
    monkeypatch.undo()
    assert CALLBACK not in sys.modules
    with open_checkpoint(tmp_path / "m.ckpt") as checkpoint:
        assert checkpoint.names == ("a",)


def test_safetensors_go_before_pickles_in_a_folder(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    saved(tmp_path / "diffusion_pytorch_model.bin", {"a": torch.zeros(2)})
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.files == (tmp_path / "diffusion_pytorch_model.bin",)
    save_file({"a": torch.ones(2)}, tmp_path / "diffusion_pytorch_model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        assert torch.equal(checkpoint.read("a"), torch.ones(2))
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    saved(tmp_path / "other.ckpt", {"a": torch.zeros(2)})
    with pytest.raises(AmbiguousFileError, match=r"diffusion_pytorch_model.bin and other.ckpt"):
        open_checkpoint(tmp_path)


def test_pickles_in_shards(tmp_path: Path) -> None:
    """As old repositories have large models."""
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    for name, key in zip(names, "ab", strict=True):
        saved(tmp_path / name, {key: torch.full((2,), float(ord(key)))})
    index = {"metadata": {}, "weight_map": dict(zip("ab", names, strict=True))}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.names == ("a", "b") and checkpoint.read("b").tolist() == [98.0, 98.0]


# what is refused -------------------------------------------------------------------------------------------


class Runs:
    """A pickle that calls a function when it is read in the ordinary way."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def refused(path: Path) -> str:
    """The one sentence with which a file is refused."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    said = str(caught.value)
    assert said.startswith(str(path)) and said.isprintable() and len(said) < 400 + len(str(path))
    assert "weights_only" not in said  # torch's own advice is to switch the guard off
    return said


@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("place", ["beside", "under the tensors", "as a key", "as the whole"])
def test_code_is_refused_by_name_and_does_not_run(
    place: str, options: dict[str, Any], tmp_path: Path
) -> None:
    mark = tmp_path / "ran"
    evil: Any = Runs(os.mkdir, str(mark))
    contents: dict[str, object] = {
        "beside": {"state_dict": {"a": torch.ones(1)}, "extra": evil},
        "under the tensors": {"state_dict": {"a": torch.ones(1), "b": evil}},
        "as a key": {evil: 1, "state_dict": {"a": torch.ones(1)}},
        "as the whole": evil,
    }
    path = saved(tmp_path / "m.ckpt", contents[place], **options)
    assert (
        "asks for posix.mkdir, which is refused: it could run code; give the model as .safetensors"
        in refused(path).replace("nt.mkdir", "posix.mkdir")
    )
    assert not mark.exists()
    torch.load(path, weights_only=False)  # what it would have done
    assert mark.is_dir()


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (eval, ("1",), "eval"),
        (getattr, ("x", "upper"), "getattr"),
        (torch.load, ("x",), "torch.serialization.load"),
        (pickle.loads, (b"N.",), "pickle.loads"),
    ],
)
def test_other_ways_to_code_are_refused(
    function: Callable[..., object], arguments: tuple[object, ...], name: str, tmp_path: Path
) -> None:
    path = saved(tmp_path / "m.pt", {"a": torch.ones(1), "b": Runs(function, *arguments)})
    assert f"asks for {name}, which is refused" in refused(path)


def test_objects_are_refused_by_their_class(tmp_path: Path) -> None:
    """A whole module, as some programs save it, is code."""
    assert "asks for torch.nn.modules.linear.Linear" in refused(saved(tmp_path / "m.pt", nn.Linear(2, 2)))


def test_a_pickle_that_torch_did_not_write(tmp_path: Path) -> None:
    for protocol in (2, 4, 5):
        (tmp_path / "m.ckpt").write_bytes(pickle.dumps({"a": [1.0]}, protocol))
        assert "is a pickle, which can run code" in refused(tmp_path / "m.ckpt")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([1, 2], "no table of tensors"),
        ({}, "no table of tensors"),
        ({"state_dict": {"model": {"a": torch.ones(1)}}}, "no table of tensors"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "complex64: plain numbers were expected"),
        ({"a": torch.ones(2, 2).to_sparse()}, "sparse_coo of torch.float32: plain numbers were expected"),
        ({"a\nb": torch.ones(1)}, "is no name"),
        ({"x" * 300: torch.ones(1)}, "is no name"),
        ({"\x1b[2J": torch.ones(1)}, "is no name"),
        ({"a": torch.ones(1).expand(2**31, 2**31)}, "more elements than can be counted"),
    ],
)
def test_tensors_that_are_none_of_a_model(content: object, says: str, tmp_path: Path) -> None:
    assert says in refused(saved(tmp_path / "m.ckpt", content))


def test_a_view_larger_than_memory_is_described_and_not_made(tmp_path: Path) -> None:
    """4 TB of one number: whoever asks for its shape gets it, and no plan for a network has such a shape."""
    path = saved(tmp_path / "m.ckpt", {"a": torch.ones(1).expand(2**20, 2**20)})
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.info("a").nbytes == 2**42


@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "before torch 1.6"])
def test_a_half_written_file_is_refused_wherever_it_ends(options: dict[str, Any], tmp_path: Path) -> None:
    content = saved(tmp_path / "whole.ckpt", {"state_dict": tensors()}, **options).read_bytes()
    path = tmp_path / "m.ckpt"
    for end in [*range(20, len(content), len(content) // 40), len(content) - 1]:
        path.write_bytes(content[:end])
        said = refused(path)
        in_a_name = bool(options) and "asks for torch" in said  # cut where the pickle names a function
        assert in_a_name or ("truncated" in said and "download it again" in said), (end, said)


@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "before torch 1.6"])
def test_a_damaged_file_is_refused_or_read_as_long(options: dict[str, Any], tmp_path: Path) -> None:
    """Zeros in place of some bytes: values may suffer, which nothing tells; names and shapes may not."""
    state = tensors()
    content = saved(tmp_path / "whole.ckpt", {"state_dict": state}, **options).read_bytes()
    path, failures = tmp_path / "m.ckpt", 0
    for start in range(0, len(content), 61):
        path.write_bytes(content[:start] + bytes(len(content[start : start + 61])) + content[start + 61 :])
        try:
            with open_checkpoint(path) as checkpoint:
                for name in checkpoint.names:
                    assert checkpoint.read(name).numel() == checkpoint.info(name).numel
        except FluxSdError as error:
            failures += 1
            assert str(error).isprintable() and str(path) in str(error)
    assert failures > 10


def test_other_zips_are_no_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "x")
    assert "weights-only reader does not take" in refused(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02N." * 1000)
    assert "a compressed zip and no file of torch.save" in refused(path)

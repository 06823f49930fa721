"""tools/make_synthetic_gguf.py and measure_quantized.py: sane values, files that load, stages that run."""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import make_synthetic_gguf as synthetic
import measure_quantized as measuring
import pytest
import torch

from flux_sd.checkpoint import open_checkpoint
from flux_sd.checkpoint_writer import Entry
from flux_sd.ggml_types import GGML_TYPES
from flux_sd.gguf_dequant import VECTORISED, dequantize
from flux_sd.versions import SDVersion


@pytest.mark.parametrize("name", sorted(synthetic.SCALES))
def test_random_blocks_decode_to_the_deviation_asked_for(name: str) -> None:
    entry = Entry("a.weight", (512, 2048), name)
    worth = synthetic.worth_of(name)
    stored = torch.cat(list(synthetic.block_bytes(entry, 0.02, worth, seed=1)))
    assert stored.numel() == entry.nbytes
    values = dequantize(stored, name)
    assert values.isfinite().all()
    assert abs(values.std().item() / 0.02 - 1) <= 0.05
    assert abs(values.mean().item()) <= 0.05 * 0.02
    again = torch.cat(list(synthetic.block_bytes(entry, 0.02, worth, seed=1)))
    other = torch.cat(list(synthetic.block_bytes(entry, 0.02, worth, seed=2)))
    assert torch.equal(again, stored) and not torch.equal(other, stored)


def test_every_block_type_can_be_written() -> None:
    assert set(synthetic.SCALES) == {name for name in VECTORISED if GGML_TYPES[name].block > 1}


@pytest.mark.parametrize("component", sorted(synthetic.DIALECTS))
def test_the_file_is_what_the_gguf_package_reads(component: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    arguments = ["tiny-flux", str(path), "--component", component, "--type", "Q8_0"]
    assert synthetic.main([*arguments, "--depth", "1", "1", "--t5-layers", "1"]) == 0
    reader = gguf.GGUFReader(path)
    with open_checkpoint(path) as checkpoint:
        assert [tensor.name for tensor in reader.tensors] == list(checkpoint.names)
        for tensor in reader.tensors:
            info = checkpoint.info(tensor.name)
            assert (tensor.tensor_type.name, tuple(reversed(tensor.shape.tolist()))) == (
                info.dtype,
                info.shape,
            )
            assert tensor.data_offset == info.offset
            kept = tensor.name.startswith(("img_in", "txt_in", "time_in", "vector_in", "final_layer"))
            kept = kept or "rel_b" in tensor.name
            small = len(info.shape) < 2 or info.numel <= 1024
            assert info.dtype == ("F32" if small else "BF16" if kept else "Q8_0")
            values = checkpoint.read(tensor.name)
            assert values.isfinite().all() and values.any()


def test_a_file_of_zeros_takes_no_room(tmp_path: Path) -> None:
    path, full = tmp_path / "m.gguf", tmp_path / "full.gguf"
    config = SDVersion.TINY_FLUX.info.flux.transformer
    nbytes = synthetic.write_gguf("flux_mmdit", config, path, "Q8_0", seed=None)
    assert nbytes == path.stat().st_size == synthetic.write_gguf("flux_mmdit", config, full, "Q8_0")
    assert path.stat().st_blocks * 512 < nbytes / 10
    with open_checkpoint(path) as checkpoint:
        assert not checkpoint.read("single_blocks.0.linear1.weight").any()


def test_a_version_without_such_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert synthetic.main(["sd15", str(tmp_path / "m.gguf")]) == 2
    assert "sd15 is no FLUX model: choose" in capsys.readouterr().err


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_one_row_of_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A small model through the whole tool: the process of its own, the real loader, a step, the figures."""
    assert measuring.main([str(tmp_path), "--model", "tiny-flux", "--case", "transformer Q8_0"]) == 0
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith("| transformer Q8_0, float32 | 0.01 GB |")
    assert not (tmp_path / "tiny-flux-transformer-Q8_0.gguf").exists()


def test_decoding_is_what_is_timed() -> None:
    info = SDVersion.TINY_FLUX.info
    assert info.flux is not None
    rows = measuring.quantized.PackedRows(torch.zeros(4, 34, dtype=torch.uint8), "Q8_0", None, (4, 32))
    with measuring.decoding_time() as seconds:
        assert not rows.decode(torch.float32).any()
    assert len(seconds) == 1 and seconds[0] > 0
    rows.decode(torch.float32)
    assert len(seconds) == 1


def test_a_machine_without_room_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = SDVersion.parse("flux-dev").info
    case = measuring.Case("transformer", "Q8_0")
    monkeypatch.setattr(measuring, "available_memory", lambda device: 8_000_000_000)
    monkeypatch.setattr(measuring.shutil, "disk_usage", lambda folder: type("", (), {"free": 10**11}))
    assert (
        measuring.lacking(case, info, tmp_path) == "transformer Q8_0 needs 17 GB of memory, 8.0 GB are free"
    )
    monkeypatch.setattr(measuring.shutil, "disk_usage", lambda folder: type("", (), {"free": 10**9}))
    assert measuring.lacking(case, info, tmp_path) == "transformer Q8_0 needs 14 GB of disk, 1.0 GB are free"

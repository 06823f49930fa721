"""tools/measure_sd.py: true shapes and values through a whole generation, and the tool at a small size."""

from __future__ import annotations

import sys
from pathlib import Path

import measure_sd as measuring
import pytest

from flux_sd.versions import SDVersion

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
UNET_TENSORS = {"sd15": 686, "sdxl-turbo": 1680}


@pytest.mark.parametrize(
    ("key", "layout"), [("sd15", "ldm"), ("sd21", "ldm"), ("sdxl-turbo", "diffusers"), ("sdxl-turbo", "ldm")]
)
def test_a_small_model_through_a_whole_run(key: str, layout: str, tmp_path: Path) -> None:
    info = measuring.small(SDVersion.parse(key).info)
    path, size = measuring.write(info, tmp_path, layout)
    found = measuring.measure_here(info, path, layout, 64, "float32")
    assert found.finite and found.compared > 200 and found.dtype == "float32"
    assert set(found.seconds) >= set(measuring.STAGES) and found.file >= size


def test_one_row_of_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a process of its own, with files that are gone afterwards."""
    words = ["--model", "sd15", "--small", "--size", "64", "--dtype", "float32"]
    assert measuring.main([str(tmp_path), *words]) == 0
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith("| sd15, diffusers, float32 | 0.0") and row.count(" s |") == 4
    assert not list(tmp_path.iterdir())


def test_a_number_that_went_astray_is_noticed(tmp_path: Path) -> None:
    info = measuring.small(SDVersion.SD15.info)
    assert info.sd is not None
    path, _ = measuring.write(info, tmp_path, "diffusers")
    file = path / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    content = bytearray(file.read_bytes())
    content[-2:] = bytes([content[-2] ^ 1, content[-1]])  # the last number of the last tensor
    file.write_bytes(content)
    with pytest.raises(ValueError, match="does not hold the numbers that it was written from"):
        measuring.measure_here(info, path, "diffusers", 64, "float32")


@pytest.mark.slow
@pytest.mark.parametrize(("key", "layout"), [("sd15", "diffusers"), ("sdxl-turbo", "ldm")])
def test_a_released_size_with_values_runs_one_step(key: str, layout: str, tmp_path: Path) -> None:
    """2 and 7 GB of disk; each network is loaded for its stage and freed after it."""
    info = SDVersion.parse(key).info
    words = ["--model", key, "--layout", layout, "--dtype", "bfloat16"]
    found = measuring.measure(info, tmp_path, layout, words, keep=False)
    assert found.finite and found.compared == UNET_TENSORS[key]
    assert found.file > 2 * sum(info.parameters.values())
    largest = 2 * info.parameters["unet"]
    assert found.peak < 1.1 * largest + 1.2e9, found

"""The peak while loading: what stays, plus one tensor, plus a margin. File pages count (VmHWM has them)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import make_synthetic_checkpoint as synthetic
import pytest
from helpers_gguf import Described, File

from flux_sd.flux_mmdit import FluxConfig
from flux_sd.ggml_types import GGML_TYPES, row_bytes

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")

# case -> dialect, shard size as a share of the file, dtype to load in
CASES = {
    "stored type kept": ("bfl", None, "stored"),
    "bfloat16 to float32": ("bfl", None, "float32"),
    "sharded diffusers, fused tensors": ("diffusers", 0.4, "float32"),
}
# size -> hidden, double and single blocks, seed (None: zeros, a sparse file), margin in bytes.
SMALL = (1024, 2, 4, None, 120e6)  # 0.3 GB in bfloat16
FULL = (3072, 2, 2, None, 300e6)  # 2.05 GB, the true width


def peak(tmp_path: Path, case: str, size: tuple[int, int, int, int | None, float]) -> dict[str, float]:
    """Writes the file, loads it in a process of its own, returns what that measured."""
    dialect, share, dtype = CASES[case]
    config, seed = config_of(size), size[3]
    names = synthetic.build("flux_mmdit", config).state_dict().values()
    limit = None if share is None else int(share * sum(tensor.numel() for tensor in names) * 2)
    path = tmp_path / "model.safetensors"
    synthetic.write_component("flux_mmdit", config, dialect, path, "bf16", seed, limit)
    return measured(tmp_path, size, "--dtype", dtype)


def config_of(size: tuple[int, int, int, int | None, float]) -> FluxConfig:
    hidden, depth, single, _, _ = size
    shape = {"hidden_size": hidden, "num_heads": hidden // 128, "depth": depth, "depth_single_blocks": single}
    return replace(FluxConfig.schnell(), **shape)  # type: ignore[arg-type]


def measured(folder: Path, size: tuple[int, int, int, int | None, float], *options: str) -> dict[str, float]:
    """What tools/measure_load.py says of the transformer in a folder."""
    hidden, depth, single, _, _ = size
    shape = ["--hidden", str(hidden), "--depth", str(depth), str(single)]
    program = str(ROOT / "tools" / "measure_load.py")
    tool = [sys.executable, program, "flux_mmdit", str(folder), *shape, *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(tool, capture_output=True, text=True, check=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def packed_peak(
    tmp_path: Path, size: tuple[int, int, int, int | None, float], *options: str
) -> dict[str, float]:
    """The same for a GGUF in Q8_0: a file of zeros, which decode to zeros."""
    config = config_of(size)
    tensors, at = [], 0
    for name, tensor in synthetic.build("flux_mmdit", config).state_dict().items():
        kind = "Q8_0" if tensor.ndim == 2 else "F32"
        sizes = tuple(reversed(tensor.shape))
        tensors.append(Described(name, sizes, GGML_TYPES[kind].id, b"", at))
        at += -(-tensor.numel() // sizes[0] * row_bytes(kind, sizes[0]) // 32) * 32
    header = File(tensors).header()
    path = tmp_path / "model.gguf"
    with path.open("wb") as file:
        file.write(header)
        file.truncate(-(-len(header) // 32) * 32 + at)
    return measured(tmp_path, size, *options)


def assert_within(found: dict[str, float], margin: float) -> None:
    bound = found["kept"] + found["largest"] + margin
    assert found["peak"] <= bound, (
        f"{found['peak'] / 1e6:.0f} MB, at most {bound / 1e6:.0f} MB expected: {found}"
    )


@pytest.mark.parametrize("case", CASES)
def test_peak_of_a_small_load(case: str, tmp_path: Path) -> None:
    found = peak(tmp_path, case, SMALL)
    assert (
        found["file"] > 2.5 * SMALL[4] / 1.2
    )  # a forgotten release or a second copy cannot hide in the margin
    assert_within(found, SMALL[4])


def assert_stays_packed(found: dict[str, float], margin: float) -> None:
    """Nothing is copied while loading, no decoded weight stays, and afterwards the pages are given back."""
    assert found["kept"] < 1.01 * found["file"] and found["loaded"] < margin / 2, found
    assert 0.9 * found["file"] < found["peak"] < 1.1 * found["file"] + margin, found
    assert found["released"] < margin, found


def test_a_small_gguf_stays_packed(tmp_path: Path) -> None:
    found = packed_peak(tmp_path, SMALL, "--dtype", "float32", "--packed")
    assert 0.9 * found["file"] > SMALL[4]  # a second copy cannot hide in the margin
    assert_stays_packed(found, SMALL[4])


def test_peak_of_a_small_gguf_that_is_decoded(tmp_path: Path) -> None:
    assert_within(packed_peak(tmp_path, SMALL, "--dtype", "bfloat16"), SMALL[4])


@pytest.mark.slow
def test_a_gguf_of_two_gigabytes(tmp_path: Path) -> None:
    size = (3072, 4, 4, None, 300e6)
    found = packed_peak(tmp_path, size, "--dtype", "float32", "--packed")
    print(found)
    assert found["file"] > 2e9
    assert_stays_packed(found, size[4])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_peak_of_two_gigabytes(case: str, tmp_path: Path) -> None:
    found = peak(tmp_path, case, FULL)
    assert found["file"] > 2e9
    print(case, found)
    assert_within(found, FULL[4])

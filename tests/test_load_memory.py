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

from flux_sd.flux_mmdit import FluxConfig

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
    hidden, depth, single, seed, _ = size
    config = replace(
        FluxConfig.schnell(),
        hidden_size=hidden,
        num_heads=hidden // 128,
        depth=depth,
        depth_single_blocks=single,
    )
    names = synthetic.build("flux_mmdit", config).state_dict().values()
    limit = None if share is None else int(share * sum(tensor.numel() for tensor in names) * 2)
    path = tmp_path / "model.safetensors"
    synthetic.write_component("flux_mmdit", config, dialect, path, "bf16", seed, limit)
    options = ["--hidden", str(hidden), "--depth", str(depth), str(single), "--dtype", dtype]
    tool = [sys.executable, str(ROOT / "tools" / "measure_load.py"), "flux_mmdit", str(tmp_path), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(tool, capture_output=True, text=True, check=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout)
    return found


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


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_peak_of_two_gigabytes(case: str, tmp_path: Path) -> None:
    found = peak(tmp_path, case, FULL)
    assert found["file"] > 2e9
    print(case, found)
    assert_within(found, FULL[4])

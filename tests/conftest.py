"""What every test runs under (no network beyond loopback, few threads), and shared fixtures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from network_guard import no_outside_network  # noqa: F401  an autouse fixture: importing it is using it

import flux_sd

ROOT = Path(__file__).parent.parent
TINY_FLUX = ROOT / "flux_sd" / "models" / "tiny_flux"


def pytest_configure(config: pytest.Config) -> None:
    """One thread: tensors here are small, and threads that wait for each other beside other work on the
    machine take several times as long. Two for the slow tests, whose tensors are large. The same on a laptop
    and on a big server, so that sums come in the same order."""
    threads = min(2, torch.get_num_threads()) if config.getoption("markexpr") == "slow" else 1
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of the programs that tests start


@pytest.fixture(scope="session")
def hub_dir() -> Path:
    """The folder of released repositories without their weights; tests that need it are skipped without."""
    folder = os.environ.get("FLUX_SD_HUB_DIR")
    if not folder:
        pytest.skip("FLUX_SD_HUB_DIR is not set: a folder of released repositories (indexes and configs)")
    path = Path(folder)
    assert path.is_dir(), f"FLUX_SD_HUB_DIR={folder} is not a folder"
    return path


@pytest.fixture(scope="session")
def tiny_flux() -> Iterator[flux_sd.LoadedModel]:
    """The embedded model in float32 on the CPU, loaded once for all tests. Do not close it."""
    if not TINY_FLUX.is_dir():
        pytest.skip("flux_sd/models/tiny_flux is absent: train it with tools/train_tiny_flux.py")
    model = flux_sd.load_model("tiny-flux", device="cpu", dtype="float32", keep_loaded=True)
    yield model
    model.close()


@pytest.fixture(scope="session")
def tiny_sd() -> Iterator[flux_sd.LoadedModel]:
    """The embedded Stable Diffusion in float32 on the CPU, loaded once for all tests. Do not close it."""
    model = flux_sd.load_model("tiny-sd", device="cpu", dtype="float32", keep_loaded=True)
    yield model
    model.close()

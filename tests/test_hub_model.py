"""A model from the hub, end to end: downloaded from a server on loopback, loaded, painted with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers_flux import small_info, write_folder
from hub_server import HubServer
from safetensors.torch import load_file, save_file

from flux_sd import model_loader
from flux_sd.errors import OfflineError
from flux_sd.image import pixel_hash
from flux_sd.request import Event, GenerationRequest, Progress
from flux_sd.versions import _flux_files

REPO = "painters/small-flux"
REQUEST = GenerationRequest(prompt="a red kite", seed=3, steps=2)


@pytest.fixture
def row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A released-like repository, with the transformer twice, and a version that comes from it."""
    for name in ("FLUX_SD_OFFLINE", "HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    info = replace(small_info(), repo=REPO, hub_files=_flux_files("flux1-small.safetensors"))
    folder = write_folder(tmp_path / "hub" / REPO, info)
    (folder / "transformer").mkdir()
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"a second copy" * 1000)
    _shard(folder / "text_encoder_2")
    monkeypatch.setattr(model_loader, "_built", lambda _: info)
    return folder


def _shard(folder: Path) -> None:
    """The T5 in two shards and an index, as released."""
    tensors = load_file(folder / "model.safetensors")
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    home = {name: shards[i % 2] for i, name in enumerate(tensors)}
    for shard in shards:
        save_file({name: tensor for name, tensor in tensors.items() if home[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": home}))
    (folder / "model.safetensors").unlink()


def test_first_use_downloads_one_copy_of_each_and_later_uses_open_nothing(row: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    events: list[Event] = []
    with HubServer(tmp_path / "hub") as hub:
        first = model_loader.load_model(
            "flux-schnell",
            cache_dir=cache,
            endpoint=hub.url,
            device="cpu",
            dtype="float32",
            on_event=events.append,
        )
        assert not [name for name in hub.fetched() if name.startswith("transformer/")]
        assert "flux1-small.safetensors" in hub.fetched()
        downloads = [e for e in events if isinstance(e, Progress) and e.stage == "download"]
        assert downloads and downloads[-1].index == downloads[-1].total > 1_000_000
        hub.forget()
        again = model_loader.load_model(
            "flux-schnell", cache_dir=cache, endpoint=hub.url, device="cpu", dtype="float32"
        )
        assert hub.connections == 0 and not hub.requests
    local = model_loader.load_model("flux-schnell", path=_without_copy(row), device="cpu", dtype="float32")
    pictures = [model.generate(REQUEST)[0].image for model in (first, again, local)]
    assert len({pixel_hash(picture) for picture in pictures}) == 1


def _without_copy(folder: Path) -> Path:
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "transformer").rmdir()
    return folder


def test_offline_with_an_empty_cache_says_so_and_opens_nothing(row: Path, tmp_path: Path) -> None:
    with HubServer(tmp_path / "hub") as hub:
        with pytest.raises(OfflineError, match="offline switch is on"):
            model_loader.load_model(
                "flux-schnell", cache_dir=tmp_path / "cache", endpoint=hub.url, offline=True
            )
        assert hub.connections == 0

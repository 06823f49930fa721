"""A model from the hub, end to end: downloaded from a server on loopback, loaded, painted with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import helpers_headers as header
import helpers_sd
import pytest
from helpers_flux import small_info, write_folder
from hub_server import HubServer
from safetensors.torch import load_file, save_file

from flux_sd import model_loader
from flux_sd.errors import OfflineError
from flux_sd.image import pixel_hash
from flux_sd.request import Event, GenerationRequest, Progress
from flux_sd.versions import SDVersion, _flux_files

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
    monkeypatch.setattr(model_loader, "resolve_version", lambda *_: SimpleNamespace(info=info))
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


@pytest.mark.parametrize("version", [SDVersion.SD15, SDVersion.SDXL], ids=str)
def test_stable_diffusion_comes_in_half_precision_and_nothing_else_with_it(
    version: SDVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a repository with every format that the released ones have."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("FLUX_SD_OFFLINE", raising=False)
    info = replace(helpers_sd.small_info(version), repo="painters/small-sd")
    folder = helpers_sd.write_folder(tmp_path / "hub" / "painters" / "small-sd", info)
    for path in sorted(folder.rglob("*.safetensors")):
        (path.parent / "config.json").write_text("{}")
        tensors = {name: tensor.half() for name, tensor in load_file(path).items()}
        save_file(tensors, path.with_suffix(".fp16.safetensors"))
        for other in (".bin", ".non_ema.safetensors"):
            path.with_suffix(other).write_bytes(b"another copy" * 1000)
    (folder / "v1-5-pruned.ckpt").write_bytes(b"a third" * 1000)
    monkeypatch.setattr(model_loader, "resolve_version", lambda *_: SimpleNamespace(info=info))
    with HubServer(tmp_path / "hub") as hub:
        options: dict[str, Any] = {"cache_dir": tmp_path / "cache", "endpoint": hub.url, "dtype": "float32"}
        with model_loader.load_model(version, device="cpu", **options) as model:
            weights = {name for name in hub.fetched() if not name.endswith((".json", ".txt"))}
            folders = ["unet", "vae", "text_encoder", *(["text_encoder_2"] if info.is_xl else [])]
            assert {name.partition("/")[0] for name in weights} == set(folders)
            assert len(weights) == len(folders) and all(n.endswith(".fp16.safetensors") for n in weights)
            first = model.generate(replace(REQUEST, steps=1))[0]
        hub.forget()
        with model_loader.load_model(version, device="cpu", **options) as model:
            assert pixel_hash(model.generate(replace(REQUEST, steps=1))[0].image) == pixel_hash(first.image)
        assert hub.connections == 0


def test_files_of_ones_own_are_not_fetched_and_their_scheduler_is_not_the_released_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The released scheduler says what the released UNet predicts."""
    asked: list[set[str]] = []

    def fetch(repo: str, roles: dict[str, object], **options: object) -> Path:
        asked.append(set(roles))
        raise OfflineError("nothing is fetched here")

    monkeypatch.setattr(model_loader, "fetch", fetch)
    unet = header.safetensors(tmp_path / "u.safetensors", header.unet_ldm(768), "F16")
    vae = header.safetensors(tmp_path / "v.safetensors", header.layout("vae_sd"), "F16")
    own: tuple[dict[str, Any], ...] = ({}, {"vae": vae}, {"unet": unet}, {"unet": unet, "scheduler": vae})
    for given in own:
        with pytest.raises(OfflineError):
            model_loader.load_model("sd15", device="cpu", **given)
    every = set(SDVersion.SD15.info.hub_files)
    assert asked == [every, every - {"vae"}, every - {"unet", "scheduler"}, every - {"unet", "scheduler"}]

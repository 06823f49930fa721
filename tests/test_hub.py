"""flux_sd.hub against a hub-shaped server on loopback: real sockets, real huggingface_hub. About 8 s."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import HubServer
from network_guard import OutsideConnection, is_inside, no_outside_network  # noqa: F401

from flux_sd import hub
from flux_sd.errors import (
    Cancelled,
    DiskSpaceError,
    DownloadError,
    GatedRepositoryError,
    MissingFileError,
    OfflineError,
)
from flux_sd.request import CancelToken
from flux_sd.versions import SDVersion

REPO = "painters/flux-like"
SIZE = 6 * hub.CHUNK + 12_345  # bytes of the single-file transformer
ROLES = {
    "transformer": (
        ("flux1-dev.safetensors",),
        ("transformer/model.safetensors.index.json", "transformer/*-of-*"),
    ),
    "vae": (("ae.safetensors",), ("vae/diffusion_pytorch_model.safetensors",)),
    "t5": (("text_encoder_2/model.safetensors.index.json", "text_encoder_2/model-*-of-*.safetensors"),),
    "t5_tokenizer": (("tokenizer_2/spiece.model",), ("tokenizer_2/tokenizer.json",)),
}
PREFERRED = [
    "ae.safetensors",
    "flux1-dev.safetensors",
    "text_encoder_2/model-00001-of-00002.safetensors",
    "text_encoder_2/model-00002-of-00002.safetensors",
    "text_encoder_2/model.safetensors.index.json",
    "tokenizer_2/spiece.model",
]


def noise(count: int, name: str) -> bytes:
    """Bytes that differ from file to file and have no period that a wrong offset could hide in."""
    return hashlib.shake_128(name.encode()).digest(count)


def write_repository(folder: Path, files: dict[str, int]) -> None:
    """Files of the given sizes; a shard index names the shards beside it."""
    for name, size in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(noise(size, name))
    for index in folder.rglob("*.index.json"):
        shards = sorted(p.name for p in index.parent.glob("*-of-*.safetensors"))
        index.write_text(json.dumps({"weight_map": {f"tensor.{i}": shard for i, shard in enumerate(shards)}}))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A repository with the transformer and the autoencoder twice, as the released FLUX ones."""
    from huggingface_hub.utils import close_session  # type: ignore[attr-defined]

    for name in ("FLUX_SD_OFFLINE", "HF_HUB_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr(hub, "RETRY_WAIT", 0.01)
    write_repository(
        tmp_path / "repositories" / REPO,
        {
            "README.md": 300,
            "model_index.json": 50,
            "flux1-dev.safetensors": SIZE,
            "ae.safetensors": 5000,
            "transformer/model-00001-of-00002.safetensors": 4000,
            "transformer/model-00002-of-00002.safetensors": 4000,
            "transformer/model.safetensors.index.json": 0,
            "vae/diffusion_pytorch_model.safetensors": 5000,
            "text_encoder_2/model-00001-of-00002.safetensors": 3000,
            "text_encoder_2/model-00002-of-00002.safetensors": 3000,
            "text_encoder_2/model.safetensors.index.json": 0,
            "tokenizer_2/spiece.model": 500,
            "tokenizer_2/tokenizer.json": 600,
        },
    )
    close_session()  # one built in another test may carry that test's proxies
    with HubServer(tmp_path / "repositories") as running:
        yield running
    close_session()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def fetch(server: HubServer, cache: Path, **options: object) -> Path:
    return hub.fetch(REPO, ROLES, endpoint=server.url, cache_dir=cache, **options)  # type: ignore[arg-type]


def assert_same_files(server: HubServer, folder: Path) -> None:
    """Everything in the snapshot is byte for byte what the server holds, and it is exactly what is needed."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    assert names == PREFERRED
    for name in names:
        assert (folder / name).read_bytes() == (server.root / REPO / name).read_bytes(), name


def one_sentence(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text and len(text) < 600
    return text


def test_exactly_one_copy_of_each_component_is_fetched(server: HubServer, cache: Path) -> None:
    reports: list[tuple[int, int]] = []
    folder = fetch(server, cache, on_progress=lambda done, total: reports.append((done, total)))
    assert server.fetched() == PREFERRED
    assert_same_files(server, folder)
    total = sum((server.root / REPO / name).stat().st_size for name in PREFERRED)
    assert reports[-1] == (total, total)
    done = [now for now, _ in reports]
    assert done == sorted(done)
    assert max(after - before for before, after in itertools.pairwise(done)) <= hub.CHUNK
    # Other programs find it through the branch.
    assert (cache / "models--painters--flux-like" / "refs" / "main").read_text() == folder.name
    assert hub.role_paths(folder, ROLES) == {
        "transformer": folder / "flux1-dev.safetensors",
        "vae": folder / "ae.safetensors",
        "t5": folder / "text_encoder_2",
        "t5_tokenizer": folder / "tokenizer_2",
    }


def test_a_second_call_opens_no_connection(server: HubServer, cache: Path) -> None:
    folder = fetch(server, cache)
    server.forget()
    assert fetch(server, cache) == folder
    assert hub.cached(REPO, ROLES, cache) == folder
    assert (server.connections, server.requests) == (0, [])


def test_a_cache_filled_by_another_program_is_used_as_it_is(
    server: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants, snapshot_download

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)  # it would ask huggingface.co who we are
    diffusers = ["transformer/*", "vae/*", "text_encoder_2/*", "tokenizer_2/tokenizer.json"]
    folder = snapshot_download(REPO, allow_patterns=diffusers, endpoint=server.url, cache_dir=cache)
    server.forget()
    found = fetch(server, cache)
    assert found == Path(folder) and server.connections == 0
    assert hub.role_paths(found, ROLES)["transformer"] == found / "transformer"
    assert hub.role_paths(found, ROLES)["vae"] == found / "vae"


def test_a_broken_connection_is_taken_up_within_one_call(server: HubServer, cache: Path) -> None:
    server.break_after["flux1-dev.safetensors"] = [hub.CHUNK * 2 + 1000, hub.CHUNK + 7]
    assert_same_files(server, fetch(server, cache))
    gets = [r for r in server.requests if r.file == "flux1-dev.safetensors" and "/storage/" in r.path]
    assert [r.range for r in gets[:3]] == [None, f"bytes={2 * hub.CHUNK}-", f"bytes={3 * hub.CHUNK}-"]


def test_an_interrupted_download_resumes_in_the_next_call(server: HubServer, cache: Path) -> None:
    server.break_after["flux1-dev.safetensors"] = [4 * hub.CHUNK, *[0] * hub.ATTEMPTS]
    with pytest.raises(DownloadError, match=r"interrupted after .*: what has arrived is kept") as caught:
        fetch(server, cache)
    one_sentence(caught.value)
    assert type(caught.value) is DownloadError and caught.value.exit_code == 1
    assert hub.cached(REPO, ROLES, cache) is None
    state = hub.cache_state(REPO, ROLES, cache)
    assert state.state == "partial" and "transformer" in state.missing and state.bytes >= 4 * hub.CHUNK

    server.forget()
    reports: list[tuple[int, int]] = []
    folder = fetch(server, cache, on_progress=lambda done, total: reports.append((done, total)))
    assert_same_files(server, folder)
    assert server.sent["flux1-dev.safetensors"] == SIZE - 4 * hub.CHUNK
    assert reports[0][0] == 4 * hub.CHUNK and reports[-1][0] == reports[-1][1]
    assert not list(cache.rglob("*.incomplete"))


def test_a_server_that_ignores_ranges_does_not_damage_the_file(server: HubServer, cache: Path) -> None:
    server.break_after["flux1-dev.safetensors"] = [2 * hub.CHUNK]
    server.ignore_range = True
    reports: list[tuple[int, int]] = []
    assert_same_files(server, fetch(server, cache, on_progress=lambda *report: reports.append(report)))
    assert reports[-1][0] == reports[-1][1]


# a large file has a sha256, a small one its git blob id
@pytest.mark.parametrize("name", ["ae.safetensors", "text_encoder_2/model.safetensors.index.json"])
def test_damaged_bytes_are_noticed_and_discarded(server: HubServer, cache: Path, name: str) -> None:
    server.damaged.add(name)
    with pytest.raises(DownloadError, match=f"{re.escape(name)} of painters/flux-like arrived damaged"):
        fetch(server, cache)
    assert hub.cached(REPO, ROLES, cache) is None
    server.damaged.clear()
    assert_same_files(server, fetch(server, cache))


def test_a_damaged_unfinished_file_is_noticed(server: HubServer, cache: Path) -> None:
    server.break_after["flux1-dev.safetensors"] = [2 * hub.CHUNK, *[0] * hub.ATTEMPTS]
    with pytest.raises(DownloadError):
        fetch(server, cache)
    (unfinished,) = [path for path in cache.rglob("*.incomplete") if path.stat().st_size]
    unfinished.write_bytes(bytes(unfinished.stat().st_size))  # as a lost disk cache after a power cut
    with pytest.raises(DownloadError, match="damaged"):
        fetch(server, cache)
    assert_same_files(server, fetch(server, cache))


def test_too_little_space_is_refused_before_any_file(server: HubServer, cache: Path) -> None:
    server.announced["flux1-dev.safetensors"] = 10**15
    with pytest.raises(DiskSpaceError) as caught:
        fetch(server, cache)
    text = one_sentence(caught.value)
    assert "needs 1,000,000.0" in text and "GB free" in text and "HF_HOME" in text
    assert [(r.method, r.file) for r in server.requests] == [("GET", None)]  # the listing only
    assert caught.value.exit_code == 2


def test_what_is_cached_is_not_counted_against_the_disk(
    server: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.break_after["flux1-dev.safetensors"] = [5 * hub.CHUNK, *[0] * hub.ATTEMPTS]
    with pytest.raises(DownloadError):
        fetch(server, cache)
    done = sum(p.stat().st_size for p in cache.rglob("*") if p.is_file() and not p.is_symlink())
    left = sum((server.root / REPO / name).stat().st_size for name in PREFERRED) - done
    room = type("Usage", (), {"free": left - 1})
    monkeypatch.setattr("shutil.disk_usage", lambda path: room)
    with pytest.raises(DiskSpaceError):
        fetch(server, cache)
    room.free = left  # type: ignore[attr-defined]
    assert_same_files(server, fetch(server, cache))


@pytest.mark.parametrize("switch", ["argument", "FLUX_SD_OFFLINE", "HF_HUB_OFFLINE"])
def test_the_offline_switch_opens_nothing(
    server: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch, switch: str
) -> None:
    if switch != "argument":
        monkeypatch.setenv(switch, "1")
    with pytest.raises(OfflineError) as caught:
        fetch(server, cache, offline=switch == "argument")
    text = one_sentence(caught.value)
    assert "missing: transformer, vae, t5, t5_tokenizer" in text
    assert f'hf download {REPO} --include "flux1-dev.safetensors" --include "ae.safetensors"' in text
    assert server.connections == 0


def test_offline_with_a_full_cache_needs_nothing(server: HubServer, cache: Path) -> None:
    folder = fetch(server, cache)
    server.forget()
    assert fetch(server, cache, offline=True) == folder and server.connections == 0


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_repository_says_what_to_do(server: HubServer, cache: Path, status: int) -> None:
    server.gated[REPO] = status
    with pytest.raises(GatedRepositoryError) as caught:
        fetch(server, cache)
    text = one_sentence(caught.value)
    assert f"https://huggingface.co/{REPO}" in text and "hf auth login" in text and "HF_TOKEN" in text
    assert server.sent == {} and hub.cached(REPO, ROLES, cache) is None


def test_the_token_goes_to_the_hub_and_not_to_its_storage(server: HubServer, cache: Path) -> None:
    fetch(server, cache, token="hf_secret")
    sent = {("localhost" in r.host, r.authorization) for r in server.requests}
    assert sent == {(False, "Bearer hf_secret"), (True, None)}


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_token_is_told_as_gated(server: HubServer, cache: Path, status: int) -> None:
    server.status = status
    with pytest.raises(GatedRepositoryError):
        fetch(server, cache)


def test_an_unknown_repository_is_named(server: HubServer, cache: Path) -> None:
    with pytest.raises(DownloadError, match=r"knows no repository painters/unknown") as caught:
        hub.fetch("painters/unknown", ROLES, endpoint=server.url, cache_dir=cache)
    one_sentence(caught.value)


def test_a_repository_without_a_role_is_told_by_role(server: HubServer, cache: Path) -> None:
    for name in ("ae.safetensors", "vae/diffusion_pytorch_model.safetensors"):
        (server.root / REPO / name).unlink()
    expected = r"holds no vae: expected ae\.safetensors or vae/diffusion_pytorch_model\.safetensors"
    with pytest.raises(MissingFileError, match=expected):
        fetch(server, cache)
    assert server.fetched() == []


def test_no_network_is_one_sentence(server: HubServer, cache: Path) -> None:
    with HubServer(server.root) as other:
        closed = other.url
    with pytest.raises(OfflineError, match=r"gave no usable answer .*check the connection") as caught:
        hub.fetch(REPO, ROLES, endpoint=closed, cache_dir=cache)
    assert closed in one_sentence(caught.value)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_in_trouble_is_told(server: HubServer, cache: Path, status: int) -> None:
    server.status = status
    with pytest.raises(DownloadError, match=f"answered HTTP {status} .*try later; what has arrived"):
        fetch(server, cache)


def test_a_page_that_is_no_hub_is_told(server: HubServer, cache: Path) -> None:
    server.status = 200  # an empty page, as from a captive portal
    with pytest.raises(OfflineError, match="gave no usable answer"):
        fetch(server, cache)


def test_cancel_takes_effect_within_one_chunk(server: HubServer, cache: Path) -> None:
    token, reports = CancelToken(), []

    def on_progress(done: int, total: int) -> None:
        reports.append(done)
        if done > 5 * hub.CHUNK:
            token.cancel()

    with pytest.raises(Cancelled, match="running the same command again resumes") as caught:
        fetch(server, cache, cancel=token, on_progress=on_progress)
    assert caught.value.exit_code == 130
    assert reports[-1] <= 6 * hub.CHUNK and sum(done > 5 * hub.CHUNK for done in reports) == 1
    assert hub.cached(REPO, ROLES, cache) is None
    assert_same_files(server, fetch(server, cache))
    assert server.sent["flux1-dev.safetensors"] >= SIZE


def test_cancel_beforehand_opens_nothing(server: HubServer, cache: Path) -> None:
    token = CancelToken()
    token.cancel()
    with pytest.raises(Cancelled):
        fetch(server, cache, cancel=token)
    assert server.connections == 0


def test_cancel_does_not_wait_for_another_process(server: HubServer, cache: Path) -> None:
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    etag = hashlib.sha256((server.root / REPO / "flux1-dev.safetensors").read_bytes()).hexdigest()
    lock = cache / ".locks" / "models--painters--flux-like" / f"{etag}.lock"
    lock.parent.mkdir(parents=True)
    token, begin = CancelToken(), time.monotonic()
    timer = threading.Timer(0.2, token.cancel)
    timer.start()
    with WeakFileLock(lock), pytest.raises(Cancelled):
        fetch(server, cache, cancel=token)
    assert 0.2 <= time.monotonic() - begin < 5
    assert server.sent == {}


def test_unfinished_and_dangling_files_never_count(server: HubServer, cache: Path) -> None:
    folder = fetch(server, cache)
    assert hub.cache_state(REPO, ROLES, cache) == hub.CacheState(
        "complete", sum(p.stat().st_size for p in cache.rglob("blobs/*")) + len(folder.name), (), folder
    )
    blob = (folder / "flux1-dev.safetensors").resolve()
    blob.rename(blob.with_name(blob.name + ".incomplete"))
    assert hub.cached(REPO, ROLES, cache) is None
    assert hub.cache_state(REPO, ROLES, cache).missing == ("transformer",)


def test_a_sharded_role_needs_every_shard_of_its_index(server: HubServer, cache: Path) -> None:
    folder = fetch(server, cache)
    (folder / "text_encoder_2" / "model-00002-of-00002.safetensors").unlink()
    assert hub.cache_state(REPO, ROLES, cache).missing == ("t5",)
    server.forget()
    assert_same_files(server, fetch(server, cache))  # the blob is still there: nothing is sent again
    assert server.sent == {}


def test_an_index_that_names_absent_shards_is_an_error(server: HubServer, cache: Path) -> None:
    index = server.root / REPO / "text_encoder_2" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00003-of-00003.safetensors"}}))
    with pytest.raises(DownloadError, match="shard index of t5 cannot be read or names files"):
        fetch(server, cache)


def test_an_absent_repository_has_nothing(cache: Path) -> None:
    assert hub.cached(REPO, ROLES, cache) is None
    assert hub.cache_state(REPO, ROLES, cache) == hub.CacheState("absent", 0, tuple(ROLES), None)
    assert hub.cache_state(REPO, {}, cache).state == "absent"  # a version that names no files yet


def test_a_new_commit_reuses_the_files_that_did_not_change(server: HubServer, cache: Path) -> None:
    fetch(server, cache)
    (server.root / REPO / "ae.safetensors").write_bytes(noise(7000, "another"))
    roles = {**ROLES, "readme": (("README.md",),)}  # something new is needed, so the hub is asked
    server.forget()
    folder = hub.fetch(REPO, roles, endpoint=server.url, cache_dir=cache)
    assert (folder / "ae.safetensors").stat().st_size == 7000
    assert set(server.sent) == {"ae.safetensors", "README.md"}


def test_the_endpoint_and_the_cache_come_from_the_environment(server: HubServer, cache: Path) -> None:
    code = (
        "from flux_sd import hub\n"
        f"print(hub.fetch({REPO!r}, {ROLES!r}))\n"
        "import sys; assert 'hf_xet' not in sys.modules\n"
    )
    env = {**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_CACHE": str(cache)}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert_same_files(server, Path(run.stdout.strip()))
    assert run.stderr == ""
    assert all(REPO in request.path for request in server.requests)  # nothing but the repository is asked for


FLUX = [SDVersion.FLUX_DEV, SDVersion.FLUX_SCHNELL]
DIFFUSERS = "diffusion_pytorch_model"
RELEASED = [  # beside the single-file transformer
    *("ae.safetensors", "model_index.json", "scheduler/scheduler_config.json"),
    *("text_encoder/config.json", "text_encoder/model.safetensors"),
    *("text_encoder_2/config.json", "text_encoder_2/model.safetensors.index.json"),
    *(f"text_encoder_2/model-0000{i}-of-00002.safetensors" for i in (1, 2)),
    *(f"tokenizer/{name}" for name in ("vocab.json", "merges.txt", "tokenizer_config.json")),
    *(f"tokenizer_2/{name}" for name in ("spiece.model", "tokenizer.json", "tokenizer_config.json")),
    *("transformer/config.json", f"transformer/{DIFFUSERS}.safetensors.index.json"),
    *(f"transformer/{DIFFUSERS}-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
    *("vae/config.json", f"vae/{DIFFUSERS}.safetensors"),
]


@pytest.mark.parametrize("version", FLUX, ids=str)
def test_released_repositories_are_fetched_once(server: HubServer, cache: Path, version: SDVersion) -> None:
    """The file list of the released repositories, in small: no component comes twice."""
    info = version.info
    assert info.repo is not None
    single = f"flux1-{info.key.removeprefix('flux-')}.safetensors"
    write_repository(server.root / info.repo, dict.fromkeys([single, *RELEASED], 2000))
    folder = hub.fetch(info.repo, info.hub_files, endpoint=server.url, cache_dir=cache)
    assert [name for name in server.fetched() if name.endswith(".safetensors")] == sorted(
        [single, "ae.safetensors", "text_encoder/model.safetensors"]
        + [f"text_encoder_2/model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    )
    assert set(hub.role_paths(folder, info.hub_files)) == set(info.hub_files)


@pytest.mark.parametrize("version", FLUX, ids=str)
def test_wildcards_stand_only_for_shards_with_an_index(version: SDVersion) -> None:
    """Otherwise a download that broke off among the files of a wildcard would count as complete."""
    for role, alternatives in version.info.hub_files.items():
        for patterns in alternatives:
            sharded = any(pattern.endswith(".index.json") for pattern in patterns)
            wild = [pattern for pattern in patterns if "*" in pattern and not pattern.endswith(".index.json")]
            assert not wild or (sharded and all(pattern.endswith(".safetensors") for pattern in wild)), (
                f"{version}: {role} needs {wild}: name the files exactly"
            )


@pytest.mark.parametrize(
    ("host", "inside"),
    [
        *((host, True) for host in ("127.0.0.1", "127.8.0.1", "::1", "localhost", "", "0.0.0.0")),
        *((host, False) for host in ("192.0.2.1", "huggingface.co", "10.0.0.1", "2001:db8::1")),
    ],
)
def test_the_guard_knows_loopback(host: str, inside: bool) -> None:
    assert is_inside(host) is inside


def test_the_guard_stops_a_connection_to_the_outside(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("from network_guard import no_outside_network\n")
    (tmp_path / "test_out.py").write_text(
        "import socket\n"
        "def test_address():\n    socket.socket().connect(('192.0.2.1', 80))\n"
        "def test_name():\n    socket.create_connection(('example.org', 80))\n"
        "def test_swallowed():\n"
        "    try:\n        socket.socket().connect_ex(('192.0.2.1', 80))\n"
        "    except BaseException:\n        pass\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "2 failed, 1 passed, 3 errors" in run.stdout, run.stdout

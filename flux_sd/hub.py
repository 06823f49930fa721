"""Where a model's files come from: the hub cache, else a download. The only file that opens a connection.

Floor 4. Files lie in huggingface_hub's own cache (HF_HOME, HF_HUB_CACHE), so whatever diffusers, Candle or
`hf download` fetched is used as it is, and what is fetched here serves them. huggingface_hub lists the
repository, builds the headers, tells refusals apart and links the snapshot. The bytes are read here, over
plain HTTP, because recent releases of huggingface_hub delete an unfinished file, and its Xet transfer
cannot be cancelled between chunks: 24 GB must survive a broken connection. So hf_xet is not used, installed
or not.

What a model needs (`HubFiles`, a column of versions.py) maps each role to alternatives, the preferred
first; an alternative is a tuple of patterns, each of which must match a file. The first alternative that is
there whole is taken and the others are left alone, so that one copy of each component is fetched:
    {"vae": (("ae.safetensors",), ("vae/diffusion_pytorch_model.safetensors",))}
Patterns name files exactly. A wildcard is for shards, whose index tells which belong to it: without a network
nothing else could tell that a cached folder lacks one of the files that a wildcard stands for.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import string
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .errors import (
    Cancelled,
    DiskSpaceError,
    DownloadError,
    FluxSdError,
    GatedRepositoryError,
    MissingFileError,
    OfflineError,
)
from .request import CancelToken
from .versions import HubFiles

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

OnProgress = Callable[[int, int], None]  # (bytes here, bytes in all), called after every chunk

CHUNK = 256 * 1024  # bytes between two looks at the cancel token
ATTEMPTS = 3  # in a row without a single new byte; then the download counts as interrupted
RETRY_WAIT = 1.0  # seconds between attempts
RESUMES = "what has arrived is kept, and running the same command again resumes"


@dataclass(frozen=True)
class CacheState:
    """What the cache holds of one model. `folder` is set when it is complete."""

    state: Literal["complete", "partial", "absent"]
    bytes: int  # of everything cached for the repository, unfinished files included
    missing: tuple[str, ...]  # roles without a complete file
    folder: Path | None


@dataclass(frozen=True)
class _Remote:
    """One repository at one endpoint and where the cache keeps it."""

    repo: str
    endpoint: str
    token: str | None
    cache: Path

    @property
    def storage(self) -> Path:
        return _storage(self.repo, self.cache)


@dataclass(frozen=True)
class _File:
    """One file as the repository announces it."""

    name: str
    size: int  # bytes
    etag: str  # the sha256 of a large file, the git blob id of a small one
    sha256: str | None


def cached(repo: str, roles: HubFiles, cache_dir: Path | str | None = None) -> Path | None:
    """The snapshot folder in which every role is complete, else None. Reads the disk only."""
    for folder in _snapshots(_storage(repo, _cache_folder(cache_dir))):
        if len(_present(folder, roles)) == len(roles):
            return folder
    return None


def role_paths(folder: Path, roles: HubFiles) -> dict[str, Path]:
    """Where each role lies in a snapshot: a file at the top of the repository, or the folder of a component.

    A role that is not there completely has no entry. Of two copies of a component the preferred one is given:
    in a snapshot that is no ambiguity, as it would be in a folder of the user's own.
    """
    return {
        role: folder / (names[0] if "/" not in names[0] else names[0].rpartition("/")[0])
        for role, names in _present(folder, roles).items()
    }


def cache_state(repo: str, roles: HubFiles, cache_dir: Path | str | None = None) -> CacheState:
    """What the cache holds of a repository, for the catalogue. Reads the disk only."""
    storage = _storage(repo, _cache_folder(cache_dir))
    # Snapshots are links to blobs where the system has links: each real file is counted once.
    real = {path.resolve() for path in storage.rglob("*") if path.is_file()}
    size = sum(path.stat().st_size for path in real)
    missing, folder = tuple(roles), None
    for snapshot in _snapshots(storage):
        present = _present(snapshot, roles)
        lacking = tuple(role for role in roles if role not in present)
        if len(lacking) < len(missing):
            missing, folder = lacking, snapshot
    if folder is not None and not missing:
        return CacheState("complete", size, (), folder)
    return CacheState("partial" if size else "absent", size, missing, None)


def fetch(
    repo: str,
    roles: HubFiles,
    *,
    offline: bool = False,
    cancel: CancelToken | None = None,
    on_progress: OnProgress | None = None,
    endpoint: str | None = None,
    cache_dir: Path | str | None = None,
    token: str | None = None,
) -> Path:
    """The snapshot folder with every role complete: from the cache without a connection, else downloaded.

    `offline`, FLUX_SD_OFFLINE=1 or HF_HUB_OFFLINE=1 forbid the connection. `cancel` takes effect within one
    chunk, or within the read time-out (10 s, HF_HUB_DOWNLOAD_TIMEOUT) where the hub has fallen silent.
    `endpoint` and `token` default to HF_ENDPOINT and to HF_TOKEN or the stored login.
    Raises OfflineError, GatedRepositoryError, DiskSpaceError, MissingFileError, DownloadError or Cancelled.
    """
    folder = cached(repo, roles, cache_dir)
    if folder is not None:
        return folder
    cache = _cache_folder(cache_dir)
    if offline or _offline_by_environment():
        raise _offline_error(repo, roles, cache)
    from huggingface_hub import constants

    remote = _Remote(repo, (endpoint or constants.ENDPOINT).rstrip("/"), token, cache)
    watch = _Watch(cancel, on_progress)
    _download_missing(remote, roles, watch)
    folder = cached(repo, roles, cache)
    if folder is None:
        missing = ", ".join(cache_state(repo, roles, cache).missing)
        raise DownloadError(
            f"{repo} was fetched but is not complete: a shard index of {missing} cannot be read or names"
            " files that the repository lacks; report it there, or use files of your own with --path"
        )
    return folder


# What is needed and what is there -------------------------------------------------------------------


def _choose(
    names: Collection[str], roles: HubFiles, whole: Callable[[str], bool] = lambda index: True
) -> dict[str, list[str]]:
    """For each role the files of its first alternative that `names` holds; `whole` judges a shard index."""
    chosen: dict[str, list[str]] = {}
    for role, alternatives in roles.items():
        for patterns in alternatives:
            matches = [sorted(name for name in names if fnmatchcase(name, pattern)) for pattern in patterns]
            found = sorted(set().union(*matches))
            if all(matches) and all(whole(name) for name in found if name.endswith(".index.json")):
                chosen[role] = found
                break
    return chosen


def _present(folder: Path, roles: HubFiles) -> dict[str, list[str]]:
    """The names in a snapshot that play each role; a role that is not there completely has no entry.

    Unfinished files never count: the cache links a file only when it is whole, a dangling link is not a file,
    and a shard index is complete only with every shard that it names.
    """
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return _choose(names, roles, lambda name: _shards(folder, name) <= names)


def _shards(folder: Path, index: str) -> set[str]:
    """The files that a shard index names, relative to `folder`; an unreadable one names "", no file."""
    try:
        shards = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {""}
    return {(Path(index).parent / str(shard)).as_posix() for shard in shards}


def _cache_folder(cache_dir: Path | str | None) -> Path:
    from huggingface_hub import constants

    return Path(cache_dir if cache_dir is not None else constants.HF_HUB_CACHE).expanduser()


def _storage(repo: str, cache: Path) -> Path:
    return cache / ("models--" + "--".join(repo.split("/")))


def _snapshots(storage: Path) -> list[Path]:
    """Snapshot folders of a repository: that of the main branch first, then the newest."""
    try:
        main = (storage / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        main = ""
    folders = [path for path in storage.glob("snapshots/*") if path.is_dir()]
    return sorted(folders, key=lambda path: (path.name != main, -path.stat().st_mtime))


def _offline_by_environment() -> bool:
    values = (os.environ.get(name, "") for name in ("FLUX_SD_OFFLINE", "HF_HUB_OFFLINE"))
    return any(value.strip().lower() in ("1", "true", "yes", "on") for value in values)


def _offline_error(repo: str, roles: HubFiles, cache: Path) -> OfflineError:
    missing = cache_state(repo, roles, cache).missing
    return OfflineError(
        f"{repo} is not complete in the cache {cache} (missing: {', '.join(missing)}) and the offline"
        " switch is on: run the same command once without it, or fetch the files with"
        f" `{_command(repo, roles, missing)}`"
    )


def _command(repo: str, roles: HubFiles, missing: Sequence[str]) -> str:
    """The huggingface_hub command that fetches the preferred files of the missing roles."""
    patterns = [pattern for role in missing for pattern in roles[role][0]]
    return f"hf download {repo} " + " ".join(f'--include "{pattern}"' for pattern in patterns)


# Listing and refusals -------------------------------------------------------------------------------


@contextmanager
def _only_what_was_asked() -> Iterator[None]:
    """Keeps huggingface_hub from requests of its own while ours run, as HF_HUB_DISABLE_TELEMETRY=1 would.

    To name a coding agent in the User-Agent, release 2.4 first asks huggingface.co for a list of agents,
    whatever the endpoint. The variable itself is read when huggingface_hub is imported: too early for us.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_DISABLE_TELEMETRY
    constants.HF_HUB_DISABLE_TELEMETRY = True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_TELEMETRY = before


def _listing(remote: _Remote, roles: HubFiles) -> tuple[str, list[_File]]:
    """The main branch's commit and the chosen files with their announced sizes: one request."""
    from huggingface_hub import HfApi, constants

    try:
        info = HfApi(endpoint=remote.endpoint, token=remote.token, library_name="flux_sd").model_info(
            remote.repo, revision="main", files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
    except _hub_errors(ValueError, KeyError) as error:  # these two: an answer that is no hub's
        away = OfflineError(
            f"{remote.endpoint} gave no usable answer ({_first_line(error)}) and the cache {remote.cache}"
            f" does not hold all of {remote.repo}: check the connection and run the same command again, or"
            " give files of your own with --path"
        )
        raise _explain(error, remote, away) from error
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
    chosen = _choose(siblings, roles)
    for role in roles:
        if role not in chosen:
            accepted = " or ".join(" + ".join(patterns) for patterns in roles[role])
            raise MissingFileError(
                f"{remote.repo} holds no {role}: expected {accepted}; give a copy of your own with --path"
            )
    names = dict.fromkeys(name for found in chosen.values() for name in found)
    return str(info.sha), [_announced(remote, str(info.sha), siblings[name]) for name in names]


def _announced(remote: _Remote, commit: str, sibling: RepoSibling) -> _File:
    """One row of the listing. Commit and ETag become file names in the cache: only hashes are accepted."""
    sha256 = sibling.lfs.sha256 if sibling.lfs is not None else None
    etag = sha256 or sibling.blob_id or ""
    if sibling.size is None or not etag or not set(etag + commit) <= set(string.hexdigits):
        raise DownloadError(
            f"{remote.endpoint} lists {sibling.rfilename} of {remote.repo} without size and hash: it does not"
            " answer as a hub does; check HF_ENDPOINT"
        )
    return _File(sibling.rfilename, sibling.size, etag, sha256)


def _hub_errors(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """What huggingface_hub raises for refusals and broken connections, and the system for the disk.

    The first base of HfHubHTTPError is the root of the HTTP client's errors; the client differs by release.
    """
    from huggingface_hub.errors import HfHubHTTPError

    root: type[Exception] = HfHubHTTPError.__bases__[0]
    return root, OSError, *more


def _status(error: BaseException) -> int | None:
    """The HTTP status of a refusal, None where no answer came."""
    from huggingface_hub.errors import HfHubHTTPError

    return int(error.response.status_code) if isinstance(error, HfHubHTTPError) else None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _explain(error: Exception, remote: _Remote, lost: FluxSdError) -> FluxSdError:
    """The one sentence for a failure of the hub, the network or the disk; `lost` where no answer came."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    status, repo = _status(error), remote.repo
    gated = isinstance(error, GatedRepoError)
    unknown = isinstance(error, RepositoryNotFoundError) and not gated
    if gated or (status in (401, 403) and not unknown):
        return GatedRepositoryError(
            f"{repo} is gated: accept its licence at https://huggingface.co/{repo}, log in with `hf auth"
            " login` or set HF_TOKEN to a token of that account, and run the same command again"
        )
    if unknown or status == 404:
        return DownloadError(
            f"{remote.endpoint} knows no repository {repo}, or lacks a file of it (HTTP {status}): check the"
            " name; for a private repository log in with `hf auth login` or set HF_TOKEN"
        )
    if status is not None:
        return DownloadError(f"{remote.endpoint} answered HTTP {status} for {repo}: try later; {RESUMES}")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskSpaceError(f"the disk of {remote.cache} is full: make room or set HF_HOME; {RESUMES}")
    if isinstance(error, OSError) and error.filename is not None:
        return DownloadError(f"the cache cannot be used ({error}): correct its permissions or set HF_HOME")
    return lost


# Transfer -------------------------------------------------------------------------------------------


class _Watch:
    """Counts the bytes of one fetch, reports them, and raises Cancelled once the token is set."""

    def __init__(self, cancel: CancelToken | None, on_progress: OnProgress | None) -> None:
        self.cancel, self.on_progress = cancel, on_progress
        self.done = self.total = 0

    def add(self, count: int) -> None:
        self.done += count
        if self.on_progress is not None:
            self.on_progress(self.done, self.total)
        self.check()

    def check(self) -> None:
        if self.cancel is not None and self.cancel.cancelled:
            raise Cancelled(f"cancelled while downloading: {RESUMES}")

    def pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.check()
            time.sleep(min(left, 0.05))


class _Unfinished:
    """A file that is still arriving, `<etag>.incomplete` beside the blobs, and the hash of its bytes: sha256
    for a large file, the git blob id (sha1 of "blob SIZE\\0" and the bytes) for a small one."""

    def __init__(self, blob: Path, file: _File, watch: _Watch) -> None:
        self.path = _unfinished_path(blob)
        self.file, self.watch = file, watch
        self.hash = self._new_hash()
        self.size = 0
        self.path.touch()
        with self.path.open("rb") as stream:  # left by an earlier run
            while part := stream.read(CHUNK):
                self.hash.update(part)
                self.size += len(part)
                watch.check()
        watch.add(self.size)

    def _new_hash(self) -> hashlib._Hash:
        if self.file.sha256 is not None:
            return hashlib.sha256()
        return hashlib.sha1(f"blob {self.file.size}\0".encode(), usedforsecurity=False)

    @property
    def whole(self) -> bool:
        """Whether size and hash are the announced ones. An etag that is no git blob id tells nothing."""
        announced = self.file.sha256 or self.file.etag
        same = self.hash.hexdigest() == announced or len(announced) != 2 * self.hash.digest_size
        return self.size == self.file.size and same

    def restart(self) -> None:
        """Forgets everything."""
        with self.path.open("wb"):
            self.watch.done -= self.size
        self.hash, self.size = self._new_hash(), 0

    def append(self, chunks: Iterator[bytes]) -> None:
        """Writes what arrives; stops reading a sender that goes on past the announced size."""
        with self.path.open("ab") as stream:
            for chunk in chunks:
                stream.write(chunk)
                self.hash.update(chunk)
                self.size += len(chunk)
                self.watch.add(len(chunk))
                if self.size > self.file.size:
                    return


def _blob(remote: _Remote, file: _File) -> Path:
    return remote.storage / "blobs" / file.etag


def _link(remote: _Remote, commit: str, file: _File) -> Path:
    return remote.storage / "snapshots" / commit / file.name


def _unfinished_path(blob: Path) -> Path:
    return blob.with_name(blob.name + ".incomplete")


def _check_space(remote: _Remote, wanted: Sequence[_File]) -> None:
    """Refuses before the first byte when what is still to come does not fit."""
    need = 0
    for file in wanted:
        unfinished = _unfinished_path(_blob(remote, file))
        need += file.size - (unfinished.stat().st_size if unfinished.exists() else 0)
    cache = remote.cache.absolute()
    free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
    if need > free:
        raise DiskSpaceError(
            f"{remote.repo} needs {_gb(need)} more and {cache} has {_gb(free)} free: make room or set HF_HOME"
            " to another disk; nothing was fetched"
        )


def _gb(count: int) -> str:
    return f"{count / 1e9:,.2f} GB"


def _download_missing(remote: _Remote, roles: HubFiles, watch: _Watch) -> None:
    """Lists the repository, refuses what does not fit the disk, and fetches what the cache lacks."""
    watch.check()
    with _only_what_was_asked():
        commit, files = _listing(remote, roles)
        watch.check()
        lacking = [
            file
            for file in files
            if not _blob(remote, file).exists() and not _link(remote, commit, file).is_file()
        ]
        wanted = list({_blob(remote, file): file for file in lacking}.values())  # equal files come once
        _check_space(remote, wanted)
        watch.total = sum(file.size for file in wanted)
        _download_all(remote, commit, files, watch)


def _download_all(remote: _Remote, commit: str, files: Sequence[_File], watch: _Watch) -> None:
    """Fetches what is missing, links all of it into the snapshot, and lets the branch point there."""
    try:
        for file in files:
            _download(remote, commit, file, watch)
        branch = remote.storage / "refs" / "main"
        branch.parent.mkdir(parents=True, exist_ok=True)
        branch.write_text(commit, encoding="utf-8")
    except _hub_errors() as error:
        broken = DownloadError(
            f"the download of {remote.repo} was interrupted after {_gb(watch.done)} of {_gb(watch.total)}"
            f" ({_first_line(error)}): {RESUMES}"
        )
        raise _explain(error, remote, broken) from error


def _download(remote: _Remote, commit: str, file: _File, watch: _Watch) -> None:
    """One file into the cache. It gets its name only when it is whole; then huggingface_hub links it."""
    from huggingface_hub import hf_hub_download

    if _link(remote, commit, file).is_file():
        return
    blob = _blob(remote, file)
    blob.parent.mkdir(parents=True, exist_ok=True)
    with _locked(remote, file, watch):
        if not blob.exists():
            unfinished = _Unfinished(blob, file, watch)
            _receive(remote, commit, file, unfinished)
            os.replace(unfinished.path, blob)
    hf_hub_download(
        remote.repo,
        file.name,
        revision=commit,
        cache_dir=remote.cache,
        endpoint=remote.endpoint,
        token=remote.token,
        library_name="flux_sd",
    )


@contextmanager
def _locked(remote: _Remote, file: _File, watch: _Watch) -> Iterator[None]:
    """Holds huggingface_hub's lock on a blob, so that two processes never append to one file."""
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    path = remote.cache / ".locks" / remote.storage.name / f"{file.etag}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        while True:
            watch.check()
            try:
                stack.enter_context(WeakFileLock(path, timeout=0.5))
                break
            except TimeoutError:  # another process holds it
                continue
        yield


def _receive(remote: _Remote, commit: str, file: _File, unfinished: _Unfinished) -> None:
    """Reads until the announced size is there, going on where a connection broke; then checks the hash."""
    failures = 0
    if unfinished.size > file.size:
        unfinished.restart()
    while (before := unfinished.size) < file.size:
        try:
            _stream(remote, commit, file, unfinished)
        except _hub_errors() as error:
            failures = 0 if unfinished.size > before else failures + 1
            if failures >= ATTEMPTS or not _transient(error):
                raise
            unfinished.watch.pause(RETRY_WAIT)
    if not unfinished.whole:
        unfinished.restart()
        raise DownloadError(
            f"{file.name} of {remote.repo} arrived damaged (size or hash differ from the announced) and was"
            " discarded: run the same command again"
        )


def _transient(error: Exception) -> bool:
    """Whether another attempt may help: a broken connection or a busy hub; not a refusal, not the disk."""
    status = _status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    return not isinstance(error, OSError) or isinstance(error, ConnectionError)


def _stream(remote: _Remote, commit: str, file: _File, unfinished: _Unfinished) -> None:
    """One GET from the first missing byte on. Raises where the answer ends early."""
    from huggingface_hub import constants, get_session, hf_hub_url, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    headers = build_hf_headers(token=remote.token, library_name="flux_sd")
    headers["Accept-Encoding"] = "identity"  # a compressed answer has no byte ranges
    if unfinished.size:
        headers["Range"] = f"bytes={unfinished.size}-"
    url = hf_hub_url(remote.repo, file.name, revision=commit, endpoint=remote.endpoint)
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    # A redirect to another host, as the hub's storage is, loses the token: the client sees to that.
    request = get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True)
    with request as response:
        hf_raise_for_status(response)
        if unfinished.size and response.status_code != 206:  # the range was ignored: this is the whole file
            unfinished.restart()
        unfinished.append(response.iter_bytes(chunk_size=CHUNK))
    if unfinished.size < file.size:
        raise ConnectionError(f"the answer ended after {unfinished.size} of {file.size} bytes")

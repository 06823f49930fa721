"""A small hub-shaped HTTP server on loopback that serves a folder `<org>/<name>/<files>` as repositories.

It answers what huggingface_hub and flux_sd.hub ask: the listing with sizes
(`/api/models/<repo>/revision/main`), and HEAD and GET of `/<repo>/resolve/<revision>/<file>`, where large
files are redirected to another host name ("localhost"), as the real hub redirects them to its storage. It
counts connections and requests, and misbehaves on demand:

    with HubServer(folder) as hub:
        hub.break_after["ae.safetensors"] = [1000, 0]  # the first GET ends after 1000 bytes, the next at once
        flux_sd.hub.fetch("org/name", roles, endpoint=hub.url, cache_dir=...)
        assert hub.fetched() == [...]
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = 1000  # bytes; larger files are announced as LFS files, with a sha256


@dataclass(frozen=True)
class Request:
    """One request as it arrived."""

    method: str
    path: str  # decoded, without the query
    range: str | None
    authorization: str | None
    host: str

    @property
    def file(self) -> str | None:
        """The repository file that was asked for, whichever way."""
        parts = re.split(r"/(?:resolve|storage)/[^/]+/", self.path, maxsplit=1)
        return parts[1] if len(parts) == 2 else None


class HubServer:
    """The server and its knobs. Use as a context manager; `url` is the endpoint."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.gated: dict[str, int] = {}  # repository -> status of the refusal, 401 or 403
        self.status: int | None = None  # answer everything with this instead
        self.announced: dict[str, int] = {}  # file -> size to announce instead of the true one
        self.break_after: dict[str, list[int]] = {}  # file -> bytes after which each next GET breaks off
        self.ignore_range = False
        self.damaged: set[str] = set()  # files whose bytes are not those announced
        self.pause = 0.0  # seconds before each block of 64 KiB
        self.requests: list[Request] = []
        self.sent: dict[str, int] = {}  # body bytes per file
        self.connections = 0
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def fetched(self) -> list[str]:
        """Names of the files of which at least one byte was asked for, sorted."""
        return sorted({str(r.file) for r in self.requests if r.method == "GET" and r.file is not None})

    def forget(self) -> None:
        """Sets all counters to zero."""
        self.requests.clear()
        self.sent.clear()
        self.connections = 0

    def commit(self, repo: str) -> str:
        """40 hex digits that stand for the state of a repository: a hash of its names and sizes."""
        listing = [(name, path.stat().st_size) for name, path in self.files(repo).items()]
        return hashlib.sha1(json.dumps(listing).encode()).hexdigest()

    def files(self, repo: str) -> dict[str, Path]:
        folder = self.root / repo
        return {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}

    def listing(self, repo: str) -> dict[str, Any]:
        """What the hub's API says of a repository with `blobs=true`."""
        siblings: list[dict[str, Any]] = []
        for name, path in self.files(repo).items():
            size = self.announced.get(name, path.stat().st_size)
            entry: dict[str, Any] = {"rfilename": name, "size": size, "blobId": _git_blob(path)}
            if path.stat().st_size > LARGE:
                entry["lfs"] = {"sha256": _sha256(path), "size": size, "pointerSize": 135}
            siblings.append(entry)
        return {"_id": "0", "id": repo, "modelId": repo, "sha": self.commit(repo), "siblings": siblings}

    def tree(self, repo: str) -> list[dict[str, Any]]:
        """The same as a flat tree, which huggingface_hub's own snapshot_download asks for."""
        return [
            {"type": "file", "path": s["rfilename"], "size": s["size"], "oid": s["blobId"]}
            | ({"lfs": {"oid": s["lfs"]["sha256"], **s["lfs"]}} if "lfs" in s else {})
            for s in self.listing(repo)["siblings"]
        ]

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # an idle keep-alive connection would hold up the end of a test
    hub: HubServer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # header and body are written apart: no 40 ms between them
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.server.hub.connections += 1

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        header = self.headers.get
        request = Request(self.command, path, header("Range"), header("Authorization"), header("Host") or "")
        hub.requests.append(request)
        if hub.status is not None:
            return self._refuse(hub.status, None)
        if listing := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/main)?", path):
            if not hub.files(listing[1]):
                return self._refuse(404, "RepoNotFound")
            return self._json(hub.listing(listing[1]))
        if tree := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+", path):
            return self._json(hub.tree(tree[1]))
        match = re.fullmatch(r"/([^/]+/[^/]+)/(resolve|storage)/([^/]+)/(.+)", path)
        if match is None or match[4] not in hub.files(match[1]):
            return self._refuse(404, "EntryNotFound" if match else "RepoNotFound")
        repo, kind, _, name = match.groups()
        if kind == "resolve" and repo in hub.gated:
            return self._refuse(hub.gated[repo], "GatedRepo")
        if kind == "resolve" and hub.files(repo)[name].stat().st_size > LARGE:
            return self._redirect(repo, name)
        return self._file(repo, name, body)

    def _refuse(self, status: int, code: str | None) -> None:
        self.send_response(status)
        if code is not None:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _json(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _redirect(self, repo: str, name: str) -> None:
        hub, path = self.server.hub, self.server.hub.files(repo)[name]
        self.send_response(302)
        self.send_header("Location", f"http://localhost:{hub.port}/{repo}/storage/{hub.commit(repo)}/{name}")
        self.send_header("X-Repo-Commit", hub.commit(repo))
        self.send_header("X-Linked-Etag", f'"{_sha256(path)}"')
        self.send_header("X-Linked-Size", str(hub.announced.get(name, path.stat().st_size)))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _file(self, repo: str, name: str, body: bool) -> None:
        hub, path = self.server.hub, self.server.hub.files(repo)[name]
        data = path.read_bytes()
        if name in hub.damaged:
            data = bytes(len(data))
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(asked[1]) if asked and not hub.ignore_range else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("X-Repo-Commit", hub.commit(repo))
        self.send_header("ETag", f'"{_sha256(path) if len(data) > LARGE else _git_blob(path)}"')
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if body:
            self._send(name, data[start:])

    def _send(self, name: str, data: bytes) -> None:
        """Writes the body in blocks; breaks the connection off where the test says so."""
        hub = self.server.hub
        breaks = hub.break_after.get(name)
        limit = min(breaks.pop(0), len(data)) if breaks else len(data)
        try:
            for begin in range(0, limit, 65536):
                time.sleep(hub.pause)
                block = data[begin : min(begin + 65536, limit)]
                self.wfile.write(block)
                hub.sent[name] = hub.sent.get(name, 0) + len(block)
        except ConnectionError:  # the client went away, as a cancelled download does
            self.close_connection = True
        if limit < len(data):
            self.close_connection = True


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _git_blob(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

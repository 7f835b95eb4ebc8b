"""A stand-in for the Hugging Face hub on the loopback: what huggingface_hub asks for, served from folders.

    with HubStandIn({"models/some/model": Repository(folder, commit="a" * 40)}) as hub:
        subprocess.run(…, env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": …})

It answers repository information, access checks, tree listings and paths-info, and files with ETag, X-Repo-Commit and
ranges. It can gate a repository, cut a transfer short, and go away after that. Only one commit exists of each
repository; ``main`` points to it.
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """A repository: its files are those of a folder."""

    folder: Path
    commit: str
    gated: bool = False
    cut: set[str] = field(default_factory=set)
    """Files of which one transfer, the next, breaks off half-way."""

    def files(self) -> list[str]:
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())

    def entry(self, name: str) -> dict[str, Any]:
        data = (self.folder / name).read_bytes()
        return {"type": "file", "path": name, "size": len(data), "oid": digest(data)}

    def tree(self, under: str = "") -> list[dict[str, Any]]:
        names = [name for name in self.files() if name.startswith(f"{under}/" if under else "")]
        parents = {parent.as_posix() for name in names for parent in Path(name).parents} - {".", under}
        folders = [{"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in sorted(parents)]
        return folders + [self.entry(name) for name in names]


def digest(data: bytes) -> str:
    """A file's ETag and object id, as far as a client can tell."""
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


class HubStandIn:
    """Serves repositories, by ``models/OWNER/NAME`` and ``datasets/OWNER/NAME``, on a free port of 127.0.0.1."""

    def __init__(self, repositories: dict[str, Repository]) -> None:
        self.repositories = repositories
        self.requests: list[str] = []
        """``GET path`` of every request, with the range where one was asked for."""
        self.gone = False
        """Whether connections are closed without an answer."""
        self.leaves_after_cut = False

    def __enter__(self) -> HubStandIn:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer()

    def log_message(self, *_: object) -> None:
        """Silent: tests read ``hub.requests``."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        wanted = self.headers.get("Range", "")
        self.hub.requests.append(f"{self.command} {path} {wanted}".strip())
        if self.hub.gone:
            self.close_connection = True
            return
        api = path.startswith("api/")
        parts = path.removeprefix("api/").split("/")
        kind = parts.pop(0) if parts[0] in {"models", "datasets"} else "models"
        repository = self.hub.repositories.get("/".join([kind, *parts[:2]]))
        if repository is None:
            self._refuse(404, "RepoNotFound", "Repository not found")
        elif repository.gated and not (api and len(parts) == 2):
            self._refuse(403, "GatedRepo", "Access to this repository is restricted")
        elif len(parts) > 3 and parts[3] not in {"main", repository.commit}:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {parts[3]}")
        elif api:
            self._api(repository, "/".join(parts[:2]), parts[2] if len(parts) > 2 else "revision", "/".join(parts[4:]))
        else:
            self._file(repository, "/".join(parts[4:]))

    def _api(self, repository: Repository, name: str, verb: str, rest: str) -> None:
        if verb == "revision":
            siblings = [{"rfilename": file} for file in repository.files()]
            shared = {"id": name, "modelId": name, "author": name.split("/")[0], "sha": repository.commit, "tags": []}
            state = {"private": False, "gated": "manual" if repository.gated else False, "disabled": False}
            self._json({**shared, **state, "downloads": 0, "likes": 0, "siblings": siblings})
        elif verb == "auth-check":
            self._json({})
        elif verb == "tree":
            entries = repository.tree(rest)
            self._json(entries) if entries else self._refuse(404, "EntryNotFound", "No such folder")
        elif verb == "paths-info":
            asked = json.loads(self._body)["paths"]
            self._json([entry for entry in repository.tree() if entry["path"] in asked])
        else:
            self._refuse(404, "EntryNotFound", f"nothing is served under {verb}")

    def _file(self, repository: Repository, name: str) -> None:
        file = repository.folder / name
        if name not in repository.files():
            self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": repository.commit})
            return
        whole = file.read_bytes()
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        data = whole[start:]
        headers = {"ETag": f'"{digest(whole)}"', "X-Repo-Commit": repository.commit, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(whole) - 1}/{len(whole)}"
        self._head(206 if start else 200, "application/octet-stream", len(data), headers)
        if self.command == "HEAD":
            return
        if name in repository.cut:
            repository.cut.discard(name)
            self.wfile.write(data[: len(data) // 2])
            self.hub.gone = self.hub.leaves_after_cut
            self.close_connection = True
            return
        self.wfile.write(data)

    def _json(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self._head(200, "application/json", len(data), {})
        if self.command != "HEAD":
            self.wfile.write(data)

    def _refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        data = json.dumps({"error": message}).encode()
        self._head(
            status, "application/json", len(data), {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}
        )
        if self.command != "HEAD":
            self.wfile.write(data)

    def _head(self, status: int, kind: str, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()

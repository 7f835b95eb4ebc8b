"""A stand-in for the Hugging Face hub on the loopback: what huggingface_hub asks for, served from folders.

    with HubStandIn({"models/some/model": Repository(folder, commit="a" * 40)}) as hub:
        subprocess.run(…, env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": …})

It answers repository information, access checks, tree listings and paths-info, and files with ETag, X-Repo-Commit and
ranges. It can gate a repository, cut a transfer short, and go away after that. ``main`` points to the last commit.

With ``store=FOLDER`` repositories can be created and pushed to, with the token TOKEN: create, validate-yaml, preupload,
LFS batch, upload, verify, commit. Large files are those of LARGE; they are kept when the commit never comes, as on the
hub. ``pause`` names the request before (or after) whose effect the stand-in waits: a client can be killed there.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import shutil
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_onlyForTheStandIn"
LARGE = (".safetensors", ".onnx", ".gguf")


@dataclass
class Repository:
    """A repository: its files are those of a folder."""

    folder: Path
    commit: str
    gated: bool = False
    cut: set[str] = field(default_factory=set)
    """Files of which one transfer, the next, breaks off half-way."""
    private: bool = False
    history: dict[str, Path] = field(default_factory=dict)
    """Folders of earlier commits."""

    def at(self, revision: str) -> Repository | None:
        """As of a commit; None if there is none."""
        if revision in ("main", self.commit):
            return self
        folder = self.history.get(revision)
        return folder and Repository(folder, revision, self.gated, self.cut, self.private)

    def files(self) -> list[str]:
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())

    def entry(self, name: str) -> dict[str, Any]:
        data = (self.folder / name).read_bytes()
        entry = {"type": "file", "path": name, "size": len(data), "oid": digest(data)}
        if name.endswith(LARGE):
            entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 134}
        return entry

    def tree(self, under: str = "") -> list[dict[str, Any]]:
        names = [name for name in self.files() if name.startswith(f"{under}/" if under else "")]
        parents = {parent.as_posix() for name in names for parent in Path(name).parents} - {".", under}
        folders = [{"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in sorted(parents)]
        return folders + [self.entry(name) for name in names]


def digest(data: bytes) -> str:
    """A file's ETag and object id, as far as a client can tell."""
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def git_blob(data: bytes) -> str:
    """The object id that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class HubStandIn:
    """Serves repositories, by ``models/OWNER/NAME`` and ``datasets/OWNER/NAME``, on a free port of 127.0.0.1."""

    def __init__(self, repositories: dict[str, Repository], store: Path | None = None) -> None:
        self.repositories = repositories
        self.store = store
        """Folder of pushed repositories; None if nothing can be pushed."""
        self.objects: dict[str, bytes] = {}
        """Large files that were uploaded, committed or not, by SHA-256."""
        self.pause = ""
        """``METHOD step`` before which the next such request waits for ``go_on``; ``+`` at its end for after it."""
        self.paused, self.go_on = threading.Event(), threading.Event()
        self.client_killed = False
        """Whether the paused request is dropped without effect, as one that was cut off."""
        self.statuses: dict[str, int] = {}
        """Step → the HTTP status with which it is refused."""
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

    do_PUT = do_POST

    def log_message(self, *_: object) -> None:
        """Silent: tests read ``hub.requests``."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        wanted = self.headers.get("Range", "")
        self.hub.requests.append(f"{self.command} {path} {wanted}".strip())
        if self.hub.gone:
            self.close_connection = True
            return
        step = self._step(path)
        if step is not None:
            self._push(step, path)
            return
        api = path.startswith("api/")
        parts = path.removeprefix("api/").split("/")
        kind = parts.pop(0) if parts[0] in {"models", "datasets"} else "models"
        repository = self.hub.repositories.get("/".join([kind, *parts[:2]]))
        if repository is None:
            self._refuse(404, "RepoNotFound", "Repository not found")
        elif repository.gated and not (api and len(parts) == 2):
            self._refuse(403, "GatedRepo", "Access to this repository is restricted")
        elif (revision := repository.at(parts[3] if len(parts) > 3 else "main")) is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {parts[3]}")
        elif repository.private and not self._is_authorized():
            self._refuse(404, "RepoNotFound", "Repository not found")
        elif api:
            self._api(revision, "/".join(parts[:2]), parts[2] if len(parts) > 2 else "revision", "/".join(parts[4:]))
        else:
            self._file(revision, "/".join(parts[4:]))

    def _is_authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _step(self, path: str) -> str | None:
        """The step of a push that a request is; None for a request that reads."""
        if path in ("api/repos/create", "api/validate-yaml"):
            return path.rpartition("/")[2]
        if path.startswith("lfs/"):
            return "verify" if self.command == "POST" else "upload"
        if path.endswith(".git/info/lfs/objects/batch"):
            return "batch"
        parts = path.split("/")
        if parts[:2] == ["api", "models"] and len(parts) > 4 and parts[4] in ("preupload", "commit"):
            return parts[4]
        return None

    def _push(self, step: str, path: str) -> None:
        if step != "upload" and not self._is_authorized():  # the storage has signed addresses
            self._refuse(401, "Unauthorized", "Invalid username or password.")
        elif step in self.hub.statuses:
            self._refuse(self.hub.statuses[step], "Refused", f"{step} is refused")
        elif self.hub.store is None:
            self._refuse(403, "Forbidden", "nothing can be pushed to this stand-in")
        else:
            self._wait(f"{self.command} {step}")
            value = getattr(self, f"_{step.replace('-', '_')}")(path)
            self._wait(f"{self.command} {step}+")
            if value is not None:
                self._json(value)

    def _wait(self, place: str) -> None:
        if place == self.hub.pause:
            self.hub.pause = ""
            self.hub.paused.set()
            self.hub.go_on.wait(60)
            if self.hub.client_killed and not place.endswith("+"):
                raise ConnectionAbortedError

    def _create(self, path: str) -> dict[str, Any] | None:
        asked = json.loads(self._body)
        name = f"{asked['organization'] or 'someone'}/{asked['name']}"
        if f"models/{name}" in self.hub.repositories:
            self._refuse(409, "Conflict", "You already created this model repo", url=f"{self.hub.url}/{name}")
            return None
        folder = self.hub.store / secrets.token_hex(8)
        folder.mkdir(parents=True)
        (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repositories[f"models/{name}"] = Repository(folder, secrets.token_hex(20), private=private)
        return {"url": f"{self.hub.url}/{name}"}

    def _validate_yaml(self, path: str) -> dict[str, Any]:
        return {"errors": [], "warnings": []}

    def _preupload(self, path: str) -> dict[str, Any]:
        folder = self._repository(path).folder
        files = []
        for file in json.loads(self._body)["files"]:
            name = file["path"]
            there = (folder / name).read_bytes() if (folder / name).is_file() else None
            mode = "lfs" if name.endswith(LARGE) else "regular"
            oid = None if there is None else sha256(there) if mode == "lfs" else git_blob(there)
            files.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": files}

    def _batch(self, path: str) -> dict[str, Any]:
        objects = []
        for one in json.loads(self._body)["objects"]:
            if one["oid"] not in self.hub.objects:
                href = f"{self.hub.url}/lfs/{one['oid']}"
                one = {**one, "actions": {"upload": {"href": href}, "verify": {"href": href}}}
            objects.append(one)
        return {"transfer": "basic", "objects": objects}

    def _upload(self, path: str) -> dict[str, Any] | None:
        name = path.partition("/")[2]
        if sha256(self._body) != name:
            self._refuse(400, "BadDigest", "the content is not what was announced")
            return None
        self.hub.objects[name] = self._body
        return {}

    def _verify(self, path: str) -> dict[str, Any]:
        asked = json.loads(self._body)
        assert len(self.hub.objects[asked["oid"]]) == asked["size"]
        return {}

    def _commit(self, path: str) -> dict[str, Any] | None:
        repository = self._repository(path)
        lines = [json.loads(line) for line in self._body.decode().splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit", repository.commit) != repository.commit:
            self._refuse(412, "PreconditionFailed", "A commit has happened since. Please refresh and try again.")
            return None
        folder, commit = self.hub.store / secrets.token_hex(8), secrets.token_hex(20)
        shutil.copytree(repository.folder, folder)
        for line in lines[1:]:
            value = line["value"]
            file = folder / value["path"]
            file.parent.mkdir(parents=True, exist_ok=True)
            if line["key"] == "file":
                file.write_bytes(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                file.write_bytes(self.hub.objects[value["oid"]])
            else:
                assert line["key"] == "deletedFile", line["key"]
                file.unlink()
        repository.history[repository.commit] = repository.folder
        repository.folder, repository.commit = folder, commit
        name = "/".join(path.split("/")[2:4])
        return {"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit, "hookOutput": ""}

    def _repository(self, path: str) -> Repository:
        return self.hub.repositories["/".join(path.split("/")[1:4])]

    def _api(self, repository: Repository, name: str, verb: str, rest: str) -> None:
        if verb == "revision":
            siblings: list[dict[str, Any]] = [{"rfilename": file} for file in repository.files()]
            if "blobs" in urlsplit(self.path).query:
                for one in siblings:
                    entry = repository.entry(one["rfilename"])
                    lfs = {"sha256": entry["lfs"]["oid"], **entry["lfs"]} if "lfs" in entry else None
                    one |= {"size": entry["size"], "blobId": entry["oid"]} | ({"lfs": lfs} if lfs else {})
            shared = {"id": name, "modelId": name, "author": name.split("/")[0], "sha": repository.commit, "tags": []}
            state = {"private": repository.private, "gated": "manual" if repository.gated else False, "disabled": False}
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

    def _refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None, **body: str) -> None:
        data = json.dumps({"error": message, **body}).encode()
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

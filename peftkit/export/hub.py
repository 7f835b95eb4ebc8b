"""Exports on the Hugging Face hub: their names, the list of their files, and reading them back.

``peftkit export --push`` (``export.push``) commits a list of all files with their sizes and SHA-256 together with them.
A repository without the list, or whose files are not those of the list, is refused: it was not pushed completely, or
was changed since.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from peftkit.errors import HubError, ModelError, RunError
from peftkit.models import hub
from peftkit.models.json_files import MAX_JSON_BYTES, read_json
from peftkit.models.sources import PICKLED
from peftkit.schema.validation import describe
from peftkit.system.files import file_digest

PREFIX = "hub:"
FILE = "peftkit-files.json"
UNLISTED = frozenset({FILE, ".gitattributes", "README.md"})
"""Files that owners may edit on the hub; none of them changes what the model computes."""
RUNS_CODE = frozenset({*PICKLED, ".pickle", ".joblib", ".dill", ".py", ".so", ".dll", ".dylib"})
PATH = re.compile(r"[A-Za-z0-9_][\w.+ -]*(/[A-Za-z0-9_][\w.+ -]*)*", re.ASCII)
REVISION = re.compile(r"[A-Za-z0-9_][\w.+-]*(/[A-Za-z0-9_][\w.+-]*)*", re.ASCII)
MAX_FILES = 2000


def _check_path(path: str) -> str:
    if not PATH.fullmatch(path):
        raise ValueError(f"expected a path below the repository, found {path!r:.100}")
    if PurePosixPath(path).suffix.lower() in RUNS_CODE:
        raise ValueError(f"{path!r:.100} can run code when it is loaded, and peftkit never writes such files")
    return path


@dataclass(frozen=True)
class ListedFile:
    """A file as it was pushed."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class FileList:
    """The contents of peftkit-files.json."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    files: Annotated[dict[Annotated[str, AfterValidator(_check_path)], ListedFile], Field(max_length=MAX_FILES)]
    peftkit: str
    """The version that pushed."""
    format: Literal[1] = 1

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"


@dataclass(frozen=True)
class HubName:
    """``hub:USER/NAME`` or ``hub:USER/NAME@REVISION``."""

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{PREFIX}{self.name}" + (f"@{self.revision}" if self.revision else "")


def is_hub_name(path: str | Path) -> bool:
    """Whether a run is named by its repository on the hub."""
    return str(path).startswith(PREFIX)


def parse(path: str | Path) -> HubName:
    """The repository and revision that ``hub:USER/NAME[@REVISION]`` names; raises RunError for another spelling."""
    name, at, revision = str(path).removeprefix(PREFIX).partition("@")
    if at and (not REVISION.fullmatch(revision) or ".." in revision or len(revision) > 200):
        raise RunError(f"{str(path)[:200]}: expected a branch, tag or commit after @, found {revision!r:.100}")
    return HubName(check_name(name), revision or None)


def check_name(name: str) -> str:
    """``USER/NAME``; raises RunError unless the hub allows it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    problem = ""
    if name.count("/") != 1 or not all(name.split("/")):
        problem = "both parts are needed"
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        problem = problem or str(error).partition(":")[0]
    if problem:
        raise RunError(f"{name!r:.120} is not a repository of the hub: expected USER/NAME ({problem})")
    return name


def list_files(folder: Path, version: str) -> FileList:
    """The files of an exported folder; raises RunError for files that an export does not have."""
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    for path in set(paths) - UNLISTED:
        try:
            _check_path(path)
        except ValueError as error:
            raise RunError(f"{folder} holds {path}, which is not of the export ({error}): remove it") from None
    files = {
        path: {"size": (folder / path).stat().st_size, "sha256": file_digest(folder / path)}
        for path in paths
        if path not in UNLISTED
    }
    return read_list({"files": files, "peftkit": version}, str(folder))


def read_list(values: Any, where: str) -> FileList:
    """A checked list of files; raises ModelError for names that leave the folder, pickled weights or code."""
    try:
        return TypeAdapter(FileList).validate_python(values)
    except ValidationError as error:
        raise ModelError(describe(error, f"{where}: not a list of files as peftkit writes it")) from None


def download(path: str | Path) -> Path:
    """The local copy of an export on the hub, complete and as it was pushed; only what changed is downloaded.

    Raises:
        RunError: the name cannot be one, or the repository holds no complete export.
        HubError: the hub cannot be reached, or there is no such repository or revision.
        ModelError: files are not those that were pushed.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    wanted = parse(path)
    try:
        _check_size(wanted)
        file = Path(hf_hub_download(wanted.name, FILE, revision=wanted.revision))
        listed = read_list(read_json(file), f"{wanted}, {FILE}")
        # the list's own commit, so that a push in between cannot mix two exports
        names = [*listed.files, FILE, "README.md"]
        folder = Path(snapshot_download(wanted.name, revision=file.parent.name, allow_patterns=names))
    except ModelError:
        raise
    except RemoteEntryNotFoundError:
        raise RunError(
            f"{wanted}: there is no complete export of peftkit: no {FILE} in it. Push it with `peftkit export RUN "
            f"--push {wanted.name}`, which also resumes an interrupted push"
        ) from None
    except Exception as error:  # network errors have no common base class that huggingface_hub promises to keep
        problem = hub.problem_of(error, wanted.name, wanted.revision, default_revision="leave the revision out")
        raise HubError(f"{wanted}: {problem}") from error
    verify(folder, listed, str(wanted))
    return folder


def _check_size(wanted: HubName) -> None:
    """Raises ModelError for a list that is far too large, before it is downloaded."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        size = get_hf_file_metadata(hf_hub_url(wanted.name, FILE, revision=wanted.revision)).size or 0
    except Exception:  # the download finds it in the cache, or explains why not
        return
    if size > MAX_JSON_BYTES:
        raise ModelError(f"{wanted}, {FILE}: expected at most {MAX_JSON_BYTES:,} bytes, found {size:,}")


def verify(folder: Path, listed: FileList, where: str) -> None:
    """Raises ModelError unless the folder's files are those of the list."""
    problems = list(_differences(folder, listed))
    if problems:
        raise ModelError(
            f"{where}: its files are not those that were pushed: {'; '.join(problems[:4])}. Its proof does not hold "
            f"for them: load an earlier commit (@COMMIT), push the run again, or remove the local copy in {folder} if "
            "that is damaged"
        )


def _differences(folder: Path, listed: FileList) -> Iterable[str]:
    for path, expected in listed.files.items():
        file = folder / path
        if not file.is_file():
            yield f"{path} is missing"
        elif file.stat().st_size != expected.size:
            yield f"{path} has {file.stat().st_size} bytes, expected {expected.size}"
        elif file_digest(file) != expected.sha256:
            yield f"{path} has another SHA-256"

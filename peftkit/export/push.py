"""``peftkit export --push``: a finished run's export as a repository of the Hugging Face hub.

All files are part of one commit, which comes last and lists them; until then, the repository is as it was. Large files
are uploaded ahead of it, and those that the hub has already, from a push that was interrupted, are not sent again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.errors import HubError, PeftkitError
from peftkit.export import card_metadata, exporter, proof
from peftkit.export.folder import ExportFolder, open_export
from peftkit.export.hub import FILE, UNLISTED, FileList, check_name, list_files, read_list
from peftkit.export.manifest import SAVES
from peftkit.models import hub
from peftkit.models.json_files import read_json
from peftkit.schema.registries import EXPORTERS
from peftkit.system import cache

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

TOKEN = "HF_TOKEN"
CARD = "README.md"
COPY = "peft"
"""The format that is the run's own export, which needs no other folder."""


def push_export(
    run: str | Path, name: str, *, to: str | Path | None = None, private: bool = False, license: str | None = None,
    merge: bool = False, to_format: str = COPY, **options: Any,
) -> str:  # fmt: skip
    """Writes a finished run in a format and pushes it; returns sentences about both.

    Args:
        name: ``USER/NAME`` on the hub; created if it does not exist.
        to: a new folder to keep the export in; None keeps it in the cache until it is pushed.
        private: create the repository as a private one.
        license: the hub's identifier, for the card; None only with ``private``.
        merge, to_format, options: as for ``run_export``.

    Raises:
        RunError: ``run`` is not a finished run, or the name cannot be one of the hub.
        RecipeError: no such license, format or option.
        HubError: no token, no right to write, the repository holds something else, or the hub cannot be reached.
        ExportError: the export does not reproduce the trained model.
    """
    check_name(name)
    card_metadata.check_license(license, private=private)
    token()
    others = exporter.exporter_of(to_format, merge=merge, **options).other_runs()
    if to is None and to_format == COPY and not merge and not options:
        return push(open_export(run).path, name, private=private, license=license)
    if to is not None:
        wrote = exporter.run_export(run, to, merge=merge, to_format=to_format, **options)
        flags = (f" --license {license}" if license else "") + (" --private" if private else "")
        again = f"The export is complete in {to}; push it with `peftkit export {to} --push {name}{flags}`"
        return f"{wrote}\n{push(Path(to), name, private=private, license=license, again=again)}"
    sources = [open_export(path) for path in (run, *others)]
    with in_cache(sources, {"merge": merge, "to_format": to_format, **options}) as folder:
        written = exporter.describe_export(folder, merge=merge, to_format=to_format)
        return f"wrote the export {written}\n{push(folder, name, private=private, license=license)}"


def push(folder: Path, name: str, *, private: bool = False, license: str | None = None, again: str = "") -> str:
    """Pushes an exported folder; returns a sentence with the commit's address.

    Args:
        again: how the user resumes, where that is not the same command.

    Raises:
        HubError: as for ``push_export``.
    """
    from huggingface_hub import HfApi

    export, listed = open_export(folder), list_files(folder, version("peftkit"))
    api = HfApi(token=token())
    again = again or "Run the same command again; large files that are uploaded by then are not sent again"
    before = _explained(name, again, lambda: _open_repository(api, name, private))
    removed = _explained(name, again, lambda: _files_to_remove(api, name, before, listed))
    operations = _operations(folder, listed, _card(export, license), removed)
    message = f"{export.manifest.recipe}: {export.manifest.method}, {export.manifest.saves}"
    commit = _explained(
        name, again, lambda: api.create_commit(name, operations, commit_message=message, parent_commit=before.sha)
    )
    _explained(name, again, lambda: _check_commit(api, name, str(commit.oid), listed))
    sentence = (
        f"pushed {len(listed.files)} files to {hub.page_of(name)} (commit {str(commit.oid)[:12]}); load it with "
        f"peftkit.load('hub:{name}')"
    )
    return sentence + "".join(f"\nnote: {note}" for note in _notes(export, license))


def token() -> str:
    """HF_TOKEN of the environment; raises HubError where it is not set."""
    value = os.environ.get(TOKEN, "").strip()
    if not value:
        raise HubError(
            f"{TOKEN} is not set: create a token with write access at {hub.page_of('settings/tokens')} and put it in "
            "the environment; peftkit pushes with no other"
        )
    return value


def _open_repository(api: HfApi, name: str, private: bool) -> ModelInfo:
    """What the repository is before the push; it is created if there is none."""
    api.create_repo(name, private=private or None, exist_ok=True)
    info = api.model_info(name)
    if private and not info.private:
        raise HubError(
            f"{name} exists and is public, so --private cannot hold: make it private at "
            f"{hub.page_of(f'{name}/settings')}, or push to another name"
        )
    return info


def _files_to_remove(api: HfApi, name: str, before: ModelInfo, listed: FileList) -> list[str]:
    """Files of the export that the repository held before, and this one does not."""
    there = {file.rfilename for file in before.siblings or ()}
    if FILE not in there:
        foreign = sorted(there - {*UNLISTED, *listed.files})
        if foreign:
            raise HubError(
                f"{name} holds files that peftkit did not push, such as {foreign[0]}: push to another name, or remove "
                "them first"
            )
        return []
    file = Path(api.hf_hub_download(name, FILE, revision=before.sha))
    old = read_list(read_json(file), f"{name}, {FILE}")
    return sorted((set(old.files) & there) - set(listed.files))


def _operations(folder: Path, listed: FileList, card: str, removed: list[str]) -> list[Any]:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    added: dict[str, str | bytes] = {path: str(folder / path) for path in listed.files}
    added |= {CARD: card.encode(), FILE: listed.to_json().encode()}
    return [
        *(CommitOperationAdd(path, content) for path, content in added.items()),
        *(CommitOperationDelete(path, is_folder=False) for path in removed),
    ]


def _card(export: ExportFolder, license: str | None) -> str:
    """The export's card, with its metadata as of now."""
    contents = export.manifest
    kind = COPY if contents.saves in SAVES else contents.saves
    usage = EXPORTERS.get(kind)().usage(contents)
    metrics = read_json(export.path / "metrics.json")
    metadata = card_metadata.front_matter(contents, export.recipe, metrics, usage.library, license)
    return card_metadata.with_front_matter((export.path / CARD).read_text(encoding="utf-8"), metadata)


def _check_commit(api: HfApi, name: str, commit: str, listed: FileList) -> None:
    """Raises HubError unless the commit holds every file with its size, and large ones with their SHA-256."""
    info = api.model_info(name, revision=commit, files_metadata=True)
    there = {file.rfilename: file for file in info.siblings or ()}
    for path, expected in listed.files.items():
        file = there.get(path)
        stored = file.lfs.sha256 if file is not None and file.lfs else expected.sha256
        if file is None or file.size != expected.size or stored != expected.sha256:
            raise HubError(f"{name}: the hub has not stored {path} as it was sent")


def _notes(export: ExportFolder, license: str | None) -> Iterator[str]:
    contents = export.manifest
    if license is None:
        yield "no license is stated; give one with --license ID before the repository is made public"
    if contents.saves == "adapter" and Path(contents.source).expanduser().is_dir():
        yield f"its base is the folder {contents.source}; only who has the same base can load the adapter"
    if not (export.path / proof.FILE).is_file():
        yield "it was not compared with the trained model (export.prove was off), as its card says"


def _explained(name: str, again: str, work: Callable[[], Any]) -> Any:
    """The result of the work; whatever fails between here and the hub is one message, without the token."""
    try:
        return work()
    except PeftkitError:
        raise
    except Exception as error:  # network errors have no common base class that huggingface_hub promises to keep
        raise HubError(_problem(error, name, again).replace(token(), "(token)")) from error


def _problem(error: Exception, name: str, again: str) -> str:
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set: unset it to push. {again}"
    if status == 401:
        return f"the hub does not accept {TOKEN}: check it at {hub.page_of('settings/tokens')}"
    if status in (403, 404):
        return f"{TOKEN} may not write to {name}: give the token write access, or push to a name of your own"
    if status in (409, 412):
        return f"someone else has pushed to {name} meanwhile; nothing of this push is visible. {again}"
    if isinstance(error, ValueError) and "README.md" in str(error):
        return f"the hub refuses the card's metadata: {' '.join(str(error).split())[:500]}"
    return f"the push to {name} failed ({hub.cause_of(error)}); {name} shows all of it or nothing. {again}"


@contextmanager
def in_cache(sources: list[ExportFolder], options: dict[str, Any]) -> Iterator[Path]:
    """The export of the first run in a folder of the cache, which is removed when the block ends without an exception.

    A push that was interrupted finds it again, so that the same bytes are sent and nothing is computed twice.

    Args:
        sources: the run, and others that the export is computed from.
        options: of ``run_export``.
    """
    digests = [{path: file.sha256 for path, file in list_files(one.path, "").files.items()} for one in sources]
    described = json.dumps([version("peftkit"), digests, options], sort_keys=True, default=str)
    entry = cache.cache_folder("push") / hashlib.sha256(described.encode()).hexdigest()[:32]

    def write(folder: Path) -> None:
        for other in entry.parent.glob(f".{entry.name}.*.tmp"):
            if other != folder:  # left by a process that was killed, as this one has the lock
                shutil.rmtree(other, ignore_errors=True)
        exporter.run_export(sources[0].path, folder / "export", **options)

    with cache.cached_entry(entry, write):
        yield entry / "export"
        shutil.rmtree(entry, ignore_errors=True)

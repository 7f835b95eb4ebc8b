"""Data sets of the Hugging Face hub: downloaded once into its cache; one message for whatever goes wrong."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

from peftkit.data.problems import Problems
from peftkit.data.source import ALIASES, SPLITS, Source, source_forms
from peftkit.errors import DataError, HubError, did_you_mean
from peftkit.schema.recipe import DataConfig
from peftkit.schema.registries import SOURCES
from peftkit.schema.types import Row

if TYPE_CHECKING:
    from datasets import DatasetDict

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
TIMEOUT = 10.0


@SOURCES.register("hub")
class HubSource(Source):
    """A data set of the Hugging Face hub, downloaded, or streamed with data.streaming."""

    form = "a hub id"
    rank = 20
    on_hub = True

    @classmethod
    def accepts(cls, name: str) -> bool:
        return HUB_ID.fullmatch(name) is not None

    def __init__(self, name: str, data: DataConfig) -> None:
        super().__init__(name, data)
        loaded = load(name, data)
        names = _split_names(list(loaded), name, data)
        self._loaded = {split: loaded[names[split]] for split in SPLITS if split in names}
        self.splits = tuple(self._loaded)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the fingerprints of the downloaded splits, or the commit of a streamed data set."""
        if self.data.streaming:
            fingerprints = [_commit(self.name, self.data)]
        else:
            fingerprints = [f"{split} {loaded._fingerprint}" for split, loaded in self._loaded.items()]
        return hashlib.sha256("\n".join([self.name, *fingerprints]).encode()).hexdigest()

    def rows(self, split: str, problems: Problems) -> Iterator[Row]:
        """The rows; ``_file`` is the data set's name and split, ``_line`` the row's number."""
        place = self.place(split)
        try:
            for line, row in enumerate(self._loaded[split], 1):
                yield {**row, "_file": place, "_line": line}
        except OSError as error:
            raise explain(error, self.name, self.data) from error

    def class_names(self, split: str) -> dict[str, list[str]]:
        from peftkit.data.tables import class_names

        return class_names(self._loaded[split].features or {})


def load(name: str, data: DataConfig) -> DatasetDict:
    """All splits of a hub data set, downloaded or streamed; raises what ``explain`` makes of any failure."""
    import datasets

    try:
        with _quiet(offline=_unreachable(list(_causes(_hub_error(name, data))))):
            return datasets.load_dataset(name, name=data.subset, revision=data.revision, streaming=data.streaming)
    except Exception as error:  # the libraries and the network underneath share no base class
        raise explain(error, name, data) from error


def _split_names(names: list[str], source: str, data: DataConfig) -> dict[str, str]:
    """Our split → the hub's."""
    splits: dict[str, str] = {}
    for name in names:
        split = ALIASES.get(name.lower())
        if split is not None and name not in data.splits.values():
            splits.setdefault(split, name)
    for split, name in data.splits.items():
        if name not in names:
            raise DataError(f"data.splits.{split}: '{source}' has no split '{name}': {did_you_mean(name, names)}")
        splits[split] = name
    if "train" in splits:
        return splits
    if len(names) == 1:
        return {"train": names[0]}
    raise DataError(f"data.splits.train: none of the splits of '{source}' is named train; they are: {', '.join(names)}")


@contextmanager
def _quiet(*, offline: bool) -> Iterator[None]:
    """Shows no progress bars and no warnings of retries; does not retry where the hub was just found unreachable."""
    import datasets

    with ExitStack() as restore:
        if datasets.is_progress_bar_enabled():
            restore.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        restore.callback(setattr, datasets.config, "HF_HUB_OFFLINE", datasets.config.HF_HUB_OFFLINE)
        datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE or offline
        for logger in map(logging.getLogger, ("huggingface_hub", "datasets")):
            restore.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        yield


def _commit(name: str, data: DataConfig) -> str:
    """The commit that the revision of a data set points to; raises HubError when the hub does not answer."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(name, revision=data.revision, timeout=TIMEOUT).sha)
    except Exception as error:
        raise explain(error, name, data) from error


def _hub_error(name: str, data: DataConfig) -> Exception | None:
    """Why the hub refuses a data set; None when it does not."""
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(name, revision=data.revision, timeout=TIMEOUT)
        HfApi().auth_check(name, repo_type="dataset")
    except Exception as error:
        return error
    return None


def explain(error: Exception, name: str, data: DataConfig) -> DataError | HubError:
    """What went wrong at the hub, in one message; a DataError where ``data.subset`` is missing or wrong."""
    from huggingface_hub import errors
    from huggingface_hub.constants import HF_HUB_OFFLINE

    # datasets cuts the chain of causes, so the hub is asked once more
    causes = [*_causes(error), *_causes(_hub_error(name, data))]
    page = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')}/datasets/{name}"
    if (subset := _subset(error, name, data)) is not None:
        return subset
    if _has(causes, errors.GatedRepoError):
        message = f"'{name}' is gated: accept its terms at {page}, then set HF_TOKEN (or run `hf auth login`)"
    elif _has(causes, errors.RevisionNotFoundError):
        message = f"'{name}' has no revision '{data.revision}': see {page}/commits, or set data.revision=null"
    elif _has(causes, errors.RepositoryNotFoundError):
        message = f"there is no data set '{name}' at {page} (or it is private: set HF_TOKEN), nor such a file or folder"
    elif HF_HUB_OFFLINE:
        message = f"'{name}' is not in the cache and HF_HUB_OFFLINE is set: unset it, or download it once while online"
    elif _unreachable(causes):
        message = f"'{name}' is not cached and the hub cannot be reached: check the network (HF_ENDPOINT, proxies)"
    elif isinstance(error, RuntimeError) and "script" in str(error):
        message = f"'{name}' is loaded by a script, which is never run; choose a copy in Parquet format"
    elif "DataFilesNotFound" in type(error).__name__ or "EmptyDataset" in type(error).__name__:
        message = f"'{name}' has no data file that can be read: see {page}/tree/main"
    else:
        first = f"{type(causes[0]).__name__}: {str(causes[0]).strip()}".removesuffix(": ").splitlines()[0][:200]
        message = f"the download of '{name}' failed ({first}); run it again, complete files are kept"
    forms = source_forms(without=HubSource)
    return HubError(f"data.source: {message}. To run without the hub, set data.source to {forms}")


def _subset(error: Exception, name: str, data: DataConfig) -> DataError | None:
    message = str(error)
    if not isinstance(error, ValueError) or not ("Config name is missing" in message or "BuilderConfig" in message):
        return None
    listed = re.search(r"\[(.*?)\]", message, re.DOTALL)
    names = re.findall(r"'([^']+)'", listed.group(1)) if listed else []
    if data.subset is None:
        return DataError(f"data.subset: '{name}' has several configurations, choose one of: {', '.join(names[:12])}")
    return DataError(f"data.subset: '{name}' has no configuration '{data.subset}': {did_you_mean(data.subset, names)}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _has(causes: list[BaseException], kind: type[BaseException]) -> bool:
    return any(isinstance(cause, kind) for cause in causes)


def _unreachable(causes: list[BaseException]) -> bool:
    names = {base.__name__ for cause in causes for base in type(cause).__mro__}
    return bool(names & {"ConnectError", "ConnectTimeout", "ProxyError", "LocalEntryNotFoundError"}) or (
        "ConnectionError" in names and "Couldn't reach" in str(causes[0])
    )

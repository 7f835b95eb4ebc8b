"""From ``data.source`` to raw rows: what kind of source it is, which splits it has, and its rows on disk.

Raw rows are the source's own columns, with ``_file`` and ``_line``; tasks read them in ``describe`` and ``canonical``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.data import hub
from peftkit.data.folders import ALIASES, Layout, layout_of, nearest
from peftkit.data.packages import PREFIX, layout_of_package
from peftkit.data.problems import Problems
from peftkit.data.readers import READERS, class_names, read_parquet
from peftkit.data.tables import write_rows
from peftkit.errors import DataError, did_you_mean
from peftkit.schema.recipe import DataConfig
from peftkit.schema.types import Row
from peftkit.system.cache import file_digest

if TYPE_CHECKING:
    from datasets import Dataset

PARTS = ("train", "validation", "test")
INSTRUCTION_COLUMNS = (
    "messages", "conversations", "instruction", "input", "output", "prompt", "completion", "response", "system",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """One source that was found: its splits, and a digest of its content."""

    name: str
    layout: Layout = field(default_factory=dict)
    """Split → files; empty for a hub data set."""
    remote: dict[str, Any] = field(default_factory=dict)
    """Split → rows of a hub data set."""
    digest: str = ""
    """SHA-256 over the content, or what stands for it on the hub."""

    @property
    def splits(self) -> tuple[str, ...]:
        """Which of train, validation and test there are."""
        return tuple(part for part in PARTS if part in self.layout or part in self.remote)


def find(data: DataConfig) -> list[Source]:
    """The sources of a recipe, found but not read.

    Raises:
        DataError: no such file, folder, package or split; nothing that can be read.
        HubError: the hub cannot give a data set.
    """
    names = (data.source,) if isinstance(data.source, str) else data.source
    return [_find(name, data) for name in names]


def _find(name: str, data: DataConfig) -> Source:
    if name.startswith(PREFIX):
        return _local(name, layout_of_package(name, data))
    if "\0" in name or not name.strip():
        raise DataError(f"data.source: expected a hub id, a file, a folder or package:NAME, found {name!r}")
    path = Path(name).expanduser()
    if path.exists():
        layout = layout_of(path, data)
        return _local(name, _chosen(layout, name, data, path) if data.splits else layout)
    if _is_path(name):
        raise DataError(f"data.source: no such file or folder; {nearest(path)}", file=path)
    return _from_hub(name, data)


def _is_path(name: str) -> bool:
    """Whether a name that does not exist here was meant as a path rather than as a hub id."""
    suffix = Path(name).suffix.lower()
    looks_local = name.startswith((".", "/", "~")) or suffix in (*READERS, ".txt")
    return looks_local or not hub.HUB_ID.fullmatch(name) or f".{name}" in (*READERS, ".text")


def _local(name: str, layout: Layout) -> Source:
    digest = hashlib.sha256()
    for part, files in layout.items():
        for file in files:
            digest.update(f"{part}\0{file.path}\0{sorted(file.extra.items())}\0{file_digest(file.path)}\n".encode())
    return Source(name, layout=layout, digest=digest.hexdigest())


def _chosen(layout: Layout, name: str, data: DataConfig, path: Path) -> Layout:
    """The layout under ``data.splits``, whose values are names of splits or of files in the folder."""
    chosen = dict(layout)
    for part, wanted in data.splits.items():
        held = layout.get(ALIASES.get(wanted, wanted))  # type: ignore[call-overload]
        if held is None:
            inside = [child for child in sorted(path.glob("*")) if child.is_file()] if path.is_dir() else []
            named = [child for child in inside if wanted in (child.name, child.stem)]
            if not named:
                known = {*layout, *(child.name for child in inside)}
                raise DataError(f"data.splits.{part}: {name} has no '{wanted}': {did_you_mean(wanted, known)}")
            held = layout_of(named[0], data)["train"]
        chosen[part] = held
    taken = {ALIASES.get(wanted, wanted) for wanted in data.splits.values()}
    return {part: files for part, files in chosen.items() if part in data.splits or part not in taken}


def _from_hub(name: str, data: DataConfig) -> Source:
    splits = hub.load(name, data)
    remote = {part: splits[source] for part, source in _hub_parts(list(splits), name, data).items()}
    if data.streaming:
        prints = [hub.commit(name, data)]
    else:
        prints = [f"{part} {split._fingerprint}" for part, split in remote.items()]
    digest = hashlib.sha256("\n".join([name, *prints]).encode()).hexdigest()
    return Source(name, remote=remote, digest=digest)


def _hub_parts(found: list[str], name: str, data: DataConfig) -> dict[str, str]:
    """Our split → the hub's."""
    parts: dict[str, str] = {}
    for source in found:
        part = ALIASES.get(source.lower())
        if part is not None and source not in data.splits.values():
            parts.setdefault(part, source)
    for part, source in data.splits.items():
        if source not in found:
            raise DataError(f"data.splits.{part}: '{name}' has no split '{source}': {did_you_mean(source, found)}")
        parts[part] = source
    if "train" not in parts:
        if len(found) != 1:
            raise DataError(
                f"data.splits.train: none of the splits of '{name}' is named train; they are: {', '.join(found)}"
            )
        parts = {"train": found[0]}
    return parts


def read(source: Source, data: DataConfig, folder: Path, prefix: str) -> dict[str, Dataset]:
    """The raw rows of each split, on disk under ``folder`` and memory-mapped.

    Raises:
        DataError: bad files or rows, up to ten of them in one message; a split without rows.
    """
    problems = Problems()
    used = _used_columns(data)
    splits: dict[str, Dataset] = {}
    for part in source.splits:
        rows = _rows(source, part, data, problems)
        try:
            raw = write_rows(rows, folder, f"{prefix}-{part}", used)
        except DataError as error:
            raise error if problems.count and error is problems.found[-1] else problems.fatal(error) from None
        if raw is not None:
            splits[part] = _with_class_names(raw, source, part)
        elif not problems.count:
            raise DataError(f"the {part} split has no rows", file=_first_file(source, part))
    problems.check()
    return splits


def _rows(source: Source, part: str, data: DataConfig, problems: Problems) -> Iterator[Row]:
    if part in source.remote:
        return hub.rows_of(source.remote[part], source.name, part, data)
    return (
        {**row, **file.extra} if file.extra else row
        for file in source.layout[part]
        for row in file.reader(file.path, problems)
    )


def _with_class_names(raw: Dataset, source: Source, part: str) -> Dataset:
    """Class names of the source go with the column: from the hub's features, or a Parquet file's metadata."""
    from datasets import ClassLabel, Dataset, DatasetInfo, Value

    names: dict[str, list[str]] = {}
    if part in source.remote:
        features = source.remote[part].features or {}
        names = {key: list(held.names) for key, held in features.items() if isinstance(held, ClassLabel) and held.names}
    elif source.layout[part][0].reader is read_parquet:
        names = class_names(source.layout[part][0].path)
    features = raw.features.copy()
    for column, classes in names.items():
        if isinstance(features.get(column), Value):
            features[column] = ClassLabel(names=classes)
    return Dataset(raw.data, info=DatasetInfo(features=features)) if features != raw.features else raw


def _used_columns(data: DataConfig) -> frozenset[str]:
    labels = (data.label,) if isinstance(data.label, str) else data.label
    pair = (data.text_pair,) if data.text_pair else ()
    return frozenset(
        {data.text, *pair, *labels, *data.columns.values(), *INSTRUCTION_COLUMNS, "_file", "_line", "_document"}
    )


def _first_file(source: Source, part: str) -> Path | str:
    return source.layout[part][0].path if part in source.layout else f"{source.name}[{part}]"

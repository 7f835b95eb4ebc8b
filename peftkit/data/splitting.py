"""Splits that the source lacks, mixing of sources, and limits: pure functions of the rows and ``data.split_seed``.

No row is lost. Rows that belong together (of one document, equal or nearly equal texts) stay in one split, and classes
keep their shares, by largest remainder.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from peftkit.data.mapping import Rows
from peftkit.data.source import SPLITS
from peftkit.data.steps import EXAMPLES, CleaningStep
from peftkit.errors import DataError
from peftkit.schema.recipe import DataConfig

TEST, VALIDATION, LIMIT, MIX = 1, 2, 3, 4
"""Purposes of random streams: each has its own, so that one choice does not affect another."""


def make_splits(
    rows: Rows, alive: np.ndarray, groups: np.ndarray, data: DataConfig, labels: Sequence[str] = ()
) -> tuple[np.ndarray, list[CleaningStep]]:
    """Each row's split [rows]: the source's own; validation and test are held out of train where it has none.

    Rows of one of the ``groups`` stay together, as do those of one document and equal texts. Raises DataError when
    there are fewer rows than are to be held out; ``labels`` are class names for messages.
    """
    split = rows.split.copy()
    steps: list[CleaningStep] = []
    units: np.ndarray | None = None
    for source in np.unique(rows.source):
        mine = rows.source == source
        train = np.flatnonzero(alive & mine & (split == 0))
        lacking = [
            (number, size, purpose)
            for number, size, purpose in ((2, data.test_size, TEST), (1, data.validation_size, VALIDATION))
            if size and not np.any(mine & (rows.split == number))
        ]
        if not lacking:
            continue
        units = _units(rows, groups) if units is None else units
        strata = rows.stratum if data.stratify else np.zeros(len(rows), dtype=np.int64)
        steps += _rare_classes(rows, train, len(lacking) + 1, data, labels)
        total = len(train)
        for number, size, purpose in lacking:
            rest = train[split[train] == 0]
            count = _count(size, total, len(rest), SPLITS[number])
            held_out = hold_out(rest, units[rest], strata[rest], count, _generator(data, purpose))
            if not len(held_out):
                alone = len(np.unique(strata[train])) == total
                raise DataError(_cannot_hold_out(SPLITS[number], total, len(rest), each_its_own=alone))
            split[held_out] = number
    moved = np.bincount(split[split != rows.split], minlength=len(SPLITS)).tolist()
    return split, steps + [CleaningStep("split", name, "kept", count) for name, count in zip(SPLITS, moved) if count]


def _cannot_hold_out(split: str, rows: int, left: int, *, each_its_own: bool) -> str:
    """Why no row can be held out, and what to do."""
    needs = f"no {split} split can be held out"
    remedy = f"put a {split} file next to it in a folder (train.*, {split}.*)"
    if rows == 1:
        return f"{needs}: there is one row only (a text file of under 24,000 characters is one); add rows, or {remedy}"
    if each_its_own:
        return f"{needs}: every one of the {rows} rows has another label. Is data.label the right column?"
    if left == 1:  # another split took the rest
        return f"{needs}: of {rows} rows, one is left for training; add rows, or {remedy}"
    return f"{needs}: all {rows} rows are of one document or have the same text; add others, or {remedy}"


def hold_out(
    rows: np.ndarray, units: np.ndarray, strata: np.ndarray, count: int, generator: np.random.Generator
) -> np.ndarray:
    """About ``count`` of the rows [n] (exactly, if every unit is one row), with the classes in their shares.

    Every class leaves at least one unit behind.

    Args:
        units: rows with the same number are taken or left together, [n].
        strata: class of each row, [n]; a unit has the class of its first row.
    """
    _, first, inverse, sizes = np.unique(units, return_index=True, return_inverse=True, return_counts=True)
    classes, of_unit = np.unique(strata[first], return_inverse=True)
    available = np.bincount(of_unit, weights=sizes, minlength=len(classes))
    wanted = apportion(available, count, available - np.minimum(available, 1))
    taken = np.zeros(len(sizes), dtype=bool)
    for number, most in enumerate(wanted.tolist()):
        members = generator.permutation(np.flatnonzero(of_unit == number))
        taken[_fill(members, sizes, most)] = True
    return rows[taken[inverse]]


def apportion(sizes: np.ndarray, count: int, most: np.ndarray) -> np.ndarray:
    """Whole shares of ``count`` in proportion to ``sizes`` by largest remainder, none over ``most``; int64."""
    exact = sizes * (count / max(1, sizes.sum()))
    shares = np.minimum(np.floor(exact), most).astype(np.int64)
    order = np.argsort(-(exact - np.floor(exact)), kind="stable")
    while shares.sum() < min(count, most.sum()):
        for number in order:
            shares[number] += shares[number] < most[number] and shares.sum() < count
    return shares


def _fill(members: np.ndarray, sizes: np.ndarray, wanted: int) -> list[int]:
    """Units, in order, that fit into ``wanted`` rows; also the smallest other one if they fill less than half."""
    chosen: list[int] = []
    filled = 0
    for unit in members.tolist():
        if filled + sizes[unit] <= wanted and len(chosen) < len(members) - 1:
            chosen.append(unit)
            filled += int(sizes[unit])
    left = [unit for unit in members.tolist() if unit not in set(chosen)]
    if len(left) > 1 and 2 * filled < wanted:
        chosen.append(min(left, key=lambda unit: sizes[unit]))
    return chosen


def mix(rows: Rows, alive: np.ndarray, split: np.ndarray, data: DataConfig) -> list[CleaningStep]:
    """Drops training rows until the sources' counts are in proportion to ``data.weights``."""
    if data.weights is None or isinstance(data.source, str):
        return []
    shares = np.array(data.weights) / sum(data.weights)
    train = [np.flatnonzero(alive & (split == 0) & (rows.source == source)) for source in range(len(shares))]
    # the source that runs out first limits all others
    total = min(len(index) / share for index, share in zip(train, shares))
    generator, steps = _generator(data, MIX), []
    for name, index, share in zip(data.source, train, shares):
        keep = generator.permutation(len(index))[: max(1, round(total * share))]
        dropped = np.delete(index, keep)
        alive[dropped] = False
        steps.append(CleaningStep("mixing", "train", "kept", len(keep), (f"{name}: {len(keep)} of {len(index)} rows",)))
    return steps


def limit(rows: Rows, alive: np.ndarray, split: np.ndarray, data: DataConfig) -> list[CleaningStep]:
    """Keeps ``data.limit`` rows of each split, with the classes in their shares."""
    steps = []
    for number, name in enumerate(SPLITS):
        most = data.limit.get(name) if isinstance(data.limit, dict) else data.limit  # type: ignore[call-overload]
        index = np.flatnonzero(alive & (split == number))
        if most is None or len(index) <= most:
            continue
        strata = rows.stratum[index] if data.stratify else np.zeros(len(index), dtype=np.int64)
        _, of_row, sizes = np.unique(strata, return_inverse=True, return_counts=True)
        generator = _generator(data, LIMIT)
        for stratum, share in enumerate(apportion(sizes.astype(float), most, sizes)):
            alive[generator.permutation(index[of_row == stratum])[share:]] = False
        steps.append(CleaningStep("limit", name, "dropped", len(index) - most))
    return steps


def _units(rows: Rows, groups: np.ndarray) -> np.ndarray:
    """Unit number of each row [rows]: rows that share a document, a text or a group are one unit."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    count = len(rows)
    _, texts = np.unique(rows.text, return_inverse=True)
    _, documents = np.unique(rows.document, return_inverse=True)
    own = np.arange(count)
    # connected components of the graph of rows and what they share
    with_document = np.flatnonzero(rows.document != 0)
    one = np.concatenate([own, own, with_document])
    other = np.concatenate([count + texts, groups, 2 * count + documents[with_document]])
    graph = coo_matrix((np.ones(len(one), dtype=np.int8), (one, other)), shape=(3 * count, 3 * count))
    return connected_components(graph, directed=False)[1][:count]


def _count(size: float, total: int, left: int, name: str) -> int:
    count = round(size * total) if size < 1 else int(size)
    if count >= left:
        message = f"data.{name}_size={size:g} asks for {max(1, count)} of the {left} rows that are left in training"
        raise DataError(f"{message}; ask for fewer, or add rows")
    return max(1, count)


def _rare_classes(
    rows: Rows, train: np.ndarray, needed: int, data: DataConfig, labels: Sequence[str]
) -> list[CleaningStep]:
    """Reports classes with too few rows to be in every split."""
    classes, counts = np.unique(rows.stratum[train], return_counts=True)
    few = [(rows.strata[number], count) for number, count in zip(classes, counts) if count < needed]
    if not few or not data.stratify:
        return []
    named = [labels[int(name)] if name.isdecimal() and int(name) < len(labels) else name for name, _ in few]
    examples = [f"'{name}' has {count} row{'s' if count > 1 else ''}" for name, (_, count) in zip(named, few)]
    total = int(sum(count for _, count in few))
    return [CleaningStep("rare_classes", "train", "reported", total, tuple(examples[:EXAMPLES]))]


def _generator(data: DataConfig, purpose: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([data.split_seed, purpose]))

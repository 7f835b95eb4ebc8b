"""Duplicates, near duplicates, contradictions and leakage: found by hashes of the texts, told with their places.

Every function takes the rows and a mask of those that are alive, marks what it drops, and returns the steps that say
what it did. Texts are compared without case and spacing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from peftkit.data.mapping import PARTS, Rows
from peftkit.data.near_duplicates import find_pairs, words_of
from peftkit.data.steps import EXAMPLES, CleaningStep
from peftkit.data.tables import iterate
from peftkit.errors import DataError
from peftkit.schema.recipe import CleaningConfig
from peftkit.schema.task import Task


def drop_conflicts(rows: Rows, alive: np.ndarray, action: str) -> list[CleaningStep]:
    """Equal texts with different labels within a split; ``drop`` removes all of them."""
    steps = []
    for part, index in _parts(rows, alive) if action != "off" else ():
        _, inverse = np.unique(rows.text[index], return_inverse=True)
        # a text's labels agree when the smallest and the largest of their hashes do
        low = np.full(inverse.max() + 1, np.iinfo(np.uint64).max, dtype=np.uint64)
        high = np.zeros(inverse.max() + 1, dtype=np.uint64)
        np.minimum.at(low, inverse, rows.label[index])
        np.maximum.at(high, inverse, rows.label[index])
        bad = index[(low != high)[inverse]]
        bad = bad[np.argsort(rows.text[bad], kind="stable")]
        if len(bad):
            steps.append(_step(rows, "conflicts", part, action, bad, alive))
    return steps


def drop_duplicates(rows: Rows, alive: np.ndarray, action: str) -> list[CleaningStep]:
    """Rows of one split with a text that stood there before; the first stays."""
    steps = []
    for part, index in _parts(rows, alive) if action != "off" else ():
        _, first, inverse = np.unique(rows.text[index], return_index=True, return_inverse=True)
        earlier = first[inverse]
        again = np.flatnonzero(earlier != np.arange(len(index)))
        if len(again):
            kept = dict(zip(index[again].tolist(), index[earlier[again]].tolist()))
            steps.append(_step(rows, "duplicates", part, action, index[again], alive, kept))
    return steps


def near_duplicates(
    rows: Rows, alive: np.ndarray, task: Task, cleaning: CleaningConfig
) -> tuple[list[CleaningStep], np.ndarray]:
    """Near duplicates in the training split, and each row's group: near duplicates belong together when split.

    Returns:
        steps, and groups [rows]: the index of the first row of the group.
    """
    groups = np.arange(len(rows))
    index = np.flatnonzero(alive & (rows.part == 0))
    if cleaning.near_duplicates == "off" or not len(index):
        return [], groups

    def texts(wanted: np.ndarray) -> Iterator[str]:
        return (task.text_of(row) for row in iterate(rows.data.select(wanted)))

    pairs = find_pairs(
        lambda wanted: (words_of(text) for text in texts(index[wanted])), len(index), cleaning.near_threshold
    )
    removed: dict[int, int] = {}
    for later, earlier, _ in pairs:  # ordered by the later row: what it resembles is decided already
        if later not in removed and earlier not in removed:
            removed[later] = earlier
            groups[index[later]] = groups[index[earlier]]
    if not removed:
        return [], groups
    found = index[np.array(sorted(removed))]
    twins = {int(index[later]): int(index[earlier]) for later, earlier in removed.items()}
    return [_step(rows, "near_duplicates", "train", cleaning.near_duplicates, found, alive, twins, " ~ ")], groups


def drop_leakage(rows: Rows, alive: np.ndarray, part: np.ndarray, action: str) -> list[CleaningStep]:
    """Training rows that also stand in validation or test, and validation rows that stand in test.

    Args:
        part: split of each row now, after splits were made.

    Raises:
        DataError: there are some, and ``action`` is "error".
    """
    steps = []
    for inner, outer in ((0, (1, 2)), (1, (2,))) if action != "off" else ():
        held = np.flatnonzero(alive & np.isin(part, outer))
        index = np.flatnonzero(alive & (part == inner))
        leaked = index[np.isin(rows.text[index], rows.text[held])]
        if not len(leaked):
            continue
        where = dict(zip(rows.text[held].tolist(), held.tolist()))
        twins = {row: where[int(rows.text[row])] for row in leaked.tolist()}
        step = _step(rows, "leakage", PARTS[inner], action, leaked, alive, twins)
        if action == "error":
            said = f"{step.rows} rows of the {step.split} split also stand in the data it is judged by"
            hint = "remove them, or set data.cleaning.leakage=drop"
            raise DataError("\n  ".join([f"{said}; {hint}", *step.examples]))
        steps.append(step)
    return steps


def _parts(rows: Rows, alive: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    for number, part in enumerate(PARTS):
        index = np.flatnonzero(alive & (rows.part == number))
        if len(index):
            yield part, index


def _step(
    rows: Rows,
    name: str,
    part: str,
    action: str,
    found: np.ndarray,
    alive: np.ndarray,
    twins: Mapping[int, int] | None = None,
    sign: str = " = ",
) -> CleaningStep:
    """The step over the rows ``found``; ``twins`` says which other row each collides with."""
    examples = []
    for row in found[:EXAMPLES].tolist():
        examples.append(f"{rows.place(row)}{sign}{rows.place(twins[row])}" if twins else rows.place(row))
    if action == "drop":
        alive[found] = False
    return CleaningStep(name, part, "dropped" if action == "drop" else "reported", len(found), tuple(examples))

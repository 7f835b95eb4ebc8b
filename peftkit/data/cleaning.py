"""Duplicates, near duplicates, conflicting labels and leakage, by hashes of the texts.

Every function takes the rows and a mask ``alive`` [rows], clears the mask where it drops a row, and returns the steps
taken. What makes rows equal is the task's ``identity``: a classifier's texts are compared without case and spacing.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from peftkit.data.mapping import Rows
from peftkit.data.near_duplicates import find_pairs, words_of
from peftkit.data.source import SPLITS
from peftkit.data.steps import EXAMPLES, CleaningStep
from peftkit.data.tables import iterate
from peftkit.errors import DataError
from peftkit.schema.recipe import CleaningConfig
from peftkit.schema.task import Task


def drop_conflicts(rows: Rows, alive: np.ndarray, action: str) -> list[CleaningStep]:
    """Equal texts with different labels within a split; ``drop`` removes all of them.

    ``report`` raises DataError where most of the rows are such, which is what a table of one row per label looks like.
    """
    steps = []
    for split, index in _splits(rows, alive) if action != "off" else ():
        _, texts = np.unique(rows.text[index], return_inverse=True)
        names, labels = np.unique(rows.label[index], return_inverse=True)
        pairs = np.unique(texts * len(names) + labels)  # a number for each text and label that occur together
        bad = index[(np.bincount(pairs // len(names)) > 1)[texts]]
        bad = bad[np.argsort(rows.text[bad], kind="stable")]
        if action == "report" and 2 * len(bad) > len(index):
            message = f"the texts of {len(bad):,} of {len(index):,} rows of the {split} split also have another label"
            hint = "in a table of one row per label, write one row per text with all of its labels"
            raise DataError(f"{message}: {hint}; if labels are meant to differ so, data.cleaning.conflicts=off or drop")
        if len(bad):
            steps.append(_step(rows, alive, "conflicts", split, action, bad, None))
    return steps


def drop_duplicates(rows: Rows, alive: np.ndarray, action: str) -> list[CleaningStep]:
    """Rows whose text occurs earlier in the same split; the first row stays."""
    steps = []
    for split, index in _splits(rows, alive) if action != "off" else ():
        _, first, inverse = np.unique(rows.text[index], return_index=True, return_inverse=True)
        earlier = first[inverse]
        again = np.flatnonzero(earlier != np.arange(len(index)))
        if len(again):
            twins = dict(zip(index[again].tolist(), index[earlier[again]].tolist()))
            steps.append(_step(rows, alive, "duplicates", split, action, index[again], twins))
    return steps


def near_duplicates(
    rows: Rows, alive: np.ndarray, task: Task, cleaning: CleaningConfig
) -> tuple[list[CleaningStep], np.ndarray]:
    """Near duplicates in the training split, and each row's group [rows], as the index of the group's first row."""
    groups = np.arange(len(rows))
    index = np.flatnonzero(alive & (rows.split == 0))
    if cleaning.near_duplicates == "off" or not len(index):
        return [], groups

    def words(numbers: np.ndarray) -> Iterator[list[str]]:
        return (words_of(task.text_of(row)) for row in iterate(rows.data.select(index[numbers])))

    twins: dict[int, int] = {}
    for later, earlier, _ in find_pairs(words, len(index), cleaning.near_threshold):
        one, other = int(index[later]), int(index[earlier])
        if one not in twins and other not in twins:  # pairs are ordered by the later row, so the earlier is decided
            twins[one] = other
            groups[one] = groups[other]
    if not twins:
        return [], groups
    near = np.array(sorted(twins))
    return [_step(rows, alive, "near_duplicates", "train", cleaning.near_duplicates, near, twins)], groups


def drop_leakage(rows: Rows, alive: np.ndarray, split: np.ndarray, action: str) -> list[CleaningStep]:
    """Training rows whose text is also in validation or test, and validation rows whose text is in test.

    ``split`` [rows] may differ from the source's. Raises DataError for such rows when ``action`` is "error".
    """
    steps = []
    for inner, outer in ((0, (1, 2)), (1, (2,))) if action != "off" else ():
        held_out = np.flatnonzero(alive & np.isin(split, outer))
        leaked = np.flatnonzero(alive & (split == inner) & np.isin(rows.text, rows.text[held_out]))
        if not len(leaked):
            continue
        row_of = dict(zip(rows.text[held_out].tolist(), held_out.tolist()))
        twins = {row: row_of[int(rows.text[row])] for row in leaked.tolist()}
        step = _step(rows, alive, "leakage", SPLITS[inner], action, leaked, twins)
        if action == "error":
            message = f"{step.rows} rows of the {step.split} split are also in the data that it is evaluated on"
            hint = "remove them, or set data.cleaning.leakage=drop"
            raise DataError("\n  ".join([f"{message}; {hint}", *step.examples]))
        steps.append(step)
    return steps


def _splits(rows: Rows, alive: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    for number, split in enumerate(SPLITS):
        index = np.flatnonzero(alive & (rows.split == number))
        if len(index):
            yield split, index


def _step(
    rows: Rows, alive: np.ndarray, name: str, split: str, action: str, bad: np.ndarray, twins: dict[int, int] | None
) -> CleaningStep:
    """The step that drops or reports the ``bad`` rows; ``twins`` maps each to the row that it collides with."""
    shown, sign = bad[:EXAMPLES].tolist(), " ~ " if name == "near_duplicates" else " = "
    places = [rows.place(row) + (sign + rows.place(twins[row]) if twins else "") for row in shown]
    if action == "drop":
        alive[bad] = False
    return CleaningStep(name, split, "dropped" if action == "drop" else "reported", len(bad), tuple(places))

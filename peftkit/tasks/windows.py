"""Packs token sequences into windows: no token is lost, and none attends to another sequence.

A window's ``position_ids`` restart at 0 where a sequence begins, which keeps attention within it. The
first label of every sequence is -100: nothing stands before it that could predict it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

IGNORE = -100
"""Label of a token that is not scored (torch's ``cross_entropy`` default)."""


@dataclass(frozen=True)
class Stretch:
    """Tokens that see only each other."""

    ids: list[int]
    labels: list[int]
    """-100 where a token is not scored; not shifted: token t is predicted from those before it."""
    row: int
    """The row of the batch that it comes from."""
    truncated: int = 0
    """Tokens of the row that were cut off."""

    @property
    def weight(self) -> int:
        """Tokens that are scored: the first never is."""
        return sum(label != IGNORE for label in self.labels[1:])


def pack(sequences: Sequence[Stretch], size: int) -> list[list[Stretch]]:
    """Best-fit decreasing: each sequence goes, longest first, where it leaves the least room.

    At most 11/9 of the fewest windows possible, plus one (Johnson et al. 1974). The same sequences always give the same
    windows; within a window, and among windows, the rows' order stays.
    """
    windows: list[list[Stretch]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, window), ascending
    for sequence in sorted(sequences, key=lambda item: -len(item.ids)):
        length = len(sequence.ids)
        place = bisect_left(rooms, (length, -1))
        if place == len(rooms):
            windows.append([sequence])
            insort(rooms, (size - length, len(windows) - 1))
        else:
            room, window = rooms.pop(place)
            windows[window].append(sequence)
            insort(rooms, (room - length, window))
    ordered = [sorted(window, key=lambda item: item.row) for window in windows]
    return sorted(ordered, key=lambda window: window[0].row)


def stream(documents: Iterable[tuple[int, list[int]]], size: int) -> Iterator[list[Stretch]]:
    """Cuts documents, given as (row, tokens), into full windows of ``size`` tokens.

    A document that does not fit goes on in the next window. There it begins with the last token it had in the window
    before, as context only, so that every token but the document's first is scored exactly once. A window ends one
    token short where one place is left, as a sequence of one token scores nothing.
    """
    window: list[Stretch] = []
    room = size
    for row, ids in documents:
        start = 0
        while start < len(ids) - 1:
            if room < 2:
                yield window
                window, room = [], size
            taken = ids[start : start + room]
            window.append(Stretch(taken, [IGNORE, *taken[1:]], row))
            room -= len(taken)
            start += len(taken) - 1
    if window:
        yield window


def to_columns(windows: Sequence[Sequence[Stretch]], *, positions: bool) -> dict[str, list[Any]]:
    """Windows as the columns of examples.

    ``row`` is the window's first row, ``row_offsets`` are all of its rows counted from that one ([0] for a single row),
    which tells the rows that made no example.
    """
    columns: dict[str, list[Any]] = {
        "input_ids": [[token for part in window for token in part.ids] for window in windows],
        "labels": [[label for part in window for label in (IGNORE, *part.labels[1:])] for window in windows],
        "weight": [float(sum(part.weight for part in window)) for window in windows],
        "row": [window[0].row for window in windows],
        "row_offsets": [list(dict.fromkeys(part.row - window[0].row for part in window)) for window in windows],
        "truncated": [sum(part.truncated for part in window) for window in windows],
    }
    if positions:
        columns["position_ids"] = [[place for part in window for place in range(len(part.ids))] for window in windows]
    return columns

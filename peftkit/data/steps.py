"""What was done to the rows, in counts and places."""

from __future__ import annotations

from dataclasses import dataclass

EXAMPLES = 5


@dataclass(frozen=True)
class CleaningStep:
    """One thing that was done to one split."""

    name: str
    """empty, control_characters, conflicts, duplicates, near_duplicates, split, rare_classes, leakage, mixing, limit,
    or augmentation."""
    split: str
    action: str
    """dropped, changed, reported, kept or added."""
    rows: int
    examples: tuple[str, ...] = ()
    """Places ("file:line"), with what they collide with where that is known."""


class StepLog:
    """Counts rows by step, and keeps the first few places."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str, str], tuple[int, list[str]]] = {}

    def add(self, name: str, split: str, action: str, place: str) -> None:
        """Counts one row."""
        count, places = self._found.get((name, split, action), (0, []))
        if count < EXAMPLES:
            places.append(place)
        self._found[(name, split, action)] = (count + 1, places)

    def steps(self) -> list[CleaningStep]:
        """A step for every kind of thing that happened."""
        return [CleaningStep(*key, count, tuple(places)) for key, (count, places) in self._found.items()]

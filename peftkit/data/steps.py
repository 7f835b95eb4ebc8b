"""What cleaning and splitting did to the rows, with counts and examples."""

from __future__ import annotations

from dataclasses import dataclass

EXAMPLES = 5


@dataclass(frozen=True)
class CleaningStep:
    """One change to one split."""

    name: str
    """empty, control_characters, conflicts, duplicates, near_duplicates, split, rare_classes, leakage, mixing, limit,
    or augmentation."""
    split: str
    action: str
    """dropped, changed, reported, kept or added."""
    rows: int
    examples: tuple[str, ...] = ()
    """Places ("file:line"), with the rows that they collide with, where known."""


class StepLog:
    """Counts rows by step, and lists the first few places."""

    def __init__(self) -> None:
        self._places: dict[tuple[str, str, str], tuple[int, list[str]]] = {}

    def add(self, name: str, split: str, action: str, place: str) -> None:
        """Counts one row."""
        count, places = self._places.get((name, split, action), (0, []))
        if count < EXAMPLES:
            places.append(place)
        self._places[(name, split, action)] = (count + 1, places)

    def steps(self) -> list[CleaningStep]:
        """One step per name, split and action."""
        return [CleaningStep(*key, count, tuple(places)) for key, (count, places) in self._places.items()]

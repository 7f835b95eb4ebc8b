"""What cleaning and splitting did to the rows, with counts and examples."""

from __future__ import annotations

from dataclasses import dataclass

EXAMPLES = 5


@dataclass(frozen=True)
class CleaningStep:
    """One change to one split."""

    name: str
    """reading, empty, control_characters, conflicts, duplicates, near_duplicates, split, rare_classes, leakage, mixing,
    limit, augmentation, null_words, or what a task reports (``Task.remarks`` of rows, ``Task.review`` of splits)."""
    split: str
    action: str
    """dropped, changed, reported, kept or added."""
    rows: int
    examples: tuple[str, ...] = ()
    """Places ("file:line"), with the rows that they collide with, where known; or what is reported."""

"""What cleaning and splitting did to the rows, with counts and examples."""

from __future__ import annotations

from dataclasses import dataclass

EXAMPLES = 5


@dataclass(frozen=True)
class CleaningStep:
    """One change to one split."""

    name: str
    """reading, empty, control_characters, conflicts, duplicates, near_duplicates, split, rare_classes, leakage, mixing,
    limit, augmentation, or what a task remarks on (``Task.remarks``)."""
    split: str
    action: str
    """dropped, changed, reported, kept or added."""
    rows: int
    examples: tuple[str, ...] = ()
    """Places ("file:line"), with the rows that they collide with, where known; or what is reported."""

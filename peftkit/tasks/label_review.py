"""What a user should know of the classes before training: alike names, -1, classes that a split lacks, imbalance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from peftkit.tasks.label_spelling import fold, whole_number

IMBALANCE = 10
"""Rows of the commonest class for one of the rarest, from which imbalance is reported."""
SHOWN = 5

Remark = tuple[str, str, int, tuple[str, ...]]
"""Name of the step, split, rows that it concerns, and what was found with the field that changes it."""


def review(counts: Mapping[str, Mapping[str, int]], *, weighted: bool) -> Iterator[Remark]:
    """Remarks on the rows of each class in each split; ``weighted`` is whether the recipe weights the classes."""
    train = counts.get("train", {})
    groups: dict[str, list[str]] = {}
    for name in train:
        groups.setdefault(fold(name), []).append(name)
    alike = [names for names in groups.values() if len(names) > 1]
    if alike:
        rows = sum(train[name] for names in alike for name in names)
        shown = [" ~ ".join(f"{name!r} ({train[name]:,})" for name in names) for names in alike[:SHOWN]]
        yield "similar_classes", "train", rows, ("; ".join(shown), "data.cleaning.similar_classes=merge makes them one")
    numbers = [whole_number(name) for name in train]
    if -1 in numbers and 0 in numbers and all(number is not None and number >= -1 for number in numbers):
        change = "where -1 stands for no label, take these rows out"
        yield "negative_class", "train", train["-1"], (f"'-1' ({train['-1']:,}) is a class like the others", change)
    for split, classes in counts.items():
        lacking = [name for name, rows in classes.items() if not rows]
        if lacking:
            rows = sum(classes[name] for classes in counts.values() for name in lacking)
            elsewhere = {name: sum(each[name] for each in counts.values()) for name in lacking[:SHOWN]}
            shown = [f"{name!r} (0 here, {count:,} elsewhere)" for name, count in elsewhere.items()]
            change = "data.labels lists them" if split == "train" else f"see data.{split}_size or data.splits"
            yield "missing_classes", split, rows, ("; ".join(shown), change)
    present = {name: rows for name, rows in train.items() if rows}
    if len(present) > 1 and not weighted:
        most, least = max(present, key=lambda name: present[name]), min(present, key=lambda name: present[name])
        if present[most] >= IMBALANCE * present[least]:
            shown = [f"{most!r} ({present[most]:,}), {least!r} ({present[least]:,})"]
            yield "imbalance", "train", present[least], (*shown, "task.class_weights=balanced weighs them equally")

"""Easy data augmentation of the training split (Wei & Zou 2019, arXiv:1901.11196): swaps, deletions, typing errors.

    data: {augmentation: {copies: 1, swap: 0.1, delete: 0.1}}

Changed copies are added after the original rows; labels stay. The same seed gives the same copies.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from peftkit.data.source import PLACE
from peftkit.data.tables import iterate
from peftkit.schema.recipe import AugmentationConfig
from peftkit.schema.task import Task
from peftkit.schema.types import Row

if TYPE_CHECKING:
    from datasets import Dataset

_PIECES = re.compile(r"\s+|\S+")


def augmented(train: Dataset, task: Task, config: AugmentationConfig, seed: int) -> Iterator[Row]:
    """Changed copies of the training rows; the first copy of every row, then the second, …"""
    for copy in range(config.copies):
        for number, row in enumerate(iterate(train)):
            generator = np.random.Generator(np.random.PCG64([seed, copy, number]))
            changed = task.with_text(row, partial(change, config=config, generator=generator))
            if task.text_of(changed) != task.text_of(row):
                yield {**changed, **{name: row[name] for name in PLACE if name in row}}


def change(text: str, config: AugmentationConfig, generator: np.random.Generator) -> str:
    """The text with a share of its words swapped, deleted and misspelled; the spacing between words stays."""
    pieces = _PIECES.findall(text)
    words = [place for place, piece in enumerate(pieces) if not piece.isspace()]
    for _ in range(_times(config.swap, len(words), generator) if len(words) > 1 else 0):
        one, other = generator.choice(words, size=2, replace=False).tolist()
        pieces[one], pieces[other] = pieces[other], pieces[one]
    for place in _some(words, config.typo, generator):
        pieces[place] = _typo(pieces[place], generator)
    deleted = set(_some(words, config.delete, generator)[: len(words) - 1])
    # the space before a word is deleted with it
    rest = [piece for place, piece in enumerate(pieces) if place not in deleted and place + 1 not in deleted]
    return "".join(rest).strip() or text


def _some(words: list[int], share: float, generator: np.random.Generator) -> list[int]:
    count = min(len(words), _times(share, len(words), generator))
    return sorted(generator.choice(words, size=count, replace=False).tolist()) if count else []


def _times(share: float, words: int, generator: np.random.Generator) -> int:
    """Share × words, rounded up or down at random, so that short texts are changed too."""
    exact = share * words
    return int(exact) + int(generator.random() < exact - int(exact))


def _typo(word: str, generator: np.random.Generator) -> str:
    if len(word) < 3:
        return word
    place = int(generator.integers(1, len(word) - 1))
    return word[:place] + word[place + 1] + word[place] + word[place + 2 :]

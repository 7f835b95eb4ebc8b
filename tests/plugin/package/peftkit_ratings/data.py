"""A source of generated reviews, and files of one rating and one text per line."""

from __future__ import annotations

import random
from typing import ClassVar

from peftkit.data.reader import Reader
from peftkit.data.source import Source
from peftkit.errors import DataError

WORDS = ("worst", "bad", "fine", "good", "best")


def review(number: int) -> tuple[int, str]:
    """Rating and text of one generated review."""
    generator = random.Random(number)
    rating = number % 5 + 1
    filler = [generator.choice("the a film movie plot actor and".split()) for _ in range(generator.randint(3, 12))]
    return rating, " ".join([*filler, WORDS[rating - 1], str(number)])


class DemoSource(Source):
    """Generated reviews, rated from 1 to 5."""

    form: ClassVar[str] = "demo:ROWS"
    splits = ("train",)

    @classmethod
    def accepts(cls, name):
        return name.startswith("demo:")

    @property
    def digest(self):
        return self.name

    def rows(self, split, problems):
        for number in range(int(self.name.removeprefix("demo:"))):
            rating, text = review(number)
            yield {"text": text, "label": rating, "_file": self.name, "_line": number + 1}


class RatingsReader(Reader):
    """Files with a rating, a tab and a text per line."""

    extensions = (".ratings",)

    def rows(self, path, problems):
        for line, content in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            rating, tab, text = content.partition("\t")
            if not tab:
                problems.add(DataError("expected a rating, a tab and a text", file=path, line=line))
                continue
            yield {"text": text, "label": int(rating), "_file": str(path), "_line": line}

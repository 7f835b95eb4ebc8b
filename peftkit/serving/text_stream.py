"""Tokens as text while they arrive: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from peftkit.serving.decoder import Piece

UNFINISHED = "�"
"""What a tokenizer gives for the first bytes of a character."""


@dataclass
class TextStream:
    """The text of one answer, built from its tokens."""

    tokenizer: Any
    stops: Sequence[str] = ()
    ids: list[int] = field(default_factory=list)
    text: str = ""
    """What may be shown: without a stop string, or what could become one."""
    finish: str | None = None

    def add(self, piece: Piece) -> str:
        """What the piece adds to the text."""
        if piece.finish != "stop":
            self.ids.append(piece.token)
        whole = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        places = [place for stop in self.stops if (place := whole.find(stop)) >= 0]
        if places:
            self.finish, whole = "stop", whole[: min(places)]
        else:
            self.finish = piece.finish
            if self.finish is None:
                whole = whole.rstrip(UNFINISHED) if whole.endswith(UNFINISHED) else whole
                whole = whole[: len(whole) - self._held_back(whole)]
        new = whole[len(self.text) :]
        self.text = whole if len(whole) > len(self.text) else self.text
        return new

    def read_all(self, pieces: list[Piece]) -> list[Piece]:
        """Takes all pieces of an answer at once, where there are no stop strings; returns them."""
        self.ids += [piece.token for piece in pieces[:-1]]
        self.add(pieces[-1])
        return pieces

    def _held_back(self, text: str) -> int:
        """Characters at the end that could begin a stop string."""
        longest = 0
        for stop in self.stops:
            for count in range(min(len(stop) - 1, len(text)), 0, -1):
                if text.endswith(stop[:count]):
                    longest = max(longest, count)
                    break
        return longest


async def read(stream: TextStream, pieces: AsyncIterator[Piece]) -> AsyncIterator[tuple[Piece, str]]:
    """Each piece with the text that it adds, until the answer ends."""
    async for piece in pieces:
        yield piece, stream.add(piece)
        if stream.finish is not None:
            return

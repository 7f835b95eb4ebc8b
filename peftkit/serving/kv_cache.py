"""Keys and values of the texts that are written together.

``SlotCache`` holds a buffer per layer in which every text has a row, filled from the left. A text that joins is copied
into the first free row; when one leaves, the last one takes its row. So a token is written where it belongs, and
neither tokens nor texts that come and go move the keys of others. ``OwnCache`` holds a single text, as the model caches
it: a window of past tokens, or a state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

CHUNK = 128
"""Columns by which a buffer grows; it shrinks when it is more than four times too wide."""


class TextCache(ABC):
    """What texts have cached; ``lengths`` are their tokens, in the order of the rows."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    @abstractmethod
    def join(self, cache: DynamicCache, lengths: list[int]) -> None:
        """Adds texts that the model has read into ``cache``, padded on the left."""

    @abstractmethod
    def keep(self, rows: list[int]) -> list[int]:
        """Drops all but some rows; returns what were the numbers of those that are left, in their new order."""

    @abstractmethod
    def next_token(self, device: torch.device) -> dict[str, Any]:
        """Arguments with which the model reads one more token of every row: cache, mask, and positions [rows, 1]."""


class OwnCache(TextCache):
    """The cache of one text, of whatever layers the model has."""

    def __init__(self) -> None:
        super().__init__()
        self._cache: DynamicCache | None = None

    def join(self, cache: DynamicCache, lengths: list[int]) -> None:
        assert len(self.lengths) + len(lengths) == 1, "one text at a time"
        self._cache, self.lengths = cache, list(lengths)

    def keep(self, rows: list[int]) -> list[int]:
        if not rows:
            self._cache, self.lengths = None, []
        return rows

    def next_token(self, device: torch.device) -> dict[str, Any]:
        (length,) = self.lengths
        self.lengths = [length + 1]
        mask = torch.ones(1, length + 1, dtype=torch.bool, device=device)
        positions = torch.tensor([[length]], device=device)
        return {"past_key_values": self._cache, "attention_mask": mask, "position_ids": positions}


class SlotLayer(DynamicLayer):
    """Keys and values of one layer, [rows, heads, columns, width of a head]; rows are as long as ``slots`` says."""

    keys: Any
    values: Any

    def __init__(self, slots: SlotCache) -> None:
        super().__init__()
        self.slots = slots

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes one token at the end of every row; returns all rows up to the longest one's end."""
        rows, ends, width = self.slots.place
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            buffer[rows, :, ends] = states[:, :, 0]
        return self.keys[: len(rows), :, :width], self.values[: len(rows), :, :width]

    def get_seq_length(self) -> int:
        """Of the longest row, by which masks are made."""
        return self.slots.width


class SlotCache(TextCache):
    """A row for each text, in buffers that grow and shrink in steps."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 0
        """Tokens of the longest row, without those that are just being read."""
        self.place: tuple[Tensor, Tensor, int] = (torch.empty(0), torch.empty(0), 0)
        """Numbers of the rows, where each one's next token is written, and the columns that are in use then."""
        self._layers: list[Any] = []
        self._cache = Cache(layers=self._layers)

    def join(self, cache: DynamicCache, lengths: list[int]) -> None:
        if not self._layers:
            self._layers += [SlotLayer(self) for _ in cache.layers]
        first = len(self.lengths)
        self.lengths += lengths
        read: Any
        for layer, read in zip(self._layers, cache.layers):
            if read.is_initialized:  # unless it shares the keys of another layer
                layer.keys = self._with_rows(layer.keys, read.keys, first)
                layer.values = self._with_rows(layer.values, read.values, first)
                layer.is_initialized = True

    def _with_rows(self, buffer: Tensor | None, states: Tensor, first: int) -> Tensor:
        """A buffer with the states of the rows from ``first`` on, [new rows, heads, padded tokens, width of a head]."""
        buffer = _resized(buffer, states, len(self.lengths), max(self.lengths) + 1)
        for number, length in enumerate(self.lengths[first:]):
            buffer[first + number, :, :length] = states[number, :, states.shape[2] - length :]
        return buffer

    def keep(self, rows: list[int]) -> list[int]:
        if not rows:
            self._layers.clear()
            self.lengths = []
            return []
        staying = set(rows)
        moved = iter(row for row in rows if row >= len(rows))
        order = [row if row in staying else next(moved) for row in range(len(rows))]
        self.lengths = [self.lengths[row] for row in order]
        for to, row in enumerate(order):
            if to != row:
                self._move(row, to, self.lengths[to])
        return order

    def _move(self, row: int, to: int, length: int) -> None:
        for layer in self._layers:
            for buffer in (layer.keys, layer.values) if layer.is_initialized else ():
                buffer[to, :, :length] = buffer[row, :, :length]

    def next_token(self, device: torch.device) -> dict[str, Any]:
        ends = torch.tensor(self.lengths, device=device)
        self.width = max(self.lengths)
        columns = self.width + 1
        self.place = (torch.arange(len(ends), device=device), ends, columns)
        for layer in self._layers:
            if layer.is_initialized:
                layer.keys = _resized(layer.keys, layer.keys, len(ends), columns)
                layer.values = _resized(layer.values, layer.values, len(ends), columns)
        mask = torch.arange(columns, device=device)[None] <= ends[:, None]
        self.lengths = [length + 1 for length in self.lengths]
        return {"past_key_values": self._cache, "attention_mask": mask, "position_ids": ends[:, None]}


def _resized(buffer: Tensor | None, like: Tensor, rows: int, columns: int) -> Tensor:
    """A buffer with room for rows and columns: the same one if it fits, else one that holds what it holds.

    It is filled with zeros: what is masked is still multiplied, by 0, and must be finite.
    """
    wanted = -(-columns // CHUNK) * CHUNK
    if buffer is not None and len(buffer) >= rows and columns <= buffer.shape[2] <= 4 * wanted:
        return buffer
    count = rows if buffer is None else len(buffer) if rows <= len(buffer) else max(rows, 2 * len(buffer))
    resized = like.new_zeros(count, like.shape[1], wanted, like.shape[3])
    if buffer is not None:
        shared = min(wanted, buffer.shape[2])
        resized[: len(buffer), :, :shared] = buffer[:, :, :shared]
    return resized

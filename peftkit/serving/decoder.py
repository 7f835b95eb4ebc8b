"""Continuous batching of generated text (Yu et al. 2022, Orca): requests join and leave between tokens.

Rows that can be computed together share a cache, whichever adapter each is under. New rows are read first, those of
like length together, and then join the others; a row that ends is taken out at once. A row's noise depends on its seed
and number alone, as in ``evaluation.generation``, so that other rows do not change its text.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Hashable
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from peftkit.data.batching import by_length
from peftkit.evaluation.generation import processors, stop_ids
from peftkit.models import dtypes, packing
from peftkit.models.blocks import forward_parameters, unwrap
from peftkit.schema.recipe import GenerationConfig
from peftkit.serving.kv_cache import OwnCache, SlotCache, TextCache

PROMPT_TOKENS = 1024
"""Tokens of new prompts that are read between two tokens of the others, or one prompt."""


@dataclass(frozen=True)
class Piece:
    """What one step adds to a text."""

    token: int
    logprob: float | None
    """Of the token, before temperature and penalties; None where it was not asked for."""
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens with theirs, as many as were asked for."""
    finish: str | None
    """stop or length with the last token, else None; a stop token is no part of the text."""


@dataclass(eq=False)
class Sequence:
    """A text that is being written."""

    prompt: list[int]
    config: GenerationConfig
    adapter: str
    number: int = 0
    """Of the choice, by which its noise is drawn."""
    top: int | None = None
    """How many of the likeliest tokens to report next to each token's log-probability; None reports neither."""
    stream: bool = True
    """Whether its pieces are delivered one by one, or all at its end."""
    receiver: Any = None
    """Whom its pieces are delivered to."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    ids: list[int] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    """Those that are not delivered yet."""
    _processors: Any = None

    def __post_init__(self) -> None:
        self._processors = processors(self.config, [self.number], [0])

    @property
    def takes_the_largest(self) -> bool:
        """Whether its token is the one of the largest score, as the model gives them."""
        return not self._processors

    def scores(self, raw: Tensor) -> Tensor:
        """[words] after penalties, temperature and noise."""
        read = [*self.prompt, *self.ids] if self.config.repetition_penalty != 1.0 else []  # nothing else needs them
        adjusted: Tensor = self._processors(torch.tensor([read], dtype=torch.long, device=raw.device), raw[None])
        return adjusted[0]


Delivery = tuple[Sequence, list[Piece] | BaseException]
"""Pieces of a text, or the error that ended it."""


class Group:
    """Rows that are written together, and what they have cached."""

    def __init__(self, cache: TextCache) -> None:
        self.rows: list[Sequence] = []
        self.cache = cache

    def join(self, rows: list[Sequence], cache: DynamicCache) -> None:
        """Adds rows whose prompts are in ``cache``."""
        self.rows += rows
        self.cache.join(cache, [len(row.prompt) for row in rows])

    def keep(self, alive: list[int]) -> None:
        """Drops all but some rows."""
        if len(alive) < len(self.rows):
            self.rows = [self.rows[number] for number in self.cache.keep(alive)]


class Decoder:
    """Writes texts in a thread of its own, which holds ``lock`` during each step."""

    def __init__(
        self,
        model: Any,
        activate: Callable[[SequenceOf[str]], AbstractContextManager[Any]],
        tokenizer: Any,
        lock: threading.Lock,
        most: int,
        deliver: Callable[[list[Delivery]], None],
        group_of: Callable[[str], Hashable] = lambda adapter: adapter,
    ) -> None:
        """Starts the thread.

        Args:
            activate: returns a context in which the model, which it gives, answers each row of a batch under the
                adapter of that name.
            most: texts that are written at a time; one, where those of the model cannot join each other.
            deliver: is given what a step has written, from the decoder's thread.
            group_of: adapters of the same group have rows in one batch.
        """
        self.joins = joins(model)
        self.most = most if self.joins else 1
        self.activate, self.lock, self.deliver, self.group_of = activate, lock, deliver, group_of
        self._stops = set(stop_ids(model, tokenizer))
        self._waiting: queue.Queue[Sequence | None] = queue.Queue()
        self._next: Sequence | None = None
        self._groups: dict[Hashable, Group] = {}
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="peftkit-decoder", daemon=True)
        self._thread.start()

    def submit(self, sequence: Sequence) -> None:
        """Starts a text as soon as there is room."""
        self._waiting.put(sequence)

    def close(self) -> None:
        """Ends the thread after the texts that were begun."""
        self._waiting.put(None)
        self._thread.join()

    @property
    def active(self) -> int:
        """Texts that are being written."""
        return sum(len(group.rows) for group in self._groups.values())

    def _run(self) -> None:
        while True:
            new = self._admitted()
            if self._closing and not new and not self.active:
                return
            joining: dict[Hashable, list[Sequence]] = {}
            for row in new:
                joining.setdefault(self.group_of(row.adapter), []).append(row)
            for key in {*joining, *(key for key, group in self._groups.items() if group.rows)}:
                group = self._groups.setdefault(key, self._empty_group())
                try:
                    with self.lock, torch.no_grad():
                        self._advance(group, joining.get(key, []))
                except BaseException as error:
                    self.deliver([(row, error) for row in {*group.rows, *joining.get(key, [])}])
                    self._groups[key] = self._empty_group()

    def _empty_group(self) -> Group:
        return Group(SlotCache() if self.joins else OwnCache())

    def _admitted(self) -> list[Sequence]:
        """Those that wait, as many as there is room for; blocks while there is nothing to do."""
        new: list[Sequence] = []
        while len(new) + self.active < self.most:
            one, self._next = self._next, None
            try:
                one = one or self._waiting.get(block=not new and not self.active and not self._closing)
            except queue.Empty:
                break
            if one is None:
                self._closing = True
            elif new and sum(len(row.prompt) for row in (*new, one)) > PROMPT_TOKENS:
                self._next = one
                break
            elif not one.cancelled.is_set():
                new.append(one)
        return new

    def _advance(self, group: Group, joining: list[Sequence]) -> None:
        """One token for every row."""
        group.keep([number for number, row in enumerate(group.rows) if not row.cancelled.is_set()])
        if group.rows:
            with self.activate([row.adapter for row in group.rows]) as model:
                logits = self._next_logits(model, group)
            self._write(group, 0, logits)
        lengths = np.asarray([len(row.prompt) for row in joining])
        for numbers in by_length(lengths, self.most, PROMPT_TOKENS) if joining else []:
            rows = [joining[number] for number in numbers]
            with self.activate([row.adapter for row in rows]) as model:
                cache, logits = _read_prompts(model, [row.prompt for row in rows])
            first = len(group.rows)
            group.join(rows, cache)
            self._write(group, first, logits)

    def _next_logits(self, model: Any, group: Group) -> Tensor:
        """[rows, words] after one more token of every row."""
        embedding = model.get_input_embeddings().weight
        last = torch.tensor([[row.ids[-1]] for row in group.rows], device=embedding.device)
        arguments = group.cache.next_token(embedding.device)
        if "position_ids" not in forward_parameters(model):
            del arguments["position_ids"]
        with dtypes.autocast(embedding.dtype, embedding.device):
            logits: Tensor = model(input_ids=last, use_cache=True, **arguments).logits
        return logits[:, -1]

    def _write(self, group: Group, first: int, logits: Tensor) -> None:
        """Chooses a token for each row from ``first`` on, delivers it, and takes out the rows that end."""
        rows, logits = group.rows[first:], logits.float()
        largest = logits.argmax(-1).tolist()
        alive, deliveries = list(range(first)), list[Delivery]()
        for number, (row, raw, token) in enumerate(zip(rows, logits, largest), first):
            if not row.takes_the_largest:
                token = int(row.scores(raw).argmax())
            row.ids.append(token)
            ended = "stop" if token in self._stops else "length" if len(row.ids) >= row.config.max_new_tokens else None
            row.pieces.append(_piece(token, raw, row.top, ended))
            if row.stream or ended:
                deliveries.append((row, row.pieces))
                row.pieces = []
            if ended is None and not row.cancelled.is_set():
                alive.append(number)
        group.keep(alive)
        self.deliver(deliveries)


def _read_prompts(model: Any, prompts: list[list[int]]) -> tuple[DynamicCache, Tensor]:
    """Keys and values of prompts, padded on the left, and the logits [rows, words] of what follows each."""
    embedding = model.get_input_embeddings().weight
    width = max(map(len, prompts))
    fill = [width - len(prompt) for prompt in prompts]
    ids = torch.tensor([[0] * pad + prompt for pad, prompt in zip(fill, prompts)], device=embedding.device)
    mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in fill], device=embedding.device)
    arguments: dict[str, Any] = {"logits_to_keep": 1, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    taken = {name: value for name, value in arguments.items() if name in forward_parameters(model)}
    cache = DynamicCache(config=unwrap(model).config)
    with dtypes.autocast(embedding.dtype, embedding.device):
        output = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **taken)
    return output.past_key_values, output.logits[:, -1]


def joins(model: Any) -> bool:
    """Whether rows of the model can join each other.

    Every layer caches all keys and values, positions are given, and there is no learned prompt.
    """
    layers = DynamicCache(config=unwrap(model).config).layers
    plain = bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
    return plain and "position_ids" in forward_parameters(model) and packing.learned_tokens(model) == 0


def _piece(token: int, raw: Tensor, top: int | None, finish: str | None) -> Piece:
    if top is None:
        return Piece(token, None, (), finish)
    logprobs = raw.log_softmax(-1)
    likeliest = logprobs.topk(top)
    entries = tuple(zip(likeliest.indices.tolist(), likeliest.values.tolist()))
    return Piece(token, float(logprobs[token]), entries, finish)

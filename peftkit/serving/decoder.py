"""Continuous batching of generated text (Yu et al. 2022, Orca): requests join and leave between tokens.

Rows of one adapter share a key-value cache, padded on the left. A new row is read by itself (its prompt is one forward
pass), then its cache is padded to the others' length and joined to them; a row that ends is taken out at once. A row's
noise depends on its seed and number alone, as in ``evaluation.generation``, so that other rows do not change its text.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from peftkit.evaluation.generation import processors, stop_ids
from peftkit.models import dtypes, packing
from peftkit.models.blocks import forward_parameters, unwrap
from peftkit.schema.recipe import GenerationConfig


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
    send: Callable[[Piece | BaseException], None]
    """Called from the decoder's thread for every token, or once with the error that ended it."""
    number: int = 0
    """Of the choice, by which its noise is drawn."""
    top: int | None = None
    """How many of the likeliest tokens to report next to each token's log-probability; None reports neither."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    ids: list[int] = field(default_factory=list)
    _processors: Any = None

    def scores(self, raw: Tensor) -> Tensor:
        """[words] after penalties, temperature and noise."""
        if self._processors is None:
            self._processors = processors(self.config, [self.number], [0])
        read = [*self.prompt, *self.ids] if self.config.repetition_penalty != 1.0 else []  # nothing else needs them
        adjusted: Tensor = self._processors(torch.tensor([read], dtype=torch.long, device=raw.device), raw[None])
        return adjusted[0]


class Group:
    """The rows of one adapter that are being written, with their cache and mask."""

    def __init__(self) -> None:
        self.rows: list[Sequence] = []
        self.cache: DynamicCache | None = None
        self.mask: Tensor | None = None

    def join(self, rows: list[Sequence], cache: DynamicCache, mask: Tensor) -> None:
        """Adds rows whose prompts are in ``cache``."""
        if self.cache is None or self.mask is None:
            self.rows, self.cache, self.mask = list(rows), cache, mask
            return
        width = max(mask.shape[1], self.mask.shape[1])
        layers = [
            tuple(torch.cat([_padded(one, width), _padded(two, width)]) for one, two in zip(old, new))
            for old, new in zip(_tensors(self.cache), _tensors(cache))
        ]
        self.cache = DynamicCache(layers)
        masks = [torch.nn.functional.pad(one, (width - one.shape[1], 0)) for one in (self.mask, mask)]
        self.mask = torch.cat(masks)
        self.rows += rows

    def keep(self, alive: list[int]) -> None:
        """Leaves only some rows, and the columns that any of them needs."""
        if len(alive) == len(self.rows):
            return
        self.rows = [self.rows[number] for number in alive]
        if not self.rows or self.cache is None or self.mask is None:
            self.rows, self.cache, self.mask = [], None, None
            return
        mask = self.mask[alive]
        start = int(mask.any(0).int().argmax())
        self.mask = mask[:, start:]
        self.cache = DynamicCache([tuple(one[alive][:, :, start:] for one in layer) for layer in _tensors(self.cache)])


class Decoder:
    """Writes texts in a thread of its own, which holds ``lock`` during each step."""

    def __init__(
        self, activate: Callable[[str], AbstractContextManager[Any]], tokenizer: Any, lock: threading.Lock, most: int
    ) -> None:
        """``activate(adapter)`` is a context in which the model, which it gives, answers under that adapter."""
        self.activate, self.tokenizer, self.lock, self.most = activate, tokenizer, lock, most
        self._waiting: queue.Queue[Sequence | None] = queue.Queue()
        self._groups: dict[str, Group] = {}
        self._stops: set[int] | None = None
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
            for adapter in {row.adapter for row in new} | {name for name, group in self._groups.items() if group.rows}:
                group = self._groups.setdefault(adapter, Group())
                joining = [row for row in new if row.adapter == adapter]
                try:
                    with self.lock, torch.no_grad(), self.activate(adapter) as model:
                        self._advance(model, group, joining)
                except BaseException as error:
                    for row in [*group.rows, *joining]:
                        row.send(error)
                    self._groups[adapter] = Group()

    def _admitted(self) -> list[Sequence]:
        """Those that wait, as many as there is room for; blocks while there is nothing to do."""
        new: list[Sequence] = []
        while len(new) + self.active < self.most:
            try:
                one = self._waiting.get(block=not new and not self.active and not self._closing)
            except queue.Empty:
                break
            if one is None:
                self._closing = True
                continue
            if not one.cancelled.is_set():
                new.append(one)
        return new

    def _advance(self, model: Any, group: Group, joining: list[Sequence]) -> None:
        """One token for every row."""
        group.keep([number for number, row in enumerate(group.rows) if not row.cancelled.is_set()])
        device = model.get_input_embeddings().weight.device
        with packing.eval_modules(model), dtypes.autocast(model.get_input_embeddings().weight.dtype, device):
            if group.rows:
                self._step(model, group)
            if joining:
                started = Group()
                self._start(model, started, joining)
                if started.rows and started.cache is not None and started.mask is not None:
                    group.join(started.rows, started.cache, started.mask)

    def _start(self, model: Any, group: Group, rows: list[Sequence]) -> None:
        """Reads prompts, left-padded, and writes the first token of each."""
        device = model.get_input_embeddings().weight.device
        width = max(len(row.prompt) for row in rows)
        fill = [width - len(row.prompt) for row in rows]
        ids = torch.tensor([[0] * pad + row.prompt for pad, row in zip(fill, rows)], device=device)
        mask = torch.tensor([[0] * pad + [1] * len(row.prompt) for pad, row in zip(fill, rows)], device=device)
        cache = DynamicCache(config=unwrap(model).config)
        last = {"logits_to_keep": 1} if "logits_to_keep" in forward_parameters(model) else {}
        output = model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **last, **_positions(model, mask)
        )
        group.join(rows, output.past_key_values, mask)
        self._write(model, group, output.logits[:, -1])

    def _step(self, model: Any, group: Group) -> None:
        assert group.mask is not None
        last = torch.tensor([[row.ids[-1]] for row in group.rows], device=group.mask.device)
        mask = torch.cat([group.mask, group.mask.new_ones(len(group.rows), 1)], dim=1)
        positions = {name: value[:, -1:] for name, value in _positions(model, mask).items()}
        output = model(input_ids=last, attention_mask=mask, past_key_values=group.cache, use_cache=True, **positions)
        group.cache, group.mask = output.past_key_values, mask
        self._write(model, group, output.logits[:, -1])

    def _write(self, model: Any, group: Group, logits: Tensor) -> None:
        """Chooses a token for each row, sends it, and takes out the rows that end."""
        if self._stops is None:  # the template is rendered for this, which takes longer than a step
            self._stops = set(stop_ids(model, self.tokenizer))
        alive = []
        for number, (row, raw) in enumerate(zip(group.rows, logits.float())):
            token = int(row.scores(raw).argmax())
            row.ids.append(token)
            ended = "stop" if token in self._stops else "length" if len(row.ids) >= row.config.max_new_tokens else None
            row.send(_piece(token, raw, row.top, ended))
            if ended is None and not row.cancelled.is_set():
                alive.append(number)
        group.keep(alive)


def joins(model: Any) -> bool:
    """Whether rows of the model can join each other: every layer caches all keys and values, without a prompt."""
    inner = unwrap(model)
    layers = DynamicCache(config=inner.config).layers
    plain = all(type(layer) is DynamicLayer for layer in layers)
    return plain and bool(layers) and packing.learned_tokens(model) == 0


def _piece(token: int, raw: Tensor, top: int | None, finish: str | None) -> Piece:
    if top is None:
        return Piece(token, None, (), finish)
    logprobs = raw.log_softmax(-1)
    likeliest = logprobs.topk(top)
    entries = tuple(zip(likeliest.indices.tolist(), likeliest.values.tolist()))
    return Piece(token, float(logprobs[token]), entries, finish)


def _positions(model: Any, mask: Tensor) -> dict[str, Tensor]:
    """Position ids [rows, tokens] by the mask, where the model takes them."""
    if "position_ids" not in forward_parameters(model):
        return {}
    return {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def _tensors(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    layers: Any = cache.layers
    return [(layer.keys, layer.values) for layer in layers]


def _padded(tensor: Tensor, width: int) -> Tensor:
    """[rows, heads, tokens, width of a head] with empty tokens on the left."""
    return torch.nn.functional.pad(tensor, (0, 0, width - tensor.shape[2], 0))

"""Text from a language model: batched, in order, and the same whatever else is in the batch.

    generate(model, tokenizer, ["In the beginning"], config)                       # continued as plain text
    generate(model, tokenizer, [[{"role": "user", "content": "Hello"}]], config)   # answered by the chat template

Rows are batched by length and padded on the left; the sources of an encoder–decoder on the right, since BART counts
positions from the first token. A row's sampling noise is drawn from a generator seeded by (``config.seed``, its
number), so that a sampled text depends on neither the batch size nor the other prompts; what remains is the rounding
of differently shaped matmuls, which in half precision may tip a near tie.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig as TransformersConfig
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TextIteratorStreamer,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from peftkit.errors import ModelError
from peftkit.models import chat_template, dtypes, packing
from peftkit.models.blocks import unwrap
from peftkit.models.context import positions
from peftkit.schema.recipe import GenerationConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | Sequence[Mapping[str, str]]


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    config: GenerationConfig,
    *,
    batch_size: int = 8,
    numbers: Sequence[int] | None = None,
    max_source: int | None = None,
) -> list[str]:
    """The text after each prompt, in the prompts' order, without special tokens; of an encoder–decoder, the target.

    Args:
        prompts: plain texts to continue, or conversations to answer.
        config: temperature 0 is greedy.
        numbers: each prompt's own, by which its noise is drawn and an error names it; None counts from 0.
        max_source: tokens at which sources that an encoder reads are cut, as in training; None cuts nothing.

    Raises:
        ModelError: a prompt is empty, or longer than the model's context leaves room for; or there are conversations
            and no chat template.
    """
    source = reads_source(model)
    encoded = [encode(tokenizer, prompt, source=source, max_source=max_source) for prompt in prompts]
    own = list(range(len(prompts)) if numbers is None else numbers)
    for number, ids in zip(own, encoded, strict=True):
        _check_fits(model, ids, config, f"prompt {number + 1}")
    texts = [""] * len(prompts)
    for places in _batches([len(ids) for ids in encoded], batch_size, alike=packing.learned_tokens(model) > 0):
        written = _batch(model, tokenizer, [encoded[n] for n in places], [own[n] for n in places], config)
        for place, text in zip(places, written):
            texts[place] = text
    return texts


def _batches(lengths: list[int], size: int, *, alike: bool) -> Iterator[list[int]]:
    """Numbers of the rows of each batch, the longest first.

    Under a learned prompt a batch holds rows of one length (``alike``): padding would stand between prompt and text.
    """
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    for _, group in itertools.groupby(order, key=lambda number: lengths[number] if alike else 0):
        numbers = list(group)
        yield from (numbers[start : start + size] for start in range(0, len(numbers), size))


def stream(model: Any, tokenizer: PreTrainedTokenizerBase, messages: Prompt, config: GenerationConfig) -> Iterator[str]:
    """The answer in pieces as it is generated, in a thread of its own that ends when the iterator is closed.

    Beam search knows only at the end which text is the likeliest, and gives it in one piece.
    """
    if config.num_beams > 1:
        yield generate(model, tokenizer, [messages], config)[0]
        return
    ids = encode(tokenizer, messages, source=reads_source(model))
    _check_fits(model, ids, config, "the conversation")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
    closed, failure = threading.Event(), []

    def work() -> None:
        try:
            _run(model, tokenizer, [ids], [0], config, streamer=streamer, stop=closed)
        except BaseException as error:  # handed to the reader's thread, which raises it
            failure.append(error)
            streamer.end()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        closed.set()
        thread.join()
    if failure:
        raise failure[0]


def reads_source(model: Any) -> bool:
    """Whether the prompt is a source, which an encoder reads, and the text is the decoder's own."""
    return bool(getattr(unwrap(model).config, "is_encoder_decoder", False))


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, source: bool = False, max_source: int | None = None
) -> list[int]:
    """Token ids of a plain text (with the tokenizer's own beginning), or of a conversation whose answer is awaited.

    A ``source`` of an encoder keeps its end, and is cut before it at ``max_source`` tokens.
    """
    if source:
        if not isinstance(prompt, str):
            raise ModelError("an encoder–decoder rewrites one text at a time and holds no conversation; give it a text")
        limit = {} if max_source is None else {"truncation": True, "max_length": max_source}
        return list(tokenizer(prompt, verbose=False, **limit)["input_ids"])
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
        end = tokenizer.eos_token_id
        if end is not None and len(ids) > 1 and ids[-1] == end:  # some tokenizers end every text, this one goes on
            ids = ids[:-1]
    else:
        ids = tokenizer(chat_template.render(tokenizer, prompt, generate=True), add_special_tokens=False)["input_ids"]
    if not ids and tokenizer.bos_token_id is not None:
        return [int(tokenizer.bos_token_id)]
    return list(ids)


def context_length(model: Any) -> int | None:
    """Tokens that the model can read at most, prompt and answer together; None where its
    architecture has no limit.

    What a learned prompt takes of its positions is left out.
    """
    limit = positions(unwrap(model).config)
    return None if limit is None else limit - packing.learned_tokens(model)


def _check_fits(model: Any, ids: list[int], config: GenerationConfig, what: str) -> None:
    if not ids:
        raise ModelError(f"{what} is empty, and this tokenizer has no token to begin a text with; give it some text")
    context = context_length(model)
    if reads_source(model):
        if context is not None and max(len(ids), config.max_new_tokens + 1) > context:
            raise ModelError(
                f"{what} has {len(ids)} tokens and is to be answered with up to {config.max_new_tokens}, but the model "
                f"reads and writes {context} at most; shorten it, or lower evaluation.generation.max_new_tokens"
            )
        return
    if context is not None and len(ids) + config.max_new_tokens > context:
        raise ModelError(
            f"{what} has {len(ids)} tokens, which with {config.max_new_tokens} new ones is more than the model's "
            f"context of {context}; shorten it, or set evaluation.generation.max_new_tokens to at most "
            f"{max(0, context - len(ids))}"
        )


def _batch(
    model: Any, tokenizer: Any, rows: list[list[int]], numbers: list[int], config: GenerationConfig
) -> list[str]:
    width = 1 if reads_source(model) else max(len(ids) for ids in rows)
    out = _run(model, tokenizer, rows, numbers, config)[:, width:].tolist()
    stops = set(stop_ids(model, tokenizer))
    texts = []
    for ids in out:
        end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
        texts.append(tokenizer.decode(ids[:end], skip_special_tokens=True))
    return texts


def _run(
    model: Any,
    tokenizer: Any,
    rows: list[list[int]],
    numbers: list[int],
    config: GenerationConfig,
    *,
    streamer: Any = None,
    stop: threading.Event | None = None,
) -> Tensor:
    """transformers' greedy or beam search over padded rows; sampling enters through the scores."""
    stops = stop_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stops or [0])[0]
    base = unwrap(model)
    embedding = base.get_input_embeddings().weight
    width = max(len(ids) for ids in rows)
    fill = [width - len(ids) for ids in rows]
    source = reads_source(model)
    start: dict[str, Any] = {}
    if source:  # whose padding does not stand before what is written
        input_ids = torch.tensor([ids + [pad] * n for n, ids in zip(fill, rows)], device=embedding.device)
        mask = torch.tensor([[1] * len(ids) + [0] * n for n, ids in zip(fill, rows)], device=embedding.device)
        fill = [0] * len(rows)
        start = {name: _own_token(base, name) for name in ("decoder_start_token_id", "forced_bos_token_id")}
    else:
        input_ids = torch.tensor([[pad] * n + ids for n, ids in zip(fill, rows)], device=embedding.device)
        mask = torch.tensor([[0] * n + [1] * len(ids) for n, ids in zip(fill, rows)], device=embedding.device)
    settings = TransformersConfig(
        max_new_tokens=config.max_new_tokens, do_sample=False, repetition_penalty=1.0, **_beams(config),
        eos_token_id=stops or None, pad_token_id=pad, bos_token_id=tokenizer.bos_token_id, use_cache=True,
        **start,
    )  # fmt: skip
    criteria = StoppingCriteriaList([_Closed(stop)] if stop else [])
    precision = dtypes.autocast(embedding.dtype, embedding.device)
    with torch.no_grad(), packing.eval_modules(model), precision:
        return model.generate(
            input_ids=input_ids, attention_mask=mask, generation_config=settings, streamer=streamer,
            logits_processor=processors(config, numbers, np.repeat(fill, config.num_beams).tolist()),
            stopping_criteria=criteria,
        )  # fmt: skip


def _beams(config: GenerationConfig) -> dict[str, Any]:
    """transformers' options of beam search; it warns of a length penalty without beams."""
    return {"num_beams": config.num_beams} | ({"length_penalty": config.length_penalty} if config.num_beams > 1 else {})


def _own_token(base: Any, name: str) -> int | None:
    """A token that the model's generation, or else its config, names."""
    value = getattr(base.generation_config, name, None)
    return value if value is not None else getattr(base.config, name, None)


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a text: the template's end of turn, the tokenizer's end of text, and the model's own."""
    own = getattr(unwrap(model).generation_config, "eos_token_id", None)
    own = own if isinstance(own, list) else [] if own is None else [own]
    return list(dict.fromkeys([*chat_template.stop_ids(tokenizer), *own]))


def processors(config: GenerationConfig, numbers: list[int], fill: list[int]) -> LogitsProcessorList:
    """What changes the scores of rows before the largest is taken: penalty, temperature, cuts, and noise.

    Args:
        numbers: of the rows, by which their noise is drawn.
        fill: padding on the left of each row, under beam search of each beam of each row.
    """
    processors: list[LogitsProcessor] = []
    if config.repetition_penalty != 1.0:
        processors.append(_Repetition(config.repetition_penalty, fill))
    if config.temperature > 0:
        processors.append(TemperatureLogitsWarper(config.temperature))
        processors += [TopKLogitsWarper(config.top_k)] if config.top_k else []
        processors += [TopPLogitsWarper(config.top_p)] if config.top_p < 1 else []
        processors.append(_Gumbel(config.seed, numbers))
    return LogitsProcessorList(processors)


class _Repetition(LogitsProcessor):
    """CTRL's penalty (arXiv:1909.05858) on tokens already in the row; its padding does not count as text."""

    def __init__(self, penalty: float, fill: list[int]) -> None:
        self.penalty, self.fill = penalty, fill

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        fill = torch.tensor(self.fill, device=input_ids.device)[:, None]
        real = torch.arange(input_ids.shape[1], device=input_ids.device)[None] >= fill
        seen = torch.zeros_like(scores).scatter_add_(1, input_ids, real.to(scores.dtype)) > 0
        return torch.where(seen, torch.where(scores < 0, scores * self.penalty, scores / self.penalty), scores)


class _Gumbel(LogitsProcessor):
    """Adds Gumbel noise, so that the largest score is a sample of the softmax (arXiv:1411.0030)."""

    def __init__(self, seed: int, numbers: list[int]) -> None:
        self.generators = [np.random.Generator(np.random.PCG64([seed, number])) for number in numbers]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = np.stack([generator.gumbel(size=scores.shape[-1]) for generator in self.generators])
        return scores.float() + torch.from_numpy(noise).to(scores.device, torch.float32)


class _Closed(StoppingCriteria):
    """Ends generation when nobody reads any more."""

    def __init__(self, closed: threading.Event) -> None:
        self.closed = closed

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), self.closed.is_set(), device=input_ids.device, dtype=torch.bool)

"""How well each class name fits each text, according to an untrained base model.

Encoders: cosine of mean-pooled tokens and class descriptions, the description averaged over prompts as in CLIP (Radford
et al. 2021). Decoders: mean log-probability of the name's tokens after a prompt (Brown et al. 2020, section 2.4).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from peftkit.models.architectures import check_pools, reads_padding
from peftkit.models.blocks import text_encoder
from peftkit.models.context import usable_length
from peftkit.models.packing import eval_modules

DESCRIPTIONS = ("{label}", "this text is about {label}")
PROMPT = "{text}\n\nThis text is about"


def of_encoder(
    model: Any, tokenizer: Any, texts: Sequence[str], labels: Sequence[str], *, max_length: int, batch_size: int
) -> np.ndarray:
    """Cosines [texts, labels] of mean-pooled token vectors, of an encoder–decoder those of its encoder.

    Raises ModelError where the model does not give one vector per token.
    """
    limit = usable_length(tokenizer, max_length)
    described = [pattern.format(label=_readable(label)) for label in labels for pattern in DESCRIPTIONS]
    with torch.no_grad(), eval_modules(model):
        meanings = _embed(model, tokenizer, described, limit, batch_size).reshape(len(labels), len(DESCRIPTIONS), -1)
        vectors = _embed(model, tokenizer, texts, limit, batch_size)
    return vectors @ _unit(meanings.mean(axis=1)).T


def of_decoder(
    model: Any, tokenizer: Any, texts: Sequence[str], labels: Sequence[str], *, max_length: int, batch_size: int
) -> np.ndarray:
    """Mean log-probabilities [texts, labels] of each label's tokens after the prompt."""
    tails = [tokenizer(f" {_readable(label)}", add_special_tokens=False)["input_ids"] for label in labels]
    end = tokenizer(PROMPT.format(text=""), add_special_tokens=False)["input_ids"]
    start = tokenizer("", add_special_tokens=True)["input_ids"][:1]
    start = start or [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None][:1]
    # the text is cut, never the question after it
    limit = max(1, min(max_length, tokenizer.model_max_length - len(start) - len(end) - max(map(len, tails))))
    scores = np.empty((len(texts), len(labels)))
    with torch.no_grad(), eval_modules(model):
        for row, text in enumerate(texts):
            ids = tokenizer(text, add_special_tokens=False, truncation=True, max_length=limit)["input_ids"]
            sequences = [[*start, *ids, *end, *tail] for tail in tails]
            for first in range(0, len(labels), batch_size):
                part = slice(first, first + batch_size)
                scores[row, part] = _mean_log_probability(model, sequences[part], tails[part])
    return scores


def _embed(model: Any, tokenizer: Any, texts: Sequence[str], limit: int, batch_size: int) -> np.ndarray:
    """Mean-pooled token vectors of length 1, [texts, width]; batches hold texts of like length."""
    model = text_encoder(model)
    order = np.argsort([-len(text) for text in texts], kind="stable")
    vectors: dict[int, np.ndarray] = {}
    batch_size = 1 if reads_padding(model) else batch_size
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        batch = tokenizer(
            [texts[row] for row in rows], truncation=True, max_length=limit, padding=True, return_tensors="pt"
        ).to(model.device)
        hidden = model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden)
        check_pools(model.config, hidden.shape[1], mask.shape[1])
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        vectors |= dict(zip(rows.tolist(), pooled.cpu().double().numpy()))
    return _unit(np.stack([vectors[row] for row in range(len(texts))]))


def _mean_log_probability(model: Any, sequences: list[list[int]], tails: list[list[int]]) -> list[float]:
    """Of the last ``len(tail)`` tokens of each sequence; padded on the right, where causal attention never looks."""
    width, longest = max(map(len, sequences)), max(map(len, tails))
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros(len(sequences), width, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)], mask[row, : len(sequence)] = torch.tensor(sequence), 1
    last = min(width, max(width - len(sequence) for sequence in sequences) + longest + 1)
    takes = inspect.signature(model.forward).parameters
    options = {"logits_to_keep": last} if "logits_to_keep" in takes else {}
    logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), **options).logits.float().cpu()
    offset = width - logits.shape[1]
    means = []
    for row, (sequence, tail) in enumerate(zip(sequences, tails)):
        places = torch.arange(len(sequence) - len(tail) - 1, len(sequence) - 1) - offset
        log_probabilities = logits[row, places].log_softmax(dim=-1)
        means.append(float(log_probabilities.gather(1, torch.tensor(tail).unsqueeze(1)).mean()))
    return means


def _readable(label: str) -> str:
    return label.replace("_", " ").strip()


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)

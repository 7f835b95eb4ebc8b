"""Texts generated before and after training for the same prompts, so that a person can see what was learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peftkit.evaluation import generation, text_metrics
from peftkit.review.generations import GenerationRow
from peftkit.schema.recipe import GenerationConfig
from peftkit.schema.task import Task


@dataclass(frozen=True)
class Sample:
    """A prompt from the held-out rows, or one of the user's own."""

    prompt: Any
    reference: str | None = None
    file: str | None = None
    line: int | None = None


def choose(rows: Any, task: Task, config: GenerationConfig) -> list[Sample]:
    """``config.samples`` held-out rows, chosen by ``config.seed``, and ``config.prompts``."""
    generator = np.random.Generator(np.random.PCG64(config.seed))
    numbers = np.sort(generator.permutation(len(rows))[: config.samples])
    samples = []
    for number in numbers:
        row = rows[int(number)]
        prompt, reference = task.prompt(row)
        samples.append(Sample(prompt, reference, row.get("_file"), row.get("_line")))
    return samples + [Sample(task.as_prompt(text)) for text in config.prompts]


def write_texts(model: Any, tokenizer: Any, samples: Sequence[Sample], config: GenerationConfig) -> list[str]:
    """What the model writes for each sample."""
    return generation.generate(model, tokenizer, [sample.prompt for sample in samples], config) if samples else []


def side_by_side(samples: Sequence[Sample], before: Sequence[str], after: Sequence[str]) -> list[GenerationRow]:
    """The rows of ``generations.jsonl``."""
    return [
        GenerationRow(sample.prompt, sample.reference, base, tuned, sample.file, sample.line)
        for sample, base, tuned in zip(samples, before, after, strict=True)
    ]


def generation_metrics(samples: Sequence[Sample], texts: Sequence[str]) -> dict[str, float]:
    """ROUGE, BLEU and the like, of the texts whose reference is known."""
    known = [(text, sample.reference) for sample, text in zip(samples, texts, strict=True) if sample.reference]
    if not known:
        return {}
    written, references = zip(*known)
    return text_metrics.score(list(written), list(references))

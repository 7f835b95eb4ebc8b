"""Texts generated before and after training for the same prompts, so that a person can see what was learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peftkit.evaluation import text_metrics
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
    chosen = [rows[int(number)] for number in numbers]
    samples = [Sample(*task.prompt(row), row.get("_file"), row.get("_line")) for row in chosen]
    return samples + [Sample(task.as_prompt(text)) for text in config.prompts]


def side_by_side(samples: Sequence[Sample], before: Sequence[str], after: Sequence[str]) -> list[GenerationRow]:
    """The rows of ``generations.jsonl``."""
    return [
        GenerationRow(sample.prompt, sample.reference, base, tuned, sample.file, sample.line)
        for sample, base, tuned in zip(samples, before, after, strict=True)
    ]


def generation_metrics(samples: Sequence[Sample], texts: Sequence[str]) -> dict[str, float]:
    """Text metrics of the samples whose reference is known."""
    known = [(text, sample.reference) for sample, text in zip(samples, texts, strict=True) if sample.reference]
    return text_metrics.score(*zip(*known)) if known else {}

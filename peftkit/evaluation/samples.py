"""Texts generated before and after training for the same prompts, so that a person can see what was learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peftkit.evaluation import text_metrics
from peftkit.evaluation.intervals import Statistics
from peftkit.review.generations import GenerationRow
from peftkit.schema.recipe import GenerationConfig
from peftkit.schema.task import Task
from peftkit.schema.types import Row


@dataclass(frozen=True)
class Sample:
    """A prompt from the held-out rows, or one of the user's own."""

    prompt: Any
    reference: str | None = None
    file: str | None = None
    line: int | None = None


def choose(rows: Any, task: Task, config: GenerationConfig) -> list[Sample]:
    """``config.samples`` held-out rows, chosen by ``config.seed``, and ``config.prompts``."""
    samples = [_sample(rows[number], task) for number in _numbers(rows, config.samples, config.seed)]
    return samples + [Sample(task.as_prompt(text)) for text in config.prompts]


def choose_test_rows(rows: Any, task: Task, config: GenerationConfig) -> dict[int, Sample]:
    """``config.test_rows`` rows of a split by their numbers, chosen by ``config.seed``; those without a target not."""
    count = len(rows) if config.test_rows == "all" else config.test_rows or 0
    chosen = {number: _sample(rows[number], task) for number in _numbers(rows, count, config.seed)}
    return {number: sample for number, sample in chosen.items() if sample.reference}


def chosen_rows(rows: Any, task: Task, config: GenerationConfig) -> dict[int, Sample]:
    """The rows that are generated and scored, by their numbers: ``config.test_rows``, or else ``config.samples``."""
    sampled = config if config.test_rows else config.model_copy(update={"test_rows": config.samples})
    return choose_test_rows(rows, task, sampled)


def _numbers(rows: Any, count: int, seed: int) -> list[int]:
    """Numbers of as many rows, in order."""
    generator = np.random.Generator(np.random.PCG64(seed))
    return sorted(generator.permutation(len(rows))[:count].tolist())


def _sample(row: Row, task: Task) -> Sample:
    return Sample(*task.prompt(row), row.get("_file"), row.get("_line"))


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


@dataclass(frozen=True)
class WrittenTexts:
    """What a model wrote for rows of a split that have a target."""

    rows: tuple[int, ...]
    """Their numbers."""
    texts: tuple[str, ...]
    references: tuple[str, ...]

    @classmethod
    def of(cls, chosen: Mapping[int, Sample], texts: Sequence[str]) -> WrittenTexts:
        return cls(tuple(chosen), tuple(texts), tuple(str(sample.reference) for sample in chosen.values()))

    def statistics(self) -> Statistics:
        """Text metrics of a choice of these rows."""
        return text_metrics.statistics(self.texts, self.references)

    def metrics(self) -> dict[str, float]:
        return text_metrics.score(self.texts, self.references)

    def add_to(self, lines: Sequence[Row]) -> None:
        """Adds ``generated`` and ``target`` to the lines of ``predictions/SPLIT.jsonl``, one for each row."""
        for row, text, reference in zip(self.rows, self.texts, self.references):
            lines[row].update(generated=text, target=reference)

"""A run's results: metrics before and after training, baselines to compare with, and every prediction.

metrics.json      {split or baseline: {metric: value}}, and "training"
plan.json         what was planned of memory and time, and what was measured
assessment.json   the metrics with intervals, per class, confusion, calibration, mistakes
baselines.json    each baseline's metrics, and whether training beat it
predictions/      one JSONL per split
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peftkit.data.pipeline import PreparedData
from peftkit.evaluation import generation, samples
from peftkit.evaluation.assessment import assess, compare
from peftkit.evaluation.samples import Sample, WrittenTexts
from peftkit.models.loading import load_language_model, writes_text
from peftkit.models.tokenizer import tokenizer_fingerprint
from peftkit.planning import prediction
from peftkit.review.generations import GenerationRow
from peftkit.review.generations import write as write_generations
from peftkit.runs import folder as folders
from peftkit.runs.environment import peak_memory
from peftkit.schema.baseline import BaselineInputs, BaselineResult
from peftkit.schema.head import head_of
from peftkit.schema.registries import BASELINES
from peftkit.schema.types import LoadedModel
from peftkit.system import files
from peftkit.system.cache import cached_array
from peftkit.system.versions import installed_versions
from peftkit.training import feature_store, flops
from peftkit.training.loop import Loop


@dataclass
class Results:
    """Everything that is written next to the adapter."""

    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    assessments: dict[str, dict[str, Any]] = field(default_factory=dict)
    baselines: list[dict[str, Any]] = field(default_factory=list)
    predictions: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    generations: list[GenerationRow] = field(default_factory=list)
    tuned: dict[str, float] = field(default_factory=dict)
    """Options of the head that were chosen on validation rows."""
    plan: dict[str, Any] = field(default_factory=dict)
    """See ``planning.prediction``; empty where the run was not finished, or another process makes it."""


@dataclass
class PreTrainingBaselines:
    """What must be asked of the model before its first step."""

    baselines: dict[str, BaselineResult] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    test_rows: dict[int, Sample] = field(default_factory=dict)
    """Rows of the test split that are generated, by number."""


def before_training(loop: Loop, loaded: LoadedModel, prepared: PreparedData) -> PreTrainingBaselines:
    """The baselines of the recipe, and the base model's texts: both need the model as it is before the first step."""
    head, evaluation = loop.module.head, loop.recipe.evaluation
    split = "test" if "test" in prepared.splits else "validation"
    wanted = head.baselines if evaluation.baselines is None else evaluation.baselines
    inputs, before = _baseline_inputs(loop, loaded, prepared, split), PreTrainingBaselines()
    for name in BASELINES:
        if name in wanted and (result := BASELINES.get(name)().compute(inputs)) is not None:
            before.baselines[name] = result
    if head.writes_text and not loop.session.sharded:
        task, rows = loop.recipe.task, prepared.splits[split]
        before.samples = samples.choose(rows, task, evaluation.generation)
        if split == "test":
            before.test_rows = samples.choose_test_rows(rows, task, evaluation.generation)
        with _as_base(loop, loaded):
            before.texts = _texts(loop, loaded, before.samples)
            if before.test_rows and (base := before.baselines.get("zero_shot")):
                written = _test_texts(loop, loaded, before.test_rows)
                before.baselines["zero_shot"] = replace(base, metrics=base.metrics | written.metrics())
    return before


def _baseline_inputs(loop: Loop, loaded: LoadedModel, prepared: PreparedData, split: str) -> BaselineInputs:
    recipe, session = loop.recipe, loop.session
    backbone = getattr(loaded.model, "get_base_model", lambda: loaded.model)().base_model
    # a classifier has lost the output layer that a prompt is answered with
    language_model = functools.partial(load_language_model, recipe, session.device)

    def base_outputs() -> dict[str, np.ndarray]:
        with _as_base(loop, loaded):
            return loop.evaluate(loop.data.splits[split])

    def cached(kind: str, values: Sequence[Any], compute: Callable[[], np.ndarray]) -> np.ndarray:
        def compute_in_eval_mode() -> np.ndarray:
            loaded.model.eval()
            with session.accelerator.autocast():
                return compute()

        if loaded.adapter or not recipe.method.starts_as_base:
            return compute_in_eval_mode()
        return cached_array(kind, _base_key(loop, loaded, values), compute_in_eval_mode)

    return BaselineInputs(
        recipe=recipe,
        head=loop.module.head,
        train=prepared.splits["train"],
        rows=prepared.splits[split],
        tokenizer=loaded.tokenizer,
        base_outputs=base_outputs,
        backbone=backbone,
        language_model=language_model if writes_text(backbone.config) else None,
        cached=cached,
        new_layers=loaded.head_names,
        sharded=session.sharded,
    )


def _base_key(loop: Loop, loaded: LoadedModel, values: Sequence[Any]) -> str:
    """Digest of all that an untrained base computes from ``values``; method and training are not part of it."""
    recipe = loop.recipe
    parts = [
        loaded.fingerprint, tokenizer_fingerprint(loaded.tokenizer), recipe.model.model_dump(mode="json"),
        recipe.quantization.model_dump(mode="json") if recipe.quantization else None,
        loop.session.device.type, str(loop.session.dtype), installed_versions(feature_store.PACKAGES), values,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _as_base(loop: Loop, loaded: LoadedModel) -> AbstractContextManager[Any]:
    """The model without its method: most untrained methods change nothing, a random prompt does."""
    return nullcontext() if loop.recipe.starts_as_compared else loaded.model.disable_adapter()


def _texts(
    loop: Loop, loaded: LoadedModel, chosen: Sequence[Sample], numbers: Sequence[int] | None = None
) -> list[str]:
    with loop.session.accelerator.autocast():
        prompts = [sample.prompt for sample in chosen]
        return generation.generate(
            loaded.model, loaded.tokenizer, prompts, loop.recipe.evaluation.generation,
            max_source=loop.recipe.data.max_length, numbers=numbers,
        )  # fmt: skip


def _test_texts(loop: Loop, loaded: LoadedModel, chosen: Mapping[int, Sample]) -> WrittenTexts:
    """Generates rows of the test split, which the processes share."""

    def write(part: list[tuple[int, Sample]]) -> list[str]:
        return _texts(loop, loaded, [sample for _, sample in part], [number for number, _ in part])

    return WrittenTexts.of(chosen, loop.session.map_sharded(list(chosen.items()), write))


def after_training(
    loop: Loop, loaded: LoadedModel, prepared: PreparedData, before: PreTrainingBaselines, *, final: bool
) -> Results:
    """Scores the trained model on held-out splits, without ``final`` on validation only, and next to the baselines."""
    recipe, head, results, seconds = loop.recipe, loop.module.head, Results(), {}
    for split in ("validation", "test") if final else ("validation",):
        if (encoded := loop.data.splits.get(split)) is None:
            continue
        started = time.perf_counter()
        outputs = loop.evaluate(encoded)
        seconds[split] = time.perf_counter() - started
        if split == "validation":
            results.tuned = head.tune(outputs)
            head = head_of(prepared.info, recipe.task, results.tuned) if results.tuned else head
        rows, index = prepared.splits[split], encoded.examples["row"]
        rows = rows if len(index) == len(rows) else rows.select(index)  # the rows of the examples, in their order
        written = _test_texts(loop, loaded, before.test_rows) if split == "test" and before.test_rows else None
        assessment = assess(head, outputs, rows, recipe.evaluation, split=split, written=written)
        results.assessments[split] = assessment
        results.metrics[split] = {name: entry["value"] for name, entry in assessment["metrics"].items()}
        results.predictions[split] = head.prediction_rows(outputs, rows)
        if written is not None and list(index) == list(range(len(prepared.splits[split]))):
            written.add_to(results.predictions[split])
    if before.samples:
        texts = _texts(loop, loaded, before.samples)
        results.generations = samples.side_by_side(before.samples, before.texts, texts)
        results.metrics["generation"] = samples.generation_metrics(before.samples, texts)
        results.metrics["generation_before"] = samples.generation_metrics(before.samples, before.texts)
    for name, baseline in before.baselines.items():
        results.metrics[name] = baseline.metrics
        results.baselines.append(compare(name, baseline, head, outputs, recipe.evaluation.confidence))
    training = results.metrics["training"] = training_metrics(loop, seconds)
    if loop.session.is_main and final:
        results.plan = prediction.compare_with_measured(
            recipe, prepared.info, loop.tokenizer, loop.data, training, device=loop.session.device,
            world_size=loop.session.world_size, sharded=loop.session.sharded,
        )  # fmt: skip
        training |= prediction.planned_metrics(results.plan)
    return results


def training_metrics(loop: Loop, evaluation_seconds: Mapping[str, float]) -> dict[str, Any]:
    """How the training itself went."""
    state = loop.state
    metrics = {
        "steps": state.step,
        "rows": state.rows,
        "tokens": state.tokens,
        "seconds": state.seconds,
        "rows_per_second": state.rows / state.seconds if state.seconds else 0.0,
        "tokens_per_second": state.tokens / state.seconds if state.seconds else 0.0,
        "best_metric": loop.metric,
        "best_value": state.best_value,
        "best_step": state.best_step,
        "stopped_early": state.stopped_early,
        "skipped_steps": state.skipped,
        "micro_batch": loop.stepper.micro_batch,
        "trained_parameters": sum(p.numel() for p in loop.module.parameters() if p.requires_grad),
        "peak_memory_bytes": peak_memory(),
        **_gpu_memory(loop.session.device),
        **flops.utilization_metrics(loop),
    }
    for split, seconds in evaluation_seconds.items():
        metrics[f"{split}_rows_per_second"] = len(loop.data.splits[split].lengths) / seconds if seconds else 0.0
    return metrics


def _gpu_memory(device: torch.device) -> dict[str, int]:
    """``peak_gpu_memory_bytes``: the most that was allocated on the GPU at once, without its context."""
    return {"peak_gpu_memory_bytes": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}


def write(path: Path, results: Results) -> None:
    """Writes the results into the run's folder."""
    files.write_json(path / folders.METRICS, results.metrics)
    files.write_json(path / "assessment.json", results.assessments)
    files.write_json(path / "baselines.json", results.baselines)
    if results.plan:
        files.write_json(path / prediction.FILE, results.plan)
    for split, rows in results.predictions.items():
        (path / "predictions").mkdir(exist_ok=True)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (path / "predictions" / f"{split}.jsonl").write_text(text, encoding="utf-8")
    if results.generations:
        write_generations(path, results.generations, title=path.name)

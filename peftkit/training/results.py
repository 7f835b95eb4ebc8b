"""What a run found out: figures before and after training, baselines beside them, and every prediction.

metrics.json      {split or baseline: {figure: value}}, and "training"
plan.json         what had been planned of memory and time, beside what was measured
assessment.json   the figures with intervals, per class, confusion, calibration, mistakes
baselines.json    each baseline's figures, and whether training beat it
predictions/      one JSONL a split
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from peftkit.data.pipeline import EncodedSplit, PreparedData, tokenizer_fingerprint
from peftkit.evaluation import decisions, samples, zero_shot_scores
from peftkit.evaluation.assessment import assess
from peftkit.evaluation.baselines import Baseline, compare_losses, compare_predictions, majority, zero_shot
from peftkit.evaluation.samples import Sample
from peftkit.models.loading import load_language_model, writes_text
from peftkit.planning import prediction
from peftkit.review.generations import GenerationRow
from peftkit.review.generations import write as write_generations
from peftkit.runs import folder as folders
from peftkit.runs.environment import peak_memory
from peftkit.schema.types import LoadedModel
from peftkit.system.cache import cached_array
from peftkit.training import feature_store, flops
from peftkit.training.loop import Loop

DEFAULT_BASELINES = ("majority", "zero_shot")
HELD_OUT = ("validation", "test")


@dataclass
class Results:
    """Everything that is written beside the adapter."""

    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    assessments: dict[str, dict[str, Any]] = field(default_factory=dict)
    baselines: list[dict[str, Any]] = field(default_factory=list)
    predictions: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    generations: list[GenerationRow] = field(default_factory=list)
    plan: dict[str, Any] = field(default_factory=dict)
    """``planning.prediction.beside``; empty where the run was not finished, or another process makes it."""


@dataclass
class PreTrainingBaselines:
    """What must be asked of the model before its first step."""

    baselines: list[Baseline] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)


def scored_split(splits: Mapping[str, Any]) -> str:
    """The split that results are quoted on: test where there is one."""
    return "test" if "test" in splits else "validation"


def before_training(loop: Loop, loaded: LoadedModel, prepared: PreparedData) -> PreTrainingBaselines:
    """The baselines of the recipe, and the base model's texts: both need the model as it is before the first step."""
    recipe, split = loop.recipe, scored_split(prepared.splits)
    wanted = DEFAULT_BASELINES if recipe.evaluation.baselines is None else recipe.evaluation.baselines
    rows, found = prepared.splits[split], PreTrainingBaselines()
    if recipe.task.head == "causal_lm":
        if "zero_shot" in wanted:
            with _as_base(loop, loaded):
                outputs = loop.evaluate(loop.data.splits[split])
            values = recipe.task.metrics(outputs, prepared.info, recipe.evaluation)
            held, note = (outputs["loss"], outputs["weight"]), "the base model before training"
            found.baselines.append(Baseline("zero_shot", values, note=note, losses=held))
        if loop.session.sharded:
            return found
        found.samples = samples.choose(rows, recipe.task, recipe.evaluation.generation)
        with _as_base(loop, loaded):
            found.texts = _texts(loop, loaded, found.samples)
        return found
    if "majority" in wanted:
        known = prepared.splits["train"]["label"]
        found.baselines.append(majority(known, rows["label"], recipe.task, prepared.info, recipe.evaluation))
    if "zero_shot" in wanted and not loop.session.sharded:
        found.baselines.append(_zero_shot(loop, loaded, rows, prepared))
    return found


def _as_base(loop: Loop, loaded: LoadedModel) -> AbstractContextManager[Any]:
    """The model as it is before its method: most untrained methods change nothing, a random prompt does."""
    return nullcontext() if loop.recipe.method.starts_as_base else loaded.model.disable_adapter()


def _texts(loop: Loop, loaded: LoadedModel, chosen: list[Sample]) -> list[str]:
    with loop.session.accelerator.autocast():
        return samples.write_texts(loaded.model, loaded.tokenizer, chosen, loop.recipe.evaluation.generation)


def _zero_shot(loop: Loop, loaded: LoadedModel, rows: Any, prepared: PreparedData) -> Baseline:
    """The base told only the classes' names; every process computes it, so that none waits for another."""
    recipe = loop.recipe
    loaded.model.eval()
    backbone = getattr(loaded.model, "get_base_model", lambda: loaded.model)().base_model
    model, decoder = backbone, writes_text(backbone.config)
    if decoder:  # a classifier has lost the head that a prompt is answered with
        model = functools.partial(load_language_model, recipe, loop.session.device)

    def kept(texts: Sequence[str], make: Callable[[], np.ndarray]) -> np.ndarray:
        return cached_array("zero_shot", _scores_key(loop, loaded, texts, prepared.info.labels), make)

    with loop.session.accelerator.autocast():
        return zero_shot(
            model,
            loaded.tokenizer,
            rows["text"],
            rows["label"],
            recipe.task,
            prepared.info,
            recipe.evaluation,
            max_length=recipe.data.max_length,
            decoder=decoder,
            kept=kept if recipe.method.starts_as_base else None,
        )


def _scores_key(loop: Loop, loaded: LoadedModel, texts: Sequence[str], labels: Sequence[str]) -> str:
    """Of all that an untrained base's scores depend on; method and training are not among it."""
    recipe = loop.recipe
    decides = [
        loaded.fingerprint, tokenizer_fingerprint(loaded.tokenizer), recipe.model.model_dump(mode="json"),
        recipe.quantization.model_dump(mode="json") if recipe.quantization else None, recipe.data.max_length,
        loop.session.device.type, str(loop.session.dtype), feature_store.versions(), list(texts), list(labels),
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode())
    digest.update(Path(zero_shot_scores.__file__).read_bytes())
    return digest.hexdigest()


def after_training(
    loop: Loop,
    loaded: LoadedModel,
    prepared: PreparedData,
    before: PreTrainingBaselines,
    splits: Sequence[str] = HELD_OUT,
) -> Results:
    """Scores the trained model on held-out splits and sets the baselines beside it."""
    recipe, found = loop.recipe, Results()
    seconds = {}
    for split in splits:
        if split not in loop.data.splits:
            continue
        encoded = loop.data.splits[split]
        started = time.perf_counter()
        outputs = loop.evaluate(encoded)
        seconds[split] = time.perf_counter() - started
        rows = _rows_of(encoded, prepared.splits[split])
        assessment = assess(recipe.task, outputs, rows, prepared.info, recipe.evaluation, split=split)
        found.assessments[split] = assessment
        found.metrics[split] = {name: figure["value"] for name, figure in assessment["metrics"].items()}
        if recipe.task.head == "classification":
            found.predictions[split] = predictions(recipe.task, outputs, rows, prepared.info)
        else:
            found.predictions[split] = losses(outputs, rows)
    if before.samples:
        texts = _texts(loop, loaded, before.samples)
        found.generations = samples.side_by_side(before.samples, before.texts, texts)
        found.metrics["generation"] = samples.generation_metrics(before.samples, texts)
        found.metrics["generation_before"] = samples.generation_metrics(before.samples, before.texts)
    for baseline in before.baselines:
        found.metrics[baseline.name] = baseline.metrics
        found.baselines.append(_beside(baseline, loop, outputs, prepared))
    training = found.metrics["training"] = training_metrics(loop, seconds)
    if loop.session.is_main and tuple(splits) == HELD_OUT:
        found.plan = prediction.compare_with_measured(
            recipe, prepared.info, loop.tokenizer, loop.data, training, device=loop.session.device,
            world_size=loop.session.world_size, sharded=loop.session.sharded,
        )  # fmt: skip
        training |= prediction.plan_error_metrics(found.plan)
    return found


def _rows_of(encoded: EncodedSplit, rows: Any) -> Any:
    """The canonical rows that the examples stand for, in the examples' order."""
    index = encoded.examples["row"]
    return rows if len(index) == len(rows) else rows.select(index)


def _beside(
    baseline: Baseline, loop: Loop, outputs: Mapping[str, np.ndarray], prepared: PreparedData
) -> dict[str, Any]:
    recipe, info = loop.recipe, prepared.info
    if recipe.task.head == "causal_lm":
        return compare_losses(baseline, outputs["loss"], outputs["weight"], recipe.evaluation.confidence)
    predicted = decisions.decide(outputs["logits"], info, recipe.task.threshold).predicted
    gold = decisions.references(outputs, info)
    return compare_predictions(baseline, predicted, gold, info, recipe.evaluation.confidence)


def predictions(task: Any, outputs: Mapping[str, np.ndarray], rows: Any, info: Any) -> list[dict[str, Any]]:
    """One JSON-able row a prediction: where it came from, the text, gold and predicted."""
    found, gold = decisions.decide(outputs["logits"], info, task.threshold), decisions.references(outputs, info)
    made = []
    for number, row in enumerate(rows):
        line = {"file": row.get("_file"), "line": row.get("_line"), "text": row["text"]}
        if "text_pair" in row:
            line["text_pair"] = row["text_pair"]
        made.append({**line, **_said(found, gold, number, info)})
    return made


def losses(outputs: Mapping[str, np.ndarray], rows: Any) -> list[dict[str, Any]]:
    """One row an example of a language model: where it begins, its summed loss, and how many tokens were scored."""
    return [
        {"file": row.get("_file"), "line": row.get("_line"), "loss": round(float(loss), 6), "tokens": float(tokens)}
        for row, loss, tokens in zip(rows, outputs["loss"], outputs["weight"], strict=True)
    ]


def _said(found: decisions.Decisions, gold: np.ndarray, number: int, info: Any) -> dict[str, Any]:
    if info.problem_type == decisions.REGRESSION:
        return {"gold": float(gold[number]), "predicted": float(found.predicted[number])}
    if info.problem_type == decisions.MULTI:
        names = np.array(info.labels)
        return {
            "gold": names[gold[number].astype(bool)].tolist(),
            "predicted": names[found.predicted[number].astype(bool)].tolist(),
        }
    return {
        "gold": info.labels[int(gold[number])],
        "predicted": info.labels[int(found.predicted[number])],
        "probability": round(float(found.confidence[number]), 6),
    }


def training_metrics(loop: Loop, evaluation_seconds: Mapping[str, float]) -> dict[str, Any]:
    """How the training itself went."""
    state = loop.state
    trained = sum(p.numel() for p in loop.module.parameters() if p.requires_grad)
    made = {
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
        "trained_parameters": trained,
        "peak_memory_bytes": peak_memory(),
        **flops.utilization_metrics(loop),
    }
    for split, seconds in evaluation_seconds.items():
        made[f"{split}_rows_per_second"] = len(loop.data.splits[split].lengths) / seconds if seconds else 0.0
    return made


def write(path: Path, found: Results) -> None:
    """Writes the results into the run's folder."""
    folders.write_json(path / folders.METRICS, found.metrics)
    folders.write_json(path / "assessment.json", found.assessments)
    folders.write_json(path / "baselines.json", found.baselines)
    if found.plan:
        folders.write_json(path / prediction.FILE, found.plan)
    for split, rows in found.predictions.items():
        (path / "predictions").mkdir(exist_ok=True)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (path / "predictions" / f"{split}.jsonl").write_text(text, encoding="utf-8")
    if found.generations:
        write_generations(path, found.generations, title=path.name)

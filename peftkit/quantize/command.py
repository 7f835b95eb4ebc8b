"""``peftkit quantize``: a base model in NF4, quantized for the rows that it will be trained on.

``quantization.kind=nf4`` rounds each weight to the nearest value. Here weights are rounded with GPTQ, calibrated on
training rows (``gptq``), and then scales and norms are distilled from the unquantized model (``distillation``). The
result is an ordinary bitsandbytes checkpoint. Where the recipe's LoRA is initialized with LoftQ, the quantized weights
and factors of its rank are fitted together, and the folder contains both.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from peftkit.data.pipeline import EncodedSplit, encode, prepare
from peftkit.errors import ExportError, ModelError, RecipeError, RunError, did_you_mean
from peftkit.methods import loftq_init
from peftkit.methods.lora import Lora
from peftkit.methods.targets import linear_names
from peftkit.models import packing
from peftkit.models.blocks import find_blocks
from peftkit.models.kernels import linear_cross_entropy
from peftkit.models.loading import heads_of, load_plain
from peftkit.models.quantization import checkpoint
from peftkit.models.quantization.bitsandbytes_support import keep_gradients
from peftkit.models.sources import ResolvedSource, folder_of, resolve
from peftkit.models.third_party import silence_libraries
from peftkit.models.tokenizer import load_tokenizer
from peftkit.quantize.distillation import distill, distillation_targets
from peftkit.quantize.gptq import quantize_blocks
from peftkit.quantize.low_rank_fit import Factors, low_rank_correction
from peftkit.schema.head import head_of
from peftkit.schema.recipe import Recipe
from peftkit.schema.types import Batch, LoadedModel
from peftkit.system.files import atomic_folder
from peftkit.training.log import progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_OUT_ROWS = 64  # most rows that the quantization error is measured on
TUNING_BATCH_SIZE = 4
BLOCK_SIZES = (32, 64, 128)
METRICS_FILE = "quantization.json"
POOLING_FILES = ("modules.json", "1_Pooling/config.json")  # how a sentence encoder pools; copied next to the weights
ENCODER_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
TITLES = {"error": "relative error of the last hidden states", "loss": "loss per scored token",
          "and LoRA's start": "calibrated nf4 with LoRA's factors"}  # fmt: skip
"""Titles of keys of ``quantization.json`` in tables."""


def quantize(
    recipe: Recipe, to: Path, *, rows: int = 128, tune_rows: int = 0, block_size: int = 64, keep: Sequence[str] = ()
) -> dict[str, Any]:
    """Writes the recipe's base model to ``to`` with its blocks' linear layers in NF4; returns ``quantization.json``.

    Calibration keeps both models in memory: 1.3 times the unquantized one.

    Args:
        recipe: its model, data, ``quantization.double`` and ``training.seed`` are used, and the targets and ranks of a
            LoRA with ``init_lora_weights=loftq``.
        to: a folder that does not exist yet, or is empty.
        rows: randomly drawn training rows to calibrate on.
        tune_rows: training rows to tune scales and norms on, in one pass; 0 skips tuning.
        block_size: weights per scale: 64 as in QLoRA, or 32, which takes 0.13 bits more per weight.
        keep: linear layers that stay unquantized, by the last part of their names, such as "v_proj".

    Returns:
        Counts, bytes, and under ``lost`` the metrics on held-out rows after each stage: the ``error`` of the last
        hidden states (‖h' − h‖ / ‖h‖) and, for language models, the ``loss`` per scored token.

    Raises:
        RecipeError: the recipe asks for another quantization, or an argument is out of range.
        ModelError: the base is already quantized, has no blocks, or does not fit in memory.
        RunError: ``to`` is not empty.
        ExportError: the written model does not load as the one that was measured.
    """
    silence_libraries()
    _check(recipe, to, rows, tune_rows, block_size)
    source = resolve(recipe.model)
    folder = folder_of(source)
    tokenizer = load_tokenizer(recipe.model)
    prepared = prepare(recipe)
    encoded = encode(prepared, tokenizer, recipe)
    causal = head_of(prepared.info, recipe.task).writes_text
    device = "cuda" if torch.cuda.is_available() else "cpu"
    calibration, tuning, held_out = (
        [{name: values.to(device) for name, values in batch.items()} for batch in batches]
        for batches in _draw_rows(encoded.splits, rows, tune_rows, recipe.training.seed, tokenizer)
    )
    reference = load_plain(recipe.model, folder, causal=causal, device=device)
    evaluation = _Evaluation(reference, held_out, causal)
    quantized = _load_nf4(recipe, folder, reference, keep, causal, device)
    with_lora = isinstance(recipe.method, Lora) and recipe.method.init_lora_weights == "loftq"
    config = recipe.method.widest().peft_config(LoadedModel(quantized, tokenizer)) if with_lora else None
    ranks = loftq_init.layer_ranks(config) if config else {}
    layers, factors, metrics = _fit(reference, quantized, calibration, tuning, evaluation, block_size, ranks)
    results = {
        "base": recipe.model.source, "block_size": block_size, "kept": list(keep), "layers": layers,
        "rows": len(calibration), "tokens": sum(int(batch["attention_mask"].sum()) for batch in calibration),
        "tuned_rows": sum(len(batch["input_ids"]) for batch in tuning),
        "rank": config.r if config else 0,
        "bytes": quantized.get_memory_footprint(), "held_out_rows": len(held_out), "lost": metrics,
    }  # fmt: skip
    with atomic_folder(to) as stage:
        _write(stage, quantized, tokenizer, folder, source, results)
        if config:
            loftq_init.save_factors(stage, config, factors)
        _verify(load_plain(recipe.model, stage, causal=causal, device=device), evaluation, quantized)
    return results


def _fit(
    reference: Any, quantized: Any, calibration: Sequence[Batch], tuning: Sequence[Batch], evaluation: _Evaluation,
    block_size: int, ranks: Mapping[str, int],
) -> tuple[int, dict[str, Factors], dict[str, dict[str, float]]]:  # fmt: skip
    """Calibrates and tunes; returns the number of layers, the factors of those in ``ranks``, each stage's metrics."""
    causal = evaluation.causal
    metrics = {"unquantized": evaluation.measure(reference), "nf4": evaluation.measure(quantized)}
    targets = [distillation_targets(reference, batch, _forward, causal) for batch in tuning]
    with progress_bar("blocks calibrated", len(find_blocks(reference)[1])) as advance:
        loss = linear_cross_entropy.loss if causal else None
        pairs = quantize_blocks(reference, quantized, calibration, _forward, loss, block_size, ranks, advance)
    metrics["calibrated nf4"] = evaluation.measure(quantized)
    factors = {name: pair for name, pair in pairs.items() if name in ranks}
    with low_rank_correction(quantized, factors):
        if factors:
            metrics["and LoRA's start"] = evaluation.measure(quantized)
        if tuning:
            with progress_bar("batches tuned on", len(tuning)) as advance:
                distill(quantized, tuning, targets, _forward, causal, advance)
            metrics["tuned nf4"] = evaluation.measure(quantized)
    return len(pairs), factors, metrics


def _check(recipe: Recipe, to: Path, rows: int, tune_rows: int, block_size: int) -> None:
    kind = recipe.quantization.kind if recipe.quantization else "null"
    if kind != "nf4":
        raise RecipeError(
            f"peftkit quantize writes NF4 weights, and this recipe has quantization={kind}; set quantization.kind=nf4"
        )
    if rows < 1:
        raise RecipeError(f"--rows {rows}: expected at least 1 row to calibrate on")
    if tune_rows < 0:
        raise RecipeError(f"--tune-rows {tune_rows}: expected 0, which skips tuning, or more")
    if block_size not in BLOCK_SIZES:
        raise RecipeError(f"--block-size {block_size}: {did_you_mean(str(block_size), map(str, BLOCK_SIZES))}")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise RunError(f"{to} exists and is not an empty folder; choose one that does not exist yet")
    if stored := checkpoint.kind_of(recipe.model):
        raise ModelError(f"model.source={recipe.model.source}: its weights are already quantized with {stored}")


def _draw_rows(
    splits: dict[str, EncodedSplit], rows: int, tune_rows: int, seed: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Batch], list[Batch], list[Batch]]:
    """Batches to calibrate on (one training row each), to tune on (rows of similar length, in random order), and to
    evaluate on (one row each: of the validation split, or training rows that are used for nothing else)."""
    train, evaluated, random = splits["train"], splits.get("validation"), np.random.default_rng(seed)
    order = random.permutation(len(train.lengths))
    if evaluated is not None and len(evaluated.lengths):
        held_out = np.arange(len(evaluated.lengths))[:HELD_OUT_ROWS]
    else:
        evaluated, held_out = train, order[rows:][:HELD_OUT_ROWS]
        order = np.delete(order, np.s_[rows : rows + HELD_OUT_ROWS])
    tuning = order[:tune_rows]
    tuning = tuning[np.argsort(train.lengths[tuning], kind="stable")]
    batches = [tuning[start : start + TUNING_BATCH_SIZE] for start in range(0, len(tuning), TUNING_BATCH_SIZE)]
    return (
        [train.batch(np.array([row]), tokenizer) for row in order[:rows]],
        [train.batch(batches[number], tokenizer) for number in random.permutation(len(batches))],
        [evaluated.batch(np.array([row]), tokenizer) for row in held_out],
    )


def _load_nf4(recipe: Recipe, folder: Path, reference: Any, keep: Sequence[str], causal: bool, device: str) -> Any:
    """The base as bitsandbytes quantizes it: every linear layer except heads, poolers, and those to keep."""
    assert recipe.quantization is not None
    known = {name.rpartition(".")[2] for name in linear_names(find_blocks(reference)[1])}
    for name in sorted(set(keep) - known):
        raise RecipeError(f"--keep {name}: the blocks have no linear layer of that name; {did_you_mean(name, known)}")
    arguments = recipe.quantization.load_arguments(recipe.model, (*heads_of(reference.config, folder), *keep))
    quantized = load_plain(recipe.model, folder, causal=causal, device=device, **arguments)
    keep_gradients(quantized)
    return quantized


def _forward(model: Any, batch: Batch) -> Tensor:
    """The last hidden states [rows, tokens, width]."""
    if model.base_model is model:  # an encoder
        inputs: dict[str, Any] = {name: batch[name] for name in ENCODER_INPUTS if name in batch}
    else:
        inputs = packing.inputs(batch, model) | packing.no_cache(model)
    return model.base_model(**inputs).last_hidden_state  # type: ignore[no-any-return]


class _Evaluation:
    """Compares models with the unquantized one on held-out rows."""

    def __init__(self, reference: Any, batches: Sequence[Batch], causal: bool) -> None:
        self._batches = batches
        self.causal = causal
        self._reference = self.hidden_states(reference)

    def hidden_states(self, model: Any) -> list[Tensor]:
        """The last hidden states of each row."""
        with packing.eval_modules(model), torch.no_grad():
            return [_forward(model, batch) for batch in self._batches]

    def measure(self, model: Any) -> dict[str, float]:
        """``error``, and ``loss`` for language models; NaN without rows."""
        error = total = 0.0
        for hidden, reference in zip(self.hidden_states(model), self._reference):
            error += float((hidden.float() - reference.float()).square().sum())
            total += float(reference.float().square().sum())
        metrics = {"error": (error / total) ** 0.5 if total else float("nan")}
        if self.causal:
            with packing.eval_modules(model):
                outputs = [linear_cross_entropy.row_outputs(model, batch) for batch in self._batches]
            weight = sum(float(output["weight"].sum()) for output in outputs)
            loss = sum(float(output["loss"].sum()) for output in outputs)
            metrics["loss"] = loss / weight if weight else float("nan")
        return metrics


def _write(
    stage: Path, quantized: Any, tokenizer: Any, folder: Path, source: ResolvedSource, results: dict[str, Any]
) -> None:
    quantized.save_pretrained(stage)
    tokenizer.save_pretrained(stage)
    for name in POOLING_FILES:
        if (folder / name).is_file():
            (stage / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, stage / name)
    (stage / METRICS_FILE).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (stage / "README.md").write_text(_card(source, results), encoding="utf-8")


def _card(source: ResolvedSource, results: dict[str, Any]) -> str:
    base = source.location if source.kind == "hub" else Path(source.location).name
    front = f"---\nbase_model: {base}\n---\n\n" if source.kind == "hub" else ""
    text = (
        f"{front}# {base} in NF4\n\n"
        f"{results['layers']} linear layers in 4-bit NormalFloat (QLoRA, arXiv:2305.14314) with one scale "
        f"per {results['block_size']} weights, rounded with GPTQ (arXiv:2210.17323) on {results['rows']} calibration "
        f"rows of {results['tokens']:,} tokens. "
    )
    if results["tuned_rows"]:
        text += f"Scales and norms trained on {results['tuned_rows']} rows (arXiv:2407.11062). "
    if results["rank"]:
        text += f"Use it with the LoRA of rank {results['rank']} in `{loftq_init.FOLDER}` (LoftQ, arXiv:2310.08659). "
    text += "The format is bitsandbytes': `from_pretrained` of transformers loads the folder.\n\n"
    return f"{text}On {results['held_out_rows']} held-out rows:\n\n{table(results)}"


def table(results: dict[str, Any]) -> str:
    """The metrics in the results of ``quantize`` as a Markdown table."""
    names = list(next(iter(results["lost"].values())))
    lines = [["weights", *(TITLES[name] for name in names)], ["---"] * (len(names) + 1)]
    for stage, metrics in results["lost"].items():
        lines.append([TITLES.get(stage, stage), *(f"{metrics[name]:.4f}" for name in names)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _verify(loaded: Any, evaluation: _Evaluation, quantized: Any) -> None:
    """Raises ExportError unless what was loaded equals the model that was measured, bit for bit."""
    keep_gradients(loaded)
    for hidden, expected in zip(evaluation.hidden_states(loaded), evaluation.hidden_states(quantized)):
        if not torch.equal(hidden, expected):
            difference = float((hidden.float() - expected.float()).abs().max())
            raise ExportError(
                f"the quantized model gives other outputs once saved and loaded (difference {difference:.3g}); nothing "
                "was written"
            )

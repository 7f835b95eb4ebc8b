"""A base model in NF4, quantized for the rows that it will be trained on.

    peftkit quantize instruct_qlora --to smollm2-nf4
    peftkit train instruct_qlora model.source=./smollm2-nf4 quantization=null

``quantization.kind=nf4`` rounds each weight by itself as the model is loaded. Here the rounding is chosen on training
rows (``peftkit.quantize.gptq``), then scales and norms are trained on such rows to say what the whole model says
(``peftkit.quantize.distillation``). The base loses a fraction of what it loses else, at the same bytes and speed. The
folder is an ordinary checkpoint of bitsandbytes', which transformers loads without peftkit. Where the recipe's LoRA
starts from LoftQ, rounding and factors of its rank are fitted together, and the folder holds both.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from peftkit.data.pipeline import EncodedSplit, encode, prepare
from peftkit.errors import ExportError, ModelError, RecipeError, RunError, did_you_mean
from peftkit.export.staging import staged
from peftkit.methods import loftq_init
from peftkit.methods.lora import Lora
from peftkit.methods.targets import linear_names
from peftkit.models import dtypes, packing
from peftkit.models.blocks import find_blocks
from peftkit.models.kernels import linear_cross_entropy
from peftkit.models.loading import heads_of, load_plain
from peftkit.models.quantization import checkpoint
from peftkit.models.quantization.bitsandbytes_support import keep_gradients
from peftkit.models.sources import ResolvedSource, folder_of, resolve
from peftkit.models.tokenizer import load_tokenizer
from peftkit.quantize.distillation import distill, targets
from peftkit.quantize.gptq import quantize_blocks
from peftkit.quantize.low_rank_fit import Factors, completed
from peftkit.schema.head import head_of
from peftkit.schema.recipe import Recipe
from peftkit.schema.types import Batch, LoadedModel
from peftkit.training.log import progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

JUDGED = 64
"""Held-out rows that tell what quantization cost."""
TUNED_BATCH = 4
"""Rows of a step that trains scales."""
BLOCK_SIZES = (32, 64, 128)
FIGURES = "quantization.json"
POOLING = ("modules.json", "1_Pooling/config.json")
"""What says how a sentence encoder pools; it goes with the weights."""
_READ = ("input_ids", "attention_mask", "token_type_ids")


def quantize(
    recipe: Recipe, to: Path, *, rows: int = 128, tune_rows: int = 0, block_size: int = 64, keep: Sequence[str] = ()
) -> dict[str, Any]:
    """Writes the recipe's base model to ``to``, its blocks' linear layers in NF4; returns ``quantization.json``.

    Both models are held at a time while rounding is chosen: 1.3 times the memory of the unquantized one. Scales are
    trained over the packed one alone, with the activations of ``TUNED_BATCH`` rows and the last hidden states of all.

    Args:
        recipe: its model, data, ``quantization.double`` and ``training.seed`` are used, and of a LoRA with
            ``init_lora_weights=loftq`` what says where its factors are and how wide.
        to: a folder that does not exist yet, or is empty.
        rows: training rows, drawn at random, to choose the rounding on.
        tune_rows: training rows to train scales and norms on, once; 0 leaves them as they were chosen.
        keep: linear layers that stay whole, by the last part of their names, such as "v_proj".
        block_size: weights that share a scale: 64 as in QLoRA, or 32, which takes 0.13 bits more for each.

    Returns:
        Counts, bytes, and what was lost on held-out rows by NF4 as it is, with the rounding chosen, with LoRA's start
        added, and with scales trained: the ``error`` of the last hidden states (‖h' − h‖ / ‖h‖) and, of language
        models, the ``loss`` per scored token.

    Raises:
        RecipeError: the recipe quantizes otherwise, or an argument is out of range.
        ModelError: the base is quantized already, has no blocks, or does not fit in memory.
        RunError: ``to`` holds something.
        ExportError: what was written does not load as what was measured.
    """
    dtypes.silence_libraries()
    _check(recipe, to, rows, tune_rows, block_size)
    source = resolve(recipe.model)
    folder = folder_of(source)
    tokenizer = load_tokenizer(recipe.model)
    prepared = prepare(recipe)
    encoded = encode(prepared, tokenizer, recipe)
    causal = head_of(prepared.info, recipe.task).writes_text
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen, learned, held_out = (
        [_moved(one, device) for one in batches]
        for batches in _choose(encoded.splits, rows, tune_rows, recipe.training.seed, tokenizer)
    )
    whole = load_plain(recipe.model, folder, causal=causal, device=device)
    judge = _Judge(whole, held_out, causal)
    quantized = _load_packed(recipe, folder, whole, _kept(whole, keep), causal, device)
    config = _lora_config(recipe, quantized, tokenizer)
    made = _fit(whole, quantized, chosen, learned, judge, block_size, loftq_init.ranks_of(config) if config else {})
    found = {
        "base": recipe.model.source, "block_size": block_size, "kept": list(keep), "layers": made.layers,
        "rows": len(chosen), "tokens": sum(int(one["attention_mask"].sum()) for one in chosen),
        "tuned_rows": sum(len(one["input_ids"]) for one in learned),
        "rank": config.r if config else 0,
        "bytes": quantized.get_memory_footprint(), "held_out_rows": len(held_out), "lost": made.lost,
    }  # fmt: skip
    with staged(to) as stage:
        _write(stage, quantized, tokenizer, folder, source, found)
        if config:
            loftq_init.write(stage, config, made.starts)
        _prove(stage, recipe, causal, device, judge, quantized)
    return found


def _lora_config(recipe: Recipe, quantized: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """peft's LoraConfig, where the recipe's LoRA starts from LoftQ; None else."""
    if not isinstance(recipe.method, Lora) or recipe.method.init_lora_weights != "loftq":
        return None
    return recipe.method.config(LoadedModel(quantized, tokenizer))


@dataclass
class _Fitted:
    """What fitting a model to its rows brought."""

    layers: int
    starts: dict[str, Factors]
    """LoRA's factors, by the layer's name."""
    lost: dict[str, dict[str, float]]


def _fit(
    whole: Any, quantized: Any, chosen: Sequence[Batch], learned: Sequence[Batch], judge: _Judge, block_size: int,
    ranks: Mapping[str, int],
) -> _Fitted:  # fmt: skip
    """Rounds ``quantized`` for the rows ``chosen``, then trains its scales on those ``learned``; uses ``whole`` up."""
    causal = judge.causal
    lost = {"unquantized": judge.figures(whole), "nf4": judge.figures(quantized)}
    wanted = [targets(whole, one, _forward, causal) for one in learned]
    with progress_bar("blocks quantized", len(find_blocks(whole)[1])) as advance:
        loss = linear_cross_entropy.loss if causal else None
        found = quantize_blocks(whole, quantized, chosen, _forward, loss, block_size, ranks, advance)
    lost["calibrated nf4"] = judge.figures(quantized)
    starts = {name: both for name, both in found.items() if name in ranks}
    with completed(quantized, starts):
        if starts:
            lost["and LoRA's start"] = judge.figures(quantized)
        if learned:
            with progress_bar("batches to train scales on", len(learned)) as advance:
                distill(quantized, learned, wanted, _forward, causal, advance)
            lost["tuned nf4"] = judge.figures(quantized)
    return _Fitted(len(found), starts, lost)


def _check(recipe: Recipe, to: Path, rows: int, tune_rows: int, block_size: int) -> None:
    held = recipe.quantization
    if held is None or held.kind != "nf4":
        raise RecipeError(
            f"peftkit quantize writes NF4 weights, and this recipe has quantization={held.kind if held else 'null'}; "
            "set quantization.kind=nf4"
        )
    if rows < 1:
        raise RecipeError(f"--rows {rows}: expected at least 1 row to calibrate on")
    if tune_rows < 0:
        raise RecipeError(f"--tune-rows {tune_rows}: expected 0, which trains no scales, or more")
    if block_size not in BLOCK_SIZES:
        raise RecipeError(f"--block-size {block_size}: {did_you_mean(str(block_size), map(str, BLOCK_SIZES))}")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise RunError(f"{to} exists and is not an empty folder; name one that does not exist yet")
    if kind := checkpoint.kind_of(recipe.model):
        raise ModelError(f"model.source={recipe.model.source}: its weights are quantized with {kind} already")


def _choose(
    splits: dict[str, EncodedSplit], rows: int, tune_rows: int, seed: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Batch], list[Batch], list[Batch]]:
    """Training rows to calibrate on, one a batch; those to train scales on, of like length together, in an order by
    chance; and rows to judge by: of the validation split, or training rows that serve for nothing else."""
    train, judged, random = splits["train"], splits.get("validation"), np.random.default_rng(seed)
    order = random.permutation(len(train.lengths))
    if judged is not None and len(judged.lengths):
        held_out = np.arange(len(judged.lengths))[:JUDGED]
    else:
        judged, held_out = train, order[rows:][:JUDGED]
        order = np.concatenate([order[:rows], order[rows:][JUDGED:]])
    learned = order[:tune_rows]
    learned = learned[np.argsort(train.lengths[learned], kind="stable")]
    batches = [learned[start : start + TUNED_BATCH] for start in range(0, len(learned), TUNED_BATCH)]
    return (
        [train.batch(np.array([row]), tokenizer) for row in order[:rows]],
        [train.batch(batches[number], tokenizer) for number in random.permutation(len(batches))],
        [judged.batch(np.array([row]), tokenizer) for row in held_out],
    )


def _kept(whole: Any, keep: Sequence[str]) -> tuple[str, ...]:
    """The names, each of them that of a linear layer within the blocks."""
    known = {name.rpartition(".")[2] for name in linear_names(find_blocks(whole)[1])}
    for one in keep:
        if one not in known:
            raise RecipeError(f"--keep {one}: no linear layer of the blocks is named so; {did_you_mean(one, known)}")
    return tuple(keep)


def _load_packed(recipe: Recipe, folder: Path, whole: Any, keep: tuple[str, ...], causal: bool, device: str) -> Any:
    """The base as bitsandbytes rounds it: every linear layer but heads and poolers and those to keep."""
    assert recipe.quantization is not None
    arguments = recipe.quantization.load_arguments(recipe.model, (*heads_of(whole.config, folder), *keep))
    quantized = load_plain(recipe.model, folder, causal=causal, device=device, **arguments)
    keep_gradients(quantized)
    return quantized


def _forward(model: Any, batch: Batch) -> Tensor:
    """The last hidden states [1, tokens, width] of a row."""
    backbone = model.base_model
    if backbone is model:  # an encoder
        return backbone(**{name: batch[name] for name in _READ if name in batch}).last_hidden_state  # type: ignore[no-any-return]
    given = {**packing.inputs(batch, model), **packing.no_cache(model)}
    return backbone(**given).last_hidden_state  # type: ignore[no-any-return]


def _moved(batch: Batch, device: torch.device | str) -> Batch:
    return {name: values.to(device) for name, values in batch.items()}


class _Judge:
    """What held-out rows say of a model beside the unquantized one."""

    def __init__(self, whole: Any, batches: Sequence[Batch], causal: bool) -> None:
        self._batches = batches
        self.causal = causal
        self._wanted = self.hidden(whole)

    def hidden(self, model: Any) -> list[Tensor]:
        """The last hidden states of each row."""
        with packing.eval_modules(model), torch.no_grad():
            return [_forward(model, batch) for batch in self._batches]

    def figures(self, model: Any) -> dict[str, float]:
        """``error``, and ``loss`` of a language model; NaN where there are no rows."""
        lost = total = 0.0
        for found, wanted in zip(self.hidden(model), self._wanted):
            lost += float((found.float() - wanted.float()).square().sum())
            total += float(wanted.float().square().sum())
        figures = {"error": (lost / total) ** 0.5 if total else float("nan")}
        return figures | ({"loss": self._loss(model)} if self.causal else {})

    def _loss(self, model: Any) -> float:
        with packing.eval_modules(model):
            outputs = [linear_cross_entropy.row_outputs(model, batch) for batch in self._batches]
        weight = sum(float(one["weight"].sum()) for one in outputs)
        return sum(float(one["loss"].sum()) for one in outputs) / weight if weight else float("nan")


def _write(
    stage: Path, quantized: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, source: ResolvedSource,
    found: dict[str, Any],
) -> None:  # fmt: skip
    quantized.save_pretrained(stage)
    tokenizer.save_pretrained(stage)
    for name in POOLING:
        if (folder / name).is_file():
            (stage / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, stage / name)
    (stage / FIGURES).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    (stage / "README.md").write_text(_card(source, found), encoding="utf-8")


def _card(source: ResolvedSource, found: dict[str, Any]) -> str:
    """What the folder holds, and how to load it."""
    base = source.location if source.kind == "hub" else Path(source.location).name
    start = (
        f", made for the LoRA of rank {found['rank']} in `{loftq_init.FOLDER}` to be added (LoftQ, arXiv:2310.08659)"
        if found["rank"]
        else ""
    )
    tuned = f"scales and norms trained on {found['tuned_rows']} (arXiv:2407.11062), " if found["tuned_rows"] else ""
    front = f"---\nbase_model: {base}\n---\n\n" if source.kind == "hub" else ""
    return (
        f"{front}# {base} in NF4\n\n"
        f"{found['layers']} linear layers in 4-bit NormalFloat (QLoRA, arXiv:2305.14314), a scale for each "
        f"{found['block_size']} weights, rounded with GPTQ's "
        f"compensation of errors (arXiv:2210.17323) on {found['rows']} rows of {found['tokens']:,} tokens{start}, "
        f"{tuned}in bitsandbytes' format: `from_pretrained` of transformers loads the folder as it is.\n\n"
        f"On {found['held_out_rows']} held-out rows:\n\n{table(found)}"
    )


def table(found: dict[str, Any]) -> str:
    """The figures of ``quantize`` as a Markdown table."""
    names = list(next(iter(found["lost"].values())))
    titles = {"error": "error of the last hidden states", "loss": "loss per scored token"}
    lines = [["weights", *(titles[name] for name in names)], ["---"] * (len(names) + 1)]
    lines += [[kind, *(f"{figures[name]:.4f}" for name in names)] for kind, figures in found["lost"].items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _prove(stage: Path, recipe: Recipe, causal: bool, device: str, judge: _Judge, quantized: Any) -> None:
    """Raises ExportError unless the folder loads as the model that was measured, to the last bit."""
    again = load_plain(recipe.model, stage, causal=causal, device=device)
    keep_gradients(again)
    for found, wanted in zip(judge.hidden(again), judge.hidden(quantized)):
        if not torch.equal(found, wanted):
            difference = float((found.float() - wanted.float()).abs().max())
            raise ExportError(
                f"the quantized model was written, and loads as another one (difference {difference:.3g})"
            )

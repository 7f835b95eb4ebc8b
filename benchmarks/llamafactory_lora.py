"""Instruction tuning with LoRA: peftkit beside LLaMA-Factory at its defaults (in its own environment).

    python benchmarks/llamafactory_lora.py --data FOLDER [--rows 48] [--repeats 3]

FOLDER holds train.jsonl and test.jsonl of instruction,input,output (Alpaca in the committed results). The work is that
of instruction_lora.py: SmolLM2-135M-Instruct, LoRA rank 16 on all linear layers, one epoch, batch 8, at most 512
tokens, bf16; LLaMA-Factory turns gradient checkpointing on by itself. The judge of instruction_lora.py scores both.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from environments import command_of, python_of
from harness import WORKERS, compare, options, shared
from instruction_lora import base_model, judge, lay_out, ours
from llamafactory import write_recipe


def main() -> None:
    """Measures and writes ``results/NAME.json``."""
    parser = options(__doc__, name="llamafactory_lora", rows=48, repeats=3)
    parser.add_argument("--judged-rows", type=int)
    parser.add_argument("--learning-rate", default="2e-4")
    args = parser.parse_args()
    rows, model = shared(args.rows, args.share, least=16), base_model()
    with tempfile.TemporaryDirectory(prefix="peftkit-bench-") as name:
        folder = Path(name)
        data, judged = lay_out(args.data, folder, rows)
        train = data / "train.jsonl"
        recipe = write_recipe(train, model, folder / "llamafactory", args.learning_rate)
        contestants = {
            "peftkit": ours(data, folder, args),
            "LLaMA-Factory": [
                python_of("llamafactory"), str(WORKERS / "llamafactory_run.py"), "--recipe", str(recipe), "--command",
                command_of("llamafactory", "llamafactory-cli"), "--data", str(train), "--model", model,
            ],
        }  # fmt: skip

        def add_held_out_loss(figures: dict[str, Any]) -> None:
            figures["held_out_loss"] = judge(sys.executable, model, judged, args.judged_rows, figures.pop("adapter"))

        what = f"SmolLM2-135M, LoRA r16 all-linear, {rows} Alpaca rows, 1 epoch, batch 8, <= 512 tokens"
        headline = "train_tokens_per_second"
        compare(args.name, what, contestants, args.repeats, headline=headline, after=add_held_out_loss)


if __name__ == "__main__":
    main()

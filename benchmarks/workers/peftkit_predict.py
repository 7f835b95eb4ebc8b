"""peftkit's predictions for a file of text,label with a finished run; prints one JSON line.

python benchmarks/workers/peftkit_predict.py --run FOLDER --data FILE.csv --reference FILE.json
"""

from __future__ import annotations

import argparse
import json
import os
import time

START = time.perf_counter()


def main() -> None:
    """Loads, predicts, and prints what was measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--reference", required=True, help="labels to agree with; written where it is missing")
    parser.add_argument("--backend", default="torch", help="own: what the folder was exported for")
    args = parser.parse_args()
    from pipeline_predict import figures, rows_of

    import peftkit

    if threads := os.environ.get("BENCH_THREADS"):
        import torch

        torch.set_num_threads(int(threads))
    texts, gold = rows_of(args.data)
    model = peftkit.load(args.run, backend=None if args.backend == "own" else args.backend)
    loaded = time.perf_counter()
    worked = time.process_time()
    found = [str(prediction.label) for prediction in model.predict(texts)]
    done, worked = time.perf_counter(), time.process_time() - worked
    if not os.path.exists(args.reference):
        with open(args.reference, "w", encoding="utf-8") as file:
            json.dump(found, file)
    with open(args.reference, encoding="utf-8") as file:
        reference = json.load(file)
    print(json.dumps(figures(found, gold, reference, loaded - START, done - loaded, worked)))


if __name__ == "__main__":
    main()

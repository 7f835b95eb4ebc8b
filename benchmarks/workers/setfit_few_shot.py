"""The peer: SetFit at its defaults on a few rows a class; prints one JSON line.

python benchmarks/workers/setfit_few_shot.py --data FOLDER --model FOLDER
"""

from __future__ import annotations

import argparse
import csv
import json
import time


def read(path: str) -> dict[str, list]:
    """Columns text and label of a file."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {"text": [row["text"] for row in rows], "label": [int(row["label"]) for row in rows]}


def main() -> None:
    """Trains, evaluates on the test rows, and prints what was measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True, help="folder with train.csv and test.csv, columns text,label")
    parser.add_argument("--model", required=True, help="folder of a sentence transformer")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from datasets import Dataset
    from setfit import SetFitModel, Trainer, TrainingArguments

    train, test = (Dataset.from_dict(read(f"{args.data}/{name}.csv")) for name in ("train", "test"))
    model = SetFitModel.from_pretrained(args.model)
    arguments = TrainingArguments(output_dir="unused", seed=args.seed, report_to="none", save_strategy="no")
    trainer = Trainer(model=model, args=arguments, train_dataset=train)
    started = time.perf_counter()
    trainer.train()
    trained = time.perf_counter()
    found = [int(label) for label in model.predict(test["text"])]
    done = time.perf_counter()
    figures = {
        "train_seconds": trained - started,
        "eval_rows_per_second": len(found) / (done - trained),
        "accuracy": sum(one == other for one, other in zip(found, test["label"], strict=True)) / len(found),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

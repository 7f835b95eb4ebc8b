"""The peer: transformers' text-classification pipeline on a base with a peft adapter; prints one JSON line.

python benchmarks/workers/pipeline_predict.py --model FOLDER --adapter FOLDER --data CSV --out FILE.json [--tuned DTYPE]
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import time

START = time.perf_counter()


def rows_of(path: str) -> tuple[list[str], list[str]]:
    """Texts and labels of a file."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [row["text"] for row in rows], [row["label"] for row in rows]


def figures(
    found: list[str], gold: list[str], reference: list[str], loading: float, predicting: float, worked: float
) -> dict:
    """What both contestants report; ``worked``: processor seconds of the predictions."""
    rows = len(gold)
    return {
        "rows_per_second": rows / predicting,
        "rows_per_cpu_second": rows / worked,
        "load_seconds": loading,
        "predict_seconds": predicting,
        "accuracy": sum(one == other for one, other in zip(found, gold, strict=True)) / rows,
        "agreement": sum(one == other for one, other in zip(found, reference, strict=True)) / rows,
    }


def main() -> None:
    """Loads, predicts, and prints what was measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True, help="where the labels go, or come from when it is there")
    parser.add_argument("--labels", required=True, help="names by id, comma-separated")
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--tuned", metavar="DTYPE", help="adapter merged, that dtype, texts by length, all threads")
    args = parser.parse_args()
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    texts, gold = rows_of(args.data)
    names = args.labels.split(",")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    kind = {"dtype": args.tuned} if args.tuned else {}
    base = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=len(names), **kind)
    model = PeftModel.from_pretrained(base, args.adapter)
    if args.tuned:
        model = model.merge_and_unload()
    model.config.id2label = dict(enumerate(names))
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, batch_size=32)
    loaded, worked = time.perf_counter(), time.process_time()
    order = sorted(range(len(texts)), key=lambda row: len(texts[row])) if args.tuned else list(range(len(texts)))
    answers = classify([texts[row] for row in order], truncation=True, max_length=args.max_length)
    by_row = dict(zip(order, answers, strict=True))
    found = [by_row[row]["label"] for row in range(len(texts))]
    done, worked = time.perf_counter(), time.process_time() - worked
    if not os.path.exists(args.out):
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump(found, file)
    with open(args.out, encoding="utf-8") as file:
        reference = json.load(file)
    print(json.dumps(figures(found, gold, reference, loaded - START, done - loaded, worked)))


if __name__ == "__main__":
    main()

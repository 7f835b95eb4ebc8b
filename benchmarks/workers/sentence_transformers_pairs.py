"""sentence-transformers' trainer with peft on scored pairs; prints one JSON line in the words of the other workers."""

from __future__ import annotations

import argparse
import csv
import json
import random
import tempfile
import time
from pathlib import Path


def read(file: Path) -> list[dict[str, str]]:
    """The rows of a table."""
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def main() -> None:
    """Trains, scores the test pairs, and prints what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from datasets import Dataset
    from peft import LoraConfig
    from scipy.stats import spearmanr
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import CoSENTLoss

    rows = read(args.data / "train.csv")
    random.Random(0).shuffle(rows)
    names = {"sentence1": "sentence1", "sentence2": "sentence2"}
    train = Dataset.from_list([
        {**{name: row[name] for name in names}, "score": float(row["score"]) / 5} for row in rows[: args.rows]
    ])  # fmt: skip
    model = SentenceTransformer(args.model, device="cpu")
    model.max_seq_length = 128
    model.add_adapter(
        LoraConfig(task_type="FEATURE_EXTRACTION", r=16, lora_alpha=32, target_modules=["query", "value"])
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder, num_train_epochs=args.epochs, per_device_train_batch_size=32, learning_rate=5e-4,
            save_strategy="no", report_to=[], use_cpu=True, seed=args.seed, warmup_steps=0.06, disable_tqdm=True,
        )  # fmt: skip
        trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=train, loss=CoSENTLoss(model))
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    test = read(args.data / "test.csv")
    first, second = (
        model.encode([row[name] for row in test], normalize_embeddings=True, show_progress_bar=False) for name in names
    )
    cosines = (first * second).sum(-1)
    print(
        json.dumps(
            {
                "train_rows_per_second": args.epochs * len(train) / seconds,
                "spearmanr": float(spearmanr([float(row["score"]) for row in test], cosines).statistic),
                "train_seconds": seconds,
            }
        )
    )


if __name__ == "__main__":
    main()

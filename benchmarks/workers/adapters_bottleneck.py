"""The peer: AdapterHub's adapters (AdapterTrainer, seq_bn) on a classification task; prints one JSON line.

python benchmarks/workers/adapters_bottleneck.py --data FOLDER --model FOLDER [--tuned] …
"""

from __future__ import annotations

import argparse
import json
import time


def arguments() -> argparse.Namespace:
    """The work to do."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True, help="folder with train.csv and test.csv, columns text,label")
    parser.add_argument("--model", required=True, help="folder of the base model")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tuned", action="store_true", help="bf16 and batches by length")
    return parser.parse_args()


def main() -> None:
    """Trains, evaluates on the test rows, and prints what was measured."""
    args = arguments()
    import adapters
    import numpy as np
    from datasets import load_dataset
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        TrainingArguments,
        set_seed,
    )

    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = load_dataset("csv", data_files={name: f"{args.data}/{name}.csv" for name in ("train", "test")})
    data = data.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=args.max_length), batched=True)
    labels = len(set(data["train"]["label"]))
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=labels)
    adapters.init(model)
    model.add_adapter("task", config="seq_bn")
    model.train_adapter("task")
    for parameter in model.classifier.parameters():
        parameter.requires_grad_(True)
    tuned = {"bf16": True, "group_by_length": True} if args.tuned else {}
    trainer = adapters.AdapterTrainer(
        model=model,
        args=TrainingArguments(
            output_dir="unused",
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=32,
            num_train_epochs=args.epochs,
            learning_rate=args.learning_rate,
            weight_decay=0.01,
            warmup_ratio=0.06,
            logging_steps=50,
            save_strategy="no",
            report_to=[],
            seed=args.seed,
            use_cpu=True,
            **tuned,
        ),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda p: {"accuracy": float((np.argmax(p.predictions, -1) == p.label_ids).mean())},
    )
    started = time.perf_counter()
    trainer.train()
    trained = time.perf_counter()
    accuracy = trainer.evaluate()["eval_accuracy"]
    done = time.perf_counter()
    figures = {
        "train_rows_per_second": len(data["train"]) * args.epochs / (trained - started),
        "eval_rows_per_second": len(data["test"]) / (done - trained),
        "accuracy": accuracy,
        "train_seconds": trained - started,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

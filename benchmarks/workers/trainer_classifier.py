"""The peer: transformers' Trainer on a classification task, with peft or a frozen backbone; prints one JSON line.

python benchmarks/workers/trainer_classifier.py --data FOLDER --model FOLDER [--tuned] …
"""

from __future__ import annotations

import argparse
import json
import resource
import time

START = time.perf_counter()


def arguments() -> argparse.Namespace:
    """The work to do, in the words all workers share."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True, help="folder with train.csv and test.csv, columns text,label")
    parser.add_argument("--model", required=True, help="folder of the base model")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--targets", default="query,value", help="comma-separated module names, or all-linear")
    parser.add_argument("--frozen", action="store_true", help="train the head alone, in place of LoRA")
    parser.add_argument("--last-layers", type=int, help="adapted blocks, from the top; all where not given")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--warmup", type=float, default=0.06)
    parser.add_argument("--label-smoothing", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tuned", action="store_true", help="bf16 and batches by length")
    return parser.parse_args()


def _last(count: int, wanted: int | None) -> list[int] | None:
    return None if wanted is None else list(range(count - wanted, count))


def main() -> None:
    """Trains, evaluates on the test rows, and prints what was measured."""
    args = arguments()
    import numpy as np
    import torch
    from datasets import load_dataset
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    files = {"train": f"{args.data}/train.csv", "test": f"{args.data}/test.csv"}
    data = load_dataset("csv", data_files=files)
    if args.rows:
        data["train"] = data["train"].select(range(args.rows))
    data = data.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=args.max_length), batched=True)
    labels = len(set(data["train"]["label"]))
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=labels)
    if args.frozen:
        model.base_model.requires_grad_(False)
    else:
        targets = args.targets if args.targets == "all-linear" else args.targets.split(",")
        lora = LoraConfig(
            task_type="SEQ_CLS", r=args.rank, lora_alpha=2 * args.rank, lora_dropout=args.dropout,
            target_modules=targets, layers_to_transform=_last(model.config.num_hidden_layers, args.last_layers),
        )  # fmt: skip
        model = get_peft_model(model, lora)
    tuned = {"bf16": True, "train_sampling_strategy": "group_by_length", "use_cpu": not torch.cuda.is_available()}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir="unused",
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=32,
            num_train_epochs=args.epochs,
            learning_rate=args.learning_rate,
            weight_decay=0.01,
            warmup_steps=args.warmup,
            label_smoothing_factor=args.label_smoothing,
            logging_steps=50,
            save_strategy="no",
            report_to=[],
            seed=args.seed,
            **(tuned if args.tuned else {}),
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
    rows = len(data["train"]) * args.epochs
    print(
        json.dumps(
            {
                "train_rows_per_second": rows / (trained - started),
                "eval_rows_per_second": len(data["test"]) / (done - trained),
                "accuracy": accuracy,
                "train_seconds": trained - started,
                "process_seconds": done - START,
                "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            }
        )
    )


if __name__ == "__main__":
    main()

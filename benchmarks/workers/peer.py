"""What the peers that train have in common: their arguments, the rows that they read, the figures that they print.

A peer may live in an environment of its own, so that nothing but the standard library is imported at the top.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from typing import Any

START = time.perf_counter()
"""Workers import this module before all else."""
TABLES = "folder with train.csv and test.csv, columns text,label"
CONVERSATIONS = "JSONL of instruction,input,output"


def arguments(
    data: str, *, learning_rate: float, batch_size: int, max_length: int, tuned: str
) -> argparse.ArgumentParser:
    """The work to do, in the words that all of them share, with their defaults.

    Args:
        data: what ``--data`` is.
        tuned: what ``--tuned`` changes.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True, help=data)
    parser.add_argument("--model", required=True, help="folder of the base model")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--learning-rate", type=float, default=learning_rate)
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--max-length", type=int, default=max_length)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tuned", action="store_true", help=tuned)
    return parser


def trainer_options(args: argparse.Namespace) -> dict[str, Any]:
    """What every Trainer is told, under the names of transformers' TrainingArguments."""
    return {
        "per_device_train_batch_size": args.batch_size,
        "num_train_epochs": args.epochs,
        "learning_rate": args.learning_rate,
        "weight_decay": 0.01,
        "save_strategy": "no",
        "report_to": [],
        "seed": args.seed,
    }


def classification_rows(
    args: argparse.Namespace, tokenizer: Any, limit: int | None = None, *, held_out: str = "test"
) -> tuple[Any, int]:
    """Tokenized training and held-out rows, and how many labels they have."""
    from datasets import load_dataset

    data = load_dataset("csv", data_files={name: f"{args.data}/{name}.csv" for name in ("train", held_out)})
    if limit:
        data["train"] = data["train"].select(range(limit))
    data = data.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=args.max_length), batched=True)
    return data, len(set(data["train"]["label"]))


def accuracy(predicted: Any) -> dict[str, float]:
    """A Trainer's ``compute_metrics``."""
    return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}


def instruction_rows(path: str, limit: int | None = None) -> list[dict[str, Any]]:
    """Rows in trl's conversational prompt-completion form, which supervises completions only."""
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    out = []
    for row in rows[:limit]:
        question = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
        out.append(
            {
                "prompt": [{"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": row["output"]}],
            }
        )
    return out


def decoder_lora(rank: int) -> Any:
    """LoRA on all linear layers of a language model, without dropout."""
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear")


def train_classifier(trainer: Any, rows: float, tested: int) -> dict[str, float]:
    """Trains and evaluates; ``rows`` over all epochs."""
    started = time.perf_counter()
    trainer.train()
    trained = time.perf_counter()
    found = trainer.evaluate()["eval_accuracy"]
    done = time.perf_counter()
    return {
        "train_rows_per_second": rows / (trained - started),
        "eval_rows_per_second": tested / (done - trained),
        "accuracy": found,
        "train_seconds": trained - started,
    }


def train_decoder(trainer: Any, tokens: float, save: Callable[[], Any]) -> dict[str, float]:
    """Trains and saves; ``tokens`` over all epochs. The loss is the mean of the logged ones."""
    started = time.perf_counter()
    trainer.train()
    trained = time.perf_counter()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    save()
    return {
        "train_tokens_per_second": tokens / (trained - started),
        "train_seconds": trained - started,
        "train_loss": sum(losses) / len(losses),
    }


def report(**figures: Any) -> None:
    """Prints the line that a worker ends with; the process's time and memory are added."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({**figures, "process_seconds": time.perf_counter() - START, "peak_rss_gb": peak}))

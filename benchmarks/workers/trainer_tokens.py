"""transformers' Trainer with peft on words and tags; prints one JSON line in the words of the other workers."""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch


def read(file: Path) -> list[tuple[list[str], list[str]]]:
    """Sentences of a CoNLL file: the first column, and the last; a line of tabs alone ends a sentence, too."""
    with file.open(encoding="utf-8") as lines:
        blocks = [list(block) for filled, block in itertools.groupby(lines, lambda line: bool(line.strip())) if filled]
    cells = [[line.rstrip("\n").split("\t") for line in block] for block in blocks]
    return [([cell[0] for cell in one], [cell[-1] for cell in one]) for one in cells]


def f1(gold: list[list[str]], predicted: list[list[str]]) -> float:
    """Micro F1 over entities."""
    try:
        from seqeval.metrics import f1_score

        return float(f1_score(gold, predicted))
    except ImportError:
        from peftkit.evaluation.entities import count, type_of

        types = sorted({type_of(tag) for tags in (*gold, *predicted) for tag in tags} - {"O"})
        return count(gold, predicted, types).metrics()["f1"]


def main() -> None:
    """Trains, scores the test rows, and prints what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForTokenClassification,
        AutoTokenizer,
        DataCollatorForTokenClassification,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    set_seed(args.seed)
    rows = {split: read(args.data / f"{split}.conll") for split in ("train", "validation", "test")}
    names = sorted({tag for tags in rows["train"] for tag in tags[1]})
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def encode(sentence: tuple[list[str], list[str]]) -> dict[str, Any]:
        encoded = tokenizer(sentence[0], is_split_into_words=True, truncation=True, max_length=128)
        labels, before = [], None
        for word in encoded.word_ids():
            labels.append(-100 if word is None or word == before else names.index(sentence[1][word]))
            before = word
        return {**encoded, "labels": labels}

    encoded = {split: [encode(one) for one in sentences] for split, sentences in rows.items()}
    model = AutoModelForTokenClassification.from_pretrained(args.model, num_labels=len(names))
    lora = LoraConfig(
        task_type="TOKEN_CLS", r=16, lora_alpha=32, lora_dropout=0.1, target_modules=["query", "key", "value", "dense"]
    )

    def score(result: Any) -> dict[str, float]:
        gold, predicted = [], []
        for logits, labels in zip(result.predictions, result.label_ids):
            gold.append([names[tag] for tag in labels if tag >= 0])
            predicted.append([names[tag] for tag, label in zip(np.argmax(logits, -1), labels) if label >= 0])
        return {"f1": f1(gold, predicted)}

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, num_train_epochs=args.epochs, per_device_train_batch_size=16, learning_rate=1e-3,
            per_device_eval_batch_size=32, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
            metric_for_best_model="f1", report_to=[], use_cpu=not torch.cuda.is_available(), seed=args.seed,
            warmup_steps=0.06,
        )  # fmt: skip
        trainer = Trainer(
            model=get_peft_model(model, lora), args=arguments, train_dataset=encoded["train"],
            eval_dataset=encoded["validation"], compute_metrics=score,
            data_collator=DataCollatorForTokenClassification(tokenizer),
        )  # fmt: skip
        started, evaluating = time.perf_counter(), 0.0
        evaluate = trainer.evaluate

        def timed(*given: Any, **options: Any) -> Any:
            nonlocal evaluating
            begun = time.perf_counter()
            found = evaluate(*given, **options)
            evaluating += time.perf_counter() - begun
            return found

        trainer.evaluate = timed  # type: ignore[method-assign]
        trainer.train()
        seconds = time.perf_counter() - started - evaluating
        test = trainer.predict(encoded["test"]).metrics
    print(
        json.dumps(
            {
                "train_rows_per_second": args.epochs * len(rows["train"]) / seconds,
                "f1": test["test_f1"],
                "train_seconds": seconds,
            }
        )
    )


if __name__ == "__main__":
    main()

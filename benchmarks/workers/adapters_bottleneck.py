"""The peer: AdapterHub's adapters (AdapterTrainer, seq_bn) on a classification task; prints one JSON line.

python benchmarks/workers/adapters_bottleneck.py --data FOLDER --model FOLDER [--tuned] …
"""

from __future__ import annotations

import peer


def main() -> None:
    """Trains, evaluates on the test rows, and prints what was measured."""
    args = peer.arguments(
        peer.TABLES, learning_rate=1e-3, batch_size=16, max_length=128, tuned="bf16 and batches by length"
    ).parse_args()
    import adapters
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        TrainingArguments,
        set_seed,
    )

    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data, labels = peer.classification_rows(args, tokenizer)
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
            per_device_eval_batch_size=32,
            warmup_ratio=0.06,
            logging_steps=50,
            use_cpu=True,
            **peer.trainer_options(args),
            **tuned,
        ),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=peer.accuracy,
    )
    figures = peer.train_classifier(trainer, len(data["train"]) * args.epochs, len(data["test"]))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    peer.report(**figures, trained_parameters=trained)


if __name__ == "__main__":
    main()

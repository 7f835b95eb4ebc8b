"""The peer: transformers' Trainer on a classification task, with peft or a frozen backbone; prints one JSON line.

python benchmarks/workers/trainer_classifier.py --data FOLDER --model FOLDER [--tuned] …
"""

from __future__ import annotations

import argparse

import peer
from curve import Curve


def arguments() -> argparse.Namespace:
    """The work to do."""
    parser = peer.arguments(
        peer.TABLES, learning_rate=1e-3, batch_size=16, max_length=128, tuned="bf16 and batches by length"
    )
    parser.add_argument("--rows", type=int)
    parser.add_argument("--targets", default="query,value", help="comma-separated module names, or all-linear")
    parser.add_argument("--frozen", action="store_true", help="train the head alone, in place of LoRA")
    parser.add_argument("--last-layers", type=int, help="adapted blocks, from the top; all where not given")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--warmup", type=float, default=0.06)
    parser.add_argument("--label-smoothing", type=float, default=0.0)
    parser.add_argument("--evaluate-every", type=int, help="steps between validations, which are printed as a curve")
    return parser.parse_args()


def adapted(model, args: argparse.Namespace):
    """The model with its backbone frozen, or with LoRA on it."""
    if args.frozen:
        model.base_model.requires_grad_(False)
        return model
    from peft import LoraConfig, get_peft_model

    layers = model.config.num_hidden_layers
    lora = LoraConfig(
        task_type="SEQ_CLS", r=args.rank, lora_alpha=2 * args.rank, lora_dropout=args.dropout,
        target_modules=args.targets if args.targets == "all-linear" else args.targets.split(","),
        layers_to_transform=None if args.last_layers is None else list(range(layers - args.last_layers, layers)),
    )  # fmt: skip
    return get_peft_model(model, lora)


def main() -> None:
    """Trains, evaluates on the test rows, and prints what was measured."""
    args = arguments()
    import torch
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
    held_out = "validation" if args.evaluate_every else "test"
    data, labels = peer.classification_rows(args, tokenizer, args.rows, held_out=held_out)
    model = adapted(AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=labels), args)
    tuned = {"bf16": True, "train_sampling_strategy": "group_by_length", "use_cpu": not torch.cuda.is_available()}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir="unused",
            per_device_eval_batch_size=32,
            warmup_steps=args.warmup,
            label_smoothing_factor=args.label_smoothing,
            logging_steps=50,
            **peer.trainer_options(args),
            **(tuned if args.tuned else {}),
            **({"eval_strategy": "steps", "eval_steps": args.evaluate_every} if args.evaluate_every else {}),
        ),
        train_dataset=data["train"],
        eval_dataset=data[held_out],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=peer.accuracy,
    )
    curve = Curve()
    if args.evaluate_every:
        evaluate = curve.timed(trainer.evaluate)

        def evaluated(*arguments, **options):
            found = evaluate(*arguments, **options)
            curve.add(trainer.state.global_step, found["eval_accuracy"])
            return found

        trainer.evaluate = evaluated
    figures = peer.train_classifier(trainer, len(data["train"]) * args.epochs, len(data[held_out]))
    peer.report(**figures, **({"curve": curve.points} if curve.points else {}))


if __name__ == "__main__":
    main()

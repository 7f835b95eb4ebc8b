"""The peer: peft's ``prepare_model_for_kbit_training`` and transformers' Trainer; prints one JSON line.

python benchmarks/workers/kbit_trainer.py --data FILE.jsonl --out FOLDER --model FOLDER [--tuned] …

The base in NF4 with double quantization, computing in bf16 (QLoRA's settings); answers alone are scored. --tuned takes
batches by length and no gradient checkpointing, which ``prepare_model_for_kbit_training`` turns on by itself.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

from held_out_loss import answer_tokens, nf4
from trl_sft import rows_of

START = time.perf_counter()


def arguments() -> argparse.Namespace:
    """The work to do."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True, help="JSONL of instruction,input,output")
    parser.add_argument("--out", required=True, help="folder for the adapter")
    parser.add_argument("--model", required=True)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tuned", action="store_true", help="no checkpointing, batches by length")
    return parser.parse_args()


def encoded(path: str, tokenizer, max_length: int) -> list[dict[str, list[int]]]:
    """Rows as tokens, with labels on the answer up to and including the stop token."""
    out = []
    for row in rows_of(path, None):
        tokens, start = answer_tokens(tokenizer, row, max_length)
        out.append({"input_ids": tokens, "labels": [-100] * start + tokens[start:]})
    return out


def main() -> None:
    """Trains, and prints what was measured."""
    args = arguments()
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=nf4(), dtype="bfloat16")
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=not args.tuned)
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=args.rank, lora_alpha=2 * args.rank, lora_dropout=0.0, target_modules="all-linear"
    )
    model = get_peft_model(model, lora)
    model.config.use_cache = False
    rows = encoded(args.data, tokenizer, args.max_length)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.out,
            per_device_train_batch_size=args.batch_size,
            num_train_epochs=1,
            learning_rate=args.learning_rate,
            weight_decay=0.01,
            warmup_steps=0.06,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            seed=args.seed,
            bf16=True,
            use_cpu=True,
            gradient_checkpointing=not args.tuned,
            **({"train_sampling_strategy": "group_by_length"} if args.tuned else {}),
        ),
        train_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
    )
    tokens = sum(len(row["input_ids"]) for row in rows)
    started = time.perf_counter()
    trainer.train()
    trained = time.perf_counter()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    model.save_pretrained(args.out)
    figures = {
        "train_tokens_per_second": tokens / (trained - started),
        "train_seconds": trained - started,
        "train_loss": sum(losses) / len(losses),
        "process_seconds": time.perf_counter() - START,
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    print(json.dumps({**figures, "adapter": args.out}))


if __name__ == "__main__":
    main()

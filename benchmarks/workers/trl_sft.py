"""The peer: trl's SFTTrainer with peft on instruction rows; prints one JSON line.

python benchmarks/workers/trl_sft.py --data FILE.jsonl --out FOLDER --model FOLDER [--tuned] …
"""

from __future__ import annotations

import argparse
import json
import resource
import time

START = time.perf_counter()


def arguments() -> argparse.Namespace:
    """The work to do."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True, help="JSONL of instruction,input,output")
    parser.add_argument("--out", required=True, help="folder for the adapter")
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tuned", action="store_true", help="no checkpointing, batches by length")
    return parser.parse_args()


def rows_of(path: str, limit: int | None) -> list[dict]:
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


def main() -> None:
    """Trains, evaluates, and prints what was measured."""
    args = arguments()
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="bfloat16")
    train = Dataset.from_list(rows_of(args.data, args.rows))
    tuned = {"gradient_checkpointing": False, "train_sampling_strategy": "group_by_length"} if args.tuned else {}
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=train,
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=args.rank, lora_alpha=2 * args.rank, lora_dropout=0.0, target_modules="all-linear"
        ),
        args=SFTConfig(
            output_dir=args.out,
            per_device_train_batch_size=args.batch_size,
            num_train_epochs=args.epochs,
            learning_rate=args.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=0.06,
            weight_decay=0.01,
            max_length=args.max_length,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            seed=args.seed,
            use_cpu=True,
            **tuned,
        ),
    )
    tokens = sum(len(row) for row in trainer.train_dataset["input_ids"]) * args.epochs
    started = time.perf_counter()
    trainer.train()
    trained = time.perf_counter()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trainer.save_model(args.out)
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

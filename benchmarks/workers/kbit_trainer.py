"""The peer: peft's ``prepare_model_for_kbit_training`` and transformers' Trainer; prints one JSON line.

python benchmarks/workers/kbit_trainer.py --data FILE.jsonl --out FOLDER --model FOLDER [--tuned] …

The base in NF4 with double quantization, computing in bf16 (QLoRA's settings); answers alone are scored. --tuned takes
batches by length and no gradient checkpointing, which ``prepare_model_for_kbit_training`` turns on by itself.
"""

from __future__ import annotations

import peer
from held_out_loss import answer_tokens, nf4


def encoded(path: str, tokenizer, max_length: int) -> list[dict[str, list[int]]]:
    """Rows as tokens, with labels on the answer up to and including the stop token."""
    out = []
    for row in peer.instruction_rows(path):
        tokens, start = answer_tokens(tokenizer, row, max_length)
        out.append({"input_ids": tokens, "labels": [-100] * start + tokens[start:]})
    return out


def main() -> None:
    """Trains, and prints what was measured."""
    parser = peer.arguments(
        peer.CONVERSATIONS, learning_rate=2e-4, batch_size=8, max_length=512, tuned="no checkpointing, by length"
    )
    parser.add_argument("--out", required=True, help="folder for the adapter")
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    from datasets import Dataset
    from peft import get_peft_model, prepare_model_for_kbit_training
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
    model = get_peft_model(model, peer.decoder_lora(args.rank))
    model.config.use_cache = False
    rows = encoded(args.data, tokenizer, args.max_length)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.out,
            warmup_steps=0.06,
            logging_steps=1,
            bf16=True,
            use_cpu=True,
            gradient_checkpointing=not args.tuned,
            **peer.trainer_options(args),
            **({"train_sampling_strategy": "group_by_length"} if args.tuned else {}),
        ),
        train_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
    )
    tokens = sum(len(row["input_ids"]) for row in rows) * args.epochs
    figures = peer.train_decoder(trainer, tokens, lambda: model.save_pretrained(args.out))
    peer.report(**figures, adapter=args.out)


if __name__ == "__main__":
    main()

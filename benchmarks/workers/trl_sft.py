"""The peer: trl's SFTTrainer with peft on instruction rows; prints one JSON line.

python benchmarks/workers/trl_sft.py --data FILE.jsonl --out FOLDER --model FOLDER [--tuned] …
"""

from __future__ import annotations

import peer


def main() -> None:
    """Trains, and prints what was measured."""
    parser = peer.arguments(
        peer.CONVERSATIONS, learning_rate=2e-4, batch_size=8, max_length=512, tuned="no checkpointing, by length"
    )
    parser.add_argument("--out", required=True, help="folder for the adapter")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tuned = {"gradient_checkpointing": False, "train_sampling_strategy": "group_by_length"} if args.tuned else {}
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model, dtype="bfloat16"),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        train_dataset=Dataset.from_list(peer.instruction_rows(args.data, args.rows)),
        peft_config=peer.decoder_lora(args.rank),
        args=SFTConfig(
            output_dir=args.out,
            lr_scheduler_type="linear",
            warmup_steps=0.06,
            max_length=args.max_length,
            logging_steps=1,
            use_cpu=True,
            **peer.trainer_options(args),
            **tuned,
        ),
    )
    tokens = sum(len(row) for row in trainer.train_dataset["input_ids"]) * args.epochs
    figures = peer.train_decoder(trainer, tokens, lambda: trainer.save_model(args.out))
    peer.report(**figures, adapter=args.out)


if __name__ == "__main__":
    main()

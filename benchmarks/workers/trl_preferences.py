"""The peer: trl's DPOTrainer or KTOTrainer with peft on tokenized rows; prints one JSON line.

python benchmarks/workers/trl_preferences.py --data ROWS.json --model FOLDER --out FOLDER [--kto] [--tuned] …

ROWS.json is a list of prompt_ids, chosen_ids and rejected_ids, or of prompt_ids, completion_ids and label: the tokens
that peftkit made, so that both learn from the same. ``--adapter`` starts from a stored one, ``--steps`` prints losses
and rewards of the first steps in fp32 besides.
"""

from __future__ import annotations

import json

import peer


def main() -> None:
    """Trains, and prints what was measured."""
    parser = peer.arguments(
        "JSON of tokenized rows", learning_rate=5e-5, batch_size=8, max_length=512,
        tuned="fp32, no checkpointing, by length, reference computed beforehand",
    )  # fmt: skip
    parser.add_argument("--out", required=True, help="folder for the adapter")
    parser.add_argument("--kto", action="store_true")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--adapter", help="folder of the adapter to start from")
    parser.add_argument("--steps", type=int, help="compare the first steps only, in fp32 and in the rows' order")
    args = parser.parse_args()
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

    trainer_class, config_class = (KTOTrainer, KTOConfig) if args.kto else (DPOTrainer, DPOConfig)

    class Tokenized(trainer_class):
        """The trainer on rows that are tokenized already."""

        def _prepare_dataset(self, dataset, *_, **__):
            if not args.kto:
                return dataset

            def rotate(rows):
                return {"KL_completion_ids": [rows["completion_ids"][-1], *rows["completion_ids"][:-1]]}

            return dataset.map(rotate, batched=True, batch_size=args.batch_size)

    with open(args.data, encoding="utf-8") as file:
        rows = json.load(file)
    fp32 = args.tuned or args.steps
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32" if fp32 else "bfloat16")
    if args.adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, args.adapter, is_trainable=True)
    options = {"gradient_checkpointing": False, "bf16": False} if fp32 else {}
    if args.tuned:
        options |= {"precompute_ref_log_probs": True}
    if args.steps:
        options |= {"max_steps": args.steps, "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential"}
    elif args.tuned and not args.kto:  # trl's KTO needs its rows in order
        options |= {"train_sampling_strategy": "group_by_length"}
        for row in rows:  # the sampler reads this column
            row["length"] = 2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
    trainer = Tokenized(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(args.model),
        train_dataset=Dataset.from_list(rows),
        peft_config=None if args.adapter else peer.decoder_lora(args.rank),
        args=config_class(
            output_dir=args.out,
            beta=args.beta,
            max_length=args.max_length,
            logging_steps=1,
            use_cpu=True,
            **{"lr_scheduler_type": "linear", **peer.trainer_options(args), **options},
        ),
    )
    answers = ("completion_ids",) if args.kto else ("chosen_ids", "rejected_ids")
    tokens = sum(len(row["prompt_ids"]) + len(row[name]) for row in rows for name in answers) * args.epochs
    figures = peer.train_decoder(trainer, tokens, lambda: trainer.save_model(args.out))
    names = ("loss", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "kl")
    log = [{name: entry[name] for name in names if name in entry} for entry in trainer.state.log_history]
    peer.report(
        **figures, adapter=args.out, **({"log": [entry for entry in log if "loss" in entry]} if args.steps else {})
    )


if __name__ == "__main__":
    main()

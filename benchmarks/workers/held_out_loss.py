"""The judge: mean loss per answer token of a plain peft adapter on instruction rows; prints one JSON line.

python benchmarks/workers/held_out_loss.py --data FILE.jsonl --model FOLDER [--adapter FOLDER] [--rows N] [--nf4]

Uses transformers and peft alone, one row at a time, so that no trainer's batching or weighting enters: the answer's
tokens up to and including the stop token are what follows the prompt in the rendered chat template.
"""

from __future__ import annotations

import argparse
import json

import torch
from peer import instruction_rows


def answer_tokens(tokenizer, row: dict, max_length: int) -> tuple[list[int], int]:
    """A row's tokens through the stop token, and where the answer starts."""
    conversation = [*row["prompt"], *row["completion"]]
    options = {"tokenize": True, "return_dict": True}
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, **options)["input_ids"]
    tokens = tokenizer.apply_chat_template(conversation, **options)["input_ids"]
    assert tokens[: len(prompt)] == prompt
    end = len(tokens) - tokens[::-1].index(tokenizer.eos_token_id)
    return tokens[: min(end, max_length)], len(prompt)


def nf4():
    """QLoRA's way to hold a base (arXiv:2305.14314)."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip


def main() -> None:
    """Scores the rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--nf4", action="store_true", help="hold the base in NF4 with double quantization")
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    held = {"quantization_config": nf4()} if args.nf4 else {}
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="bfloat16", **held)
    if args.adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, args.adapter)
    model.eval()
    loss, count = 0.0, 0
    with torch.inference_mode():
        for row in instruction_rows(args.data, args.rows):
            tokens, start = answer_tokens(tokenizer, row, args.max_length)
            if start >= len(tokens):
                continue
            logits = model(torch.tensor([tokens])).logits[0, start - 1 : -1].float()
            loss += float(torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[start:]), reduction="sum"))
            count += len(tokens) - start
    print(json.dumps({"held_out_loss": loss / count, "answer_tokens": count}))


if __name__ == "__main__":
    main()

"""A plain script: transformers, peft and a loop by hand, as few lines as one writes; says ``step 1`` after its first.

python benchmarks/workers/plain_sft.py --data FILE.jsonl --model FOLDER
"""

from __future__ import annotations

import argparse

import torch
from peer import instruction_rows
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Two steps of batch 8, answers supervised."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-4)
    rows = instruction_rows(args.data)
    for step in range(2):
        texts, labels = [], []
        for row in rows[step * args.batch_size : (step + 1) * args.batch_size]:
            options = {"tokenize": True, "return_dict": True}
            prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, **options)["input_ids"]
            tokens = tokenizer.apply_chat_template(row["prompt"] + row["completion"], **options)["input_ids"]
            texts.append(tokens[: args.max_length])
            labels.append([-100] * len(prompt) + tokens[len(prompt) : args.max_length])
        width = max(map(len, texts))
        padded = torch.tensor([text + [tokenizer.pad_token_id] * (width - len(text)) for text in texts])
        wanted = torch.tensor([label + [-100] * (width - len(label)) for label in labels])
        mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
        loss = model(input_ids=padded, attention_mask=mask, labels=wanted).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1} loss {float(loss.detach()):.4f}", flush=True)


if __name__ == "__main__":
    main()

"""Memory that a language model's loss takes, forward and backward, beyond the model; prints one JSON line.

python benchmarks/workers/loss_memory.py --tokens 512 --vocabulary 49152 [--plain]

A model of one narrow block with random weights, so that the logits are what is wide; frozen but for one layer.
``--plain`` takes transformers' own loss over whole logits.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch


def resident(what: str) -> int:
    """kB of this process's memory: now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))


def main() -> None:
    """Forms the loss and its gradient and tells by how much the resident set's peak grew."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--vocabulary", type=int, required=True)
    parser.add_argument("--plain", action="store_true")
    args = parser.parse_args()
    from transformers import LlamaConfig, LlamaForCausalLM

    from peftkit.models.kernels import linear_cross_entropy

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=args.vocabulary, tie_word_embeddings=True, **shape))
    model.requires_grad_(False)
    model.model.layers[0].mlp.up_proj.requires_grad_(True)
    ids = torch.randint(0, args.vocabulary, (1, args.tokens))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    linear_cross_entropy.loss(
        model, {name: value[:, :8] for name, value in batch.items()}
    ).backward()  # loads what is loaded late
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark starts anew
    before = resident("VmRSS")
    started = time.perf_counter()
    loss = model(**batch).loss if args.plain else linear_cross_entropy.loss(model, batch)
    loss.backward()
    seconds = time.perf_counter() - started
    print(json.dumps({"loss_memory_mb": (resident("VmHWM") - before) / 1024, "seconds": seconds}))


if __name__ == "__main__":
    main()

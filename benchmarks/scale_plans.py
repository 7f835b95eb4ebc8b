"""What the planner counts of large models without their weights: the numbers that ``scale.py`` starts from.

    python benchmarks/scale_plans.py [--only WORK]

Llama-3.1-8B and 70B by config alone; LoRA of rank 16 on all linear layers over bf16 and NF4, and full finetuning in
fp32; one row of 2,048 tokens, all but the first scored, activations recomputed. Writes results/scale_plans.json: bytes
by part, bytes of a block and of what is outside the blocks, FLOPs. No GPU is needed, and no download.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from harness import RESULTS

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
from shapes import SHAPES

from peftkit.models.blocks import find_blocks
from peftkit.models.meta_model import build_meta_model
from peftkit.planning.memory import persistent_memory
from peftkit.planning.trace import fake_tensor_mode
from peftkit.planning.traced_model import Shape, TracedModel
from peftkit.schema.head import head_of
from peftkit.schema.recipe import Recipe
from peftkit.schema.types import TaskInfo

OUT = RESULTS / "scale_plans.json"
TOKENS = 2048
MODELS: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": SHAPES["llama-3.1-8b"],
    "Llama-3.1-70B": {
        **SHAPES["llama-3.1-8b"], "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}  # fmt: skip
LORA = {"kind": "lora", "rank": 16, "target_modules": "all-linear"}
WORK: dict[str, dict[str, Any]] = {
    "LoRA, bf16": {"method": LORA},
    "LoRA, NF4": {"method": LORA, "quantization": {"kind": "nf4", "double": True}},
    "full, fp32": {"method": {"kind": "full"}},
}
TOKENIZER = SimpleNamespace(pad_token_id=0, get_vocab=lambda: {"a": 0})


def main() -> None:
    """Plans every model and kind of work, or those named, and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*WORK], help="plan this kind of work anew, and keep the others")
    only = parser.parse_args().only
    known = json.loads(OUT.read_text())["plans"] if only else {}
    plans = {
        model: {work: planned(model, work) if only in (None, work) else known[model][work] for work in WORK}
        for model in MODELS
    }
    OUT.write_text(json.dumps({"tokens": TOKENS, "plans": plans}, indent=1) + "\n")


def planned(model: str, work: str) -> dict[str, int]:
    """Bytes and FLOPs of one row on one GPU."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODELS[model]))
        values = {
            "name": "scale", "model": {"source": folder}, "data": {"source": "none.jsonl", "max_length": TOKENS},
            "task": "instruction", "training": {"gradient_checkpointing": "full"}, **WORK[work],
        }  # fmt: skip
        recipe, info = Recipe.parse(values), TaskInfo("causal_lm")
        with fake_tensor_mode():
            loaded = build_meta_model(recipe, info, TOKENIZER, torch.bfloat16, gpu=True)
            traced = TracedModel(loaded, head_of(info, recipe.task), torch.bfloat16, True)
            persistent = persistent_memory(loaded.model, recipe.training.optimizer)
            blocks = find_blocks(loaded.model)[1]
            sizes = {
                name: sum(p.nbytes for p in loaded.model.parameters() if p.requires_grad == trained)
                for name, trained in (("frozen", False), ("trained", True))
            }
            of_blocks = [sum(p.nbytes for p in block.parameters()) for block in blocks]
            trace = traced.train(Shape(1, TOKENS, TOKENS - 1))
            # the largest moment of full finetuning is the loss, before there are gradients: copies of weights in bf16
            gradients = 0 if recipe.method.saves == "model" else min(persistent.trained, trace.end)
    return {
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "trained_parameters": persistent.trained // 4, "frozen": persistent.frozen, "constants": persistent.constants,
        "trained": persistent.trained, "states": persistent.states, "block": max(of_blocks),
        "outside_blocks": sum(sizes.values()) - sum(of_blocks),
        "activations": trace.peak - gradients, "flops": trace.flops,
    }  # fmt: skip


if __name__ == "__main__":
    main()

"""LLaMA-Factory's files for the work of the instruction benchmarks: its data registry and its recipe.

Its template ``chatml`` with SmolLM2's own system prompt gives the tokens of SmolLM2's chat template.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def write_recipe(train: Path, model: str, folder: Path, learning_rate: str = "2e-4", **changes: Any) -> Path:
    """Writes ``recipe.yaml`` under ``folder`` and returns it; the adapter goes to ``folder/adapter``.

    Args:
        train: JSONL of instruction, input, output.
        changes: further arguments of LLaMA-Factory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    columns = {"prompt": "instruction", "query": "input", "response": "output"}
    info = {"rows": {"file_name": str(train.resolve()), "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    recipe = {
        "model_name_or_path": model, "stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_rank": 16,
        "lora_alpha": 32, "lora_target": "all", "dataset": "rows", "dataset_dir": str(folder), "template": "chatml",
        "default_system": SYSTEM, "cutoff_len": 512, "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1, "learning_rate": float(learning_rate), "num_train_epochs": 1.0,
        "lr_scheduler_type": "linear", "warmup_steps": 0.06, "weight_decay": 0.01, "bf16": True, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "output_dir": str(folder / "adapter"), "overwrite_output_dir": True,
        "use_cpu": True, **changes,
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe, indent=1), encoding="utf-8")  # JSON is YAML
    return path

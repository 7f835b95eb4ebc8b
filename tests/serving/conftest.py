"""Runs that several files of tests serve."""

from __future__ import annotations

import json

import pytest

import peftkit
from peftkit import Recipe
from tests import tiny


def trained(llama, folder, seed, steps=15, **method):
    """A run of instruction tuning."""
    rows = [{"instruction": f"Say {word}.", "output": f"the {word} is good"} for word in tiny.WORDS[:40]]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return peftkit.train(Recipe.parse({
        "name": "chat", "model": {"source": str(llama), "dtype": "float32"}, "task": {"kind": "instruction"},
        "data": {"source": str(folder / "rows.jsonl"), "max_length": 64},
        "method": {"kind": "lora", "rank": 4, "alpha": 64, **method},
        "training": {"epochs": 3, "max_steps": steps, "batch_size": 8, "learning_rate": 0.02, "threads": 1,
                     "seed": seed},
        "evaluation": {"generation": {"samples": 0}}, "export": {"prove": False}, "tracking": [],
        "output_dir": str(folder / "runs"),
    }), quiet=True).path  # fmt: skip


@pytest.fixture(scope="session")
def language(llama, tmp_path_factory):
    """Three LoRA runs on one base, the last of another rank."""
    folder = tmp_path_factory.mktemp("language")
    return [trained(llama, folder, 0), trained(llama, folder, 1), trained(llama, folder, 2, steps=2, rank=6)]


@pytest.fixture(scope="session")
def variants(llama, tmp_path_factory):
    """Two DoRA runs on one base."""
    folder = tmp_path_factory.mktemp("variants")
    return [trained(llama, folder, seed, steps=1, use_dora=True) for seed in (0, 1)]

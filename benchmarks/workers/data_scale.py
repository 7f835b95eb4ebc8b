"""One run's way from a CSV file to its first steps; prints seconds and peak memory after every stage as one JSON line.

    python benchmarks/workers/data_scale.py FOLDER     # train.csv, validation.csv, test.csv; model/ is a base model

Memory is the process's own (anonymous pages) and that of mapped files, which the system takes back when it needs it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftkit.schema.recipe import Recipe

FIELDS = {"RssAnon": "anonymous_mb", "RssFile": "mapped_mb", "VmRSS": "rss_mb"}
STEPS = 20


def main() -> None:
    """Measures, stage by stage; peaks are those since the imports."""
    folder = Path(sys.argv[1])
    with tempfile.TemporaryDirectory(prefix="peftkit-scale-") as work:
        os.environ["PEFTKIT_CACHE"] = f"{work}/cache"
        watch = Watch()
        stages = {"imports": watch.stage(_imports)}
        _calibrate()
        watch.forget()
        recipe, tokenizer = _recipe(folder, work)
        from peftkit.data.pipeline import encode, prepare

        held: list[Any] = []
        stages["prepare"] = watch.stage(lambda: held.append(prepare(recipe)))
        stages["tokenize"] = watch.stage(lambda: held.append(encode(held[0], tokenizer, recipe)))
        rows = len(held[1].splits["train"].lengths)
        disk = sum(file.stat().st_size for file in Path(work, "cache").rglob("*") if file.is_file())
        held.clear()
        stages["first steps"] = watch.stage(lambda: _train(recipe))
    print(json.dumps({"rows": rows, "cache_mb": round(disk / 1e6, 1), "stages": stages}))


def _imports() -> None:
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    import peftkit.run  # noqa: F401

    torch.set_num_threads(1)


def _calibrate() -> None:
    """The machine's rate, once for a machine, takes 48 MB: not these rows' doing."""
    import torch

    from peftkit.training.flops import matmul_rate

    matmul_rate("cpu", torch.float32)


def _recipe(folder: Path, work: str) -> tuple[Recipe, Any]:
    from peftkit.models.tokenizer import load_tokenizer
    from peftkit.schema.recipe import Recipe

    recipe = Recipe.parse(
        {
            "name": "scale", "model": {"source": str(folder / "model"), "dtype": "float32"},
            "data": {"source": str(folder), "max_length": 64}, "method": {"kind": "lora", "rank": 2},
            "training": {"max_steps": STEPS, "batch_size": 16, "threads": 1, "evaluate_every": STEPS},
            "evaluation": {"baselines": [], "metrics": ["accuracy"]}, "export": {"prove": False},
            "tracking": [], "output_dir": f"{work}/runs",
        }
    )  # fmt: skip
    return recipe, load_tokenizer(recipe.model)


def _train(recipe: Recipe) -> None:
    import peftkit

    peftkit.train(recipe, quiet=True)


class Watch:
    """Looks at this process's memory every few milliseconds."""

    def __init__(self) -> None:
        self.forget()
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            for name, value in _memory().items():
                self.peaks[name] = max(self.peaks[name], value)
            time.sleep(0.005)

    def forget(self) -> None:
        """Peaks start anew."""
        self.peaks = dict.fromkeys(FIELDS.values(), 0.0)

    def stage(self, work: Callable[[], Any]) -> dict[str, float]:
        """Seconds of some work by the clock and on the processor, and the largest memory until its end, MB."""
        started, used = time.perf_counter(), time.process_time()
        work()
        seconds, processor = time.perf_counter() - started, time.process_time() - used
        return {
            "seconds": round(seconds, 2),
            "processor_seconds": round(processor, 2),
            **{name: round(value, 1) for name, value in self.peaks.items()},
        }


def _memory() -> dict[str, float]:
    held = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in FIELDS:
            held[FIELDS[name]] = int(value.split()[0]) / 1024
    return held


if __name__ == "__main__":
    main()

"""The small end of docs/scale.md, measured: rows through the data pipeline, and bytes that processes send.

    python benchmarks/scale_checks.py [--rows 20000] [--processes 1 2 4]

Rows are those of ``data_scale.py``, each number of them in a process of its own: memory, processor seconds, bytes of
the caches. The batch plan is made for ten times as many lengths. Processes are started by torchrun here and send
through the loopback (``workers/scale_processes.py``). Writes results/scale_checks.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import data_scale
import numpy as np
import processes
from harness import ENVIRONMENT, RESULTS, WORKERS, machine

from tests import tiny

OUT = RESULTS / "scale_checks.json"
SIZES = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}


def main() -> None:
    """Measures what is asked for; the rest stays as the last time left it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[20_000])
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2, 4])
    args = parser.parse_args()
    content: dict[str, Any] = json.loads(OUT.read_text()) if OUT.is_file() else {}
    content |= {"machine": machine()}
    with tempfile.TemporaryDirectory(prefix="peftkit-bench-") as name:
        for rows in args.rows:
            data_scale.lay_out(Path(name) / str(rows), rows)
            content.setdefault("rows", {})[str(rows)] = data_scale.measured(Path(name) / str(rows))
            content.setdefault("batch plan", {})[str(rows * 10)] = batch_plan(rows * 10)
            OUT.write_text(json.dumps(content, indent=1) + "\n")
        folder = Path(name) / "processes"
        if args.processes:
            data_scale.lay_out(folder, 400)
            tiny.tiny_bert(folder / "model", **SIZES)
        for count in args.processes:
            content.setdefault("processes", {})[str(count)] = launched(folder, count)
            OUT.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content, indent=1))


def batch_plan(rows: int) -> dict[str, float]:
    """Seconds and megabytes of one epoch's batches."""
    from peftkit.data.batching import epoch_batches
    from peftkit.schema.recipe import TrainingConfig

    lengths = np.random.default_rng(0).integers(8, 128, rows).astype(np.int32)
    started = time.process_time()
    batches = epoch_batches(lengths, TrainingConfig(), 0)
    seconds = time.process_time() - started
    assert sum(map(len, batches)) == rows
    del batches
    tracemalloc.start()  # which makes it slower
    epoch_batches(lengths, TrainingConfig(), 0)
    size = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {"seconds": round(seconds, 2), "peak_mb": round(size / 1e6, 1)}


def launched(folder: Path, count: int) -> dict[str, Any]:
    """The figures of so many processes."""
    command = [
        str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node", str(count),
        str(WORKERS / "scale_processes.py"), str(folder),
    ]  # fmt: skip
    done = processes.run(command, {**ENVIRONMENT, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"})
    if done.code:
        sys.exit(f"{count} processes failed ({done.code}):\n{done.errors[-3000:]}")
    return dict(json.loads(done.output.strip().splitlines()[-1]))


if __name__ == "__main__":
    main()

"""The process of one job: ``python -m peftkit.experiments.worker FOLDER final|trial``; see ``jobs``.

Everything printed goes to ``log.txt``. The original standard output carries one JSON line per validation, which the
parent answers on standard input with ``go`` or ``end``; end of file means: write a checkpoint and exit.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from peftkit.experiments import jobs


def main() -> None:
    """Runs the job."""
    folder, final = Path(sys.argv[1]), sys.argv[2] == "final"
    messages = _redirect_output(folder / jobs.LOG)
    answers: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(answers,), daemon=True).start()

    def on_validation(step: int, metrics: Mapping[str, float]) -> bool:
        print(json.dumps({"step": step, "metrics": dict(metrics)}), file=messages, flush=True)
        return answers.get() != "end"

    jobs.run_job(folder, final=final, on_validation=on_validation)


def _redirect_output(log: Path) -> IO[str]:
    """The original standard output for our messages; everything else printed goes to the log."""
    stdout = os.dup(1)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    return os.fdopen(stdout, "w")


def _listen(answers: queue.SimpleQueue[str]) -> None:
    """Reads without Python's buffers, whose lock a blocked thread would still hold at exit."""
    rest = b""
    while piece := os.read(0, 4096):
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            answers.put(line.decode())
    os.kill(os.getpid(), signal.SIGTERM)
    answers.put("go")


if __name__ == "__main__":
    main()

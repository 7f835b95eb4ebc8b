"""The process of one job: ``python -m peftkit.experiments.worker FOLDER final|trial``; see ``jobs``.

Everything that is printed goes to ``log.txt``; the real standard output carries one JSON line a validation, each
answered on standard input by ``go`` or ``end``. The end of standard input asks for a checkpoint and an end.
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
    """Carries the job out."""
    folder, final = Path(sys.argv[1]), sys.argv[2] == "final"
    talk = _keep_stdout(folder / jobs.LOG)
    answers: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(answers,), daemon=True).start()

    def on_validation(step: int, figures: Mapping[str, float]) -> bool:
        print(json.dumps({"step": step, "figures": dict(figures)}), file=talk, flush=True)
        return answers.get() != "end"

    jobs.run_job(folder, final=final, on_validation=on_validation)


def _keep_stdout(log: Path) -> IO[str]:
    """The standard output for our own lines; whatever libraries print goes to the log."""
    kept = os.dup(1)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    return os.fdopen(kept, "w")


def _listen(answers: queue.SimpleQueue[str]) -> None:
    """Reads below Python's buffers, whose lock a sleeping thread would hold when the process ends."""
    held = b""
    while piece := os.read(0, 4096):
        *lines, held = (held + piece).split(b"\n")
        for line in lines:
            answers.put(line.decode())
    os.kill(os.getpid(), signal.SIGTERM)
    answers.put("go")


if __name__ == "__main__":
    main()

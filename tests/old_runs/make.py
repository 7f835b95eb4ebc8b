"""Makes what a folder of this one holds: tiny bases, data, and runs by the version that is installed.

    python -m tests.old_runs.make tests/old_runs/VERSION

The folder of a version is made once, by that version's own code (0.1.0: at commit a9a4f61): later versions must load,
score, resume and show these runs (tests/test_old_runs.py). Their recipes name files relative to the folder, so that
the runs can be used wherever it lies, once it is the working directory.

    bert/  llama/  topics.csv  questions.jsonl
    finished/       a classification with LoRA
    interrupted/    the same recipe, stopped by a signal in mid-epoch
    answers/        instruction tuning with LoRA, and generated.json: what it wrote to the prompts in there
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
LEFT_OUT = ("report.html", "plots", ".lock")
"""Of a run's folder: what only repeats the rest as pictures."""
STOP_AFTER = 16
"""Step whose validation is followed by the signal; the step after it is still done."""
ELSEWHERE = "/elsewhere"
"""Stands in the files for the folder's own path, as if they had been brought here from another machine."""
PROMPTS = ("what is game team", "what is market")

CLASSIFICATION = {
    "name": "topics",
    "model": {"source": "./bert", "dtype": "float32"},
    "data": {"source": "./topics.csv", "max_length": 32},
    "method": {"kind": "lora", "rank": 4, "dropout": 0.1},
    "training": {
        "epochs": 6, "batch_size": 8, "learning_rate": 3e-2, "log_every": 2, "threads": 1, "evaluate_every": 4,
        "save_every": 4, "best_metric": "loss", "eps": 1e-4,
    },
    "export": {"prove": False},
    "tracking": [],
}  # fmt: skip
"""AdamW's eps is large so that rounding, which differs between processors, is not blown up where gradients vanish."""
INSTRUCTION = {
    **CLASSIFICATION,
    "name": "answers",
    "model": {"source": "./llama", "dtype": "float32"},
    "data": {"source": "./questions.jsonl", "max_length": 64},
    "task": {"kind": "instruction"},
    "evaluation": {"generation": {"samples": 2, "max_new_tokens": 8}},
}


def make(folder: Path) -> None:
    """Fills a new folder; works in it."""
    import peftkit
    from tests import tiny
    from tests.golden.recipes import questions, topics

    folder.mkdir(parents=True)
    os.chdir(folder)
    tiny.tiny_bert("bert", **SMALL)
    tiny.tiny_llama("llama", **SMALL, num_key_value_heads=1)
    topics(Path("topics.csv"))
    questions(Path("questions.jsonl"), 32)
    recipe = peftkit.Recipe.parse(CLASSIFICATION)
    _keep(peftkit.train(recipe, quiet=True).path, Path("finished"))

    def stop(step: int, _: object) -> None:
        if step == STOP_AFTER:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        peftkit.train(recipe, quiet=True, watch=stop)
    except peftkit.PeftkitError as stopped:
        print(stopped)
    _keep(next(Path("runs").glob("topics-*")), Path("interrupted"))
    _keep(peftkit.train(peftkit.Recipe.parse(INSTRUCTION), quiet=True).path, Path("answers"))
    written = dict(zip(PROMPTS, peftkit.load("answers").generate(list(PROMPTS))))
    Path("answers/generated.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree("runs")
    for path in Path().rglob("*"):
        if path.suffix in {".json", ".md"}:
            text = path.read_text(encoding="utf-8")
            path.write_text(text.replace(str(Path.cwd()), ELSEWHERE), encoding="utf-8")


def _keep(run: Path, place: Path) -> None:
    run.rename(place)
    for name in LEFT_OUT:
        path = place / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    make(Path(sys.argv[1]))

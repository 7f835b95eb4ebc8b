"""transformers' Trainer under the same faults: what its checkpoints and its resuming make of them.

A trial counts as passed where the resumed training ends with the uninterrupted one's adapter, byte for byte. The
figures tell the rest: runs that could not resume, and those that went on in silence to another adapter.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import tiny
from tests.faults import aimed, disks, runs
from tests.faults.injection import damage
from tests.faults.kinds import Outcome, begin

FINAL = "final/adapter_model.safetensors"
FILES = (
    "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
    "adapter_config.json",
)  # fmt: skip
EQUAL, REFUSED, OTHER = "equal", "could not resume", "silently resumed to another adapter"


@dataclass
class Reference:
    """An uninterrupted training, with all its checkpoints."""

    model: Path
    path: Path
    seconds: float
    saves: list[float] = field(default_factory=list)


def train(model: Path, output: Path, keep: int | None = 2) -> Callable[[], Any]:
    """The work of a child: LoRA on the tiny BERT, going on from the newest checkpoint where there is one."""

    def work() -> None:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments, set_seed
        from transformers.trainer_utils import get_last_checkpoint

        set_seed(0)
        held = AutoModelForSequenceClassification.from_pretrained(model, num_labels=4)
        lora = LoraConfig(task_type="SEQ_CLS", r=2, lora_dropout=0.1, target_modules=["query", "value"])
        rows = [
            {"input_ids": torch.tensor([5 + (7 * n + k) % 50 for k in range(12)]), "labels": n % 4} for n in range(48)
        ]
        arguments = TrainingArguments(
            output_dir=str(output), num_train_epochs=2, per_device_train_batch_size=4, learning_rate=1e-2,
            save_steps=3, save_total_limit=keep, logging_steps=2, report_to=[], use_cpu=True, seed=0, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model=get_peft_model(held, lora), args=arguments, train_dataset=rows)
        newest = get_last_checkpoint(str(output)) if output.is_dir() else None
        trainer.train(resume_from_checkpoint=newest)
        trainer.save_model(str(output / "final"))

    return work


def reference(folder: Path) -> Reference:
    """Trains to the end, and takes the time of the whole and of the saves."""
    from transformers import Trainer

    model = tiny.tiny_bert(folder / "trainer-bert")
    said, path = folder / "trainer-whole.txt", folder / "trainer-whole"
    saves, started = folder / "trainer-saves.txt", time.monotonic()

    def timed() -> None:
        real = Trainer._save_checkpoint

        def save(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            real(*args, **kwargs)
            with saves.open("a") as file:
                file.write(f"{time.perf_counter() - begun}\n")

        Trainer._save_checkpoint = save
        train(model, path, keep=None)()

    code = runs.wait(runs.fork(timed, said))
    assert code == 0, said.read_text()[-2000:]
    return Reference(model, path, time.monotonic() - started, [float(line) for line in saves.read_text().split()])


def kills(folder: Path, whole: Reference, trials: int, seed: int = 0) -> Outcome:
    """SIGKILL at a random moment, then resumed."""
    outcome = begin("Trainer: kill -9 at random moments", "adapter byte-equal")
    for trial, generator in outcome.left(trials, seed):
        output, said = folder / f"kill-{trial}", folder / f"kill-{trial}.txt"
        moment = generator.uniform(0, whole.seconds)
        child = runs.fork(train(whole.model, output), said)
        _later(child, moment)
        outcome.add("kills that met a living process", runs.wait(child) == -signal.SIGKILL)
        _finish(outcome, whole, output, said, f"killed after {moment:.2f} s")
    return outcome


def kills_in_saves(folder: Path, whole: Reference, trials: int, seed: int = 0) -> Outcome:
    """SIGKILL from outside at any time within a save, then resumed."""
    from transformers import Trainer

    outcome = begin("Trainer: kill -9 inside a save", "adapter byte-equal")
    for trial, generator in outcome.left(trials, seed):
        output, said = folder / f"save-{trial}", folder / f"save-{trial}.txt"
        save, after = generator.randrange(len(whole.saves)), generator.random() * max(whole.saves)
        struck = aimed.strike(
            train(whole.model, output), said, aimed.SAVE, save, after, signal.SIGKILL,
            {aimed.SAVE: (Trainer, "_save_checkpoint")},
        )  # fmt: skip
        outcome.add("kills that fell into a save", struck.inside)
        outcome.add("half checkpoints chosen to go on from", _half(output))
        _finish(outcome, whole, output, said, f"killed {1000 * after:.0f} ms into save {save}")
    return outcome


def damaged(folder: Path, whole: Reference, kind: str, trials: int, seed: int = 0) -> Outcome:
    """One file of the newest checkpoint truncated, or one bit of it flipped, then resumed."""
    outcome = begin(f"Trainer: {kind} checkpoint files", "adapter byte-equal")
    for trial, generator in outcome.left(trials, seed):
        output, said = folder / f"{kind}-{trial}", folder / f"{kind}-{trial}.txt"
        for step in (3, 6):
            shutil.copytree(whole.path / f"checkpoint-{step}", output / f"checkpoint-{step}")
        done = damage(output / "checkpoint-6" / FILES[trial % len(FILES)], kind, generator)
        _finish(outcome, whole, output, said, done)
    return outcome


def full_disk(folder: Path, whole: Reference, trials: int, seed: int = 0) -> Outcome:
    """A disk with less room than the training needs; with room, resumed."""
    outcome = begin("Trainer: a disk that is full at any point", "adapter byte-equal")
    needed = sum(disks.used(whole.path / name) for name in ("checkpoint-3", "checkpoint-6", "final"))
    for trial, generator in outcome.left(trials, seed):
        said, size = folder / f"disk-{trial}.txt", generator.randrange(8, needed)
        with disks.disk(folder / f"disk-{trial}", size) as place:
            code = runs.wait(runs.fork(train(whole.model, place / "out"), said))
            outcome.add("runs that stopped", code != 0)
            outcome.add("tracebacks shown", "Traceback" in said.read_text())
            outcome.add("half checkpoints chosen to go on from", _half(place / "out"))
            disks.resize(place, 8 * needed)
            _finish(outcome, whole, place / "out", said, f"a disk of {size} KiB")
    return outcome


def _later(child: int, moment: float) -> None:
    time.sleep(moment)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)


def _half(output: Path) -> bool:
    """Whether the checkpoint that would be gone on from lacks what is written last, or a file of the others."""
    from transformers.trainer_utils import get_last_checkpoint

    newest = get_last_checkpoint(str(output)) if output.is_dir() else None
    return newest is not None and not all((Path(newest) / name).is_file() for name in FILES)


def _finish(outcome: Outcome, whole: Reference, output: Path, said: Path, what: str) -> None:
    """Resumes, and counts what came of it."""
    code = runs.wait(runs.fork(train(whole.model, output), said))
    final = output / FINAL
    if code or not final.is_file():
        came = REFUSED
    else:
        came = EQUAL if final.read_bytes() == (whole.path / FINAL).read_bytes() else OTHER
    outcome.add(came, 1)
    outcome.count([] if came == EQUAL else [came], what)
    shutil.rmtree(output, ignore_errors=True)

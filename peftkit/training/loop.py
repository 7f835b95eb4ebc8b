"""The training loop: steps, validations, checkpoints, stopping. What a step does is in step.py.

for epoch: for batch in plan(epoch): step → log → validate? → checkpoint? → stop?
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peftkit.data.batching import epoch_batches, pass_tokens, steps_per_epoch
from peftkit.data.pipeline import EncodedData, EncodedSplit
from peftkit.distributed.session import Session
from peftkit.errors import CheckpointError, Interrupted, RecipeError, TrainingError, did_you_mean
from peftkit.evaluation.direction import greater_is_better
from peftkit.evaluation.runner import Stopped, predict
from peftkit.runs import checkpoints
from peftkit.runs.checkpoints import Checkpoint
from peftkit.schema.recipe import Recipe
from peftkit.system.memory import trim_heap, trim_heap_after
from peftkit.training import auto_micro_batch
from peftkit.training.checkpoint_writer import Content, Saver
from peftkit.training.log import RunLog
from peftkit.training.optimizer import build_optimizer, build_scheduler, load_optimizer_tensors, optimizer_tensors
from peftkit.training.state import TrainingState
from peftkit.training.step import Stepper, StepResult, TaskModule
from peftkit.training.stopping import StopRequest
from peftkit.training.weights import TrainedWeights

ValidationCallback = Callable[[int, Mapping[str, float]], None]
PROBE_ROWS = 2
TIME_IS_UP = 1 << 10
"""Stands beside the signals' numbers for the time limit."""
SPIKE = 5.0
"""A step's loss over this many times the running mean is flagged."""


@dataclass
class Loop:
    """One run's training; ``run`` leaves the best weights in the module."""

    recipe: Recipe
    session: Session
    module: TaskModule
    tokenizer: Any
    data: EncodedData
    folder: Path
    fingerprints: Mapping[str, Any]
    """What a resumed run must share with the one that stopped; stored in every checkpoint."""
    on_validation: ValidationCallback | None = None
    """Told the step and the figures of every validation, on every process."""
    rows: Any = None
    """The training rows that the examples were made of, to name them by file and line."""

    def __post_init__(self) -> None:
        training = self.recipe.training
        self.state = TrainingState()
        self.train_split = self.data.splits["train"]
        per_epoch = steps_per_epoch(self.train_split.lengths, training)
        self.total = min(math.ceil(per_epoch * training.epochs), training.max_steps or 10**12)
        self.metric = training.best_metric or self.module.head.best_metric
        self.recipe.method.on_train_begin(self.module.model, self.total)
        self.optimizer = build_optimizer(self.module, self.recipe)
        # the schedule is not given to Accelerate, which would step it once a process
        self.scheduler = build_scheduler(self.optimizer, training, self.total)
        wrapped, prepared = self.session.prepare(self.recipe, self.module, self.optimizer)
        self.weights = TrainedWeights(self.module, self.recipe, self.session)
        self._saver = Saver(self.checkpoints, training.keep_checkpoints)
        self.stepper = Stepper(
            self.recipe, self.session, wrapped, prepared, self.scheduler, self.train_split, self.tokenizer
        )

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "checkpoints"

    def run(self, resume_from: Checkpoint | None = None) -> TrainingState:
        """Trains to the end.

        Raises:
            Interrupted: a signal or the time limit; a checkpoint has been written.
            TrainingError: loss or gradients were not finite.
        """
        # a task's own metric is right; but what is tried on a model at its first rows, all processes must try together
        if self.recipe.training.best_metric or self.session.world_size > 1:
            self._check_metric_name()
        if resume_from:
            self._restore(resume_from)
        trim_heap()  # what preparing the data and loading the weights left free
        training = self.recipe.training
        if self.session.is_main:
            checkpoints.remove_staged(self.checkpoints)
        self.log = RunLog(
            self.folder / "metrics.jsonl", self.session, self.total, offset=self.state.log_offset, step=self.state.step
        )
        try:
            with StopRequest(training.max_time) as stop, self.session.watchdog.training():
                self._stop = stop
                self._epochs()
        finally:
            self.log.close()
            del self._stop  # what follows is not stopped between passes
        self._restore_best()
        self.recipe.method.on_train_end(self.module.model)
        return self.state

    def _epochs(self) -> None:
        state = self.state
        if self.recipe.training.micro_batch == auto_micro_batch.AUTO:
            self.stepper.tell = lambda said: self.log.event(self.state.step, "micro_batch", said)
            auto_micro_batch.find_micro_batch(self.stepper)
        if state.step:
            self._finish_step()  # a run stopped before its validation makes up for it
        while state.step < self.total and not state.stopped_early:
            self._epoch_from_here()
        if state.evaluated != state.step:
            self._validate()
            self._save(must=True)
        elif not self._is_saved():
            self._save(must=True)

    def _epoch_from_here(self) -> None:
        """The rest of the current epoch's plan, or as much of it as the run still needs."""
        state = self.state
        batches = epoch_batches(self.train_split.lengths, self.recipe.training, state.epoch)
        for number in range(state.batch, len(batches)):
            self._step(batches[number], last=number + 1 == len(batches))
            self._stop_if_asked()
            self._finish_step()
            if state.step >= self.total or state.stopped_early:
                return

    def _step(self, batch: np.ndarray, *, last: bool) -> None:
        state, started = self.state, time.perf_counter()
        result = self.stepper.run(batch, state.step)
        state.step += 1
        self.weights.update_ema(state.step)
        state.epoch, state.batch = (state.epoch + 1, 0) if last else (state.epoch, state.batch + 1)
        state.rows, state.tokens = state.rows + result.rows, state.tokens + result.tokens
        seconds = time.perf_counter() - started
        state.seconds += seconds
        trim_heap_after(state.step)
        if not result.finite:
            self._not_finite(batch, result)
        self._flag_spike(result)
        self._log_step(result, seconds)

    def _finish_step(self) -> None:
        """Validates and saves, where these are due after the step just done."""
        state, every = self.state, self.recipe.training.save_every
        improved = state.evaluated != state.step and self._evaluation_due() and self._validate()
        if improved or (state.batch == 0 if every == "epoch" else state.step % every == 0):
            self._save()

    def _evaluation_due(self) -> bool:
        every, state = self.recipe.training.evaluate_every, self.state
        return state.batch == 0 if every == "epoch" else state.step % every == 0

    # -- figures ---------------------------------------------------------------------------------------------------

    def _log_step(self, result: StepResult, seconds: float) -> None:
        window = self.state.window
        added = {
            "loss": result.loss * result.weight,
            "weight": result.weight,
            "rows": result.rows,
            "tokens": result.tokens,
            "seconds": seconds,
            "steps": 1,
        }
        for name, value in added.items():
            if math.isfinite(value):
                window[name] = window.get(name, 0.0) + value
        self.log.advance(self.state.step)
        if self.state.step % self.recipe.training.log_every == 0 or self.state.step == self.total:
            figures = {
                "loss": window["loss"] / window["weight"] if window.get("weight") else 0.0,
                "learning_rate": float(self.scheduler.get_last_lr()[0]),
                "grad_norm": result.grad_norm,
                "rows_per_second": window["rows"] / window["seconds"],
                "tokens_per_second": window["tokens"] / window["seconds"],
            }
            window.clear()
            self.log.train(self.state.step, self._epoch(), figures)

    def _epoch(self) -> float:
        return self.state.step / steps_per_epoch(self.train_split.lengths, self.recipe.training)

    def _flag_spike(self, result: StepResult) -> None:
        window = self.state.window
        if window.get("steps", 0) >= 5 and window.get("weight"):
            mean = window["loss"] / window["weight"]
            if result.loss > SPIKE * mean and result.loss > 1.0:
                said = f"loss {result.loss:.3f} at step {self.state.step}, after a mean of {mean:.3f}"
                self.log.event(self.state.step, "loss_spike", said)

    def _not_finite(self, batch: np.ndarray, result: StepResult) -> None:
        what = (
            f"loss {result.loss}, gradient norm {result.grad_norm} at step {self.state.step}, "
            f"training rows {self._names(batch)}"
        )
        if self.recipe.training.nonfinite == "skip":
            self.state.skipped += 1
            self.log.event(self.state.step, "skipped", f"step skipped: {what}")
            return
        raise TrainingError(
            f"not a finite number: {what}; {self._last_kept()}. Lower training.learning_rate, look at these rows, use "
            "model.dtype=float32, or skip such steps with training.nonfinite=skip"
        )

    def _names(self, batch: np.ndarray, most: int = 16) -> str:
        """Examples of a batch by number, and by file and line where these are known."""
        named = []
        for example in sorted(batch.tolist())[:most]:
            held = self.train_split.examples[example]
            rows = [held["row"] + offset for offset in held.get("row_offsets") or [0]] if "row" in held else []
            sources = [self.rows[int(row)] for row in rows] if self.rows is not None else []
            places = [f"{row['_file']}:{row['_line']}" for row in sources if row.get("_line")]
            named.append(f"{example} ({', '.join(places)})" if places else str(example))
        return ", ".join(named) + (f" and {len(batch) - most} more" if len(batch) > most else "")

    # -- validation ------------------------------------------------------------------------------------------------

    def evaluate(self, split: EncodedSplit) -> dict[str, np.ndarray]:
        """Outputs for every example of a split, gathered on every process."""
        self.module.eval()
        self.session.watchdog.arm()
        trim_heap()  # its passes are of other shapes than training's, and so are the holes that they leave
        outputs = predict(
            self.module,
            split,
            self.tokenizer,
            device=self.session.device,
            batch_size=self.recipe.evaluation.batch_size,
            tokens=pass_tokens(self.recipe.training, self.session.device.type),
            autocast=self.session.accelerator.autocast,
            rank=self.session.rank,
            world_size=self.session.world_size,
            progress=lambda _: self.session.watchdog.report_progress(),
            should_stop=(lambda: bool(self._asked_to_stop())) if hasattr(self, "_stop") else None,
        )
        trim_heap()
        self.session.watchdog.disarm()
        return outputs

    def _validate(self) -> bool:
        """Validates, and says whether this is the best model so far."""
        state, training = self.state, self.recipe.training
        try:
            with self.weights.swap_ema():
                outputs = self.evaluate(self.data.splits["validation"])
        except Stopped:
            self._stop_if_asked()
            raise
        figures = self.module.head.metrics(outputs, self.recipe.evaluation)
        state.evaluated = state.step
        self.log.evaluation(state.step, self._epoch(), "validation", figures)
        if self.on_validation:
            self.on_validation(state.step, figures)
        value, sign = figures[self.metric], 1 if greater_is_better(self.metric) else -1
        improvement = math.inf if state.best_value is None else sign * (value - state.best_value)
        stopping = training.early_stopping
        if not improvement > (stopping.min_delta if stopping else 0.0):
            state.stale += 1
            if stopping and state.stale >= stopping.patience:
                state.stopped_early = True
                said = f"no better {self.metric} in {state.stale} validations: stopping"
                self.log.event(state.step, "early_stopping", said)
        else:
            state.stale = 0
        if improvement > 0:
            state.best_value, state.best_step = value, state.step
        return improvement > 0

    def _check_metric_name(self) -> None:
        """A wrong name is an error before the first step, not after the first epoch."""
        split = self.data.splits["validation"]
        few = np.argsort(split.lengths, kind="stable")[:PROBE_ROWS]
        probe = split.select(few)
        figures = self.module.head.metrics(self.evaluate(probe), self.recipe.evaluation)
        if self.metric not in figures:
            raise RecipeError(f"training.best_metric: no figure '{self.metric}': {did_you_mean(self.metric, figures)}")

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def _save(self, *, must: bool = False) -> None:
        """Writes a checkpoint; one that fails in mid-run is said and the run goes on with those before it."""
        self.session.watchdog.disarm()
        model, optimizer = self.weights.tensors(), optimizer_tensors(self.module, self.optimizer)
        broken = [name for name, tensor in model.items() if not bool(torch.isfinite(tensor).all())]
        if broken:
            raise TrainingError(f"after step {self.state.step} {broken[0]} is not finite; {self._last_kept()}")
        error = self.session.run_on_main(lambda: self._write(model, optimizer))
        if error and must:
            raise CheckpointError(f"{error}; {self._last_kept()}")
        if error:
            self.log.event(self.state.step, "checkpoint_failed", error)

    def _write(self, model: dict[str, torch.Tensor], optimizer: dict[str, torch.Tensor]) -> str | None:
        """What kept the checkpoint from being written; on the main process."""
        state = self.state
        state.log_offset = self.log.end
        held = {
            "training": state.to_json(),
            "scheduler": _plain_state(self.scheduler),
            "fingerprints": dict(self.fingerprints),
            "finished": state.step >= self.total or state.stopped_early,
        }
        return self._saver.write(Content(state.step, model, optimizer, held), state.best_step, self.log.flush)

    def _last_kept(self) -> str:
        kept = self.session.run_on_main(lambda: checkpoints.newest(self.checkpoints)[0])
        return f"the last good checkpoint is {kept.path}" if kept else "there is no checkpoint yet"

    def _is_saved(self) -> bool:
        newest = self.session.run_on_main(lambda: checkpoints.newest(self.checkpoints)[0])
        return newest is not None and newest.step == self.state.step

    def _restore(self, checkpoint: Checkpoint) -> None:
        self._load_model(checkpoint)
        load_optimizer_tensors(self.module, self.optimizer, self._read(checkpoint, checkpoints.OPTIMIZER))
        saved = self.session.run_on_main(checkpoint.state)
        self.scheduler.load_state_dict({**self.scheduler.state_dict(), **saved["scheduler"]})
        for group, rate in zip(self.optimizer.param_groups, saved["scheduler"]["_last_lr"], strict=True):
            group["lr"] = rate
        self.state = TrainingState.from_json(saved["training"])

    def _load_model(self, checkpoint: Checkpoint) -> None:
        self.weights.load(self._read(checkpoint, checkpoints.MODEL), checkpoint.path)

    def _read(self, checkpoint: Checkpoint, name: str) -> dict[str, torch.Tensor]:
        """A checkpoint's tensors on every process; only the main one reads, so that no file system need be shared."""
        return self.session.broadcast_tensors(lambda: checkpoint.tensors(name))

    def _restore_best(self) -> None:
        best = self.state.best_step
        if best is not None and best != self.state.step:
            try:
                self._load_model(self.session.run_on_main(lambda: checkpoints.at_step(self.checkpoints, best)))
            except CheckpointError as error:
                error.args = (
                    f"{error}; it held the best weights, with which the run is to end. To train them again, from the "
                    f"checkpoint before it or from the beginning:\n  peftkit train --resume {self.folder}",
                )
                raise
        self.weights.load_ema()

    # -- stopping --------------------------------------------------------------------------------------------------

    def _stop_if_asked(self) -> None:
        worst = self._asked_to_stop()
        if not worst:
            return
        self._save(must=True)
        why = "the time limit" if worst == TIME_IS_UP else signal.Signals(worst).name
        number = signal.SIGTERM if worst == TIME_IS_UP else worst
        raise Interrupted(
            f"stopped by {why} after step {self.state.step} of {self.total}; nothing is lost. Go on with:\n"
            f"  peftkit train --resume {self.folder}",
            number,
        )

    def _asked_to_stop(self) -> int:
        """0, or what asks for an end on any process: a signal's number, or TIME_IS_UP; all get the same answer."""
        code = self._stop.code
        return self.session.all_reduce_max(code if code > 0 else (TIME_IS_UP if code else 0))


def _plain_state(scheduler: Any) -> dict[str, Any]:
    """A schedule's counters without its functions, which the recipe gives anew."""
    return {
        name: value
        for name, value in scheduler.state_dict().items()
        if isinstance(value, (int, float, list)) and name != "lr_lambdas"
    }

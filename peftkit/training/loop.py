"""The training loop. For each batch of an epoch's plan: step → log → stop? → validate? → save a checkpoint?"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peftkit.data.batching import epoch_batches, pass_tokens, steps_per_epoch
from peftkit.data.pipeline import EncodedData, EncodedSplit
from peftkit.distributed import sharding
from peftkit.distributed.session import Session
from peftkit.errors import CheckpointError, Interrupted, RecipeError, TrainingError, did_you_mean
from peftkit.evaluation.direction import greater_is_better
from peftkit.evaluation.runner import Stopped, predict
from peftkit.runs import checkpoints
from peftkit.runs.checkpoints import Checkpoint
from peftkit.schema.recipe import Recipe
from peftkit.system.memory import trim_heap, trim_heap_after
from peftkit.training.auto_micro_batch import AUTO, AutoStepper
from peftkit.training.checkpoint_writer import CheckpointContent, CheckpointWriter, TrainingState
from peftkit.training.gradients import GradientWatch
from peftkit.training.interruptions import TIME_IS_UP, StopRequest
from peftkit.training.log import RunLog
from peftkit.training.optimizer import build_optimizer, build_scheduler, load_optimizer_tensors, optimizer_tensors
from peftkit.training.step import Stepper, StepResult, TaskModule
from peftkit.training.weights import TrainedWeights

ValidationCallback = Callable[[int, Mapping[str, float]], None]
PROBE_ROWS = 2
SPIKE = 5.0
"""A loss of more than this many times the running mean is logged."""


@dataclass
class Loop:
    """The training of one run; ``run`` leaves the best weights in the module."""

    recipe: Recipe
    session: Session
    module: TaskModule
    tokenizer: Any
    data: EncodedData
    folder: Path
    fingerprints: Mapping[str, Any]
    """What a resumed run must have in common with the stopped one; stored in every checkpoint."""
    on_validation: ValidationCallback | None = None
    """Called with the step and the metrics of every validation, on every process."""
    rows: Any = None
    """The training rows, from which errors name an example by file and line."""

    def __post_init__(self) -> None:
        training = self.recipe.training
        self.state = TrainingState()
        self.checkpoints = self.folder / "checkpoints"
        self.train_split = self.data.splits["train"]
        self.per_epoch = steps_per_epoch(self.train_split.lengths, training)
        self.total = min(math.ceil(self.per_epoch * training.epochs), training.max_steps or 10**12)
        self.metric = training.best_metric or self.module.head.best_metric
        self.recipe.method.on_train_begin(self.module.model, self.total)
        self.optimizer = build_optimizer(self.module, self.recipe)
        # the scheduler is not prepared by Accelerate, which would step it once per process
        self.scheduler = build_scheduler(self.optimizer, training, self.total)
        wrapped, prepared = self.session.prepare(self.recipe, self.module, self.optimizer)
        self.weights = TrainedWeights(self.module, self.recipe, self.session)
        self._writer = CheckpointWriter(self.checkpoints, training.keep_checkpoints)
        self._stop: StopRequest | None = None
        stepper = AutoStepper if training.micro_batch == AUTO else Stepper
        self.stepper = stepper(
            self.recipe, self.session, wrapped, prepared, self.scheduler, self.train_split, self.tokenizer
        )

    def run(self, resume_from: Checkpoint | None = None) -> None:
        """Train to the end, from the start or from a checkpoint.

        Raises:
            Interrupted: a signal or the time limit; a checkpoint has been written.
            TrainingError: the loss or the gradients were not finite.
        """
        # a task's own metric needs no check, but what the first forward pass probes, all processes must probe together
        if self.recipe.training.best_metric or self.session.world_size > 1:
            self._check_metric_name()
        if resume_from:
            self._restore(resume_from)
        trim_heap()  # free what preparing the data and loading the weights left behind
        if self.session.is_main:
            checkpoints.remove_staged(self.checkpoints)
        self.log = RunLog(
            self.folder / "metrics.jsonl", self.session, self.total, offset=self.state.log_offset, step=self.state.step
        )
        self._watch_gradients()
        try:
            with StopRequest(self.recipe.training.max_time) as self._stop, self.session.watchdog.training():
                self._run_epochs()
        finally:
            self.log.close()
            self._stop = None  # later evaluations run to their end
        self._restore_best()
        self.recipe.method.on_train_end(self.module.model)

    def _watch_gradients(self) -> None:
        """Log in the first steps which trained parameters get no gradient; DeepSpeed keeps its gradients to itself."""
        session = self.session
        if sharding.strategy(session.accelerator) == sharding.DEEPSPEED:
            return
        combine = partial(session.accelerator.reduce, reduction="sum") if session.sharded else None
        watch = GradientWatch(
            self.weights.named(), start=self.state.step, total=self.total, combine=combine,
            replicated=session.world_size > 1 and not session.sharded,
        )  # fmt: skip

        def observe() -> None:
            if (missing := watch.observe()) is not None:
                names = [*missing.unreached, *missing.zero]
                self.log.event(self.state.step + 1, "no_gradient", missing.message, parameters=names)

        self.stepper.on_gradients = observe

    def _run_epochs(self) -> None:
        state = self.state
        if isinstance(self.stepper, AutoStepper):
            self.stepper.report = lambda message: self.log.event(self.state.step, "micro_batch", message)
            self.stepper.find_micro_batch()
        if state.step:
            self._validate_and_save_if_due()  # a run stopped between a step and its validation
        while state.step < self.total and not state.stopped_early:
            self._run_epoch()
        if state.evaluated != state.step:
            self._validate()
            self._save(required=True)
        elif (newest := self._newest_checkpoint()) is None or newest.step != state.step:
            self._save(required=True)

    def _run_epoch(self) -> None:
        """Run the rest of the current epoch, or as much of it as the run still needs."""
        state = self.state
        batches = epoch_batches(self.train_split.lengths, self.recipe.training, state.epoch)
        self.stepper.split = self.train_split.for_epoch(self.recipe.training.seed, state.epoch)
        for number in range(state.batch, len(batches)):
            self._step(batches[number], last=number + 1 == len(batches))
            self._stop_if_requested()
            self._validate_and_save_if_due()
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
            self._skip_or_raise(batch, result)
        self._log_spike(result)
        self._log_step(result, seconds)

    def _validate_and_save_if_due(self) -> None:
        state, training = self.state, self.recipe.training
        improved = state.evaluated != state.step and self._is_due(training.evaluate_every) and self._validate()
        if improved or self._is_due(training.save_every):
            self._save()

    def _is_due(self, every: int | str) -> bool:
        return self.state.batch == 0 if isinstance(every, str) else self.state.step % every == 0

    def _log_step(self, result: StepResult, seconds: float) -> None:
        window = self.state.window
        values = {"loss": result.loss * result.weight, "weight": result.weight, "rows": result.rows,
                  "tokens": result.tokens, "seconds": seconds, "steps": 1}  # fmt: skip
        for name, (summed, divisor) in result.measures.items():
            values |= {f"{name}/sum": summed, f"{name}/count": divisor}
        for name, value in values.items():
            if math.isfinite(value):
                window[name] = window.get(name, 0.0) + value
        self.log.advance(self.state.step)
        if self.state.step % self.recipe.training.log_every == 0 or self.state.step == self.total:
            metrics = {
                "loss": window["loss"] / window["weight"] if window.get("weight") else 0.0,
                "learning_rate": float(self.scheduler.get_last_lr()[0]),
                "grad_norm": result.grad_norm,
                "rows_per_second": window["rows"] / window["seconds"],
                "tokens_per_second": window["tokens"] / window["seconds"],
            }
            for name in result.measures:
                if count := window.get(f"{name}/count"):
                    metrics[name] = window[f"{name}/sum"] / count
            window.clear()
            self.log.train(self.state.step, self.state.step / self.per_epoch, metrics)

    def _log_spike(self, result: StepResult) -> None:
        window = self.state.window
        if window.get("steps", 0) >= 5 and window.get("weight"):
            mean = window["loss"] / window["weight"]
            if result.loss > max(SPIKE * mean, 1.0):
                message = f"loss spike: {result.loss:.3f} at step {self.state.step}, after a mean of {mean:.3f}"
                self.log.event(self.state.step, "loss_spike", message)

    def _skip_or_raise(self, batch: np.ndarray, result: StepResult) -> None:
        where = f"at step {self.state.step}, training rows {self._describe_rows(batch)}"
        details = f"loss {result.loss}, gradient norm {result.grad_norm} {where}"
        if self.recipe.training.nonfinite == "skip":
            self.state.skipped += 1
            self.log.event(self.state.step, "skipped", f"step skipped: {details}")
            return
        raise TrainingError(
            f"loss or gradients are not finite: {details}; {self._last_checkpoint()}. Lower training.learning_rate, "
            "check these rows, use model.dtype=float32, or skip such steps with training.nonfinite=skip"
        )

    def _describe_rows(self, batch: np.ndarray, limit: int = 16) -> str:
        """Examples of a batch by number, and by file and line where these are known."""
        names = []
        for number in sorted(batch.tolist())[:limit]:
            example = self.train_split.examples[number]
            rows = [example["row"] + offset for offset in example.get("row_offsets") or [0]] if "row" in example else []
            sources = [self.rows[int(row)] for row in rows] if self.rows is not None else []
            places = [f"{row['_file']}:{row['_line']}" for row in sources if row.get("_line")]
            names.append(f"{number} ({', '.join(places)})" if places else str(number))
        return ", ".join(names) + (f" and {len(batch) - limit} more" if len(batch) > limit else "")

    def evaluate(self, split: EncodedSplit) -> dict[str, np.ndarray]:
        """Outputs of every example of a split, gathered on every process."""
        self.module.eval()
        self.session.watchdog.arm()
        trim_heap()  # its batches have other shapes than training's, which fragments the heap
        outputs = predict(
            self.module, split, self.tokenizer, device=self.session.device,
            batch_size=self.recipe.evaluation.batch_size, unpadded=self.stepper.unwrapped.unpadded,
            tokens=pass_tokens(self.recipe.training, self.session.device.type),
            autocast=self.session.accelerator.autocast, rank=self.session.rank, world_size=self.session.world_size,
            progress=lambda _: self.session.watchdog.report_progress(),
            should_stop=(lambda: bool(self._stop_code())) if self._stop else None,
        )  # fmt: skip
        trim_heap()
        self.session.watchdog.disarm()
        return dict(self.module.head.complete(outputs))

    def _validate(self) -> bool:
        """Validate; returns whether this is the best model so far."""
        state, training = self.state, self.recipe.training
        try:
            with self.weights.swap_ema():
                outputs = self.evaluate(self.data.splits["validation"])
        except Stopped:
            self._stop_if_requested()
            raise
        metrics = self.module.head.metrics(outputs, self.recipe.evaluation)
        state.evaluated = state.step
        self.log.evaluation(state.step, state.step / self.per_epoch, "validation", metrics)
        for event, message in self.module.head.warnings(metrics):
            self.log.event(state.step, event, message)
        if self.on_validation:
            self.on_validation(state.step, metrics)
        value, sign = metrics[self.metric], 1 if greater_is_better(self.metric) else -1
        improvement = math.inf if state.best_value is None else sign * (value - state.best_value)
        stopping = training.early_stopping
        if not improvement > (stopping.min_delta if stopping else 0.0):
            state.stale += 1
            if stopping and state.stale >= stopping.patience:
                state.stopped_early = True
                message = f"early stopping: {self.metric} has not improved in {state.stale} validations"
                self.log.event(state.step, "early_stopping", message)
        else:
            state.stale = 0
        if improvement > 0:
            state.best_value, state.best_step = value, state.step
        return improvement > 0

    def _check_metric_name(self) -> None:
        """A wrong name must fail before the first step, not after the first epoch."""
        split = self.data.splits["validation"]
        rows = np.argsort(split.lengths, kind="stable")[:PROBE_ROWS]
        metrics = self.module.head.metrics(self.evaluate(split.select(rows)), self.recipe.evaluation)
        if self.metric not in metrics:
            raise RecipeError(f"training.best_metric: no metric '{self.metric}': {did_you_mean(self.metric, metrics)}")

    def _save(self, *, required: bool = False) -> None:
        """Write a checkpoint; a failed save during training is logged and training continues."""
        self.session.watchdog.disarm()
        model, optimizer = self.weights.tensors(), optimizer_tensors(self.module, self.optimizer)
        for name, tensor in model.items():
            if not bool(torch.isfinite(tensor).all()):
                raise TrainingError(f"after step {self.state.step} {name} is not finite; {self._last_checkpoint()}")
        error = self.session.run_on_main(lambda: self._write(model, optimizer))
        if error and required:
            raise CheckpointError(f"{error}; {self._last_checkpoint()}")
        if error:
            self.log.event(self.state.step, "checkpoint_failed", error)

    def _write(self, model: dict[str, torch.Tensor], optimizer: dict[str, torch.Tensor]) -> str | None:
        """Write a checkpoint on the main process; returns what prevented it."""
        state = self.state
        state.log_offset = self.log.end
        scheduler = self.scheduler.state_dict()
        scheduler.pop("lr_lambdas", None)  # functions, rebuilt from the recipe
        saved = {
            "training": asdict(state),
            "scheduler": {name: value for name, value in scheduler.items() if isinstance(value, (int, float, list))},
            "fingerprints": dict(self.fingerprints),
            "finished": state.step >= self.total or state.stopped_early,
        }
        content = CheckpointContent(state.step, model, optimizer, saved)
        return self._writer.write(content, state.best_step, self.log.flush)

    def _newest_checkpoint(self) -> Checkpoint | None:
        return self.session.run_on_main(lambda: checkpoints.newest(self.checkpoints)[0])  # type: ignore[no-any-return]

    def _last_checkpoint(self) -> str:
        newest = self._newest_checkpoint()
        return f"the last good checkpoint is {newest.path}" if newest else "there is no checkpoint yet"

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.weights.load(self._read(checkpoint, checkpoints.MODEL), checkpoint.path)
        load_optimizer_tensors(self.module, self.optimizer, self._read(checkpoint, checkpoints.OPTIMIZER))
        saved = self.session.run_on_main(checkpoint.state)
        self.scheduler.load_state_dict({**self.scheduler.state_dict(), **saved["scheduler"]})
        for group, rate in zip(self.optimizer.param_groups, saved["scheduler"]["_last_lr"], strict=True):
            group["lr"] = rate
        self.state = TrainingState(**saved["training"])

    def _read(self, checkpoint: Checkpoint, name: str) -> dict[str, torch.Tensor]:
        return self.session.broadcast_tensors(lambda: checkpoint.tensors(name))  # only the main process reads

    def _restore_best(self) -> None:
        best = self.state.best_step
        if best is not None and best != self.state.step:
            try:
                checkpoint = self.session.run_on_main(lambda: checkpoints.at_step(self.checkpoints, best))
                self.weights.load(self._read(checkpoint, checkpoints.MODEL), checkpoint.path)
            except CheckpointError as error:
                error.args = (
                    f"{error}; it holds the run's best weights. Train them again, from an earlier checkpoint or from "
                    f"the start:\n  peftkit train --resume {self.folder}",
                )
                raise
        self.weights.load_ema()

    def _stop_if_requested(self) -> None:
        if not (code := self._stop_code()):
            return
        self._save(required=True)
        reason, number = ("the time limit", signal.SIGTERM) if code == TIME_IS_UP else (signal.Signals(code).name, code)
        raise Interrupted(
            f"stopped by {reason} after step {self.state.step} of {self.total}; nothing is lost. Resume with:\n"
            f"  peftkit train --resume {self.folder}",
            number,
        )

    def _stop_code(self) -> int:
        """0 to continue, or the reason to stop on any process: a signal's number or TIME_IS_UP; equal on all."""
        assert self._stop is not None
        return self.session.all_reduce_max(self._stop.code)

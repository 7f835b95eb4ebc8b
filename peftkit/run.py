"""The whole flow of a run, in one function that can be read, copied and reordered."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.data.pipeline import EncodedData, PreparedData, encode, prepare
from peftkit.data.source import find_sources
from peftkit.distributed import sharding
from peftkit.distributed.session import Session, open_session
from peftkit.export.adapter import check_backends, export_run
from peftkit.models import packing
from peftkit.models.loading import build
from peftkit.models.third_party import silence_libraries
from peftkit.models.tokenizer import load_tokenizer, tokenizer_fingerprint
from peftkit.reporting import html, run_report
from peftkit.runs import choices as stored_choices
from peftkit.runs import folder as folders
from peftkit.runs import resume as resuming
from peftkit.runs.environment import environment_changes
from peftkit.schema.automatic import Choice
from peftkit.schema.head import head_of
from peftkit.schema.recipe import Recipe, replace
from peftkit.schema.types import LoadedModel, TaskInfo
from peftkit.system import files
from peftkit.training import results
from peftkit.training.choosing import choose
from peftkit.training.features import plan_features
from peftkit.training.first_batches import FirstBatches
from peftkit.training.interruptions import guarded
from peftkit.training.loop import Loop, ValidationCallback
from peftkit.training.optimizer import check_device_support
from peftkit.training.reference import Reference
from peftkit.training.step import TaskModule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Run:
    """A finished run on disk."""

    path: Path
    recipe: Recipe

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Final metrics: per split, per baseline, and of the training itself."""
        return dict(json.loads((self.path / folders.METRICS).read_text()))

    @property
    def adapter(self) -> Path:
        """The exported folder: ``adapter/``, or ``model/`` for a method that trains the base itself."""
        return self.path / self.recipe.method.saves

    def predict(self, texts: Any = None, **options: Any) -> Any:
        """Predictions of the trained model; see ``peftkit.load``."""
        from peftkit.inference.trained_model import load

        return load(self.path).predict(texts, **options)

    def _repr_html_(self) -> str:
        return html.render(run_report.read(self.path), standalone=False)


def train(
    recipe: Recipe,
    *,
    resume: str | Path | bool | None = None,
    allow: tuple[str, ...] = (),
    quiet: bool = False,
    on_validation: ValidationCallback | None = None,
    final: bool = True,
) -> Run:
    """Runs a recipe, from data to exported adapter.

    Args:
        recipe: what to do.
        resume: a run's folder to resume, or True for the newest of this recipe's name.
        allow: what may differ from the resumed run's checkpoint, by name ("data", "training.epochs").
        quiet: print no tables.
        on_validation: called with step and metrics after every validation; an exception that it raises ends the run.
        final: False stops after training and validation: the test split is not read, and nothing is exported.
            Resuming such a run with True finishes it without training it again.

    Raises:
        UserError: something in the recipe, the data or the base model is wrong; nothing is left behind.
        Interrupted: stopped by a signal or the time limit; the run can be resumed.
        TrainingError: loss or gradients were not finite, storage or memory ran out, or a process was lost.
    """
    silence_libraries()
    session = open_session(recipe)
    check_device_support(recipe, session)
    with guarded(session):
        tokenizer, prepared, encoded = _data(recipe, session)
        recipe, choices = _settled(recipe, session, prepared, tokenizer, resume)
        recipe, encoded, model = _model(recipe, session, tokenizer, prepared, encoded)
        model.notes += [choice.summary for choice in choices]
        check_backends(Path(recipe.output_dir), model, recipe, prepared.info)
        module = TaskModule(model, head_of(prepared.info, recipe.task))
        frozen = plan_features(module, recipe, encoded, tokenizer, session, model.fingerprint)
        model.notes += [frozen.note] if frozen.note else []
        console = run_report.ConsoleReporter(silent=quiet or not session.is_main)
        overview = console.start(recipe, session, prepared, encoded, model)

        folder = session.folder = folders.open_folder(recipe, session, resume)
        fingerprints = resuming.fingerprints(
            recipe, data=encoded.fingerprint, tokenizer=tokenizer_fingerprint(tokenizer), base=model.fingerprint,
            world_size=session.world_size, adapter=model.adapter,
        )  # fmt: skip
        features_or_tokens = frozen.run(final=final)
        features_or_tokens = Reference(model, module, recipe, tokenizer, session).add(features_or_tokens, final=final)
        loop = Loop(
            recipe, session, module, tokenizer, features_or_tokens, folder, fingerprints, on_validation,
            prepared.splits["train"],
        )  # fmt: skip
        with folders.locked(folder, session, new=not resume):
            checkpoint = None
            if resume:
                checkpoint, notes = session.run_on_main(lambda: resuming.find_checkpoint(folder, fingerprints, allow))
                for note in [*notes, *environment_changes(folder, session)]:
                    console.warn(note)
            folders.describe_run(folder, recipe, prepared.info, session)
            if session.is_main:
                stored_choices.write(folder, choices)
            session.start_trackers(recipe, folder)
            baselines = results.before_training(loop, model, prepared) if final else results.PreTrainingBaselines()
            loop.run(checkpoint)
            scores = results.after_training(loop, model, prepared, baselines, final=final)
            unsharded = _unsharded(model, loop, prepared.info) if final else model
            if session.is_main:
                results.write(folder, scores)
            if session.is_main and final:
                files.write_json(folder / run_report.ABOUT, overview)
                export_run(folder, unsharded, recipe, prepared, encoded, scores.metrics, scores.tuned)
                run_report.write(folder)
            session.accelerator.wait_for_everyone()
            session.accelerator.end_training()
    console.end(folder)
    return Run(folder, recipe)


def _data(recipe: Recipe, session: Session) -> tuple[PreTrainedTokenizerBase, PreparedData, EncodedData]:
    """Tokenizer and data."""
    with session.accelerator.main_process_first():  # then the others read its caches
        find_sources(recipe.data)  # missing data are reported before a model that cannot be had
        tokenizer = load_tokenizer(recipe.model)
        prepared = prepare(recipe)
        return tokenizer, prepared, encode(prepared, tokenizer, recipe)


def _settled(
    recipe: Recipe, session: Session, prepared: PreparedData, tokenizer: Any, resume: str | Path | bool | None
) -> tuple[Recipe, tuple[Choice, ...]]:
    """The recipe with a value for each field that it leaves to the run: the resumed run's, or chosen now."""
    restored: tuple[Choice, ...] = ()
    if resume:
        find = functools.partial(folders.find_run, recipe, resume)
        recipe, restored = session.run_on_main(lambda: stored_choices.restored(recipe, find()))
    recipe, chosen = choose(recipe, session, prepared, tokenizer)
    return recipe, (*restored, *chosen)


def _model(
    recipe: Recipe, session: Session, tokenizer: PreTrainedTokenizerBase, prepared: PreparedData, encoded: EncodedData
) -> tuple[Recipe, EncodedData, LoadedModel]:
    """The model; recipe and data without packing if it cannot separate packed rows."""
    with session.accelerator.main_process_first():
        model = build(recipe, prepared.info, tokenizer, session.device)
        packable, reason = packing.supports_packing(model.model) if recipe.task.packs else (True, "")
        if not packable:
            model.notes.append(f"rows are batched by length instead of packed: {reason}")
            recipe = replace(recipe, task=recipe.task.without_packing())
            encoded = encode(prepared, tokenizer, recipe)
    with session.accelerator.autocast():
        batches = FirstBatches(encoded.splits["train"], tokenizer, session)
        recipe.method.initialize(model, batches)
        head_of(prepared.info, recipe.task).initialize(model, batches)
    return recipe, encoded, model


def _unsharded(model: LoadedModel, loop: Loop, info: TaskInfo) -> LoadedModel:
    """The trained model to export; of a sharded one, an unsharded copy on the main process's CPU."""
    if not loop.session.sharded:
        return model
    weights = loop.weights.tensors()
    if not loop.session.is_main:
        return model
    copy = build(loop.recipe, info, loop.tokenizer, "cpu")
    trained = {name: parameter for name, parameter in copy.model.named_parameters() if parameter.requires_grad}
    sharding.load_full(trained, weights)
    return copy

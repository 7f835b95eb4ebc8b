"""The whole flow, in one function that can be read, copied and reordered.

run = peftkit.train(peftkit.get_recipe("bbc_news_lora"))
run.metrics["test"]["accuracy"], run.path
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.data.pipeline import EncodedData, PreparedData, encode, prepare
from peftkit.distributed import sharding
from peftkit.distributed.session import Session, open_session
from peftkit.errors import Interrupted, UserError
from peftkit.export.adapter import export_run
from peftkit.models import dtypes
from peftkit.models.loading import build
from peftkit.models.tokenizer import load_tokenizer, tokenizer_fingerprint
from peftkit.reporting import run_report
from peftkit.runs import folder as folders
from peftkit.runs.checkpoints import Checkpoint
from peftkit.schema.recipe import Recipe, replace
from peftkit.schema.types import LoadedModel
from peftkit.training import features, results
from peftkit.training.first_batches import FirstBatches
from peftkit.training.interruptions import guarded
from peftkit.training.loop import Loop, ValidationCallback
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
        """Final figures: by split, by baseline, and of the training itself."""
        return dict(json.loads((self.path / folders.METRICS).read_text()))

    @property
    def adapter(self) -> Path:
        """What was exported: ``adapter/``, or ``model/`` of a method that trains the base itself."""
        return self.path / self.recipe.method.saves

    def predict(self, texts: Any, **options: Any) -> Any:
        """Predictions of the trained model; see ``peftkit.load``."""
        from peftkit.inference.trained_model import load

        return load(self.path).predict(texts, **options)

    def _repr_html_(self) -> str:
        return run_report.fragment(self.path)


def train(
    recipe: Recipe,
    *,
    resume: str | Path | bool | None = None,
    allow: tuple[str, ...] = (),
    quiet: bool = False,
    on_validation: ValidationCallback | None = None,
    final: bool = True,
) -> Run:
    """Carries out a recipe, from data to exported adapter.

    Args:
        recipe: what to do.
        resume: a run's folder to go on with, or True for the newest of this recipe's name.
        allow: what may differ from the resumed run's checkpoint, by name ("data", "training.epochs").
        quiet: print no tables.
        on_validation: told the step and the figures of every validation; what it raises ends the run.
        final: False stops after training and validation: the test split stays unread, and nothing is exported.
            Resumed with True, such a run is finished without being trained again.

    Raises:
        UserError: something in the recipe, the data or the base is wrong; nothing is left behind.
        Interrupted: stopped by a signal or the time limit; resumable.
        TrainingError: loss or gradients were not finite, storage or memory gave out, or a process was lost.
    """
    dtypes.silence_libraries()
    session = open_session(recipe)
    with guarded(session):
        recipe, tokenizer, prepared, encoded, loaded = _data_and_model(recipe, session)
        module = TaskModule(loaded, recipe.task, prepared.info)
        frozen = features.plan(module, recipe, encoded, tokenizer, session, loaded.fingerprint)
        loaded.notes += [frozen.note] if frozen.note else []
        say = run_report.console_reporter(session, quiet=quiet)
        about = say.start(recipe, session, prepared, encoded, loaded)

        path = _folder(recipe, session, resume)
        session.folder = path
        fingerprints = folders.fingerprints(
            recipe, data=encoded.fingerprint, tokenizer=tokenizer_fingerprint(tokenizer), base=loaded.fingerprint,
            world_size=session.world_size,
        )  # fmt: skip
        rows = frozen.run(final=final)
        loop = Loop(
            recipe, session, module, tokenizer, rows, path, fingerprints, on_validation, prepared.splits["train"]
        )
        with folders.locked(path, session), _removed_if_unused(path, fresh=not resume):
            checkpoint = _go_on_from(path, fingerprints, allow, session, say) if resume else None
            folders.describe_run(path, recipe, prepared.info, session)
            session.start_trackers(recipe, path)
            before = results.before_training(loop, loaded, prepared) if final else results.PreTrainingBaselines()
            loop.run(checkpoint)
            splits = results.HELD_OUT if final else ("validation",)
            found = results.after_training(loop, loaded, prepared, before, splits)
            whole = _whole(loaded, loop, lambda: build(recipe, prepared.info, tokenizer, "cpu")) if final else loaded
            if session.is_main:
                results.write(path, found)
            if session.is_main and final:
                folders.write_json(path / run_report.ABOUT, about)
                export_run(path, whole, recipe, prepared, encoded, found.metrics)
                run_report.write(path)
            session.accelerator.wait_for_everyone()
            session.accelerator.end_training()
    say.end(path)
    return Run(path, recipe)


def _data_and_model(
    recipe: Recipe, session: Session
) -> tuple[Recipe, PreTrainedTokenizerBase, PreparedData, EncodedData, LoadedModel]:
    """What is learned from and what learns; without packing, where the model could not keep packed rows apart."""
    with session.accelerator.main_process_first():  # the others then read its caches
        tokenizer = load_tokenizer(recipe.model)
        prepared = prepare(recipe)
        encoded = encode(prepared, tokenizer, recipe)
        loaded = build(recipe, prepared.info, tokenizer, session.device)
        if not_packable(recipe, loaded):
            recipe = replace(recipe, task={"packing": False})
            encoded = encode(prepared, tokenizer, recipe)
    with session.accelerator.autocast():
        batches = FirstBatches(encoded.splits["train"], tokenizer, session)
        recipe.method.initialize(loaded, batches)
        recipe.task.initialize(loaded, batches, prepared.info)
    return recipe, tokenizer, prepared, encoded, loaded


def _folder(recipe: Recipe, session: Session, resume: str | Path | bool | None) -> Path:
    """The folder of the run to go on with, or a new one."""
    if resume:
        return session.run_on_main(lambda: folders.find_run(recipe, resume))
    return folders.new_folder(recipe, session)


def _whole(loaded: LoadedModel, loop: Loop, make: Callable[[], LoadedModel]) -> LoadedModel:
    """The trained model; of one in pieces a second one on the main process's CPU, made whole to be exported."""
    if not loop.session.sharded:
        return loaded
    weights = loop.weights.tensors()
    if not loop.session.is_main:
        return loaded
    made = make()
    sharding.load({name: held for name, held in made.model.named_parameters() if held.requires_grad}, weights)
    return made


def _go_on_from(path: Path, fingerprints: Any, allow: tuple[str, ...], session: Session, say: Any) -> Checkpoint | None:
    """The checkpoint to go on from; says what is not as it was. Only the main process reads."""
    checkpoint, said = session.run_on_main(lambda: folders.resumable(path, fingerprints, allow))
    for line in [*said, *folders.other_surroundings(path, session)]:
        say.warn(line)
    return checkpoint  # type: ignore[no-any-return]


def not_packable(recipe: Recipe, loaded: LoadedModel) -> bool:
    """Whether the recipe packs rows for a model that cannot keep them apart; batches by length do it then."""
    if not getattr(recipe.task, "packing", False):
        return False
    from peftkit.models.packing import supports_packing

    able, reason = supports_packing(loaded.model)
    if not able:
        loaded.notes.append(f"rows are batched by length and not packed: {reason}")
    return not able


@contextlib.contextmanager
def _removed_if_unused(path: Path, *, fresh: bool) -> Iterator[None]:
    """Removes a fresh folder when what was given turns out wrong, or a signal comes, before the first step."""
    try:
        yield
    except (UserError, Interrupted):
        if fresh and not (path / "checkpoints").exists():
            shutil.rmtree(path, ignore_errors=True)
        raise

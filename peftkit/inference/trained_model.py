"""A finished run, loaded and ready for use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from peftkit.data.batching import pass_tokens
from peftkit.data.pipeline import EncodedSplit, encode_rows
from peftkit.errors import MethodError, RunError, did_you_mean
from peftkit.evaluation import generation, runner
from peftkit.export import multi_adapter
from peftkit.export.folder import ExportFolder, open_export
from peftkit.export.loading import LoadedExport, load_exported
from peftkit.export.merging import MergeMode, MergeState
from peftkit.export.multi_adapter import AddedAdapter
from peftkit.inference import backends, embeddings
from peftkit.inference.backends import AUTO, Backend
from peftkit.inference.prompts import Conversation, as_prompt, as_prompts, generation_config
from peftkit.inference.texts import Text, as_texts, texts_of_columns
from peftkit.models import dtypes
from peftkit.models.json_files import read_json
from peftkit.models.loading import load_language_model
from peftkit.schema.head import Head, head_of
from peftkit.schema.recipe import GenerationConfig, Recipe
from peftkit.schema.recipe import replace as replace_fields
from peftkit.schema.types import Row, TaskInfo
from peftkit.system.memory import bound_kernel_cache
from peftkit.training import reference
from peftkit.training.step import TaskModule


@dataclass(frozen=True)
class LoadedRun(LoadedExport):
    """A trained model with everything needed to use it; ``path`` is the exported folder.

    ``model`` is the transformers model, or peft's wrapper around it, in evaluation mode. A single adapter is merged
    into the base when the run is first used; peft's wrapper is then gone.
    """

    metrics: dict[str, Any]
    """Final metrics by split."""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """Options of ``generate`` and ``stream`` in place of the recipe's ``evaluation.generation``."""
    others: dict[str, AddedAdapter] = field(default_factory=dict, repr=False)
    """Further adapters on the same base, by name."""
    merge_state: MergeState = field(default_factory=MergeState)
    """Whether the adapter is to be merged into the base in memory, and whether it was."""
    backend: Backend = field(default_factory=Backend)
    """What predicts: torch, or another runtime for which the run was exported."""

    @property
    def info(self) -> TaskInfo:
        """What the task learned about its data: labels, problem type."""
        return self.manifest.info

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that the active adapter was trained with."""
        other = self.others.get(self.adapter or "")
        return other.tokenizer if other else self.loaded.tokenizer

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters; "default" is the run's own."""
        return (multi_adapter.FIRST,) if self.merge_state.merged else multi_adapter.names(self.model)

    @property
    def adapter(self) -> str | None:
        """Name of the active adapter; None if the method trained the base itself."""
        return multi_adapter.FIRST if self.merge_state.merged else multi_adapter.active(self.model)

    @property
    def head(self) -> Head:
        """The head, with the task's options."""
        return head_of(self.info, self.recipe.task, self.manifest.tuned)

    @property
    def labels(self) -> tuple[str, ...]:
        """Label names by id."""
        return self.info.labels

    def predict(
        self, texts: Text | Sequence[Text] | None = None, *, batch_size: int | None = None,
        threshold: float | None = None, **columns: str | Sequence[str],
    ) -> list[Any]:  # fmt: skip
        """A ``Prediction`` for each text in order.

        Or a ``Tagged`` from token classification, an ``Answer`` to a question, a ``Filled`` with tokens for each mask,
        a ``Ranked`` from reranking, whose rank is among the texts of the call with the same query.

        Args:
            texts: texts, or (text, text pair) tuples; a single text is a list of one.
            batch_size: texts per batch, grouped by length; None takes ``data.batching.EVALUATION_ROWS``.
            threshold: probability from which a multi-label task predicts a label, and over which a question has no
                answer; None takes the task's own.
            columns: in place of ``texts``, a text or texts for each column that the recipe reads:
                ``predict(question="Who was born?", context="Ada was born in London.")``.

        Raises:
            RunError: the run is a language model.
            DataError: something that is not a text; columns that the recipe does not read, or not all of them.
        """
        if columns or texts is None:
            texts = texts_of_columns(columns, self._recipe.task.input_columns(self._recipe.data), texts)
        asked = as_texts(texts, self._text_counts)
        rows = self.input_rows(asked)
        if not rows:
            return []
        self.choose_backend(rows)
        answers = self.head.answers(self._outputs(rows, batch_size), rows, self.tokenizer, threshold)
        return self.head.complete_answers(answers, asked)

    def logits(self, texts: Text | Sequence[Text], *, batch_size: int | None = None) -> np.ndarray:
        """Scores [texts, labels] fp32 before softmax or sigmoid; see ``predict``.

        Raises:
            RunError: the run is a language model, or scores words rather than texts.
        """
        rows = self.input_rows(as_texts(texts, self._text_counts))
        self.choose_backend(rows)
        if not rows:
            return np.zeros((0, self.head.width), dtype=np.float32)
        outputs = self._outputs(rows, batch_size)
        if "logits" not in outputs:
            raise RunError(f"{self.path}: this model scores words, not texts; use predict")
        return outputs["logits"]

    @property
    def _text_counts(self) -> set[int]:
        """How many texts may be read together."""
        return {2, len(self._recipe.task.input_columns(self._recipe.data))}

    def input_rows(self, texts: Sequence[Text]) -> list[Row]:
        """Canonical rows without answers; raises RunError for a language model."""
        if self.head.writes_text:
            raise RunError(f"{self.path}: a language model has no labels to predict; use generate, or `peftkit chat`")
        return [self._recipe.task.input_row((text,) if isinstance(text, str) else text) for text in texts]

    def _outputs(self, rows: list[Row], batch_size: int | None) -> dict[str, np.ndarray]:
        """The head's outputs, by name, for each example of the rows."""
        return self.outputs(self._encode(rows), batch_size)

    def outputs(self, split: EncodedSplit, batch_size: int | None) -> dict[str, np.ndarray]:
        """The head's outputs, by name, for each example of an encoded split.

        A head that compares with the untrained model gets that one's outputs first: from the base with the adapter off,
        or, where the method trained the base itself, from the base loaded once more.
        """
        if self.backend.runtime is not None:
            return dict(self.backend.runtime.outputs(split, batch_size))
        if self.head.reference_splits() and len(split.lengths):
            split = self._with_reference(split, batch_size)
        self.merge()
        module = TaskModule(self.loaded, self.head)
        options = self._passes(batch_size)
        outputs = runner.predict(module, split, self.tokenizer, unpadded=module.unpadded, **options)
        return dict(self.head.complete(outputs))

    def choose_backend(self, rows: Sequence[Row], total: int | None = None) -> Backend:
        """Chooses what predicts from now on, where that was left open and there are enough rows to measure it on.

        ``predict`` and ``logits`` call it. To choose for rows that come in parts, call it with the first of them and
        their ``total``; see ``inference.backends``.
        """
        total, backend = len(rows) if total is None else total, self.backend
        if not backend.pending or total < backends.FEWEST or 0 < backend.seconds * total < backends.WORTHWHILE:
            return backend
        if self.others or self.merge_state.mode is False or next(self.model.parameters()).device.type != "cpu":
            return self.use_backend(backends.TORCH, "other runtimes run on a CPU, with a single adapter merged")
        half = dtypes.dtype_for(self.recipe.model, "cpu").itemsize < 4
        usable, problems = backends.candidates(self, half_precision=half)
        if not usable:
            return self.use_backend(backends.TORCH, "; ".join(problems) or "this run has no export for another runtime")
        glance = rows[: backends.GLANCE]
        backend.seconds = backends.seconds_of(self._predict_probe, self._encode(glance)) / len(glance)
        if (seconds := backend.seconds * total) < backends.WORTHWHILE:
            tried = f"others are tried from {backends.WORTHWHILE:g} s"
            backend.reason = f"{total} texts take about {seconds:.1f} s; {tried}"
            return backend
        runtimes: dict[str, LoadedRun] = {}

        def open_runtime(name: str) -> backends.Predict:
            runtimes[name] = load(usable[name].folder)
            return runtimes[name]._predict_probe

        probe, tolerances = rows[: backends.PROBE], {name: each.tolerance for name, each in usable.items()}
        name, reason = backends.fastest(self._predict_probe, tolerances, open_runtime, self._encode(probe), len(probe))
        return self.use_backend(name, "; ".join([reason, *problems]), runtimes.get(name))

    def _predict_probe(self, split: EncodedSplit) -> dict[str, np.ndarray]:
        return self.outputs(split, None)

    def _encode(self, rows: Sequence[Row]) -> EncodedSplit:
        return encode_rows(list(rows), self.tokenizer, self._recipe, self.info)

    def use_backend(self, name: str, reason: str = "", runtime: LoadedRun | None = None) -> Backend:
        """Predicts with that backend from now on; ``runtime`` is its export, where it is loaded already.

        Raises:
            RunError: an unknown backend, or no proven export of this run for it.
        """
        backend = self.backend
        if name != backend.name:
            if name != backends.own(self) and runtime is None:
                runtime = load(backends.open_backend(self, name), backend=name)
            backend.name, backend.runtime = name, runtime
        backend.pending, backend.reason = False, reason or backend.reason
        return backend

    def _passes(self, batch_size: int | None) -> dict[str, Any]:
        """Options of ``runner.predict``."""
        device = next(self.model.parameters()).device
        dtype = dtypes.dtype_for(self.recipe.model, device)
        return {
            "device": device, "batch_size": batch_size, "tokens": pass_tokens(self.recipe.training, device.type),
            "autocast": lambda: dtypes.autocast(dtype, device),
        }  # fmt: skip

    def _with_reference(self, split: EncodedSplit, batch_size: int | None) -> EncodedSplit:
        """The split with what the untrained model makes of it."""
        options = self._passes(batch_size)
        if self.adapters:
            with self.base():
                module = TaskModule(self.loaded, self.head)
                stored = reference.reference_outputs(module, split, self.tokenizer, **options)
        else:
            trained_on = {"source": self.manifest.source, "revision": self.manifest.revision}
            recipe = replace_fields(self.recipe, model=trained_on)
            base = replace(self.loaded, model=load_language_model(recipe, options["device"]))
            stored = reference.reference_outputs(TaskModule(base, self.head), split, self.tokenizer, **options)
        return reference.ReferenceSplit.with_outputs(split, stored)

    def embed(
        self, texts: Text | Sequence[Text], *, normalize: bool = False, batch_size: int | None = None
    ) -> np.ndarray:
        """Vectors [texts, width] fp32 of texts, with the model's own pooling; see ``inference.embeddings``.

        Raises:
            RunError: the method puts learned tokens before a text.
            DataError: something that is not a text.
        """
        runtime = self.backend.runtime
        if runtime is not None and self.head.onnx_output == "vectors":
            return runtime.embed(texts, normalize=normalize, batch_size=batch_size)
        self.merge()
        return embeddings.of_run(self).embed(texts, normalize=normalize, batch_size=batch_size)

    def generate(
        self,
        prompts: str | Conversation | Sequence[str | Conversation],
        *,
        batch_size: int = 8,
        numbers: Sequence[int] | None = None,
        **options: Any,
    ) -> list[str]:
        """The text that follows each prompt, in the prompts' order.

        Args:
            prompts: texts or conversations (lists of ``{"role": …, "content": …}`` that end with the user's turn); a
                single one is a list of one. A run of instruction tuning answers a text as the user's question, after
                the recipe's ``data.system``; one of style continues it.
            batch_size: prompts per batch.
            numbers: seeds each prompt's sampling, if these prompts are some of many; None counts from 0.
            options: fields of ``evaluation.generation`` (max_new_tokens, temperature, top_p, top_k,
                repetition_penalty, seed); the others are the recipe's.

        Raises:
            RunError: the run is a classifier.
            RecipeError: an unknown option, or a value that it cannot have.
            DataError: a conversation with an unknown role, or without a question.
            ModelError: a prompt is empty or longer than the model's context, or there is no chat template.
        """
        config, inputs = self._generation(options), as_prompts(prompts, self._recipe)
        self.merge()
        return generation.generate(self.model, self.tokenizer, inputs, config, batch_size=batch_size, numbers=numbers)

    def stream(self, messages: str | Conversation, **options: Any) -> Iterator[str]:
        """Yields the answer to one conversation, or the continuation of one text, in chunks; see ``generate``."""
        config, prompt = self._generation(options), as_prompt(messages, self._recipe)
        self.merge()
        return generation.stream(self.model, self.tokenizer, prompt, config)

    def _generation(self, options: Mapping[str, Any]) -> GenerationConfig:
        """The options of generation; raises RunError for a run that writes no text."""
        if not self.head.writes_text:
            raise RunError(
                f"{self.path}: task.kind={self.manifest.task} writes no text; use predict, or `peftkit predict`"
            )
        return generation_config(self._recipe, {**self.generation, **options})

    def configured(self, **options: Any) -> LoadedRun:
        """The same model with other defaults for ``generate`` and ``stream``; raises RecipeError as they do."""
        generation_config(self._recipe, options)
        return replace(self, generation={**self.generation, **options})

    def add_adapter(self, path: str | Path, name: str) -> None:
        """Loads the adapter of another run on the same base; ``use_adapter`` switches to it.

        Raises:
            RunError: ``path`` is not a finished run, or the name is taken or cannot be used.
            ModelError: the adapter is not for this base, has another head or method, or is damaged.
        """
        added = multi_adapter.read(Path(path), name, first=self.manifest, taken=self.adapters)
        self.unmerge()
        multi_adapter.attach(self.model, added)
        self.others[name] = added

    def use_adapter(self, name: str) -> None:
        """Switches to an adapter; raises RunError if none has that name."""
        if name not in self.adapters:
            raise RunError(f"no adapter is called '{name}': {did_you_mean(name, self.adapters)}")
        if not self.merge_state.merged:  # otherwise it is the only one
            multi_adapter.activate(self.model, name)

    @contextmanager
    def base(self) -> Iterator[LoadedRun]:
        """Turns the adapter off within the block, so that the base answers: ``with run.base(): run.generate(…)``.

        Raises:
            RunError: the method trained the base itself, so that there is no adapter to turn off.
        """
        if not self.adapters:
            raise RunError(f"{self.path}: method '{self.manifest.method}' trained the base itself; there is no adapter")
        self.unmerge()
        with multi_adapter.disabled(self.model):
            yield self

    def merge(self) -> None:
        """Merges the only adapter into the base, in memory, as ``load``'s ``merge`` says; done at the first use.

        Raises:
            MethodError: the run was loaded with merge=True and cannot be merged.
        """
        if self.merge_state.is_pending(self.model):
            quantized = self.manifest.quantization is not None
            self.loaded.model = self.merge_state.merge(self.model, quantized=quantized, reload=self._reload)

    def unmerge(self) -> None:
        """Separates base and adapter, by loading them again; they are not merged any more."""
        if self.merge_state.merged:
            self._reload()
        self.merge_state.merged, self.merge_state.mode = False, False
        if self.backend.runtime is not None:  # which has the adapter merged
            self.use_backend(backends.TORCH)

    def _reload(self) -> Any:
        device = str(next(self.model.parameters()).device)
        self.loaded.model = load_exported(self, device=device).model
        return self.model

    @property
    def _recipe(self) -> Recipe:
        """The recipe of the active adapter."""
        other = self.others.get(self.adapter or "")
        return other.recipe if other else self.recipe


def load(
    path: str | Path | ExportFolder,
    *,
    device: str | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    merge: MergeMode = "auto",
    backend: str | None = AUTO,
) -> LoadedRun:
    """Loads a finished run, or an exported folder.

    Args:
        path: a run's folder, its ``adapter/`` or ``model/``, or a copy of one on another machine.
        device: "cpu", "cuda", "cuda:1", …; None takes CUDA if there is one.
        adapters: other runs on the same base, by the name under which ``use_adapter`` finds them.
        merge: whether a single adapter is merged into the base in memory at the first use, which saves its matmuls.
            "auto" merges if the method allows it, the base is not quantized, and rounding keeps most of the adapter;
            ``base``, ``use_adapter`` and ``add_adapter``, which need it unmerged, load the weights again.
        backend: what predicts: torch; onnx or onnx-int8, for which the run must have been exported into its folder; or
            auto, the fastest of those, measured once on the first texts if there are hundreds of them, else torch.
            None is torch, or the runtime that the folder itself was exported for.

    Raises:
        RunError: not a finished run of peftkit, a name that cannot be used, or no proven export for the backend.
        MethodError: merge=True with several adapters.
        ModelError: the base is missing or another than the one trained on, weights are pickled or damaged, or the
            head does not fit the labels.
    """
    bound_kernel_cache()  # texts have many lengths
    export = path if isinstance(path, ExportFolder) else open_export(path)
    chosen = backends.open_backend(export, backend)
    if chosen is not export and (adapters or merge is False):
        raise RunError(f"an export for '{backend}' has its adapter merged; use backend=torch with others, or unmerged")
    export = chosen
    if merge is True and adapters:
        raise MethodError("several adapters on one base cannot be merged into it; leave merge at 'auto'")
    others: dict[str, AddedAdapter] = {}
    for name, other in (adapters or {}).items():
        taken = [multi_adapter.FIRST, *others]
        others[name] = multi_adapter.read(Path(other), name, first=export.manifest, taken=taken)
    run = load_exported(export, device=device, offloaded=True)
    for added in others.values():
        multi_adapter.attach(run.model, added)
    file = export.path / "metrics.json"
    metrics = read_json(file) if file.is_file() else {}
    own = backends.own(export)
    return LoadedRun(
        run.path, run.manifest, run.recipe, run.loaded, metrics, others=others, merge_state=MergeState(merge),
        backend=Backend(own, pending=backend == AUTO and own == backends.TORCH),
    )  # fmt: skip

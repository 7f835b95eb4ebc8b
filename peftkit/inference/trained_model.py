"""A finished run, loaded and ready for use.

model = peftkit.load("runs/bbc_news_lora-20260101-120000")
model.predict(["The striker scored twice."])[0].label

model = peftkit.load("runs/style_kjv_lora-…", adapters={"shakespeare": "runs/style_shakespeare_lora-…"})
model.generate("In the beginning", max_new_tokens=40)
model.use_adapter("shakespeare")
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from peftkit.errors import DataError, MethodError, RecipeError, RunError, did_you_mean
from peftkit.export import manifest, switching
from peftkit.export.in_memory import LOST, Merge, Merging, merge_in_memory
from peftkit.export.loading import find_export, load_exported
from peftkit.export.manifest import Manifest
from peftkit.export.switching import AddedAdapter
from peftkit.models import dtypes
from peftkit.models.sources import read_json
from peftkit.schema.head import Head, head_of
from peftkit.schema.recipe import GenerationConfig, Recipe
from peftkit.schema.types import LoadedModel, Prediction, Row, TaskInfo
from peftkit.schema.validation import describe

Text = str | tuple[str, str]
Conversation = Sequence[Mapping[str, str]]
NOT_OPTIONS = ("samples", "prompts")
"""Fields of GenerationConfig that say what is generated in an evaluation, and not how."""


@dataclass(frozen=True)
class LoadedRun:
    """A trained model with everything needed to use it."""

    path: Path
    """The exported folder."""
    loaded: LoadedModel
    recipe: Recipe
    info: TaskInfo
    about: Manifest
    metrics: dict[str, Any]
    """Final figures by split."""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """What ``generate`` and ``stream`` take in place of the recipe's ``evaluation.generation``."""
    others: dict[str, AddedAdapter] = field(default_factory=dict, repr=False)
    """Further adapters on the same base, by name."""
    merging: Merging = field(default_factory=Merging)
    """Whether a lone adapter is merged into the base in memory when it is first used."""

    @property
    def model(self) -> Any:
        """The transformers model, or peft's wrapper around it, in evaluation mode.

        A lone adapter is merged when the run is first used; peft's wrapper is then gone.
        """
        return self.loaded.model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that the adapter in use was trained with."""
        other = self.others.get(self.adapter or "")
        return other.tokenizer if other else self.loaded.tokenizer

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that can be switched between; "default" is the run's own."""
        return (switching.FIRST,) if self.merging.done else switching.names(self.model)

    @property
    def adapter(self) -> str | None:
        """The adapter in use; None where the method trained the base itself."""
        return switching.FIRST if self.merging.done else switching.active(self.model)

    @property
    def head(self) -> Head:
        """The head, with the task's options."""
        return head_of(self.info, self.recipe.task)

    @property
    def labels(self) -> tuple[str, ...]:
        """Label names by id."""
        return self.info.labels

    def predict(
        self, texts: Text | Sequence[Text], *, batch_size: int | None = None, threshold: float | None = None
    ) -> list[Prediction]:
        """Predictions in the order of the texts.

        Args:
            texts: texts, or (text, text pair) tuples; a single one is taken as a list of one.
            batch_size: texts per batch, grouped by length; None takes ``data.batching.EVALUATION_ROWS``.
            threshold: probability from which a label of a multi-label task holds; None takes the task's own.

        Raises:
            RunError: the run is a language model.
            DataError: something that is not a text.
        """
        return self.head.predictions(self._outputs(texts, batch_size), threshold)

    def logits(self, texts: Text | Sequence[Text], *, batch_size: int | None = None) -> np.ndarray:
        """Scores [texts, labels] fp32 before softmax or sigmoid; see ``predict``."""
        return self._outputs(texts, batch_size)["logits"]

    def _outputs(self, texts: Text | Sequence[Text], batch_size: int | None) -> dict[str, np.ndarray]:
        """What the head makes of each text."""
        from peftkit.data.batching import pass_tokens
        from peftkit.data.pipeline import encode_rows
        from peftkit.evaluation import runner
        from peftkit.training.step import TaskModule

        if self.head.writes_text:
            raise RunError(f"{self.path}: a language model has no labels to predict; use generate, or `peftkit chat`")
        self.merge()
        rows = list(_rows(texts, self._recipe))
        if not rows:
            return {"logits": np.zeros((0, self.head.width), dtype=np.float32)}
        split = encode_rows(rows, self.tokenizer, self._recipe, self.info)
        device = next(self.model.parameters()).device
        dtype = dtypes.dtype_for(self.recipe.model, device)
        return runner.predict(
            TaskModule(self.loaded, self.head), split, self.tokenizer, device=device,
            batch_size=batch_size, tokens=pass_tokens(self.recipe.training, device.type),
            autocast=lambda: dtypes.autocast(dtype, device),
        )  # fmt: skip

    def embed(
        self, texts: Text | Sequence[Text], *, normalize: bool = False, batch_size: int | None = None
    ) -> np.ndarray:
        """Vectors [texts, width] fp32 of texts, with the model's own pooling; see ``inference.embeddings``.

        Raises:
            RunError: the method puts learned tokens before a text.
            DataError: something that is not a text.
        """
        from peftkit.inference import embeddings

        self.merge()
        return embeddings.of_run(self).embed(
            texts if isinstance(texts, str) else list(texts), normalize=normalize, batch_size=batch_size
        )

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
                single one is taken as a list of one. A run of instruction tuning answers a text as the user's
                question, with the recipe's ``data.system`` before it; one of style continues it.
            batch_size: prompts that are continued together.
            numbers: each prompt's own, by which its noise is drawn, where these prompts are some of many; None counts
                from 0.
            options: fields of ``evaluation.generation`` (max_new_tokens, temperature, top_p, top_k,
                repetition_penalty, seed); the rest stays as in the recipe.

        Raises:
            RunError: the run is a classifier.
            RecipeError: an option that there is none of, or a value that it cannot have.
            DataError: a conversation with an unknown role, or without a question.
            ModelError: a prompt is empty or longer than the model reads, or there is no chat template.
        """
        from peftkit.evaluation import generation

        self._check_writes()
        config = generation_config(self._recipe, {**self.generation, **options})
        asked = [as_prompt(one, self._recipe, f"prompt {n}: ") for n, one in enumerate(_prompts(prompts), 1)]
        self.merge()
        return generation.generate(self.model, self.tokenizer, asked, config, batch_size=batch_size, numbers=numbers)

    def stream(self, messages: str | Conversation, **options: Any) -> Iterator[str]:
        """The answer to one conversation, or what follows one text, piece by piece; see ``generate``."""
        from peftkit.evaluation import generation

        self._check_writes()
        config = generation_config(self._recipe, {**self.generation, **options})
        asked = as_prompt(messages, self._recipe)
        self.merge()
        return generation.stream(self.model, self.tokenizer, asked, config)

    def configured(self, **options: Any) -> LoadedRun:
        """The same model with other defaults for ``generate`` and ``stream``; raises RecipeError as they do."""
        generation_config(self._recipe, options)
        return replace(self, generation={**self.generation, **options})

    def add_adapter(self, path: str | Path, name: str) -> None:
        """Loads another run's adapter beside this one, on the same base; ``use_adapter`` switches to it.

        Raises:
            RunError: ``path`` is not a finished run, or the name is taken or cannot be used.
            ModelError: the adapter is not for this base, has another head or method, or is damaged.
        """
        added = switching.read(Path(path), name, self.about, self.adapters)
        self.unmerge()
        switching.attach(self.model, added)
        self.others[name] = added

    def use_adapter(self, name: str) -> None:
        """Predicts and writes with that adapter from now on; raises RunError when none has that name."""
        switching.check_known(name, self.adapters)
        if not self.merging.done:  # the one that was merged is in use
            switching.use(self.model, name)

    @contextmanager
    def base(self) -> Iterator[LoadedRun]:
        """Within it the adapter is off, and the base model answers: ``with run.base(): run.generate(…)``.

        Raises:
            RunError: the method trained the base itself, so that there is nothing to take off.
        """
        if not self.adapters:
            raise RunError(f"{self.path}: method '{self.about.method}' trained the base itself; there is no adapter")
        self.unmerge()
        with switching.disabled(self.model):
            yield self

    def merge(self) -> None:
        """Merges a lone adapter into the base, in memory only, as ``load``'s ``merge`` says; done at the first use.

        Raises:
            MethodError: the run was loaded with merge=True and cannot be merged.
        """
        merging = self.merging
        if not merging.due(self.model):
            return
        merging.check(self.model, quantized=self.about.quantization is not None)
        if merging.reason:
            return
        try:
            merged, lost = merge_in_memory(self.model)
        except MethodError as error:
            self._reload_base()
            merging.refuse(str(error))
            return
        if lost > LOST and merging.wanted == "auto":
            self._reload_base()
            merging.refuse(f"rounding would take {lost:.0%} of what was learned")
            return
        self.loaded.model, merging.done = merged, True

    def unmerge(self) -> None:
        """Takes base and adapter apart again, by reading them anew; from now on they stay so."""
        if self.merging.done:
            self._reload_base()
        self.merging.done, self.merging.wanted = False, False

    def _reload_base(self) -> None:
        device = str(next(self.model.parameters()).device)
        self.loaded.model = load_exported(self.path, device=device).loaded.model

    @property
    def _recipe(self) -> Recipe:
        """The recipe of the adapter in use."""
        other = self.others.get(self.adapter or "")
        return other.recipe if other else self.recipe

    def _check_writes(self) -> None:
        if not self.head.writes_text:
            raise RunError(f"{self.path}: a classifier writes no text; use predict, or `peftkit predict`")


def load(
    path: str | Path,
    *,
    device: str | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    merge: Merge = "auto",
) -> LoadedRun:
    """Loads a finished run, or an exported folder.

    Args:
        path: a run's folder, its ``adapter/`` or ``model/``, or a copy of that on another machine.
        device: "cpu", "cuda", "cuda:1", …; None takes CUDA where there is one.
        adapters: other runs on the same base by the name under which ``use_adapter`` finds them.
        merge: whether a lone adapter is merged into the base in memory at the first use, which saves its products.
            "auto": where the method can be merged, the base is not quantized, and rounding leaves the adapter whole;
            what needs the adapter apart (``base``, ``use_adapter``, ``add_adapter``) reads the weights anew.

    Raises:
        RunError: not a finished run of peftkit, or a name that cannot be used.
        MethodError: merge=True with several adapters.
        ModelError: the base is missing or another than the one trained on, weights are pickled or damaged, or the
            head does not fit the labels.
    """
    first = manifest.read(find_export(Path(path)))
    if merge is True and adapters:
        raise MethodError("several adapters on one base cannot be merged into it; leave merge at 'auto'")
    others: dict[str, AddedAdapter] = {}
    for name, other in (adapters or {}).items():
        others[name] = switching.read(Path(other), name, first, [switching.FIRST, *others])
    exported = load_exported(path, device=device)
    for added in others.values():
        switching.attach(exported.loaded.model, added)
    file = exported.folder / "metrics.json"
    metrics = read_json(file) if file.is_file() else {}
    return LoadedRun(
        exported.folder, exported.loaded, exported.recipe, exported.about.info, exported.about, metrics, others=others,
        merging=Merging(merge),
    )  # fmt: skip


def generation_config(recipe: Recipe, options: Mapping[str, Any]) -> GenerationConfig:
    """The recipe's ``evaluation.generation`` with options put over it.

    Raises:
        RecipeError: an option that there is none of (the nearest is named), or a value that it cannot have.
    """
    known = [name for name in GenerationConfig.model_fields if name not in NOT_OPTIONS]
    for name in options:
        if name not in known:
            raise RecipeError(f"generation has no option '{name}': {did_you_mean(name, known)}")
    try:
        return GenerationConfig.model_validate({**recipe.evaluation.generation.model_dump(), **options})
    except ValidationError as error:
        raise RecipeError(describe(error, "generation")) from None


def as_prompt(prompt: str | Conversation, recipe: Recipe, where: str = "") -> str | list[dict[str, str]]:
    """A prompt as the run was trained to read it: a text as it is, or turns under the recipe's system prompt.

    Raises:
        DataError: neither a text nor a conversation that awaits an answer; ``where`` opens the message.
    """
    from peftkit.tasks import conversation

    if isinstance(prompt, str):
        prompt = recipe.task.as_prompt(prompt)
        if isinstance(prompt, str):
            return prompt
    try:
        return conversation.read_open(prompt, "messages", recipe.data.system)
    except DataError as error:
        raise DataError(f"{where}{error.message}") from None


def _prompts(given: Any) -> list[str | Conversation]:
    """Several prompts; a text, or a list of turns, is a single one."""
    if isinstance(given, str):
        return [given]
    prompts = list(given)
    return [prompts] if prompts and isinstance(prompts[0], Mapping) else prompts


def _rows(texts: Text | Sequence[Text], recipe: Recipe) -> Iterator[Row]:
    """Canonical rows without labels; a lone (text, pair) tuple cannot be told from two texts, and is two texts."""
    given = [texts] if isinstance(texts, str) else list(texts)
    lengths = {2, len(recipe.task.input_columns(recipe.data))}
    for place, text in enumerate(given):
        if place and isinstance(text, str) != isinstance(given[0], str):
            raise DataError(f"text {place}: texts and (text, text pair) tuples are mixed; give one kind in a call")
        if isinstance(text, str):
            yield recipe.task.input_row((text,))
        elif isinstance(text, (tuple, list)) and len(text) in lengths and all(isinstance(part, str) for part in text):
            yield recipe.task.input_row(text)
        else:
            raise DataError(
                f"text {place}: expected a text or (text, text pair), found {type(text).__name__} {text!r:.60}"
            )

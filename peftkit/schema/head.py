"""The contract of a head: the output side of a model, from the last layer to the metrics.

A task reads rows and names a head for them (``TaskInfo.problem_type``); everything that happens after the rows are
tokenized is asked of the head: which transformers class is loaded, loss, predictions, metrics, and what planning,
reports, exports and the model card say about it. Heads are registered in ``HEADS``, one file each in
``peftkit/heads``, or in an installed distribution under the entry-point group ``peftkit.heads``. A head that gives
each row one answer from logits extends ``peftkit.heads.classifier.Classifier``, which does most of this.

Like methods and tasks, heads import torch, numpy and transformers only inside the functions that need them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peftkit.schema.registries import HEADS
from peftkit.schema.types import Answer, Batch, Filled, LoadedModel, Prediction, Ranked, Row, Tagged, TaskInfo

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from peftkit.schema.recipe import EvaluationConfig
    from peftkit.schema.task import Task

Statistics = Callable[["np.ndarray"], Mapping[str, float]]
"""Row numbers, repeats allowed → the metrics of these rows, for the bootstrap."""
Outputs = Mapping[str, "np.ndarray"]
"""What ``Head.outputs`` returned for every example of a split, in order."""


@dataclass(frozen=True)
class StoredPredictions:
    """A split's predictions, read back from ``predictions/SPLIT.jsonl``."""

    gold: np.ndarray
    """[rows] or [rows, labels]: what the rows ask for; equal in runs that are compared."""
    statistics: Statistics
    right: np.ndarray | None = None
    """[rows] whether the answer is right, for McNemar's test; None compares all metrics by the paired bootstrap."""


@dataclass(frozen=True)
class Head(ABC):
    """What a model's output means: how it is learned, scored and used. Fields after ``info`` are the head's options."""

    info: TaskInfo

    adds_layers: ClassVar[bool] = True
    """Whether new layers on top of the base are trained, and saved in full; else the base's own output is used."""
    pools: ClassVar[bool] = False
    """Whether the tokens of a row become one vector, as ``model.pooling`` says."""
    embeds: ClassVar[bool] = False
    """Whether that vector is the answer itself, so that it is pooled as the base's own sentence embeddings are."""
    compares_rows: ClassVar[bool] = False
    """Whether the loss compares the rows of a global batch with each other: see ``vectors`` and ``batch_loss``."""
    scores_tokens: ClassVar[bool] = False
    """Whether the loss is over tokens, so that an example's ``weight`` counts its scored tokens."""
    writes_text: ClassVar[bool] = False
    """Whether the model generates text, rather than predicting something about its input."""
    encodes_source: ClassVar[bool] = False
    """Whether an encoder reads the text and a decoder writes another one: encoder–decoder models only."""
    marks_words: ClassVar[bool] = False
    """Whether its answers are spans of the text."""
    fills_masks: ClassVar[bool] = False
    """Whether its answers are tokens for the masked places of the text."""
    ranks: ClassVar[bool] = False
    """Whether its answers order texts among each other, so that those of a file are needed at once."""
    baselines: ClassVar[tuple[str, ...]] = ("majority", "zero_shot")
    """Baselines that results are compared with where the recipe names none."""
    class_unit: ClassVar[Literal["rows", "words"]] = "rows"
    """What ``class_counts`` counts."""
    completes: ClassVar[bool] = False
    """Whether output layers that the checkpoint lacks are added, trained and saved in full, rather than an error."""
    predicts_next: ClassVar[bool] = True
    """Of a loss over tokens: whether a token is predicted at the position before it, rather than at its own."""
    measures: ClassVar[tuple[str, ...]] = ()
    """What ``loss_and_measures`` reports of training besides the loss, for the log."""
    sums_batches: ClassVar[bool] = False
    """Whether the loss of a row needs a number of its whole global batch; see ``batch_sums``."""
    best_metric: ClassVar[str] = "loss"
    """The validation metric by which the best checkpoint is chosen where the recipe names none."""
    model_inputs: ClassVar[tuple[str, ...]] = ("input_ids", "token_type_ids", "attention_mask")
    """What the model reads of a batch when an export is compared with it."""
    proof_rows: ClassVar[int] = 16
    """Held-out examples on which an export is compared with the trained model."""
    proof_tokens: ClassVar[int | None] = None
    """Tokens of each of these examples; None for all."""
    onnx: ClassVar[bool] = False
    """Whether ``plain_logits`` can be exported to ONNX."""
    onnx_output: ClassVar[Literal["logits", "vectors"]] = "logits"
    """What an ONNX file gives: ``logits``, or the pooled hidden states of each text."""
    pipeline_tag: ClassVar[str] = "other"
    """The Hugging Face hub's name for such models, in the model card."""

    # -- the model -------------------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def auto_class(cls, pooling: str) -> str:
        """Name of the transformers class that loads base and head."""

    @property
    def width(self) -> int:
        """Rows of the last new layer's weight."""
        return len(self.info.labels) or 1

    def configure(self, config: PreTrainedConfig) -> None:  # noqa: B027
        """Sets what the base's configuration must say about the head (``num_labels``, ``id2label``, …)."""

    def initialize(self, loaded: LoadedModel, batches: Sequence[Batch]) -> None:  # noqa: B027
        """Called once after the method's own ``initialize``, on every process alike, and again on resume."""

    # -- training --------------------------------------------------------------------------------------------------

    def collate(self, columns: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase) -> Batch | None:
        """Columns of examples → padded tensors; None leaves it to ``data.batching.collate``."""
        return None

    def for_epoch(self, seed: int, epoch: int) -> Head:
        """The head that collates the training batches of an epoch: another one where they differ by epoch.

        What is drawn must be a pure function of seed, epoch and row, so that a resumed run draws the same.
        """
        return self

    def row_weights(self, columns: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase) -> Sequence[float]:
        """What each row adds to the loss's denominator, where that depends on the epoch; else its ``weight``."""
        return list(columns["weight"])

    @abstractmethod
    def loss(self, model: torch.nn.Module, batch: Batch, pooling: str) -> torch.Tensor:
        """The loss summed over the batch's scored examples or tokens (a scalar; the caller divides once)."""

    def loss_and_measures(
        self, model: torch.nn.Module, batch: Batch, pooling: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``loss``, and for each of ``measures`` a sum and what divides it, [measures, 2], without gradient.

        Both are added up over the global batch and divided once.
        """
        import torch

        loss = self.loss(model, batch, pooling)
        return loss, torch.zeros(0, 2, device=loss.device)

    def batch_sums(self, model: torch.nn.Module, batch: Batch, pooling: str) -> torch.Tensor:
        """Sums over the rows, [n], where ``sums_batches``: called without gradient before a step's backward passes.

        Those of the whole global batch are then ``batch["batch_sums"]`` of every micro-batch, so that accumulation and
        the number of processes do not change the loss.
        """
        raise NotImplementedError(f"{type(self).__name__} sums nothing over a batch")

    @abstractmethod
    def outputs(self, model: torch.nn.Module, batch: Batch, pooling: str) -> dict[str, torch.Tensor]:
        """What evaluation needs of each row, first dimension = rows; always ``loss`` and ``weight`` [rows] fp32."""

    def vectors(self, model: torch.nn.Module, batch: Batch, pooling: str) -> torch.Tensor:
        """[texts, width] fp32: what ``batch_loss`` compares; for a head that ``compares_rows``.

        A global batch of several micro-batches whose activations are not kept (``data.batching.keeps_graphs``) is
        embedded twice: first without gradients, so that the loss of the whole batch and its gradient by these vectors
        are known, then each micro-batch with it (GradCache, Gao et al. 2021, arXiv:2101.06983). The gradient of the
        weights is that of the whole batch at once.
        """
        raise NotImplementedError

    def batch_loss(self, vectors: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The loss of a global batch from its vectors, × the sum of its weights (a scalar).

        Args:
            vectors: [texts, width], of all micro-batches one after the other.
            batch: what ``collate`` made of each row besides the model's inputs.
        """
        raise NotImplementedError

    def complete(self, outputs: Outputs) -> Outputs:
        """Outputs of all rows of a split, with what depends on more than one of them."""
        return outputs

    def tune(self, outputs: Outputs) -> dict[str, float]:
        """Options of the head, by the names of its fields, that are chosen on the validation split after training.

        They are stored with the run, and hold for the scores of all splits and for predictions.
        """
        return {}

    # -- a reference: the model as it is before training ------------------------------------------------------------

    def reference_splits(self) -> tuple[str, ...]:
        """Splits whose batches need ``reference_outputs``, computed before the first step; none by default."""
        return ()

    def reference_outputs(self, model: torch.nn.Module, batch: Batch, pooling: str) -> dict[str, torch.Tensor]:
        """What the untrained model makes of each row: [rows], or [rows, most of a row] padded with NaN.

        They become columns of the split's batches, by the names that they have here.
        """
        raise NotImplementedError(f"{type(self).__name__} has no reference")

    @abstractmethod
    def plain_logits(self, model: torch.nn.Module, batch: Batch, pooling: str) -> torch.Tensor:
        """[rows, labels] or [real tokens, labels]: the logits that the code in the model card gives."""

    @abstractmethod
    def example_batch(self, rows: int, tokens: int, *, packed: bool = False) -> Batch:
        """A batch of that shape with arbitrary values, for planning; ``packed``: its rows hold several documents."""

    # -- evaluation ------------------------------------------------------------------------------------------------

    @abstractmethod
    def metrics(self, outputs: Outputs, evaluation: EvaluationConfig) -> dict[str, float]:
        """Metrics of a split; ``loss`` and ``best_metric`` are always among them.

        Raises:
            RecipeError, HubError: ``evaluation.metrics`` names one that is unknown or does not fit.
        """

    def warnings(self, metrics: Mapping[str, float]) -> Sequence[tuple[str, str]]:
        """(event, message) of what a user should know of a validation's metrics while the run goes on."""
        return ()

    def metric_names(self, evaluation: EvaluationConfig) -> tuple[str, ...]:
        """Names that ``metrics`` will return, as far as they are known beforehand."""
        return tuple(dict.fromkeys(("loss", *(evaluation.metrics or ()), self.best_metric)))

    def statistics(self, outputs: Outputs) -> Statistics | None:
        """Metrics of any choice of rows, besides the loss, for their confidence intervals; None for the loss alone."""
        return None

    def right(self, outputs: Outputs) -> np.ndarray | None:
        """[rows] whether each answer is right: accuracy then gets Wilson's interval; None without such a thing."""
        return None

    def details(self, outputs: Outputs, rows: Any, evaluation: EvaluationConfig) -> Row:
        """What an assessment says besides the metrics, as JSON.

        Reports show ``per_class``, ``confusion``, ``calibration``, ``pairs`` and ``mistakes``, each where it is there.

        Args:
            rows: the split's canonical rows: a ``datasets.Dataset`` or a list.
        """
        return {}

    def compare(self, outputs: Outputs, baseline: Outputs, name: str, confidence: float) -> tuple[Row | None, str]:
        """The trained model against a baseline on the same rows: the test's result as JSON, and a sentence about it.

        Args:
            outputs, baseline: of the trained model and of the baseline, row by row.
            name: of the baseline.
        """
        return None, ""

    @abstractmethod
    def prediction_rows(self, outputs: Outputs, rows: Sequence[Row]) -> list[Row]:
        """A line of ``predictions/SPLIT.jsonl`` per canonical row; ``file`` and ``line`` tell where it came from."""

    @abstractmethod
    def read_predictions(self, lines: Sequence[Row]) -> StoredPredictions:
        """The inverse of ``prediction_rows``, for comparing finished runs."""

    @abstractmethod
    def predictions(self, outputs: Outputs, threshold: float | None = None) -> list[Prediction]:
        """What the model predicts for each row; empty for a head that writes text.

        Args:
            threshold: probability from which a label counts as given, in place of the task's own; heads that have no
                such thing ignore it.
        """

    def answers(
        self, outputs: Outputs, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, threshold: float | None = None
    ) -> Sequence[Prediction | Tagged | Answer | Filled | Ranked]:
        """``predictions`` for canonical rows, for a head that points into their texts, or that answers by tokens."""
        return self.predictions(outputs, threshold)

    def complete_answers(self, answers: Sequence[Any], texts: Sequence[Any]) -> list[Any]:
        """The answers to all texts of a call, a file or a request, with what depends on more than one of them.

        Args:
            texts: what was asked: texts, or tuples of those that are read together.
        """
        return list(answers)

    # -- baselines -------------------------------------------------------------------------------------------------

    def constant_outputs(self, train: Any, rows: Any) -> tuple[dict[str, np.ndarray], str] | None:
        """Outputs for ``rows`` that are the same for each, the best that is known from ``train``, and a note on them.

        Args:
            train, rows: canonical rows by column (``datasets.Dataset``).

        Returns:
            None where there is no such thing.
        """
        return None

    def lookup_outputs(self, train: Any, rows: Any) -> tuple[dict[str, np.ndarray], str] | None:
        """Outputs for ``rows`` that look each word up in the rows of ``train``, and a note on them.

        Args:
            train, rows: canonical rows by column (``datasets.Dataset``).

        Returns:
            None for a head that does not answer word by word.
        """
        return None

    def overlap_outputs(self, rows: Any) -> tuple[dict[str, np.ndarray], str] | None:
        """Outputs that answer each row with the sentence that shares most words with its question, and a note on them.

        Args:
            rows: canonical rows by column (``datasets.Dataset``).

        Returns:
            None for a head that answers no questions.
        """
        return None

    def tfidf_outputs(self, train: Any, rows: Any) -> tuple[dict[str, np.ndarray], str] | None:
        """Outputs for ``rows`` by the words that the texts of each share, and a note on them.

        Args:
            train: canonical rows by which rare words are known, by column (``datasets.Dataset``), as ``rows``.

        Returns:
            None for a head that compares no texts.
        """
        return None

    def lead_texts(self, train: Any, rows: Any) -> tuple[list[str], str] | None:
        """The beginning of each row's source in place of a text that is generated from it, and a note on them.

        Args:
            train, rows: canonical rows by column (``datasets.Dataset``).

        Returns:
            None for a head that writes no text from another one.
        """
        return None

    def class_names(self) -> tuple[str, ...]:
        """Names one of which fits each row, so that an untrained base can choose; empty where that is not so."""
        return ()

    # -- reports ---------------------------------------------------------------------------------------------------

    def class_counts(self, rows: Any) -> dict[str, int]:
        """Rows, or words, of each class among canonical rows; empty where there are no classes."""
        return {}

    def label_text(self, label: Any) -> str:
        """An example's label in words."""
        return str(label)

    def token_notes(self, example: Row) -> Mapping[int, str]:
        """What an inspection adds to tokens of an encoded example, by their place: a tag, or where the answer ends."""
        return {}

    def parts(self, example: Row) -> Sequence[tuple[str, slice]]:
        """The sequences of an encoded example, each with its name, in words, and its tokens; names may be empty."""
        return (("", slice(None)),)

    # -- the model card --------------------------------------------------------------------------------------------

    @abstractmethod
    def summary(self) -> str:
        """What the model does, to go after "It": "chooses one of 4 labels for a text"."""

    @abstractmethod
    def usage_code(self, pooling: str, max_length: int) -> list[str]:
        """Python lines that use ``model``, ``tokenizer`` and ``torch`` and print an answer, without peftkit."""

    def peftkit_code(self) -> list[str]:
        """Python lines that use ``model``, a run loaded by ``peftkit.load``, and print an answer."""
        return ['for one in model.predict(["a text", "another text"]):', "    print(one.label, one.probability)"]

    def library_files(self, pooling: str, width: int, max_length: int) -> dict[str, Any]:
        """JSON files that another library needs next to an export: path → content; ``width`` of the hidden states."""
        return {}

    def onnx_code(self) -> list[str]:
        """Python lines that print an answer from the ``onnx_output``, a numpy array, where ``onnx`` is true."""
        return ["print(logits.tolist())"]


def head_of(info: TaskInfo, task: Task | None = None, tuned: Mapping[str, float] | None = None) -> Head:
    """The head of a task's rows, with the task's options; without a task, with the head's own defaults.

    Args:
        tuned: what ``Head.tune`` chose after training.

    Raises:
        RecipeError: no head of that name is registered.
    """
    options = task.head_options(info) if task is not None else {}
    return HEADS.get(info.problem_type)(info, **{**options, **(tuned or {})})


def possible_heads(task: Task) -> tuple[type[Head], ...]:
    """The heads that a task may need, known before its data are read."""
    return tuple(HEADS.get(name) for name in task.heads)

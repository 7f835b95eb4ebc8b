"""Values that the contracts exchange: rows, batches, task information, predictions, a model with its tokenizer."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
Batch = dict[str, "torch.Tensor"]


@dataclass(frozen=True)
class TaskInfo:
    """What a task learned about its data before training; stored in the run and needed to load the model again."""

    problem_type: str
    """Name of the head in ``HEADS``: single_label_classification, multi_label_classification, regression, causal_lm,
    token_classification, question_answering, reranker, and others."""
    labels: tuple[str, ...] = ()
    """Class names by id; empty for language models, one name for a regression."""
    class_weights: tuple[float, ...] | None = None
    """Loss weight of each class; None means 1 for all."""
    integers: Literal["names", "ids", "one_hot"] = "names"
    """What a whole number in the label column is: the name of a class ("5" stars), its id, counted from 0, or, in a
    list of 0 and 1, whether the class of its place holds."""


@dataclass(frozen=True)
class Prediction:
    """What the model predicts for one row."""

    label: str | tuple[str, ...] | float
    """The likeliest label; of a multi-label task all that are over the threshold; of a regression the number."""
    probability: float | None
    """Of the label; of several labels the least of theirs (1 − the largest when none holds); None for a regression."""
    probabilities: dict[str, float]
    """Of every label; empty for a regression."""

    def columns(self) -> Row:
        """The prediction as columns of a file: ``label``, ``probability``, and ``probability_NAME`` for every label."""
        columns: Row = {"label": list(self.label) if isinstance(self.label, tuple) else self.label}
        if self.probability is not None:
            columns["probability"] = round(self.probability, 6)
        return columns | {f"probability_{name}": round(value, 6) for name, value in self.probabilities.items()}

    def observed(self) -> tuple[Any, float | None]:
        """The answer in short, and how probable it is: what is watched of a served model."""
        return self.label, self.probability


class Words(str):
    """A text whose words are known: ``Words(["@ada", "was", "here"])`` is ``"@ada was here"``, of three words."""

    words: tuple[str, ...]

    def __new__(cls, words: Iterable[str]) -> Words:
        words = tuple(words)
        text = super().__new__(cls, " ".join(words))
        text.words = words
        return text

    def __getnewargs__(self) -> tuple[tuple[str, ...]]:  # type: ignore[override]
        return (self.words,)  # so that a copy in another process has them, too


@dataclass(frozen=True)
class Span:
    """A part of a text with a label."""

    start: int
    """Its first character."""
    end: int
    """The character after its last."""
    text: str
    label: str
    probability: float
    """Mean over its words of the probability of their tags."""


@dataclass(frozen=True)
class Tagged:
    """What the model predicts for the words of one row."""

    spans: tuple[Span, ...]
    """In the order of the text."""

    def columns(self) -> Row:
        """The prediction as a column of a file: ``spans``, a list with ``start``, ``end``, ``text``, … of each."""
        return {"spans": [{**asdict(span), "probability": round(span.probability, 6)} for span in self.spans]}

    def observed(self) -> tuple[Any, float | None]:
        """The labels of the spans, and the mean of their probabilities."""
        total = sum(span.probability for span in self.spans)
        return tuple(span.label for span in self.spans), total / len(self.spans) if self.spans else None


@dataclass(frozen=True)
class Answer:
    """The part of a text that answers a question."""

    text: str
    """The empty string where the model finds no answer."""
    start: int | None
    """Its first character; None without an answer."""
    end: int | None
    """The character after its last."""
    score: float
    """Probability of its first token times that of its last, in the window of the text that it is in; without an
    answer, of the best one that there would have been."""
    no_answer_probability: float | None
    """That the text has no answer, against its best one; None from a model that learned to answer every question."""

    def columns(self) -> Row:
        """The answer as columns of a file: ``answer``, ``start``, ``end``, ``score``, ``no_answer_probability``."""
        columns: Row = {"answer": self.text, "start": self.start, "end": self.end, "score": round(self.score, 6)}
        if self.no_answer_probability is not None:
            columns["no_answer_probability"] = round(self.no_answer_probability, 6)
        return columns

    def observed(self) -> tuple[Any, float | None]:
        """Whether there is an answer, and the score of the best one."""
        return "answer" if self.text else "no answer", self.score


@dataclass(frozen=True)
class Ranked:
    """How relevant a text is to its query."""

    score: float
    """Probability that it is relevant."""
    rank: int
    """Its place among the texts of the query, from 1, the most relevant."""

    def columns(self) -> Row:
        """The answer as columns of a file: ``score`` and ``rank``."""
        return {"score": round(self.score, 6), "rank": self.rank}

    def observed(self) -> tuple[Any, float | None]:
        """The score, as a number that is watched."""
        return self.score, None


@dataclass(frozen=True)
class Candidate:
    """A token that fits a masked place."""

    token: str
    """As text; of a tokenizer that keeps the space before a word in its token, with that space."""
    probability: float


@dataclass(frozen=True)
class Filled:
    """What the model predicts for the masked places of one row."""

    masks: tuple[tuple[Candidate, ...], ...]
    """For each mask, in the order of the text, the likeliest tokens, the likeliest first."""

    def columns(self) -> Row:
        """The prediction as a column of a file: ``masks``, a list of candidates for each."""
        return {
            "masks": [
                [{"token": one.token, "probability": round(one.probability, 6)} for one in candidates]
                for candidates in self.masks
            ]
        }

    def observed(self) -> tuple[Any, float | None]:
        """No label, and the mean probability of the likeliest tokens."""
        best = [candidates[0].probability for candidates in self.masks]
        return None, sum(best) / len(best) if best else None


@dataclass(frozen=True)
class Stage:
    """An earlier training that a run stands on."""

    run: str
    """Name of its run's folder, or of the folder of an adapter that peft wrote."""
    path: str
    """Where it was read."""
    use: str
    """merged into the base, continued as the same adapter, or taken whole."""
    method: str
    """Its method; peft for an adapter that peft wrote."""
    task: str | None
    """Its task; None where that is not known."""
    digest: str
    """SHA-256 over its weights and configuration."""
    base: str
    """What it was trained on, as it names it."""
    base_fingerprint: str | None
    """Of that base; None where only peft's files were there."""
    checked: str
    """By what its base was compared with the run's."""

    def describe(self) -> str:
        """``first-20261122-140501 (lora, instruction), merged``."""
        return f"{self.run} ({', '.join(filter(None, (self.method, self.task)))}), {self.use}"


@dataclass
class LoadedModel:
    """A model with its head and tokenizer, on the way from the base model to the trainable one.

    ``model`` is always a transformers model, or peft's wrapper around one, so that everything that reads
    transformers and peft models reads ours.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    pooling: Literal["own", "mean", "cls", "last"] = "own"
    """How tokens become one vector: the architecture's own way, or over per-token logits or hidden states."""
    head_names: tuple[str, ...] = ()
    """Names of the modules on top of the backbone that are trained and saved in full: a classifier's, or what a
    checkpoint lacks of a language model's output; empty where the base's own output is used. A name may have several
    parts, as in ``lm_head.dense``."""
    fingerprint: str = ""
    """SHA-256 over config, weights' file digests or commit, and vocabulary of the base."""
    notes: list[str] = field(default_factory=list)
    """What was decided and why, in words for the user (dtype fallback, pad token, …)."""
    auto_class: str = "AutoModelForCausalLM"
    """Name of the transformers class that loaded base and head."""
    stages: tuple[Stage, ...] = ()
    """The earlier trainings that the model stands on, the first one first."""
    adapter: str = ""
    """Digest of the adapter that is trained further; empty for a new one."""


def in_head(name: str, head_names: Collection[str]) -> bool:
    """Whether a module or parameter of that full name belongs to one of the named modules of the head."""
    return any(f".{head}." in f".{name}." for head in head_names)

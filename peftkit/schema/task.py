"""The contract of a task: what is learned from a row."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from peftkit.schema.sections import ConfigSection
from peftkit.schema.types import Row, TaskInfo

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftkit.schema.recipe import DataConfig


class Task(ConfigSection):
    """What is learned from a row: its reading, its checks, its tokens. What comes after the tokens is the head's.

    The data pipeline calls ``describe``, ``canonical`` and ``encode``. Canonical rows also carry ``_file`` and
    ``_line`` (1-based, of the source), which the pipeline adds.
    """

    heads: ClassVar[tuple[str, ...]]
    """Names of the heads that ``describe`` may choose from, as ``TaskInfo.problem_type``."""
    merges_sources: ClassVar[bool] = True
    """Whether ``describe`` must see all sources as one table, as when it counts labels."""
    json_rows: ClassVar[bool] = False
    """Whether rows hold lists and objects, each of which keeps its own keys and types: raw rows are stored as JSON."""

    skips_unscored: ClassVar[bool] = False
    """Whether examples of weight 0, which add nothing to the loss, are left out of training."""

    joins_pair: ClassVar[bool] = True
    """Whether the two texts of a pair are read together, as one sequence."""

    kind: str

    def texts_per_row(self, data: DataConfig) -> int:
        """Sequences that a row has, of up to ``data.max_length`` tokens each."""
        return 1

    def head_options(self, info: TaskInfo) -> dict[str, Any]:
        """Options of the head that ``info`` names, by the names of the head's fields."""
        return {}

    # -- reading rows ----------------------------------------------------------------------------------------------

    @abstractmethod
    def describe(self, splits: Mapping[str, Any], data: DataConfig) -> TaskInfo:
        """Reads what must be known of all rows first (label names, which head) from raw splits.

        Raises DataError for a missing column, a wrong label type, or a single class.
        """

    @classmethod
    def example_info(cls, *, decoder: bool) -> TaskInfo | None:
        """The info to plan with, without data, on a decoder or an encoder; None unless this is its usual task."""
        return None

    @abstractmethod
    def canonical(self, row: Row, data: DataConfig, info: TaskInfo) -> Row:
        """The source's row under the task's own column names and types; raises DataError(column=…) for a bad one."""

    def describe_file(self, splits: Mapping[str, Any], data: DataConfig, info: TaskInfo) -> TaskInfo:
        """The info by which further rows with answers are read, those of a file to evaluate on, given the run's.

        Raises DataError as ``describe`` does; the rows may lack some of the classes.
        """
        return info

    def null_word(self, row: Row, data: DataConfig) -> str | None:
        """The column of a raw row whose value is only a word for a missing one ("nan"), and may be meant so."""
        return None

    def review(
        self, strata: Mapping[str, Mapping[str, int]], info: TaskInfo
    ) -> Iterable[tuple[str, str, int, tuple[str, ...]]]:
        """What a user should know of the rows before training: (step, split, rows that it concerns, what it is).

        ``strata`` are the rows of each split by ``stratum``. The steps are reported like those of cleaning.
        """
        return ()

    def source_columns(self, data: DataConfig) -> set[str]:
        """Columns of the source that the task may read; values of mixed types in one of them are an error."""
        pair = {data.text_pair} if data.text_pair else set()
        return {data.text, *data.label_columns, *data.columns.values()} | pair

    def input_columns(self, data: DataConfig) -> tuple[str, ...]:
        """Columns of the source that a prediction needs, in the order of ``input_row``."""
        return (data.text,)

    def input_row(self, values: Sequence[str]) -> Row:
        """A canonical row without its answer, from the values of ``input_columns``."""
        return {"text": values[0]}

    def input_texts(self, row: Row) -> tuple[str, ...]:
        """The texts of a canonical row that ``input_row`` would make it from, without its answer."""
        return tuple(row[name] for name in ("text", "text_pair") if row.get(name) is not None)

    @abstractmethod
    def text_of(self, row: Row) -> str:
        """The text of a canonical row: rows without one are empty, and near duplicates share its words."""

    def identity(self, row: Row) -> str:
        """Rows are duplicates where this is equal: the text of a canonical row without case and spacing."""
        return " ".join(self.text_of(row).casefold().split())

    def remarks(self, row: Row, data: DataConfig, info: TaskInfo) -> Iterable[tuple[str, str]]:
        """(cleaning step, detail) of what the user should know about how a source's row was read.

        The rows of each step are counted and reported before training, with their details, or else their places.
        """
        return ()

    def is_blank(self, row: Row) -> bool:
        """Whether a canonical row lacks a text that it needs."""
        return not self.text_of(row).strip()

    def with_text(self, row: Row, change: Callable[[str], str]) -> Row:
        """The canonical row with ``change`` applied to its learnable text (cleaning, augmentation)."""
        return {**row, "text": change(row["text"])}

    def stratum(self, row: Row) -> str:
        """The group whose share every split keeps; the empty string where there is none."""
        return ""

    # -- tokens ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def encode(
        self, rows: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase, data: DataConfig, info: TaskInfo
    ) -> dict[str, list[Any]]:
        """A batch of canonical rows as columns → columns ``input_ids`` and ``labels``, ``weight``, ``row``.

        ``weight`` is what the row adds to the loss's denominator (its scored tokens, or its class weight); ``row`` is
        its index within the batch of rows (an encoder may drop rows, or make several examples of one). Columns
        ``truncated`` (tokens cut off), and any further model inputs (``token_type_ids``, ``position_ids``) may follow.
        """

    @property
    def packs(self) -> bool:
        """Whether several rows share an example, which not every model can keep apart."""
        return False

    def without_packing(self) -> Task:
        """The same task with an example for each row."""
        return self

    # -- prompts, where the head writes text -----------------------------------------------------------------------

    def prompt(self, row: Row) -> tuple[Any, str]:
        """(what a canonical row begins with, what is to follow), for sample generations."""
        raise NotImplementedError(f"task.kind={self.kind} has no prompts")

    def as_prompt(self, text: str) -> Any:
        """A user's text as a prompt: the text itself, or a conversation of one turn."""
        return text

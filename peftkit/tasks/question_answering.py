"""Extractive question answering: the part of a text that answers a question, or that it has no answer.

    task: {kind: question_answering}
    data: {source: squad.json, text: question, text_pair: context, label: answers, max_length: 384}

The question is read first, then the context; a long context in windows. Files of SQuAD 1.1 and 2.0, rows as on the hub,
and tables with an answer's text are read (see ``question_rows``). Devlin et al. 2019 (arXiv:1810.04805, 4.2 and 4.3).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from peftkit.data.problems import located, require_column
from peftkit.errors import DataError, RecipeError
from peftkit.models.context import usable_length
from peftkit.schema.registries import TASKS
from peftkit.schema.task import Task
from peftkit.schema.types import Row, TaskInfo
from peftkit.tasks import question_rows as reading
from peftkit.tasks.control_tokens import places, warn_of_control_tokens
from peftkit.tasks.long_texts import PairForm, pair_form, require_offsets, windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftkit.schema.recipe import DataConfig

log = logging.getLogger(__name__)
HEAD = "question_answering"
ANSWERED, UNANSWERED = "answer", "no answer"
NO_LOSS = -100
"""In place of a position that is not learned."""


@TASKS.register("question_answering")
class QuestionAnswering(Task):
    """Marks the part of a text that answers a question (SQuAD), or finds that there is none."""

    heads: ClassVar[tuple[str, ...]] = (HEAD,)
    json_rows: ClassVar[bool] = True
    skips_unscored: ClassVar[bool] = True

    kind: Literal["question_answering"] = "question_answering"
    stride: Annotated[int, Field(ge=0)] | None = None
    """Tokens that the windows of a context longer than data.max_length share; None takes a third of each."""
    unanswered_windows: Literal["no_answer", "skip"] = "no_answer"
    """Windows of an answered question that lack its answer: no_answer learns so of each, skip trains on none of them.
    Questions without an answer are learned either way."""
    max_answer_length: Annotated[int, Field(ge=1)] = 30
    """Most tokens of a predicted answer."""
    no_answer_threshold: float | None = None
    """A question is left unanswered if its no-answer logits exceed those of its best answer by more than this. None
    takes, where training has questions without an answer, the value of highest F1 on the validation rows, and stores it
    with the run. Without such questions each gets an answer."""

    def head_options(self, info: TaskInfo) -> dict[str, Any]:
        return {"max_answer_length": self.max_answer_length, "no_answer_threshold": self.no_answer_threshold}

    # -- reading rows ----------------------------------------------------------------------------------------------

    def describe(self, splits: Mapping[str, Any], data: DataConfig) -> TaskInfo:
        """Whether training has questions without an answer; checks ids and columns of every split.

        Raises:
            DataError: a missing column, an id that occurs twice, or questions without an answer in no split but others.
        """
        if data.augmentation is not None:
            raise RecipeError("data.augmentation would move answers; set data.augmentation=null")
        _text_columns(data)
        for rows in splits.values():
            _require_columns(rows, data)
        train = splits["train"] if "train" in splits else next(iter(splits.values()))
        answered = _check_rows(train, data)
        if True not in answered:
            raise DataError("no question of training has an answer", column=data.label_columns[0])
        info = TaskInfo(HEAD, (ANSWERED, UNANSWERED) if False in answered else (ANSWERED,))
        for split, rows in splits.items():
            if rows is not train and False in _check_rows(rows, data) and UNANSWERED not in info.labels:
                raise DataError(_unlearned(f"the {split} split has"), column=data.label_columns[0])
        return info

    def describe_file(self, splits: Mapping[str, Any], data: DataConfig, info: TaskInfo) -> TaskInfo:
        """``info``; raises DataError for a missing column, and questions without an answer if training has none."""
        for rows in splits.values():
            _require_columns(rows, data)
            if False in _check_rows(rows, data) and UNANSWERED not in info.labels:
                raise DataError(_unlearned("the file has"), column=data.label_columns[0])
        return info

    def source_columns(self, data: DataConfig) -> set[str]:
        return super().source_columns(data) | reading.COLUMNS

    def canonical(self, row: Row, data: DataConfig, info: TaskInfo) -> Row:
        """``question``, ``context``, ``answers`` and ``starts`` (their first characters), and ``id`` as text.

        Rows of the same context are one document: no split shares it with another.
        """
        first, second = _text_columns(data)
        question, context = reading.text_of(row, first), reading.text_of(row, second)
        answers = reading.answers_of(row, context, data.label_columns[0])
        name = row.get(reading.ID)
        return {
            "question": question, "context": context,
            "answers": [text for text, _ in answers], "starts": [start for _, start in answers],
            "id": "" if name is None else str(name),
            "_document": hashlib.sha256(context.encode("utf-8", "surrogatepass")).hexdigest()[:16],
        }  # fmt: skip

    def input_columns(self, data: DataConfig) -> tuple[str, ...]:
        return _text_columns(data)

    def input_row(self, values: Sequence[str]) -> Row:
        """A question and its context; raises DataError where one is missing or empty."""
        if len(values) != 2 or not all(value.strip() for value in values):
            raise DataError("expected (question, context) pairs, with text in both")
        return {"question": values[0], "context": values[1]}

    def input_texts(self, row: Row) -> tuple[str, ...]:
        return row["question"], row["context"]

    def text_of(self, row: Row) -> str:
        """The words of the context, each with the question: near duplicates ask the same of nearly the same text.

        Rows of one context, or of one question about many, are not alike.
        """
        question = hashlib.sha256(" ".join(row["question"].casefold().split()).encode("utf-8", "surrogatepass"))
        return " ".join(f"{question.hexdigest()[:8]}_{word}" for word in row["context"].split())

    def identity(self, row: Row) -> str:
        """Question and context, to the letter: case may tell names."""
        return f"{row['question']}\0{row['context']}"

    def with_text(self, row: Row, change: Callable[[str], str]) -> Row:
        """The row as it is: a changed text would move its answers."""
        return row

    def review(
        self, strata: Mapping[str, Mapping[str, int]], info: TaskInfo
    ) -> Iterable[tuple[str, str, int, tuple[str, ...]]]:
        """Questions without an answer, which an empty cell may be by mistake."""
        for split, rows in strata.items():
            if count := rows.get(UNANSWERED, 0):
                yield "no_answer", split, count, (f"{count} of {sum(rows.values())} questions have no answer",)

    def stratum(self, row: Row) -> str:
        """Whether the question has an answer: every split keeps the share."""
        return ANSWERED if row["answers"] else UNANSWERED

    # -- tokens ----------------------------------------------------------------------------------------------------

    def encode(
        self, rows: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase, data: DataConfig, info: TaskInfo
    ) -> dict[str, list[Any]]:
        """Questions → windows of question and context, at most ``data.max_length`` tokens each.

        ``labels`` are the positions of the first answer's first and last token; both the no-answer position where the
        window has none of it, and -100 where that is not learned. Columns besides the contract's: ``no_answer``, that
        position (the classification token, else the first token); ``starts`` and ``ends``, the characters of each
        token of the context, -1 for other tokens; ``text``, the part of the context that the window holds, from
        character ``offset`` on; ``answers``, the texts of all answers.

        Raises:
            ModelError: the tokenizer does not say where its tokens are in the text.
            DataError: a question that leaves no room for its context.
        """
        require_offsets(tokenizer, self.kind)
        questions, contexts = [str(text).strip() for text in rows["question"]], list(rows["context"])
        warn_of_control_tokens(list(zip(questions, contexts)), rows, tokenizer)
        form, limit = pair_form(tokenizer), usable_length(tokenizer, data.max_length)
        options: dict[str, Any] = {
            "add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False,
            "verbose": False,
        }  # fmt: skip
        asked: Any = tokenizer(questions, **options)["input_ids"]
        read: Any = tokenizer(contexts, return_offsets_mapping=True, **options)
        answers = rows.get("answers") or [None] * len(questions)
        names = ("input_ids", "labels", "weight", "row", "no_answer", "starts", "ends", "text", "offset", "answers")
        columns: dict[str, list[Any]] = {name: [] for name in names}
        if form.types is not None:
            columns["token_type_ids"] = []
        lost: list[int] = []
        for row, question in enumerate(asked):
            room = limit - form.size - len(question)
            stride = max(0, room) // 3 if self.stride is None else self.stride
            if room <= stride and room < max(1, len(read["input_ids"][row])):
                raise _no_room(room, stride, rows, row)
            context = _Context(contexts[row], read["input_ids"][row], read["offset_mapping"][row])
            span: tuple[int, int] | None = None
            if answers[row]:
                start = rows["starts"][row][0]
                span = context.tokens_of(start, start + len(answers[row][0]))
                lost += [row] * (span is None)
            known = answers[row] is not None and not (answers[row] and span is None)
            for begin, end, _ in windows(len(context.ids), room, stride):
                ids, types = form.join(list(question), context.ids[begin:end])
                no_answer, before = _no_answer_place(ids, form, tokenizer), form.before(question)
                labels = [no_answer, no_answer]
                if span is not None and begin <= span[0] and span[1] < end:
                    labels = [before + span[0] - begin, before + span[1] - begin]
                elif not known or (span is not None and self.unanswered_windows == "skip"):
                    labels = [NO_LOSS, NO_LOSS]
                after = len(ids) - before - (end - begin)
                first, last = context.limits(begin, end)
                columns["input_ids"].append(ids)
                columns["labels"].append(labels)
                columns["weight"].append(float(labels[0] != NO_LOSS))
                columns["row"].append(row)
                columns["no_answer"].append(no_answer)
                columns["starts"].append([*[-1] * before, *context.starts[begin:end], *[-1] * after])
                columns["ends"].append([*[-1] * before, *context.ends[begin:end], *[-1] * after])
                columns["text"].append(contexts[row][first:last] if answers[row] is not None else "")
                columns["offset"].append(first)
                columns["answers"].append(list(answers[row] or ()))
                if types is not None:
                    columns["token_type_ids"].append(types)
        if lost:
            log.warning(
                "%d answers have no token of their own, and are not learned: this tokenizer leaves them out%s",
                len(lost), places(rows, lost),
            )  # fmt: skip
        return columns


def _no_room(room: int, stride: int, rows: Mapping[str, Sequence[Any]], row: int) -> DataError:
    """The error for a question besides which no window can hold more of its context than the stride."""
    message = (
        f"the question leaves {max(0, room)} of a window's tokens to its context, and windows that share {stride} need "
        "more: raise data.max_length, shorten the question, or lower task.stride"
    )
    if "_file" not in rows:
        return DataError(message)
    path = rows["_path"][row] if "_path" in rows else None
    return located(DataError(message), rows["_file"][row], rows["_line"][row], path=path)


class _Context:
    """The tokens of a context: ``starts`` and ``ends`` by characters, without the spaces around; -1 for bare spaces."""

    def __init__(self, text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> None:
        self.text, self.ids = text, list(ids)
        self.starts: list[int] = []
        self.ends: list[int] = []
        for begin, end in offsets:
            while begin < end and text[begin].isspace():
                begin += 1  # byte-level tokens hold the space before a word
            while begin < end and text[end - 1].isspace():
                end -= 1
            self.starts.append(begin if begin < end else -1)
            self.ends.append(end if begin < end else -1)

    def tokens_of(self, start: int, end: int) -> tuple[int, int] | None:
        """The first and the last token of a span of characters; None where no token is in it."""
        places = enumerate(zip(self.starts, self.ends))
        inside = [token for token, (begin, last) in places if 0 <= begin < end and last > start]
        return (inside[0], inside[-1]) if inside else None

    def limits(self, begin: int, end: int) -> tuple[int, int]:
        """The characters of the tokens from ``begin`` to ``end``."""
        starts = [start for start in self.starts[begin:end] if start >= 0]
        return (min(starts), max(self.ends[begin:end])) if starts else (0, 0)


def _no_answer_place(ids: Sequence[int], form: PairForm, tokenizer: PreTrainedTokenizerBase) -> int:
    """Where a window says that it has no answer: at the classification token, else at its first token."""
    token: Any = tokenizer.cls_token_id
    if token in form.opening:
        return form.opening.index(token)
    if token in form.closing:
        return len(ids) - len(form.closing) + form.closing.index(token)
    return 0


def _text_columns(data: DataConfig) -> tuple[str, str]:
    """The columns of question and context; raises RecipeError where the recipe does not name both and the answers."""
    if data.text_pair is None:
        raise RecipeError(
            "task.kind=question_answering reads a question and its context: name their columns, as in "
            "data.text=question data.text_pair=context data.label=answers"
        )
    if len(data.label_columns) > 1:
        raise RecipeError("data.label: task.kind=question_answering reads one column of answers")
    return data.text, data.text_pair


def _require_columns(rows: Any, data: DataConfig) -> None:
    columns = (data.text, data.text_pair, data.label_columns[0])
    for column, field in zip(columns, ("data.text", "data.text_pair", "data.label")):
        if column not in rows.column_names:
            require_column(rows, str(column), field)


def _check_rows(rows: Any, data: DataConfig) -> set[bool]:
    """Whether there are questions with an answer (True) and without (False); raises DataError for an id given twice.

    Rows that cannot be read are reported together by ``canonical``.
    """
    answered: set[bool] = set()
    seen: dict[tuple[str, str], str] = {}
    for row in _values(rows):
        name = row.get(reading.ID)
        if name is not None and name != "":
            place = str(row.get("_path") or f"line {row['_line']}")
            if (before := seen.setdefault((row["_file"], str(name)), place)) != place:
                error = DataError(f"the id {name!r} is also that of {before}; give each question its own", column="id")
                raise located(error, row["_file"], row["_line"], path=row.get("_path"))
        answered.add(reading.has_answer(row, data.label_columns[0]))
    return answered


def _values(rows: Any) -> Iterator[Row]:
    from peftkit.data.loading import from_json
    from peftkit.data.tables import iterate

    return map(from_json, iterate(rows))


def _unlearned(where: str) -> str:
    return f"{where} questions without an answer, and training has none: add some to training, or leave them out"

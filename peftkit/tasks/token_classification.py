"""Token classification: a tag for each word, as for named entities, chunks or parts of speech.

    task: {kind: token_classification}
    data: {source: my_texts.jsonl, text: tokens, label: tags}

    Ada   Lovelace  was  born  in  London
    B-PER I-PER     O    O     O   B-LOC

The tag is learned at the first token of its word. Rows hold words and tags (CoNLL files, or two lists), or a text and
its entities by characters. IOB1, BIO, BIOES and BILOU tags are read, and learned as BIO.
"""

from __future__ import annotations

import ast
import bisect
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from peftkit.data.problems import located, require_column, shorten
from peftkit.errors import DataError, RecipeError, did_you_mean
from peftkit.evaluation.entities import ENDS, OUTSIDE, STARTS, as_bio, has_prefix, type_of
from peftkit.models.context import usable_length
from peftkit.schema.registries import TASKS
from peftkit.schema.sections import ClassName
from peftkit.schema.task import Task
from peftkit.schema.types import Row, TaskInfo, Words
from peftkit.tasks.control_tokens import places, warn_of_control_tokens
from peftkit.tasks.long_texts import require_offsets, windows
from peftkit.tasks.tagged_words import TaggedWords, from_spans, from_tokens, joined, words_of
from peftkit.tasks.tokens import surrounding_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftkit.schema.recipe import DataConfig

log = logging.getLogger(__name__)
HEAD = "token_classification"
TOKENS = "tokens"


@TASKS.register("token_classification")
class TokenClassification(Task):
    """Predicts a tag for each word of a text: named entities, chunks, parts of speech."""

    heads: ClassVar[tuple[str, ...]] = (HEAD,)

    kind: Literal["token_classification"] = "token_classification"
    scheme: Literal["auto", "bio", "iob1"] = "auto"
    """How tags mark where an entity begins: bio begins each with B-, iob1 only one that follows another of its type.
    auto takes either, and refuses data that mix both; BIOES, BILOU and tags without prefixes show what they are."""
    stride: Annotated[int, Field(ge=0)] | None = None
    """Tokens that the windows of a text longer than data.max_length share; each word is scored once, where it has more
    of the text around it. None takes a quarter of a window."""
    class_weights: Literal["balanced"] | dict[ClassName, Annotated[float, Field(gt=0)]] | None = None
    """Loss weight of the words of each type and of O, to balance that most words are O: balanced is words ÷ (types ×
    words of the type); a mapping sets some ({O: 0.5}), the others are 1."""

    # -- reading rows ----------------------------------------------------------------------------------------------

    def describe(self, splits: Mapping[str, Any], data: DataConfig) -> TaskInfo:
        """Tags and their weights from the raw splits; checks the tags of every row.

        Raises:
            DataError: a missing column, a type that training lacks, tags that mix two schemes; names file and line.
        """
        if data.augmentation is not None:
            raise RecipeError("data.augmentation would move words away from their tags; set data.augmentation=null")
        if data.text_pair is not None or len(data.label_columns) > 1:
            field = "data.text_pair" if data.text_pair is not None else "data.label"
            raise RecipeError(f"{field}: task.kind={self.kind} reads one column of texts and one of tags")
        for rows in splits.values():
            for column, field in ((data.text, "data.text"), (data.label_columns[0], "data.label")):
                require_column(rows, column, field)
        train = splits["train"] if "train" in splits else next(iter(splits.values()))
        names = _names(train, data)
        counts = self._count(train, data, names)
        if not counts or set(counts) == {OUTSIDE}:
            raise DataError("no word of training has a tag other than O", column=data.label_columns[0])
        labels = _labels(counts, names, data)
        known = {type_of(label) for label in labels}
        for split, rows in splits.items():
            if rows is not train:
                self._count(rows, data, names, known, f"the {split} split has a tag that training lacks")
        return TaskInfo(HEAD, labels, self._weights(labels, counts))

    def describe_file(self, splits: Mapping[str, Any], data: DataConfig, info: TaskInfo) -> TaskInfo:
        """``info``, whose tags must be those of the file."""
        known = {type_of(label) for label in info.labels}
        for rows in splits.values():
            names = _names(rows, data)
            if names is not None and names != info.labels[: len(names)]:
                message = f"the ids of its tags stand for {', '.join(names)}, the run's for {', '.join(info.labels)}"
                raise DataError(f"{message}; write the tags as text", column=data.label_columns[0])
            self._count(rows, data, names, known, "the run knows no such tag")
        return info

    def _count(
        self, rows: Any, data: DataConfig, names: Sequence[str] | None, known: set[str] | None = None, refusal: str = ""
    ) -> Counter[str]:
        """Words of each tag, in BIO; checks each row's tags.

        Rows that cannot be read are reported together by ``canonical``, unless all of them are so.
        """
        counts: Counter[str] = Counter()
        unreadable: DataError | None = None
        evidence: dict[str, str] = {}
        for row in _iterate(rows):
            try:
                words = _read(row, data, names)
            except DataError as error:
                unreadable = unreadable or located(error, row["_file"], row["_line"])
                continue
            tags = words.tags or []
            for scheme, example in _evidence(tags):
                if scheme not in evidence:
                    evidence[scheme] = f"{row['_file']}:{row['_line']} ({example})"
            self._check_scheme(evidence, row, data)
            bio = as_bio(tags)
            if known is not None and (unknown := next((tag for tag in bio if type_of(tag) not in known), None)):
                hint = did_you_mean(type_of(unknown), sorted(known))
                message = f"{refusal}: {unknown}; {hint}"
                raise DataError(message, file=row["_file"], line=row["_line"], column=data.label_columns[0])
            counts.update(bio)
        if not counts and unreadable is not None:
            raise unreadable
        return counts

    def _check_scheme(self, evidence: Mapping[str, str], row: Row, data: DataConfig) -> None:
        if self.scheme == "auto" and {"bio", "iob1"} <= evidence.keys():
            message = (
                f"tags mix two schemes: {evidence['bio']} begins an entity with B-, {evidence['iob1']} without; mend "
                "the tags, or set task.scheme=iob1 to begin an entity at both"
            )
        elif self.scheme == "bio" and "iob1" in evidence:
            message = f"task.scheme=bio begins each entity with B-, and {evidence['iob1']} begins one without"
        elif {"ended", "open"} <= evidence.keys():
            message = (
                f"tags mix two schemes: {evidence['ended']} marks the last word of an entity, as BIOES does, and "
                f"{evidence['open']} ends one without; mend the tags"
            )
        elif {"prefixed", "plain"} <= evidence.keys():
            both = f"{evidence['prefixed']} has a prefix, {evidence['plain']} has none"
            message = f"tags mix two schemes: {both}; mend the tags"
        else:
            return
        raise DataError(message, file=row["_file"], line=row["_line"], column=data.label_columns[0])

    def _weights(self, labels: tuple[str, ...], counts: Counter[str]) -> tuple[float, ...] | None:
        words = Counter[str]()
        for tag, number in counts.items():
            words[type_of(tag)] += number
        if self.class_weights is None:
            return None
        if self.class_weights == "balanced":
            total = sum(words.values())
            return tuple(total / (len(words) * words[type_of(label)]) for label in labels)
        for name in self.class_weights:
            if name not in words:
                raise RecipeError(f"task.class_weights: no tag '{name}': {did_you_mean(name, sorted(words))}")
        return tuple(self.class_weights.get(type_of(label), 1.0) for label in labels)

    def canonical(self, row: Row, data: DataConfig, info: TaskInfo) -> Row:
        """The text, its words' ``starts`` and ``ends`` by characters, and their tags in BIO as ``labels``."""
        words = _read(row, data, info.labels)
        return {"text": words.text, "starts": words.starts, "ends": words.ends, "labels": as_bio(words.tags or [])}

    def input_columns(self, data: DataConfig) -> tuple[str, ...]:
        """The recipe's column of texts; ``text`` where its rows hold words."""
        return ("text",) if data.text == TOKENS else (data.text,)

    def input_row(self, values: Sequence[str]) -> Row:
        text = values[0]
        starts, ends = joined(text.words) if isinstance(text, Words) else words_of(text)
        return {"text": text, "starts": starts, "ends": ends}

    def text_of(self, row: Row) -> str:
        return str(row["text"])

    def identity(self, row: Row) -> str:
        """The text to the letter: case is what tells names."""
        return self.text_of(row)

    def with_text(self, row: Row, change: Callable[[str], str]) -> Row:
        """The row as it is: a changed text would move its words away from their tags."""
        return row

    def review(
        self, strata: Mapping[str, Mapping[str, int]], info: TaskInfo
    ) -> Iterable[tuple[str, str, int, tuple[str, ...]]]:
        """Rows without any entity, where tags are of entities."""
        for split, rows in strata.items():
            if empty := rows.get("no entity", 0):
                yield "entities", split, empty, (f"{empty} of {sum(rows.values())} rows have none",)

    def stratum(self, row: Row) -> str:
        """Whether a row has an entity: every split keeps the share of those without."""
        return "entity" if any(tag != OUTSIDE for tag in row["labels"]) else "no entity"

    # -- tokens ----------------------------------------------------------------------------------------------------

    def encode(
        self, rows: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase, data: DataConfig, info: TaskInfo
    ) -> dict[str, list[Any]]:
        """Texts → windows of at most ``data.max_length`` tokens, in which each word's first token has its tag.

        Columns besides the contract's: ``words``, the number of the word that a token begins, or -1; and words that
        have no token at all, such as invisible characters, as ``unread`` with their tags ``unread_labels``.

        Raises:
            ModelError: the tokenizer does not say where its tokens are in the text.
            RecipeError: no token is left in a window besides the stride.
        """
        from peftkit.data.batching import IGNORE

        require_offsets(tokenizer, self.kind)
        warn_of_control_tokens([(text,) for text in rows["text"]], rows, tokenizer)
        opening, closing = surrounding_tokens(tokenizer)
        room = usable_length(tokenizer, data.max_length) - len(opening) - len(closing)
        stride = room // 4 if self.stride is None else self.stride
        if room <= stride:
            raise RecipeError(
                f"task.stride={stride} leaves nothing of a window of {room} tokens; lower it, or raise data.max_length"
            )
        encoded: Any = tokenizer(
            list(rows["text"]), add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False,
            verbose=False,
        )  # fmt: skip
        number = {label: index for index, label in enumerate(info.labels)}
        weights = info.class_weights or (1.0,) * len(info.labels)
        names = ("input_ids", "labels", "words", "unread", "unread_labels", "weight", "row")
        columns: dict[str, list[Any]] = {name: [] for name in names}
        with_types = "token_type_ids" in tokenizer.model_input_names
        if with_types:
            columns["token_type_ids"] = []
        tags = rows.get("labels") or [None] * len(rows["text"])
        lost: list[int] = []
        for row, ids in enumerate(encoded["input_ids"]):
            starts, ends = rows["starts"][row], rows["ends"][row]
            labels = [0] * len(starts) if tags[row] is None else [number[tag] for tag in tags[row]]
            first = _first_tokens(encoded["offset_mapping"][row], rows["text"][row], starts, ends)
            unread = [word for word in range(len(starts)) if word not in first]
            lost += [row] * sum(tags[row] is not None and tags[row][word] != OUTSIDE for word in unread)
            at = {token: word for word, token in first.items()}
            for begin, end, scored in windows(len(ids), room, stride):
                words = [at.get(token, -1) if token in scored else -1 for token in range(begin, end)]
                words = [*[-1] * len(opening), *words, *[-1] * len(closing)]
                columns["input_ids"].append([*opening, *ids[begin:end], *closing])
                columns["labels"].append([IGNORE if word < 0 else labels[word] for word in words])
                columns["words"].append(words)
                columns["unread"].append(unread)
                columns["unread_labels"].append([labels[word] for word in unread])
                columns["weight"].append(sum(weights[labels[word]] for word in words if word >= 0))
                columns["row"].append(row)
                if with_types:
                    columns["token_type_ids"].append([0] * len(words))
                unread = []
        if lost:
            log.warning(
                "%d words with a tag have no token of their own, and count as not marked: this tokenizer leaves them "
                "out, or joins them to the word before%s", len(lost), places(rows, sorted(set(lost))),
            )  # fmt: skip
        return columns


def _first_tokens(
    offsets: Sequence[tuple[int, int]], text: str, starts: Sequence[int], ends: Sequence[int]
) -> dict[int, int]:
    """Word → its first token; without words that no token begins in."""
    first: dict[int, int] = {}
    for token, (begin, end) in enumerate(offsets):
        while begin < end and text[begin].isspace():
            begin += 1  # byte-level tokens hold the space before a word
        word = bisect.bisect_right(starts, begin) - 1
        if begin < end and word >= 0 and begin < ends[word]:
            first.setdefault(word, token)
    return first


def _iterate(rows: Any) -> Iterator[Row]:
    from peftkit.data.tables import iterate

    return iterate(rows)


def _names(rows: Any, data: DataConfig) -> tuple[str, ...] | None:
    """The tags by id, where the source lists them."""
    inner = getattr(rows.features[data.label_columns[0]], "feature", None)
    names = getattr(inner, "names", None)
    return tuple(names) if names else None


def _read(row: Row, data: DataConfig, names: Sequence[str] | None) -> TaggedWords:
    """The words of a raw row; raises DataError(column=…)."""
    column = data.label_columns[0]
    text, tags = row.get(data.text), row.get(column)
    if isinstance(text, str) and isinstance(tags, str):  # a table's cells
        if not tags.lstrip().startswith("["):
            return from_tokens(text.split(), tags.split(), (data.text, column))
        tags = _as_list(tags, column)
        text = _as_list(text, data.text) if tags and isinstance(tags[0], str) else text
    if isinstance(text, str) and isinstance(tags, (list, type(None))):
        return from_spans(text, tags or [], column)
    if text is None or (isinstance(text, list) and not text):
        raise DataError("expected a text or a list of words, found none", column=data.text)
    if not isinstance(text, list):
        raise DataError(f"expected a text or a list of words, found {shorten(text)}", column=data.text)
    if not isinstance(tags, list):
        raise DataError(f"expected a list with the tag of each word, found {shorten(tags)}", column=column)
    return from_tokens(text, [_tag(tag, names, column) for tag in tags], (data.text, column))


def _as_list(cell: str, column: str) -> list[Any]:
    """The list that a cell spells in JSON or Python; raises DataError where it spells none."""
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(cell)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, list):
            return value
    raise DataError(f"expected a list in JSON or words with spaces between, found {shorten(cell)}", column=column)


def _tag(tag: Any, names: Sequence[str] | None, column: str) -> str:
    if isinstance(tag, int) and not isinstance(tag, bool):
        if names is None:
            raise DataError(
                f"expected tags as text, found the number {tag}, whose name the file does not tell", column=column
            )
        if not 0 <= tag < len(names):
            raise DataError(f"expected tags from 0 to {len(names) - 1}, found {tag}", column=column)
        return names[tag]
    if not isinstance(tag, str) or not tag.strip():
        raise DataError(f"expected tags as text, found {shorten(tag)}", column=column)
    return tag


def _evidence(tags: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What each tag shows of the scheme, with the tags that show it.

    ``bio`` and ``iob1`` begin an entity with B- or without; ``ended`` and ``open`` mark its last word, as BIOES and
    BILOU do, or not; ``prefixed`` and ``plain`` have prefixes or not. Data have one of each pair.
    """
    before = OUTSIDE
    for tag, after in zip(tags, [*tags[1:], OUTSIDE]):
        if not has_prefix(tag):
            if tag != OUTSIDE:
                yield "plain", tag
        else:
            yield "prefixed", tag
            follows = has_prefix(before) and before[0] not in ENDS and type_of(before) == type_of(tag)
            if not follows:
                yield ("bio" if tag[0] in STARTS else "iob1"), f"{before} {tag}"
            goes_on = has_prefix(after) and after[0] not in STARTS and type_of(after) == type_of(tag)
            if tag[0] in ENDS:
                yield "ended", tag
            elif not goes_on:
                yield "open", f"{tag} {after}"
        before = tag


def _labels(counts: Counter[str], names: Sequence[str] | None, data: DataConfig) -> tuple[str, ...]:
    """The tags by id: O, then both tags of each type, those of ``data.labels`` where they are given."""
    prefixed = any(has_prefix(tag) for tag in counts)
    types = {type_of(tag) for tag in counts} - {OUTSIDE}
    if data.labels is not None:
        wanted = [label for label in dict.fromkeys(map(type_of, data.labels)) if label != OUTSIDE]
        if missing := sorted(types - set(wanted)):
            message = f"data.labels does not name {', '.join(missing)}, which training has"
            raise DataError(
                f"{message}; add it, or take them from the data: data.labels=null", column=data.label_columns[0]
            )
        kinds: Sequence[str] = wanted
    else:
        kinds = sorted(types)
    tags = [tag for kind in kinds for tag in ((f"B-{kind}", f"I-{kind}") if prefixed else (kind,))]
    outside = [OUTSIDE] if prefixed or OUTSIDE in counts else []
    if names is None:
        return (*outside, *tags)
    if any(has_prefix(name) and name[0] not in "BI" for name in names):
        raise DataError(
            "expected the ids of BIO tags; write the tags of other schemes as text", column=data.label_columns[0]
        )
    return (*names, *(tag for tag in (*outside, *tags) if tag not in names))  # ids stay those of the source

"""A tag for each word: a linear layer over the hidden state of the word's first token."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peftkit.schema.head import Head, Outputs, Statistics, StoredPredictions
from peftkit.schema.registries import HEADS
from peftkit.schema.types import Batch, Prediction, Row, Span, Tagged

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from peftkit.evaluation.entities import Counts
    from peftkit.schema.recipe import EvaluationConfig

IGNORE = -100
"""What padding and tokens that begin no word have in place of a tag."""
TEXT_CHARACTERS = 300
"""Of a sentence in the report."""


@HEADS.register("token_classification")
@dataclass(frozen=True)
class TokenClassification(Head):
    """Gives each word one of the tags; scored by entities, see ``peftkit.evaluation.entities``."""

    marks_words: ClassVar[bool] = True
    baselines: ClassVar[tuple[str, ...]] = ("frequent_tag",)
    best_metric: ClassVar[str] = "f1"
    class_unit: ClassVar[Literal["rows", "words"]] = "words"
    onnx: ClassVar[bool] = True
    pipeline_tag: ClassVar[str] = "token-classification"

    @classmethod
    def auto_class(cls, pooling: str) -> str:
        return "AutoModelForTokenClassification"

    def configure(self, config: PreTrainedConfig) -> None:
        config.num_labels = self.width
        config.id2label = dict(enumerate(self.info.labels))
        config.label2id = {label: index for index, label in config.id2label.items()}

    # -- training --------------------------------------------------------------------------------------------------

    def collate(self, columns: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase) -> Batch | None:
        """Besides the usual: ``words`` [rows, tokens], ``unread``, ``unread_labels`` [rows, most of a row], ``row``."""
        import numpy as np
        import torch

        from peftkit.data.batching import collate

        if "words" not in columns:
            return None
        batch = collate(columns, tokenizer)
        shape, left = tuple(batch["input_ids"].shape), tokenizer.padding_side == "left"

        def padded(rows: Sequence[Sequence[int]], value: int, width: int, left: bool = False) -> torch.Tensor:
            out = np.full((len(rows), width), value, dtype=np.int64)
            for number, row in enumerate(rows):
                out[number, slice(width - len(row), width) if left else slice(len(row))] = row
            return torch.from_numpy(out)

        most = max(map(len, columns["unread"]))
        return batch | {
            "labels": padded(columns["labels"], IGNORE, shape[1], left),
            "words": padded(columns["words"], -1, shape[1], left),
            "unread": padded(columns["unread"], -1, most),
            "unread_labels": padded(columns["unread_labels"], IGNORE, most),
            "row": torch.tensor(list(columns["row"])),
        }

    def loss(self, model: torch.nn.Module, batch: Batch, pooling: str) -> torch.Tensor:
        """Cross-entropy summed over the words, each times the weight of its tag."""
        return self._losses(self._logits(model, batch), batch["labels"]).sum()

    def outputs(self, model: torch.nn.Module, batch: Batch, pooling: str) -> dict[str, torch.Tensor]:
        """``loss`` and ``weight`` [rows], and what ``_sentences`` joins: tags by token, and whose words they are."""
        logits = self._logits(model, batch)
        probability, predicted = logits.softmax(-1).max(-1)
        return {
            "loss": self._losses(logits, batch["labels"]).sum(-1), "weight": batch["weight"].float(),
            "gold": batch["labels"], "predicted": predicted, "probability": probability, "words": batch["words"],
            "unread": batch["unread"], "unread_gold": batch["unread_labels"], "row": batch["row"],
        }  # fmt: skip

    def _logits(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """[rows, tokens, labels] in fp32; those of a learned prompt, which stand before the row's own, are left out."""
        from peftkit.models.pooled_logits import model_inputs

        logits: torch.Tensor = model(**model_inputs(model, batch)).logits
        return logits[:, -batch["input_ids"].shape[1] :].float()

    def _losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        import torch
        import torch.nn.functional as F

        weights = self.info.class_weights
        weight = None if weights is None else torch.tensor(weights, device=logits.device)
        return F.cross_entropy(logits.mT, labels, weight, ignore_index=IGNORE, reduction="none")

    def plain_logits(self, model: torch.nn.Module, batch: Batch, pooling: str) -> torch.Tensor:
        """[real tokens, labels]."""
        return self._logits(model, batch)[batch["attention_mask"].bool()]

    def example_batch(self, rows: int, tokens: int, *, packed: bool = False) -> Batch:
        import torch

        names = ("input_ids", "labels", "words")
        batch = {name: torch.zeros((rows, tokens), dtype=torch.int64) for name in names}
        batch["attention_mask"] = torch.ones((rows, tokens), dtype=torch.int64)
        batch |= {name: torch.zeros((rows, 0), dtype=torch.int64) for name in ("unread", "unread_labels")}
        return batch | {"row": torch.arange(rows), "weight": torch.full((rows,), float(tokens))}

    # -- evaluation ------------------------------------------------------------------------------------------------

    def metrics(self, outputs: Outputs, evaluation: EvaluationConfig) -> dict[str, float]:
        """``loss`` per word, and those of ``peftkit.evaluation.entities.METRICS`` that the recipe names, or all."""
        values = self._count(self._sentences(outputs)).metrics()
        weight = float(outputs["weight"].sum()) if "loss" in outputs else 0.0
        loss = {"loss": float(outputs["loss"].sum(dtype="float64")) / max(weight, 1e-9)} if "loss" in outputs else {}
        return loss | {name: values[name] for name in self._names(evaluation)}

    def metric_names(self, evaluation: EvaluationConfig) -> tuple[str, ...]:
        return ("loss", *self._names(evaluation))

    def _names(self, evaluation: EvaluationConfig) -> tuple[str, ...]:
        from peftkit.errors import RecipeError, did_you_mean
        from peftkit.evaluation.entities import METRICS

        for name in evaluation.metrics or ():
            if name not in METRICS:
                raise RecipeError(f"evaluation.metrics: no metric '{name}' of entities: {did_you_mean(name, METRICS)}")
        wanted = METRICS if evaluation.metrics is None else evaluation.metrics
        return tuple(dict.fromkeys((*wanted, self.best_metric)))

    def _count(self, sentences: Sequence[_Sentence]) -> Counts:
        from peftkit.evaluation.entities import count

        labels = self.info.labels
        gold, predicted = ([[labels[tag] for tag in tags] for tags in column] for column in (
            [one.gold for one in sentences], [one.predicted for one in sentences]))  # fmt: skip
        return count(gold, predicted, self._types())

    def _types(self) -> tuple[str, ...]:
        from peftkit.evaluation.entities import OUTSIDE, type_of

        return tuple(kind for kind in dict.fromkeys(map(type_of, self.info.labels)) if kind != OUTSIDE)

    def statistics(self, outputs: Outputs) -> Statistics:
        """Of examples: a sentence counts where its first window is drawn."""
        import numpy as np

        from peftkit.evaluation import resampling

        sentences = self._sentences(outputs)
        first = np.array([one.example for one in sentences])
        return resampling.of_groups(first, len(outputs["row"]), self._count(sentences).metrics)

    def details(self, outputs: Outputs, rows: Any, evaluation: EvaluationConfig) -> Row:
        """Scores by type, the confusion of types word by word, and the sentences with most wrong entities."""
        import numpy as np

        from peftkit.evaluation import resampling
        from peftkit.evaluation.entities import OUTSIDE, type_of

        sentences = self._sentences(outputs)
        kinds = (OUTSIDE, *self._types())
        kind = np.array([kinds.index(type_of(label)) for label in self.info.labels])
        gold, predicted = (np.concatenate([kind[tags] for tags in column] or [kind[:0]]) for column in (
            [one.gold for one in sentences], [one.predicted for one in sentences]))  # fmt: skip
        return {
            "labels": list(kinds),
            "per_class": self._count(sentences).per_type(),
            "confusion": resampling.confusion(gold, predicted, len(kinds)).tolist(),
            "mistakes": self._mistakes(sentences, _rows_of(sentences, outputs, rows), evaluation.worst),
        }

    def _mistakes(self, sentences: Sequence[_Sentence], rows: Sequence[Row], most: int) -> list[Row]:
        from peftkit.evaluation.entities import entities

        labels, mistaken = self.info.labels, []
        for number, one in enumerate(sentences):
            gold, predicted = (entities([labels[tag] for tag in tags]) for tags in (one.gold, one.predicted))
            if wrong := len({*gold} ^ {*predicted}):
                mistaken.append((wrong, number, gold, predicted))
        mistaken.sort(key=lambda entry: (-entry[0], entry[1]))
        entries = []
        for wrong, number, gold, predicted in mistaken[:most]:
            row = rows[number]
            text = _marked(row, gold, predicted)
            entries.append({
                "text": text if len(text) <= TEXT_CHARACTERS else f"{text[:TEXT_CHARACTERS]}…",
                "gold": _named(row, gold), "predicted": _named(row, predicted), "error": float(wrong),
                "file": row.get("_file"), "line": row.get("_line"),
            })  # fmt: skip
        return entries

    def compare(self, outputs: Outputs, baseline: Outputs, name: str, confidence: float) -> tuple[Row | None, str]:
        """The paired bootstrap of F1 over sentences."""
        import numpy as np

        from peftkit.evaluation import paired_tests

        trained, other = (self._count(self._sentences(one)) for one in (outputs, baseline))
        test = paired_tests.paired(
            [lambda rows: trained.metrics(rows)["f1"]], [lambda rows: other.metrics(rows)["f1"]],
            len(np.asarray(trained.words)), confidence=confidence,
        )  # fmt: skip
        return test, paired_tests.verdict(test, name)

    def prediction_rows(self, outputs: Outputs, rows: Sequence[Row]) -> list[Row]:
        """``file``, ``line``, the words, and their ``gold`` and ``predicted`` tags; a line per sentence."""
        sentences, labels = self._sentences(outputs), self.info.labels
        return [
            {
                "file": row.get("_file"), "line": row.get("_line"),
                "words": [row["text"][start:end] for start, end in zip(row["starts"], row["ends"])],
                "gold": [labels[tag] for tag in one.gold], "predicted": [labels[tag] for tag in one.predicted],
            }
            for one, row in zip(sentences, _rows_of(sentences, outputs, rows), strict=True)
        ]  # fmt: skip

    def read_predictions(self, lines: Sequence[Row]) -> StoredPredictions:
        import numpy as np

        from peftkit.evaluation.entities import count

        counts = count([line["gold"] for line in lines], [line["predicted"] for line in lines], self._types())
        return StoredPredictions(np.array([" ".join(line["gold"]) for line in lines]), counts.statistics())

    def predictions(self, outputs: Outputs, threshold: float | None = None) -> list[Prediction]:
        return []

    def answers(
        self, outputs: Outputs, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, threshold: float | None = None
    ) -> list[Tagged]:
        from peftkit.evaluation.entities import entities

        tagged = []
        for one, row in zip(self._sentences(outputs, rows=len(rows)), rows, strict=True):
            text, starts, ends = row["text"], row["starts"], row["ends"]
            spans = []
            for first, last, kind in entities([self.info.labels[tag] for tag in one.predicted]):
                start, end = starts[first], ends[last - 1]
                spans.append(Span(start, end, text[start:end], kind, float(one.probability[first:last].mean())))
            tagged.append(Tagged(tuple(spans)))
        return tagged

    def lookup_outputs(self, train: Any, rows: Any) -> tuple[dict[str, np.ndarray], str]:
        import numpy as np

        seen: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for row in train:
            for start, end, tag in zip(row["starts"], row["ends"], row["labels"]):
                seen[row["text"][start:end]][tag] += 1
        number = {label: index for index, label in enumerate(self.info.labels)}
        common = {word: number[tags.most_common(1)[0][0]] for word, tags in seen.items()}
        other = self._unmarked(sum(seen.values(), Counter()))
        width = max(len(row["starts"]) for row in rows)
        outputs = {name: np.full((len(rows), width), IGNORE) for name in ("gold", "predicted")}
        words, unknown = np.full((len(rows), width), -1), 0
        for place, row in enumerate(rows):
            count = len(row["starts"])
            texts = [row["text"][start:end] for start, end in zip(row["starts"], row["ends"])]
            outputs["gold"][place, :count] = [number[tag] for tag in row["labels"]]
            outputs["predicted"][place, :count] = [common.get(word, other) for word in texts]
            words[place, :count] = range(count)
            unknown += sum(word not in common for word in texts)
        none = np.full((len(rows), 0), -1)
        share = unknown / max(1, int((words >= 0).sum()))
        note = f"each word's commonest tag in training, '{self.info.labels[other]}' for the {share:.0%} that it lacks"
        return outputs | {
            "probability": np.ones(words.shape), "words": words, "unread": none, "unread_gold": none,
            "row": np.arange(len(rows)),
        }, note  # fmt: skip

    def _sentences(self, outputs: Outputs, rows: int | None = None) -> list[_Sentence]:
        return _sentences(outputs, self._unmarked({}), rows)

    def _unmarked(self, counts: Mapping[str, int]) -> int:
        """The id of O, wherever the source lists it; without O, as in parts of speech, of the commonest tag."""
        from peftkit.evaluation.entities import OUTSIDE

        tag = OUTSIDE if OUTSIDE in self.info.labels else max(self.info.labels, key=lambda label: counts.get(label, 0))
        return self.info.labels.index(tag)

    def class_counts(self, rows: Any) -> dict[str, int]:
        """Words of each type and of O; empty where the rows have no tags."""
        from peftkit.evaluation.entities import type_of

        if "labels" not in rows.column_names:
            return {}
        counts = Counter(tag for labels in rows["labels"] for tag in labels)
        words = dict.fromkeys(map(type_of, self.info.labels), 0)
        for tag, number in counts.items():
            words[type_of(tag)] += number
        return words

    def token_notes(self, example: Row) -> dict[int, str]:
        """The tags but for O, at the first token of each word."""
        from peftkit.evaluation.entities import OUTSIDE

        tags = {place: self.info.labels[tag] for place, tag in enumerate(example["labels"]) if tag != IGNORE}
        return {place: tag for place, tag in tags.items() if tag != OUTSIDE}

    # -- the model card --------------------------------------------------------------------------------------------

    def summary(self) -> str:
        kinds = self._types()
        return f"marks words of {len(kinds)} types ({', '.join(kinds[:8])}{', …' if len(kinds) > 8 else ''}) in a text"

    def usage_code(self, pooling: str, max_length: int) -> list[str]:
        return [
            "from transformers import pipeline",
            'tag = pipeline("token-classification", model=model, tokenizer=tokenizer, aggregation_strategy="first")',
            'print(tag("Ada Lovelace was born in London."))',
        ]

    def peftkit_code(self) -> list[str]:
        return ['for span in model.predict("Ada Lovelace was born in London.")[0].spans:',
                "    print(span.text, span.label, span.probability)"]  # fmt: skip


@dataclass(frozen=True)
class _Sentence:
    """A row's words, joined from its windows: tags by id, and the probability of the predicted ones."""

    row: int
    example: int
    """The first window's number among the examples."""
    gold: np.ndarray
    predicted: np.ndarray
    probability: np.ndarray


def _sentences(outputs: Outputs, unmarked: int, rows: int | None) -> list[_Sentence]:
    """The rows in order; with ``rows`` their number, also those without a word; ``unmarked`` is O by id."""
    import numpy as np

    examples: defaultdict[int, list[int]] = defaultdict(list)
    for example, row in enumerate(np.asarray(outputs["row"]).astype(int).tolist()):
        examples[row].append(example)
    sentences = []
    for row in range(rows) if rows is not None else sorted(examples):
        parts = []
        for example in examples.get(row, ()):
            words = np.asarray(outputs["words"][example]).astype(int)
            here = words >= 0
            columns = [outputs[name][example][here] for name in ("gold", "predicted", "probability")]
            parts.append(np.stack([words[here], *columns]).astype(float))
            lost = np.asarray(outputs["unread"][example]).astype(int)
            if (missing := lost >= 0).any():  # the model saw no token of these words, and marks none
                gold = outputs["unread_gold"][example][missing]
                parts.append(np.stack([lost[missing], gold, np.full(len(gold), unmarked), np.ones(len(gold))]))
        joined = np.concatenate(parts, axis=1) if parts else np.zeros((4, 0))
        _, gold, predicted, probability = joined[:, np.argsort(joined[0], kind="stable")]
        first = examples[row][0] if row in examples else -1
        sentences.append(_Sentence(row, first, gold.astype(int), predicted.astype(int), probability))
    return sentences


def _rows_of(sentences: Sequence[_Sentence], outputs: Outputs, rows: Any) -> list[Row]:
    """The canonical row of each sentence, where ``rows`` has one for each example, or one for each row."""
    by_example = len(rows) == len(outputs["row"])
    return [rows[one.example if by_example else one.row] for one in sentences]


def _named(row: Row, spans: Sequence[Any]) -> str:
    """Entities in words: "person: Ada Lovelace; location: London"."""
    words = ((kind, row["text"][row["starts"][first] : row["ends"][last - 1]]) for first, last, kind in spans)
    return "; ".join(f"{kind}: {text}" for kind, text in words) or "none"


def _marked(row: Row, gold: Sequence[Any], predicted: Sequence[Any]) -> str:
    """The text with what is wrong in it in brackets: [London: location, not person]."""
    text, starts, ends = row["text"], row["starts"], row["ends"]
    parts, place = [], 0
    for first, last, kind in sorted({*gold} ^ {*predicted}):
        if starts[first] < place:
            continue
        missed = (first, last, kind) in gold
        other = next((one for one in (predicted if missed else gold) if one[0] < last and first < one[1]), None)
        if other is not None and other[2] != kind:
            what = f"{kind}, not {other[2]}" if missed else f"{other[2]}, not {kind}"
        else:
            what = f"{kind}, not marked" if missed else f"no {kind}"
        what = f"{kind}, of other words" if other is not None and other[2] == kind else what
        parts += [text[place : starts[first]], f"[{text[starts[first] : ends[last - 1]]}: {what}]"]
        place = ends[last - 1]
    return "".join([*parts, text[place:]])

"""The part of a text that answers a question: a linear layer that scores each token as its first and as its last.

Devlin et al. 2019 (arXiv:1810.04805), sections 4.2 and 4.3. The answer is the span with the highest sum of both logits;
the sum at the no-answer position (the classification token) is the score of there being none, and a text in several
windows has no answer where none of them has one: its score is the least of the windows'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from peftkit.heads.answer_windows import (
    END,
    IGNORE,
    LOW,
    Question,
    answer_codes,
    best_sentence,
    codes,
    excerpt,
    padded_table,
    questions_of,
    rows_of,
)
from peftkit.schema.head import Head, Outputs, Statistics, StoredPredictions
from peftkit.schema.registries import HEADS
from peftkit.schema.types import Answer, Batch, Prediction, Row

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from peftkit.evaluation.squad import Scores
    from peftkit.schema.recipe import EvaluationConfig


@HEADS.register("question_answering")
@dataclass(frozen=True)
class QuestionAnswering(Head):
    """Marks the answer to a question in a text, or finds none; scored as by SQuAD's scripts, see ``evaluation.squad``.

    ``info.labels`` are ("answer", "no answer"), or ("answer",) where every question of training has one.
    """

    max_answer_length: int = 30
    """Most tokens of an answer."""
    no_answer_threshold: float | None = None
    """See ``tasks.question_answering``; None is 0."""

    marks_words: ClassVar[bool] = True
    baselines: ClassVar[tuple[str, ...]] = ("majority", "best_sentence")
    best_metric: ClassVar[str] = "f1"
    onnx: ClassVar[bool] = True
    pipeline_tag: ClassVar[str] = "question-answering"

    @classmethod
    def auto_class(cls, pooling: str) -> str:
        return "AutoModelForQuestionAnswering"

    @property
    def width(self) -> int:
        return 2

    @property
    def version(self) -> int:
        """Of SQuAD's script: 2 where questions may have no answer."""
        return max(1, min(2, len(self.info.labels)))

    def configure(self, config: PreTrainedConfig) -> None:
        config.num_labels = 2

    # -- training --------------------------------------------------------------------------------------------------

    def collate(self, columns: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase) -> Batch | None:
        """Besides the usual: what ``tasks.question_answering`` encodes, with texts as the numbers of their characters.

        ``starts`` and ``ends`` are [rows, tokens], ``characters`` and ``answers`` [rows, most of a row].
        """
        import numpy as np
        import torch

        from peftkit.data.batching import collate

        if "starts" not in columns:
            return None
        batch = collate(columns, tokenizer)
        width, left = batch["input_ids"].shape[1], tokenizer.padding_side == "left"

        def padded(rows: Sequence[Any], value: int, width: int, left: bool = False) -> torch.Tensor:
            out = np.full((len(rows), width), value, dtype=np.int64)
            for number, row in enumerate(rows):
                out[number, slice(width - len(row), width) if left else slice(len(row))] = row
            return torch.from_numpy(out)

        shift = torch.tensor([width - len(ids) if left else 0 for ids in columns["input_ids"]])
        labels = torch.tensor(list(columns["labels"]))
        texts, answers = codes(columns["text"]), [answer_codes(texts) for texts in columns["answers"]]
        return batch | {
            "labels": torch.where(labels == IGNORE, labels, labels + shift[:, None]),
            "no_answer": torch.tensor(list(columns["no_answer"])) + shift,
            "starts": padded(columns["starts"], END, width, left),
            "ends": padded(columns["ends"], END, width, left),
            "characters": padded(texts, IGNORE, max(1, *map(len, texts))),
            "answers": padded(answers, IGNORE, max(1, *map(len, answers))),
            "offset": torch.tensor(list(columns["offset"])),
            "row": torch.tensor(list(columns["row"])),
        }

    def loss(self, model: torch.nn.Module, batch: Batch, pooling: str) -> torch.Tensor:
        """Summed over the windows: the mean of the cross-entropies of the answer's first and last token."""
        return self._losses(self._logits(model, batch), batch).sum()

    def _logits(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """[rows, tokens, 2] in fp32; those of a learned prompt, which stand before the row's own, are left out."""
        from peftkit.models.pooled_logits import model_inputs, scores_of

        logits = scores_of(model(**model_inputs(model, batch)))
        return logits[:, -batch["input_ids"].shape[1] :].float()

    def _losses(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """[rows]; padding is left out of the softmax, so that the other rows of a batch change nothing."""
        import torch.nn.functional as F

        logits = logits.masked_fill(~batch["attention_mask"].bool()[..., None], LOW)
        # [rows, tokens, 2] and [rows, 2]: both positions are classes over the tokens
        return F.cross_entropy(logits, batch["labels"], ignore_index=IGNORE, reduction="none").mean(-1)

    def outputs(self, model: torch.nn.Module, batch: Batch, pooling: str) -> dict[str, torch.Tensor]:
        """``loss`` and ``weight`` [rows], each window's best span, and what ``questions_of`` needs to join them."""
        import torch.nn.functional as F

        logits = self._logits(model, batch)
        inside = batch["starts"] >= 0
        start, end = (one.masked_fill(~inside, LOW) for one in logits.unbind(-1))
        most = min(self.max_answer_length, start.shape[1])
        ends_after = F.pad(end, (0, most - 1), value=LOW).unfold(1, most, 1)  # [rows, tokens, tokens of the answer]
        score, place = (start.unsqueeze(-1) + ends_after).flatten(1).max(-1)
        first, last = place // most, place // most + place % most
        no_answer = batch["no_answer"][:, None]
        open_places = inside.scatter(1, no_answer, True)
        chances = [
            logits[..., side].masked_fill(~open_places, LOW).softmax(-1).gather(1, at[:, None])[:, 0]
            for side, at in enumerate((first, last))
        ]
        return {
            "loss": self._losses(logits, batch), "weight": batch["weight"].float(), "row": batch["row"],
            "score": score, "probability": chances[0] * chances[1],
            "no_answer": logits.sum(-1).gather(1, no_answer)[:, 0],
            "start": batch["starts"].gather(1, first[:, None])[:, 0],
            "end": batch["ends"].gather(1, last[:, None])[:, 0],
            "characters": batch["characters"], "offset": batch["offset"], "answers": batch["answers"],
        }  # fmt: skip

    def plain_logits(self, model: torch.nn.Module, batch: Batch, pooling: str) -> torch.Tensor:
        """[real tokens, 2]."""
        return self._logits(model, batch)[batch["attention_mask"].bool()]

    def example_batch(self, rows: int, tokens: int, *, packed: bool = False) -> Batch:
        import torch

        names = ("input_ids", "starts", "ends", "characters", "answers")
        batch = {name: torch.zeros((rows, tokens), dtype=torch.int64) for name in names}
        batch["attention_mask"] = torch.ones((rows, tokens), dtype=torch.int64)
        batch |= {name: torch.zeros(rows, dtype=torch.int64) for name in ("no_answer", "offset")}
        batch["labels"] = torch.zeros((rows, 2), dtype=torch.int64)
        return batch | {"row": torch.arange(rows), "weight": torch.ones(rows)}

    # -- evaluation ------------------------------------------------------------------------------------------------

    def metrics(self, outputs: Outputs, evaluation: EvaluationConfig) -> dict[str, float]:
        """``loss`` per window, and those of ``peftkit.evaluation.squad.names`` that the recipe names, or all."""
        values = self._scores(questions_of(outputs)).metrics()
        weight = float(outputs["weight"].sum()) if "loss" in outputs else 0.0
        loss = {"loss": float(outputs["loss"].sum(dtype="float64")) / max(weight, 1e-9)} if "loss" in outputs else {}
        return loss | {name: values[name] for name in self._names(evaluation)}

    def metric_names(self, evaluation: EvaluationConfig) -> tuple[str, ...]:
        return ("loss", *self._names(evaluation))

    def _names(self, evaluation: EvaluationConfig) -> tuple[str, ...]:
        from peftkit.errors import RecipeError, did_you_mean
        from peftkit.evaluation import squad

        known = squad.names(self.version)
        for name in evaluation.metrics or ():
            if name not in known:
                raise RecipeError(f"evaluation.metrics: no metric '{name}' of answers: {did_you_mean(name, known)}")
        return tuple(dict.fromkeys((*(known if evaluation.metrics is None else evaluation.metrics), self.best_metric)))

    def _scores(self, questions: Sequence[Question]) -> Scores:
        from peftkit.evaluation.squad import Scores

        return Scores.of([one.gold for one in questions], [self._given(one) for one in questions], self.version)

    def _given(self, question: Question, threshold: float | None = None) -> str:
        """The answer that is given, or the empty string for none; ``threshold`` in place of the head's own."""
        if self.version == 1 or question.score <= LOW:
            return question.text
        limit = self.no_answer_threshold if threshold is None else threshold
        return "" if question.no_answer_score > (limit or 0.0) else question.text

    def tune(self, outputs: Outputs) -> dict[str, float]:
        """The no-answer threshold of highest F1, where the recipe gives none and some questions have no answer."""
        import numpy as np

        from peftkit.evaluation import squad

        questions = questions_of(outputs)
        if self.version == 1 or self.no_answer_threshold is not None or not questions:
            return {}
        scores = squad.Scores.of([one.gold for one in questions], [one.text for one in questions], self.version)
        none = np.array([one.no_answer_score for one in questions])
        return {"no_answer_threshold": squad.best_threshold(scores.f1, scores.has_answer, none)}

    def statistics(self, outputs: Outputs) -> Statistics:
        """Of examples: a question counts where its first window is drawn."""
        import numpy as np

        from peftkit.evaluation import resampling

        questions = questions_of(outputs)
        first = np.array([one.example for one in questions])
        return resampling.of_groups(first, len(outputs["row"]), self._scores(questions).metrics)

    def details(self, outputs: Outputs, rows: Any, evaluation: EvaluationConfig) -> Row:
        """The questions whose answers are worst; where some have none, how well these are told from the others."""
        questions = questions_of(outputs)
        details = {"mistakes": self._mistakes(questions, rows_of(questions, outputs, rows), evaluation.worst)}
        return details if self.version == 1 else {**self._answerability(questions), **details}

    def _answerability(self, questions: Sequence[Question]) -> Row:
        import numpy as np

        from peftkit.evaluation import resampling

        gold = np.array([int(not one.gold) for one in questions])
        predicted = np.array([int(not self._given(one)) for one in questions])
        counts = resampling.confusion(gold, predicted, len(self.info.labels))
        per_class = []
        for number, label in enumerate(self.info.labels):
            hits, there, given = counts[number, number], counts[number].sum(), counts[:, number].sum()
            per_class.append({
                "label": label, "precision": float(hits / max(1, given)), "recall": float(hits / max(1, there)),
                "f1": float(2 * hits / max(1, there + given)), "rows": int(there), "predicted": int(given),
            })  # fmt: skip
        return {"per_class": per_class, "confusion": counts.tolist()}

    def _mistakes(self, questions: Sequence[Question], rows: Sequence[Row], most: int) -> list[Row]:
        f1 = self._scores(questions).f1
        wrong = [number for number in range(len(questions)) if f1[number] < 1]
        order = sorted(wrong, key=lambda number: (f1[number], number))
        entries = []
        for number in order[:most]:
            one, row = questions[number], rows[number]
            given = self._given(one)
            entries.append({
                "text": f"{row['question']} {excerpt(row, one, given)}",
                "gold": " | ".join(dict.fromkeys(one.gold)) or "no answer", "predicted": given or "no answer",
                "error": float(1 - f1[number]), "file": row.get("_file"), "line": row.get("_line"),
            })  # fmt: skip
        return entries

    def compare(self, outputs: Outputs, baseline: Outputs, name: str, confidence: float) -> tuple[Row | None, str]:
        """The paired bootstrap of F1 over questions."""
        from peftkit.evaluation import paired_tests

        trained, other = (self._scores(questions_of(one)) for one in (outputs, baseline))
        test = paired_tests.paired(
            [lambda rows: trained.metrics(rows)["f1"]], [lambda rows: other.metrics(rows)["f1"]], len(trained.f1),
            confidence=confidence,
        )  # fmt: skip
        return test, paired_tests.verdict(test, name)

    def prediction_rows(self, outputs: Outputs, rows: Sequence[Row]) -> list[Row]:
        """A line per question: where it is from, its ``gold`` answers, and the ``predicted`` one, "" for none."""
        questions = questions_of(outputs)
        lines = []
        for one, row in zip(questions, rows_of(questions, outputs, rows), strict=True):
            answer = self._answer(one, None)
            lines.append({
                "file": row.get("_file"), "line": row.get("_line"), "id": row.get("id"), "question": row["question"],
                "gold": list(one.gold), "predicted": answer.text, "start": answer.start, "end": answer.end,
                "score": answer.score, "no_answer_probability": answer.no_answer_probability,
            })  # fmt: skip
        return lines

    def read_predictions(self, lines: Sequence[Row]) -> StoredPredictions:
        import numpy as np

        from peftkit.evaluation.squad import Scores

        scores = Scores.of([line["gold"] for line in lines], [line["predicted"] for line in lines], self.version)
        return StoredPredictions(np.array(["\0".join(line["gold"]) for line in lines]), scores.metrics)

    def predictions(self, outputs: Outputs, threshold: float | None = None) -> list[Prediction]:
        return []

    def answers(
        self, outputs: Outputs, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, threshold: float | None = None
    ) -> list[Answer]:
        """The answer to each question; ``threshold``: no-answer probability over which there is none."""
        import math

        limit: float | None = None
        if threshold is not None:
            inside = min(max(threshold, 1e-12), 1 - 1e-12)
            limit = math.log(inside / (1 - inside))
        return [
            self._answer(one, limit, row["context"][one.start : one.end])
            for one, row in zip(questions_of(outputs), rows, strict=True)
        ]

    def _answer(self, question: Question, threshold: float | None, text: str | None = None) -> Answer:
        """The answer that is given; ``text`` where the outputs do not hold it."""
        import math

        whole = question if text is None else question.of(text)
        given = self._given(whole, threshold)
        difference = min(max(question.no_answer_score, -500.0), 500.0)
        none = None if self.version == 1 else 1 / (1 + math.exp(-difference))
        start, end = (question.start, question.end) if given else (None, None)
        return Answer(given, start, end, question.probability, none)

    # -- baselines -------------------------------------------------------------------------------------------------

    def constant_outputs(self, train: Any, rows: Any) -> tuple[dict[str, np.ndarray], str] | None:
        """No answer to any question; None where every one has an answer."""
        if self.version == 1:
            return None
        return self._outputs_of(rows, [(0, 0)] * len(rows)), "no answer to any question"

    def overlap_outputs(self, rows: Any) -> tuple[dict[str, np.ndarray], str] | None:
        spans = [best_sentence(question, context) for question, context in zip(rows["question"], rows["context"])]
        return self._outputs_of(rows, spans), "the sentence that shares most words with the question"

    def _outputs_of(self, rows: Any, spans: Sequence[tuple[int, int]]) -> dict[str, np.ndarray]:
        """Outputs of one window per row with a given answer each, an empty one for none."""
        import numpy as np

        texts = [context[start:end] for context, (start, end) in zip(rows["context"], spans)]
        start, end = np.array(spans, dtype=np.float64).reshape(-1, 2).T
        some = end > start
        return {
            "row": np.arange(len(rows)), "score": np.where(some, 0.0, 2 * LOW), "probability": np.ones(len(rows)),
            "no_answer": np.where(some, LOW, 0.0), "start": start, "end": end, "offset": start,
            "characters": padded_table(codes(texts)),
            "answers": padded_table([answer_codes(one) for one in rows["answers"]]),
        }  # fmt: skip

    def class_counts(self, rows: Any) -> dict[str, int]:
        """Questions with and without an answer; empty where the rows are not to be scored."""
        if "answers" not in rows.column_names:
            return {}
        answered = sum(map(bool, rows["answers"]))
        return dict(zip(self.info.labels, (answered, len(rows) - answered)))

    def label_text(self, label: Any) -> str:
        first, last = label
        if first == IGNORE:
            return "not learned"
        return f"tokens {first} to {last}" if last else "no answer"

    def token_notes(self, example: Row) -> dict[int, str]:
        """The answer, at its last token."""
        last = example["labels"][1]
        return {last: "answer"} if last > 0 else {}

    # -- the model card --------------------------------------------------------------------------------------------

    def summary(self) -> str:
        return "marks the answer to a question in a text" + (", or finds that it has none" if self.version == 2 else "")

    def usage_code(self, pooling: str, max_length: int) -> list[str]:
        return [
            'question, context = "Where was Ada Lovelace born?", "Ada Lovelace was born in London."',
            f'options = dict(truncation="only_second", max_length={max_length}, return_offsets_mapping=True)',
            'inputs = tokenizer(question, context, return_tensors="pt", **options)',
            'places = inputs.pop("offset_mapping")[0].tolist()',
            "with torch.no_grad():",
            "    outputs = model(**inputs)",
            *ANSWER_CODE,
        ]

    def onnx_code(self) -> list[str]:
        return [
            "# logits[row, token] = (as the first, as the last token of the answer): give the tokenizer question and",
            "# context, and take the span of the context with the largest sum",
            "print(logits.shape)",
        ]

    def peftkit_code(self) -> list[str]:
        return [
            '(answer,) = model.predict([("Where was Ada Lovelace born?", "Ada Lovelace was born in London.")])',
            "print(answer.text, answer.start, answer.end, answer.score)",
        ]


ANSWER_CODE = [
    "start, end = outputs.start_logits[0], outputs.end_logits[0]",
    "text = [number for number, part in enumerate(inputs.sequence_ids(0)) if part == 1]",
    "spans = [(first, last) for first in text for last in text if first <= last < first + 30]",
    "first, last = max(spans, key=lambda span: start[span[0]] + end[span[1]])",
    "print(context[places[first][0] : places[last][1]])",
]
"""Prints the answer from ``outputs``, in the model card."""

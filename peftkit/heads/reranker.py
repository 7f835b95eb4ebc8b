"""How relevant a text is to a query: one logit for the pair, by which the texts of a query are ordered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from peftkit.heads.embedding import name_parts, names_of
from peftkit.heads.regression import Regression
from peftkit.schema.head import Outputs, Statistics, StoredPredictions
from peftkit.schema.registries import HEADS
from peftkit.schema.types import Batch, Ranked, Row

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedTokenizerBase

    from peftkit.schema.recipe import EvaluationConfig

NAME = "reranker"


def candidates(row: Row) -> tuple[str, ...]:
    """The texts of a canonical row: its own, and those that are not relevant."""
    return (row["text_pair"], *(row.get("negatives") or ()))


def number_of(text: str) -> int:
    """A number that names a text; of texts with equal scores the one of the smaller number comes first."""
    from peftkit.data.mapping import hash64

    return hash64(text) >> 4  # what ``embedding.names_of`` can hold


@dataclass(frozen=True)
class Lists:
    """The texts of each query that has texts of different relevance, one of them relevant."""

    first: np.ndarray
    """The first example of each query, [queries]."""
    best: np.ndarray
    """The example of its most relevant text, [queries]."""
    top: np.ndarray
    """The example that the model puts first, [queries]."""
    values: dict[str, np.ndarray]
    """Metrics by query."""


@HEADS.register(NAME)
@dataclass(frozen=True)
class Reranker(Regression):
    """Orders the texts of a query; the loss is the binary cross-entropy of relevance ÷ ``max_relevance``."""

    max_relevance: float = 1.0
    relevant_from: float | None = None

    transformers_problem_type: ClassVar[Any] = None
    pipeline_tag: ClassVar[str] = "text-ranking"
    best_metric: ClassVar[str] = "ndcg"
    default_metrics: ClassVar[tuple[str, ...]] = ("ndcg", "mrr", "map", "accuracy_at_1")
    baselines: ClassVar[tuple[str, ...]] = ("majority", "tfidf")
    ranks: ClassVar[bool] = True

    @property
    def width(self) -> int:
        return 1

    def configure(self, config: Any) -> None:
        super().configure(config)
        config.num_labels = 1
        config.id2label, config.label2id = {0: self.info.labels[-1]}, {self.info.labels[-1]: 0}

    def collate(self, columns: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase) -> Batch | None:
        """Besides the usual, ``texts`` [rows, 2], numbers of query and text, and where the text stands in its row."""
        import torch

        from peftkit.data.batching import collate

        if "texts" not in columns:
            return None
        own = {name: torch.tensor(list(columns[name])) for name in ("texts", "row", "candidate")}
        return collate(columns, tokenizer) | own

    def losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        import torch.nn.functional as F

        logits = logits.float().squeeze(-1)
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits) / self.max_relevance, reduction="none")

    def outputs(self, model: torch.nn.Module, batch: Batch, pooling: str) -> dict[str, torch.Tensor]:
        """With ``texts``, the names of query and text, ``row`` and ``candidate``."""
        names = {"texts": name_parts(batch["texts"]), "row": batch["row"], "candidate": batch["candidate"]}
        return super().outputs(model, batch, pooling) | names

    def example_batch(self, rows: int, tokens: int, *, packed: bool = False) -> Batch:
        import torch

        own = {"texts": torch.arange(2 * rows).reshape(rows, 2), "candidate": torch.zeros(rows, dtype=torch.int64)}
        return super().example_batch(rows, tokens) | own | {"row": torch.arange(rows)}

    # -- evaluation ------------------------------------------------------------------------------------------------

    def lists(self, outputs: Outputs) -> Lists:
        """Every query's texts in the model's order, each text once; equal scores go by ``number_of``, as by chance.

        Queries all of whose texts are equally relevant, or not relevant, are left out: they have no order.
        """
        import numpy as np

        from peftkit.evaluation.retrieval import OF_LISTS, of_list

        names, scores = names_of(outputs), np.asarray(outputs["logits"], dtype=np.float64)[:, 0]
        labels = np.asarray(outputs["labels"], dtype=np.float64)
        order = np.lexsort((names[:, 1], -labels, names[:, 0]))  # of a text that a query has twice the best label
        ends = np.flatnonzero(np.diff(names[order, 0])) + 1
        columns: list[list[int]] = [[], [], []]
        values: dict[str, list[float]] = {name: [] for name in OF_LISTS}
        for members in np.split(order, ends):
            _, once = np.unique(names[members, 1], return_index=True)
            texts = members[once]
            relevant = self._relevant(labels[texts])
            if not relevant.any() or labels[texts].min() == labels[texts].max():
                continue
            ranked = np.argsort(-scores[texts], kind="stable")
            for column, example in zip(columns, (members.min(), members[0], texts[ranked[0]])):
                column.append(int(example))
            for name, value in of_list(labels[texts][ranked], relevant[ranked]).items():
                values[name].append(value)
        by_place = np.argsort(columns[0], kind="stable")
        first, best, top = (np.array(column, dtype=int)[by_place] for column in columns)
        return Lists(first, best, top, {name: np.array(each)[by_place] for name, each in values.items()})

    def _relevant(self, labels: np.ndarray) -> np.ndarray:
        """Which grades count as relevant in MRR and MAP."""
        return labels > 0 if self.relevant_from is None else labels >= self.relevant_from

    def metrics(self, outputs: Outputs, evaluation: EvaluationConfig) -> dict[str, float]:
        """``loss``, and the mean over queries of the metrics that the recipe names, or of all."""
        import numpy as np

        from peftkit.evaluation.decisions import mean_loss
        from peftkit.evaluation.retrieval import means

        values = self.lists(outputs).values
        known = means(values, np.arange(len(values[self.best_metric])))
        loss = {"loss": mean_loss(outputs)} if "loss" in outputs else {}
        return loss | {name: known[name] for name in self.metric_names(evaluation) if name != "loss"}

    def metric_names(self, evaluation: EvaluationConfig) -> tuple[str, ...]:
        from peftkit.errors import RecipeError, did_you_mean

        for name in evaluation.metrics or ():
            if name not in self.default_metrics:
                hint = did_you_mean(name, self.default_metrics)
                raise RecipeError(f"evaluation.metrics: no metric '{name}' of ranked texts: {hint}")
        return super().metric_names(evaluation)

    def statistics(self, outputs: Outputs) -> Statistics:
        """Of examples: a query counts where its first text is drawn."""
        from peftkit.evaluation import resampling
        from peftkit.evaluation.retrieval import means

        lists = self.lists(outputs)
        return resampling.of_groups(lists.first, len(outputs["labels"]), lambda chosen: means(lists.values, chosen))

    def right(self, outputs: Outputs) -> None:
        return None

    def details(self, outputs: Outputs, rows: Any, evaluation: EvaluationConfig) -> Row:
        """The queries whose texts are in the worst order."""
        import numpy as np

        lists, pairs = self.lists(outputs), _Pairs(outputs, rows)
        ndcg = lists.values["ndcg"]
        worst = [one for one in np.argsort(ndcg, kind="stable").tolist() if ndcg[one] < 1][: evaluation.worst]
        return {"mistakes": [
            {"text": pairs.row(int(lists.first[one]))["text"], "gold": pairs.text(int(lists.best[one])),
             "predicted": pairs.text(int(lists.top[one])), "error": 1 - float(ndcg[one]),
             **pairs.place(int(lists.first[one]))}
            for one in worst
        ]}  # fmt: skip

    def compare(self, outputs: Outputs, baseline: Outputs, name: str, confidence: float) -> tuple[Row | None, str]:
        """The paired bootstrap of nDCG over queries."""
        from peftkit.evaluation import paired_tests

        trained, other = (self.lists(one).values["ndcg"] for one in (outputs, baseline))
        if not len(trained):
            return None, ""
        test = paired_tests.paired(
            [lambda chosen: float(trained[chosen].mean())], [lambda chosen: float(other[chosen].mean())], len(trained),
            confidence=confidence,
        )  # fmt: skip
        return test, paired_tests.verdict(test, name)

    def prediction_rows(self, outputs: Outputs, rows: Sequence[Row]) -> list[Row]:
        """A line per text: where it is from, query and text, ``gold``, ``predicted``, its ``rank`` among those of the
        query, and at the query's first text the query's ``metrics``."""
        lists, pairs = self.lists(outputs), _Pairs(outputs, rows)
        at = {int(example): number for number, example in enumerate(lists.first)}
        queries = [pairs.row(example)["text"] for example in range(len(pairs))]
        answers = self.complete_answers(self.predictions(outputs), [(query,) for query in queries])
        return [
            {
                **pairs.place(example), "text": queries[example], "text_pair": pairs.text(example),
                "gold": float(outputs["labels"][example]), "predicted": round(answer.score, 6), "rank": answer.rank,
                "metrics": {name: round(float(values[at[example]]), 6) for name, values in lists.values.items()}
                if example in at else None,
            }
            for example, answer in enumerate(answers)
        ]  # fmt: skip

    def read_predictions(self, lines: Sequence[Row]) -> StoredPredictions:
        import numpy as np

        from peftkit.evaluation.retrieval import OF_LISTS, means

        values = {
            name: np.array([line["metrics"][name] if line["metrics"] else np.nan for line in lines])
            for name in OF_LISTS
        }
        known = np.array([line["metrics"] is not None for line in lines])
        gold = np.array([line["gold"] for line in lines])
        return StoredPredictions(gold, lambda rows: means(values, rows[known[rows]]))

    def predictions(self, outputs: Outputs, threshold: float | None = None) -> list[Any]:
        """The probability that each text is relevant, without a rank as yet."""
        import numpy as np

        logits = np.asarray(outputs["logits"], dtype=np.float64)[:, 0]
        return [Ranked(float(score), 1) for score in np.exp(-np.logaddexp(0, -logits))]

    def complete_answers(self, answers: Sequence[Any], texts: Sequence[Any]) -> list[Ranked]:
        """The answers with their ranks: 1 for the query's most relevant text; of equal ones the first."""
        ranks: dict[str, int] = {}
        ranked = list(answers)
        for number in sorted(range(len(ranked)), key=lambda number: -answers[number].score):
            query = texts[number][0]
            ranks[query] = ranks.get(query, 0) + 1
            ranked[number] = replace(answers[number], rank=ranks[query])
        return ranked

    # -- baselines -------------------------------------------------------------------------------------------------

    def constant_outputs(self, train: Any, rows: Any) -> tuple[dict[str, np.ndarray], str]:
        """The same score for every text, so that chance orders them."""
        import numpy as np

        outputs = _listed(rows)
        grades = _listed(train)["labels"]
        share = min(max(float(grades.mean()) / self.max_relevance, 1e-6), 1 - 1e-6)
        outputs["logits"] = np.full((len(outputs["labels"]), 1), np.log(share / (1 - share)))
        return self._with_loss(outputs), "the texts of a query in random order"

    def tfidf_outputs(self, train: Any, rows: Any) -> tuple[dict[str, np.ndarray], str]:
        """TF-IDF: the cosine of the words of query and text, weighted by how rare they are in training."""
        import numpy as np
        from sklearn.feature_extraction.text import TfidfVectorizer

        words = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
        words.fit(text for row in train for text in (row["text"], *candidates(row)))
        pairs = [(row["text"], text) for row in rows for text in candidates(row)]
        queries, texts = (words.transform(column) for column in zip(*pairs))
        scores = np.asarray(queries.multiply(texts).sum(axis=1)).reshape(-1, 1)
        return _listed(rows) | {
            "logits": scores
        }, "by the words that query and text share, the rare ones first (TF-IDF)"

    def _with_loss(self, outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch

        logits, labels = (torch.from_numpy(outputs[name]) for name in ("logits", "labels"))
        return outputs | {"loss": self.losses(logits, labels).numpy(), "weight": (labels * 0 + 1).numpy()}

    def class_counts(self, rows: Any) -> dict[str, int]:
        """Texts that are not relevant, and those that are; each with its query."""
        if "label" not in rows.column_names:
            return {}
        relevant = self._relevant(_listed(rows)["labels"])
        return dict(zip(self.info.labels, (int((~relevant).sum()), int(relevant.sum()))))

    # -- the model card --------------------------------------------------------------------------------------------

    def summary(self) -> str:
        return "gives a pair of a query and a text the probability that the text is relevant, which orders texts"

    def usage_code(self, pooling: str, max_length: int) -> list[str]:
        pairs = '["a query", "a query"], ["a text", "another text"]'
        lines = super().usage_code(pooling, max_length)
        return [line.replace('["a text", "another text"]', pairs) for line in lines]

    def answer_code(self) -> list[str]:
        return ["print(logits.squeeze(-1).sigmoid().tolist())  # as CrossEncoder.predict of sentence-transformers"]

    def peftkit_code(self) -> list[str]:
        return ['for one in model.predict([("a query", "a text"), ("a query", "another text")]):',
                "    print(one.score, one.rank)"]  # fmt: skip


class _Pairs:
    """The query and the text of each example."""

    def __init__(self, outputs: Outputs, rows: Any) -> None:
        self.rows, self.candidate, self.number = rows, outputs["candidate"], outputs["row"]
        self.by_example = len(rows) == len(self.candidate)
        """Whether ``rows`` has one for each example, rather than one for each row."""

    def __len__(self) -> int:
        return len(self.candidate)

    def row(self, example: int) -> Row:
        row: Row = self.rows[example if self.by_example else int(self.number[example])]
        return row

    def text(self, example: int) -> str:
        return candidates(self.row(example))[int(self.candidate[example])]

    def place(self, example: int) -> Row:
        row = self.row(example)
        return {"file": row.get("_file"), "line": row.get("_line")}


def _listed(rows: Any) -> dict[str, np.ndarray]:
    """Outputs of canonical rows, but for the logits."""
    import numpy as np
    import torch

    columns: dict[str, list[Any]] = {name: [] for name in ("labels", "texts", "row", "candidate")}
    for number, row in enumerate(rows):
        for place, text in enumerate(candidates(row)):
            columns["labels"].append(0.0 if place else float(row["label"]))
            columns["texts"].append([number_of(row["text"]), number_of(text)])
            columns["row"].append(number)
            columns["candidate"].append(place)
    names = name_parts(torch.tensor(columns.pop("texts"))).numpy()
    return {name: np.asarray(values) for name, values in columns.items()} | {"texts": names}

"""Heads, tasks and baselines are open: no caller asks which one it has, and a new pair needs no line of peftkit."""

from __future__ import annotations

import ast
import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

import peftkit
from peftkit import replace
from peftkit.schema.baseline import Baseline, BaselineResult
from peftkit.schema.head import Head, StoredPredictions
from peftkit.schema.recipe import Recipe
from peftkit.schema.registries import BASELINES, HEADS, TASKS
from peftkit.schema.task import Task
from peftkit.schema.types import Prediction, TaskInfo

ROOT = Path(peftkit.__file__).parent
OWNERS = ("heads", "tasks", "_recipes")
CALLERS = sorted(path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] not in OWNERS)
LITERALS = {("schema/recipe.py", "classification"), ("data/loading.py", "instruction")}
"""The task of a recipe that names none, and a column's name."""
OTHER_HEADS = "models/kernels"
"""Here a head is a module of torch's."""
IMPORTED = {("planning/machine_probe.py", "peftkit.heads.causal_lm"), ("inference", "peftkit.tasks.conversation")}
"""Built-in code that is used as a library: the loss that measures a machine, and the reading of prompts."""


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def is_one(node: ast.AST, *names: str) -> bool:
    """Whether an expression is a variable or an attribute of one of these names: ``head``, ``recipe.task``."""
    return (isinstance(node, ast.Name) and node.id in names) or (isinstance(node, ast.Attribute) and node.attr in names)


def asks_for_a_kind(node: ast.AST) -> bool:
    """``….problem_type``, ``task.kind``, or ``["problem_type"]`` of a run's JSON."""
    if isinstance(node, ast.Attribute):
        return node.attr == "problem_type" or (node.attr == "kind" and is_one(node.value, "task"))
    return (
        isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and node.slice.value == "problem_type"
    )


def decisions(tree: ast.Module) -> Iterator[ast.AST]:
    """What chooses by value: comparisons, subscripts, ``match`` and ``isinstance``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            yield node
        elif isinstance(node, ast.Subscript):
            yield node.slice
        elif isinstance(node, ast.Match):
            yield node.subject


def literals(tree: ast.Module) -> Iterator[ast.Constant]:
    """Strings that are code: docstrings, of attributes too, stand alone as statements."""
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node


@pytest.mark.parametrize("path", CALLERS, ids=name_of)
def test_no_caller_asks_which_head_or_task_it_has(path):
    tree, names = tree_of(path), {*HEADS, *TASKS}
    chosen = [node.lineno for one in decisions(tree) for node in ast.walk(one) if asks_for_a_kind(node)]
    named = [
        (node.lineno, node.value)
        for node in literals(tree)
        if node.value in names and (name_of(path), node.value) not in LITERALS
    ]
    looked_up = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in {"getattr", "hasattr", "isinstance"}
        and is_one(node.args[0], "task", "head")
        and not name_of(path).startswith(OTHER_HEADS)
    ]
    imported = [
        (name_of(path), node.module)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and (node.module or "").startswith(("peftkit.heads", "peftkit.tasks"))
        and not any(name_of(path).startswith(place) and node.module == module for place, module in IMPORTED)
        and not ((node.module or "") == "peftkit.tasks" and name_of(path).startswith("inference"))
    ]
    assert (chosen, named, looked_up, imported) == ([], [], [], [])


def test_the_templates_of_reports_ask_for_no_kind_either():
    for path in ROOT.rglob("*.html"):
        assert "problem_type" not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize("path", [one for one in CALLERS if OTHER_HEADS not in name_of(one)], ids=name_of)
def test_only_declared_members_of_heads_and_tasks_are_read(path):
    declared = {
        "head": set(dir(Head)) | set(Head.__annotations__),
        "task": set(dir(Task)) | set(Task.__annotations__),
    }
    undeclared = [
        (node.lineno, f"{name}.{node.attr}")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute)
        for name, members in declared.items()
        if is_one(node.value, name) and node.attr not in members
    ]
    assert undeclared == []


@pytest.mark.parametrize("name", HEADS.names())
def test_a_head_answers_all_that_is_asked_without_data(name):
    head = HEADS.get(name)(TaskInfo(name, ("a", "b")))
    assert head.summary()
    assert all(isinstance(line, str) for line in [*head.usage_code("own", 8), *head.peftkit_code(), *head.onnx_code()])
    batch = head.example_batch(2, 4)
    sequences, tokens = batch["input_ids"].shape  # of one or more texts in each row
    assert sequences % 2 == 0
    # a decoder's tokens count, too, but for its last position, which predicts nothing
    targets = batch["decoder_input_ids"].shape[1] - 1 if "decoder_input_ids" in batch else 0
    assert sequences * (tokens + targets) == 8
    assert len(batch["weight"]) == 2
    assert head.best_metric in head.metric_names(peftkit.schema.recipe.EvaluationConfig())
    assert all(baseline in BASELINES for baseline in head.baselines)


# -- a new task with a new head ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tags(Head):
    """A label for each token: nothing that the built-in heads do."""

    scores_tokens: ClassVar[bool] = True
    best_metric: ClassVar[str] = "token_accuracy"
    baselines: ClassVar[tuple[str, ...]] = ("demo_constant",)

    @classmethod
    def auto_class(cls, pooling: str) -> str:
        return "AutoModelForTokenClassification"

    def configure(self, config: Any) -> None:
        config.num_labels = self.width

    def _scores(self, model: Any, batch: Any) -> Any:
        inputs = {name: batch[name] for name in self.model_inputs if name in batch}
        return model(**inputs).logits.float()

    def _losses(self, model: Any, batch: Any) -> tuple[Any, Any]:
        import torch.nn.functional as F

        scores = self._scores(model, batch)
        return scores, F.cross_entropy(scores.transpose(1, 2), batch["labels"], reduction="none")  # 0 where -100

    def loss(self, model: Any, batch: Any, pooling: str) -> Any:
        return self._losses(model, batch)[1].sum()

    def outputs(self, model: Any, batch: Any, pooling: str) -> Any:
        scores, losses = self._losses(model, batch)
        right = (scores.argmax(-1) == batch["labels"]).sum(1)
        first = scores.softmax(-1)[:, 1]  # of the token after [CLS]
        return {"loss": losses.sum(1), "weight": (batch["labels"] >= 0).sum(1), "right": right, "first": first}

    def plain_logits(self, model: Any, batch: Any, pooling: str) -> Any:
        return self._scores(model, batch)[batch["attention_mask"].bool()]

    def example_batch(self, rows: int, tokens: int, *, packed: bool = False) -> Any:
        import torch

        ones = torch.ones((rows, tokens), dtype=torch.int64)
        return {"input_ids": ones, "attention_mask": ones, "labels": ones, "weight": torch.ones(rows)}

    def metrics(self, outputs: Any, evaluation: Any) -> dict[str, float]:
        weight = float(outputs["weight"].sum())
        values = {"loss": outputs["loss"], "token_accuracy": outputs["right"]}
        return {name: float(value.sum()) / weight for name, value in values.items()}

    def prediction_rows(self, outputs: Any, rows: Any) -> list[dict[str, Any]]:
        return [
            {"file": row["_file"], "line": row["_line"], "right": float(n)} for row, n in zip(rows, outputs["right"])
        ]

    def read_predictions(self, lines: Any) -> StoredPredictions:
        import numpy as np

        right = np.array([line["right"] for line in lines])
        return StoredPredictions(right * 0, lambda rows: {"token_accuracy": right[rows].mean()})

    def predictions(self, outputs: Any, threshold: float | None = None) -> list[Prediction]:
        each = [dict(zip(self.info.labels, scores.tolist())) for scores in outputs["first"]]
        return [Prediction(best := max(one, key=one.__getitem__), one[best], one) for one in each]

    def summary(self) -> str:
        return "tags the words of a text"

    def usage_code(self, pooling: str, max_length: int) -> list[str]:
        return ['print(model(**tokenizer("a text", return_tensors="pt")).logits.argmax(-1))']


class Tagging(Task):
    """Learns a tag for each word; words and tags are separated by spaces."""

    heads: ClassVar[tuple[str, ...]] = ("demo_tags",)

    kind: Literal["demo_tagging"] = "demo_tagging"

    def describe(self, splits: Any, data: Any) -> TaskInfo:
        tags = {tag for rows in splits.values() for row in rows for tag in row[data.label].split()}
        return TaskInfo("demo_tags", tuple(sorted(tags)))

    def canonical(self, row: Any, data: Any, info: TaskInfo) -> Any:
        return {"text": row[data.text], "tags": [info.labels.index(tag) for tag in row[data.label].split()]}

    def text_of(self, row: Any) -> str:
        return row["text"]

    def encode(self, rows: Any, tokenizer: Any, data: Any, info: TaskInfo) -> Any:
        encoded = tokenizer([text.split() for text in rows["text"]], is_split_into_words=True, truncation=True,
                            max_length=data.max_length)  # fmt: skip
        tags, labels = rows.get("tags"), []
        for row, ids in enumerate(encoded["input_ids"]):
            words = encoded.word_ids(row)
            known = tags is not None
            labels.append([tags[row][word] if known and word is not None else -100 for word in words])
            assert len(ids) == len(words)
        weights = [float(sum(label >= 0 for label in one)) for one in labels]
        return {"input_ids": encoded["input_ids"], "labels": labels, "weight": weights, "row": list(range(len(labels)))}


class Constant(Baseline):
    """A baseline of a head that it knows nothing of."""

    def compute(self, inputs: Any) -> BaselineResult:
        return BaselineResult({inputs.head.best_metric: 0.5}, note=f"of {len(inputs.rows)} rows")


@pytest.fixture
def demo():
    """The new items, in the registries for a while."""
    items = ((HEADS, "demo_tags", Tags), (TASKS, "demo_tagging", Tagging), (BASELINES, "demo_constant", Constant))
    for registry, name, item in items:
        registry.get(registry.names()[0])  # loaded
        registry.register(name)(item)
    yield
    for registry, name, _ in items:
        del registry._items[name]


@pytest.fixture
def tagging_recipe(bert, tmp_path):
    from tests.conftest import topic_rows

    file = tmp_path / "tags.csv"
    with file.open("w", newline="", encoding="utf-8") as stream:
        rows = [(text, " ".join("x" if word[0] < "n" else "o" for word in text.split())) for text, _ in topic_rows(60)]
        csv.writer(stream).writerows([("text", "label"), *rows])
    values = {
        "name": "tagging", "model": {"source": str(bert), "dtype": "float32", "dropout": 0.0},
        "data": {"source": str(file), "max_length": 64}, "method": {"kind": "lora", "rank": 4},
        "task": {"kind": "demo_tagging"}, "output_dir": str(tmp_path / "runs"), "tracking": [],
        "training": {"epochs": 12, "batch_size": 8, "learning_rate": 2e-2, "threads": 1},
    }  # fmt: skip
    return lambda: Recipe.parse(values)


def test_a_new_task_with_a_new_head_goes_the_whole_way(demo, tagging_recipe, tmp_path, capsys):
    from peftkit.experiments import scores
    from peftkit.inference.predict_file import predict_file

    recipe = tagging_recipe()
    assert peftkit.inspect(recipe).problem_type == "demo_tags"
    run = peftkit.train(recipe)
    assert run.metrics["test"]["token_accuracy"] > 0.65  # half of the tokens have either tag
    assert run.metrics["demo_constant"] == {"token_accuracy": 0.5}
    assert json.loads((run.path / "adapter" / "proof.json").read_text())["passed"]
    assert "tags the words of a text" in (run.path / "adapter" / "README.md").read_text()
    assert json.loads((run.path / "adapter" / "adapter_config.json").read_text())["task_type"] == "TOKEN_CLS"
    assert (run.path / "report.html").is_file()
    assert (
        json.loads((run.path / "plan.json").read_text()).get("plan")
        or "measured" in (run.path / "plan.json").read_text()
    )
    steps = run.metrics["training"]["steps"]
    again = peftkit.evaluate(run.path)
    assert again["token_accuracy"] == pytest.approx(run.metrics["test"]["token_accuracy"])
    assert peftkit.load(run.path).predict(["market of stock", "a"])[0].label in {"o", "x"}
    (tmp_path / "in.csv").write_text("text\nmarket of stock\na\n", encoding="utf-8")
    assert predict_file(run.path, file=tmp_path / "in.csv", column=None, out=tmp_path / "out.csv") == 2
    assert "probability_x" in (tmp_path / "out.csv").read_text(encoding="utf-8")
    stored = scores.read(run.path, "test")
    compared = scores.compare([stored], [stored], "token_accuracy", 0.95)
    assert compared is not None
    assert compared["p_value"] == 1.0
    longer = peftkit.train(replace(recipe, training={"epochs": 13}), resume=run.path, allow=("training.epochs",))
    assert longer.metrics["training"]["steps"] == steps * 13 // 12


def test_a_run_of_a_head_that_is_not_installed_is_refused_by_name(demo, tagging_recipe):
    from peftkit.errors import RunError
    from peftkit.export import manifest

    run = peftkit.train(replace(tagging_recipe(), training={"max_steps": 1}, export={"prove": False}), quiet=True)
    head = HEADS._items.pop("demo_tags")
    try:
        with pytest.raises(RunError, match="unknown head 'demo_tags'"):
            manifest.read(run.path / "adapter")
    finally:
        HEADS._items["demo_tags"] = head

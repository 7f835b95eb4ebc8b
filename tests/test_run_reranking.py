"""Reranking from rows to ranked texts: loss and scores of sentence-transformers, metrics of its evaluator, exports."""

from __future__ import annotations

import csv
import json
import random
from dataclasses import replace as replace_values

import httpx2 as httpx
import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator
from typer.testing import CliRunner

import peftkit
from peftkit import Recipe
from peftkit.cli.app import app
from peftkit.data.pipeline import encode, prepare
from peftkit.errors import DataError, Interrupted, RecipeError
from peftkit.export import run_export
from peftkit.heads.embedding import name_parts
from peftkit.inference import predict_file
from peftkit.models.tokenizer import load_tokenizer
from peftkit.planning import inspection
from peftkit.planning.devices import parse_device
from peftkit.planning.plan import make_plan
from peftkit.schema.head import head_of
from peftkit.schema.recipe import replace
from tests import tiny
from tests.conftest import TOPICS, topic_rows
from tests.serving.running import served


def write(path, header, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Queries for sports with six texts each: labels of 0 and 1, grades up to 3, and pairs with wrong texts."""
    folder, draw = tmp_path_factory.mktemp("judged"), random.Random(0)
    texts = {topic: [text for text, theirs in topic_rows(150) if theirs == topic] for topic in TOPICS}
    binary, graded, pairs = [], [], []
    for number in range(40):
        query = f"{draw.choice(TOPICS['sports'])} {draw.choice(tiny.WORDS)} {number}"
        right = draw.sample(texts["sports"], 2)
        wrong = draw.sample([*texts["business"], *texts["science"]], 4)
        rows = [(query, text, 1) for text in right] + [(query, text, 0) for text in wrong]
        draw.shuffle(rows)
        binary += rows
        graded += [(query, right[0], 3), (query, right[1], 2), (query, wrong[0], 1), (query, wrong[1], 0)]
        pairs.append((query, right[0], *wrong[:2]))
    draw.shuffle(binary)
    return {
        "binary": write(folder / "binary.csv", ("query", "text", "label"), binary),
        "graded": write(folder / "graded.csv", ("query", "text", "label"), graded),
        "pairs": write(folder / "pairs.csv", ("query", "text", "negative_1", "negative_2"), pairs),
    }


FIELDS = {"binary": {}, "graded": {"max_relevance": 3}, "pairs": {"negatives": ["negative_1", "negative_2"]}}


def recipe(base, files, kind, folder, **changes):
    values = {
        "name": "ranks", "model": {"source": str(base), "dtype": "float32", "dropout": 0.0},
        "method": {"kind": "lora", "rank": 8}, "task": {"kind": "reranking", **FIELDS[kind]},
        "data": {"source": str(files[kind]), "text": "query", "text_pair": "text", "max_length": 48,
                 "cleaning": {"near_duplicates": "off"}},
        "training": {"epochs": 3, "batch_size": 16, "learning_rate": 8e-3, "threads": 1, "save_every": 4},
        "export": {"prove": kind == "pairs"}, "tracking": [], "output_dir": str(folder),
    }  # fmt: skip
    return replace(Recipe.parse(values), **changes)


@pytest.fixture(scope="module")
def runs(bert, files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {kind: peftkit.train(recipe(bert, files, kind, folder), quiet=True) for kind in FIELDS}


@pytest.fixture(scope="module")
def cross_encoders(runs, tmp_path_factory):
    """Each run as sentence-transformers loads its merged weights."""
    judges = {}
    for kind, run in runs.items():
        folder, trained = tmp_path_factory.mktemp("merged"), peftkit.load(run.path)
        trained.merge()
        trained.model.save_pretrained(folder)
        trained.tokenizer.save_pretrained(folder)
        judges[kind] = CrossEncoder(str(folder), device="cpu", max_length=48)
    return judges


def lines_of(path):
    return list(csv.DictReader(path.open(encoding="utf-8")))


def invoke(*arguments):
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("kind", ["binary", "pairs"])
def test_training_beats_chance_and_is_reported(runs, kind):
    run = runs[kind]
    assert run.metrics["test"]["ndcg"] > run.metrics["majority"]["ndcg"]
    assert {"ndcg", "mrr", "map", "accuracy_at_1", "loss"} == {*run.metrics["test"]}
    report = (run.path / "report.html").read_text(encoding="utf-8")
    assert "accuracy at 1" in report
    assert "random order" in report
    (assessment,) = (json.loads((run.path / "assessment.json").read_text())["test"],)
    entry = assessment["metrics"]["ndcg"]
    assert entry["interval"] == "bootstrap"
    assert entry["low"] < entry["value"] <= entry["high"]
    assert all(one["error"] > 0 and one["gold"] != "" for one in assessment["mistakes"])


def test_a_query_is_in_one_split(bert, files, tmp_path):
    splits = prepare(recipe(bert, files, "binary", tmp_path)).splits
    queries = [{*rows["text"]} for rows in splits.values()]
    assert len(queries) == 3
    assert sum(map(len, queries)) == len(set.union(*queries)) == 40


@pytest.mark.parametrize("kind", ["graded", "pairs"])
def test_scores_and_loss_are_those_of_sentence_transformers(runs, cross_encoders, bert, files, kind, tmp_path):
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    run, theirs, trained = runs[kind], cross_encoders[kind], recipe(bert, files, kind, tmp_path)
    rows = list(prepare(trained).splits["validation"])
    pairs = [(row["text"], text) for row in rows for text in (row["text_pair"], *(row.get("negatives") or ()))]
    grades = [one for row in rows for one in (row["label"], *(0.0 for _ in row.get("negatives") or ()))]
    assert {*grades} == ({0.0, 1.0, 2.0, 3.0} if kind == "graded" else {0.0, 1.0})
    scores = [answer.score for answer in peftkit.load(run.path).predict(pairs)]
    np.testing.assert_allclose(scores, theirs.predict(pairs), atol=1e-5)
    columns = [[pair[side] for pair in pairs] for side in (0, 1)]
    with torch.no_grad():
        loss = BinaryCrossEntropyLoss(theirs)(
            columns, torch.tensor(grades) / max(FIELDS[kind].get("max_relevance", 1), 1)
        )
    assert run.metrics["validation"]["loss"] == pytest.approx(float(loss), rel=1e-4)


def test_metrics_are_those_of_sentence_transformers_and_scikit_learn(runs, cross_encoders, files):
    from sklearn.metrics import ndcg_score

    run, lines = runs["binary"], lines_of(files["binary"])
    lists: dict[str, list[tuple[str, float]]] = {}
    for line in lines:
        lists.setdefault(line["query"], []).append((line["text"], float(line["label"])))
    samples = [
        {"query": query, "positive": [t for t, y in rows if y], "negative": [t for t, y in rows if not y]}
        for query, rows in lists.items()
    ]  # fmt: skip
    judge = CrossEncoderRerankingEvaluator(samples, show_progress_bar=False, write_csv=False)
    expected = judge(cross_encoders["binary"])
    ours = json.loads(invoke("evaluate", run.path, "--file", files["binary"], "--json"))
    ours = ours.get("metrics", ours)
    names = {"mrr": "mrr@10", "ndcg": "ndcg@10", "map": "map"}
    assert {name: ours[name] for name in names} == pytest.approx(
        {name: expected[theirs] for name, theirs in names.items()}, abs=1e-6
    )
    assert 0.3 < ours["ndcg"] < 1

    run, lists = runs["graded"], {}
    for line in lines_of(files["graded"]):
        lists.setdefault(line["query"], []).append((line["text"], float(line["label"])))
    model = peftkit.load(run.path)
    gains = [[y for _, y in rows] for rows in lists.values()]
    scores = [[one.score for one in model.predict([(q, t) for t, _ in rows])] for q, rows in lists.items()]
    ours = json.loads(invoke("evaluate", run.path, "--file", files["graded"], "--json"))
    assert ours.get("metrics", ours)["ndcg"] == pytest.approx(ndcg_score(gains, scores, k=10), abs=1e-6)


def test_predictions_are_ranked_within_their_query(runs, files, tmp_path):
    run = runs["binary"]
    out = tmp_path / "ranked.jsonl"
    invoke("predict", run.path, "--file", files["binary"], "--out", out)
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [(row["query"], row["text"]) for row in rows] == [
        (line["query"], line["text"]) for line in lines_of(files["binary"])
    ]
    by_query: dict[str, list] = {}
    for row in rows:
        by_query.setdefault(row["query"], []).append(row)
    for texts in by_query.values():
        assert [row["rank"] for row in sorted(texts, key=lambda row: -row["score"])] == [*range(1, 7)]
    stored = [json.loads(line) for line in (run.path / "predictions" / "test.jsonl").read_text().splitlines()]
    ranks = {(row["query"], row["text"]): row["rank"] for row in rows}
    assert stored
    assert all(line["rank"] == ranks[line["text"], line["text_pair"]] for line in stored)


def test_chunks_and_other_requests_do_not_change_ranks(runs, files, monkeypatch, tmp_path):
    out = tmp_path / "ranked.csv"
    monkeypatch.setattr(predict_file, "CHUNK", 4)
    invoke("predict", runs["binary"].path, "--file", files["binary"], "--out", out)
    assert {row["rank"] for row in lines_of(out)} == {"1", "2", "3", "4", "5", "6"}
    pairs = [(line["query"], line["text"]) for line in lines_of(files["binary"])[:4]] + [("a", "b"), ("a", "c d")]
    with served(runs["binary"].path) as (service, address):
        predict = service.run.predict

        def with_others(texts):  # as if other requests, with better texts for the same queries, came in
            return [replace_values(one, rank=one.rank + 9) for one in predict(texts)]

        object.__setattr__(service.run, "predict", with_others)
        body = {"input": [list(pair) for pair in pairs]}
        answers = httpx.post(f"{address}/v1/classify", json=body, timeout=30).json()["data"]
    expected = peftkit.load(runs["binary"].path).predict(pairs)
    assert [(one["score"], one["rank"]) for one in answers] == [(round(one.score, 6), one.rank) for one in expected]
    assert sorted(one["rank"] for one in answers[4:]) == [1, 2]


def test_an_interrupted_run_ends_with_the_same_bytes(runs, bert, files, tmp_path):
    again = recipe(bert, files, "binary", tmp_path)
    with pytest.raises(Interrupted):
        peftkit.train(replace(again, training={"max_time": 1e-6}), quiet=True)
    resumed = peftkit.train(again, resume=True, quiet=True)
    one, other = (run.path / "adapter" / "adapter_model.safetensors" for run in (runs["binary"], resumed))
    assert one.read_bytes() == other.read_bytes()
    assert resumed.metrics["test"] == runs["binary"].metrics["test"]


@pytest.mark.slow
def test_exports_give_the_same_scores(runs, files, tmp_path):
    run = runs["pairs"]
    pairs = [(line["query"], line[name]) for line in lines_of(files["pairs"])[:8] for name in ("text", "negative_1")]
    expected = [one.score for one in peftkit.load(run.path).predict(pairs)]
    assert json.loads((run.path / "adapter" / "proof.json").read_text())["passed"]
    run_export(run.path, tmp_path / "merged", merge=True)
    merged = CrossEncoder(str(tmp_path / "merged"), device="cpu", max_length=48)
    np.testing.assert_allclose(merged.predict(pairs), expected, atol=1e-5)
    invoke("export", run.path, "--format", "onnx", "--to", tmp_path / "onnx")
    assert json.loads((tmp_path / "onnx" / "proof.json").read_text())["passed"]
    assert "CrossEncoder" in (run.path / "adapter" / "README.md").read_text(encoding="utf-8")


def test_search_reranks_what_it_finds(runs, bert, files):
    lines = lines_of(files["binary"])
    query, run = lines[0]["query"], runs["binary"]
    command = ["search", bert, "--corpus", files["binary"], "--column", "text", "--query", query, "--json", "--top", 5]
    plain = json.loads(invoke(*command))["texts"]
    ranked = json.loads(invoke(*command, "--rerank", run.path, "--candidates", 20))["texts"]
    wide = json.loads(invoke(*command[:-1], 20))["texts"]
    scores = [one.score for one in peftkit.load(run.path).predict([(query, row["text"]) for row in wide])]
    order = sorted(range(20), key=lambda place: -scores[place])[:5]
    assert [row["text"] for row in ranked] == [wide[place]["text"] for place in order]
    assert [row["cosine"] for row in ranked] == [wide[place]["score"] for place in order]
    assert [row["text"] for row in ranked] != [row["text"] for row in plain]
    fewer = json.loads(invoke(*command, "--rerank", run.path, "--candidates", 5))["texts"]
    assert {row["text"] for row in fewer} == {row["text"] for row in plain}


def test_search_refuses_a_run_that_ranks_nothing(bert, files, small_recipe):
    run = peftkit.train(replace(small_recipe, training={"max_steps": 1}), quiet=True)
    command = ["search", str(bert), "--corpus", str(files["binary"]), "--column", "text", "--query", "a"]
    result = CliRunner().invoke(app, [*command, "--rerank", str(run.path)])
    assert result.exit_code == 2
    assert "expected a run of task.kind=reranking, found task.kind=classification" in result.output
    result = CliRunner().invoke(app, [*command, "--candidates", "20"])
    assert result.exit_code == 2
    assert "give the run, or leave it out" in result.output


def encoded(recipe):
    tokenizer = load_tokenizer(recipe.model)
    prepared = prepare(recipe)
    return encode(prepared, tokenizer, recipe).splits["test"], head_of(prepared.info, recipe.task)


def test_each_field_takes_effect(bert, files, tmp_path):
    plain = recipe(bert, files, "graded", tmp_path)
    split, head = encoded(plain)
    labels = torch.tensor(split.examples["labels"])
    logits = torch.linspace(-2, 2, len(labels))[:, None]
    targets = labels / 3
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0], targets, reduction="none")
    torch.testing.assert_close(head.losses(logits, labels), expected)
    _, wider = encoded(replace(plain, task={"max_relevance": 6}))
    assert not torch.allclose(wider.losses(logits, labels), expected)

    batch = split.batch(np.arange(len(labels)), load_tokenizer(plain.model))
    outputs = {"logits": logits.numpy(), "labels": labels.numpy(), "row": batch["row"].numpy()}
    outputs |= {"candidate": batch["candidate"].numpy(), "texts": name_parts(batch["texts"]).numpy()}
    _, strict = encoded(replace(plain, task={"relevant_from": 3}))
    loose, strict = (one.metrics(outputs, plain.evaluation) for one in (head, strict))
    assert strict["ndcg"] == loose["ndcg"]
    assert strict["map"] < loose["map"]

    many, _ = encoded(recipe(bert, files, "pairs", tmp_path))
    few, _ = encoded(recipe(bert, files, "pairs", tmp_path, task={"negatives": ["negative_2"]}))
    assert len(many.lengths) == 1.5 * len(few.lengths)


def test_queries_without_an_order_do_not_count(bert, files, tmp_path):
    _, head = encoded(recipe(bert, files, "binary", tmp_path))
    labels = np.array([1.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    texts = name_parts(torch.tensor([[1, 10], [1, 11], [2, 10], [2, 12], [3, 10], [3, 11]])).numpy()
    outputs = {"logits": np.array([[0.1], [0.2], [0.3], [0.4], [0.5], [0.6]]), "labels": labels, "texts": texts}
    assert head.metrics(outputs, recipe(bert, files, "binary", tmp_path).evaluation)["mrr"] == 0.5
    alone = {name: values[:4] for name, values in outputs.items()}
    assert head.compare(alone, alone, "tfidf", 0.95) == (None, "")
    twice = {name: np.concatenate([values, values[4:]]) for name, values in outputs.items()}
    twice["labels"][-1] = 0.0
    assert head.lists(twice).values["map"].tolist() == [0.5]


@pytest.mark.parametrize(
    ("kind", "changes", "error", "message"),
    [
        ("binary", {"data": {"text_pair": None}}, RecipeError, "needs data.text_pair"),
        ("binary", {"data": {"text_pair": "txt"}}, DataError, "did you mean 'text'"),
        ("binary", {"data": {"label": ("label", "query")}}, RecipeError, "one column of relevance"),
        ("binary", {"data": {"labels": ("0", "1")}}, RecipeError, "data.labels belongs to classes"),
        ("binary", {"data": {"label": "text"}}, DataError, "expected a number that says how relevant"),
        ("pairs", {"task": {"negatives": ["negative_3"]}}, DataError, "did you mean 'negative_"),
        ("graded", {"task": {"max_relevance": 1}}, DataError, "set task.max_relevance to the highest grade"),
        ("binary", {"evaluation": {"metrics": ["f1"]}}, RecipeError, "no metric 'f1' of ranked texts"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_message(bert, files, kind, changes, error, message, tmp_path):
    with pytest.raises(error, match=message):
        peftkit.train(replace(recipe(bert, files, kind, tmp_path), **changes), quiet=True)
    assert not list(tmp_path.glob("ranks-*/adapter"))


def test_rows_without_an_order_are_refused(files, tmp_path):
    path = write(tmp_path / "apart.csv", ("query", "text", "label"), [(f"q {n}", f"t {n}", n % 2) for n in range(20)])
    with pytest.raises(DataError, match="there is nothing to order"):
        prepare(recipe("no/model", {**files, "binary": path}, "binary", tmp_path))
    path = write(tmp_path / "own.csv", ("query", "text", "negative_1", "negative_2"), [("q", "t", "t", "u")] * 2)
    with pytest.raises(DataError, match=r"line 2.*the row's own text is among the negatives"):
        prepare(recipe("no/model", {**files, "pairs": path}, "pairs", tmp_path))


def test_a_single_text_has_no_rank(runs):
    with pytest.raises(DataError, match=r"\(query, text\) pairs"):
        peftkit.load(runs["binary"].path).predict("a text")


def test_inspect_and_plan_count_every_text(bert, files, tmp_path):
    own = recipe(bert, files, "pairs", tmp_path)
    train = inspection.inspect(own, examples=1).splits[0]
    assert train.examples == 3 * train.rows
    assert train.classes == {"not relevant": 2 * train.rows, "relevant": train.rows}
    assert make_plan(own, parse_device("8GB")).peak.total > 0


def test_runs_are_compared_by_their_queries(runs, bert, files, tmp_path):
    other = peftkit.train(recipe(bert, files, "binary", tmp_path, training={"max_steps": 1}), quiet=True)
    shown = json.loads(invoke("compare", runs["binary"].path, other.path, "--metric", "ndcg", "--json"))
    assert "ndcg" in json.dumps(shown)


@pytest.mark.slow
def test_a_decoder_ranks(llama, files, tmp_path):
    run = peftkit.train(
        recipe(llama, files, "binary", tmp_path, training={"max_steps": 3}, export={"prove": True}), quiet=True
    )
    assert json.loads((run.path / "adapter" / "proof.json").read_text())["passed"]

"""Similarity from rows to vectors: losses and metrics of sentence-transformers, whole-batch gradients, exports."""

from __future__ import annotations

import csv
import dataclasses
import json
import random

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sentence_transformers import SentenceTransformer, util
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from typer.testing import CliRunner

import peftkit
from peftkit import Recipe
from peftkit.cli.app import app
from peftkit.data import batching
from peftkit.data.pipeline import encode, prepare
from peftkit.distributed.session import open_session
from peftkit.errors import DataError, Interrupted, ModelError, RecipeError
from peftkit.experiments import scores
from peftkit.export import run_export
from peftkit.inference import negatives
from peftkit.models.loading import build
from peftkit.models.tokenizer import load_tokenizer
from peftkit.planning.devices import local_device
from peftkit.planning.plan import PlanInputs, plan_workload
from peftkit.planning.workload import data_workload
from peftkit.schema.head import head_of
from peftkit.schema.recipe import replace
from peftkit.training.step import Stepper, TaskModule
from tests import tiny
from tests.conftest import topic_rows
from tests.models import architectures
from tests.planning.test_plan import MACHINE


def write(path, header, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same texts as scored pairs, as pairs that belong together with a wrong text, and with a class."""
    folder, draw = tmp_path_factory.mktemp("similar"), random.Random(0)
    rows = topic_rows(96)
    scored, pairs = [], []
    for number, (text, topic) in enumerate(rows):
        other, theirs = draw.choice(rows)
        scored.append((text, other, round((topic == theirs) + draw.random(), 2)))
        wrong = next(one for one, kind in draw.sample(rows, 96) if kind != topic)
        pairs.append((text, f"{topic} {draw.choice(tiny.WORDS)} {number}", wrong))
    pairs[1] = (pairs[0][0], *pairs[1][1:])  # a text with two that belong to it
    return {
        "scored_pairs": write(folder / "scored.csv", ("a", "b", "score"), scored),
        "text_pairs": write(folder / "pairs.csv", ("a", "b", "wrong"), pairs),
        "labeled_texts": write(folder / "classes.csv", ("a", "score"), rows),
    }


FIELDS = {
    "scored_pairs": {"dimensions": [8]}, "text_pairs": {"negatives": ["wrong"], "symmetric": True}, "labeled_texts": {}
}  # fmt: skip


def recipe(base, files, kind, folder, **changes):
    values = {
        "name": "alike", "model": {"source": str(base), "dtype": "float32", "dropout": 0.0},
        "method": {"kind": "lora", "rank": 4}, "task": {"kind": "similarity", **FIELDS[kind]},
        "data": {"source": str(files[kind]), "text": "a", "text_pair": "b", "label": "score", "max_length": 32,
                 "cleaning": {"duplicates": "off", "near_duplicates": "off", "leakage": "off"}},
        "training": {"epochs": 2, "batch_size": 16, "learning_rate": 5e-3, "threads": 1, "save_every": 4},
        "tracking": [], "output_dir": str(folder),
    }  # fmt: skip
    if kind == "labeled_texts":
        values["data"]["text_pair"] = None
    return replace(Recipe.parse(values), **changes)


@pytest.fixture(scope="module")
def runs(bert, files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {kind: peftkit.train(recipe(bert, files, kind, folder), quiet=True) for kind in FIELDS}


def stepper_of(recipe):
    tokenizer = load_tokenizer(recipe.model)
    prepared = prepare(recipe)
    encoded = encode(prepared, tokenizer, recipe)
    loaded = build(recipe, prepared.info, tokenizer, "cpu")
    module = TaskModule(loaded, head_of(prepared.info, recipe.task))
    session = open_session(recipe)
    return Stepper(recipe, session, module, None, None, encoded.splits["train"], tokenizer)


def gradients(recipe):
    """Loss, passes over the model and gradients of a batch."""
    stepper = stepper_of(recipe)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in stepper.module.named_parameters():
        if "lora_B" in name:  # which begins as 0
            parameter.data.normal_(generator=generator).mul_(0.05)
    stepper.module.train()
    rows = np.arange(24)
    loss = stepper.accumulate(rows, float(stepper.split.weights[rows].sum()), 0)
    return float(loss), len(stepper.passes_over(stepper.collate(rows), [])), {
        name: parameter.grad for name, parameter in stepper.module.named_parameters() if parameter.requires_grad
    }  # fmt: skip


@pytest.mark.parametrize("kind", FIELDS)
def test_a_batch_of_several_micro_batches_has_the_gradient_of_the_whole(bert, files, kind, tmp_path, monkeypatch):
    whole = recipe(bert, files, kind, tmp_path, training={"micro_batch_tokens": 10**6})
    cut = replace(whole, training={"micro_batch_tokens": 128})
    again, many, cached = gradients(cut)
    monkeypatch.setitem(batching.PASS_COST, "cpu", 10**6)
    loss, one, expected = gradients(whole)
    assert (one, many > 3) == (1, True)
    assert again == pytest.approx(loss, rel=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(cached[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_sharded_weights_are_refused(bert, files, tmp_path, monkeypatch):
    stepper = stepper_of(recipe(bert, files, "text_pairs", tmp_path))
    monkeypatch.setattr(stepper.session, "sharded", True)
    with pytest.raises(RecipeError, match="weights that are sharded over the processes"):
        dataclasses.replace(stepper)


def test_a_small_batch_is_embedded_once_and_has_the_gradient_of_the_whole(bert, files, tmp_path, monkeypatch):
    whole = recipe(bert, files, "text_pairs", tmp_path, training={"micro_batch_tokens": 10**6})
    unlimited = replace(whole, training={"micro_batch_tokens": None})
    with monkeypatch.context() as patch:
        patch.setitem(batching.PASS_COST, "cpu", 10**6)
        _, _, expected = gradients(whole)
    monkeypatch.setitem(batching.PASS_TOKENS, "cpu", 128)
    passes, forward = [], TaskModule.forward
    monkeypatch.setattr(TaskModule, "forward", lambda *args, **options: passes.append(1) or forward(*args, **options))
    for limit, times in ((10**6, 1), (10, 2)):
        monkeypatch.setitem(batching.GRAPH_TOKENS, "cpu", limit)
        passes.clear()
        _, many, kept = gradients(unlimited)
        assert len(passes) == times * many > 3
        for name, gradient in expected.items():
            torch.testing.assert_close(kept[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_both_passes_over_a_micro_batch_have_the_same_dropout(bert, files, tmp_path, monkeypatch):
    seen = []
    forward = TaskModule.forward

    def watched(self, batch, **options):
        result = forward(self, batch, **options)
        seen.append(result.detach().clone())
        return result

    monkeypatch.setattr(TaskModule, "forward", watched)
    gradients(recipe(
        bert, files, "text_pairs", tmp_path, training={"micro_batch_tokens": 128}, model={"dropout": 0.2},
        method={"dropout": 0.2},
    ))  # fmt: skip
    half = len(seen) // 2
    assert half > 3
    for first, second in zip(seen[:half], seen[half:]):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-6)
    assert not torch.equal(seen[0], seen[1][: len(seen[0])])


def vectors_of(batch, module):
    with torch.no_grad():
        return module(batch, use="vectors")


class Fixed(torch.nn.Module):
    """A model of sentence-transformers that answers with given vectors."""

    similarity_fct = staticmethod(util.cos_sim)

    def __init__(self, columns):
        super().__init__()
        self.columns = list(columns)

    def forward(self, features):
        return {"sentence_embedding": self.columns[features["column"]]}

    def similarity(self, a, b):
        return util.cos_sim(a, b)


@pytest.mark.parametrize("kind", ["scored_pairs", "text_pairs"])
def test_the_loss_is_that_of_sentence_transformers(bert, files, kind, tmp_path):
    from sentence_transformers.sentence_transformer.losses import CoSENTLoss, MultipleNegativesRankingLoss

    task = {"dimensions": [], "symmetric": False}
    stepper = stepper_of(recipe(bert, files, kind, tmp_path, task=task))
    stepper.module.eval()
    rows = np.arange(2, 18)  # without the text that has two
    batch = stepper.collate(rows)
    batch["texts"] = torch.arange(batch["texts"].numel()).reshape(batch["texts"].shape)  # it knows of no equal texts
    ours = float(stepper.module(batch).detach()) / len(rows)
    vectors = vectors_of(batch, stepper.module).reshape(len(rows), -1, 32)
    columns = [vectors[:, number] for number in range(vectors.shape[1])]
    features = [{"column": number} for number in range(len(columns))]
    kinds = {"scored_pairs": CoSENTLoss, "text_pairs": MultipleNegativesRankingLoss}
    theirs = kinds[kind](Fixed(columns), scale=20.0)(features, batch["labels"])
    assert ours == pytest.approx(float(theirs), rel=1e-5)


def test_texts_that_belong_to_a_row_are_no_negatives():
    from peftkit.heads.layers.similarity_losses import ranking

    torch.manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(4, 2, 8), dim=-1)
    apart = ranking(vectors, torch.arange(8).reshape(4, 2), 20.0, symmetric=False)
    names = torch.arange(8).reshape(4, 2)
    names[1, 0] = names[0, 0]  # rows 0 and 1 ask the same
    together = ranking(vectors, names, 20.0, symmetric=False)
    scores = 20 * vectors[:, 0] @ vectors[:, 1].T
    masked = scores.clone()
    masked[0, 1] = masked[1, 0] = float("-inf")
    cross = torch.nn.functional.cross_entropy
    torch.testing.assert_close(apart, cross(scores, torch.arange(4), reduction="sum"))
    torch.testing.assert_close(together, cross(masked, torch.arange(4), reduction="sum"))


@pytest.mark.parametrize("kind", FIELDS)
def test_training_beats_the_base_and_is_reported(runs, kind):
    run = runs[kind]
    metric = head_of(peftkit.load(run.path).info).best_metric
    assert run.metrics["test"][metric] > run.metrics["zero_shot"][metric]
    assert metric in (run.path / "report.html").read_text(encoding="utf-8")
    (stored,) = (scores.read(run.path, "test"),)
    assert stored.stored.statistics(np.arange(len(stored.rows)))[metric] == pytest.approx(
        run.metrics["test"][metric], abs=1e-5
    )


def test_correlations_are_those_of_scipy(runs, files):
    run, model = runs["scored_pairs"], peftkit.load(runs["scored_pairs"].path)
    lines = list(csv.DictReader(files["scored_pairs"].open(encoding="utf-8")))
    cosines = [answer.label for answer in model.predict([(line["a"], line["b"]) for line in lines])]
    first, second = (model.embed([line[name] for line in lines], normalize=True) for name in "ab")
    np.testing.assert_allclose(cosines, (first * second).sum(-1), atol=1e-5)
    gold = [float(line["score"]) for line in lines]
    short = [vectors[:, :8] / np.linalg.norm(vectors[:, :8], axis=1, keepdims=True) for vectors in (first, second)]
    result = CliRunner().invoke(app, ["evaluate", str(run.path), "--file", str(files["scored_pairs"]), "--json"])
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    metrics = shown.get("metrics", shown)
    assert metrics["spearmanr"] == pytest.approx(spearmanr(gold, cosines).statistic, abs=1e-5)
    assert metrics["pearsonr"] == pytest.approx(pearsonr(gold, cosines).statistic, abs=1e-5)
    assert metrics["spearmanr_8"] == pytest.approx(spearmanr(gold, (short[0] * short[1]).sum(-1)).statistic, abs=1e-5)


@pytest.mark.parametrize("layers", [None, [1]])
def test_texts_of_a_pair_are_not_padded_to_each_other_where_models_read_padding(layers, files, tmp_path):
    base = architectures.save_base(architectures.Case("fnet", "classifier"), tmp_path / "base")
    method = {"target_modules": ["dense"], "layers": layers}
    run = peftkit.train(recipe(base, files, "scored_pairs", tmp_path, method=method), quiet=True)
    model = peftkit.load(run.path)
    lines = list(csv.DictReader(files["scored_pairs"].open(encoding="utf-8")))
    first, second = (
        np.concatenate([model.embed(line[name], normalize=True) for line in lines]) for name in "ab"
    )  # fmt: skip
    cosines = [answer.label for answer in model.predict([(line["a"], line["b"]) for line in lines])]
    assert any(len(line["a"].split()) != len(line["b"].split()) for line in lines)
    np.testing.assert_allclose(cosines, (first * second).sum(-1), atol=1e-5)


def test_retrieval_metrics_are_those_of_sentence_transformers(runs, files):
    run = runs["text_pairs"]
    model = SentenceTransformer(str(run.path / "adapter"), device="cpu")
    lines = list(csv.DictReader(files["text_pairs"].open(encoding="utf-8")))
    corpus = {text: text for text in dict.fromkeys([line[name] for line in lines for name in ("b", "wrong")])}
    relevant: dict[str, set[str]] = {}
    for line in lines:
        relevant.setdefault(line["a"], set()).add(line["b"])
    judge = InformationRetrievalEvaluator(
        {text: text for text in relevant}, corpus, relevant, accuracy_at_k=[1], precision_recall_at_k=[1, 5, 10],
        show_progress_bar=False, write_csv=False,
    )  # fmt: skip
    expected = judge(model)
    result = CliRunner().invoke(app, ["evaluate", str(run.path), "--file", str(files["text_pairs"]), "--json"])
    shown = json.loads(result.stdout)
    metrics = shown.get("metrics", shown)
    names = {"accuracy_at_1": "accuracy@1", "recall_at_5": "recall@5", "recall_at_10": "recall@10", "mrr": "mrr@10",
             "ndcg": "ndcg@10", "map": "map@100"}  # fmt: skip
    for ours, theirs in names.items():
        assert metrics[ours] == pytest.approx(expected[f"cosine_{theirs}"], abs=1e-6), ours


def test_mined_negatives_are_those_of_sentence_transformers(runs, bert, files, tmp_path):
    from datasets import Dataset

    run = runs["text_pairs"]
    lines = list(csv.DictReader(files["text_pairs"].open(encoding="utf-8")))
    model = SentenceTransformer(str(run.path / "adapter"), device="cpu")
    pairs = Dataset.from_dict({name: [line[name] for line in lines] for name in ("a", "b")})
    wanted = util.mine_hard_negatives(
        pairs,
        model,
        num_negatives=2,
        range_max=len(lines),
        relative_margin=0.05,
        output_format="n-tuple",
        verbose=False,
    )
    out = tmp_path / "mined.csv"
    command = ["mine", str(run.path), "--file", str(files["text_pairs"]), "--out", str(out), "--count", "2"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    mined = list(csv.DictReader(out.open(encoding="utf-8")))
    ours = {(row["a"], row["b"]): (row["negative_1"], row["negative_2"]) for row in mined}
    assert ours == {(row["a"], row["b"]): (row["negative_1"], row["negative_2"]) for row in wanted}
    assert 0 < len(ours) < len(lines)
    assert f"{len(lines) - len(ours)} have too few texts" in done.output
    assert [row["wrong"] for row in mined] == [line["wrong"] for line in lines if (line["a"], line["b"]) in ours]
    trained = replace(
        recipe(bert, {"text_pairs": out}, "text_pairs", tmp_path), task={"negatives": ("negative_1", "negative_2")}
    )
    assert peftkit.train(replace(trained, training={"max_steps": 1}), quiet=True).metrics["training"]["steps"] == 1


def test_no_first_text_is_a_negative_and_nothing_that_belongs_to_it():
    firsts, seconds = ["x", "x", "p"], ["p", "q", "r"]
    queries = np.eye(4, dtype=np.float32)[[0, 0, 1]]
    documents = np.array([[0.9, 0.1, 0, 0], [0.8, 0, 0, 0], [0.5, 0.9, 0, 0]], dtype=np.float32)
    assert list(negatives.hardest(firsts, seconds, queries, documents, count=2, margin=0.0)) == [["r"], ["r"], ["q"]]
    assert list(negatives.hardest(firsts, seconds, queries, documents, count=1, margin=0.5)) == [[], [], ["q"]]


def test_mining_that_cannot_work_is_one_message(runs, files, tmp_path):
    run, file = runs["text_pairs"].path, files["text_pairs"]

    def mine(file, out, *options):
        done = CliRunner().invoke(app, ["mine", str(run), "--file", str(file), "--out", str(tmp_path / out), *options])
        return done.exit_code, done.output

    for out, options, message in (
        ("x.npy", [], "must end in .jsonl, .csv, .tsv"),
        ("x.csv", ["--text", "ax"], "ax"),
        ("x.csv", ["--margin", "1"], "no row has 1 texts of other rows"),
    ):
        code, shown = mine(file, out, *options)
        assert (code != 0, message in shown, (tmp_path / out).exists()) == (True, True, False), shown
    assert mine(file, "mined.jsonl")[0] == 0
    code, shown = mine(tmp_path / "mined.jsonl", "again.csv")
    assert (code != 0, "has this column already" in shown, (tmp_path / "again.csv").exists()) == (True, True, False)


@pytest.mark.parametrize("kind", FIELDS)
def test_exports_are_folders_of_sentence_transformers(runs, kind, tmp_path):
    texts = ["the team won the match", "the bank", "a price of oil and gold in the market of the year"]
    run = runs[kind]
    assert (run.path / "adapter" / "proof.json").is_file()
    expected = peftkit.load(run.path).embed(texts, normalize=True)
    np.testing.assert_allclose(SentenceTransformer(str(run.path / "adapter")).encode(texts), expected, atol=1e-5)
    if kind == "scored_pairs":
        run_export(run.path, tmp_path / "merged", merge=True)
        np.testing.assert_allclose(SentenceTransformer(str(tmp_path / "merged")).encode(texts), expected, atol=1e-5)
        np.testing.assert_allclose(peftkit.load(tmp_path / "merged").embed(texts, normalize=True), expected, atol=1e-5)


def test_an_interrupted_run_ends_with_the_same_bytes(runs, bert, files, tmp_path):
    again = recipe(bert, files, "text_pairs", tmp_path)
    with pytest.raises(Interrupted):
        peftkit.train(replace(again, training={"max_time": 1e-6}), quiet=True)
    resumed = peftkit.train(again, resume=True, quiet=True)
    one, other = (run.path / "adapter" / "adapter_model.safetensors" for run in (runs["text_pairs"], resumed))
    assert one.read_bytes() == other.read_bytes()
    assert resumed.metrics["test"] == runs["text_pairs"].metrics["test"]


def test_search_finds_what_a_full_comparison_finds(runs, files, capsys):
    run = runs["text_pairs"]
    lines = list(csv.DictReader(files["text_pairs"].open(encoding="utf-8")))
    model = peftkit.load(run.path)
    query = lines[5]["a"]
    cosines = model.embed([line["b"] for line in lines], normalize=True) @ model.embed(query, normalize=True)[0]
    arguments = ["search", str(run.path), "--corpus", str(files["text_pairs"]), "--query", query, "--top", "3"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    texts = json.loads(result.stdout)["texts"]
    order = np.argsort(-cosines, kind="stable")[:3]
    assert [one["b"] for one in texts] == [lines[row]["b"] for row in order]
    assert [one["score"] for one in texts] == pytest.approx(cosines[order].tolist(), abs=1e-5)
    shown = CliRunner().invoke(app, arguments)
    assert lines[order[0]]["b"] in shown.stdout


def test_a_corpus_keeps_its_own_column_of_scores(runs, tmp_path):
    corpus = tmp_path / "corpus.csv"
    corpus.write_text("b,score,cosine\nthe red king,high,7\nthe bank,low,8\n", encoding="utf-8")
    arguments = ["search", str(runs["text_pairs"].path), "--corpus", str(corpus), "--query", "the red king"]
    first = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)["texts"][0]
    assert (first["b"], first["corpus_score"], first["corpus_cosine"]) == ("the red king", "high", "7")
    assert first["score"] == pytest.approx(1, abs=1e-5)
    assert "1.0000  'the red king | high | 7'" in CliRunner().invoke(app, arguments).stdout


def test_a_plan_counts_the_texts_of_each_row(bert, files, tmp_path):
    planned = recipe(bert, files, "text_pairs", tmp_path)
    tokenizer = load_tokenizer(planned.model)
    prepared = prepare(planned)
    encoded = encode(prepared, tokenizer, planned)
    workload = data_workload(planned, encoded, "cpu")
    assert encoded.splits["train"].lengths.max() > 32, "a row has three texts of up to 32 tokens"
    assert workload.largest.tokens == encoded.splits["train"].lengths.max()
    plan = plan_workload(
        planned, local_device(), PlanInputs(tokenizer, prepared.info, encoded, MACHINE, 0, 0), workload
    )
    assert plan.to_json()["steps"] == workload.steps == 10


@pytest.mark.parametrize(
    ("kind", "task", "names"),
    [
        ("scored_pairs", {"loss": "mse"}, "labels"), ("scored_pairs", {"scale": 5.0}, ""),
        ("scored_pairs", {"dimensions": [4]}, ""), ("text_pairs", {"symmetric": False}, ""),
        ("text_pairs", {"negatives": []}, ""), ("text_pairs", {"scale": 5.0}, ""),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_learned_goes_by_the_loss_and_its_fields(bert, files, kind, task, names, tmp_path):
    if names:
        lines = list(csv.reader(files[kind].open(encoding="utf-8")))
        path = write(tmp_path / "halved.csv", lines[0], [(a, b, float(score) / 2) for a, b, score in lines[1:]])
        files = {**files, kind: path}
    losses = [gradients(recipe(bert, files, kind, tmp_path, task=changes))[0] for changes in ({}, task)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [{"kind": "bottleneck"}, {"kind": "bitfit"}, {"kind": "full"}], ids=str)
def test_other_methods_train_vectors(bert, files, layers, tmp_path):
    run = peftkit.train(
        replace(recipe(bert, files, "scored_pairs", tmp_path, training={"epochs": 1}), method=layers), quiet=True
    )
    proof = next(run.path.glob("*/proof.json"))
    assert '"passed": true' in proof.read_text()


@pytest.mark.parametrize(
    ("kind", "changes", "error", "message"),
    [
        ("text_pairs", {"data": {"text_pair": "c"}}, DataError, "data.text_pair"),
        ("text_pairs", {"task": {"negatives": ["rong"]}}, DataError, "did you mean 'wrong'"),
        ("text_pairs", {"data": {"text_pair": None}, "task": {"negatives": [], "symmetric": False}}, RecipeError,
         "needs pairs"),
        ("text_pairs", {"task": {"loss": "contrastive", "negatives": [], "symmetric": False}}, RecipeError,
         "reads one text per row"),
        ("scored_pairs", {"task": {"loss": "mse"}}, DataError, "divide the scores"),
        ("scored_pairs", {"task": {"symmetric": True}}, RecipeError, "belongs to task.loss=ranking"),
        ("scored_pairs", {"task": {"dimensions": [64]}}, RecipeError, "have 32 dimensions"),
        ("labeled_texts", {"task": {"loss": "cosent"}}, RecipeError, "reads pairs"),
        ("scored_pairs", {"method": {"kind": "prompt_tuning"}}, RecipeError, "an embedding of the text would mix"),
        ("scored_pairs", {"evaluation": {"metrics": ["f1"]}}, RecipeError, "no metric 'f1' of embeddings"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_message(bert, files, kind, changes, error, message, tmp_path):
    with pytest.raises(error, match=message):
        peftkit.train(replace(recipe(bert, files, kind, tmp_path), **changes), quiet=True)
    assert not list(tmp_path.glob("alike-*/adapter"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a b", "", "1")], "line 2.*column 'b'"),
        ([("a b", "c d", "x")], "line 2, column 'score'.*number"),
        ([("a b", "c d", "nan")], "column 'score'"),
    ],
)
def test_bad_rows_are_named_before_a_model_is_loaded(files, rows, message, tmp_path):
    path = write(tmp_path / "bad.csv", ("a", "b", "score"), [*rows, *[("one", f"two {n}", n) for n in range(20)]])
    with pytest.raises(DataError, match=message):
        prepare(recipe("no/model", {**files, "scored_pairs": path}, "scored_pairs", tmp_path))
    same = write(tmp_path / "same.csv", ("a", "b", "wrong"), [("x y", "x y", "z"), ("a", "b", "c")])
    with pytest.raises(DataError, match="both texts are the same"):
        prepare(recipe("no/model", {**files, "text_pairs": same}, "text_pairs", tmp_path))


def test_a_single_text_has_no_cosine(runs):
    with pytest.raises(DataError, match="pairs, of which this model gives the cosine"):
        peftkit.load(runs["text_pairs"].path).predict("a text")


def test_a_model_that_writes_from_another_text_is_refused(files, tmp_path):
    from tests.models import architectures
    from tests.models.architectures import Case

    folder = architectures.save_base(Case("t5", "classifier"), tmp_path)
    with pytest.raises(ModelError, match="choose an encoder or a decoder"):
        peftkit.train(recipe(folder, files, "scored_pairs", tmp_path / "runs"), quiet=True)


def test_a_decoder_is_pooled_at_its_last_token(llama, files, tmp_path):
    run = peftkit.train(recipe(llama, files, "scored_pairs", tmp_path, training={"epochs": 1}), quiet=True)
    model = peftkit.load(run.path)
    assert model.loaded.pooling == "last"
    texts = ["the team won the match", "the bank"]
    encoded = SentenceTransformer(str(run.path / "adapter")).encode(texts)
    np.testing.assert_allclose(encoded, model.embed(texts, normalize=True), atol=1e-5)

"""One split's assessment, its mistakes, and the baselines beside it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from sklearn import metrics as sk
from sklearn.dummy import DummyClassifier

from peftkit.evaluation import zero_shot_scores
from peftkit.evaluation.assessment import assess, compare
from peftkit.evaluation.baselines.majority import Majority
from peftkit.evaluation.baselines.zero_shot import ZeroShot
from peftkit.schema.baseline import BaselineInputs, BaselineResult
from peftkit.schema.head import head_of
from peftkit.schema.recipe import EvaluationConfig
from peftkit.schema.types import TaskInfo
from tests.tiny import tiny_bert, tiny_gpt2, tiny_llama, tiny_recipe

SINGLE = TaskInfo("single_label_classification", ("world", "sports", "business"))
MULTI = TaskInfo("multi_label_classification", ("joy", "fear"))
NUMBER = TaskInfo("regression", ("score",))
CONFIG = EvaluationConfig(worst=3)


def outputs_of(logits, labels, info):
    losses = head_of(info).losses(torch.tensor(logits), torch.tensor(labels)).numpy()
    made = {"logits": np.array(logits), "labels": np.array(labels, float), "loss": losses}
    return made | {"weight": np.ones(len(labels))}


def rows_of(count):
    texts = [f"text {number}" for number in range(count)]
    return Dataset.from_dict({"text": texts, "_file": ["f.csv"] * count, "_line": list(range(2, count + 2))})


@pytest.fixture(scope="module")
def classes():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 120)
    logits = generator.normal(size=(120, 3)) + 1.5 * np.eye(3)[labels]
    return outputs_of(logits, labels, SINGLE)


def test_an_assessment_of_classes_is_scikit_learns_and_json(classes):
    made = assess(head_of(SINGLE), classes, rows_of(120), CONFIG, split="test")
    gold, found = classes["labels"].astype(int), classes["logits"].argmax(1)
    report = sk.classification_report(gold, found, target_names=SINGLE.labels, output_dict=True)
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    assert made["confusion"] == sk.confusion_matrix(gold, found).tolist()
    for row in made["per_class"]:
        expected = report[row["label"]]
        assert (row["precision"], row["recall"], row["f1"], row["rows"]) == pytest.approx(
            (expected["precision"], expected["recall"], expected["f1-score"], expected["support"])
        )
    for name, entry in made["metrics"].items():
        assert entry["low"] <= entry["value"] <= entry["high"], name
    assert made["metrics"]["accuracy"]["interval"] == "wilson"
    assert made["metrics"]["loss"]["greater_is_better"] is False
    assert sum(one["count"] for one in made["calibration"]["bins"]) == 120


def test_the_worst_mistakes_are_wrong_sure_and_placed(classes):
    mistakes = assess(head_of(SINGLE), classes, rows_of(120), CONFIG)["mistakes"]
    probabilities = torch.from_numpy(classes["logits"]).softmax(1).numpy()
    wrong = np.flatnonzero(classes["logits"].argmax(1) != classes["labels"])
    expected = sorted(wrong, key=lambda row: -probabilities[row].max())[:3]
    assert [row["line"] for row in mistakes] == [row + 2 for row in expected]
    assert all(row["gold"] != row["predicted"] and row["file"] == "f.csv" for row in mistakes)
    assert mistakes[0]["confidence"] == pytest.approx(probabilities[expected[0]].max())


def test_no_more_mistakes_are_listed_than_were_made():
    made = assess(head_of(SINGLE), outputs_of(np.eye(3) * 5, [0, 1, 0], SINGLE), rows_of(3), CONFIG)
    assert [(row["gold"], row["predicted"]) for row in made["mistakes"]] == [("world", "business")]


def test_a_class_without_rows_keeps_its_line():
    made = assess(head_of(SINGLE), outputs_of(np.eye(3)[:2] * 5, [0, 1], SINGLE), rows_of(2), CONFIG)
    assert [row["rows"] for row in made["per_class"]] == [1, 1, 0]
    assert made["metrics"]["f1"]["value"] == 1.0


def test_an_assessment_of_sets():
    logits, labels = [[4.0, -1.0], [-3.0, 2.0], [5.0, 1.0]], [[1.0, 0.0], [1.0, 1.0], [1.0, 0.0]]
    made = assess(head_of(MULTI), outputs_of(logits, labels, MULTI), rows_of(3), CONFIG)
    assert made["metrics"]["exact_match"]["value"] == pytest.approx(1 / 3)
    assert [row["rows"] for row in made["per_class"]] == [3, 1]
    # row 1 was surer of its wrong decision (sigmoid(3)) than row 2 (sigmoid(1))
    assert [(row["line"], row["gold"], row["predicted"]) for row in made["mistakes"]] == [
        (3, ["joy", "fear"], ["fear"]), (4, ["joy"], ["joy", "fear"]),
    ]  # fmt: skip
    json.dumps(made, allow_nan=False)


def test_an_assessment_of_numbers():
    labels = np.arange(20.0)
    outputs = outputs_of(labels[:, None] + np.eye(20)[:, 3:4] * 2, labels, NUMBER)
    made = assess(head_of(NUMBER), outputs, rows_of(20), CONFIG)
    assert made["metrics"]["mse"]["value"] == pytest.approx(4 / 20)
    assert [(row["line"], row["error"], row["gold"]) for row in made["mistakes"]] == [(5, 2.0, 3.0)]
    assert len(made["pairs"]) == 20
    json.dumps(made, allow_nan=False)


def test_the_level_of_the_intervals_is_the_recipes(classes):
    wide, narrow = (
        assess(head_of(SINGLE), classes, rows_of(120), EvaluationConfig(confidence=level))["metrics"]["f1"]
        for level in (0.99, 0.5)
    )
    assert wide["low"] < narrow["low"] < narrow["high"] < wide["high"]


def inputs_of(info, train=(), labels=(), **changes):
    """Rows with these labels, a base that is never asked, and no cache."""
    texts = [TEXTS[number % len(TEXTS)] for number in range(len(labels))]
    values = {
        "recipe": tiny_recipe("none", evaluation={"worst": 3}), "head": head_of(info), "tokenizer": None,
        "train": Dataset.from_dict({"label": list(train)}), "backbone": None, "base_outputs": None,
        "rows": Dataset.from_dict({"text": texts, "label": list(labels)}), "language_model": None,
        "cached": lambda kind, values, compute: compute(),
    }  # fmt: skip
    return BaselineInputs(**values | changes)


def majority(train, labels, info):
    inputs = inputs_of(info, train, labels)
    result = Majority().compute(inputs)
    return result, inputs.head.decide(result.outputs["logits"]).predicted.tolist()


def test_the_majority_is_scikit_learns_dummy():
    train, test = [0, 1, 1, 2, 1], [1, 0, 1, 2]
    found, predicted = majority(train, test, SINGLE)
    dummy = DummyClassifier(strategy="prior").fit(np.zeros((5, 1)), train)
    zeros = np.zeros((4, 1))
    assert predicted == dummy.predict(zeros).tolist()
    assert found.metrics["accuracy"] == dummy.score(zeros, test)
    assert found.metrics["loss"] == pytest.approx(sk.log_loss(test, dummy.predict_proba(zeros)))
    assert "always 'sports'" in found.note


def test_the_majority_of_numbers_is_the_mean():
    found, predicted = majority([1.0, 3.0], [0.0, 4.0, 2.0], NUMBER)
    assert found.metrics["mse"] == pytest.approx(8 / 3)
    assert predicted == [2.0, 2.0, 2.0]


def test_the_majority_of_sets_decides_each_label():
    found, predicted = majority([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0]], MULTI)
    assert (predicted, found.metrics["exact_match"]) == ([[1, 0]], 1.0)


def test_class_weights_weigh_the_majoritys_loss_as_in_training():
    found, _ = majority([0, 0, 0, 1], [0, 1], TaskInfo(SINGLE.problem_type, ("a", "b"), (1.0, 5.0)))
    expected = torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0]))(
        torch.log(torch.tensor([[0.75, 0.25]] * 2)), torch.tensor([0, 1])
    )
    assert found.metrics["loss"] == pytest.approx(float(expected))


def test_a_language_model_has_no_majority():
    assert Majority().compute(inputs_of(TaskInfo("causal_lm"))) is None


def base(folder, kind):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return kind.from_pretrained(folder).eval(), tokenizer


TEXTS = ["the game and the team", "good", "the stock market and the price of oil at the bank", "world day"]


def test_zero_shot_of_an_encoder_is_the_cosine_to_the_descriptions(tmp_path):
    from transformers import AutoModel

    model, tokenizer = base(tiny_bert(tmp_path / "bert"), AutoModel)
    scores = zero_shot_scores.of_encoder(model, tokenizer, TEXTS, SINGLE.labels, max_length=64, batch_size=2)

    def embed(text):
        with torch.no_grad():
            vector = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        return torch.nn.functional.normalize(vector, dim=0)

    for row, text in enumerate(TEXTS):
        for column, label in enumerate(SINGLE.labels):
            meaning = (embed(label) + embed(f"this text is about {label}")) / 2
            cosine = torch.nn.functional.cosine_similarity(embed(text), meaning, dim=0)
            assert scores[row, column] == pytest.approx(float(cosine), abs=1e-5)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_zero_shot_of_a_decoder_is_the_likelihood_of_the_name(make, tmp_path):
    from transformers import AutoModelForCausalLM

    model, tokenizer = base(make(tmp_path / "decoder"), AutoModelForCausalLM)
    scores = zero_shot_scores.of_decoder(model, tokenizer, TEXTS, SINGLE.labels, max_length=64, batch_size=2)
    start = [tokenizer.bos_token_id]
    for row, text in enumerate(TEXTS):
        for column, label in enumerate(SINGLE.labels):
            prompt = start + tokenizer(text)["input_ids"] + tokenizer("\n\nThis text is about")["input_ids"]
            name = tokenizer(f" {label}")["input_ids"]
            ids = torch.tensor([prompt + name])
            labels = torch.tensor([[-100] * len(prompt) + name])
            with torch.no_grad():
                expected = -model(input_ids=ids, labels=labels).loss  # transformers' own mean over the name's tokens
            assert scores[row, column] == pytest.approx(float(expected), abs=1e-4)


def test_zero_shot_leaves_the_models_mode_alone_and_scores_no_probabilities(tmp_path):
    from transformers import AutoModel

    model, tokenizer = base(tiny_bert(tmp_path / "bert"), AutoModel)
    model.train()
    found = ZeroShot().compute(inputs_of(SINGLE, labels=[1, 0, 2, 0], backbone=model, tokenizer=tokenizer))
    assert model.training
    assert {"loss", "calibration_error"}.isdisjoint(found.metrics)
    assert found.metrics["accuracy"] == np.mean(found.outputs["logits"].argmax(1) == [1, 0, 2, 0])


@pytest.mark.parametrize(
    ("info", "said"),
    [
        (TaskInfo(SINGLE.problem_type, ("0", "1")), "data.labels"),
        (TaskInfo(SINGLE.problem_type, ("LABEL_0", "LABEL_1")), "data.labels"),
        (MULTI, "one label"),
        (NUMBER, "one label"),
    ],
)
def test_zero_shot_is_skipped_with_a_reason(info, said):
    found = ZeroShot().compute(inputs_of(info, labels=[0] * 4))
    assert found.metrics == {}
    assert said in found.note
    entry = compare("zero_shot", found, head_of(info), {"loss": np.zeros(4)}, 0.95)
    assert (entry["rows"], entry["comparison"], entry["verdict"]) == (None, None, "")


def test_a_baseline_of_some_rows_is_compared_on_those(classes):
    gold, found = classes["labels"].astype(int), classes["logits"].argmax(1)
    rows = np.arange(0, 120, 2)
    wrong = {"logits": np.eye(3)[(gold[rows] + 1) % 3], "labels": gold[rows]}
    made = compare("zero_shot", BaselineResult({"accuracy": 0.0}, wrong, rows, "half"), head_of(SINGLE), classes, 0.95)
    assert made["rows"] == 60
    assert made["comparison"]["difference"] == pytest.approx(np.mean(found[rows] == gold[rows]))
    assert made["verdict"].startswith("finetuning helped")
    json.dumps(made)

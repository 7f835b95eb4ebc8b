"""Token classification from rows to spans: learned, resumed, exported and read by plain transformers and peft."""

import json
import pickle
import random

import pytest
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer, pipeline

import peftkit
from peftkit import Recipe
from peftkit.data.pipeline import encode_rows
from peftkit.errors import Interrupted, RunError
from peftkit.evaluation.entities import entities
from peftkit.experiments import scores
from peftkit.export import run_export
from peftkit.inference.predict_file import predict_file
from peftkit.schema.recipe import replace
from peftkit.schema.types import Words
from tests import tiny

PEOPLE, PLACES = ("king", "lord", "player", "actor"), ("world", "market", "bank", "team")
TEXT = "the good king was in the market of the bank"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Two sentences of every kind that one can learn by their words; a folder with three splits."""
    folder, draw = tmp_path_factory.mktemp("rows"), random.Random(0)
    for split, count in (("train", 60), ("validation", 12), ("test", 16)):
        lines = []
        for _ in range(count):
            person, place = draw.choice(PEOPLE), draw.choice(PLACES)
            tokens = [
                "the",
                draw.choice(["good", "bad", "new"]),
                person,
                "was",
                "in",
                "the",
                place,
                draw.choice(tiny.WORDS),
            ]
            tags = ["O", "O", "B-PER", "O", "O", "B-LOC", "I-LOC", "O"]
            lines.append(json.dumps({"tokens": tokens, "tags": tags}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def recipe(base, rows, folder, **changes):
    values = {
        "name": "tags", "model": {"source": str(base), "dtype": "float32", "dropout": 0.0},
        "method": {"kind": "lora", "rank": 4}, "task": {"kind": "token_classification"},
        "data": {"source": str(rows), "text": "tokens", "label": "tags", "max_length": 32, "cleaning": {
            "duplicates": "off", "near_duplicates": "off", "leakage": "off"}},
        "training": {"epochs": 4, "batch_size": 8, "learning_rate": 0.02, "threads": 1, "save_every": 4},
        "tracking": [], "output_dir": str(folder),
    }  # fmt: skip
    return replace(Recipe.parse(values), **changes)


@pytest.fixture(scope="module")
def run(bert, rows, tmp_path_factory):
    return peftkit.train(recipe(bert, rows, tmp_path_factory.mktemp("runs")), quiet=True)


def spans(predicted):
    return [(span.start, span.end, span.label) for span in predicted.spans]


def test_it_learns_and_is_compared_with_the_commonest_tag(run):
    assert run.metrics["test"]["f1"] > 0.9
    assert run.metrics["test"]["f1_macro"] > 0.9
    assert run.metrics["frequent_tag"]["f1"] > 0
    lines = [json.loads(line) for line in (run.path / "predictions" / "test.jsonl").read_text().splitlines()]
    assert len(lines) == 16
    assert lines[0]["gold"][2] == "B-PER"
    assert lines[0]["words"][0] == "the"
    stored = scores.read(run.path, "test")
    assert scores.interval([stored], "f1", 0.95)[1] <= 1.0
    assert stored.stored.statistics(slice(None))["f1"] == pytest.approx(run.metrics["test"]["f1"])
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert "By class" in page
    assert "PER" in page


def test_spans_point_into_the_text_and_plain_transformers_finds_the_same(run, tmp_path):
    loaded = peftkit.load(run.path, merge=False)
    (predicted,) = loaded.predict(TEXT)
    assert [TEXT[span.start : span.end] for span in predicted.spans] == [span.text for span in predicted.spans]
    assert ("king", "PER") in [(span.text, span.label) for span in predicted.spans]
    assert loaded.predict([]) == []
    assert loaded.predict(" ")[0].spans == ()
    with pytest.raises(RunError, match="scores words, not texts"):
        loaded.logits(TEXT)
    tagger = pipeline(
        "token-classification", model=loaded.model, tokenizer=loaded.tokenizer, aggregation_strategy="first",
        device="cpu",
    )  # fmt: skip
    for text in (TEXT, "bad lord, in the world. new player"):
        (predicted,), theirs = loaded.predict(text), tagger(text)
        assert spans(predicted) == [(each["start"], each["end"], each["entity_group"]) for each in theirs]
        assert [span.probability for span in predicted.spans] == pytest.approx(
            [each["score"] for each in theirs], abs=1e-5
        )


@pytest.mark.parametrize("form", ["merged", pytest.param("onnx", marks=pytest.mark.slow)])
def test_exports_give_the_same_spans(run, tmp_path, form):
    if form == "onnx":
        pytest.importorskip("onnxscript", reason="the onnx extra is not installed")
    run_export(run.path, tmp_path / form, **({"merge": True} if form == "merged" else {"to_format": "onnx"}))
    again, before = peftkit.load(tmp_path / form), peftkit.load(run.path)
    assert list(map(spans, again.predict([TEXT]))) == list(map(spans, before.predict([TEXT])))


def test_a_long_text_is_read_in_windows_and_joined(run):
    text = " ".join(["the good king was in the market"] * 12)
    loaded = peftkit.load(run.path)
    rows = [loaded.recipe.task.input_row((text,))]
    split = encode_rows(rows, loaded.tokenizer, loaded.recipe, loaded.info)
    assert len(split.lengths) > 3
    assert max(split.lengths) <= 32
    words = [word for example in split.examples["words"] for word in example if word >= 0]
    assert sorted(words) == list(range(12 * 7))  # each once, wherever the windows were cut
    (predicted,) = loaded.predict(text)
    assert sum(span.label == "PER" for span in predicted.spans) >= 8
    assert [span.start for span in predicted.spans] == sorted(span.start for span in predicted.spans)


def test_an_interrupted_run_ends_with_the_same_bytes(run, bert, rows, tmp_path):
    again = recipe(bert, rows, tmp_path)
    with pytest.raises(Interrupted):
        peftkit.train(replace(again, training={"max_time": 1e-6}), quiet=True)
    resumed = peftkit.train(again, resume=True, quiet=True)
    name = "adapter/adapter_model.safetensors"
    assert (resumed.path / name).read_bytes() == (run.path / name).read_bytes()
    assert resumed.metrics["test"] == run.metrics["test"]


@pytest.mark.parametrize(
    "method",
    [
        pytest.param("frozen", marks=pytest.mark.slow),
        "bottleneck",
        pytest.param("full", marks=pytest.mark.slow),
        pytest.param("top_k", marks=pytest.mark.slow),
        pytest.param("prefix_tuning", marks=pytest.mark.slow),
        pytest.param("bitfit", marks=pytest.mark.slow),
    ],
)
def test_other_methods_train_and_export_with_proof(method, bert, rows, tmp_path):
    fields = {"kind": method, **({"k": 1} if method == "top_k" else {})}
    small = recipe(bert, rows, tmp_path, method=fields, training={"epochs": 1})
    made = peftkit.train(small, quiet=True)
    (proof,) = made.path.glob("*/proof.json")
    assert json.loads(proof.read_text(encoding="utf-8"))["passed"]
    assert peftkit.load(made.path).predict([TEXT])


@pytest.mark.parametrize(
    "maker",
    [
        tiny.tiny_roberta,
        pytest.param(tiny.tiny_distilbert, marks=pytest.mark.slow),
        pytest.param(tiny.tiny_llama, marks=pytest.mark.slow),
    ],
)
def test_other_architectures_train_and_export_with_proof(maker, rows, tmp_path):
    small = recipe(maker(tmp_path / "base"), rows, tmp_path / "runs", training={"epochs": 2})
    made = peftkit.train(small, quiet=True)
    assert json.loads((made.path / "adapter" / "proof.json").read_text(encoding="utf-8"))["passed"]
    loaded = peftkit.load(made.path)
    together, alone = loaded.predict([TEXT, "the king"]), [loaded.predict(text)[0] for text in (TEXT, "the king")]
    assert list(map(spans, together)) == list(map(spans, alone))


def test_batches_and_micro_batches_change_no_gradient(bert, rows, tmp_path):
    losses = []
    for micro in (8, 3):
        small = recipe(bert, rows, tmp_path / str(micro), export={"prove": False}, evaluation={"baselines": []},
                       training={"max_steps": 3, "micro_batch": micro})  # fmt: skip
        made = peftkit.train(small, quiet=True)
        losses.append(made.metrics["validation"]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_gradients_are_those_of_plain_transformers(bert):
    """The summed loss over words equals transformers' mean loss times their number."""
    from peftkit.heads.token_classification import TokenClassification
    from peftkit.schema.types import TaskInfo

    labels = ("O", "B-PER", "I-PER")
    model = AutoModelForTokenClassification.from_pretrained(bert, num_labels=3).eval()
    encoded = AutoTokenizer.from_pretrained(bert)(
        ["the king was", "the good world of the king"], padding=True, return_tensors="pt"
    )
    gold = torch.full(encoded["input_ids"].shape, -100)
    gold[:, 1:4] = torch.tensor([0, 1, 2])
    head = TokenClassification(TaskInfo("token_classification", labels))
    loss = head.loss(model, {**encoded, "labels": gold}, "own")
    assert float(loss) == pytest.approx(6 * float(model(**encoded, labels=gold).loss), rel=1e-5)


def test_the_words_of_a_file_are_kept_and_its_spans_are_those_that_evaluate_counts(bert, tmp_path):
    draw = random.Random(0)
    blocks = []
    for _ in range(60):
        words = ["the", f"@{draw.choice(PEOPLE)}", f"#{draw.choice(PLACES)}!", "don't", draw.choice(tiny.WORDS)]
        blocks.append("\n".join(f"{word}\t{tag}" for word, tag in zip(words, ["O", "B-PER", "B-LOC", "O", "O"])))
    path = tmp_path / "tweets.conll"
    path.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")
    run = peftkit.train(recipe(bert, path, tmp_path / "runs", training={"epochs": 2}), quiet=True)
    stored = [json.loads(line) for line in (run.path / "predictions" / "test.jsonl").read_text().splitlines()]
    sentences = {line["line"]: line for line in stored}
    out = tmp_path / "spans.jsonl"
    assert predict_file(run.path, file=path, column=None, out=out) == 60
    compared = 0
    for number, row in enumerate(map(json.loads, out.read_text(encoding="utf-8").splitlines())):
        words = [line.split("\t")[0] for line in blocks[number].split("\n")]
        assert row["text"] == " ".join(words)
        if (line := sentences.get(1 + 6 * number)) is None:
            continue
        expected = [(kind, " ".join(words[first:last])) for first, last, kind in entities(line["predicted"])]
        assert [(span["label"], span["text"]) for span in row["spans"]] == expected
        compared += len(expected)
    assert compared > 5
    words = Words(["the", "@king"])
    assert pickle.loads(pickle.dumps(words)).words == words.words == ("the", "@king")
    assert words == "the @king"

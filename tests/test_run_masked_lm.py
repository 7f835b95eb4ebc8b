"""Masked language modeling from texts to an adapted encoder: learned, resumed, exported and read by transformers."""

import dataclasses
import json
import random

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, pipeline

import peftkit
from peftkit import Recipe
from peftkit.data.pipeline import encode, prepare
from peftkit.errors import DataError, Interrupted, MethodError, ModelError, RunError
from peftkit.experiments import scores
from peftkit.export import run_export
from peftkit.heads.masked_lm import MaskedLM
from peftkit.heads.masks import IGNORE
from peftkit.schema.recipe import DataConfig, replace
from peftkit.schema.types import TaskInfo
from peftkit.tasks.masked_lm import MaskedLanguageModeling
from tests import tiny
from tests.masked_models import ARCHITECTURES, masked_model

PLACE_OF = {"king": "world", "lord": "bank", "player": "team", "actor": "film"}
TEXT = "the good [MASK] was in the team"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Documents of sentences in which the place follows from the person; a folder with three splits."""
    folder, draw = tmp_path_factory.mktemp("texts"), random.Random(0)
    for split, count in (("train", 50), ("validation", 10), ("test", 12)):
        lines = ["text"]
        for _ in range(count):
            people = [draw.choice(list(PLACE_OF)) for _ in range(draw.randint(1, 5))]
            adjective = draw.choice(["good", "bad", "new"])
            lines.append(" ".join(f"the {adjective} {one} was in the {PLACE_OF[one]}" for one in people))
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return masked_model(tmp_path_factory.mktemp("models") / "bert")


def recipe(base, texts, folder, **changes):
    values = {
        "name": "domain", "model": {"source": str(base), "dtype": "float32"},
        "method": {"kind": "lora", "rank": 4}, "task": {"kind": "masked_lm"},
        "data": {"source": str(texts), "max_length": 24, "cleaning": {
            "duplicates": "off", "near_duplicates": "off", "leakage": "off"}},
        "training": {"epochs": 4, "batch_size": 8, "learning_rate": 0.02, "threads": 1, "save_every": 7},
        "evaluation": {"baselines": []}, "tracking": [], "output_dir": str(folder),
    }  # fmt: skip
    return replace(Recipe.parse(values), **changes)


@pytest.fixture(scope="module")
def run(base, texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return peftkit.train(recipe(base, texts, folder, evaluation={"baselines": None}), quiet=True)


@pytest.fixture(scope="module")
def merged(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports") / "merged"
    run_export(run.path, folder, merge=True)
    return folder


def test_it_learns_and_is_compared_with_the_base(run):
    before, after = run.metrics["zero_shot"], run.metrics["test"]
    assert after["loss"] < 0.7 * before["loss"]
    assert after["pseudo_perplexity"] == pytest.approx(torch.tensor(after["loss"]).exp().item(), rel=1e-5)
    assert before["tokens"] == after["tokens"]  # the same masks
    stored = scores.read(run.path, "test")
    assert stored.stored.statistics(slice(None))["loss"] == pytest.approx(after["loss"], rel=1e-4)
    limits = json.loads((run.path / "assessment.json").read_text())["test"]["metrics"]
    for name in ("pseudo_perplexity", "token_accuracy"):
        assert limits[name]["low"] <= after[name] <= limits[name]["high"]
    assert not limits["pseudo_perplexity"]["greater_is_better"]
    assert "pseudo perplexity" in (run.path / "report.html").read_text(encoding="utf-8")


def test_a_finished_run_is_evaluated_to_the_same_metrics(run, texts):
    again = peftkit.evaluate(run.path)
    assert again["loss"] == pytest.approx(run.metrics["test"]["loss"], rel=1e-5)
    assert again["tokens"] == run.metrics["test"]["tokens"]
    of_file = peftkit.evaluate(run.path, file=texts / "test.csv")
    assert of_file["loss"] == pytest.approx(run.metrics["test"]["loss"], rel=1e-5)


def test_masks_are_filled_as_by_the_pipeline_of_the_merged_export(run, merged):
    fill = pipeline("fill-mask", model=str(merged), device="cpu")
    ours = peftkit.load(run.path)
    for text in (TEXT, "the [MASK] lord was in the [MASK]"):
        (answer,), theirs = ours.predict(text), fill(text)
        theirs = theirs if isinstance(theirs[0], list) else [theirs]
        assert len(answer.masks) == len(theirs) == text.count("[MASK]")
        for candidates, others in zip(answer.masks, theirs, strict=True):
            assert [one.token for one in candidates] == [one["token_str"] for one in others]
            assert [one.probability for one in candidates] == pytest.approx([o["score"] for o in others], abs=1e-5)
    several = ours.predict([TEXT, "a [MASK] and [MASK]", "[MASK]"], batch_size=2)
    assert [len(one.masks) for one in several] == [1, 2, 1]
    assert [one.token for one in several[0].masks[0]] == [one.token for one in ours.predict(TEXT)[0].masks[0]]
    assert several[0].columns()["masks"][0][0].keys() == {"token", "probability"}
    with pytest.raises(DataError, match=r"has no \[MASK\]"):
        ours.predict("the king")
    with pytest.raises(RunError, match="use predict"):
        ours.logits(TEXT)


def test_candidates_says_how_many_are_given(run):
    loaded = peftkit.load(run.path)
    assert len(loaded.predict(TEXT)[0].masks[0]) == 5
    changed = replace(loaded.recipe, task={"candidates": 2})
    assert len(dataclasses.replace(loaded, recipe=changed).predict(TEXT)[0].masks[0]) == 2


def test_a_merged_export_is_a_masked_language_model_and_an_encoder(run, merged):
    assert json.loads((merged / "proof.json").read_text(encoding="utf-8"))["passed"]
    batch = AutoTokenizer.from_pretrained(merged)(["the king was in the world"], return_tensors="pt")
    trained = peftkit.load(run.path, merge=False).model
    with torch.no_grad():
        expected = trained(**batch, output_hidden_states=True)
        masked, report = AutoModelForMaskedLM.from_pretrained(merged, output_loading_info=True)
        assert not report["missing_keys"]
        assert torch.allclose(masked.eval()(**batch).logits, expected.logits, atol=1e-5)
        encoder = AutoModel.from_pretrained(merged).eval()
        assert torch.allclose(encoder(**batch).last_hidden_state, expected.hidden_states[-1], atol=1e-5)
    first, second = (peftkit.load(folder).predict(TEXT)[0].masks[0] for folder in (merged, run.path))
    assert [one.token for one in first] == [one.token for one in second]


def test_the_adapted_encoder_is_the_base_of_a_classifier(merged, tmp_path):
    rows = "\n".join(f"the {one} was {word},{one}" for one in ("king", "lord") for word in tiny.WORDS[:12])
    (tmp_path / "rows.csv").write_text(f"text,label\n{rows}\n", encoding="utf-8")
    values = {
        "name": "after", "model": {"source": str(merged), "dtype": "float32"}, "method": {"kind": "full"},
        "data": {"source": str(tmp_path / "rows.csv"), "max_length": 16, "cleaning": {"near_duplicates": "off"}},
        "training": {"epochs": 1, "batch_size": 4, "threads": 1}, "export": {"prove": False},
        "evaluation": {"baselines": []}, "tracking": [], "output_dir": str(tmp_path / "runs"),
    }  # fmt: skip
    assert "accuracy" in peftkit.train(Recipe.parse(values), quiet=True).metrics["validation"]


def test_an_interrupted_run_ends_with_the_same_bytes(run, base, texts, tmp_path):
    again = recipe(base, texts, tmp_path, evaluation={"baselines": None})
    with pytest.raises(Interrupted):
        peftkit.train(replace(again, training={"max_time": 1e-6}), quiet=True)
    resumed = peftkit.train(again, resume=True, quiet=True)
    name = "adapter/adapter_model.safetensors"
    assert (resumed.path / name).read_bytes() == (run.path / name).read_bytes()
    assert resumed.metrics["test"] == run.metrics["test"]


def masks_of(changed, epochs, tokenizer):
    """Hidden places of the first training rows in each epoch, and what the batch adds to the denominator."""
    split = encode(prepare(changed), tokenizer, changed).splits["train"]
    rows, masks, weights = np.arange(6), [], []
    for epoch in epochs:
        drawn = split if epoch is None else split.for_epoch(changed.training.seed, epoch)
        batch = drawn.batch(rows, tokenizer)
        masks.append((batch["labels"] != IGNORE).tolist())
        weights.append((drawn.weight(rows, tokenizer), float(batch["weight"].sum())))
    return masks, weights


@pytest.mark.parametrize("whole_word", [False, True])
def test_every_epoch_hides_other_tokens_and_counts_them(base, texts, tmp_path, whole_word):
    tokenizer = AutoTokenizer.from_pretrained(base)
    changed = recipe(base, texts, tmp_path, task={"whole_word": whole_word, "mask_probability": 0.3})
    masks, weights = masks_of(changed, (0, 1, 0, None, None), tokenizer)
    assert masks[0] == masks[2] != masks[1]
    assert masks[3] == masks[4] != masks[0]  # held-out rows: the same in every evaluation
    assert all(counted == collated for counted, collated in weights)
    other, _ = masks_of(replace(changed, training={"seed": 5}), (0,), tokenizer)
    assert other[0] != masks[0]


def test_fields_change_what_is_learned(base, texts, tmp_path):
    losses = {}
    for name, task in {
        "as it is": {}, "probability": {"mask_probability": 0.4}, "whole_word": {"whole_word": True},
        "shares": {"replacement_shares": [0.2, 0.4, 0.4]},
    }.items():  # fmt: skip
        small = recipe(base, texts, tmp_path / name, task=task, export={"prove": False}, training={"max_steps": 3})
        losses[name] = peftkit.train(small, quiet=True).metrics["validation"]["loss"]
    assert len(set(losses.values())) >= 3
    assert losses["probability"] != losses["as it is"] != losses["shares"]


def test_micro_batches_change_no_gradient(base, texts, tmp_path):
    losses = []
    for micro in (8, 3):
        small = recipe(base, texts, tmp_path / str(micro), export={"prove": False}, model={"dropout": 0.0},
                       task={"whole_word": True}, training={"max_steps": 3, "micro_batch": micro})  # fmt: skip
        losses.append(peftkit.train(small, quiet=True).metrics["validation"]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    "method",
    ["bottleneck", *(pytest.param(one, marks=pytest.mark.slow) for one in ("full", "bitfit", "top_k", "ia3"))],
)
def test_other_methods_train_and_export_with_proof(method, base, texts, tmp_path):
    fields = {"kind": method, **({"k": 1} if method == "top_k" else {})}
    trained = peftkit.train(recipe(base, texts, tmp_path, method=fields, training={"max_steps": 4}), quiet=True)
    (proof,) = trained.path.glob("*/proof.json")
    assert json.loads(proof.read_text(encoding="utf-8"))["passed"]
    assert peftkit.load(trained.path).predict(TEXT)[0].masks[0]


@pytest.mark.parametrize(
    "method", ["lora", pytest.param("bitfit", marks=pytest.mark.slow), pytest.param("full", marks=pytest.mark.slow)]
)
def test_an_encoder_without_output_layers_gets_new_ones(method, texts, tmp_path):
    bare = masked_model(tmp_path / "bare", "roberta", head=False)
    small = recipe(bare, texts, tmp_path, method={"kind": method}, training={"max_steps": 12})
    trained = peftkit.train(replace(small, evaluation={"baselines": None}), quiet=True)
    page = (trained.path / "report.html").read_text(encoding="utf-8")
    assert "lm_head.dense, lm_head.layer_norm are new and trained in full" in page
    assert "know nothing yet" in json.loads((trained.path / "baselines.json").read_text())[0]["note"]
    assert trained.metrics["test"]["loss"] < trained.metrics["zero_shot"]["loss"]
    (proof,) = trained.path.glob("*/proof.json")
    assert json.loads(proof.read_text(encoding="utf-8"))["passed"]
    if method == "lora":
        run_export(trained.path, tmp_path / "merged", merge=True)
        fill = pipeline("fill-mask", model=str(tmp_path / "merged"), device="cpu")
        text = "the good <mask> was"
        assert peftkit.load(trained.path).predict(text)[0].masks[0][0].token == fill(text)[0]["token_str"]


def test_output_layers_are_never_quantized(texts, tmp_path):
    pytest.importorskip("bitsandbytes")
    bare = masked_model(tmp_path / "bare", head=False)
    small = recipe(bare, texts, tmp_path, quantization={"kind": "nf4"}, training={"max_steps": 2})
    trained = peftkit.train(small, quiet=True)
    assert json.loads((trained.path / "adapter" / "proof.json").read_text(encoding="utf-8"))["passed"]
    model = peftkit.load(trained.path).model
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert all(kind != "Linear4bit" for name, kind in kinds.items() if ".cls." in name)
    assert "Linear4bit" in kinds.values()


def test_a_type_of_peft_that_cannot_save_new_layers_is_refused(texts, tmp_path):
    bare = masked_model(tmp_path / "bare", head=False)
    fields = {"kind": "peft", "peft_type": "TRAINABLE_TOKENS", "arguments": {"token_indices": [5]}}
    changed = recipe(bare, texts, tmp_path, method=fields)
    with pytest.raises(MethodError, match=r"base lacks cls.predictions.transform.dense"):
        peftkit.train(changed, quiet=True)


def test_a_decoder_is_refused(texts, tmp_path):
    with pytest.raises(ModelError, match="no mask token"):
        peftkit.train(recipe(tiny.tiny_gpt2(tmp_path / "gpt2"), texts, tmp_path), quiet=True)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_and_gradients_are_those_of_plain_transformers(name, tmp_path):
    """The summed loss over hidden tokens is transformers' mean times their number, padding or not."""
    folder = masked_model(tmp_path, name)
    model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    tokenizer, head, info = (
        AutoTokenizer.from_pretrained(folder),
        MaskedLM(TaskInfo("masked_lm")),
        TaskInfo("masked_lm"),
    )
    rows = {"text": ["the good king was in the world", "hello new market and a bank of the world, one year on"]}
    columns = MaskedLanguageModeling().encode(rows, tokenizer, DataConfig(source="x", max_length=48), info)
    batch = head.collate(columns, tokenizer)
    loss = head.loss(model, batch, "own")
    loss.backward()
    ours = {key: weight.grad.clone() for key, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    inputs = {key: batch[key] for key in head.model_inputs if key in batch}
    count = int((batch["labels"] != IGNORE).sum())
    theirs = model(**inputs, labels=batch["labels"])
    (theirs.loss * count).backward()
    assert float(loss) == pytest.approx(count * float(theirs.loss), rel=1e-5)
    for key, weight in model.named_parameters():
        if weight.grad is not None:
            assert torch.allclose(ours[key], weight.grad, atol=1e-4), key
    outputs = head.outputs(model, batch, "own")
    scored = batch["labels"] != IGNORE
    right = (theirs.logits.argmax(-1) == batch["labels"]) & scored
    assert outputs["correct"].tolist() == right.sum(1).tolist()
    assert outputs["weight"].tolist() == scored.sum(1).tolist()
    assert float(outputs["loss"].sum()) == pytest.approx(float(loss.detach()), rel=1e-5)


SLOW = ("roberta", "xlm_roberta", "distilbert", "deberta_v2", "deberta_v3")
"""Architectures whose loss and layers are tested above, and that train like one of the others."""


@pytest.mark.parametrize("name", [
    pytest.param(one, marks=[pytest.mark.slow] if one in SLOW else []) for one in ARCHITECTURES if one != "bert"
])  # fmt: skip
def test_other_architectures_train_and_export_with_proof(name, texts, tmp_path):
    small = recipe(masked_model(tmp_path / "base", name), texts, tmp_path / "runs", training={"max_steps": 3})
    trained = peftkit.train(small, quiet=True)
    assert json.loads((trained.path / "adapter" / "proof.json").read_text(encoding="utf-8"))["passed"]
    assert peftkit.load(trained.path).predict(f"the {AutoTokenizer.from_pretrained(small.model.source).mask_token} was")

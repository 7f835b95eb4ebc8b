"""Architectures that need care: what reads a text, how rows are padded, and which models are refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

import peftkit
from peftkit import replace
from peftkit.data.pipeline import EncodedSplit
from peftkit.errors import ModelError
from peftkit.evaluation import zero_shot_scores
from peftkit.evaluation.baselines.zero_shot import ZeroShot
from peftkit.inference import embeddings
from peftkit.methods.targets import linear_names
from peftkit.models.architectures import padding_note, reads_ahead
from peftkit.models.kernels import lora_linear
from peftkit.models.tokenizer import tokenizer_in
from peftkit.schema.head import head_of
from tests import tiny
from tests.models import architectures
from tests.models.architectures import TYPES, Case, cases

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
LABELS = ("good film", "bad game")
QUICK = [
    Case(name, "classifier") for name in ("distilbert", "funnel", "longformer", "t5", "xlnet")
] + [Case(name, "language model") for name in ("bart", "mamba", "phimoe", "xlnet")]  # fmt: skip


def cells():
    """Model type → its cells on the page."""
    lines = (line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `"))
    return {line.split("`")[1]: line.split(" | ")[1:] for line in lines}


def on_page(case):
    return cells()[case.model_type][architectures.USES.index(case.use)].removesuffix(" |")


def test_the_page_has_every_type_that_transformers_registers():
    rows = cells()
    assert sorted(rows) == TYPES
    for case in cases():
        assert on_page(case).startswith(("trained, ", "refused: ", "not tried: ")), str(case)


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_a_few_types_do_what_the_page_says(case, tmp_path):
    assert architectures.outcome(case, tmp_path) == on_page(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in cases() if case not in QUICK], ids=str)
def test_every_type_does_what_the_page_says(case, tmp_path):
    assert architectures.outcome(case, tmp_path) == on_page(case)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    def save(model_type):
        config = architectures.tiny_config(model_type)
        config.architectures = [f"{type(config).__name__.removesuffix('Config')}Model"]
        folder = architectures.tiny.tiny_tokenizer(tmp_path_factory.mktemp(model_type), "roberta")
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(folder)
        return folder

    return save


@pytest.mark.parametrize("model_type", ["t5", "mt5", "umt5", "bart"])
def test_an_encoder_decoder_is_read_by_its_encoder(base, model_type):
    folder = base(model_type)
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    texts = ["a good film", "the bank and the price of oil"]
    scores = zero_shot_scores.of_encoder(model, tokenizer, texts, LABELS, max_length=32, batch_size=2)

    def embed(text):
        with torch.no_grad():
            states = model.get_encoder()(**tokenizer(text, return_tensors="pt")).last_hidden_state
        return torch.nn.functional.normalize(states[0].mean(0), dim=0)

    for row, text in enumerate(texts):
        for column, label in enumerate(LABELS):
            meaning = embed(label) + embed(f"this text is about {label}")
            expected = torch.nn.functional.cosine_similarity(embed(text), meaning, dim=0)
            assert scores[row, column] == pytest.approx(float(expected), abs=1e-5)
    vectors = torch.from_numpy(embeddings.of_model(str(folder), device="cpu").embed(texts, normalize=True))
    torch.testing.assert_close(vectors, torch.stack([embed(text) for text in texts]), rtol=1e-2, atol=1e-2)


def test_funnel_is_skipped_by_the_zero_shot_baseline_with_a_note(tmp_path):
    folder = architectures.save_base(Case("funnel", "classifier"), tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    inputs = SimpleNamespace(
        head=head_of(architectures.every_method.CLASSES), sharded=False, language_model=None,
        tokenizer=AutoTokenizer.from_pretrained(folder), backbone=classifier.base_model,
        rows={"text": ["a film", "games"], "label": [0, 1]}, cached=lambda kind, values, compute: compute(),
        recipe=tiny.tiny_recipe(folder),
    )  # fmt: skip
    result = ZeroShot().compute(inputs)
    assert not result.metrics
    assert result.note.startswith("skipped: funnel gives ")
    assert "rows of one length" in padding_note(classifier.config)


@pytest.mark.parametrize("layers", ["all", 1])
def test_a_model_that_reads_padding_never_sees_any(base, small_recipe, layers, monkeypatch):
    recipe = replace(
        small_recipe, model={"source": str(base("fnet"))}, training={"epochs": 1},
        method={"target_modules": ["dense"], "layers": None if layers == "all" else [1]},
    )  # fmt: skip
    batches = []
    collate = EncodedSplit.batch
    monkeypatch.setattr(EncodedSplit, "batch", lambda split, rows, tokenizer: batches.append(
        [len(split.examples[int(row)]["input_ids"]) for row in rows]) or collate(split, rows, tokenizer))  # fmt: skip
    run = peftkit.train(recipe, quiet=True)
    assert max(map(len, batches)) > 1
    model = peftkit.load(run.path)
    texts = ["a good film", "the bank and the price of oil", "play the game", "the team and the player won the match"]
    together, vectors = model.logits(texts), model.embed(texts)
    alone = np.concatenate([model.logits(text) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    np.testing.assert_allclose(vectors, np.concatenate([model.embed(text) for text in texts]), atol=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(run.path / "adapter")
    padded = model.model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.detach().numpy()
    assert np.abs(padded - alone).max() > 1e-4, "padding would change its scores"
    lengths = {length for batch in batches for length in batch}
    assert len(lengths) > 1
    probes = [batch for batch in batches if len(set(batch)) > 1]
    assert len(probes) <= 1, "but for the probe that looks for a frozen trunk"


def test_xlnet_pads_on_the_left_and_others_on_the_right(base, bert):
    assert tokenizer_in(base("xlnet")).padding_side == "left"
    assert tokenizer_in(bert).padding_side == "right"


def test_models_may_change_the_output_of_an_adapted_layer_in_place():
    x, weight, bias = torch.randn(2, 3, 8), torch.randn(5, 8), torch.randn(5)
    a, b = torch.randn(2, 8, requires_grad=True), torch.randn(5, 2, requires_grad=True)
    lora_linear.linear(x, weight, bias, a, b, 0.5, 0.0).div_(4).square().sum().backward()
    grads, a.grad, b.grad = (a.grad, b.grad), None, None
    ((torch.nn.functional.linear(x, weight, bias) + 0.5 * x @ a.T @ b.T) / 4).square().sum().backward()
    torch.testing.assert_close(grads, (a.grad, b.grad))


def test_an_encoder_that_was_made_a_decoder_writes():
    assert reads_ahead(architectures.tiny_config("bert"))
    assert not reads_ahead(architectures.tiny_config("bert", is_decoder=True))
    assert not reads_ahead(architectures.tiny_config("llama"))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case("mra", "classifier"), "exists for CUDA only"),
        (Case("reformer", "classifier"), "rows of exactly 64 tokens"),
        (Case("roberta", "language model"), "read texts in both directions"),
        (Case("pegasus", "language model"), "an encoder's reading of another text"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_by_one_message(case, message, tmp_path):
    folder = architectures.save_base(case, tmp_path)
    with pytest.raises(ModelError, match=message):
        architectures.every_method.train(case, folder, rate=1e-3)


def test_layers_that_compute_more_than_a_matmul_are_not_adapted():
    def names(model_type):
        model = architectures.AUTO["language model"].from_config(architectures.tiny_config(model_type))
        return {name.rpartition(".")[2] for name in linear_names(model)}

    assert "router" not in names("phimoe")
    assert "out_proj" not in names("mamba")
    assert {"query_key_value", "dense"} <= names("falcon")

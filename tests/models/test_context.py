"""The most tokens that a model reads: as its own forward pass has it, and the same for every use of a run."""

from __future__ import annotations

import json
from random import Random
from types import SimpleNamespace

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModel, AutoTokenizer, LlamaConfig

import peftkit
from peftkit.data.pipeline import encode, prepare
from peftkit.errors import UserError
from peftkit.evaluation import generation, zero_shot_scores
from peftkit.export import manifest
from peftkit.inference import embeddings
from peftkit.models.context import positions, usable_length
from peftkit.models.loading import load_language_model
from peftkit.models.tokenizer import load_tokenizer, tokenizer_in
from peftkit.planning.inspection import inspect
from peftkit.schema.recipe import DataConfig, ModelConfig
from peftkit.tasks.style import Style
from tests import tiny

ROWS, PAD = 24, 1
SIZES = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "pad_token_id": PAD,
}  # fmt: skip
POSITIONS = {"max_position_embeddings": ROWS}
ENCODER_DECODER = {
    "vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "pad_token_id": PAD, **POSITIONS,
}  # fmt: skip
LIMITED = {
    "bert": {**SIZES, **POSITIONS},
    "distilbert": {"vocab_size": 40, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16, **POSITIONS},
    "albert": {**SIZES, **POSITIONS, "embedding_size": 8},
    "camembert": {**SIZES, **POSITIONS},
    "data2vec-text": {**SIZES, **POSITIONS},
    "esm": {**SIZES, **POSITIONS, "mask_token_id": 2, "token_dropout": False},
    "ibert": {**SIZES, **POSITIONS},
    "luke": {**SIZES, **POSITIONS, "entity_vocab_size": 4, "entity_emb_size": 8},
    "mpnet": {**SIZES, **POSITIONS},
    "nystromformer": {**SIZES, **POSITIONS, "num_landmarks": 64, "segment_means_seq_len": 64},
    "roberta": {**SIZES, **POSITIONS},
    "roberta-prelayernorm": {**SIZES, **POSITIONS},
    "xlm-roberta-xl": {**SIZES, **POSITIONS},
    "xmod": {**SIZES, **POSITIONS, "languages": ("en",), "default_language": "en"},
    "deberta": {**SIZES, **POSITIONS, "relative_attention": False},
    "roformer": {**SIZES, **POSITIONS},
    "gpt2": {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": ROWS},
    "openai-gpt": {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": ROWS},
    "opt": {**SIZES, **POSITIONS, "ffn_dim": 16, "word_embed_proj_dim": 16},
    "bart": ENCODER_DECODER,
    "pegasus": {**ENCODER_DECODER, "pad_token_id": 0},
    "mpt": {"vocab_size": 40, "d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": ROWS},
}
"""Architectures whose forward pass fails beyond its positions."""
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "n_positions": ROWS}
UNLIMITED = {
    "bloom": {"vocab_size": 40, "hidden_size": 16, "n_layer": 1, "n_head": 2, "seq_length": ROWS},
    "deberta-v2": {**SIZES, **POSITIONS, "relative_attention": True, "position_biased_input": False},
    "falcon": {**SIZES, **POSITIONS, "alibi": True},
    "funnel": {
        "vocab_size": 40, "d_model": 16, "block_sizes": [1, 1], "n_head": 2, "d_head": 8, "d_inner": 16, **POSITIONS,
        "architectures": ["FunnelModel"],
    },
    "mamba": {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4},
    "mt5": T5,
    "t5": T5,
    "umt5": T5,
    "xlnet": {"vocab_size": 40, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16},
}  # fmt: skip
"""Architectures that read texts of any length, whatever their config.json names."""


def model_of(kind, sizes):
    model = AutoModel.from_config(CONFIG_MAPPING[kind](**sizes)).eval()
    return model.get_encoder() if kind in ("mt5", "pegasus", "t5", "umt5") else model


def reads(model, tokens):
    """Whether a forward pass of so many tokens succeeds."""
    ids = torch.full((1, tokens), 7)
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("kind", LIMITED)
def test_the_limit_is_the_last_length_that_the_forward_pass_takes(kind):
    model = model_of(kind, LIMITED[kind])
    limit = positions(CONFIG_MAPPING[kind](**LIMITED[kind]))
    assert limit is not None
    assert [reads(model, limit), reads(model, limit + 1)] == [True, False]


@pytest.mark.parametrize("kind", UNLIMITED)
def test_relative_positions_alibi_and_recurrences_have_no_limit(kind):
    config = CONFIG_MAPPING[kind](**UNLIMITED[kind])
    assert positions(config) is None
    assert reads(model_of(kind, UNLIMITED[kind]), 3 * ROWS)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default"}, 64),
        ({"rope_type": "linear", "factor": 4.0}, 256),
        ({"rope_type": "dynamic", "factor": 2.0}, 128),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
    ],
)
def test_a_rotary_models_limit_is_what_it_was_trained_or_stretched_to(rope, expected):
    config = LlamaConfig(max_position_embeddings=64, rope_parameters={"rope_theta": 1e4, **rope})
    assert positions(config) == expected


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    """A tokenizer that declares no limit, with a model of 48 positions."""
    folder = tiny.tiny_roberta(tmp_path_factory.mktemp("bases") / "roberta", max_position_embeddings=50)
    return without_limit(folder)


def without_limit(folder):
    file = folder / "tokenizer_config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    del values["model_max_length"]
    file.write_text(json.dumps(values), encoding="utf-8")
    assert AutoTokenizer.from_pretrained(folder).model_max_length > 10**20
    return folder


@pytest.fixture(scope="module")
def run(roberta, tmp_path_factory):
    """A classifier trained on texts that are longer than the model's positions, with a max_length that is too."""
    folder = tmp_path_factory.mktemp("run")
    drawn = Random(0)
    lines = [f"{' '.join(drawn.choices(tiny.WORDS, k=80))},{'yes' if row % 2 else 'no'}" for row in range(40)]
    (folder / "rows.csv").write_text("text,label\n" + "\n".join(lines) + "\n", encoding="utf-8")
    recipe = tiny.tiny_recipe(
        roberta, data={"source": str(folder / "rows.csv"), "max_length": 300}, output_dir=str(folder / "runs"),
        training={"max_steps": 2, "batch_size": 8, "threads": 1}, export={"prove": False},
    )  # fmt: skip
    return peftkit.train(recipe, quiet=True)


def test_a_run_trains_predicts_and_embeds_within_the_models_positions(run):
    loaded = peftkit.load(run.path)
    text = "good world " * 200
    cut = AutoTokenizer.from_pretrained(run.adapter)(text, truncation=True, max_length=48)["input_ids"]
    assert loaded.tokenizer.model_max_length == 48
    with torch.no_grad():
        expected = loaded.model(input_ids=torch.tensor([cut])).logits
    torch.testing.assert_close(torch.from_numpy(loaded.logits(text)), expected, rtol=1e-4, atol=1e-4)
    assert embeddings.of_run(loaded).max_length == 48
    assert loaded.embed(text).shape == (1, 32)


def test_card_manifest_and_inspection_name_the_length_that_was_used(run):
    assert manifest.read(run.adapter).max_length == 48
    assert "max_length=48" in (run.adapter / "README.md").read_text(encoding="utf-8")
    assert inspect(run.recipe).max_length == 48
    lengths = encode(prepare(run.recipe), load_tokenizer(run.recipe.model), run.recipe).splits["train"].lengths
    assert max(lengths) == 48


def test_the_limit_travels_with_the_export(run):
    assert AutoTokenizer.from_pretrained(run.adapter).model_max_length == 48


def test_the_least_of_the_three_limits_counts(roberta, tmp_path):
    tokenizer = tokenizer_in(roberta)
    assert [usable_length(tokenizer, length) for length in (16, 48, 300)] == [16, 48, 48]
    lower = tiny.tiny_roberta(tmp_path / "lower")
    assert tokenizer_in(lower).model_max_length == 128  # its own, of as many positions
    values = json.loads((lower / "tokenizer_config.json").read_text(encoding="utf-8")) | {"model_max_length": 20}
    (lower / "tokenizer_config.json").write_text(json.dumps(values), encoding="utf-8")
    assert usable_length(tokenizer_in(lower), 300) == 20


def test_a_language_models_window_and_context_end_at_its_positions(tmp_path):
    folder = without_limit(tiny.tiny_gpt2(tmp_path / "gpt2", n_positions=32))
    tokenizer = tokenizer_in(folder)
    with pytest.raises(UserError, match=r"data\.max_length is 64, but this base model reads 32 tokens"):
        Style().encode({"text": ["a"]}, tokenizer, DataConfig(source="x", max_length=64), None)
    model = load_language_model(tiny.tiny_recipe(folder))
    assert generation.context_length(model) == 32
    scores = zero_shot_scores.of_decoder(model, tokenizer, ["good " * 99], ["a", "b"], max_length=64, batch_size=2)
    assert scores.shape == (1, 2)
    assert embeddings.of_model(str(folder), max_length=64).embed("good " * 99).shape == (1, 32)


def test_a_resumed_run_sees_the_same_data_where_the_limit_changes_no_row(roberta, run, tmp_path):
    """Checkpoints of earlier versions name the tokenizer's own limit."""
    short = run.recipe.model_copy(update={"data": run.recipe.data.model_copy(update={"max_length": 32})})
    prepared = prepare(short)
    plain, limited = AutoTokenizer.from_pretrained(roberta), load_tokenizer(ModelConfig(source=str(roberta)))
    plain.padding_side = limited.padding_side
    assert encode(prepared, limited, short).fingerprint == encode(prepared, plain, short).fingerprint
    assert encode(prepared, limited, run.recipe).fingerprint != encode(prepared, plain, run.recipe).fingerprint


def test_a_config_without_positions_limits_nothing():
    config = SimpleNamespace(model_type="new", max_position_embeddings=None)
    config.get_text_config = lambda: config
    assert positions(config) is None

"""A classifier that reads its first token alone: the planned stack ends with the block that computes just that."""

from __future__ import annotations

import pytest
import torch

from peftkit.models.meta_model import build_meta_model
from peftkit.models.tokenizer import load_tokenizer
from peftkit.planning import traced_model
from peftkit.planning.trace import fake_tensor_mode
from peftkit.planning.traced_model import Shape, TracedModel
from peftkit.schema.head import head_of
from peftkit.schema.types import TaskInfo
from tests import tiny

INFO = TaskInfo("single_label_classification", ("a", "b"))
SHAPE = Shape(8, 64, 8)


@pytest.fixture(scope="module")
def eight_blocks(tmp_path_factory):
    return tiny.tiny_bert(tmp_path_factory.mktemp("base") / "bert", num_hidden_layers=8)


def found(folder, pooling):
    recipe = tiny.tiny_recipe(folder, method={"kind": "lora"}, model={"pooling": pooling})
    with fake_tensor_mode():
        loaded = build_meta_model(recipe, INFO, load_tokenizer(recipe.model), torch.float32)
        subject = TracedModel(loaded, head_of(INFO, recipe.task), torch.float32)
        return subject.train(SHAPE), subject.evaluate(SHAPE)


@pytest.mark.parametrize("pooling", [pytest.param("own", marks=pytest.mark.slow), "mean"])
def test_a_shortened_stack_continued_is_the_whole_one(pooling, eight_blocks, monkeypatch):
    continued = found(eight_blocks, pooling)
    monkeypatch.setattr(traced_model, "MORE", 99)  # long enough to be run whole
    whole = found(eight_blocks, pooling)
    for short, long in zip(continued, whole):
        assert short.flops == long.flops
        assert short.peak == pytest.approx(long.peak, rel=0.01)
        assert short.end == long.end


@pytest.mark.slow
def test_it_saves_what_the_last_block_saves(eight_blocks):
    """Of the last block's products two of twelve are left at every token, and a little at the first."""
    (own, _), (mean, _) = found(eight_blocks, "own"), found(eight_blocks, "mean")
    assert own.peak < mean.peak
    assert 0.88 < own.flops / mean.flops < 0.91

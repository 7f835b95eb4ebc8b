"""What texts have cached, while they join, leave and grow: logits are those of a model that caches nothing."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, MistralConfig, MistralForCausalLM

from peftkit.serving import kv_cache
from peftkit.serving.decoder import Group, joins
from peftkit.serving.kv_cache import OwnCache, SlotCache
from tests import tiny


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request, tmp_path_factory):
    folder = getattr(tiny, f"tiny_{request.param}")(tmp_path_factory.mktemp("models") / "model")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


class Row:
    """A text of random tokens; as much of one as a cache needs to know."""

    def __init__(self, draw, length):
        self.prompt = [draw.randrange(200) for _ in range(length)]
        self.ids = list(self.prompt)


@torch.no_grad()
def read(model, rows):
    width = max(len(row.ids) for row in rows)
    ids = torch.tensor([[0] * (width - len(row.ids)) + row.ids for row in rows])
    mask = torch.tensor([[0] * (width - len(row.ids)) + [1] * len(row.ids) for row in rows])
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), past_key_values=cache)
    return cache


@torch.no_grad()
def step(model, group, draw):
    """One more token of each row; checks its logits."""
    for row in group.rows:
        row.ids.append(draw.randrange(200))
    last = torch.tensor([[row.ids[-1]] for row in group.rows])
    logits = model(input_ids=last, use_cache=True, **group.cache.next_token(last.device)).logits[:, -1]
    for row, own in zip(group.rows, logits):
        torch.testing.assert_close(own, model(input_ids=torch.tensor([row.ids])).logits[0, -1], atol=1e-7, rtol=1e-7)


def sizes(group):
    return {tuple(layer.keys.shape[::2]) for layer in group.cache._layers}


def test_rows_join_leave_and_grow(model, monkeypatch):
    monkeypatch.setattr(kv_cache, "CHUNK", 16)
    draw, group = random.Random(0), Group(SlotCache())
    seen = set()
    for turn in range(40):
        if turn % 3 == 0 or not group.rows:
            rows = [Row(draw, draw.choice([1, 3, 9, 40])) for _ in range(draw.randint(1, 3))]
            group.join(rows, read(model, rows))
        step(model, group, draw)
        seen |= sizes(group)
        order = [row for row in range(len(group.rows)) if draw.random() > 0.3]
        staying = {id(group.rows[row]) for row in order}
        group.keep(order)
        assert {id(row) for row in group.rows} == staying
        assert group.cache.lengths == [len(row.ids) for row in group.rows]
    assert len({columns for _, columns in seen}) > 1
    assert max(rows for rows, _ in seen) >= 4
    group.keep([])
    assert sizes(group) == set()


def test_a_buffer_that_is_far_too_wide_shrinks(model, monkeypatch):
    monkeypatch.setattr(kv_cache, "CHUNK", 8)
    draw, group = random.Random(0), Group(SlotCache())
    for length in (100, 2):
        row = Row(draw, length)
        group.join([row], read(model, [row]))
    assert sizes(group) == {(2, 104)}
    group.keep([1])
    step(model, group, draw)
    assert {columns for _, columns in sizes(group)} == {8}


def test_a_model_with_a_window_writes_one_text_at_a_time():
    torch.manual_seed(0)
    config = MistralConfig(vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                           num_key_value_heads=2, intermediate_size=64, sliding_window=4)  # fmt: skip
    model = MistralForCausalLM(config).double().eval()
    assert not joins(model)
    draw, group = random.Random(0), Group(OwnCache())
    for length in (9, 2):
        row = Row(draw, length)
        group.join([row], read(model, [row]))
        for _ in range(6):
            step(model, group, draw)
        group.keep([])

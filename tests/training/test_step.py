"""One step's gradients are those that torch gives for the whole batch, however the batch is cut."""

from __future__ import annotations

import weakref
from typing import ClassVar

import numpy as np
import pytest
import torch

from peftkit import replace
from peftkit.data.pipeline import encode, prepare
from peftkit.distributed.session import open_session
from peftkit.models.loading import build
from peftkit.models.tokenizer import load_tokenizer
from peftkit.schema.head import head_of
from peftkit.training.optimizer import parameter_groups
from peftkit.training.step import Stepper, TaskModule


class Held:
    """Stands for the optimizer and the schedule: keeps the gradients that a step would have used."""

    def __init__(self, module):
        self.module = module

    def step(self):
        self.gradients = {n: p.grad.clone() for n, p in self.module.named_parameters() if p.grad is not None}

    def zero_grad(self, set_to_none=True):
        self.module.zero_grad(set_to_none=set_to_none)


def gradients(recipe, rows):
    session = open_session(recipe)
    tokenizer, prepared = load_tokenizer(recipe.model), prepare(recipe)
    split = encode(prepared, tokenizer, recipe).splits["train"]
    module = TaskModule(build(recipe, prepared.info, tokenizer, session.device), head_of(prepared.info, recipe.task))
    held = Held(module)
    stepper = Stepper(recipe, session, module, held, type("None", (), {"step": lambda self: None})(), split, tokenizer)
    result = stepper.run(rows, 0)
    return held.gradients, result, (module, stepper, split)


@pytest.fixture
def still(small_recipe):
    """Nothing random in the forward pass, and gradients as they are."""
    return replace(small_recipe, method={"dropout": 0.0}, training={"max_grad_norm": None})


@pytest.mark.parametrize("task", [{}, {"label_smoothing": 0.1}, {"class_weights": {"sports": 3.0, "science": 0.5}}])
def test_two_by_four_accumulated_equals_eight_by_one(still, task):
    recipe, rows = replace(still, task=task), np.arange(3, 11)
    one, whole, (_, _, split) = gradients(recipe, rows)
    assert len(set(split.lengths[rows])) > 3, "ragged"
    for micro in (4, 3, 1):
        many, cut, _ = gradients(replace(recipe, training={"micro_batch": micro}), rows)
        assert cut.loss == pytest.approx(whole.loss, rel=1e-6)
        for name, gradient in one.items():
            torch.testing.assert_close(many[name], gradient, rtol=1e-4, atol=1e-6)


def test_gradients_are_torchs_own_for_the_mean_loss_of_the_batch(still):
    rows = np.arange(8)
    ours, result, (module, stepper, _) = gradients(still, rows)
    batch = stepper.collate(rows)
    module.zero_grad()
    model = module.model
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}
    loss = torch.nn.functional.cross_entropy(model(**inputs).logits, batch["labels"])
    loss.backward()
    assert result.loss == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-6)


class Kept(torch.autograd.Function):
    """The identity, which keeps a copy of its input on the node of the graph, as bitsandbytes' INT8 product does."""

    copies: ClassVar[list[weakref.ref[torch.Tensor]]] = []

    @staticmethod
    def forward(ctx, x):
        ctx.copy = x.clone()
        Kept.copies.append(weakref.ref(ctx.copy))
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def test_a_pass_begins_when_the_graph_of_the_one_before_is_gone(still, monkeypatch):
    _, _, (module, stepper, _) = gradients(replace(still, training={"micro_batch": 2}), np.arange(2))
    forward, found = module.forward, []

    def watched(batch):
        found.append(sum(copy() is not None for copy in Kept.copies))
        return Kept.apply(forward(batch))

    monkeypatch.setattr(module, "forward", watched)
    Kept.copies.clear()
    stepper.run(np.arange(6), 0)
    assert found == [0, 0, 0]
    assert all(copy() is None for copy in Kept.copies)


def test_biases_and_norms_do_not_decay(bert):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(bert)
    matrices, vectors = parameter_groups(model, 0.1)
    assert matrices["weight_decay"] == 0.1
    assert vectors["weight_decay"] == 0.0
    biases = {id(p) for n, p in model.named_parameters() if n.endswith("bias") or "LayerNorm" in n}
    assert {id(p) for p in vectors["params"]} == biases

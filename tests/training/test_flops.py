"""The FLOP meter counts what the products of a model are known to cost."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.utils.checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import peftkit
from peftkit import replace
from peftkit.training import flops


@pytest.fixture(autouse=True)
def small_products(monkeypatch, tmp_path):
    """A calibration that takes no time, in a cache of its own."""
    monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(flops.SIZES, "cpu", 128)


def test_the_rate_is_measured_once_and_kept(monkeypatch):
    first = flops.matmul_rate("cpu", torch.float32)
    assert first > 1e6
    monkeypatch.setattr(flops, "_measure", lambda *_: pytest.fail("measured twice"))
    assert flops.matmul_rate("cpu", torch.float32) == first
    with pytest.raises(pytest.fail.Exception, match="measured twice"):
        flops.matmul_rate("cpu", torch.bfloat16)


def block_flops(hidden, wide, tokens, read):
    """Products of a BERT block of which ``read`` tokens are read, forward and backward, a token: 2 FLOPs a weight."""
    keys_and_values = 2 * 2 * hidden * hidden
    elsewhere = 2 * (2 * hidden * hidden + 2 * hidden * wide) * read / tokens
    attention = 2 * 2 * read * hidden
    return 3 * (keys_and_values + elsewhere) + 3.5 * attention


def test_full_finetuning_costs_what_the_formulas_say(small_recipe, topics_csv, tmp_path):
    """All rows equally long; input gradients of the first block's products are not needed, the pooler is once a row,
    and of the last block the first token alone is read.
    """
    words = "game team player match score win stock bank money price".split()
    pairs = [(one, other) for one in words for other in words if one != other]
    rows = "".join(f"the {one} and the {other} of day,{'ab'[n % 2]}\n" for n, (one, other) in enumerate(pairs))
    file = tmp_path / "even.csv"
    file.write_text("text,label\n" + rows)
    recipe = replace(
        small_recipe, method={"kind": "full"}, training={"epochs": 1, "learning_rate": 1e-4},
        data={"source": str(file)},
        evaluation={"baselines": []},
    )  # fmt: skip
    run = peftkit.train(recipe, quiet=True)
    found = run.metrics["training"]
    tokens = found["tokens"] / found["rows"]
    expected = block_flops(32, 64, tokens, tokens) + block_flops(32, 64, tokens, 1)
    assert found["flops_per_token"] == pytest.approx(expected, rel=0.05)
    assert found["flops_utilization"] == pytest.approx(found["flops_per_second"] / found["matmul_flops_per_second"])
    assert found["flops_per_second"] == pytest.approx(found["flops_per_token"] * found["tokens_per_second"], rel=1e-6)


def test_frozen_weights_cost_less(small_recipe):
    def cost(**parts):
        recipe = replace(small_recipe, training={"epochs": 1}, evaluation={"baselines": []}, **parts)
        return peftkit.train(recipe, quiet=True).metrics["training"]["flops_per_token"]

    full, last = cost(method={"kind": "full"}), cost(method={"kind": "lora", "rank": 2, "layers": -1})
    head = cost(method={"kind": "frozen"})
    assert head < last < full / 2


def test_counting_agrees_with_torch_and_keeps_no_tensors():
    def graph(width: int = 64, depth: int = 12) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(8, 128, width, generator=generator)
        for _ in range(depth):
            weight = torch.randn(width, width, generator=generator).requires_grad_()
            x = torch.utils.checkpoint.checkpoint(lambda x, w: (x @ w).tanh() @ w.T, x, weight, use_reentrant=False)
        return x.square().sum()

    class Alive(TorchDispatchMode):
        """The most activations alive at once."""

        def __init__(self):
            super().__init__()
            self.known, self.most = weakref.WeakSet(), 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() == 3:
                self.known.add(out.untyped_storage())
                self.most = max(self.most, len({storage.data_ptr() for storage in self.known}))
            return out

    expected, counter = FlopCounterMode(display=False), flops.FlopCounter()
    with expected:
        graph().backward()
    alone, beside = Alive(), Alive()
    with alone:
        graph().backward()
    with beside, counter:
        graph().backward()
    assert counter.total == expected.get_total_flops() > 0
    assert beside.most == alone.most

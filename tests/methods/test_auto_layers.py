"""The number of blocks to adapt, from inner products of gradients: a regression that scikit-learn does as well."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import LeaveOneOut, cross_val_predict

from peftkit.errors import MethodError, RecipeError
from peftkit.methods import auto_layers
from peftkit.methods.auto_layers import AutoLayers, LayerOptions, estimate, gradient_kernels, held_out
from peftkit.methods.lora import Lora
from peftkit.schema.recipe import Recipe, replace
from peftkit.schema.types import LoadedModel
from tests.tiny import tiny_recipe

GROUPS, WIDTH = 48, 200


def kernel(shared: float, seed: int, noise: float = 1.0) -> np.ndarray:
    """Inner products of gradients that have a direction in common, of that length, and noise of each group's own."""
    draw = np.random.default_rng(seed)
    gradients = noise * draw.normal(size=(GROUPS, WIDTH)) / WIDTH**0.5
    gradients[:, 0] += shared
    return gradients @ gradients.T


def chosen(blocks, head=None, **options) -> int:
    head = kernel(0.0, 99) if head is None else head
    return AutoLayers(auto=LayerOptions(**options)).decide("layers", head, np.stack(blocks)).size


def test_errors_on_other_groups_are_those_of_leaving_each_out():
    one = kernel(0.3, 0) + kernel(0.1, 1)
    targets = -np.ones(GROUPS)
    best = min(
        float(np.mean((cross_val_predict(
            KernelRidge(alpha=ridge * np.trace(one) / GROUPS, kernel="precomputed"), one, targets, cv=LeaveOneOut(),
        ) - targets) ** 2))
        for ridge in auto_layers.RIDGES
    )  # fmt: skip
    assert held_out(one).mean() == pytest.approx(best, rel=1e-8)


@pytest.mark.parametrize(
    ("shared", "expected"),
    [
        ((0.0, 0.0, 0.0, 1.0), 1),  # the last block does it all
        ((0.0, 0.0, 1.0, 0.0), 2),
        ((1.0, 0.0, 0.0, 0.0), 4),  # only the lowest one can
    ],
)
def test_a_block_counts_for_what_groups_have_in_common(shared, expected):
    assert chosen([kernel(one, seed) for seed, one in enumerate(shared)]) == expected


def test_what_higher_blocks_can_do_as_well_does_not_count_for_lower_ones():
    gradients = np.random.default_rng(0).normal(size=(GROUPS, WIDTH)) / WIDTH**0.5
    gradients[:, 0] += 1.0
    same = gradients @ gradients.T
    assert chosen([same, same, same]) == 1
    assert chosen([10 * same, same, same]) == 1  # nor does a larger gradient


def test_what_the_head_can_do_does_not_count_for_blocks():
    blocks = np.stack([kernel(0.0, 1), kernel(1.0, 2)])
    curve, known = estimate(kernel(0.0, 7), blocks)
    assert known
    assert [(one.size, one.estimate) for one in curve[:2]] == [(0, 0.0), (1, 1.0)]
    assert estimate(kernel(1.0, 7, noise=0.3), blocks)[1] is False


def test_tolerance_and_at_least_decide():
    blocks = [kernel(0.9, 1), kernel(0.7, 2), kernel(0.7, 3), kernel(0.7, 4)]
    sizes = [chosen(blocks, tolerance=tolerance) for tolerance in (0.0, 0.1, 0.3, 0.9)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1] == 1
    assert chosen(blocks, tolerance=0.9, at_least=3) == 3
    with pytest.raises(MethodError, match=r"method.layers.auto.at_least=5: the model has 4 blocks"):
        chosen(blocks, at_least=5)


def test_without_evidence_every_block_is_adapted():
    choice = AutoLayers().decide("layers", kernel(0.0, 9), np.stack([kernel(0.0, seed) for seed in range(3)]))
    assert choice.value == -3
    assert "too little in common" in choice.summary


class Blocks(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(40, 40, bias=False) for _ in range(2)])
        self.score = torch.nn.Linear(40, 1)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.score(x).sum()


@pytest.mark.parametrize("size", [2**14, 256])
def test_kernels_are_inner_products_of_gradients_and_sketches_keep_them(size, monkeypatch):
    monkeypatch.setattr(auto_layers, "SKETCH", size)
    torch.manual_seed(0)
    model, inputs = Blocks(), [torch.randn(6, 40) for _ in range(5)]
    plain = []

    def gradients():
        for batch in inputs:
            model.zero_grad()
            model(batch).backward()
            plain.append(torch.cat([p.grad.flatten() for p in model.layers[1].parameters()]))
            yield

    kernels = gradient_kernels(LoadedModel(model, None, head_names=("score",)), gradients())
    exact = torch.stack(plain)
    exact = (exact @ exact.T).double().numpy()
    assert kernels.shape == (3, 5, 5)  # head and two blocks
    tolerance = 1e-5 if size > 40 * 40 else 0.3
    assert np.abs(kernels[2] - exact).max() < tolerance * np.abs(exact).max()
    assert not np.allclose(kernels[1], kernels[2])


@pytest.mark.parametrize("value", ["auto", {"auto": {}}, {"auto": {"tolerance": 0.05, "at_least": 1, "rows": 512}}])
def test_spellings_mean_the_same_and_survive_yaml(value, tmp_path):
    recipe = replace(tiny_recipe("m"), method={"layers": value})
    assert recipe.method.layers == AutoLayers()
    file = tmp_path / "recipe.yaml"
    for defaults in (True, False):
        file.write_text(recipe.to_yaml(defaults=defaults))
        assert Recipe.from_yaml(file) == recipe


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "atuo",
            "method.layers: expected auto, -2 for the last two blocks, or numbers of blocks such as .0, 1., found",
        ),
        ({"auto": {"tolerence": 0.1}}, "unknown field 'tolerence': did you mean 'tolerance'"),
        ({"auto": {"tolerance": 1.0}}, "method.layers.auto.tolerance: input should be less than 1"),
        ({"auto": {"rows": 4}}, "method.layers.auto.rows: input should be greater than or equal to 16"),
    ],
)
def test_a_wrong_value_is_one_message(value, message):
    with pytest.raises(RecipeError, match=message):
        replace(tiny_recipe("m"), method={"layers": value})


@pytest.mark.parametrize("kind", ["bitfit", "full", "prompt_tuning", "ln_tuning"])
def test_methods_without_layers_refuse_it(kind):
    with pytest.raises(RecipeError, match="unknown field 'layers'"):
        replace(tiny_recipe("m"), method={"kind": kind, "layers": "auto"})


def test_where_no_choice_can_be_made():
    with pytest.raises(RecipeError, match=r"has an encoder and a decoder; set method.layers to numbers"):
        replace(tiny_recipe("m"), task="seq2seq", method={"layers": "auto"})
    with pytest.raises(RecipeError, match=r"set method.layers to that adapter's"):
        replace(tiny_recipe("m"), model={"adapter": "a", "adapter_use": "continue"}, method={"layers": "auto"})


def test_fields_of_a_method_that_are_left_to_the_run():
    method = Lora(layers="auto", rank="auto")
    assert list(method.automatic()) == ["layers", "rank"]
    assert (method.widest().layers, method.widest().rank) == (None, 32)
    assert method.probed().rank == 64
    assert Lora().automatic() == {}
    with pytest.raises(ValidationError):
        Lora(layers=1.5)

"""The rank that gradients of two halves of the rows have in common."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peftkit.errors import RecipeError
from peftkit.methods.auto_rank import AutoRank, RankOptions, mean_gradients, shared_by_rank
from peftkit.schema.recipe import replace
from peftkit.schema.types import LoadedModel
from tests.tiny import tiny_recipe


def halves(rank: int, noise: float, seed: int = 0, modules: int = 3):
    """Pairs of gradients that share a part of that rank, with noise of their own."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(modules):
        left, right = (torch.linalg.qr(torch.randn(size, rank, generator=draw))[0] for size in (48, 32))
        shared = left @ right.T
        yield tuple(shared + noise * torch.randn(48, 32, generator=draw) for _ in range(2))


def chosen(rank, noise, **options) -> int:
    choice = AutoRank(auto=RankOptions(**{"at_most": 16, **options}))
    return choice.decide("rank", shared_by_rank(halves(rank, noise), choice.auto.at_most)).value


def test_what_each_rank_brings_is_the_best_part_of_that_rank_judged_by_the_other_half():
    pairs = list(halves(3, 0.05))
    expected = np.zeros(8)
    for pair in pairs:
        for fitted, other in (pair, pair[::-1]):
            left, values, right = np.linalg.svd(fitted.double().numpy(), full_matrices=False)
            for rank in range(1, 9):
                part = left[:, :rank] * values[:rank] @ right[:rank]
                expected[rank - 1] += (part * other.double().numpy()).sum()
    assert shared_by_rank(pairs, 8) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_a_planted_rank_is_chosen_among_noise(rank):
    assert chosen(rank, 0.02, tolerance=0.02) == rank


def test_tolerance_and_at_most_bound_it():
    assert chosen(9, 0.02, tolerance=0.5) < chosen(9, 0.02, tolerance=0.02)
    assert chosen(9, 0.02, at_most=4, tolerance=0.0) == 4


def test_halves_that_share_nothing_take_the_most():
    draw = torch.Generator().manual_seed(0)
    first = torch.randn(20, 16, generator=draw)
    choice = AutoRank().decide("rank", shared_by_rank([(first, -first)], 32))
    assert choice.value == 32
    assert "share nothing" in choice.summary


def test_gradients_of_b_are_averaged_over_even_and_odd_groups():
    model = torch.nn.ModuleDict({"lora_B": torch.nn.Linear(2, 3, bias=False), "other": torch.nn.Linear(2, 2)})
    values = [torch.full((3, 2), float(number)) for number in range(4)]

    def gradients():
        for value in values:
            model["lora_B"].weight.grad = value.clone()
            yield

    ((first, second),) = mean_gradients(LoadedModel(model, None), gradients())
    assert torch.equal(first, values[0] + values[2])
    assert torch.equal(second, values[1] + values[3])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": "much"}, "method.rank: expected auto or a whole number, found 'much'"),
        ({"rank": {"auto": {"at_most": 0}}}, "method.rank.auto.at_most: input should be greater than or equal to 1"),
        ({"rank": {"auto": {"rows": 1}}}, "method.rank.auto.rows: input should be greater than or equal to 16"),
        ({"rank": "auto", "init_lora_weights": "orthogonal"}, "expected an even rank"),
        ({"rank": "auto", "init_lora_weights": "loftq"}, "fits factors of one rank ahead of training"),
    ],
)
def test_a_wrong_value_is_one_message(fields, message):
    with pytest.raises(RecipeError, match=message):
        replace(tiny_recipe("m"), method=fields)


def test_an_existing_adapter_has_its_rank():
    with pytest.raises(RecipeError, match=r"set method.rank to that adapter's"):
        replace(tiny_recipe("m"), model={"adapter": "a", "adapter_use": "continue"}, method={"rank": "auto"})

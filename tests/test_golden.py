"""Eight small runs give the weights and figures that they have always given, bit for bit; see tests/golden/recipes.py.

A difference that is meant is taken over with ``python -m tests.golden.recipes --write``.
"""

from __future__ import annotations

import json

import pytest

from tests.golden import recipes

STORED = json.loads(recipes.HASHES.read_text(encoding="utf-8"))["recipes"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Hashes by recipe, all computed in one process; skips where the stored ones cannot hold."""
    reason = recipes.why_not_comparable()
    if reason:
        pytest.skip(reason)
    return recipes.computed(tmp_path_factory.mktemp("golden"))


def test_every_recipe_has_hashes():
    assert set(STORED) == set(recipes.CHANGES)


@pytest.mark.slow
@pytest.mark.parametrize("name", recipes.CHANGES)
def test_a_run_gives_what_it_has_always_given(found, name):
    assert found[name] == STORED[name]

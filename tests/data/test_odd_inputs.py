"""Odd inputs are read as what they mean, or refused with a remedy; docs/odd_inputs.md lists what happens to each."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.data.odd_inputs import INPUTS, page, walk

PAGE = Path(__file__).parents[2] / "docs" / "odd_inputs.md"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What happened to every input that a test has looked at."""
    walked = {}

    def outcome(number):
        if number not in walked:
            walked[number] = walk(INPUTS[number], tmp_path_factory.mktemp("odd"))
        return walked[number]

    return outcome


@pytest.mark.parametrize("number", range(len(INPUTS)), ids=[f"{odd.section}: {odd.kind}" for odd in INPUTS])
def test_an_input_is_read_as_it_is_meant_or_refused(number, outcomes):
    if INPUTS[number].file.endswith(".xlsx"):
        pytest.importorskip("openpyxl")
    odd, outcome = INPUTS[number], outcomes(number)
    assert odd.refused in outcome.refusal
    assert bool(odd.refused) == bool(outcome.refusal), outcome.refusal
    if not odd.refused:
        assert outcome.rows == (odd.means if isinstance(odd.means, str) else sorted(odd.means))


@pytest.mark.skipif(find_spec("openpyxl") is None, reason="the page has rows of Excel files")
def test_the_page_says_what_happens(outcomes):
    assert PAGE.read_text(encoding="utf-8") == page([(odd, outcomes(number)) for number, odd in enumerate(INPUTS)])

"""What a finished run proposes next: only commands that work for its task."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftkit import get_recipe, replace
from peftkit.reporting.run_report import next_commands

USES = {
    "own_csv": ["predict"], "own_entities": ["predict"], "own_questions": ["predict"], "domain_mlm": ["predict"],
    "own_retrieval": ["predict", "search"], "own_preferences": ["chat", "generate"], "summarize_lora": ["generate"],
}  # fmt: skip


@pytest.mark.parametrize("name", USES)
def test_the_commands_are_those_of_the_task(name):
    commands = [command.split() for _, command in next_commands(Path("run"), get_recipe(name))]
    verbs = [words[1] for words in commands if words[0] == "peftkit"]
    assert [verb for verb in verbs if verb not in ("evaluate", "export")] == USES[name]


def test_curves_are_proposed_where_they_are_tracked():
    recipe = get_recipe("own_csv")
    tracked = replace(recipe, tracking=["tensorboard"])
    for one, there in ((tracked, True), (replace(recipe, tracking=[]), False)):
        assert any("tensorboard" in command for _, command in next_commands(Path("run"), one)) == there

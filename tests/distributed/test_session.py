"""One process, two and four, and two torchrun agents: the same is learned, and every row is counted once."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peftkit import replace
from tests.distributed import launching
from tests.faults import runs

NAME = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    runs.warm_up()
    return tmp_path_factory.mktemp("many")


def texts(path, split="test"):
    return [json.loads(line)["text"] for line in (path / "predictions" / f"{split}.jsonl").read_text().splitlines()]


def agree(first, second):
    """Whether two runs of one recipe learned the same, up to the order in which processes add up."""
    one, two = load_file(first / NAME), load_file(second / NAME)
    assert set(one) == set(two)
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-2, atol=1e-4)
    for line, other in zip(runs.log(first), runs.log(second), strict=True):
        assert other["loss"] == pytest.approx(line["loss"], rel=1e-3)
        assert other.get("tokens") == line.get("tokens"), "tokens of a validation are counted, not averaged"


def of_task(task):
    """The encoder's recipe with another task on its texts."""

    def recipe(folder):
        return replace(runs.encoder(folder), task=task, evaluation={"metrics": None})

    return recipe


KINDS = {
    **runs.KINDS, "similarity": of_task({"kind": "similarity", "dimensions": [8]}),
    "masked_lm": of_task({"kind": "masked_lm", "whole_word": True}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encoder", "similarity", "decoder", "masked_lm"])
def test_one_two_and_four_processes_learn_the_same_and_count_every_row_once(folder, kind):
    """Neither a step's 7 rows nor those of a validation divide by two or four."""
    recipe = replace(
        KINDS[kind](folder), model={"dropout": 0.0}, method={"dropout": 0.0}, evaluation={"batch_size": 2},
        training={"batch_size": 7, "micro_batch": 2, "max_steps": 4, "evaluate_every": 2, "early_stopping": None},
    )  # fmt: skip
    found = {}
    for many in (1, 2, 4):
        mine = replace(recipe, output_dir=str(folder / f"{kind}-{many}"))
        said = folder / f"{kind}-{many}.txt"
        assert runs.finish(mine, said, world_size=many) == 0, said.read_text()[-2000:]
        found[many] = runs.folder_of(mine)
    for many in (2, 4):
        agree(found[1], found[many])
        if kind == "encoder":
            assert texts(found[many]) == texts(found[1]), "every row once, in order"


@pytest.mark.slow
def test_two_processes_under_torchrun_are_one_run(folder):
    """As started by hand: one process speaks and writes, and learns what one process alone learns."""
    recipe = replace(
        runs.encoder(folder), model={"dropout": 0.0}, method={"dropout": 0.0}, training={"batch_size": 7},
        output_dir=str(folder / "torchrun"), evaluation={"baselines": ["majority", "zero_shot"]},
    )  # fmt: skip
    file = launching.recipe_file(folder / "torchrun-file", recipe)
    said = launching.finish(*launching.TORCHRUN, "--nproc_per_node", "2", "--standalone", file)
    assert "2 processes on cpu" in said
    assert said.count("Run: ") == 1, "only one process speaks"
    (two,) = Path(recipe.output_dir).iterdir()
    alone = replace(recipe, output_dir=str(folder / "torchrun-alone"))
    assert runs.run(alone, said=folder / "torchrun-alone.txt") == 0
    agree(runs.folder_of(alone), two)
    assert texts(two) == texts(runs.folder_of(alone))


@pytest.fixture(scope="module")
def both(folder):
    """A recipe, and its run by two processes of one machine."""
    recipe = replace(runs.encoder(folder), training={"epochs": 8})
    whole = replace(recipe, output_dir=str(folder / "both"))
    assert runs.finish(whole, folder / "both.txt", world_size=2) == 0, (folder / "both.txt").read_text()[-2000:]
    return recipe, runs.folder_of(whole)


@pytest.mark.slow
def test_two_agents_that_meet_on_the_loopback_are_one_run(folder, both):
    recipe = replace(both[0], output_dir=str(folder / "agents"))
    agents = launching.two_agents(launching.recipe_file(folder / "agents-file", recipe))
    said = "".join(agent.communicate(timeout=300)[0] for agent in agents)
    assert [agent.returncode for agent in agents] == [0, 0], said[-3000:]
    assert "2 processes on cpu" in said
    (run,) = Path(recipe.output_dir).iterdir()
    assert runs.differences(run, both[1]) == [], "as two processes of one machine"


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["one agent", "two agents"])
def test_torchrun_that_is_told_to_end_leaves_a_run_to_go_on_with(folder, both, launch):
    name = launch.replace(" ", "-")
    recipe = replace(both[0], output_dir=str(folder / f"told-{name}"))
    file = launching.recipe_file(folder / f"told-{name}-file", recipe)
    if launch == "one agent":
        agents = [launching.start(*launching.TORCHRUN, "--nproc_per_node", "2", "--standalone", file)]
    else:
        agents = launching.two_agents(file)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not list(Path(recipe.output_dir).glob("*/checkpoints/step-*")):
        time.sleep(0.05)
    for agent in agents:
        agent.send_signal(signal.SIGTERM)
    said = "".join(agent.communicate(timeout=120)[0] for agent in agents)
    assert 0 not in [agent.returncode for agent in agents]
    assert "stopped by SIGTERM after step" in said, said[-3000:]
    run = runs.folder_of(recipe)
    step = json.loads((sorted((run / "checkpoints").glob("step-*"))[-1] / "state.json").read_text())["training"]["step"]
    assert f"stopped by SIGTERM after step {step} of" in said, "nothing was lost"
    assert runs.finish(recipe, folder / f"told-{name}.txt", world_size=2) == 0
    assert runs.differences(run, both[1]) == []

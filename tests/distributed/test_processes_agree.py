"""One process, two and four, and two torchrun agents: the same is learned, and every row is counted once."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peftkit import replace
from tests.faults import runs

ROOT = Path(__file__).parents[2]
FILE = """
import sys
from peftkit import Recipe, main, recipe

@recipe
def shared() -> Recipe:
    return Recipe.from_yaml(sys.argv[0] + ".yaml")

if __name__ == "__main__":
    main(shared)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    runs.warm_up()
    return tmp_path_factory.mktemp("many")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_one_two_and_four_processes_learn_the_same_and_count_every_row_once(folder, kind):
    """Rows in a validation, 6, 12 or so, divide by neither two nor four batches; the figures are over all of them."""
    recipe = replace(
        runs.KINDS[kind](folder), model={"dropout": 0.0}, method={"dropout": 0.0},
        training={"batch_size": 7, "micro_batch": 2, "max_steps": 8, "evaluate_every": 4}, evaluation={"batch_size": 2},
    )  # fmt: skip
    found = {}
    for many in (1, 2, 4):
        mine = replace(recipe, output_dir=str(folder / f"{kind}-{many}"))
        said = folder / f"{kind}-{many}.txt"
        assert runs.finish(mine, said, world_size=many) == 0, said.read_text()[-2000:]
        found[many] = runs.folder_of(mine)
    for many in (2, 4):
        first, second = load_file(found[1] / NAME), load_file(found[many] / NAME)
        for key in first:
            torch.testing.assert_close(second[key], first[key], rtol=1e-2, atol=1e-4)
        for one, other in zip(runs.log(found[1]), runs.log(found[many]), strict=True):
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)
            assert other.get("tokens") == one.get("tokens"), "tokens of a validation are counted, not averaged"


NAME = "adapter/adapter_model.safetensors"


def torchrun(folder, recipe, *options):
    (folder / "shared.py").write_text(FILE)
    (folder / "shared.py.yaml").write_text(recipe.to_yaml())
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = [sys.executable, "-m", "torch.distributed.run", *options, str(folder / "shared.py")]
    return subprocess.Popen(launcher, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.slow
def test_two_agents_that_meet_on_the_loopback_are_one_run(folder):
    """The rehearsal of two machines: an agent and a process each."""
    recipe = replace(runs.encoder(folder), output_dir=str(folder / "agents"))
    (folder / "agents-file").mkdir()
    rendezvous = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}", "--rdzv_id", "rehearsal"]
    options = ["--nnodes", "2", "--nproc_per_node", "1", *rendezvous]
    agents = [torchrun(folder / "agents-file", recipe, *options) for _ in range(2)]
    said = "".join(agent.communicate(timeout=300)[0] for agent in agents)
    assert [agent.returncode for agent in agents] == [0, 0], said[-3000:]
    assert "2 processes on cpu" in said
    (run,) = Path(recipe.output_dir).iterdir()
    alone = replace(recipe, output_dir=str(folder / "agents-alone"))
    assert runs.finish(alone, folder / "alone.txt", world_size=2) == 0
    assert runs.differences(run, runs.folder_of(alone)) == [], "as two processes of one machine"


@pytest.mark.slow
def test_torchrun_that_is_told_to_end_leaves_a_run_to_go_on_with(folder):
    recipe = replace(runs.encoder(folder), output_dir=str(folder / "told"), training={"epochs": 40})
    (folder / "told-file").mkdir()
    agent = torchrun(folder / "told-file", recipe, "--nproc_per_node", "2", "--standalone")
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not list(Path(recipe.output_dir).glob("*/checkpoints/step-*")):
        time.sleep(0.2)
    agent.send_signal(signal.SIGTERM)
    said, _ = agent.communicate(timeout=60)
    assert "stopped by SIGTERM after step" in said, said[-3000:]
    run = runs.folder_of(recipe)
    step = json.loads((sorted((run / "checkpoints").glob("step-*"))[-1] / "state.json").read_text())["training"]["step"]
    assert f"stopped by SIGTERM after step {step} of" in said, "nothing was lost"

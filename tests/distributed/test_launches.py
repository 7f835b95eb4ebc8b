"""What launchers really start is said: Accelerate's own starts one process on a CPU, whatever it is asked for."""

from __future__ import annotations

import pytest

from peftkit import replace
from peftkit.training.session import asked_processes
from tests.distributed import launching
from tests.faults import runs


@pytest.mark.parametrize(
    ("command", "many"),
    [
        ("python accelerate launch --cpu --num_processes 2 train.py", 2),
        ("python accelerate launch --num_processes=4 train.py", 4),
        ("python accelerate launch --num-processes 3 train.py", 3),
        ("python accelerate launch train.py --num_processes", 1),
        ("bash", 1),
        ("", 1),
    ],
)
def test_what_a_launcher_was_asked_for(command, many):
    assert asked_processes(command.split()) == many


def test_one_process_where_two_were_asked_for_is_told_with_the_line_that_works(tmp_path):
    recipe = replace(runs.encoder(tmp_path), output_dir=str(tmp_path / "runs"), training={"max_steps": 1})
    launcher = ["-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2"]
    said = launching.finish(*launcher, launching.recipe_file(tmp_path / "file", recipe))
    assert "1 process on cpu" in said
    assert "2 processes were asked for and 1 runs" in said
    assert "torchrun --nproc_per_node 2" in said

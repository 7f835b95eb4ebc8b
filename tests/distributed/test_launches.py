"""What launchers really start is said: Accelerate's own starts one process on a CPU, whatever it is asked for."""

from __future__ import annotations

import pytest

from peftkit import replace
from peftkit.cli import launch
from peftkit.distributed import process_group
from peftkit.distributed.launched import requested_processes
from peftkit.distributed.session import open_session
from peftkit.errors import CheckpointError
from tests.distributed import launching
from tests.faults import runs


@pytest.fixture(autouse=True)
def config(tmp_path, monkeypatch):
    """Accelerate's default configuration, as yet missing; none of this machine's."""
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(tmp_path / "default.yaml"))
    return tmp_path / "default.yaml"


@pytest.mark.parametrize(
    ("command", "many"),
    [
        ("python accelerate launch --cpu --num_processes 2 train.py", 2),
        ("python accelerate launch --cpu train.py", 1),
        ("python accelerate launch --num_processes=4 train.py", 4),
        ("python accelerate launch --num-processes 3 train.py", 3),
        ("python accelerate launch train.py --num_processes", 1),
        ("python -m accelerate.commands.launch --num_processes 2 train.py", 2),
        ("mlflow launch --num_processes 2 train.py", 1),
        ("python launch --num_processes 2 accelerate", 1),
        ("bash", 1),
        ("", 1),
    ],
)
def test_what_a_launcher_was_asked_for(command, many):
    assert requested_processes(command.split()) == many


@pytest.mark.parametrize(
    ("text", "many"),
    [
        ("distributed_type: 'NO'\nnum_processes: 2\n", 2),
        ('{"num_processes": 3}', 3),
        ("num_processes: -1\n", 1),
        ("num_processes: many\n", 1),
        ("mixed_precision: 'no'\n", 1),
        ("- a list\n", 1),
        ("{broken", 1),
        (b"\xff\xfe\x00", 1),
        (None, 1),
    ],
)
def test_what_a_launcher_was_configured_for(config, tmp_path, text, many):
    """A file that cannot be read changes nothing: Accelerate has its own words for it."""
    named = tmp_path / "named.yaml"
    for file in (config, named) if text is not None else ():
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert requested_processes(["accelerate", "launch", "train.py"]) == many
    assert requested_processes(["accelerate", "launch", "--cpu", "train.py"]) == 1, "Accelerate leaves it unread, too"
    assert requested_processes(["accelerate", "launch", "--cpu", "--config_file", str(named), "train.py"]) == many
    assert requested_processes(["python", "/bin/accelerate-launch", f"--config-file={named}", "train.py"]) == many
    both = ["accelerate", "launch", "--config_file", str(named), "--num_processes", "4", "a.py"]
    assert requested_processes(both) == 4, "the option counts before the file"
    assert requested_processes(["python", "train.py", "--config_file", str(named)]) == 1


def test_the_named_configuration_counts_before_the_default_one(config, tmp_path):
    config.write_text("num_processes: 5\n")
    (tmp_path / "named.yaml").write_text("num_processes: 2\n")
    command = ["accelerate", "launch", "--config_file", str(tmp_path / "named.yaml"), "train.py"]
    assert requested_processes(command) == 2
    assert requested_processes([*command[:2], "train.py"]) == 5


@pytest.mark.slow
def test_one_process_where_two_were_asked_for_is_told_with_the_line_that_works(tmp_path):
    recipe = replace(runs.encoder(tmp_path), output_dir=str(tmp_path / "runs"), training={"max_steps": 1})
    config = tmp_path / "two.yaml"
    config.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nnum_processes: 2\nuse_cpu: true\n")
    launcher = ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(config)]
    said = launching.finish(*launcher, launching.recipe_file(tmp_path / "file", recipe))
    assert "1 process on cpu" in said
    assert "2 processes were requested but only 1 started" in said
    assert "torchrun --nproc_per_node 2" in said


def test_commands_that_would_share_rows_tell_it_too(monkeypatch, capsys):
    monkeypatch.setattr(process_group, "missing_processes", lambda running: f"2 asked for and {running} runs")
    with process_group.init_process_group() as group:
        assert (group.rank, group.world_size) == (0, 1)
    assert capsys.readouterr().err == "peftkit: 2 asked for and 1 runs\n"


def test_an_error_of_the_main_process_s_work_is_told_once(tmp_path):
    recipe = runs.encoder(tmp_path)
    runs.warm_up()

    def work(rank):
        def fails():
            raise CheckpointError("cannot be used")

        with launch.one_message():
            open_session(recipe).run_on_main(fails)

    said = tmp_path / "said.txt"
    assert runs.wait_all(runs.fork_ranks(work, said)) == [1, 1]
    assert said.read_text() == "peftkit: cannot be used\n"

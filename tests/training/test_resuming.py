"""What a continuation must share with its run, the log through a full disk, and files that are whole or not there."""

from __future__ import annotations

import errno
import json
import os
import signal
from types import SimpleNamespace

import pytest

from peftkit import replace
from peftkit.distributed.watchdog import Watchdog
from peftkit.errors import CheckpointError, Interrupted, RunError, TrainingError
from peftkit.runs import checkpoints, resume
from peftkit.system import files
from peftkit.training import interruptions
from peftkit.training.interruptions import stop_immediately
from peftkit.training.log import RunLog
from tests.faults.injection import Faults
from tests.tiny import tiny_recipe

SESSION = SimpleNamespace(is_main=True, accelerator=SimpleNamespace(log=lambda *_, **__: None))


def marks(recipe, **others):
    given = {"data": "d", "tokenizer": "t", "base": "b", "world_size": 1, **others}
    return resume.fingerprints(recipe, **given)


@pytest.mark.parametrize(
    ("changed", "said", "allow"),
    [
        ({"data": "x"}, "these changed: data.", "data"),
        ({"tokenizer": "x"}, "these changed: tokenizer.", "tokenizer"),
        ({"base": "x"}, "these changed: base model.", "base_model"),
        ({"adapter": "x"}, "these changed: adapter.", "adapter"),
        ({"world_size": 2}, "these changed: world_size (1 → 2).", "world_size"),
    ],
)
def test_each_change_is_named_and_may_be_allowed_by_that_name(tmp_path, changed, said, allow):
    recipe = tiny_recipe("m")
    state = {"fingerprints": marks(recipe)}
    checkpoints.save(tmp_path / "checkpoints", 1, model={}, optimizer={}, state=state)
    assert resume.find_checkpoint(tmp_path, marks(recipe), ())[0].step == 1
    with pytest.raises(RunError) as refused:
        resume.find_checkpoint(tmp_path, marks(recipe, **changed), ())
    assert said in str(refused.value)
    assert f"--allow {allow}" in str(refused.value)
    assert resume.find_checkpoint(tmp_path, marks(recipe, **changed), (allow,))[0].step == 1


def test_fields_that_nothing_is_learned_from_may_change(tmp_path):
    recipe = tiny_recipe("m")
    checkpoints.save(tmp_path / "checkpoints", 1, model={}, optimizer={}, state={"fingerprints": marks(recipe)})
    other = replace(recipe, output_dir="there", training={"max_time": 5, "keep_checkpoints": 9, "log_every": 3})
    assert resume.find_checkpoint(tmp_path, marks(other), ())[0].step == 1
    with pytest.raises(RunError, match=r"training.seed \(0 → 1\)"):
        resume.find_checkpoint(tmp_path, marks(replace(recipe, training={"seed": 1})), ())


def test_a_damaged_checkpoint_is_named_and_one_of_another_making_refused(tmp_path):
    recipe = tiny_recipe("m")
    root = tmp_path / "checkpoints"
    for step in (1, 2):
        checkpoints.save(root, step, model={}, optimizer={}, state={"fingerprints": marks(recipe)})
    (root / "step-00000002" / "state.json").write_text("{}")
    checkpoint, said = resume.find_checkpoint(tmp_path, marks(recipe), ())
    assert checkpoint.step == 1
    assert "step-00000002 is not used: state.json has 2 bytes" in said[0]
    assert sorted(os.listdir(root)) == ["damaged-step-00000002", "step-00000001"]
    checkpoints.save(root, 3, model={}, optimizer={}, state={"something": "else"})
    with pytest.raises(RunError, match="not written by this version"):
        resume.find_checkpoint(tmp_path, marks(recipe), ())


def test_what_a_killed_run_had_staged_is_cleared(tmp_path):
    for name in (".adapter.x1y2", ".merged.z", "checkpoints/.staging-step-00000003"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / ".metrics.json.tmp").write_text("{")
    (tmp_path / ".lock").touch()
    checkpoint, said = resume.find_checkpoint(tmp_path, marks(tiny_recipe("m")), ())
    assert checkpoint is None
    assert "training starts from the beginning" in said[-1]
    assert sorted(os.listdir(tmp_path)) == [".lock", "checkpoints"]


@pytest.mark.parametrize("fault", ["ENOSPC", "EIO"])
def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path, fault):
    at = 0
    while True:
        file = tmp_path / f"{at}.json"
        file.write_text('"old"')
        with Faults(at, fault) as faults:
            try:
                files.write_json(file, "new")
            except OSError as error:
                failure = error.errno
            else:
                failure = None
        assert json.loads(file.read_text()) in ("old", "new")
        assert failure in (None, getattr(errno, fault))
        assert not list(tmp_path.glob(".*"))
        if at >= len(faults.calls):
            break
        at += 1
    assert at > 5


def test_lines_that_a_full_disk_did_not_take_are_written_later(tmp_path, capsys):
    log = RunLog(tmp_path / "metrics.jsonl", SESSION, 9)
    log.event(1, "first", "one")
    with Faults(0, "ENOSPC", lasting=True):
        log.event(2, "second", "two")
        log.event(3, "third", "three")
        with pytest.raises(OSError, match="No space left"):
            log.flush()
    log.event(4, "fourth", "four")
    log.flush()
    offset = log.end
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert offset == (tmp_path / "metrics.jsonl").stat().st_size
    assert capsys.readouterr().err.count("the log cannot be written (No space left on device)") == 1


def test_a_log_is_cut_to_its_checkpoint_and_one_that_lost_lines_says_so(tmp_path, capsys):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n')
    RunLog(file, SESSION, 9, offset=12).close()
    assert file.read_text() == '{"step": 1}\n'
    RunLog(file, SESSION, 9, offset=24).close()
    assert file.read_text() == '{"step": 1}\n', "nothing is made up"
    assert "12 bytes shorter than when its checkpoint was saved" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_outside_the_loop_a_signal_ends_at_once(number):
    before = signal.getsignal(number)
    expected = pytest.raises(Interrupted, match=f"stopped by {number.name}; nothing was done")
    with expected as stopped, stop_immediately(lambda: "nothing was done"):
        os.kill(os.getpid(), number)
    assert stopped.value.exit_code == 128 + number
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/x/metrics.json"),
            "runs/x/metrics.json cannot be written",
        ),
        (OSError(errno.EROFS, "Read-only file system"), "cannot be written: Read-only file system"),
        (MemoryError("Unable to allocate 64.0 GiB"), "rank 0 is out of memory (Unable to allocate 64.0 GiB)"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"), "rank 0 is out of memory"),
    ],
)
def test_failures_of_the_machine_are_one_line_and_others_are_left_alone(failure, said, tmp_path):
    session = SimpleNamespace(watchdog=Watchdog(0, 1, None), folder=None, rank=0)
    with pytest.raises(TrainingError) as told, interruptions.guarded(session):
        raise failure
    assert said in str(told.value)
    assert "there is no checkpoint yet" in str(told.value)
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    session.folder = tmp_path
    with pytest.raises(TrainingError, match=f"peftkit train --resume {tmp_path}"), interruptions.guarded(session):
        raise failure
    for own in (FileNotFoundError(errno.ENOENT, "no such file"), RuntimeError("shapes differ"), CheckpointError("x")):
        with pytest.raises(type(own)) as same, interruptions.guarded(session):
            raise own
        assert same.value is own

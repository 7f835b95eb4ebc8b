"""A checkpoint of the best step that could not be written is written before any later one."""

from __future__ import annotations

import pytest
import torch

from peftkit.errors import CheckpointError
from peftkit.runs import checkpoints
from peftkit.training.checkpoint_writer import CheckpointContent, CheckpointWriter


def content(step):
    weight = torch.full((2, 2), float(step))
    return CheckpointContent(step, {"w": weight}, {"w/exp_avg": weight / 2}, {"step": step})


def steps(root):
    return sorted(step for step, _ in checkpoints.candidates(root))


@pytest.fixture
def full(monkeypatch):
    """A disk that is full while this list holds something."""
    held, real = [], checkpoints.save

    def save(*args, **kwargs):
        if held:
            raise CheckpointError("No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(checkpoints, "save", save)
    return held


def nothing():
    pass


def test_the_best_is_made_up_for_as_it_was(tmp_path, full):
    writer, best = CheckpointWriter(tmp_path, keep=2), content(4)
    assert writer.write(content(3), None, nothing) is None
    full.append(True)
    assert "No space" in writer.write(best, 4, nothing)
    best.model["w"].fill_(-1)  # training goes on in the same tensors
    assert "No space" in writer.write(content(6), 4, nothing)
    assert steps(tmp_path) == [3]
    full.clear()
    assert writer.write(content(8), 4, nothing) is None
    assert steps(tmp_path) == [4, 8]
    made_up = checkpoints.at_step(tmp_path, 4)
    assert made_up.tensors(checkpoints.MODEL)["w"].unique().item() == 4
    assert made_up.tensors(checkpoints.OPTIMIZER)["w/exp_avg"].unique().item() == 2
    assert made_up.state() == {"step": 4}


def test_what_is_no_longer_the_best_is_not_made_up_for(tmp_path, full):
    writer = CheckpointWriter(tmp_path, keep=2)
    full.append(True)
    writer.write(content(4), 4, nothing)
    full.clear()
    assert writer.write(content(8), 8, nothing) is None
    assert steps(tmp_path) == [8]


def test_any_other_checkpoint_that_failed_is_let_go(tmp_path, full):
    writer = CheckpointWriter(tmp_path, keep=3)
    writer.write(content(2), 2, nothing)
    full.append(True)
    writer.write(content(3), 2, nothing)
    full.clear()
    writer.write(content(6), 2, nothing)
    assert steps(tmp_path) == [2, 6]


def test_a_log_that_cannot_be_flushed_keeps_checkpoints_from_being_written(tmp_path):
    def broken():
        raise OSError("the disk is gone")

    writer = CheckpointWriter(tmp_path, keep=2)
    assert "the disk is gone" in writer.write(content(4), 4, broken)
    assert steps(tmp_path) == []
    assert writer.write(content(5), 4, nothing) is None
    assert steps(tmp_path) == [4, 5]

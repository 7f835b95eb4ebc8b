"""Checkpoints exist whole or not at all: every damaged byte is noticed, and the one before is used."""

from __future__ import annotations

import os
import random
import shutil

import pytest
import torch

from peftkit.errors import CheckpointError
from peftkit.training import checkpoints


def write(root, step):
    tensors = {"a.weight": torch.arange(12.0).reshape(3, 4) * step}
    return checkpoints.save(
        root, step, model=tensors, optimizer={"a.weight/step": torch.tensor(7.0)}, state={"n": step}
    )


def test_what_is_saved_is_read_back(tmp_path):
    write(tmp_path, 3)
    checkpoint, rejected = checkpoints.newest(tmp_path)
    assert checkpoint.step == 3
    assert rejected == []
    assert checkpoint.state() == {"n": 3}
    assert torch.equal(checkpoint.tensors("model.safetensors")["a.weight"], torch.arange(12.0).reshape(3, 4) * 3)
    assert checkpoint.tensors("optimizer.safetensors")["a.weight/step"].item() == 7


def test_every_truncated_or_flipped_file_is_noticed_and_the_one_before_is_used(tmp_path):
    write(tmp_path, 1)
    write(tmp_path, 2)
    whole = tmp_path / "step-00000002"
    kept = tmp_path / "kept"
    shutil.copytree(whole, kept)
    generator = random.Random(0)
    for trial in range(120):
        shutil.rmtree(whole)
        shutil.copytree(kept, whole)
        file = whole / generator.choice(["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
        content = bytearray(file.read_bytes())
        if trial % 3 == 0:
            content = content[: generator.randrange(len(content))]
        elif trial % 3 == 1:
            content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        else:
            content = None
        file.unlink() if content is None else file.write_bytes(bytes(content))
        if file.name == "manifest.json" and content and checkpoints.verify(whole) is None:
            continue  # a flipped bit in white space leaves the manifest's meaning as it was
        checkpoint, rejected = checkpoints.newest(tmp_path)
        assert checkpoint.step == 1, (trial, file.name)
        assert len(rejected) == 1
        assert "step-00000002" in rejected[0]


@pytest.mark.parametrize("call", ["os.replace", "os.fsync", "pathlib.Path.write_text", "safetensors.torch.save_file"])
def test_a_failed_save_leaves_the_last_checkpoint_and_no_litter(tmp_path, monkeypatch, call):
    write(tmp_path, 1)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(call, full)
    with pytest.raises(CheckpointError, match="No space left"):
        write(tmp_path, 2)
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == ["step-00000001"]
    assert checkpoints.newest(tmp_path)[0].step == 1


def test_a_folder_under_another_steps_name_is_refused(tmp_path):
    write(tmp_path, 1)
    os.rename(tmp_path / "step-00000001", tmp_path / "step-00000009")
    assert checkpoints.newest(tmp_path)[0] is None


def test_pruning_keeps_the_newest_and_the_best_and_sweeps_what_a_kill_left(tmp_path):
    for step in range(1, 7):
        write(tmp_path, step)
    (tmp_path / ".staging-step-00000007").mkdir()
    checkpoints.prune(tmp_path, keep=2, protect={2})
    assert sorted(os.listdir(tmp_path)) == ["step-00000002", "step-00000005", "step-00000006"]


def test_saving_a_step_again_replaces_it(tmp_path):
    write(tmp_path, 1)
    checkpoints.save(tmp_path, 1, model={"a": torch.zeros(1)}, optimizer={}, state={"n": "again"})
    assert checkpoints.newest(tmp_path)[0].state() == {"n": "again"}
    assert os.listdir(tmp_path) == ["step-00000001"]

"""Checkpoints exist whole or not at all: every damaged byte is noticed, and the one before is used."""

from __future__ import annotations

import contextlib
import os
import random
import shutil

import pytest
import safetensors.torch
import torch

from peftkit.errors import CheckpointError
from peftkit.runs import checkpoints
from peftkit.system import files
from tests.faults.injection import Faults


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


@pytest.mark.parametrize("fault", ["ENOSPC", "EIO"])
@pytest.mark.parametrize("lasting", [False, True])
def test_whichever_call_of_a_save_fails_a_checkpoint_is_left_and_no_litter(tmp_path, fault, lasting):
    """Each call of the file system in turn, until a save goes through without meeting the fault."""
    at, failed, said = 0, 0, set()
    while True:
        root = tmp_path / str(at)
        write(root, 1)
        with Faults(at, fault, lasting=lasting) as faults:
            try:
                write(root, 2)
                checkpoints.prune(root, keep=2, protect=set())
            except CheckpointError as error:
                failed += 1
                said.add(str(error).partition(" to ")[0])
        newest = checkpoints.newest(root)[0]
        assert newest is not None
        assert newest.step in (1, 2)
        assert newest.state() == {"n": newest.step}
        checkpoints.remove_staged(root)
        assert set(os.listdir(root)) <= {"step-00000001", "step-00000002"}
        if at >= len(faults.calls):
            break
        at += 1
    assert failed > 15
    assert said == {"checkpoint of step 2 could not be written"}


@pytest.mark.parametrize("fault", ["ENOSPC", "EIO"])
def test_a_step_that_is_saved_again_is_never_lost(tmp_path, fault):
    """The only checkpoint there is, replaced: one of the two stands whichever call fails for good."""
    at, seen = 0, set()
    while True:
        root = tmp_path / str(at)
        write(root, 1)
        with Faults(at, fault, lasting=True) as faults, contextlib.suppress(CheckpointError):
            checkpoints.save(root, 1, model={"a": torch.zeros(1)}, optimizer={}, state={"n": "again"})
        checkpoints.remove_staged(root)
        newest = checkpoints.newest(root)[0]
        assert newest is not None, (at, faults.calls)
        seen.add(newest.state()["n"])
        assert os.listdir(root) == ["step-00000001"]
        if at >= len(faults.calls):
            break
        at += 1
    assert seen == {1, "again"}


def test_the_bytes_are_those_that_safetensors_writes_and_reads(tmp_path):
    tensors = {
        "matrix": torch.randn(3, 5),
        "transposed": torch.randn(4, 6).T,
        "half": torch.randn(7).bfloat16(),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "flag": torch.tensor([True, False, True]),
        "scalar": torch.tensor(7.0),
        "long": torch.arange(3),
        "none": torch.zeros(0, 4),
    }
    files.write_new(tmp_path / "ours", files.safetensors(tensors))
    read = safetensors.torch.load_file(tmp_path / "ours")
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    same = {name: tensor.contiguous() for name, tensor in tensors.items()}
    assert (tmp_path / "ours").stat().st_size == len(safetensors.torch.save(same))


def test_damaged_checkpoints_do_not_push_whole_ones_out(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    (tmp_path / "step-00000003" / "state.json").write_text("{}")
    checkpoints.set_aside(tmp_path, checkpoints.newest(tmp_path)[0])
    write(tmp_path, 4)
    checkpoints.prune(tmp_path, keep=2, protect=set())
    assert sorted(os.listdir(tmp_path)) == ["damaged-step-00000003", "step-00000002", "step-00000004"]


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

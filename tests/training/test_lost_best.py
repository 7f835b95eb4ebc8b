"""The best weights' checkpoint, damaged on the disk after it was written: named, and trained again to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest

import peftkit
from peftkit.errors import CheckpointError
from tests.faults import runs

BEST, LAST = 4, 8


@pytest.fixture(scope="module")
def recipe(bert, topics_csv):
    """Its accuracy does not move, so that the first validation stays the best, while the weights go on."""
    whole = {
        "name": "lost", "model": {"source": str(bert), "dtype": "float32"},
        "data": {"source": str(topics_csv), "max_length": 32}, "method": {"kind": "lora", "rank": 2, "dropout": 0.1},
        "training": {"max_steps": LAST, "batch_size": 4, "learning_rate": 1e-7, "evaluate_every": BEST,
                     "save_every": 2, "best_metric": "accuracy", "threads": 1},
        "evaluation": {"baselines": []}, "export": {"prove": False}, "tracking": [],
    }  # fmt: skip
    return peftkit.Recipe.parse(whole)


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """The run that nothing happened to."""
    made = peftkit.train(peftkit.replace(recipe, output_dir=str(tmp_path_factory.mktemp("whole"))), quiet=True)
    assert made.metrics["training"]["best_step"] == BEST
    return made.path


def flip(file):
    held = bytearray(file.read_bytes())
    held[len(held) // 2] ^= 1
    file.write_bytes(held)


def damaged_at_the_end(recipe):
    """A run whose best checkpoint is damaged at its last validation; its folder, and what it said."""

    def on_validation(step, figures):
        if step == LAST:
            (file,) = root.glob(f"*/checkpoints/step-{BEST:08d}/model.safetensors")
            flip(file)

    root = Path(recipe.output_dir)
    with pytest.raises(CheckpointError) as told:
        peftkit.train(recipe, quiet=True, on_validation=on_validation)
    (folder,) = root.iterdir()
    return folder, str(told.value)


@pytest.mark.parametrize(("kept", "start"), [(9, 2), (2, 0)])
def test_it_is_named_and_trained_again_from_before_it(recipe, whole, tmp_path, capsys, kept, start):
    """From the checkpoint before it where there is one, else from the beginning; never from one after it."""
    recipe = peftkit.replace(recipe, output_dir=str(tmp_path), training={"keep_checkpoints": kept})
    folder, said = damaged_at_the_end(recipe)
    assert f"step-{BEST:08d} cannot be used: model.safetensors does not have the SHA-256" in said
    assert f"peftkit train --resume {folder}" in said
    assert not (folder / "adapter").exists()

    seen = []
    peftkit.train(recipe, resume=folder, on_validation=lambda step, figures: seen.append(step))
    told = "".join("".join(capsys.readouterr()).split())  # lines may be broken anywhere
    assert f"step-{BEST:08d}cannotbeused" in told
    assert ("trainingstartsfromthebeginning" in told) == (start == 0)
    assert seen == [BEST, LAST]
    for path in (folder / "checkpoints").glob("damaged-step-*"):
        assert int(path.name[-8:]) > start, "set aside, to be looked at"
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    assert runs.differences(folder, whole) == []


def test_a_run_that_is_not_done_goes_on_from_its_newest_checkpoint(recipe, whole, tmp_path):
    """A later step may be better still; nothing is trained twice before that is known."""

    class Cut(Exception):
        pass

    def cut(step, figures):
        if step == LAST:
            raise Cut

    recipe = peftkit.replace(recipe, output_dir=str(tmp_path))
    with pytest.raises(Cut):
        peftkit.train(recipe, quiet=True, on_validation=cut)
    (folder,) = tmp_path.iterdir()
    flip(folder / "checkpoints" / f"step-{BEST:08d}" / "model.safetensors")
    seen = []
    with pytest.raises(CheckpointError, match="cannot be used"):
        peftkit.train(recipe, resume=folder, quiet=True, on_validation=lambda step, figures: seen.append(step))
    assert seen == [LAST]

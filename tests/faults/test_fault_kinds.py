"""A few trials of every kind of fault; benchmarks/faults.py runs hundreds, and publishes the counts."""

from __future__ import annotations

import pytest

from tests.faults import disks, kinds, kinds_disk, kinds_hostile, kinds_input, kinds_many, runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the whole runs lie."""
    runs.warm_up()
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def whole(folder):
    """The uninterrupted run of an encoder."""
    return kinds.reference(folder, "encoder")


@pytest.fixture(scope="module")
def packed(folder):
    """The uninterrupted run of a packed decoder."""
    return kinds.reference(folder, "decoder")


def check(outcome):
    assert outcome.trials
    assert outcome.failures == []


@pytest.mark.slow
def test_killed_at_random_moments(folder, whole):
    check(kinds.kills(folder, whole, trials=2))


@pytest.mark.slow
def test_killed_in_each_of_two_stages(folder, packed):
    """Following instructions, then preferences by DPO on the adapter of that run."""
    outcome = kinds.kills_in_stages(folder, [packed, kinds.reference(folder, "preferences", adapter=packed.path)])
    check(outcome)
    assert outcome.trials == 2


def test_killed_in_a_save(folder, packed):
    outcome = kinds.kills_in_saves(folder, packed, trials=2)
    check(outcome)
    assert outcome.figures["kills that fell into a save"] > 0


def test_a_full_or_broken_disk_in_a_save(folder, packed):
    check(kinds.failing_saves(folder, packed, trials=2))


@pytest.mark.slow
def test_the_checkpoint_of_the_best_weights_fails_for_a_while(folder, whole):
    recipe, said = whole.trial(folder, "best")
    # the second save is that of the first validation, the best so far
    code = runs.wait(runs.fork(kinds.faulty_saves(recipe, 1, 14, "ENOSPC"), said))
    assert code == 0, said.read_text()
    assert "No space left" in said.read_text()
    assert runs.differences(runs.folder_of(recipe), whole.path) == []


@pytest.mark.slow
@pytest.mark.skipif(not disks.mountable(), reason="this process may not mount disks")
def test_a_disk_that_is_full_or_read_only(folder, packed):
    check(kinds_disk.full_disk(folder, packed, trials=1))
    check(kinds_disk.read_only(folder, packed, only=(kinds_disk.START, kinds_disk.RESUMED)))


def test_a_disk_that_becomes_read_only(folder, packed):
    check(kinds_disk.read_only(folder, packed, only=(kinds_disk.DURING,)))


@pytest.mark.slow
def test_every_call_of_a_save(folder):
    check(kinds.every_call(folder / "calls"))


@pytest.mark.parametrize("kind", ["truncated", "bit-flipped"])
def test_damaged_files(folder, kind):
    check(kinds.damaged(folder / kind, kind, trials=40))


def test_signals(folder, packed):
    check(kinds.signals(folder, packed, trials=2))


def test_changed_inputs_are_refused_by_name(folder, whole):
    check(
        kinds_input.changed_inputs(folder, whole, only=("a label changed", "one bit of the base's weights", "the rank"))
    )


@pytest.mark.slow
def test_every_changed_input_is_refused_by_name(folder, whole):
    check(kinds_input.changed_inputs(folder, whole))


def test_fuzzed_recipes(folder):
    check(kinds_input.fuzzed_recipes(folder, trials=60))


def test_bad_and_clean_data(folder):
    check(kinds_input.bad_data(folder, trials=28))
    check(kinds_input.clean_data(folder, trials=6))


def test_hostile_adapters(folder, whole):
    check(kinds_hostile.hostile(folder, whole, trials=len(kinds_hostile.HARMS) + 4))


def test_secrets_stay_secret(folder, whole):
    check(kinds_input.secrets(folder, whole))


@pytest.fixture(scope="module")
def two(folder):
    """The uninterrupted run of two processes."""
    return kinds_many.reference(folder)


@pytest.mark.slow
def test_signals_at_two_processes(folder, two):
    check(kinds_many.signals(folder, two, trials=2))


@pytest.mark.slow
def test_a_rank_that_is_killed(folder, two):
    check(kinds_many.lost_ranks(folder, two, trials=1))


@pytest.mark.slow
def test_a_rank_that_is_stopped_out_of_memory_asleep_or_loops(folder, two):
    check(kinds_many.lost_ranks(folder, two, trials=len(kinds_many.LOSSES)))


@pytest.mark.slow
def test_the_ledger_of_rows(folder):
    check(kinds_many.ledger(folder, trials=1))

"""Rows tokenized by several processes: the same tokens, in the same order, with the same warnings and errors."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import sys
import time

import numpy as np
import pytest

from peftkit.data import pipeline
from peftkit.data.pipeline import encode, prepare
from peftkit.errors import DataError, TrainingError
from peftkit.models.tokenizer import load_tokenizer
from peftkit.schema.recipe import Recipe
from peftkit.system import parallel
from peftkit.system.cores import limit_spinning, share_of_cores
from tests import tiny

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are forked on Linux alone")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch, tmp_path):
    """Chunks of 5 rows, worth it however little they take, in a cache of their own."""
    monkeypatch.setattr(pipeline, "BATCH", 5)
    monkeypatch.setattr(parallel, "WORTH", 0.0)
    monkeypatch.setattr(parallel, "GAIN", 0.0)
    monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path / "cache"))


def conversations(folder, rows=23):
    folder.mkdir()
    for name, count in (("train", rows), ("validation", 4)):
        lines = [
            {"instruction": f"say {' '.join(tiny.WORDS[: number % 9 + 1])}", "input": "", "output": f"{name} {number}"}
            for number in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def texts(folder, rows=23):
    folder.mkdir()
    for name, count in (("train", rows), ("validation", 4)):
        lines = [f"{' '.join(tiny.WORDS[: number % 17 + 1])} {name}{number},{number % 2}" for number in range(count)]
        (folder / f"{name}.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    return folder


def recipe_of(model, data, threads, task):
    template = None if task["kind"] == "classification" else "plain"
    return Recipe.parse(
        {
            "name": "made", "model": {"source": str(model), "chat_template": template}, "task": task,
            "data": {"source": str(data), "max_length": 40, "test_size": 0}, "training": {"threads": threads},
        }
    )  # fmt: skip


def held(encoded):
    return {name: (split.examples.to_dict(), split.lengths, split.weights) for name, split in encoded.splits.items()}


@pytest.mark.parametrize(
    "task", [{"kind": "classification"}, {"kind": "instruction"}, {"kind": "instruction", "packing": True}]
)
def test_several_processes_make_what_one_makes(task, bert, llama, tmp_path, monkeypatch):
    labelled = task["kind"] == "classification"
    data = (texts if labelled else conversations)(tmp_path / "rows")
    found = {}
    real = pipeline._encode_columns

    def noted(*given):
        with (tmp_path / "pids").open("a") as file:
            file.write(f"{os.getpid()}\n")
        return real(*given)

    monkeypatch.setattr(pipeline, "_encode_columns", noted)
    for threads in (1, 3):
        monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path / f"cache{threads}"))
        (tmp_path / "pids").unlink(missing_ok=True)
        recipe = recipe_of(bert if labelled else llama, data, threads, task)
        found[threads] = encode(prepare(recipe), load_tokenizer(recipe.model), recipe)
        pids = set((tmp_path / "pids").read_text().split())
        assert (pids == {str(os.getpid())}) == (threads == 1)
    assert found[1].fingerprint == found[3].fingerprint
    for name, (examples, lengths, weights) in held(found[1]).items():
        others = held(found[3])[name]
        assert examples == others[0]
        np.testing.assert_array_equal(lengths, others[1])
        np.testing.assert_array_equal(weights, others[2])
    assert len(found[1].splits["train"].lengths) > 1


def test_values_come_in_order_and_few_wait(tmp_path):
    made = parallel.in_order(lambda item: (time.sleep(0.03 * (item % 3 == 1)), item)[1], range(20), 3)
    assert list(made) == list(range(20))

    def noted(item):
        (tmp_path / str(item)).touch()
        return item

    begun = parallel.in_order(noted, range(50), 2)
    assert [next(begun) for _ in range(3)] == [0, 1, 2]
    time.sleep(0.3)
    assert len(list(tmp_path.iterdir())) <= 3 + 2 * 2  # the three that were taken, and four that wait
    begun.close()
    assert len(list(tmp_path.iterdir())) <= 3 + 2 * 2


def test_little_work_stays_here(monkeypatch):
    monkeypatch.setattr(parallel, "WORTH", 60.0)
    assert set(parallel.in_order(lambda item: os.getpid(), range(20), 4)) == {os.getpid()}
    monkeypatch.setattr(parallel, "WORTH", 0.0)
    assert set(parallel.in_order(lambda item: os.getpid(), range(20), 1)) == {os.getpid()}
    assert list(parallel.in_order(lambda item: item, range(0), 4)) == []
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    assert set(parallel.in_order(lambda item: os.getpid(), range(20), 4)) == {os.getpid()}


@pytest.mark.parametrize(("afterwards", "shared"), [(0.04, False), (0.0, True)])
def test_work_that_takes_less_than_what_follows_it_stays_here(afterwards, shared, monkeypatch):
    monkeypatch.setattr(parallel, "GAIN", 2.0)
    pids = set()
    for pid in parallel.in_order(lambda item: (time.sleep(0.02), os.getpid())[1], range(6), 2):
        pids.add(pid)
        time.sleep(afterwards)
    assert (len(pids) > 1) == shared


def test_what_a_worker_warns_of_is_logged_here(caplog):
    def work(item):
        logging.getLogger("peftkit.made").warning("row %d of %s", item, "many")
        return os.getpid()

    with caplog.at_level(logging.WARNING):
        pids = list(parallel.in_order(work, range(6), 2))
    assert os.getpid() not in pids[parallel.TRIED :]
    assert [record.getMessage() for record in caplog.records] == [f"row {item} of many" for item in range(6)]


def test_the_first_wrong_row_is_told_whoever_met_it():
    def work(item):
        if item >= 3:
            raise DataError("expected text", file="rows.csv", line=item, column="text")
        return item

    made = parallel.in_order(work, range(9), 2)
    assert [next(made) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match="line 3, column 'text': expected text") as told:
        next(made)
    assert (told.value.line, told.value.column, told.value.message) == (3, "text", "expected text")


def test_a_worker_that_is_killed_is_told():
    here = os.getpid()

    def work(item):
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    with pytest.raises(TrainingError, match="was killed"):
        list(parallel.in_order(work, range(9), 2))


def test_no_worker_outlives_its_parent(tmp_path):
    parent = os.fork()
    if parent == 0:  # a process of ours that is killed while its workers are at work

        def work(item):
            (tmp_path / f"{os.getpid()}").touch()
            time.sleep(60 if item >= parallel.TRIED else 0)
            return item

        list(parallel.in_order(work, range(9), 2))
        os._exit(0)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("[0-9]*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    workers = [path.name for path in tmp_path.glob("[0-9]*") if path.name != str(parent)]
    while any(running(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(workers) == 2
    assert not [pid for pid in workers if running(pid)]


def running(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_process_of_a_run_keeps_to_its_share(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert (share_of_cores(None), share_of_cores(3)) == (8, 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert share_of_cores(None) == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert share_of_cores(None) == 1


def test_idle_threads_sleep_unless_the_user_has_chosen(monkeypatch):
    for chosen in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(chosen, raising=False)
    limit_spinning()
    assert os.environ["GOMP_SPINCOUNT"] == "100"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    limit_spinning()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    limit_spinning()
    assert "GOMP_SPINCOUNT" not in os.environ

"""Commands that share their rows: two processes over gloo give what one gives, every row once and in order."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.distributed as dist

from peftkit.cli import app
from peftkit.distributed import process_group
from peftkit.distributed.process_group import ProcessGroup
from peftkit.errors import TrainingError
from peftkit.inference import embed_file, evaluate, generate_file, predict_file
from peftkit.inference import texts as text_rows
from peftkit.inference.trained_model import LoadedRun
from peftkit.schema.types import TaskInfo
from tests import tiny
from tests.distributed import launching
from tests.exporting import INFO, exported
from tests.faults import runs

OFF = {"export": {"prove": False}}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Exports that nobody trained: a classifier and two language models."""
    runs.warm_up()
    folder = tmp_path_factory.mktemp("made")
    bert, llama = tiny.tiny_bert(folder / "bert"), tiny.tiny_llama(folder / "llama")
    text = TaskInfo("causal_lm")
    return {
        "classifier": exported(folder / "classifier", bert, **OFF)[0],
        "style": exported(folder / "style", llama, text, task={"kind": "style"}, data={"max_length": 16}, **OFF)[0],
        "chat": exported(folder / "chat", llama, text, task={"kind": "instruction"}, **OFF)[0],
    }


@pytest.fixture
def together(tmp_path):
    """Runs a command line as several processes; gives their exit codes, what each printed, and all of stderr."""

    def run(*words, many=2, stdin=None, before=None):
        said = tmp_path / "said.txt"

        def work(rank):
            sys.argv = ["peftkit", *map(str, words)]
            sys.stdout = (tmp_path / f"printed-{rank}.txt").open("w", encoding="utf-8")
            sys.stdin = io.StringIO(stdin) if rank == 0 and stdin is not None else None
            if before:
                before(rank)
            app.main()

        codes = runs.wait_all(runs.fork_ranks(work, said, many))
        printed = [(tmp_path / f"printed-{rank}.txt").read_text(encoding="utf-8") for rank in range(many)]
        return codes, printed, said.read_text(encoding="utf-8")

    return run


def texts(count):
    """Texts of different lengths, no two alike."""
    return [" ".join(tiny.WORDS[place : place + 1 + place % 6]) for place in range(count)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def like(found, expected):
    """Rows equal to those expected, numbers up to rounding."""
    assert [list(row) for row in found] == [list(row) for row in expected]
    for row, wanted in zip(found, expected):
        for name, value in wanted.items():
            assert row[name] == (pytest.approx(value, abs=2e-6) if isinstance(value, float) else value)


@pytest.mark.parametrize("rows", [1, 2, 7, 12])
def test_predictions_of_two_processes_are_those_of_one(made, together, tmp_path, monkeypatch, rows):
    """Seven rows are a chunk of three for each process, and one that only one of them has."""
    monkeypatch.setattr(predict_file, "CHUNK", 3)
    file = write(tmp_path / "in.jsonl", [{"id": n, "text": text} for n, text in enumerate(texts(rows))])
    count = predict_file.predict_file(made["classifier"], file=file, column=None, out=tmp_path / "one.jsonl")
    codes, printed, said = together("predict", made["classifier"], "--file", file, "--out", tmp_path / "two.jsonl")
    assert (codes, printed) == ([0, 0], ["", ""]), said
    assert said.count(f"wrote {rows} rows") == 1
    one, two = (lines((tmp_path / name).read_text(encoding="utf-8")) for name in ("one.jsonl", "two.jsonl"))
    assert count == rows
    assert [row["id"] for row in two] == list(range(rows))
    like(two, one)


def test_a_pipe_is_read_by_the_main_process_and_answered_by_it(made, together):
    codes, printed, said = together("predict", made["classifier"], stdin="\n".join(texts(5)) + "\n", many=3)
    assert codes == [0, 0, 0], said
    expected = [prediction.label for prediction in predictions_of(made["classifier"], texts(5))]
    assert [(row["text"], row["label"]) for row in lines(printed[0])] == list(zip(texts(5), expected))
    assert printed[1:] == ["", ""]


def predictions_of(run, given):
    from peftkit.inference.trained_model import load

    return load(run).predict(given)


@pytest.mark.parametrize("rows", [1, 5])
def test_vectors_of_two_processes_are_those_of_one(made, together, tmp_path, monkeypatch, rows):
    monkeypatch.setattr(embed_file, "CHUNK", 2)
    (tmp_path / "in.txt").write_text("\n".join(texts(rows)) + "\n", encoding="utf-8")
    arguments = {"file": tmp_path / "in.txt", "column": None, "normalize": True}
    embed_file.embed_file(str(made["classifier"]), out=tmp_path / "one.npy", **arguments)
    codes, _, said = together(
        "embed", made["classifier"], "--file", tmp_path / "in.txt", "--normalize", "--out", tmp_path / "two.npy"
    )
    assert codes == [0, 0], said
    one, two = np.load(tmp_path / "one.npy"), np.load(tmp_path / "two.npy")
    assert one.shape[0] == rows
    np.testing.assert_allclose(two, one, atol=1e-5)


@pytest.mark.parametrize(("kind", "rows"), [("classifier", 1), ("classifier", 7), ("style", 9)])
def test_figures_of_two_processes_are_those_of_one(made, together, tmp_path, kind, rows):
    """Windows of a language model are not its rows: their number divides otherwise."""
    labelled = [{"text": text, "label": INFO.labels[n % 3]} for n, text in enumerate(texts(rows))]
    file = write(tmp_path / "in.jsonl", labelled)
    expected = evaluate.evaluate(made[kind], file=file)
    codes, printed, said = together("evaluate", made[kind], "--file", file, "--json")
    assert codes == [0, 0], said
    assert json.loads(printed[0]) == pytest.approx(expected, rel=1e-5)
    assert printed[1] == ""


def test_a_prompt_is_continued_alike_whoever_does_it(made, together, tmp_path):
    """Sampled, so that the noise must be each prompt's own."""
    asked = ["the king said", "who is the player", "oil", "a new computer", "red"]
    file, options = write(tmp_path / "in.jsonl", [{"prompt": text} for text in asked]), {"max_new_tokens": 6}
    generate_file.generate_file(
        made["chat"], file=file, out=tmp_path / "one.jsonl", options={**options, "temperature": 1.0, "seed": 5}
    )
    codes, _, said = together(
        "generate", made["chat"], "--file", file, "--out", tmp_path / "two.jsonl", "--max-new-tokens", 6,
        "--temperature", 1.0, "--seed", 5,
    )  # fmt: skip
    assert codes == [0, 0], said
    one, two = (lines((tmp_path / name).read_text(encoding="utf-8")) for name in ("one.jsonl", "two.jsonl"))
    assert two == one
    assert len({row["generated"] for row in one}) == len(asked), "which texts are whose can be seen"


def failing(rank, how):
    """The predictions of one rank fail."""

    def before(mine):
        if mine == rank:
            LoadedRun.predict = how

    return before


def broken(self, given):
    raise TrainingError("broken")


def no_memory(self, given):
    raise RuntimeError("CUDA out of memory")


def killed(self, given):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("rank", "how", "codes", "message"),
    [
        (1, broken, [1, 1], "peftkit: rank 1: broken\n"),
        (0, broken, [1, 1], "peftkit: broken\n"),
        (1, no_memory, [1, 1], "peftkit: rank 1: RuntimeError: CUDA out of memory\n"),
    ],
)
def test_an_error_of_one_process_ends_all_with_one_message(made, together, tmp_path, rank, how, codes, message):
    file, out = write(tmp_path / "in.jsonl", [{"text": text} for text in texts(4)]), tmp_path / "out.csv"
    out.write_text("old", encoding="utf-8")
    found = together("predict", made["classifier"], "--file", file, "--out", out, before=failing(rank, how))
    assert (found[0], found[2]) == (codes, message)
    assert out.read_text(encoding="utf-8") == "old"
    assert sorted(path.name for path in tmp_path.glob("*out.csv*")) == ["out.csv"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_ends_the_others_and_is_named_once(made, together, tmp_path, rank):
    file = write(tmp_path / "in.jsonl", [{"text": text} for text in texts(6)])
    codes, _, said = together("predict", made["classifier"], "--file", file, many=3, before=failing(rank, killed))
    assert codes.pop(rank) == -signal.SIGKILL
    assert codes == [1, 1]
    assert said.count("peftkit") == 1, said
    assert f"rank {rank} (process " in said
    assert "run it again" in said.lower()


def test_a_main_process_that_cannot_write_leaves_nobody_waiting(made, together, tmp_path):
    file = write(tmp_path / "in.jsonl", [{"text": text} for text in texts(4)])

    def before(rank):
        def full(answers, stream):
            next(answers)
            raise TrainingError("no space is left")

        if rank == 0:
            text_rows.write_lines = full

    codes, _, said = together("predict", made["classifier"], "--file", file, before=before)
    assert codes == [1, 1]
    assert said == "peftkit: no space is left\n"


def test_wrong_input_is_one_message(made, together, tmp_path):
    file = tmp_path / "in.csv"
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("txt",), ("a",)])
    codes, _, said = together("predict", made["classifier"], "--file", file)
    assert codes == [2, 2]
    assert said.count("did you mean 'txt'?") == said.count("peftkit:") == 1


@pytest.mark.parametrize("many", [1, 2, 3, 5])
@pytest.mark.parametrize("items", [1, 4, 5, 11])
def test_however_they_divide_every_item_is_one_process_s(many, items):
    """Threads in place of processes, which lay what they made on one table."""
    table, barrier, done = [None] * many, threading.Barrier(many), []

    class Peer(ProcessGroup):
        def all_gather_object(self, value):
            table[self.rank] = value
            barrier.wait(timeout=20)
            found = list(table)
            barrier.wait(timeout=20)
            return found

    def work(mine):
        done.extend(mine)
        return [-item for item in mine]

    with ThreadPoolExecutor(many) as pool:
        made = [pool.submit(Peer(rank, many).map_sharded, range(items), work) for rank in range(many)]
    assert [future.result() for future in made] == [[-item for item in range(items)]] * many
    assert sorted(done) == list(range(items))


@pytest.mark.slow
def test_the_command_that_users_type(made, tmp_path):
    """Under torchrun, which starts interpreters of its own."""
    file, out = write(tmp_path / "in.jsonl", [{"text": text} for text in texts(3)]), tmp_path / "out.jsonl"
    command = ["-m", "peftkit", "predict", str(made["classifier"]), "--file", str(file), "--out", str(out)]
    said = launching.finish(*launching.TORCHRUN, "--nproc_per_node", "2", "--standalone", *command)
    assert said.count("wrote 3 rows") == 1
    expected = [prediction.label for prediction in predictions_of(made["classifier"], texts(3))]
    assert [row["label"] for row in lines(out.read_text(encoding="utf-8"))] == expected


@pytest.mark.parametrize(
    ("local_rank", "gpus", "use_cpu", "device"),
    [(1, 2, "", "cuda:1"), (1, 1, "", "cuda:0"), (3, 2, "", "cuda:1"), (1, 2, "true", "cpu"), (1, 0, "", "cpu")],
)
def test_each_process_takes_the_gpu_of_its_local_rank(monkeypatch, local_rank, gpus, use_cpu, device):
    """What is chosen, with no GPU at hand: processes share them where there are too few."""
    place = {"WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**place, "MASTER_ADDR": "x", "MASTER_PORT": "1", "ACCELERATE_USE_CPU": use_cpu}.items():
        monkeypatch.setenv(name, value)
    chosen, backends = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: backends.append(backend))
    monkeypatch.setattr(dist, "get_rank", lambda: 2)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    assert process_group._join_group() == ProcessGroup(2, 4, device)
    assert chosen == [device] * (device != "cpu")
    assert "cpu:gloo" in backends[0] if chosen else backends == ["gloo"]

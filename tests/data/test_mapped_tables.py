"""Tables on disk: what is read through their maps, before and after their pages were let go of."""

from __future__ import annotations

import gc
import pickle
from pathlib import Path

import pyarrow as pa
import pytest

from peftkit.data.tables import BATCH, iterate, open_table, write_rows
from peftkit.system import memory
from peftkit.system.memory import release_mapped_pages

ROWS = 3 * BATCH + 7


def made(folder, rows=ROWS):
    return write_rows(({"text": f"row {n} " * 20, "n": n} for n in range(rows)), folder, "held")


def resident(path):
    """Bytes of a file's maps that lie in this process's memory."""
    total, inside = 0, False
    with open("/proc/self/smaps") as file:
        for line in file:
            head = line.split()
            if "-" in head[0] and len(head) >= 5:
                inside = head[-1] == str(path)
            elif inside and head[0] == "Rss:":
                total += 1024 * int(head[1])
    return total


def test_rows_are_the_same_after_pages_were_let_go_of(tmp_path):
    held = made(tmp_path)
    before = held[:]
    release_mapped_pages()
    assert held[:] == before
    assert [row["n"] for row in iterate(held)] == list(range(ROWS))
    chosen = held.select([ROWS - 1, 5, 6])
    release_mapped_pages()
    assert chosen["n"][:] == [ROWS - 1, 5, 6]


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells which pages are resident")
def test_a_pass_over_a_table_leaves_few_of_its_pages_behind(tmp_path):
    held = made(tmp_path)
    path = tmp_path / "held.arrow"
    assert held.select([ROWS // 2])["text"][0].startswith("row")
    held[:]
    touched = resident(path)
    for _ in iterate(held):
        pass
    assert touched > path.stat().st_size / 2
    assert resident(path) < touched / 10


def test_a_table_says_what_pyarrow_reads_in_its_file_and_survives_pickling(tmp_path):
    held = made(tmp_path)
    with pa.OSFile(str(tmp_path / "held.arrow")) as file:
        assert pa.ipc.open_stream(file).read_all().to_pydict() == held[:]
    assert pickle.loads(pickle.dumps(held))[3] == held[3]


def test_closed_tables_are_forgotten(tmp_path):
    gc.collect()
    before = len(memory.mapped_files)
    held = open_table(made(tmp_path) and tmp_path / "held.arrow")
    assert len(memory.mapped_files) > before
    del held
    gc.collect()
    assert len(memory.mapped_files) <= before

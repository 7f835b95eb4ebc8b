"""The table of methods agrees with the tests of every method."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from peftkit.methods import table
from tests.methods.test_every_method import CELLS, WORKING

ROOT = Path(__file__).parents[2]
ELSEWHERE = {"bitfit", "full", "top_k"}
"""Methods that train the base's own weights, each with tests of its own."""


@pytest.mark.parametrize("row", table.rows(), ids=lambda row: row.kind)
def test_every_mark_is_a_cell_that_works(row):
    if row.kind in ELSEWHERE:
        assert list(ROOT.glob(f"tests/methods/test_*{row.kind}*.py"))
        return
    mine = [cell for cell in WORKING if cell.example.partition("-")[0] == row.kind]
    models = {"encoder"} if row.classifier else set()
    models |= {"decoder-classifier"} if row.decoder_classifier else set()
    assert {cell.model for cell in mine} == models | ({"decoder"} if row.language_model else set())
    assert {cell.quantization for cell in mine} >= {None, *(set(row.quantizations) & {"nf4", "int8"})}


def test_no_cell_is_refused_that_the_table_marks():
    marks = {row.kind: {None, *row.quantizations} for row in table.rows()}
    outside = set(CELLS) - set(WORKING)
    refused = {cell.example for cell in outside if cell.quantization in marks[cell.example.partition("-")[0]]}
    narrowed = {"lora-pissa", "lora-olora", "lora-orthogonal", "lora-loftq", "lora-dora", "miss", "peft-LOHA"}
    assert refused <= narrowed


def test_the_list_is_printed_without_torch_or_peft():
    code = (
        "import sys; from peftkit.cli.app import app\n"
        "try: app(['list', '--methods', '--json'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'peft', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    listed, _, slow = done.stdout.strip().rpartition("\n")
    assert slow == "[]"
    assert {row["kind"] for row in json.loads(listed)} == {row.kind for row in table.rows()}

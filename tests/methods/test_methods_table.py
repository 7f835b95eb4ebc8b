"""The table of methods says what the tests of every method hold it to, and the committed page is the generated one."""

from __future__ import annotations

import importlib.util
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


def test_the_committed_page_is_the_generated_one():
    spec = importlib.util.spec_from_file_location("generate_methods", ROOT / "docs" / "generate_methods.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.TARGET.read_text(encoding="utf-8") == module.page(), "run python docs/generate_methods.py"


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

"""The table of docs/use.md says which command works for a task: each cell is tried on a run of that task."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import peftkit
from peftkit.cli.app import app
from peftkit.errors import RunError
from peftkit.export.folder import open_export
from peftkit.schema.registries import EXPORTERS, TASKS
from peftkit.schema.types import TaskInfo
from peftkit.serving.service import Service
from tests import tiny
from tests.exporting import exported

PAGE = Path(__file__).parents[2] / "docs" / "use.md"
COLUMNS = ("predict", "generate", "chat", "embed", "search", "serve", "onnx", "gguf")
DECODERS = {"style", "instruction", "preference"}
LABELS = {"classification": ("cat", "dog"), "token_classification": ("O", "B-cat", "I-cat"),
          "reranking": ("not relevant", "relevant")}  # fmt: skip
PAIR = {"question_answering", "reranking", "similarity"}
TEXT = {"masked_lm": "the [MASK] was"}


def table() -> dict[str, dict[str, bool]]:
    """Task → command → whether it has a tick."""
    lines = re.findall(r"(?m)^\| `.*$", PAGE.read_text(encoding="utf-8").partition("\n## ")[0])
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    columns = [re.findall(r"`(?:--format )?([\w-]+)`", cell) for cell in cells[0][1:]]
    return {
        row[0].strip("`"): {name: cell == "✓" for names, cell in zip(columns, row[1:], strict=True) for name in names}
        for row in cells[1:]
    }


@pytest.fixture(scope="module")
def runs(bert, llama, tmp_path_factory):
    """An export of every task that nobody trained."""
    folder = tmp_path_factory.mktemp("exports")
    t5 = tiny.tiny_t5(folder / "t5")
    found = {}
    for kind in TASKS.names():
        base = t5 if kind == "seq2seq" else llama if kind in DECODERS else bert
        info = TaskInfo(TASKS.get(kind).heads[0], LABELS.get(kind, ()))
        data = {"max_length": 32} | ({"text_pair": "other"} if kind in PAIR else {})
        recipe = {"task": {"kind": kind}, "data": data, "method": {"rank": 2}, "export": {"prove": False}}
        if kind == "question_answering":
            recipe["data"]["label"] = "answers"
        found[kind] = exported(folder / kind, base, info, **recipe)[0]
    return found


def works(command: str, run: Path, kind: str, folder: Path) -> bool:
    """Whether the command gives a result for a run of that task; a refusal is one message and exit code 2."""
    if command in EXPORTERS:
        return not EXPORTERS.get(command)().unsupported_reason(open_export(run))
    if command == "serve":
        try:
            Service(peftkit.load(run), "run")
        except RunError:
            return False
        return True
    text = TEXT.get(kind, "the king was good")
    file = folder / "texts.csv"
    file.write_text(f"text,other\n{text},the world\n", encoding="utf-8")
    words = {
        "predict": ["--file", str(file)], "embed": ["--file", str(file), "--out", str(folder / "vectors.npy")],
        "generate": ["--max-new-tokens", "2"], "chat": ["--max-new-tokens", "2"],
        "search": ["--corpus", str(file), "--column", "text", "--query", "king"],
    }[command]  # fmt: skip
    result = CliRunner().invoke(app, [command, str(run), *words], input=f"{text}\n")
    assert result.exit_code in (0, 2), result.output
    refusal = re.findall(r"^peftkit: .*", result.output, re.MULTILINE)
    assert len(refusal) == (result.exit_code == 2), result.output
    return result.exit_code == 0


def test_the_table_has_every_task():
    assert set(table()) == set(TASKS.names())
    assert all(tuple(row) == COLUMNS for row in table().values())


@pytest.mark.parametrize("kind", TASKS.names())
def test_the_table_says_what_commands_do(kind, runs, tmp_path):
    tried = {command: works(command, runs[kind], kind, tmp_path) for command in COLUMNS}
    assert tried == table()[kind]

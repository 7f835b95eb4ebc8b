"""A dry run of the GPU suite on the CPU: a case is prepared, carried out and shown."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.conftest import topic_rows

RUN = Path(__file__).parents[2] / "benchmarks" / "gpu" / "run.py"


@pytest.fixture(scope="module")
def carried(tmp_path_factory):
    """What prepare.py writes, but for the packages."""
    folder = tmp_path_factory.mktemp("carried")
    tiny.tiny_tokenizer(folder / "tokenizer", "chatml")
    rows = topic_rows(80)
    lines = [json.dumps({"instruction": text, "input": "", "output": label}) for text, label in rows]
    (folder / "alpaca.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    table = ["text,label", *(f"{text},{label}" for text, label in rows)]
    (folder / "ag_news.csv").write_text("\n".join(table) + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("case", "contestant"),
    [
        pytest.param("smollm2-135m", "peftkit", marks=pytest.mark.slow),  # CI runs this one
        pytest.param("roberta-large", "peftkit", marks=pytest.mark.slow),
        pytest.param("roberta-large", "trainer", marks=pytest.mark.slow),
        pytest.param("modernbert-base", "peftkit", marks=pytest.mark.slow),
        pytest.param("llama-3.1-8b, bf16", "peftkit", marks=pytest.mark.slow),
        pytest.param("llama-3.1-8b, nf4", "peftkit offload", marks=pytest.mark.slow),
    ],
)
def test_a_case_is_carried_out_and_shown(case, contestant, carried, tmp_path):
    done = subprocess.run(
        [
            sys.executable, str(RUN), "--tiny", "--out", str(tmp_path / "out"), "--models", str(tmp_path / "models"),
            "--only", case, "--contestants", contestant, "--part", "speed", "--part", "summary", "--data", str(carried),
        ],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    cases = json.loads((tmp_path / "out" / "speed.json").read_text(encoding="utf-8"))["cases"]
    measured = [figures for of_case in cases.values() for figures in of_case.values()]
    assert measured
    for figures in measured:
        assert figures.get("tokens_per_second", 0) > 0, figures
        assert len(figures["epoch_seconds"]) == 1
    assert f"| {contestant}" in done.stdout

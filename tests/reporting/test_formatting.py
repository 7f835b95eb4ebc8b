"""Terminal tables: the figures stand in them, and users' texts cannot format or steer the terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from peftkit.reporting import formatting, tables

HOSTILE = "[red]oil[/red] \x1b[31mred\x1b]0;title\x07 ‮evil\n\tnext"
ASSESSMENT = {
    "split": "test", "rows": 1600, "problem_type": "single_label_classification", "confidence": 0.9,
    "labels": ["World", "[bold]x"],
    "metrics": {
        "accuracy": {"value": 0.91249, "low": 0.9, "high": 0.92, "interval": "wilson", "greater_is_better": True},
        "custom": {"value": None, "low": None, "high": None, "interval": None, "greater_is_better": True},
    },
    "per_class": [{"label": "[bold]x", "precision": 0.5, "recall": 1.0, "f1": 2 / 3, "rows": 1234, "predicted": 7}],
    "confusion": [[5, 1], [2, 9999]],
    "mistakes": [{"text": HOSTILE, "gold": "World", "predicted": "[bold]x", "confidence": 0.993, "file": "d/f.csv",
                  "line": 7}],
}  # fmt: skip
BASELINES = [
    {"name": "majority", "metrics": {"accuracy": 0.25}, "note": "always 'World'", "rows": 1600, "comparison": None,
     "verdict": "finetuning helped: +66.2 points against majority (p < 0.001)"},
    {"name": "zero_shot", "metrics": {}, "note": "skipped: name them", "rows": None, "comparison": None, "verdict": ""},
]  # fmt: skip


def printed(table, width=160):
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(table)
    return console.file.getvalue()


def test_metrics_show_figures_and_intervals_by_split():
    said = printed(tables.metrics({"validation": {**ASSESSMENT, "metrics": {}, "rows": 10}, "test": ASSESSMENT}))
    assert "90% confidence intervals" in said
    assert "test (1,600 rows)" in said
    assert "0.9125 [0.9000, 0.9200]" in said


def test_baselines_stand_beside_the_result_with_the_verdict():
    said = printed(tables.baselines(ASSESSMENT, BASELINES))
    assert "0.9125" in said
    assert "0.2500" in said
    assert "+66.2 points" in said
    assert "zero shot: skipped: name them" in said
    assert "custom" not in said


def test_users_texts_are_neither_markup_nor_escape_sequences():
    step = {"name": "empty", "split": "train", "action": "dropped", "rows": 1, "examples": [HOSTILE, "[bold]x"]}
    baseline = {**BASELINES[0], "note": HOSTILE, "verdict": "[bold]x"}
    for table in (
        tables.cleaning([step]),
        tables.baselines(ASSESSMENT, [baseline]),
        tables.splits([{"split": "a", "b": "[bold]x"}]),
    ):
        said = printed(table)
        assert "[bold]x" in said
        assert "\x1b]0;" not in said
        assert "\x1b[31m" not in said
        assert "\x07" not in said
        assert "‮" not in said


def test_answers_and_places_are_short():
    assert formatting.answer(["World", "Sports"]) == "World, Sports"
    assert (formatting.answer([]), formatting.answer(0.5), formatting.answer("World")) == ("none", "0.5000", "World")
    assert formatting.place({"file": "d/f.csv", "line": 7}) == "f.csv:7"
    assert formatting.place({"file": "c:\\d\\f.csv", "line": None}) == "f.csv"
    assert formatting.place({"file": None}) == ""


def test_the_trainable_share_is_counted():
    parts = [
        {"part": "encoder", "parameters": 9_900, "trainable": False, "dtype": "bfloat16", "bytes": 19_800},
        {"part": "head", "parameters": 100, "trainable": True, "dtype": "float32", "bytes": 400},
    ]
    said = printed(tables.trainable(parts))
    assert "100 of 10,000 parameters (1.00%)" in said
    assert "19.8 kB" in said


def test_cleaning_and_splits():
    step = {"name": "near_duplicates", "split": "train", "action": "dropped", "rows": 1200, "examples": ["f.csv:3 [b]"]}
    said = printed(tables.cleaning([step, {**step, "name": "empty", "rows": 0, "examples": []}]))
    assert "1,200 dropped" in said
    assert "f.csv:3 [b]" in said
    assert "none" in said
    assert "5,400" in printed(tables.splits([{"split": "train", "rows": 5400}]))


@pytest.mark.parametrize(
    ("value", "said"), [(0.91249, "0.9125"), (-3.0, "-3.0000"), (12.3456, "12.35"), (45678.9, "45,679"), (None, "–"),
                        (float("nan"), "–"), (float("inf"), "–")],
)  # fmt: skip
def test_figures_are_short(value, said):
    assert formatting.figure(value) == said


def test_plain_text_is_one_line_and_cut():
    assert formatting.plain("a\n b\tc") == "a b c"
    assert formatting.plain("abcdef", 4) == "abc…"
    assert formatting.size(1_500_000_000) == "1.5 GB"

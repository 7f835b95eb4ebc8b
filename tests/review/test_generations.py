"""The table of generations: what is written is read back, the page carries every text harmlessly, good rows train."""

from __future__ import annotations

import json
import re

import pytest

from peftkit.errors import DataError
from peftkit.review.generations import GenerationRow, html, marked_to_training_rows, read, write
from peftkit.schema.recipe import DataConfig
from peftkit.tasks.preference import Preference

CHAT = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "2 + 2?"}]
ROWS = [
    GenerationRow(CHAT, "4", "It is five.", "Four\u2028.", file="chat.jsonl", line=3),
    GenerationRow("In the beginning", None, None, "</script><script>alert('x')</script> & <b>bold</b>"),
]


def test_written_rows_are_read_back(tmp_path):
    table, page = write(tmp_path, ROWS)
    assert (table.name, page.name) == ("generations.jsonl", "generations.html")
    assert read(table) == ROWS
    assert [json.loads(line)["mark"] for line in table.read_text(encoding="utf-8").split("\n") if line] == [None, None]


def test_page_is_self_contained_and_what_a_model_wrote_is_never_markup():
    page = html(ROWS, title="A <run>")
    assert "A &lt;run&gt;" in page
    assert "alert(" in page
    assert "<script>alert" not in page
    assert page.count("<script") == 2
    assert not re.findall(r"(?:src|href)\s*=|https?://|@import|url\(", re.sub(r"link\.href = ", "", page))
    assert "chat.jsonl:3" in page
    embedded = re.search(r'<script type="application/json" id="rows">(.*?)</script>', page, re.DOTALL)
    assert [row["finetuned"] for row in json.loads(embedded[1])] == [row.finetuned for row in ROWS]


def test_page_without_rows_says_so():
    assert "No rows were generated" in html([])


def test_good_rows_become_training_rows(tmp_path):
    path = tmp_path / "marked.jsonl"
    marked = [json.loads(line) for line in write(tmp_path, [*ROWS, ROWS[0]])[0].read_text("utf-8").split("\n") if line]
    for row, mark in zip(marked, ("good", "good", "bad")):
        row["mark"] = mark
    path.write_text("\n".join(json.dumps(row) for row in marked), encoding="utf-8")
    assert marked_to_training_rows(path) == [
        {"messages": [*CHAT, {"role": "assistant", "content": ROWS[0].finetuned}]},
        {
            "text": "In the beginning" + ROWS[1].finetuned,
            "prompt": "In the beginning",
            "completion": ROWS[1].finetuned,
        },
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "line 2: not valid JSON"),
        ("[1]", r"line 2: expected a JSON object, found \[1\]"),
        ('{"prompt": "a", "finetuned": "b", "marks": "good"}', "line 2, column 'marks'.*did you mean 'mark'"),
        ('{"prompt": "a", "finetuned": "b", "mark": "great"}', "column 'mark'.*found 'great'"),
        ('{"prompt": [], "finetuned": "b"}', "column 'prompt'"),
        ('{"prompt": "a"}', "column 'finetuned'"),
    ],
)
def test_wrong_lines_name_file_line_and_field(tmp_path, line, message):
    path = tmp_path / "marked.jsonl"
    path.write_text('{"prompt": "a", "finetuned": "b"}\n' + line, encoding="utf-8")
    with pytest.raises(DataError, match=r"marked\.jsonl, .*" + message):
        read(path)


def test_nothing_marked_good_and_no_file(tmp_path):
    with pytest.raises(DataError, match="no row is marked good"):
        marked_to_training_rows(write(tmp_path, ROWS)[0])
    with pytest.raises(DataError, match=r"none\.jsonl"):
        read(tmp_path / "none.jsonl")


def test_bad_marks_are_kept_with_a_label_that_kto_reads(tmp_path):
    asked = [{"role": "user", "content": "Hi"}]
    rows = [
        GenerationRow(asked, "ref", "base", "Hello", mark="good"),
        GenerationRow(asked, "ref", "base", "What", mark="bad"),
        GenerationRow(asked, "ref", "base", "Hm"),
    ]
    path, _ = write(tmp_path, rows)
    kept = marked_to_training_rows(path, bad=True)
    assert [row["label"] for row in kept] == [True, False]
    task, data = Preference(loss="kto"), DataConfig(source="unused")
    read_back = [task.canonical(row, data, None) for row in kept]
    assert [(row["answer"][0]["content"], row["desirable"]) for row in read_back] == [("Hello", True), ("What", False)]
    only, _ = write(tmp_path, rows[:1])
    with pytest.raises(DataError, match="no row is marked bad"):
        marked_to_training_rows(only, bad=True)

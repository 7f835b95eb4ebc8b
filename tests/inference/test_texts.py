"""Input files of predict and embed are checked whole, and parsed once where they fit in memory."""

from __future__ import annotations

import pytest

from peftkit.data.readers.delimited import CsvReader
from peftkit.errors import DataError
from peftkit.inference import texts


@pytest.mark.parametrize(("limit", "parses"), [(texts.KEPT_BYTES, 1), (0, 2)])
def test_a_csv_is_parsed_once_unless_it_is_large(tmp_path, monkeypatch, limit, parses):
    calls, rows = [], CsvReader.rows
    monkeypatch.setattr(CsvReader, "rows", lambda *given: calls.append(1) or rows(*given))
    monkeypatch.setattr(texts, "KEPT_BYTES", limit)
    file = tmp_path / "texts.csv"
    file.write_text("id,text\n1,one\n2,two\n")
    read = texts.InputTexts(file, ["text"])
    assert read.check() == ["id", "text"]
    assert list(read) == [{"id": "1", "text": "one"}, {"id": "2", "text": "two"}]
    assert len(calls) == parses


def test_everything_wrong_with_a_file_is_raised_at_once(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "a"}\n{"text": 1}\n[]\n')
    with pytest.raises(DataError, match="2 rows are wrong") as caught:
        texts.InputTexts(file, ["text"]).check()
    assert caught.value.line == 2
    with pytest.raises(DataError, match="no such column"):
        texts.InputTexts(file, ["words"]).check()
    with pytest.raises(DataError, match="pairs of texts"):
        texts.InputTexts(None, ["text", "other"]).check()


def test_a_text_file_is_a_row_per_line(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_bytes("\ufeffone\r\n\ncafé\n".encode())
    read = texts.InputTexts(file, ["words"])
    assert read.check() == ["words"]
    assert list(read) == [{"words": "one"}, {"words": ""}, {"words": "café"}]
    file.write_bytes("naïve\n".encode() + b"caf\xe9\n")
    with pytest.raises(DataError, match="line 2: byte 0xe9 is not UTF-8"):
        texts.InputTexts(file, ["words"]).check()

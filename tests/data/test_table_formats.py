"""Tables of other programs are read as pandas reads them when told how, and what was detected is reported."""

from __future__ import annotations

import gzip
import json
import warnings
import zipfile

import pandas
import pytest

from peftkit.data.pipeline import prepare
from peftkit.data.problems import Problems
from peftkit.data.reader import reader_for
from peftkit.errors import DataError, RecipeError
from peftkit.schema.recipe import DataConfig, Recipe

WORDS = ["café – “Zürich”", "it's 5 €", 'say "hi", now', "semi; colon", "tab\there", "two\nlines", "| bar", "plain"]
FRAME = pandas.DataFrame({"text": [f"{word} {row}" for row, word in enumerate(WORDS * 3)], "label": ["a", "b"] * 12})
PLAIN = pandas.DataFrame({"text": [f"words, and more {row}" for row in range(12)], "label": ["a", "b"] * 6})


def read(path, **fields):
    """Rows as a frame, and the notes."""
    problems = Problems()
    rows = list(reader_for(path).of(DataConfig(source=str(path), **fields)).rows(path, problems))
    problems.check()
    frame = pandas.DataFrame(rows)
    assert (frame["_file"] == str(path)).all()
    return frame.drop(columns=["_file", "_line"]), [note.removeprefix(f"{path}: ") for note in problems.take_notes()]


def refusal(path, **fields) -> str:
    with pytest.raises(DataError) as caught:
        read(path, **fields)
    message = str(caught.value)
    assert len(message.splitlines()) <= 20
    assert len(message) < 4000
    return message


@pytest.mark.parametrize(
    ("written", "note"),
    [
        ({"sep": ";"}, "read as ;-separated"),
        ({"sep": "\t"}, "read as tab-separated"),
        ({"sep": "|"}, "read as |-separated"),
        ({"sep": ";", "encoding": "cp1252"}, "read as ;-separated, cp1252"),
        ({"encoding": "cp1252", "lineterminator": "\r\n"}, "read as cp1252"),
        ({"encoding": "utf-16"}, "read as utf-16"),
        ({"encoding": "utf-32", "sep": ";"}, "read as ;-separated, utf-32"),
        ({"encoding": "utf-8-sig", "lineterminator": "\r\n"}, None),
        ({"quoting": 1}, None),
        ({"quotechar": "'"}, "read as quoted with '"),
        ({"quotechar": "'", "quoting": 1, "sep": ";"}, "read as ;-separated, quoted with '"),
        ({"doublequote": False, "escapechar": "\\"}, 'read as \\" for a quote'),
        ({"index": True}, "the first column has no name, as an index written by pandas; it is left out"),
    ],
)
def test_csv_files_of_other_programs_equal_what_pandas_reads_when_told(tmp_path, written, note):
    path = tmp_path / "rows.csv"
    FRAME.to_csv(path, **{"index": False, **written})
    told = {name: value for name, value in written.items() if name not in ("index", "lineterminator", "quoting")}
    index = {"index_col": 0} if written.get("index") else {}
    expected = pandas.read_csv(path, dtype=str, keep_default_na=False, **told, **index).reset_index(drop=True)
    assert expected.equals(FRAME.astype(str)), "the file is not what the test means"
    frame, notes = read(path)
    assert frame.equals(expected)
    assert notes == ([note] if note else [])


def test_lines_that_end_in_a_carriage_return(tmp_path):
    path = tmp_path / "rows.csv"
    PLAIN.to_csv(path, index=False, lineterminator="\r", encoding="cp1252")
    frame, notes = read(path)
    assert frame.equals(pandas.read_csv(path, dtype=str, lineterminator="\r"))
    assert notes == ["read as lines that end in a carriage return"]
    (tmp_path / "rows.jsonl").write_text(PLAIN.to_json(orient="records", lines=True).replace("\n", "\r"))
    assert read(tmp_path / "rows.jsonl")[0].equals(PLAIN)
    (tmp_path / "bad.csv").write_bytes(b"text,label\na,b\nc\rd,e\n")
    assert "a carriage return stands inside a field" in refusal(tmp_path / "bad.csv")


def test_excel_s_line_that_names_the_separator(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("sep=;\n" + PLAIN.to_csv(index=False, sep=";"))
    frame, notes = read(path)
    assert frame.equals(pandas.read_csv(path, sep=";", skiprows=1))
    assert notes == ["read as ;-separated"]
    problems = Problems()
    assert next(reader_for(path)().rows(path, problems))["_line"] == 3


def test_spaces_after_separators_and_separators_at_the_ends_of_rows(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text, label\n" + "".join(f'"one, two {row}", {row % 2}\n' for row in range(8)))
    frame, notes = read(path)
    assert frame.equals(pandas.read_csv(path, skipinitialspace=True, dtype=str))
    assert notes == ["read as rows with a space after each separator"]
    path.write_text("text,label\n" + "".join(f"words {row},{row % 2},\n" for row in range(8)))
    frame, notes = read(path)
    assert frame.equals(pandas.read_csv(path, index_col=False, dtype=str, usecols=[0, 1]))
    assert notes == ["read as rows with a separator at the end"]
    path.write_text("text,label,,\n" + "".join(f"words {row},{row % 2},,\n" for row in range(8)))
    frame, notes = read(path)
    assert frame.equals(pandas.read_csv(path, dtype=str, usecols=[0, 1]))
    assert notes == ["blank columns without a name are left out"]
    path.write_text("text,label\n" + "".join(f"words {row},{row % 2}\n" for row in range(8)) + "one, two,\n")
    assert "line 10" in refusal(path)
    assert "found 3; quote fields that contain the separator (comma)" in refusal(path)


def test_decimal_commas_between_semicolons_are_one_field(tmp_path):
    path = tmp_path / "rows.csv"
    frame = pandas.DataFrame({"text": [f"words {row}" for row in range(9)], "score": [row + 0.5 for row in range(9)]})
    frame.to_csv(path, sep=";", decimal=",", index=False)
    assert list(read(path)[0]["score"]) == [f"{row},5" for row in range(9)]
    assert pandas.read_csv(path, sep=";", decimal=",")["score"].tolist() == frame["score"].tolist()


def test_delimiter_settles_what_cannot_be_detected(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,a;label,b\n" + "".join(f"words,{row};{row},x\n" for row in range(8)))
    assert "comma and ; separate every row equally well; set data.delimiter" in refusal(path)
    for delimiter in ",;":
        frame, _ = read(path, delimiter=delimiter)
        assert frame.equals(pandas.read_csv(path, sep=delimiter, dtype=str))
    path.write_text("text:label\n" + "".join(f"words {row}:{row}\n" for row in range(8)))
    assert list(read(path)[0].columns) == ["text:label"]
    assert read(path, delimiter=":")[0].equals(pandas.read_csv(path, sep=":", dtype=str))
    assert (
        DataConfig(source="x", delimiter="tab").delimiter == DataConfig(source="x", delimiter="\\t").delimiter == "\t"
    )
    path.write_text("a;b\n1;2\n")
    recipe = Recipe.parse({"name": "r", "model": {"source": "./m"}, "data": {"source": str(path), "delimiter": ","}})
    with pytest.raises(DataError, match=r"no such column: known names: a;b; set data\.text, or data\.delimiter"):
        prepare(recipe)


def test_quote_settles_quotes_that_are_plain_characters(tmp_path):
    path = tmp_path / "rows.tsv"
    lines = ['"Great" movie\tpos', 'he said "no\tneg', "\"never' closed\tpos", "plain\tneg"] * 2
    path.write_text("\n".join(["text\tlabel", *lines]))
    assert "set data.quote" in refusal(path)
    expected = pandas.read_csv(path, sep="\t", quoting=3)
    assert read(path, quote="none")[0].equals(expected)
    path.write_text("text\tlabel\n" + '"open here\tpos\nplain one\tneg\nplain two\tpos\nclose"\tneg\n' + "x\ty\n" * 9)
    assert "a quoted field holds 4 lines that look like rows" in refusal(path)
    assert len(read(path, quote="none")[0]) == 13
    assert len(read(path, quote='"')[0]) == 10


def test_a_backslash_that_could_mean_two_things_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('text,label\n"say \\"hi\\" now",a\n"in C:\\temp \\"x\\"",b\n')
    assert "a closing quote is followed by text" in refusal(path)
    rows = '"say \\"hi\\" now",a\n' * 30_000
    path.write_text("text,label\n" + rows + '"C:\\\\",a\n')
    assert "line 30002: a backslash stands before something other than a quote" in refusal(path)
    path.write_text('text,label\n"in C:\\temp",a\n"say ""hi""",b\n')
    assert list(read(path)[0]["text"]) == ["in C:\\temp", 'say "hi"']


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1251", "привет, мир"), ("cp1250", "zażółć gęślą jaźń"), ("cp1250", "žluťoučký kůň"),
        ("cp1254", "ışık şeker"), ("gbk", "你好世界"), ("shift_jis", "こんにちは世界"), ("euc_kr", "안녕하세요"),
        ("mac_roman", "café déjà"), ("cp850", "café schön"), ("iso8859_7", "καλημέρα"), ("cp1255", "שלום"),
        ("big5", "你好世界"), ("koi8_r", "привет"),
    ],
)  # fmt: skip
def test_encodings_that_cannot_be_told_are_refused_until_named(tmp_path, encoding, text):
    frame = pandas.DataFrame({"text": [f"row {row} {text}" for row in range(6)], "label": ["a", "b"] * 3})
    for name, write in (("csv", frame.to_csv), ("jsonl", frame.to_json), ("txt", None)):
        path = tmp_path / f"rows.{name}"
        if name == "csv":
            write(path, index=False, encoding=encoding)
        elif name == "jsonl":
            path.write_bytes(write(orient="records", lines=True, force_ascii=False).encode(encoding))
        else:
            path.write_bytes(text.encode(encoding))
        assert "is not UTF-8" in refusal(path)
        assert "set data.encoding" in refusal(path)
        read_back, notes = read(path, encoding=encoding)
        assert list(read_back["text"]) == ([text] if name == "txt" else list(frame["text"]))
        assert notes
    with pytest.raises(RecipeError, match="unknown text encoding 'utf-9'"):
        Recipe.parse({"name": "r", "model": {"source": "./m"}, "data": {"source": "x", "encoding": "utf-9"}})


def test_no_file_stays_open_where_lines_are_decoded_in_utf_16(tmp_path):
    text = "text,label\n" + "".join(f"text number {number},a\n" for number in range(20_000))
    (tmp_path / "rows.csv").write_text(text, encoding="utf-16")
    with gzip.open(tmp_path / "rows.csv.gz", "wt", encoding="utf-16") as file:
        file.write(text)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        plain, unpacked = (read(tmp_path / name)[0] for name in ("rows.csv", "rows.csv.gz"))
    expected = pandas.read_csv(tmp_path / "rows.csv", encoding="utf-16")
    pandas.testing.assert_frame_equal(plain, expected)
    pandas.testing.assert_frame_equal(unpacked, expected)
    assert not [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    "text", ["Müller weiß, dass’s 5 € kostet", "déjà vu… « ça »", "¿Qué año? 20 °C", "coração – não"]
)
def test_western_european_texts_are_read_as_cp1252(tmp_path, text):
    path = tmp_path / "rows.txt"
    path.write_bytes(f"{text}\n".encode("cp1252"))
    frame, notes = read(path)
    assert frame["text"][0] == f"{text}\n"
    assert notes == ["read as cp1252"]


def test_utf_8_with_foreign_bytes_and_utf_16_without_a_mark_are_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes("text,label\né,a\n".encode() + b"caf\xe9,b\n")
    assert "line 3: byte 0xe9 is not UTF-8" in refusal(path)
    assert read(path.with_name("rows.csv"), encoding="cp1252")[0]["text"][1] == "café"
    path.write_bytes("text,label\nplain,a\n".encode("utf-16-le"))
    assert "set data.encoding=utf-16-le" in refusal(path)
    assert read(path, encoding="utf-16-le")[0]["text"][0] == "plain"
    path.write_text("text,label\né,a\n", encoding="utf-8")  # the recipe's encoding is for files that are not UTF-8
    assert read(path, encoding="cp1252")[0]["text"][0] == "é"


@pytest.mark.parametrize("orient", ["records", "split", "index", "columns", "table"])
def test_json_of_pandas_in_every_orientation(tmp_path, orient):
    path = tmp_path / "rows.json"
    FRAME.to_json(path, orient=orient, indent=1)
    frame, _ = read(path)
    assert frame[["text", "label"]].equals(FRAME)
    assert pandas.read_json(path, orient=orient, dtype=False).reset_index(drop=True).equals(FRAME)


def test_json_objects_that_hold_rows(tmp_path):
    path, rows = tmp_path / "rows.json", FRAME.to_dict("records")
    written = {
        "rows": {"rows": rows, "version": 2, "tags": ["x"]},
        "columns": FRAME.to_dict("list"),
        "keyed": {f"id{row}": value for row, value in enumerate(rows)},
    }
    notes = {"rows": "the rows are those under 'rows'; left out: version, tags", "columns": "read as columns",
             "keyed": "read as an object of rows, whose keys are left out"}  # fmt: skip
    for name, value in written.items():
        path.write_text(json.dumps(value))
        frame, said = read(path)
        assert frame.equals(FRAME), name
        assert said == [notes[name]]
    path.write_text("\n".join(json.dumps(row, indent=1) for row in rows))
    assert read(path)[0].equals(FRAME)
    path.write_text(",\n".join(map(json.dumps, rows)))
    assert read(path)[0].equals(FRAME)


def test_subset_names_the_list_of_a_json_file_and_the_sheet_of_a_workbook(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"train": FRAME.to_dict("records"), "test": PLAIN.to_dict("records")}))
    assert "there are rows under train, test; choose one with data.subset" in refusal(path)
    assert read(path, subset="test")[0].equals(PLAIN)
    assert "did you mean 'test'?" in refusal(path, subset="tset")
    pytest.importorskip("openpyxl")
    book = tmp_path / "book.xlsx"
    with pandas.ExcelWriter(book) as writer:
        FRAME.to_excel(writer, sheet_name="train", index=False)
        PLAIN.to_excel(writer, sheet_name="test", index=False)
    assert "several sheets have rows (train, test); choose one with data.subset" in refusal(book)
    assert read(book, subset="test")[0].equals(PLAIN)
    assert "did you mean 'test'?" in refusal(book, subset="tset")


def test_json_lines_with_commas_in_a_list_or_over_several_lines(tmp_path):
    path, rows = tmp_path / "rows.jsonl", FRAME.to_dict("records")
    path.write_text("".join(json.dumps(row) + ",\n" for row in rows))
    frame, notes = read(path)
    assert frame.equals(FRAME)
    assert notes == ["read as objects with a comma after each"]
    for text in (json.dumps(rows), "\n".join(json.dumps(row, indent=1) for row in rows)):
        path.write_text(text)
        frame, notes = read(path)
        assert frame.equals(FRAME)
        assert notes == ["read as a JSON file, not as JSON Lines"]
    (tmp_path / "rows.json").write_text(json.dumps(rows)[:-1] + ",]")
    assert read(tmp_path / "rows.json")[0].equals(FRAME)
    (tmp_path / "rows.json").write_text(json.dumps(rows) + "\n" + json.dumps(rows))
    assert "expected the file to end after its list" in refusal(tmp_path / "rows.json")
    path.write_text("\n".join(map(repr, rows)))
    assert "these are Python's quotes: write rows with json.dumps" in refusal(path)


def test_compressed_files(tmp_path):
    for compression in ("gzip", "bz2", "xz"):
        path = tmp_path / f"rows.csv.{ {'gzip': 'gz'}.get(compression, compression) }"
        FRAME.to_csv(path, index=False, compression=compression)
        assert read(path)[0].equals(FRAME)
    FRAME.to_json(tmp_path / "rows.jsonl.gz", orient="records", lines=True)
    assert read(tmp_path / "rows.jsonl.gz")[0].equals(FRAME)
    FRAME.to_csv(tmp_path / "rows.zip", index=False)  # the file inside is named "rows"
    assert read(tmp_path / "rows.zip")[0].equals(FRAME)
    FRAME.to_json(tmp_path / "list.zip", orient="records")
    assert read(tmp_path / "list.zip")[0].equals(FRAME)
    FRAME.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.parquet.gz").write_bytes(gzip.compress((tmp_path / "rows.parquet").read_bytes()))
    assert "unpack it first" in refusal(tmp_path / "rows.parquet.gz")
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("train.csv", "text,label\na,b\n")
        archive.writestr("__MACOSX/._train.csv", "x")
    assert len(read(tmp_path / "two.zip")[0]) == 1
    with zipfile.ZipFile(tmp_path / "two.zip", "a") as archive:
        archive.writestr("test.csv", "text,label\na,b\n")
    assert "found 2 files (train.csv, test.csv)" in refusal(tmp_path / "two.zip")
    content = (tmp_path / "rows.csv.gz").read_bytes()
    for bad in (b"text,label\n", content[: len(content) // 2]):
        (tmp_path / "bad.csv.gz").write_bytes(bad)
        assert "cannot be unpacked" in refusal(tmp_path / "bad.csv.gz")
    (tmp_path / "bad.zip").write_bytes(b"PK\x03\x04 not really")
    assert "cannot be unpacked" in refusal(tmp_path / "bad.zip")


def test_excel_files_equal_pandas(tmp_path):
    pytest.importorskip("openpyxl")
    path = tmp_path / "rows.xlsx"
    frame = FRAME.assign(score=[row / 2 for row in range(24)], count=range(24), good=[True, False] * 12)
    frame.to_excel(path, index=False)
    read_back, notes = read(path)
    assert read_back.equals(pandas.read_excel(path))
    assert notes == []
    FRAME.to_excel(path)
    read_back, notes = read(path)
    assert read_back.equals(pandas.read_excel(path, index_col=0))
    assert notes == ["the first column has no name, as an index written by pandas; it is left out"]


def test_excel_cells_of_mixed_types_blank_rows_and_errors(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    path, book = tmp_path / "rows.xlsx", openpyxl.Workbook()
    sheet = book.active
    when = pandas.Timestamp("2024-02-03")
    for row in (["text", "label", "day"], ["one", "1.10", when], [2020, 7, when], [], [None, "x", when]):
        sheet.append(row)
    book.save(path)
    frame, notes = read(path)
    assert frame["text"].tolist()[:2] == ["one", "2020"]
    assert frame["text"].isna().tolist() == [False, False, True]
    assert frame["label"].tolist() == ["1.10", "7", "x"]
    assert frame["day"].tolist() == ["2024-02-03"] * 3
    assert notes == [
        "read from the sheet 'Sheet'",
        "1 number or date in the column 'text' is read as text",
        "1 number or date in the column 'label' is read as text",
    ]
    sheet.append(["#N/A", "x"])
    book.save(path)
    assert "line 6: a cell holds Excel's error #N/A" in refusal(path)
    path.write_bytes(b"PK\x03\x04 not really")
    assert "not an Excel file that can be read" in refusal(path)
    path.with_suffix(".xls").write_bytes(b"x")
    assert "save the sheet as .xlsx or .csv" in refusal(path.with_suffix(".xls"))


def test_without_openpyxl_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openpyxl", None)
    (tmp_path / "rows.xlsx").write_bytes(b"x")
    assert "pip install openpyxl" in refusal(tmp_path / "rows.xlsx")


def test_what_was_detected_is_among_the_steps(tmp_path):
    path = tmp_path / "rows.csv"
    FRAME.to_csv(path, sep=";", encoding="cp1252")
    recipe = Recipe.parse({"name": "r", "model": {"source": "./m"}, "data": {"source": str(path)}})
    step = prepare(recipe).steps[0]
    assert (step.name, step.split, step.rows) == ("reading", "train", 24)
    assert step.examples[0] == f"{path}: read as ;-separated, cp1252"
    assert "it is left out" in step.examples[1]
    FRAME.to_csv(path, index=False)
    assert all(step.name != "reading" for step in prepare(recipe).steps)


def test_messages_stay_short_whatever_a_file_holds(tmp_path):
    def message(**fields):
        data = {"source": str(path), **fields}
        with pytest.raises(DataError) as caught:
            prepare(Recipe.parse({"name": "r", "model": {"source": "./m"}, "data": data}))
        assert len(str(caught.value).splitlines()) <= 20
        assert len(str(caught.value)) < 4000
        return str(caught.value)

    path = tmp_path / "wide.csv"
    path.write_text(",".join(f"{'long name ' * 30}{column}" for column in range(1000)) + "\n" + ",".join("x" * 1000))
    assert "(1000 columns)" in message()
    path.write_text('"' + "\n".join(f"line {row}" for row in range(5000)) + '",label\na,b\nc,d\n')
    message()
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({f"key {row}": row for row in range(10_000)}))
    assert "(10000 keys)" in message()
    path = tmp_path / "long.jsonl"
    path.write_text("x" * 300_000 + "\n" + json.dumps(["y" * 300_000]) + "\n")
    message()


def test_the_blank_cell_of_a_pair_is_named_by_its_own_column(tmp_path):
    path = tmp_path / "pairs.csv"
    rows = [f"premise {row},hypothesis {row},{'ab'[row % 2]}" for row in range(12)]
    rows[4:6] = [" ,hypothesis,a", "premise, ,b"]
    path.write_text("\n".join(["premise,hypothesis,gold", *rows]))
    data = {"source": str(path), "text": "premise", "text_pair": "hypothesis", "label": "gold"}
    with pytest.raises(DataError) as caught:
        prepare(Recipe.parse({"name": "r", "model": {"source": "./m"}, "data": data}))
    first, second = str(caught.value).splitlines()[1:]
    assert "line 6, column 'premise'" in first
    assert "line 7, column 'hypothesis'" in second

"""Odd inputs of every kind, and what peftkit does with each: read, read and reported, or refused with a remedy.

python -m tests.data.odd_inputs > docs/odd_inputs.md
"""

from __future__ import annotations

import gzip
import json
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pandas as pd

from peftkit.data.pipeline import prepare
from peftkit.errors import DataError
from peftkit.schema.recipe import Recipe

COUNT, TOPICS = 30, ("sport", "tech", "biz")
TEXTS = [f"this is row {number} of the table" for number in range(COUNT)]
LABELS = [TOPICS[number % 3] for number in range(COUNT)]
TABLE = list(zip(TEXTS, LABELS))
QUESTIONS = [f"what follows {number}?" for number in range(COUNT)]
ANSWERS = [f"the number {number + 1} does" for number in range(COUNT)]
TURNS = [[("user", question), ("assistant", answer)] for question, answer in zip(QUESTIONS, ANSWERS)]
Write = Callable[[Path], None]


@dataclass(frozen=True)
class Odd:
    """One kind of input: how a file of it is written, and what its rows mean, or the words of a refusal."""

    section: str
    kind: str
    file: str
    write: bytes | Write
    means: Any = None
    """Pairs of text and label(s), lists of turns (role, content), or a text."""
    refused: str = ""
    task: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)

    def recipe(self, folder: Path) -> Recipe:
        data = {"source": str(folder / self.file), **self.data}
        task = {"kind": "classification", **self.task}
        return Recipe.parse({"name": "odd", "model": {"source": "./model"}, "task": task, "data": data})


@dataclass(frozen=True)
class Outcome:
    """What peftkit did: the rows by the task's own meaning, and what it reported; or the message of its refusal."""

    rows: Any = None
    summary: str = ""
    refusal: str = ""


def walk(odd: Odd, folder: Path) -> Outcome:
    """Writes the input and reads it, without a model."""
    path = folder / odd.file
    path.parent.mkdir(parents=True, exist_ok=True)
    if callable(odd.write):
        odd.write(path)
    else:
        path.write_bytes(odd.write)
    try:
        prepared = prepare(odd.recipe(folder))
    except DataError as error:
        return Outcome(refusal=str(error).replace(f"{folder}/", ""))
    kind, rows = prepared.info.problem_type, [row for split in prepared.splits.values() for row in split]
    rows.sort(key=lambda row: (row["_file"], row["_line"]))
    reported = [
        f"{step.name.replace('_', ' ')} ({step.action}): {step.examples[0].replace(f'{folder}/', '')}"
        for step in prepared.steps
        if step.name not in ("split", "missing_classes") and step.examples
    ]
    reads, values = _meaning(kind, prepared.info.labels, rows)
    return Outcome(values, "; ".join([reads, *reported]))


def _meaning(kind: str, labels: tuple[str, ...], rows: list[dict[str, Any]]) -> tuple[str, Any]:
    names = ", ".join(labels)
    if kind == "single_label_classification":
        return f"one of {names}", sorted((row["text"], labels[row["label"]]) for row in rows)
    if kind == "multi_label_classification":
        several = [tuple(name for name, flag in zip(labels, row["label"]) if flag) for row in rows]
        return f"several of {names}", sorted(zip((row["text"] for row in rows), several))
    if kind == "regression":
        return "a number", sorted((row["text"], row["label"]) for row in rows)
    if "messages" in rows[0]:
        turns = [[(turn["role"], turn["content"]) for turn in row["messages"]] for row in rows]
        return "conversations", sorted(turns)
    return "text", "".join(row["text"] for row in rows)


# -- how files are written ---------------------------------------------------------------------------------------------


def csv(labels: Iterable[Any] = LABELS, column: str = "label", texts: Iterable[str] = TEXTS, **options: Any) -> bytes:
    """A CSV file as pandas writes it, under a column name of choice."""
    frame = pd.DataFrame({"text": list(texts), column: list(labels)})
    encoding = options.pop("encoding", "utf-8")
    return frame.to_csv(**{"index": False, **options}).encode(encoding)


def cycle(*values: Any) -> list[Any]:
    return [values[number % len(values)] for number in range(COUNT)]


def pairs(*labels: Any) -> list[tuple[str, Any]]:
    return list(zip(TEXTS, cycle(*labels)))


def jsonl(rows: Iterable[Any], end: str = "\n", **options: Any) -> bytes:
    return "".join(json.dumps(row, **options) + end for row in rows).encode()


def objects(labels: Iterable[Any] = LABELS, column: str = "label") -> list[dict[str, Any]]:
    return [{"text": text, column: label} for text, label in zip(TEXTS, labels)]


def frame(orient: str) -> bytes:
    return pd.DataFrame(objects()).to_json(orient=orient).encode()  # type: ignore[call-overload, no-any-return]


def parquet(labels: Any, texts: Any = TEXTS) -> Write:
    return lambda path: pd.DataFrame({"text": texts, "label": labels}).to_parquet(path)


def columns(*names: str) -> list[dict[str, str]]:
    """Rows of a question and its answer under other names."""
    return [dict(zip(names, values)) for values in zip(QUESTIONS, ANSWERS)]


def messages(
    change: Callable[[list[dict[str, Any]], int], list[dict[str, Any]]] = lambda turns, _: turns,
    key: str = "messages", names: tuple[str, str] = ("role", "content"), **more: Any,
) -> bytes:  # fmt: skip
    rows = []
    for number, turns in enumerate(TURNS):
        plain: list[dict[str, Any]] = [dict(zip(names, turn)) for turn in turns]
        rows.append({key: change(plain, number), **more})
    return jsonl(rows)


def answer(turn: Mapping[str, Any]) -> Callable[[list[dict[str, Any]], int], list[dict[str, Any]]]:
    """Adds values to the assistant's turn of each row."""
    return lambda turns, _: [turns[0], {**turns[1], **turn}]


def before(role: str, content: str = "be brief") -> Callable[[list[dict[str, Any]], int], list[dict[str, Any]]]:
    return lambda turns, _: [{"role": role, "content": content}, *turns]


def archive(*names: str) -> Write:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as file:
            for name in names:
                file.writestr(name, csv())

    return write


def sheet(path: Path) -> None:
    pd.DataFrame(objects()).to_excel(path, index=False)


def documents(suffix: str) -> Write:
    def write(path: Path) -> None:
        path.mkdir()
        for number, text in enumerate(TEXTS):
            (path / f"doc{number:02}{suffix}").write_text(text, encoding="utf-8")

    return write


def with_system(role: str = "system") -> list[list[tuple[str, str]]]:
    return [[(role, "be brief"), *turns] for turns in TURNS]


PLAIN = csv().decode()
LINES = PLAIN.splitlines()
MULTI = cycle(("sport", "tech"), ("tech",), ("biz",), ("sport",))
MULTI_PAIRS = list(zip(TEXTS, [tuple(sorted(given)) for given in MULTI]))
HOT = [[int(name in given) for name in sorted(TOPICS)] for given in MULTI]
STYLE = {"kind": "style"}
TEXT = "\n\n".join(f"Chapter {n}. It was the best of times, {n} times over." * 40 for n in range(30))
INSTRUCTION = {"kind": "instruction"}
ASKED = "task.problem_type=regression to predict the number"


def table(kind: str, file: str, write: bytes | Write, means: Any = TABLE, refused: str = "", **data: Any) -> Odd:
    return Odd("Tables", kind, file, write, None if refused else means, refused, data=data)


def label(kind: str, cells: Iterable[Any], means: Any = None, refused: str = "", task: Any = None, **data: Any) -> Odd:
    return Odd("Labels", kind, "rows.csv", csv(cells), means, refused, task or {}, data)


def value(kind: str, cells: Iterable[Any], means: Any = None, refused: str = "", task: Any = None, **data: Any) -> Odd:
    return Odd("Labels", f"{kind}, in JSON", "rows.jsonl", jsonl(objects(cells)), means, refused, task or {}, data)


def chat(kind: str, write: bytes, means: Any = None, refused: str = "", file: str = "rows.jsonl", **data: Any) -> Odd:
    return Odd("Conversations", kind, file, write, means, refused, INSTRUCTION, data)


def text(kind: str, file: str, write: bytes | Write, means: Any = None, refused: str = "", **data: Any) -> Odd:
    return Odd("Plain text", kind, file, write, means, refused, STYLE, data)


QUOTED = [f'{text}, "so" it said' for text in TEXTS]
TWO_LINES = [f"{text}\nsecond line" for text in TEXTS]
LATIN = [f"{text} café – €5" for text in TEXTS]
APOSTROPHES = "text,label\n" + "".join(f"'{text}, it said',{topic}\n" for text, topic in TABLE)
SAID = [(f"{text}, it said", topic) for text, topic in TABLE]

TABLES = [
    table("semicolons", "rows.csv", csv(sep=";")),
    table("semicolons, and commas in the texts", "rows.csv", csv(sep=";", texts=[t for t, _ in SAID]), SAID),
    table("tabs in a .csv file", "rows.csv", csv(sep="\t")),
    table("bars", "rows.csv", csv(sep="|")),
    table("a `sep=;` line for Excel", "rows.csv", b"sep=;\r\n" + csv(sep=";")),
    table("byte-order mark, Windows line ends", "rows.csv", csv(encoding="utf-8-sig", lineterminator="\r\n")),
    table("cp1252", "rows.csv", csv(texts=LATIN, encoding="cp1252"), list(zip(LATIN, LABELS))),
    table("UTF-16", "rows.csv", csv(texts=LATIN, encoding="utf-16"), list(zip(LATIN, LABELS))),
    table("carriage returns as line ends", "rows.csv", PLAIN.replace("\n", "\r").encode()),
    table("a carriage return in a cell without quotes", "rows.csv",
          "".join(f"{line.replace(' of', chr(13) + 'of')}\n" for line in LINES).encode(),
          refused="a carriage return stands inside a field"),
    table("cells of two lines", "rows.csv", csv(texts=TWO_LINES), list(zip(TWO_LINES, LABELS))),
    table("doubled quotes and commas in cells", "rows.csv", csv(texts=QUOTED), list(zip(QUOTED, LABELS))),
    table("quotes after a backslash", "rows.csv", csv(texts=QUOTED, doublequote=False, escapechar="\\"),
          list(zip(QUOTED, LABELS))),
    table("single quotes around cells", "rows.csv", APOSTROPHES.encode(), SAID),
    table("a space after each comma", "rows.csv",
          "".join(["text, label\n", *(f'"{t}", {topic}\n' for t, topic in SAID)]).encode(), SAID),
    table("a comma in a cell without quotes", "rows.csv", PLAIN.replace("row 9 of", "row 9, of").encode(),
          refused="expected 2 fields as in the header, found 3"),
    table("a quote that is never closed", "rows.csv", PLAIN.replace("this is row 9", '"this is row 9').encode(),
          refused="never closed"),
    table("an index written by pandas", "rows.csv", csv(index=True)),
    table("blank columns at the end", "rows.csv", "".join(f"{line},,\n" for line in LINES).encode()),
    table("a comma at the end of rows only", "rows.csv",
          "\n".join([LINES[0], *(f"{line}," for line in LINES[1:])]).encode()),
    table("no header", "rows.csv", csv(header=False), refused="begin the file with a line of column names"),
    table("a column twice", "rows.csv", PLAIN.replace("text,label", "label,label", 1).encode(),
          refused="the header has this column twice"),
    table("a column named _file", "rows.csv", csv(column="_file"), refused="this name is reserved"),
    table("another case in the header", "rows.csv", PLAIN.replace("text,label", "Text,Label", 1).encode(),
          refused="did you mean 'Text'?"),
    table("spaces around the header's names", "rows.csv", PLAIN.replace("text,label", " text , label ", 1).encode()),
    table("a label column of another name", "rows.csv", csv(column="topic"), refused="no such column"),
    table("only a header", "rows.csv", b"text,label\n", refused="the train split has no rows"),
    table("an empty file", "rows.csv", b"", refused="the file is empty"),
    table("compressed by gzip", "rows.csv.gz", gzip.compress(csv(), mtime=0)),
    table("a zip archive of one file", "rows.zip", archive("rows.csv")),
    table("a zip archive of two files", "rows.zip", archive("train.csv", "test.csv"),
          refused="expected an archive of one file, found 2 files"),
    table("an Excel sheet", "rows.xlsx", sheet),
    table("another file named .xlsx", "rows.xlsx", csv(), refused="not an Excel file"),
    table("a list in a .jsonl file", "rows.jsonl", json.dumps(objects()).encode()),
    table("objects over several lines", "rows.jsonl", jsonl(objects(), indent=2)),
    table("blank lines between objects", "rows.jsonl", jsonl(objects(), end="\n\n")),
    table("a comma after each object", "rows.jsonl", jsonl(objects(), end=",\n")),
    table("a comma after the last object", "rows.json", json.dumps(objects()).replace("}]", "},]").encode()),
    table("Python's quotes", "rows.jsonl", "".join(f"{row}\n" for row in objects()).encode(),
          refused="these are Python's quotes"),
    table("rows under `data`", "rows.json", json.dumps({"version": 1, "data": objects()}).encode()),
    table("rows under another key", "rows.json", json.dumps({"rows": objects()}).encode()),
    table("rows under two keys", "rows.json", json.dumps({"train": objects(), "test": objects()}).encode(),
          refused="choose one with data.subset"),
    table("rows by id", "rows.json", json.dumps({f"id{n}": row for n, row in enumerate(objects())}).encode()),
    *(table(f"pandas, orient='{orient}'", "rows.json", frame(orient))
      for orient in ("columns", "index", "split", "table")),
    table("columns as lists", "rows.json", json.dumps({"text": TEXTS, "label": LABELS}).encode()),
    table("texts inside objects", "rows.jsonl", jsonl([{"text": {"body": t}, "label": k} for t, k in TABLE]),
          refused="must name a column of text, found objects"),
    table("texts in lists", "rows.jsonl", jsonl([{"text": [t], "label": k} for t, k in TABLE]),
          refused="must name a column of text, found lists"),
    table("a number among the texts", "rows.jsonl", jsonl([*objects()[:9], {"text": 5, "label": "biz"}]),
          refused="expected text as in the rows before, found 5"),
    table("rows that lack a key", "rows.jsonl", jsonl([*objects()[:9], {"body": "x", "label": "biz"}]),
          refused="1 row has no 'text' at all"),
    table("an empty text", "rows.csv", csv(texts=["  ", *TEXTS[1:]]), refused="found an empty text"),
    table("texts as bytes", "rows.parquet", parquet(LABELS, [t.encode() for t in TEXTS]), refused="found bytes"),
    table("categories of pandas", "rows.parquet", parquet(pd.Categorical(LABELS))),
    table("a missing category", "rows.parquet", parquet(pd.Categorical([None, *LABELS[1:]])),
          refused="no label in 1 of 30"),
]  # fmt: skip

LABELLED = [
    label("0 and 1", cycle(0, 1), pairs("0", "1")),
    label("whole numbers from 1", cycle(1, 2, 3), pairs("1", "2", "3")),
    label("whole numbers as pandas writes them next to a blank", cycle("1.0", "0.0"), pairs("1", "0")),
    value("whole numbers as floats", cycle(0.0, 1.0, 2.0), pairs("0", "1", "2")),
    value("text and numbers", cycle("1", 2), refused="expected text as in the rows before, found 2"),
    label("-1 next to 0 and 1", cycle(0, 1, -1), pairs("0", "1", "-1")),
    label("half stars", cycle(1, 1.5, 2), refused=ASKED),
    label(
        "half stars as classes",
        cycle(1, 1.5, 2),
        pairs("1", "1.5", "2"),
        task={"problem_type": "single_label_classification"},
    ),
    label("many decimals", [n / 7 for n in range(COUNT)], [(t, n / 7) for n, t in enumerate(TEXTS)]),
    label("decimals in scientific notation", [f"{n:.2e}" for n in range(COUNT)], [(t, n) for n, t in enumerate(TEXTS)]),
    label("decimal commas", [f"{n},5" for n in range(COUNT)], refused=ASKED),
    label(
        "decimal commas of a regression",
        [f"{n},5" for n in range(COUNT)],
        [(t, n + 0.5) for n, t in enumerate(TEXTS)],
        task={"problem_type": "regression"},
    ),
    label("thousands separators", [f"1,{n:03}" for n in range(COUNT)], refused="thousands separators"),
    label("percentages", [f"{n}%" for n in range(COUNT)], refused="percent signs have to go"),
    label("codes with leading zeros", cycle("007", "012", "0123"), pairs("007", "012", "0123")),
    label("codes such as 1e5", cycle("1e5", "2e3", "4a1"), pairs("1e5", "2e3", "4a1")),
    label("codes such as 1_0", cycle("1_0", "1_1"), pairs("1_0", "1_1")),
    label("versions", cycle("1.9", "1.10", "2.0"), pairs("1.9", "1.10", "2.0")),
    label("TRUE and FALSE", cycle("TRUE", "FALSE"), pairs("True", "False")),
    value("true and false", cycle(True, False), pairs("True", "False")),
    label("yes and no", cycle("yes", "no"), pairs("yes", "no")),
    label("spaces around names", cycle(" sport", "sport", "tech\u00a0"), pairs("sport", "sport", "tech")),
    label("two cases of a name", cycle("Sport", "sport", "tech"), pairs("Sport", "sport", "tech")),
    label(
        "two cases, merged",
        cycle("Sport", "sport", "tech", "sport"),
        pairs("sport", "sport", "tech", "sport"),
        cleaning={"similar_classes": "merge"},
    ),
    label("two forms of é", cycle("caf\u00e9", "cafe\u0301"), pairs("caf\u00e9", "cafe\u0301")),
    label("a blank label", ["", *LABELS[1:]], refused="no label in 1 of 30 rows"),
    label("nan among names", cycle("sport", "tech", "nan"), pairs("sport", "tech", "nan")),
    label(
        "N/A among names, dropped",
        cycle("sport", "tech", "N/A"),
        [(t, k) for t, k in pairs("sport", "tech", None) if k],
        cleaning={"null_words": "drop"},
    ),
    label("NULL among numbers", cycle(0, 1, "NULL"), refused="data.cleaning.null_words=drop"),
    label("inf among decimals", [*(n / 7 for n in range(1, COUNT)), "inf"], refused="fill or remove rows without one"),
    label("names and numbers", cycle("sport", "tech", 3), refused="labels of mixed kinds"),
    label("one label for all rows", cycle("sport"), refused="a classifier needs at least two classes"),
    label(
        "a label for each row",
        [f"topic {n} of many" for n in range(COUNT)],
        refused="every one of the 30 rows has another label",
    ),
    label("a label outside data.labels", LABELS, refused="is not among the 2 labels given", labels=["sport", "tech"]),
    value("a null", [None, *LABELS[1:]], refused="no label in 1 of 30 rows"),
    value("an object", [{"name": k} for k in LABELS], refused="found objects such as {'name': 'sport'}"),
    Odd(
        "Labels",
        "a date, in Parquet",
        "rows.parquet",
        parquet([date(2024, 1, n % 3 + 1) for n in range(COUNT)]),
        refused="found values of type date32",
    ),
    Odd(
        "Labels",
        "decimals of a database, in Parquet",
        "rows.parquet",
        parquet([Decimal(n % 3) for n in range(COUNT)]),
        pairs("0", "1", "2"),
    ),
    value("lists of names", [[*given] for given in MULTI], MULTI_PAIRS),
    value("lists, some empty", [[], *([*given] for given in MULTI[1:])], [(TEXTS[0], ()), *MULTI_PAIRS[1:]]),
    value(
        "lists of ids",
        [[TOPICS.index(name) for name in given] for given in MULTI],
        [(t, tuple(sorted(str(TOPICS.index(k)) for k in given))) for t, given in zip(TEXTS, MULTI)],
    ),
    value("lists of 0 and 1", HOT, MULTI_PAIRS, labels=sorted(TOPICS)),
    label("lists of 0 and 1, as text", HOT, MULTI_PAIRS, labels=sorted(TOPICS)),
    label("lists as Python prints them", [[*given] for given in MULTI], MULTI_PAIRS),
    label("names joined by |", ["|".join(given) for given in MULTI], refused="data.label_separator='|'"),
    label("names joined by |, as set", ["|".join(given) for given in MULTI], MULTI_PAIRS, label_separator="|"),
    label("names joined by a comma", [", ".join(given) for given in MULTI], refused="data.label_separator=','"),
    *(
        Odd(
            "Labels",
            f"a column of {kind} for each label",
            "rows.csv",
            pd.DataFrame({"text": TEXTS, **{k: [cells[k in given] for given in MULTI] for k in sorted(TOPICS)}})
            .to_csv(index=False)
            .encode(),
            None if refused else MULTI_PAIRS,
            refused,
            data={"label": sorted(TOPICS)},
        )
        for kind, cells, refused in (
            ("0 and 1", (0, 1), ""),
            ("0.0 and 1.0", (0.0, 1.0), ""),
            ("True and False", (False, True), ""),
            ("yes and no", ("no", "yes"), ""),
            ("1 and blank", ("", 1), "no label in"),
        )
    ),
    Odd(
        "Labels",
        "a row for each label of a text",
        "rows.csv",
        csv(cycle("sport", "tech"), texts=[TEXTS[n // 2] for n in range(COUNT)]),
        refused="write one row per text with all of its labels",
    ),
    Odd(
        "Labels",
        "two columns of text",
        "rows.csv",
        pd.DataFrame({"premise": TEXTS, "hypothesis": ANSWERS, "gold": cycle("yes", "no")})
        .to_csv(index=False)
        .encode(),
        pairs("yes", "no"),
        data={"text": "premise", "text_pair": "hypothesis", "label": "gold"},
    ),
]

FUNCTION_CALL = {"tool_calls": [{"type": "function", "function": {"name": "look", "arguments": "{}"}}]}
CHATS = [
    chat("Alpaca's columns", jsonl(columns("instruction", "output")), TURNS),
    chat(
        "Alpaca's columns in CSV, with nan",
        pd.DataFrame({"instruction": QUESTIONS, "input": cycle("", "nan"), "output": ANSWERS})
        .to_csv(index=False)
        .encode(),
        [
            [("user", q if n % 2 == 0 else f"{q}\n\nnan"), ("assistant", a)]
            for n, (q, a) in enumerate(zip(QUESTIONS, ANSWERS))
        ],
        file="rows.csv",
    ),
    chat("a null input", jsonl([{**row, "input": None} for row in columns("instruction", "output")]), TURNS),
    chat(
        "numbers as answers",
        jsonl([{"instruction": q, "output": n} for n, q in enumerate(QUESTIONS)]),
        refused="expected text, found int '0'",
    ),
    chat(
        "question and answer",
        jsonl(columns("question", "answer")),
        refused="set data.columns.instruction=question data.columns.output=answer",
    ),
    chat(
        "question and answer, as set",
        jsonl(columns("question", "answer")),
        TURNS,
        columns={"instruction": "question", "output": "answer"},
    ),
    chat(
        "Dolly's columns",
        jsonl([{**row, "context": "x"} for row in columns("instruction", "response")]),
        refused="data.columns.output=response data.columns.input=context",
    ),
    chat(
        "pairs of preferences",
        jsonl([{**row, "rejected": "no"} for row in columns("prompt", "chosen")]),
        refused="data.columns.instruction=prompt data.columns.output=chosen",
    ),
    chat("prompt and completion", jsonl(columns("prompt", "completion")), TURNS),
    chat(
        "prompt and completion as lists of messages",
        jsonl(
            [
                {"prompt": [{"role": "user", "content": q}], "completion": [{"role": "assistant", "content": a}]}
                for q, a in zip(QUESTIONS, ANSWERS)
            ]
        ),
        TURNS,
    ),
    chat(
        "a column of system prompts",
        jsonl([{**row, "system": "be brief"} for row in columns("prompt", "completion")]),
        with_system(),
    ),
    chat(
        "a column of earlier turns",
        jsonl([{**row, "history": [["hello", "hello you"]]} for row in columns("instruction", "output")]),
        [[("user", "hello"), ("assistant", "hello you"), *turns] for turns in TURNS],
    ),
    chat("messages", messages(), TURNS),
    chat(
        "messages as text in CSV",
        pd.DataFrame({"messages": [json.dumps([{"role": r, "content": c} for r, c in turns]) for turns in TURNS]})
        .to_csv(index=False)
        .encode(),
        TURNS,
        file="rows.csv",
    ),
    chat(
        "content in parts",
        messages(lambda turns, _: [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]),
        TURNS,
    ),
    chat(
        "ShareGPT's names",
        messages(
            lambda turns, _: [{"from": name, "value": turn["value"]} for name, turn in zip(("human", "gpt"), turns)],
            "conversations",
            ("from", "value"),
        ),
        TURNS,
    ),
    chat(
        "roles in capitals",
        messages(
            lambda turns, _: [{"from": name, "value": turn["value"]} for name, turn in zip(("Human", "AI"), turns)],
            "conversations",
            ("from", "value"),
        ),
        TURNS,
    ),
    chat(
        "roles as keys",
        jsonl([{"conversations": [{"human": q, "assistant": a}]} for q, a in zip(QUESTIONS, ANSWERS)]),
        refused="expected role and content (or from and value), found human, assistant",
    ),
    chat("a system prompt", messages(before("system")), with_system()),
    chat("a developer's prompt", messages(before("developer")), with_system()),
    chat(
        "a late system prompt",
        messages(lambda turns, _: [turns[0], {"role": "system", "content": "x"}, turns[1]]),
        refused="the system prompt must be the first turn",
    ),
    chat(
        "an answer before any question",
        messages(before("assistant", "hello")),
        refused="there is nothing that it answers",
    ),
    chat("two questions in a row", messages(before("user", "hello")), refused="turns 1 and 2 are both the user's"),
    chat(
        "two answers in a row",
        messages(lambda turns, _: [*turns, turns[1]]),
        refused="turns 2 and 3 are both the assistant's",
    ),
    chat(
        "a question at the end",
        messages(lambda turns, _: [*turns, {"role": "user", "content": "thanks"}]),
        [[*turns, ("user", "thanks")] for turns in TURNS],
    ),
    chat("an empty answer", messages(answer({"content": ""})), refused="the assistant's answer is empty"),
    *(
        chat(
            f"an answer flagged with `{key}`",
            messages(
                lambda turns, _, key=key, off=off: [
                    *turns,
                    {"role": "user", "content": "again"},
                    {**turns[1], key: off},
                ]
            ),
            [[*turns, ("user", "again"), turns[1]] for turns in TURNS],
        )
        for key, off in (("loss", False), ("train", False), ("weight", 0))
    ),
    chat("a column of tools", messages(tools=[{"type": "function", "function": {"name": "look"}}]), TURNS),
    chat(
        "ShareGPT's roles of tools",
        messages(
            lambda turns, _: [
                turns[0],
                {"from": "function_call", "value": "{}"},
                {"from": "observation", "value": "1"},
                turns[1],
            ],
            "conversations",
            ("from", "value"),
        ),
        refused="calls of tools and their results are not read yet",
    ),
    chat("calls of tools", messages(answer(FUNCTION_CALL)), refused="'tool_calls' is not read yet"),
    chat(
        "plain text with a template",
        jsonl([{"text": f"<|im_start|>user\n{q}<|im_end|>"} for q in QUESTIONS]),
        refused="task.kind=style learns a column of plain text",
    ),
]

PLAIN_TEXTS = [
    text("a long text", "book.txt", TEXT.encode(), TEXT),
    text("with a byte-order mark", "book.txt", TEXT.encode("utf-8-sig"), TEXT),
    text("cp1252", "book.txt", TEXT.replace("times,", "times –").encode("cp1252"), TEXT.replace("times,", "times –")),
    text("carriage returns as line ends", "book.txt", TEXT.replace("\n", "\r").encode(), TEXT),
    text("a short text", "note.txt", TEXT[:9000].encode(), refused="a text file of under 24,000 characters is one"),
    text("an empty file", "note.txt", b"", refused="the train split has no rows"),
    text("a folder of documents", "docs", documents(".txt"), "".join(TEXTS)),
    text("a folder of .md files", "docs", documents(".md"), refused="expected train, validation and test files"),
    text("texts in JSON", "rows.jsonl", jsonl([{"text": t} for t in TEXTS]), "".join(TEXTS)),
    text("lists of texts", "rows.jsonl", jsonl([{"text": [t]} for t in TEXTS]), refused="expected text, found list"),
    text(
        "numbers as texts",
        "rows.jsonl",
        jsonl([{"text": n} for n in range(COUNT)]),
        refused="expected text, found int '0'",
    ),
]

INPUTS = [*TABLES, *LABELLED, *CHATS, *PLAIN_TEXTS]
INTRODUCTION = """# Odd inputs

How peftkit reads files and rows that are not plain, one of each kind. What was detected is reported before training,
in the cleaning table and by `peftkit inspect`; what could be read in two ways is refused, with the field that settles
it.
[Data](data.md) describes the rules. A test compares every row that is read with what its input means, and this page
with what happens; `python -m tests.data.odd_inputs` writes it.
"""


def page(outcomes: Mapping[Odd, Outcome] | list[tuple[Odd, Outcome]]) -> str:
    """The table of all kinds, by section."""
    lines, section = [INTRODUCTION], ""
    for odd, outcome in outcomes:
        if odd.section != section:
            section = odd.section
            lines += [f"## {section}\n", "| input | what peftkit does |", "|---|---|"]
            lines[-3] = ("" if len(lines) == 4 else "\n") + lines[-3]
        done = outcome.summary or f"refused: {_first_problem(outcome.refusal)}"
        kind, done = (" ".join(words.split()).replace("|", "\\|") for words in (odd.kind, done))
        lines.append(f"| {kind} | {done} |")
    return "\n".join(lines) + "\n"


def _first_problem(message: str) -> str:
    """The message, or of a list of bad rows the first one."""
    rows = message.split("\n  ")
    return rows[1] if len(rows) > 1 else message


def main() -> None:
    outcomes = []
    for odd in INPUTS:
        with tempfile.TemporaryDirectory() as folder:
            outcomes.append((odd, walk(odd, Path(folder))))
    print(page(outcomes), end="")


if __name__ == "__main__":
    main()

"""Cleaning: what is dropped, what is told, and near duplicates against brute force."""

from __future__ import annotations

import csv
import json
import random

import pandas as pd
import pytest

from peftkit.data.mapping import clean_text
from peftkit.data.near_duplicates import bands_for, find_pairs, jaccard, shingles, words_of
from peftkit.data.pipeline import prepare
from peftkit.errors import DataError
from peftkit.schema.recipe import Recipe


def write(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


def prepared(source, **data):
    held = {"source": str(source), "test_size": 0, **data}
    return prepare(Recipe.parse({"name": "r", "model": {"source": "./m"}, "data": held}))


def texts_of(held, split="train"):
    return list(held.splits[split]["text"])


def step(held, name, split="train"):
    return next((found for found in held.steps if (found.name, found.split) == (name, split)), None)


PLAIN = [
    (f"row number {index} about {'cats' if index % 2 else 'dogs'} {index * 7}", "ab"[index % 2]) for index in range(40)
]


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "validation.csv", [("held out one", "a"), ("held out two", "b")])
    return tmp_path


def test_duplicates_keep_the_first_and_ignore_case_and_spacing(folder):
    write(folder / "train.csv", [*PLAIN, ("Row  number 0 ABOUT dogs 0", "a"), (PLAIN[3][0], "b")])
    held = prepared(folder)
    assert texts_of(held) == [text for text, _ in PLAIN]
    found = step(held, "duplicates")
    assert (found.action, found.rows) == ("dropped", 2)
    assert found.examples[0] == f"{folder}/train.csv:42 = {folder}/train.csv:2"
    kept = prepared(folder, cleaning={"duplicates": "report"})
    assert (len(texts_of(kept)), step(kept, "duplicates").action) == (42, "reported")
    off = prepared(folder, cleaning={"duplicates": "off"})
    assert (len(texts_of(off)), step(off, "duplicates")) == (42, None)


def language(path, rows, task="instruction", **data):
    pd.DataFrame(rows).to_json(path, orient="records", lines=True)
    data = {"source": str(path), "test_size": 0, "validation_size": 4, **data}
    return prepare(Recipe.parse({"name": "r", "model": {"source": "./m"}, "task": task, "data": data}))


CODE = "if good:\n    one()\ntwo()"
VARIANTS = {
    "indentation": [{"instruction": f"Format {n}", "output": CODE.replace("\ntwo", gap)}
                    for n in range(8) for gap in ("\ntwo", "\n    two")],
    "case": [{"instruction": case(f"Write word {n} so"), "output": f"World {n}"} for n in range(8)
             for case in (str.lower, str.upper)],
    "answers": [{"instruction": f"Write word {n}", "output": case(f"World {n}")} for n in range(8)
                for case in (str.lower, str.upper)],
    "system": [{"instruction": f"Say {n}", "output": f"word {n}", "system": system} for n in range(8)
               for system in ("Speak low.", "Speak up.")],
    "flags": [{"messages": [{"role": "user", "content": f"Say {n}"},
                            {"role": "assistant", "content": "x", "loss": flag},
                            {"role": "user", "content": "again"},
                            {"role": "assistant", "content": f"word {n}"}]}
              for n in range(8) for flag in (True, False)],
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_conversations_are_duplicates_to_the_letter(name, tmp_path):
    rows = VARIANTS[name]
    again = [*rows, *rows[:3]]
    assert len(pd.DataFrame(map(json.dumps, again)).drop_duplicates()) == len(rows) == 16  # pandas is the judge
    held = language(tmp_path / "rows.jsonl", again)
    assert sum(map(len, held.splits.values())) == 16
    assert step(held, "duplicates").rows == 3
    if name != "flags":  # nearly equal rows stay on one side, so that none is learned and tested on
        sides = {row["_line"]: split for split, part in held.splits.items() for row in part}
        assert all(sides[line] == sides[line + 1] for line in range(1, 16, 2))


def test_documents_are_duplicates_to_the_letter(tmp_path):
    texts = [form(f"Document {n} is\n  about Cats") for n in range(6) for form in (str, str.lower, " ".join)]
    texts += [f"Document {n} is\n  about Cats" for n in range(2)]
    held = language(tmp_path / "rows.jsonl", {"text": texts}, "style")
    kept = [text for part in held.splits.values() for text in part["text"]]
    assert sorted(kept) == sorted(pd.Series(texts).drop_duplicates())
    assert step(held, "duplicates").rows == 2


def test_conflicts_are_told_and_dropped_whole(folder):
    write(folder / "train.csv", [*PLAIN, (PLAIN[0][0], "b")])
    held = prepared(folder)
    assert step(held, "conflicts").rows == 2
    assert len(texts_of(held)) == 40
    dropped = prepared(folder, cleaning={"conflicts": "drop"})
    assert PLAIN[0][0] not in texts_of(dropped)
    assert len(texts_of(dropped)) == 39


def test_leakage_is_dropped_refused_or_told(folder):
    write(folder / "train.csv", [*PLAIN, ("Held out ONE", "a"), ("in the test", "a")])
    write(folder / "validation.csv", [("held out one", "a"), ("held out two", "b"), ("in the test", "a")])
    write(folder / "test.csv", [("in the test", "a"), ("only here", "b")])
    held = prepared(folder)
    assert texts_of(held) == [text for text, _ in PLAIN]
    assert texts_of(held, "validation") == ["held out one", "held out two"]
    assert texts_of(held, "test") == ["in the test", "only here"]
    assert step(held, "leakage").examples == (
        f"{folder}/train.csv:42 = {folder}/validation.csv:2",
        f"{folder}/train.csv:43 = {folder}/test.csv:2",
    )
    with pytest.raises(DataError, match=r"2 rows of the train split are also in the data that it is evaluated on"):
        prepared(folder, cleaning={"leakage": "error"})
    assert len(texts_of(prepared(folder, cleaning={"leakage": "report"}))) == 42
    off = prepared(folder, cleaning={"leakage": "off"})
    assert (len(texts_of(off)), step(off, "leakage")) == (42, None)


def test_control_characters_are_stripped_and_meaningful_joiners_stay(folder):
    dirty = "a\x00b\u200bc\ufeff\r\nd\x7f"
    write(folder / "train.csv", [*PLAIN, (dirty, "a"), ("family 👩‍👩‍👧 tab\there", "b")])
    held = prepared(folder)
    assert texts_of(held)[-2:] == ["abc\nd", "family 👩‍👩‍👧 tab\there"]
    assert step(held, "control_characters").rows == 1
    told = prepared(folder, cleaning={"control_characters": "report"})
    assert texts_of(told)[-2] == dirty
    assert step(told, "control_characters").action == "reported"
    assert step(prepared(folder, cleaning={"control_characters": "off"}), "control_characters") is None


def test_a_text_of_control_characters_alone_is_empty(folder):
    write(folder / "train.csv", [*PLAIN, ("\u200b\x01", "a")])
    with pytest.raises(DataError) as caught:
        prepared(folder)
    assert (caught.value.line, caught.value.column) == (42, "text")


@pytest.mark.parametrize("text", ["plain", "tab\tnewline\n", "पदार्थ क‍ष", "می‌خواهم"])
def test_clean_text_leaves_good_text_alone(text):
    assert clean_text(text) == text


def documents(seed: int, count: int) -> list[str]:
    """Random texts, half of them another one with a few words changed."""
    generator = random.Random(seed)
    words = [f"w{index}" for index in range(300)]
    made: list[str] = []
    for _ in range(count):
        if made and generator.random() < 0.5:
            copy = generator.choice(made).split()
            for _ in range(generator.randint(0, 4)):
                copy[generator.randrange(len(copy))] = generator.choice(words)
            made.append(" ".join(copy))
        else:
            made.append(" ".join(generator.choices(words, k=generator.randint(1, 80))))
    return made


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9, 1.0])
def test_near_duplicates_equal_brute_force(threshold):
    texts = [words_of(text) for text in documents(3, 400)]
    sets = [shingles(words) for words in texts]
    expected = {
        (later, earlier)
        for later in range(len(texts))
        for earlier in range(later)
        if jaccard(sets[later], sets[earlier]) >= threshold
    }
    found = list(find_pairs(lambda rows: (texts[row] for row in rows), len(texts), threshold))
    pairs = {(later, earlier) for later, earlier, _ in found}
    assert len(expected) > 50
    assert pairs <= expected
    assert len(pairs) >= 0.995 * len(expected)
    assert all(similarity == jaccard(sets[later], sets[earlier]) for later, earlier, similarity in found)
    assert [pair[0] for pair in found] == sorted(pair[0] for pair in found)


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.7, 0.9, 0.99])
def test_bands_catch_a_pair_at_the_threshold(threshold):
    bands, width = bands_for(threshold)
    assert bands * width <= 128
    assert 1 - (1 - threshold**width) ** bands >= 0.998 or width == 1


def test_texts_without_words_and_huge_buckets_are_not_taken_for_equal():
    texts = [words_of(text) for text in ["!!!", "???", "🙂", "🙃", *["same boilerplate text here"] * 500]]
    found = list(find_pairs(lambda rows: (texts[row] for row in rows), len(texts), 0.9))
    assert {later for later, _, _ in found} == set(range(5, 504))


def test_near_duplicates_are_told_dropped_or_ignored(folder):
    long = "the quick brown fox jumps over the lazy dog while the band plays on and on until the morning comes at last"
    write(folder / "train.csv", [*PLAIN, (long, "a"), (f"{long} yes", "a")])
    held = prepared(folder, cleaning={"near_threshold": 0.8})
    assert step(held, "near_duplicates").examples == (f"{folder}/train.csv:43 ~ {folder}/train.csv:42",)
    assert len(texts_of(held)) == 42
    dropped = prepared(folder, cleaning={"near_threshold": 0.8, "near_duplicates": "drop"})
    assert texts_of(dropped)[-1] == long
    assert step(prepared(folder, cleaning={"near_threshold": 0.99}), "near_duplicates") is None
    assert step(prepared(folder, cleaning={"near_threshold": 0.8, "near_duplicates": "off"}), "near_duplicates") is None

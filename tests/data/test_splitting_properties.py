"""Splits: nothing lost, shares kept, what belongs together stays together, and the seed decides all."""

from __future__ import annotations

import csv
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkit.data.pipeline import prepare
from peftkit.data.splitting import apportion, hold_out
from peftkit.errors import DataError
from peftkit.schema.recipe import Recipe


def rng(seed=0):
    return np.random.Generator(np.random.PCG64(seed))


def write(path, rows, header=("text", "label")):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def prepared(source, seed=0, **data):
    values = {"name": "r", "model": {"source": "./m"}, "data": data | {"split_seed": seed}}
    values["data"]["source"] = [str(one) for one in source] if isinstance(source, list) else str(source)
    return prepare(Recipe.parse(values))


def rows(counts: dict[str, int], prefix="row") -> list[tuple[str, str]]:
    return [(f"{prefix} {label} {index} {index * 31 % 97}", label) for label, n in counts.items() for index in range(n)]


def lines(held):
    return {name: list(split["_line"]) for name, split in held.splits.items()}


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.data())
@settings(max_examples=150, deadline=None)
def test_single_rows_are_held_out_exactly_and_in_proportion(sizes, data):
    strata = np.repeat(np.arange(len(sizes)), sizes)
    total, most = len(strata), len(strata) - len(sizes)
    count = data.draw(st.integers(0, total))
    taken = hold_out(np.arange(total), np.arange(total), strata, count, rng(data.draw(st.integers(0, 9))))
    assert len(taken) == min(count, most)
    assert len(set(taken.tolist())) == len(taken)
    for number, size in enumerate(sizes):
        mine = int((strata[taken] == number).sum())
        assert mine <= size - 1
        if count <= most // 2 and size > 3:
            assert abs(mine - count * size / total) <= len(sizes)


@given(st.lists(st.integers(1, 9), min_size=2, max_size=30), st.floats(0.05, 0.6), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_units_are_never_torn(sizes, share, seed):
    units = np.repeat(np.arange(len(sizes)), sizes)
    taken = hold_out(np.arange(len(units)), units, np.zeros_like(units), round(share * len(units)), rng(seed))
    inside, outside = set(units[taken].tolist()), set(np.delete(units, taken).tolist())
    assert not inside & outside
    assert outside


def test_apportion_gives_largest_remainders():
    assert apportion(np.array([50.0, 30.0, 20.0]), 7, np.array([49, 29, 19])).tolist() == [4, 2, 1]
    assert apportion(np.array([1.0, 99.0]), 50, np.array([0, 98])).tolist() == [0, 50]


def test_missing_splits_are_made_stratified_and_no_row_is_lost(tmp_path):
    path = write(tmp_path / "rows.csv", rows({"a": 100, "b": 60, "c": 40}))
    held = prepared(path, cleaning={"near_duplicates": "off"})
    assert {name: len(split) for name, split in held.splits.items()} == {"train": 140, "validation": 20, "test": 40}
    assert sorted(line for part in lines(held).values() for line in part) == list(range(2, 202))
    assert Counter(held.splits["test"]["label"]) == {0: 20, 1: 12, 2: 8}
    assert Counter(held.splits["validation"]["label"]) == {0: 10, 1: 6, 2: 4}
    assert all(part == sorted(part) for part in lines(held).values())


def test_the_seed_decides_and_nothing_else(tmp_path):
    path = write(tmp_path / "rows.csv", rows({"a": 60, "b": 60}))
    one, again, other = prepared(path, 1), prepared(path, 1), prepared(path, 2)
    moved = tmp_path / "elsewhere" / "copy.csv"
    moved.parent.mkdir()
    moved.write_bytes(path.read_bytes())
    assert lines(one) == lines(again) == lines(prepared(moved, 1))
    assert lines(one) != lines(other)
    assert one.fingerprint == again.fingerprint == prepared(moved, 1).fingerprint != other.fingerprint


def test_sizes_as_counts_and_the_source_s_own_splits(tmp_path):
    path = write(tmp_path / "train.csv", rows({"a": 60, "b": 60}))
    held = prepared(path, validation_size=7, test_size=0)
    assert {name: len(split) for name, split in held.splits.items()} == {"train": 113, "validation": 7}
    write(tmp_path / "test.csv", rows({"a": 5, "b": 5}, "other"))
    own = prepared(tmp_path, validation_size=0.25)
    assert {name: len(split) for name, split in own.splits.items()} == {"train": 90, "validation": 30, "test": 10}
    with pytest.raises(DataError, match=r"data.test_size=500 asks for 500 of the 120 rows"):
        prepared(path, test_size=500)


def test_without_stratify_shares_may_differ(tmp_path):
    path = write(tmp_path / "rows.csv", rows({"a": 100, "b": 100}))
    plain = [Counter(prepared(path, seed, stratify=False).splits["test"]["label"])[0] for seed in range(4)]
    assert set(plain) != {20}
    assert Counter(prepared(path).splits["test"]["label"])[0] == 20


def test_a_rare_class_stays_in_training_and_is_named(tmp_path):
    path = write(tmp_path / "rows.csv", [*rows({"a": 50, "b": 50}), ("the only one of its kind", "rare")])
    held = prepared(path)
    assert 2 in held.splits["train"]["label"]
    assert 2 not in [*held.splits["test"]["label"], *held.splits["validation"]["label"]]
    (step,) = [step for step in held.steps if step.name == "rare_classes"]
    assert step.examples == ("'rare' has 1 row",)


def test_near_and_equal_texts_never_straddle(tmp_path):
    base = [f"story {index} tells of {' '.join(f'word{index}x{place}' for place in range(20))}" for index in range(40)]
    path = write(
        tmp_path / "rows.csv",
        [(f"{text}{end}", "ab"[index % 2]) for index, text in enumerate(base) for end in ("", " end", "")],
    )
    for seed in range(5):
        held = prepared(path, seed, cleaning={"duplicates": "report", "near_threshold": 0.8})
        stories = [{text.split()[1] for text in split["text"]} for split in held.splits.values()]
        assert sum(map(len, stories)) == 40
        assert sum(map(len, held.splits.values())) == 120


def test_limits_are_stratified_choices_of_each_split(tmp_path):
    path = write(tmp_path / "rows.csv", rows({"a": 150, "b": 50}))
    whole = prepared(path)
    cut = prepared(path, limit={"train": 40, "test": 8})
    assert {name: len(split) for name, split in cut.splits.items()} == {"train": 40, "validation": 20, "test": 8}
    assert Counter(cut.splits["train"]["label"]) == {0: 30, 1: 10}
    assert set(lines(cut)["train"]) < set(lines(whole)["train"])
    assert lines(cut)["validation"] == lines(whole)["validation"]
    assert all(len(split) == 5 for split in prepared(path, limit=5).splits.values())


def test_several_sources_are_mixed_by_weight(tmp_path):
    one = write(tmp_path / "one.csv", rows({"a": 100, "b": 100}, "first"))
    two = write(tmp_path / "two.csv", rows({"a": 20, "b": 20}, "second"))
    every = prepared([one, two])
    assert sum(map(len, every.splits.values())) == 240
    held = prepared([one, two], weights=[3, 1])
    source = Counter(text.split()[0] for text in held.splits["train"]["text"])
    assert source == {"first": 84, "second": 28}
    assert lines(held)["test"] == lines(every)["test"]
    assert held.sources == (str(one), str(two))

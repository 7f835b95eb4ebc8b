"""prepare and encode: determinism, what the fingerprints depend on, caches that mend themselves, several processes."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from peftkit.data.augmentation import change
from peftkit.data.pipeline import encode, encode_rows, prepare
from peftkit.models.tokenizer import load_tokenizer, tokenizer_fingerprint
from peftkit.schema.recipe import AugmentationConfig, replace
from peftkit.system import cache
from tests import warm


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache for this test alone."""
    monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tokenizer(small_recipe):
    return load_tokenizer(small_recipe.model)


def same(one, other):
    return one.to_dict() == other.to_dict()


def test_encoding_is_what_the_tokenizer_gives(small_recipe, tokenizer, own_cache):
    prepared = prepare(small_recipe)
    encoded = encode(prepared, tokenizer, small_recipe)
    for name, split in encoded.splits.items():
        rows = prepared.splits[name]
        assert list(split.examples["row"]) == list(range(len(rows)))
        expected = tokenizer(list(rows["text"]), truncation=True, max_length=32)["input_ids"]
        assert list(split.examples["input_ids"]) == expected
        assert split.lengths.tolist() == [len(ids) for ids in expected]
        assert (split.lengths.dtype, split.weights.dtype) == (np.int32, np.float32)
        assert list(split.examples["labels"]) == list(rows["label"])


def test_encode_rows_equals_encode(small_recipe, tokenizer, own_cache):
    prepared = prepare(small_recipe)
    split = encode(prepared, tokenizer, small_recipe).splits["test"]
    rows = [dict(row) for row in prepared.splits["test"]]
    again = encode_rows(rows, tokenizer, small_recipe, prepared.info)
    assert same(again.examples, split.examples)
    assert np.array_equal(again.lengths, split.lengths)


def test_the_second_run_reads_and_a_corrupt_cache_is_made_anew(small_recipe, tokenizer, own_cache, monkeypatch):
    prepared = prepare(small_recipe)
    first = encode(prepared, tokenizer, small_recipe)
    calls = []
    kind = type(small_recipe.task)
    real = kind.encode
    monkeypatch.setattr(kind, "encode", lambda self, *given: calls.append(1) or real(self, *given))
    assert same(encode(prepared, tokenizer, small_recipe).splits["train"].examples, first.splits["train"].examples)
    assert calls == []
    for victim in [*own_cache.glob("encoded/*/train.arrow"), *own_cache.glob("encoded/*/manifest.json")]:
        held = bytearray(victim.read_bytes())
        held[len(held) // 2] ^= 1
        before = first.splits["train"].examples.to_dict()
        victim.unlink()  # the mapped file of ``first`` stays whole
        victim.write_bytes(held)
        calls.clear()
        assert encode(prepared, tokenizer, small_recipe).splits["train"].examples.to_dict() == before
        assert calls
    (entry,) = own_cache.glob("prepared/[0-9a-f]*")
    (entry / "canonical.arrow").unlink()
    assert same(prepare(small_recipe).splits["train"], prepared.splits["train"])


def test_an_edit_of_the_file_is_seen(small_recipe, tmp_path, own_cache):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *((f"text {index}", index % 2) for index in range(40))])
    recipe = replace(small_recipe, data={"source": str(path)})
    before = prepare(recipe)
    stamp = path.stat()
    path.write_text(path.read_text().replace("text 17,", "TEXT 17,"))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert prepare(recipe).fingerprint != before.fingerprint


def test_fingerprints_follow_what_they_depend_on(small_recipe, tokenizer, own_cache):
    def prints(recipe):
        prepared = prepare(recipe)
        return prepared.fingerprint, encode(prepared, tokenizer, recipe).fingerprint

    base = prints(small_recipe)
    assert prints(small_recipe) == base
    assert prints(replace(small_recipe, training={"learning_rate": 1.0, "seed": 5}, name="x")) == base
    longer = prints(replace(small_recipe, data={"max_length": 16}))
    assert longer[0] == base[0]
    assert longer[1] != base[1]
    assert prints(replace(small_recipe, data={"split_seed": 1}))[0] != base[0]


def test_the_tokenizer_s_print_ignores_its_padding_state(small_recipe, tokenizer):
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=3)
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.chat_template = "{{ messages }}"
    assert tokenizer_fingerprint(tokenizer) != before


def test_several_processes_make_one_entry(small_recipe, own_cache):
    code = (
        "import sys; from peftkit.schema.recipe import Recipe; from peftkit.data.pipeline import prepare\n"
        "p = prepare(Recipe.from_yaml(sys.argv[1])); print(p.fingerprint, len(p.splits['train']))"
    )
    own_cache.mkdir()
    path = own_cache / "recipe.yaml"
    path.write_text(small_recipe.to_yaml())
    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(lambda _: warm.run([sys.executable, "-c", code, str(path)], timeout=120), range(3)))
    assert len({each.stdout for each in done}) == 1
    assert done[0].stdout.strip()
    assert len([entry for entry in (own_cache / "prepared").iterdir() if entry.is_dir()]) == 1


def test_preparing_needs_no_torch(small_recipe, own_cache):
    code = (
        "import sys, datasets; before = set(sys.modules)  # datasets before 5 imports torch\n"
        "from peftkit.schema.recipe import Recipe; from peftkit.data.pipeline import prepare\n"
        "prepare(Recipe.from_yaml(sys.argv[1]))\n"
        "print(sorted({'torch', 'transformers', 'peft'} & (set(sys.modules) - before)))"
    )
    own_cache.mkdir()
    (own_cache / "recipe.yaml").write_text(small_recipe.to_yaml())
    argv = [sys.executable, "-c", code, str(own_cache / "recipe.yaml")]
    assert subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "kind" / "entry"

    def fail():
        with cache.new_entry(path) as folder:
            (folder / "half").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(path.parent.iterdir()) == []
    with cache.new_entry(path) as folder:
        (folder / "whole").write_text("x")
    assert cache.is_intact(path)
    with cache.new_entry(path) as folder:
        (folder / "whole").write_text("y")
    assert (path / "whole").read_text() == "y"
    assert [child.name for child in path.parent.iterdir()] == ["entry"]
    (path / "whole").write_text("z")
    assert not cache.is_intact(path)


def test_augmentation_adds_copies_to_training_alone(small_recipe, own_cache):
    plain = prepare(small_recipe)
    recipe = replace(small_recipe, data={"augmentation": {"copies": 2, "swap": 0.2, "typo": 0.2}})
    held = prepare(recipe)
    count = len(plain.splits["train"])
    assert 2 * count < len(held.splits["train"]) <= 3 * count
    assert held.splits["train"][:count] == plain.splits["train"][:]
    for name in ("validation", "test"):
        assert same(held.splits[name], plain.splits[name])
    originals = {
        (file, line): label
        for file, line, label in zip(*(plain.splits["train"][n] for n in ("_file", "_line", "label")))
    }
    for row in held.splits["train"].select(range(count, len(held.splits["train"]))):
        assert originals[(row["_file"], row["_line"])] == row["label"]
    assert prepare(recipe).fingerprint == held.fingerprint != plain.fingerprint
    other = prepare(replace(recipe, training={"seed": 1}))
    assert other.fingerprint != held.fingerprint


def test_each_kind_of_change_does_what_it_says():
    text = "one two three  four five\nsix seven eight nine ten"

    def changed(**shares):
        config = AugmentationConfig(**{"swap": 0, "delete": 0, "typo": 0, **shares})
        return change(text, config, np.random.Generator(np.random.PCG64(0)))

    assert changed() == text
    assert sorted(changed(swap=0.3).split()) == sorted(text.split())
    assert changed(swap=0.3) != text
    assert len(changed(delete=0.3).split()) == 7
    misspelt = changed(typo=0.5).split()
    assert [sorted(word) for word in misspelt] == [sorted(word) for word in text.split()]
    assert misspelt != text.split()
    assert len(changed(delete=0.99).split()) >= 1

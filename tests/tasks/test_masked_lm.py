"""Documents as windows for masked language modeling, and texts with masks to fill."""

import itertools

import pytest
from transformers import AutoTokenizer

from peftkit.errors import DataError, ModelError, RecipeError
from peftkit.heads.masks import IGNORE, NO_WORD
from peftkit.schema.recipe import DataConfig, Recipe
from peftkit.schema.types import TaskInfo
from peftkit.tasks.masked_lm import MaskedLanguageModeling, windows
from tests import tiny

INFO = TaskInfo("masked_lm")
DOCUMENT = "the terrible player was loved by the market. the bank of gold thanked them, and said no to the world"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        kind: AutoTokenizer.from_pretrained(tiny.tiny_tokenizer(folder / kind, kind))
        for kind in ("wordpiece", "distilbert", "roberta", "gpt2")
    }


def encode(texts, tokenizer, max_length=16, fill=False, **fields):
    task = MaskedLanguageModeling(**fields)
    rows = {"text": list(texts)} | ({"fill": [True] * len(texts)} if fill else {})
    return task.encode(rows, tokenizer, DataConfig(source="x", max_length=max_length), INFO)


@pytest.mark.parametrize("kind", ["wordpiece", "distilbert", "roberta"])
@pytest.mark.parametrize("max_length", [7, 16, 128])
def test_windows_lose_nothing_and_cut_no_word_that_fits(tokenizers, kind, max_length):
    tokenizer = tokenizers[kind]
    columns = encode(["", DOCUMENT, "hello"], tokenizer, max_length)
    opening, closing = tokenizer("hello")["input_ids"][0], tokenizer("hello")["input_ids"][-1]
    assert max(map(len, columns["input_ids"])) <= max_length
    assert all(ids[0] == opening and ids[-1] == closing for ids in columns["input_ids"])
    assert set(columns["row"]) == {1, 2}  # an empty document has nothing to predict
    joined = [token for ids, row in zip(columns["input_ids"], columns["row"]) if row == 1 for token in ids[1:-1]]
    assert joined == tokenizer(DOCUMENT, add_special_tokens=False)["input_ids"]
    for words in columns["words"]:
        assert words[0] == words[-1] == NO_WORD
    parts = [words[1:-1] for words, row in zip(columns["words"], columns["row"]) if row == 1]
    longest = max(sum(word == one for part in parts for one in part) for word in {w for part in parts for w in part})
    if longest <= max_length - 2:
        assert all(before[-1] != after[0] for before, after in itertools.pairwise(parts))
    assert ("token_type_ids" in columns) == (kind == "wordpiece")
    for labels, weight in zip(columns["labels"], columns["weight"]):
        assert weight == sum(label != IGNORE for label in labels) >= 1


def test_windows_of_a_document_are_of_about_equal_length():
    assert list(windows(range(100), 40)) == [(0, 34), (34, 67), (67, 100)]
    assert list(windows([0] * 10, 4)) == [(0, 4), (4, 7), (7, 10)]  # a word that fills windows is cut
    assert list(windows([0, 1, 1, 1, 2, 2], 4)) == [(0, 1), (1, 4), (4, 6)]
    assert list(windows([], 4)) == []


def test_mask_probability_and_whole_word_change_what_is_predicted(tokenizers):
    tokenizer = tokenizers["wordpiece"]
    few, many = (sum(encode([DOCUMENT], tokenizer, 64, mask_probability=p)["weight"]) for p in (0.1, 0.4))
    assert many == pytest.approx(4 * few, abs=3)
    single, whole = (encode([DOCUMENT], tokenizer, 64, mask_probability=0.4, whole_word=w) for w in (False, True))
    assert single["labels"] != whole["labels"]
    words, labels = whole["words"][0], whole["labels"][0]
    hidden = {word for word, label in zip(words, labels) if label != IGNORE}
    assert all(label != IGNORE for word, label in zip(words, labels) if word in hidden)


def test_texts_to_fill_are_read_around_their_masks(tokenizers):
    tokenizer = tokenizers["wordpiece"]
    columns = encode(["the [MASK] of", f"{DOCUMENT} [MASK] and [MASK] {DOCUMENT}"], tokenizer, 16, fill=True)
    mask = tokenizer.mask_token_id
    assert columns["masks"] == [1, 2]
    assert [ids.count(mask) for ids in columns["input_ids"]] == [1, 2]
    assert len(columns["input_ids"][1]) == 16
    assert abs(columns["input_ids"][1].index(mask) - 7) <= 2  # in the middle
    assert [sum(label != IGNORE for label in labels) for labels in columns["labels"]] == [1, 2]
    with pytest.raises(DataError, match=r"'the king of' has no \[MASK\]: write it in place of each word"):
        encode(["the king of"], tokenizer, 16, fill=True)
    with pytest.raises(DataError, match=r"masks .* tokens apart, and a window has 14"):
        encode([f"[MASK] {DOCUMENT} [MASK]"], tokenizer, 16, fill=True)


def test_a_text_that_spells_the_mask_token_is_reported_and_not_predicted(tokenizers, caplog):
    columns = encode(["the [MASK] of"], tokenizers["wordpiece"], mask_probability=0.9)
    assert "1 of 1 rows spell control tokens ([MASK])" in caplog.text
    assert columns["words"][0][2] == NO_WORD


def test_a_tokenizer_without_mask_token_is_refused(tokenizers):
    with pytest.raises(ModelError, match=r"no mask token.*choose an encoder.*task.kind=style"):
        encode([DOCUMENT], tokenizers["gpt2"])


def test_a_window_longer_than_the_model_is_refused(tokenizers):
    with pytest.raises(RecipeError, match=r"data.max_length is 512, but this base model reads 128 tokens"):
        encode([DOCUMENT], tokenizers["wordpiece"], 512)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"mask_probability": 0}, "task.mask_probability"),
        ({"mask_probability": 1.5}, "task.mask_probability"),
        ({"replacement_shares": [0.8, 0.1, 0.2]}, "three shares that add up to 1, found 0.8, 0.1, 0.2"),
        ({"candidates": 0}, "task.candidates"),
        ({"whole_words": True}, "whole_word"),
    ],
)
def test_wrong_fields_are_one_message(task, message):
    values = {"name": "x", "model": {"source": "x"}, "data": {"source": "x"}, "task": {"kind": "masked_lm", **task}}
    with pytest.raises(RecipeError, match=message):
        Recipe.parse(values)


def test_methods_that_leave_the_encoder_as_it_is_are_refused():
    values = {"name": "x", "model": {"source": "x"}, "data": {"source": "x"}, "task": {"kind": "masked_lm"}}
    for kind, message in (("prompt_tuning", "changes no weight of the encoder"), ("frozen", "masked_lm has none")):
        with pytest.raises(RecipeError, match=message):
            Recipe.parse({**values, "method": {"kind": kind}})

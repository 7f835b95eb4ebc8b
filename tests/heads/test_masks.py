"""What is hidden from a masked language model, and by what."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from peftkit.heads.masks import IGNORE, NO_WORD, Masking
from tests import tiny

TEXT = "the terrible player was loved by the market and the bank of gold thanked them " * 40


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(tiny.tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), "wordpiece"))


@pytest.fixture(scope="module")
def row(tokenizer):
    encoded = tokenizer(TEXT, verbose=False)
    words = [NO_WORD if word is None else word for word in encoded.word_ids(0)]
    return encoded["input_ids"], words


def hidden(labels):
    return {place for place, label in enumerate(labels) if label != IGNORE}


@pytest.mark.parametrize("probability", [0.0001, 0.15, 0.5])
def test_the_share_of_the_field_is_hidden_but_no_special_token(row, tokenizer, probability):
    ids, words = row
    after, labels = Masking(probability).hide(ids, words, tokenizer)
    places = hidden(labels)
    assert len(places) == max(1, round(probability * (len(ids) - 2)))
    assert not places & {0, len(ids) - 1}
    assert all(labels[place] == ids[place] for place in places)
    assert all(after[place] == ids[place] for place in range(len(ids)) if place not in places)


def test_a_mask_is_a_function_of_key_and_row_alone(row, tokenizer):
    ids, words = row
    masking = Masking()
    again = masking.hide(list(ids), list(words), tokenizer, (3, 1))
    assert again == masking.hide(ids, words, tokenizer, (3, 1))
    others = [masking.hide(ids, words, tokenizer, key) for key in ((), (3, 0), (3, 2), (4, 1))]
    assert all(hidden(one[1]) != hidden(again[1]) for one in others)
    changed = [ids[0], ids[1] + 1, *ids[2:]]
    assert hidden(masking.hide(changed, words, tokenizer, (3, 1))[1]) != hidden(again[1])


def test_hidden_tokens_are_replaced_by_the_shares(row, tokenizer):
    ids, words = row
    after, labels = Masking(0.9, shares=(0.5, 0.3, 0.2)).hide(ids, words, tokenizer)
    places = sorted(hidden(labels))
    masked = np.mean([after[place] == tokenizer.mask_token_id for place in places])
    same = np.mean([after[place] == ids[place] for place in places])
    assert masked == pytest.approx(0.5, abs=0.06)
    assert same == pytest.approx(0.2, abs=0.06)  # a random token is rarely the same one
    others = {after[place] for place in places} - {tokenizer.mask_token_id}
    assert not others & set(tokenizer.all_special_ids)
    all_masked, _ = Masking(0.9, shares=(1.0, 0.0, 0.0)).hide(ids, words, tokenizer)
    assert all(all_masked[place] == tokenizer.mask_token_id for place in places)


def test_whole_words_are_hidden_together(row, tokenizer):
    ids, words = row
    whole, single = (Masking(0.2, whole_word=flag).hide(ids, words, tokenizer)[1] for flag in (True, False))

    def cut(labels):
        """Words of which some tokens are hidden, and some are not."""
        places = hidden(labels)
        inside = {words[place] for place in places}
        return {word for place, word in enumerate(words) if word in inside and place not in places}

    assert not cut(whole)
    assert cut(single)
    assert 0.15 * len(ids) < len(hidden(whole)) <= round(0.2 * (len(ids) - 2))


def test_a_row_of_one_long_word_is_hidden_as_a_whole(tokenizer):
    labels = Masking(0.15, whole_word=True).hide([2, 40, 41, 42, 3], [-1, 0, 0, 0, -1], tokenizer)[1]
    assert hidden(labels) == {1, 2, 3}

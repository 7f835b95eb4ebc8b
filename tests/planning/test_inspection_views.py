"""Inspection: its figures against counting by hand, and its pages."""

from __future__ import annotations

import json
from dataclasses import replace as change

import numpy as np
import pytest

from peftkit import get_recipe
from peftkit.data.pipeline import encode, prepare
from peftkit.models.tokenizer import load_tokenizer
from peftkit.planning.inspection import Example, Token, histogram, inspect, token_texts
from peftkit.reporting.inspection import as_text, example_html, write_html
from peftkit.schema.recipe import Recipe, replace
from tests.tiny import WORDS


def test_figures_equal_those_counted_by_hand(small_recipe):
    recipe = replace(small_recipe, data={"max_length": 12})
    found = inspect(recipe)
    prepared = prepare(recipe)
    tokenizer = load_tokenizer(recipe.model)
    encoded = encode(prepared, tokenizer, recipe)
    for split in found.splits:
        full = [len(tokenizer(text)["input_ids"]) for text in prepared.splits[split.name]["text"]]
        assert split.rows == len(full)
        assert split.truncated_examples == sum(length > 12 for length in full) > 0
        assert split.truncated_tokens == sum(max(0, length - 12) for length in full)
        assert split.tokens == sum(min(12, length) for length in full)
        assert split.quantiles["100%"] == 12
        assert sum(bar.examples for bar in split.histogram) == len(full)
        assert sum(split.classes.values()) == split.rows
        assert split.supervised is None
        assert 0 <= split.padding < 1
    shown = found.splits[0].shown[0]
    ids = encoded.splits["train"].examples["input_ids"][0]
    assert [token.text for token in shown.tokens if token.special] == ["[CLS]", "[SEP]"]
    assert len(shown.tokens) == len(ids)
    assert shown.label in prepared.info.labels


@pytest.mark.parametrize("lengths", [[5], [1, 1, 1], [1, 2], list(range(1, 200)), [3, 500]])
def test_every_example_stands_in_one_bar(lengths):
    bars = histogram(np.array(lengths))
    assert len(bars) <= 20
    for length in lengths:
        assert sum(bar.low <= length <= bar.high for bar in bars) == 1
    assert sum(bar.examples for bar in bars) == len(lengths)
    assert bars[-1].high == max(lengths)


def test_token_texts_join_to_the_decoded_text(llama):
    tokenizer = load_tokenizer(
        Recipe.parse({"name": "r", "model": {"source": str(llama)}, "data": {"source": "x"}}).model
    )
    text = "the world 👩‍👧 is good; ünïcode\n\tnew   day " * 30
    ids = tokenizer(text)["input_ids"]
    assert "".join(token_texts(ids, tokenizer)) == tokenizer.decode(ids)
    assert len(token_texts(ids, tokenizer)) == len(ids)


def test_supervised_tokens_are_shown_and_counted(llama, tmp_path):
    rows = [{"prompt": f"what is the {index}", "completion": f"a good day {index}"} for index in range(30)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    values = {"name": "r", "model": {"source": str(llama)}, "task": "instruction", "data": {"source": str(path)}}
    found = inspect(Recipe.parse(values))
    split = found.splits[0]
    assert 0 < split.supervised < 1
    text = "".join(token.text for token in split.shown[0].tokens if token.supervised)
    assert text.startswith("a good day")
    coloured = as_text(found, color=True, width=120)
    assert "\x1b[1;32m" in coloured
    assert "supervised" in coloured


def test_pages_escape_and_stand_alone(small_recipe, tmp_path):
    found = inspect(small_recipe)
    first = found.splits[0]
    evil = change(first.shown[0], tokens=(Token("<script>alert(1)</script>[bold]", False, True),), label="<b>")
    found = change(found, splits=(change(first, shown=(evil,)), *found.splits[1:]), name="<i>x</i>")
    write_html(found, tmp_path / "sub" / "page.html")
    page = (tmp_path / "sub" / "page.html").read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "<i>x" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "http" not in page
    text = as_text(found, color=False, width=160)
    assert "<script>alert(1)</script>[bold]" in text
    assert "\x1b" not in text
    assert json.loads(json.dumps(found.as_dict()))["splits"][0]["rows"] == first.rows


def test_an_example_by_itself_has_a_ground_under_what_is_learned_and_is_escaped():
    tokens = (Token("<b>", False, False), Token("<i>&", False, True), Token("\n", True, True))
    page = example_html(Example("rows.jsonl:3", "", tokens, 0))
    assert page.count("background") == 2
    assert "<b>" not in page
    assert "&lt;i&gt;&amp;</span>" in page.split("background")[1]
    assert "⏎" in page.split("background")[2]


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"source": str(path), "max_length": 32, "cleaning": {"near_duplicates": "off"}}


def test_tags_are_shown_at_their_words_and_counted_in_words(bert, tmp_path):
    rows = [{"text": f"the king {word} x", "spans": [{"start": 4, "end": 8, "label": "person"}]} for word in WORDS[:20]]
    data = lines(tmp_path / "spans.jsonl", rows)
    found = inspect(replace(get_recipe("own_entities"), model={"source": str(bert)}, data=data))
    assert found.class_unit == "words"
    assert {name: round(shares[0][1], 3) for name, shares in found.class_shares.items()} == {"O": 0.75, "person": 0.25}
    text = as_text(found, color=False, width=120)
    assert "king[B-person]" in text
    assert "Classes (words)" in text
    assert "task token_classification, at most" in text
    write_html(found, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<sub>B-person</sub>" in page
    assert "(25.0%)" in page
    assert "<sub>B-person</sub>" in example_html(found.splits[0].shown[0])


def test_answers_and_the_texts_of_a_pair_are_shown(bert, tmp_path):
    rows = [{"question": "who?", "context": f"the {word} king", "answers": f"{word} king"} for word in WORDS[:20]]
    data = lines(tmp_path / "questions.jsonl", rows)
    found = inspect(replace(get_recipe("own_questions"), model={"source": str(bert)}, data=data))
    assert " king[answer][SEP]" in as_text(found, color=False, width=120)
    rows = [{"question": f"what {word}", "passage": f"the {word} king"} for word in WORDS[:20]]
    data = lines(tmp_path / "pairs.jsonl", rows)
    found = inspect(replace(get_recipe("own_retrieval"), model={"source": str(bert)}, data=data))
    first, second = found.splits[0].shown[:2]
    assert (first.part, second.part, first.label) == ("first", "second", "")
    assert "at most 32 tokens per text, " in as_text(found, color=False, width=120)
    assert second.tokens[0].text == "[CLS]"
    write_html(found, tmp_path / "page.html")
    assert " · second" in (tmp_path / "page.html").read_text(encoding="utf-8")

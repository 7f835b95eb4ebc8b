"""Documents become full windows: no token lost, every one scored once, none that sees another document."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from peftkit.data.batching import collate
from peftkit.errors import DataError, ModelError, RecipeError
from peftkit.heads.causal_lm import NAME, CausalLM
from peftkit.schema.recipe import DataConfig, EvaluationConfig
from peftkit.schema.types import TaskInfo
from peftkit.tasks.style import Style, tokens_of
from peftkit.tasks.windows import stream
from tests.tiny import WORDS, tiny_llama, tiny_tokenizer

HEAD = CausalLM(TaskInfo(NAME))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def config(**fields):
    return DataConfig(source="unused", **{"max_length": 16, **fields})


def texts(count, seed=0):
    chance = np.random.default_rng(seed)
    return [" ".join(chance.choice(WORDS, size=chance.integers(1, 40))) for _ in range(count)]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=12), st.integers(2, 17))
def test_every_token_but_a_documents_first_is_scored_exactly_once(lengths, size):
    numbers = iter(range(10_000))
    documents = [(row, [next(numbers) for _ in range(length)]) for row, length in enumerate(lengths)]
    windows = list(stream(documents, size))
    scored = [label for window in windows for part in window for label in part.labels if label != -100]
    assert scored == [token for _, ids in documents for token in ids[1:]]
    for window in windows:
        assert all(part.labels[0] == -100 and part.weight >= 1 for part in window)
    filled = [sum(len(part.ids) for part in window) for window in windows]
    assert all(size - 1 <= count <= size for count in filled[:-1])
    assert all(count <= size for count in filled)


def test_windows_hold_the_documents_in_order_with_positions_that_restart(tokenizer):
    rows = texts(30)
    made = Style().encode({"text": rows}, tokenizer, config(), None)
    documents = tokens_of(rows, tokenizer)
    assert all(ids[-1] == tokenizer.eos_token_id for ids in documents)
    assert sum(made["weight"]) == sum(len(ids) - 1 for ids in documents)
    rebuilt: list[list[int]] = []
    for ids, labels, positions in zip(made["input_ids"], made["labels"], made["position_ids"], strict=True):
        for token, label, position in zip(ids, labels, positions, strict=True):
            assert (label == -100) == (position == 0)
            goes_on = bool(rebuilt) and rebuilt[-1][-1] != tokenizer.eos_token_id
            if position == 0 and goes_on:
                assert token == rebuilt[-1][-1]  # the token it had last, as context
            elif position == 0:
                rebuilt.append([token])
            else:
                rebuilt[-1].append(token)
    assert rebuilt == documents
    held = {row + offset for row, offsets in zip(made["row"], made["row_offsets"]) for offset in offsets}
    assert held == set(range(30))


def test_without_packing_a_window_holds_one_document(tokenizer):
    rows = texts(10)
    made = Style(packing=False).encode({"text": rows}, tokenizer, config(), None)
    assert "position_ids" not in made
    assert all(offsets == [0] for offsets in made["row_offsets"])
    assert sum(made["weight"]) == sum(len(ids) - 1 for ids in tokens_of(rows, tokenizer))


def test_the_loss_is_that_of_the_documents_alone(folder, tokenizer):
    """Against transformers' own loss on each document by itself, for documents that fit a window."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    rows, data, task = ["the king said no", "world bank money", "yes", "why not they"], config(max_length=128), Style()
    made = task.encode({"text": rows}, tokenizer, data, None)
    assert len(made["input_ids"]) == 1
    outputs = HEAD.outputs(model, collate(made, tokenizer), "own")
    figures = HEAD.metrics({name: value.numpy() for name, value in outputs.items()}, EvaluationConfig())
    total, right, tokens = 0.0, 0, 0
    for ids in tokens_of(rows, tokenizer):
        tensor = torch.tensor([ids])
        with torch.no_grad():
            result = model(input_ids=tensor, labels=tensor)
        total += float(result.loss) * (len(ids) - 1)
        right += int((result.logits[0, :-1].argmax(-1) == tensor[0, 1:]).sum())
        tokens += len(ids) - 1
    assert figures["tokens"] == tokens
    assert figures["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(np.exp(total / tokens), rel=1e-5)
    assert figures["token_accuracy"] == pytest.approx(right / tokens)
    loss = HEAD.loss(model, collate(made, tokenizer), "own")
    assert float(loss.detach()) == pytest.approx(total, rel=1e-5)


def test_documents_begin_with_bos_where_the_tokenizer_puts_one(tmp_path):
    roberta = AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path / "r", "roberta"))
    gpt2 = AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path / "g", "gpt2"))
    (with_bos,), (without,) = tokens_of(["the king"], roberta), tokens_of(["the king"], gpt2)
    assert (with_bos[0], with_bos[-1]) == (roberta.bos_token_id, roberta.eos_token_id)
    assert roberta.decode(with_bos[1:-1]) == "the king"
    assert gpt2.decode(without) == "the king<|endoftext|>"


def test_the_prompt_is_the_documents_first_words_as_they_stand():
    row = {"text": " In the  beginning\nGod created the heaven"}
    assert Style(prompt_words=4).prompt(row) == (" In the  beginning\nGod", " created the heaven")
    assert Style(prompt_words=99).prompt(row) == (row["text"], "")


def test_wrong_rows_and_settings_are_refused(tokenizer, tmp_path):
    from datasets import Dataset

    task = Style()
    with pytest.raises(
        DataError, match=r"column 'text': no such column: did you mean 'texts'\? The columns are: texts; set data.text"
    ):
        task.describe({"train": Dataset.from_dict({"texts": ["a"]})}, config())
    with pytest.raises(DataError, match="column 'text': expected text, found int '3'"):
        task.canonical({"text": 3}, config(), None)
    with pytest.raises(RecipeError, match=r"data\.augmentation=null"):
        task.describe({"train": Dataset.from_dict({"text": ["a"]})}, config(augmentation={}))
    with pytest.raises(RecipeError, match=r"data\.max_length is 300, but this base model reads 256 tokens"):
        task.encode({"text": ["a"]}, tokenizer, config(max_length=300), None)
    endless = AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path, "gpt2"))
    endless.eos_token = None
    with pytest.raises(ModelError, match="no end-of-text token"):
        task.encode({"text": ["a"]}, endless, config(), None)


def test_a_null_document_is_an_empty_one():
    row = {"text": None, "_file": "a.txt", "_line": 3, "_document": "Genesis", "book": "Genesis"}
    made = Style().canonical(row, config(), None)
    assert made == {"text": ""}
    assert Style().text_of(made) == ""


def test_documents_that_spell_control_tokens_are_warned_of(llama, caplog):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    rows = {"text": ["one <|endoftext|> two", "a plain one"], "_file": ["book.txt"] * 2, "_line": [1, 9]}
    Style().encode(rows, tokenizer, DataConfig(source="book.txt"), TaskInfo("causal_lm"))
    assert "1 of 2 rows spell control tokens (<|endoftext|>)" in caplog.text
    assert "(book.txt:1)" in caplog.text

"""Preference rows in every format, what is refused of them, and which tokens of their answers are scored."""

from __future__ import annotations

import json
import logging

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from peftkit.data.pipeline import prepare
from peftkit.errors import DataError, RecipeError
from peftkit.heads.preference_losses import MARKS, PAIRS
from peftkit.schema.overrides import apply
from peftkit.schema.recipe import DataConfig
from peftkit.schema.types import TaskInfo
from peftkit.tasks.preference import Preference
from tests.tiny import tiny_recipe, tiny_tokenizer

ASKED, OTHER = {"role": "user", "content": "Hi"}, {"role": "user", "content": "Bye"}
GOOD, BAD = {"role": "assistant", "content": "Hello"}, {"role": "assistant", "content": "What"}
PAIR = {"messages": [ASKED], "chosen": [GOOD], "rejected": [BAD]}
MARKED = {"messages": [ASKED], "answer": [GOOD], "desirable": True}


def config(**fields):
    return DataConfig(source="unused", **{"max_length": 128, **fields})


def canonical(row, loss="dpo", **fields):
    return Preference(loss=loss).canonical(row, config(**fields), None)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), "chatml"))


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"prompt": "Hi", "chosen": "Hello", "rejected": "What"}, {}),
        ({"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]}, {}),
        ({"prompt": [ASKED], "chosen": json.dumps([GOOD]), "rejected": json.dumps([BAD])}, {}),
        ({"instruction": "Hi", "input": "", "chosen": "Hello", "rejected": "What"}, {}),
        ({"messages": [ASKED], "chosen": [GOOD], "rejected": [BAD]}, {}),
        (
            {
                "conversations": [{"from": "human", "value": "Hi"}],
                "chosen": [{"from": "gpt", "value": "Hello"}],
                "rejected": [{"from": "gpt", "value": "What"}],
            },
            {},
        ),
        ({"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, {}),
        ({"prompt": "Hi", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, {}),
        (
            {"question": "Hi", "better": "Hello", "worse": "What"},
            {"columns": {"prompt": "question", "chosen": "better", "rejected": "worse"}},
        ),
        (
            {"q": "Hi", "prompt": 3, "chosen": "Hello", "rejected": "What"},
            {"format": "alpaca", "columns": {"instruction": "q"}},
        ),
    ],
)
def test_every_format_of_pairs_is_read_as_the_same(row, fields):
    assert canonical(row, **fields) == PAIR


def test_one_turn_may_stand_for_a_list_of_one():
    row = {"conversations": [{"from": "human", "value": "Hi"}]}
    row |= {"chosen": {"from": "gpt", "value": "Hello"}, "rejected": {"from": "gpt", "value": "What"}}
    assert canonical(row) == PAIR


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"messages": [ASKED, GOOD], "label": True}, {}),
        ({"messages": [ASKED, GOOD], "label": "good"}, {}),
        ({"prompt": "Hi", "completion": "Hello", "label": 1}, {}),
        ({"prompt": "Hi", "completion": "Hello", "kto_tag": 1.0}, {"label": "kto_tag"}),
        ({"instruction": "Hi", "output": "Hello", "label": " Yes"}, {}),
        ({"prompt": [ASKED], "reference": "x", "base": "y", "finetuned": "Hello", "mark": "good", "line": 3}, {}),
    ],
)
def test_every_format_of_marks_is_read_as_the_same(row, fields):
    assert canonical(row, "kto", **fields) == MARKED


@pytest.mark.parametrize("label", [False, 0, "bad", "no", "undesirable"])
def test_bad_answers_are_kept_and_marked(label):
    assert canonical({"messages": [ASKED, GOOD], "label": label}, "kto") == {**MARKED, "desirable": False}


def test_several_turns_a_system_prompt_and_a_shared_beginning():
    start, more = [ASKED, GOOD, OTHER], {"role": "assistant", "content": "Later"}
    row = canonical({"chosen": [*start, GOOD], "rejected": [*start, BAD]}, system="Be kind.")
    assert row["messages"] == [{"role": "system", "content": "Be kind."}, *start]
    row = canonical({"prompt": "Hi", "chosen": [GOOD, OTHER, more], "rejected": [BAD]})
    assert row["chosen"] == [GOOD, OTHER, more]
    assert canonical({**{"prompt": "Hi", "chosen": "Hello", "rejected": "What"}, "system": "Be."})["messages"][0] == {
        "role": "system", "content": "Be."
    }  # fmt: skip


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "Hi", "chosen": "Hello", "rejected": "Hello"}, "column 'rejected': equal to chosen, so there is"),
        ({"prompt": "Hi", "chosen": "Hello", "rejected": " "}, "column 'rejected': the answer is empty"),
        ({"prompt": "Hi", "chosen": None, "rejected": "x"}, "column 'chosen': expected text, found nothing"),
        (
            {"prompt": "Hi", "chosen": [GOOD, GOOD], "rejected": "x"},
            "column 'chosen': turns 2 and 3 are both the assis",
        ),
        ({"prompt": "Hi", "chosen": [GOOD, OTHER], "rejected": "x"}, "'chosen': the last turn is the user's"),
        ({"messages": [ASKED, GOOD], "chosen": "a", "rejected": "b"}, "'chosen': turns 2 and 3 are both the assistant"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "column 'prompt': expected text, found int '3'"),
        (
            {"chosen": "a", "rejected": "b"},
            "there is no prompt: expected one of conversations, messages, prompt, instr",
        ),
        ({"chosen": [ASKED, GOOD], "rejected": [OTHER, BAD]}, "column 'rejected': .* do not begin alike"),
        (
            {"prompt": "Bye", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
            "column 'prompt': holds another prompt than the conversations",
        ),
        (
            {"prompt": "Hi", "chosen": {"role": "tool", "content": "x"}, "rejected": "b"},
            "column 'chosen': turn 2: role",
        ),
    ],
)
def test_a_bad_pair_is_one_message_that_names_the_column(row, said):
    with pytest.raises(DataError, match=said):
        canonical(row)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [ASKED, GOOD], "label": "maybe"}, "column 'label': expected true or false, .* found 'maybe'"),
        ({"messages": [ASKED, GOOD], "label": None}, r"column 'label': .* found nothing \(null\)"),
        ({"messages": [ASKED, GOOD], "label": 2}, "column 'label': .* found 2"),
        ({"messages": [ASKED], "label": True}, "no assistant turn"),
        ({"messages": [ASKED, GOOD, OTHER], "label": True}, "the last turn must be the assistant's"),
        ({"prompt": "Hi", "completion": " ", "label": True}, "column 'completion': the answer is empty"),
        ({"prompt": "Hi", "finetuned": "x", "mark": None}, "column 'mark': this generation has no mark; .*--bad"),
    ],
)
def test_a_bad_mark_is_one_message_that_names_the_column(row, said):
    with pytest.raises(DataError, match=said):
        canonical(row, "kto")


@pytest.mark.parametrize(
    ("loss", "names", "fields", "said"),
    [
        ("dpo", ["prompt", "choosen", "rejected"], {}, "'choosen'.*data.columns.chosen=NAME"),
        ("dpo", ["messages", "label"], {}, "task.loss=kto"),
        (
            "dpo",
            ["prompt", "chosen", "rejected"],
            {"format": "sharegpt"},
            "column 'conversations': data.format=sharegpt",
        ),
        ("kto", ["prompt", "chosen", "rejected"], {}, "data.label=NAME; .*task.loss=dpo"),
        ("kto", ["question", "label"], {}, "expected the columns of one of the instruction formats"),
        (
            "dpo",
            ["prompt", "chosen", "rejected"],
            {"columns": {"prompt": "q"}},
            "names this column, which is not there",
        ),
    ],
)
def test_missing_columns_are_named_with_what_to_set(loss, names, fields, said):
    rows = Dataset.from_list([dict.fromkeys(names, "x")])
    with pytest.raises(DataError, match=said):
        Preference(loss=loss).describe({"train": rows}, config(**fields))


def test_settings_that_cannot_work_are_refused():
    rows = Dataset.from_list([{"prompt": "x", "chosen": "y", "rejected": "z", "label": True, "completion": "w"}])
    assert Preference().describe({"train": rows}, config()).problem_type == PAIRS
    assert Preference(loss="kto").describe({"train": rows}, config()).problem_type == MARKS
    with pytest.raises(RecipeError, match=r"data\.columns: 'choosen' is no field .* did you mean 'chosen'"):
        Preference().describe({"train": rows}, config(columns={"choosen": "y"}))
    with pytest.raises(RecipeError, match="learn to write them so"):
        Preference().describe({"train": rows}, config(augmentation={}))


def test_what_is_not_read_is_a_remark():
    row = {"prompt": "Hi", "chosen": "Hello", "rejected": "What", "score": 0.5, "id": None}
    assert list(Preference().remarks(row, config(), None)) == [("not_used", "score")]
    assert not list(Preference().remarks(row, config(ignore=("score",)), None))
    page = {"prompt": [ASKED], "reference": "x", "base": "y", "finetuned": "z", "mark": "bad", "file": "f", "line": 1}
    assert not list(Preference(loss="kto").remarks(page, config(), None))


def test_bad_rows_of_a_file_are_named_by_file_line_and_column_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"Hi {n}", "chosen": "Hello", "rejected": "Hello" if n == 2 else "What"} for n in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = tiny_recipe("no-model", task={"kind": "preference"}, data={"source": str(tmp_path / "rows.jsonl")})
    with pytest.raises(DataError, match=r"rows\.jsonl, line 3, column 'rejected': equal to chosen"):
        prepare(recipe)


def test_splits_keep_the_share_of_good_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"Hi {n}", "completion": f"Hello {n}", "label": n % 5 == 0} for n in range(100)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"source": str(tmp_path / "rows.jsonl"), "cleaning": {"near_duplicates": "off"}}
    recipe = tiny_recipe("no-model", task={"kind": "preference", "loss": "kto"}, data=data)
    splits = prepare(recipe).splits
    good = {name: sum(split["desirable"]) for name, split in splits.items()}
    assert good == {"train": 14, "validation": 2, "test": 4}


def encode(rows, tokenizer, loss="dpo", task=(), **fields):
    task = Preference(loss=loss, **dict(task))
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return task.encode(columns, tokenizer, config(**fields), TaskInfo(task.loss.head))


def text(ids, tokenizer):
    return tokenizer.decode(ids)


def test_only_the_answers_and_their_stop_tokens_are_scored(tokenizer):
    made = encode([PAIR], tokenizer)
    cut = made["chosen_tokens"][0]
    chosen, rejected = made["input_ids"][0][:cut], made["input_ids"][0][cut:]
    start = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert text(chosen, tokenizer) == start + "Hello<|im_end|>"
    assert text(rejected, tokenizer) == start + "What<|im_end|>"
    scored = [[label for label in part if label != -100] for part in (made["labels"][0][:cut], made["labels"][0][cut:])]
    assert [text(labels, tokenizer) for labels in scored] == ["Hello<|im_end|>", "What<|im_end|>"]
    assert made["scored"] == [sum(map(len, scored))]
    assert made["weight"] == [1.0]


def test_of_earlier_answers_nothing_is_scored_but_of_a_last_exchange_all(tokenizer):
    made = encode([{**PAIR, "messages": [ASKED, BAD, OTHER]}], tokenizer)
    cut = made["chosen_tokens"][0]
    assert text([label for label in made["labels"][0][:cut] if label != -100], tokenizer) == "Hello<|im_end|>"
    made = encode([{**PAIR, "chosen": [GOOD, OTHER, BAD]}], tokenizer)
    cut = made["chosen_tokens"][0]
    labels = [label for label in made["labels"][0][:cut] if label != -100]
    assert text(labels, tokenizer) == "Hello<|im_end|>What<|im_end|>"


def test_long_answers_are_cut_and_prompts_without_room_left_out_or_refused(tokenizer, caplog):
    long = {"role": "assistant", "content": "good " * 40}
    made = encode([{**PAIR, "chosen": [long]}], tokenizer, max_length=40)
    assert made["chosen_tokens"] == [40]
    assert made["truncated"][0] > 0
    big = {**PAIR, "messages": [{"role": "user", "content": "good " * 60}], "_file": "f.jsonl", "_line": 7}
    rows = [{**PAIR, "_file": "f.jsonl", "_line": 6}, big]
    with caplog.at_level(logging.WARNING):
        assert encode(rows, tokenizer, max_length=60)["row"] == [0]
    assert "1 of 2 rows are left out: their prompts alone fill data.max_length=60 (f.jsonl:7)" in caplog.text
    with pytest.raises(DataError, match=r"f\.jsonl, line 7, column 'messages': the prompt takes \d+ tok"):
        encode(rows, tokenizer, task={"too_long": "error"}, max_length=60)


def test_a_prompt_is_paired_with_the_answer_before_it_of_another_prompt(tokenizer):
    rows = [
        {"messages": [ASKED], "answer": [GOOD], "desirable": True},
        {"messages": [ASKED], "answer": [BAD], "desirable": False},
        {"messages": [OTHER], "answer": [{"role": "assistant", "content": "See you"}], "desirable": True},
    ]
    made = encode(rows, tokenizer, "kto")
    assert made["desirable"] == [True, False, True]
    answers = [text([label for label in labels if label != -100], tokenizer) for labels in made["mismatched_labels"]]
    assert answers == ["See you<|im_end|>", "See you<|im_end|>", "What<|im_end|>"]
    assert text(made["mismatched_ids"][2], tokenizer).startswith("<|im_start|>user\nBye<|im_end|>")
    alone = encode(rows[:2], tokenizer, "kto")
    assert {label for labels in alone["mismatched_labels"] for label in labels} == {-100}


def test_a_loss_is_swapped_by_override_whatever_the_order():
    recipe = tiny_recipe("m", task={"kind": "preference", "loss": {"kind": "dpo", "label_smoothing": 0.1}})
    for changes in (["task.loss.beta=0.3", "task.loss.kind=simpo"], ["task.loss.kind=simpo", "task.loss.beta=0.3"]):
        loss = apply(recipe, changes).task.loss
        assert (loss.kind, loss.beta, loss.gamma, loss.label_smoothing) == ("simpo", 0.3, 1.0, 0.0)
    assert apply(recipe, ["task.loss=orpo"]).task.loss.kind == "orpo"
    assert apply(recipe, ["task.loss.beta=0.3"]).task.loss.label_smoothing == 0.1


def test_the_prompt_of_a_sample_is_what_comes_before_its_last_answer():
    task = Preference()
    assert task.prompt(PAIR) == ([ASKED], "Hello")
    assert task.prompt({**PAIR, "chosen": [GOOD, OTHER, BAD]}) == ([ASKED, GOOD, OTHER], "What")
    assert Preference(loss="kto").prompt({**MARKED, "desirable": False}) == ([ASKED], "")
    assert task.as_prompt("Hi") == [ASKED]
    assert task.with_text(PAIR, str.upper)["rejected"] == [{"role": "assistant", "content": "WHAT"}]

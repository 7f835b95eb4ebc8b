"""Conversations: what is read of a row, which turns are learned, and what is refused or listed by its name."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from transformers import AutoTokenizer

from peftkit.data.pipeline import prepare
from peftkit.errors import DataError
from peftkit.schema.recipe import DataConfig, Recipe
from peftkit.tasks import conversation
from peftkit.tasks.instruction import Instruction
from tests.tiny import tiny_tokenizer

ASKED, SAID = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
PAIR = [ASKED, SAID]
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML, of which transformers itself tells the assistant's tokens (``return_assistant_tokens_mask``)."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path_factory.mktemp("chatml"), "chatml"))
    tokenizer.chat_template = MARKED
    return tokenizer


def config(**fields):
    return DataConfig(source="unused", **{"max_length": 256, **fields})


def canonical(row, train_on="assistant", **fields):
    return Instruction(train_on=train_on).canonical(row, config(**fields), None)


def messages_of(row, **fields):
    return canonical(row, **fields)["messages"]


def refusal(row, **fields):
    with pytest.raises(DataError) as caught:
        canonical(row, **fields)
    return str(caught.value)


def turns(*texts, system=None, **flags):
    """Turns of user and assistant in turn; ``flags``: key → the values of the assistant's turns."""
    start = [{"role": "system", "content": system}] if system else []
    made = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]
    for key, values in flags.items():
        for turn, value in zip(made[1::2], values, strict=True):
            turn[key] = value
    return start + made


def prepared(path, rows, **data):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return prepared_file(path, **data)


def prepared_file(path, **data):
    data = {"source": str(path), "test_size": 0, "validation_size": 2, **data}
    return prepare(
        Recipe.parse({"name": "r", "model": {"source": "./m"}, "task": {"kind": "instruction"}, "data": data})
    )


def step(data, name):
    return next((step for step in data.steps if step.name == name and step.split == "train"), None)


def by_line(data):
    return {row["_line"]: row for split in data.splits.values() for row in split}


# -- columns and spellings ------------------------------------------------------------------------------------------

FORMATS = {
    "messages": {"messages": PAIR},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "AI", "value": "Hello"}]},
    "alpaca": {"instruction": "Hi", "input": "", "output": "Hello"},
    "prompt_completion": {"prompt": "Hi", "completion": "Hello"},
}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_system_column_is_read_in_every_format(kind):
    row = FORMATS[kind]
    assert messages_of({**row, "system": "Be brief."}, system="Be kind.") == turns("Hi", "Hello", system="Be brief.")
    assert messages_of({**row, "s": "Be brief."}, columns={"system": "s"}) == turns("Hi", "Hello", system="Be brief.")
    for blank in (None, " ", float("nan")):
        assert messages_of({**row, "system": blank}) == PAIR
        assert messages_of({**row, "system": blank}, system="Be kind.") == turns("Hi", "Hello", system="Be kind.")


def test_two_system_prompts_of_a_row_must_be_one():
    row = {"messages": turns("Hi", "Hello", system="Be brief.")}
    assert messages_of({**row, "system": "Be brief."}) == row["messages"]
    assert "column 'system': holds another system prompt than the conv" in refusal({**row, "system": "Be kind."})
    assert messages_of({**row, "system": "Be kind."}, ignore=["system"]) == row["messages"]


@pytest.mark.parametrize(
    "history",
    [
        [["One?", "Yes."], ["Two?", "No."]],
        json.dumps([["One?", "Yes."], ["Two?", "No."]]),
        str([["One?", "Yes."], ["Two?", "No."]]),
        turns("One?", "Yes.", "Two?", "No."),
    ],
)
@pytest.mark.parametrize("kind", ["alpaca", "prompt_completion"])
def test_earlier_questions_and_answers_are_read(kind, history):
    expected = turns("One?", "Yes.", "Two?", "No.", "Hi", "Hello")
    assert messages_of({**FORMATS[kind], "history": history}) == expected
    assert messages_of({**FORMATS[kind], "h": history}, columns={"history": "h"}) == expected


@pytest.mark.parametrize("nothing", [None, [], "", "[]"])
def test_no_history_is_none(nothing):
    assert messages_of({**FORMATS["alpaca"], "history": nothing}) == PAIR


def test_a_history_of_another_form_is_refused():
    assert "column 'history': pair 2: expected [question, answer], found list" in refusal(
        {**FORMATS["alpaca"], "history": [["a", "b"], ["a", "b", "c"]]}
    )
    assert "column 'history': expected a list of [question, answer]" in refusal(
        {**FORMATS["alpaca"], "history": "earlier"}
    )


def test_texts_in_parts_are_one_text():
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i", "image_url": None}]
    assert messages_of({"messages": [{"role": "user", "content": parts}, SAID]}) == PAIR
    image = {"type": "image_url", "image_url": {"url": "x"}, "text": None}
    said = refusal({"messages": [{"role": "user", "content": [*parts, image]}, SAID]})
    assert "turn 1: part 3 of the content is 'image_url', and only text can be read" in said


@pytest.mark.parametrize("written", [json.dumps, str], ids=["json", "python"])
def test_a_list_in_a_cell_of_text_is_read(written):
    quoted = [{"role": "user", "content": 'She said: "it\'s [1, 2]"\n'}, SAID]
    assert messages_of({"messages": written(quoted)}) == quoted
    assert messages_of({"prompt": written(quoted[:1]), "completion": "Hello"}) == quoted
    text = written([1, 2])  # an answer that is a list is a text
    assert messages_of({"prompt": text, "completion": text}) == turns(text, text)


def test_a_table_that_pandas_wrote_holds_the_same_conversations(tmp_path):
    rows = [turns(f"Question, {n}", f'The "answer"\n{n}', system="Be brief.") for n in range(8)]
    pd.DataFrame({"messages": rows, "id": range(8)}).to_csv(tmp_path / "rows.csv", index=False)
    pd.DataFrame({"messages": rows}).to_parquet(tmp_path / "rows.parquet")
    for name in ("rows.csv", "rows.parquet"):
        held = by_line(prepared_file(tmp_path / name))
        assert [held[line]["messages"] for line in sorted(held)] == rows


def test_rows_of_one_file_may_hold_turns_of_different_types_and_keys(tmp_path):
    rows = [{"messages": turns(f"a {n}", f"b {n}")} for n in range(6)]
    rows[1] = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a 1"}]}, {**SAID, "name": "x"}]}
    rows[2]["messages"][0] |= {"tool_calls": [], "name": {"first": "x"}}
    rows[3] = {"messages": json.dumps(rows[3]["messages"]), "extra": [1, "two"]}
    held = by_line(prepared(tmp_path / "rows.jsonl", rows))
    assert held[2]["messages"] == turns("a 1", "Hello")
    assert held[3]["messages"] == turns("a 2", "b 2")
    assert held[4]["messages"] == turns("a 3", "b 3")


def test_half_a_character_is_refused_with_its_place(tmp_path):
    rows = [{"messages": turns(f"a {n}", f"b {n}")} for n in range(4)] + [{"messages": turns("a \ud83d", "b")}]
    with pytest.raises(DataError, match=r"line 5, column 'messages': turn 1: \\ud83d at character 3 is half of a char"):
        prepared(tmp_path / "rows.jsonl", rows)


def test_a_column_that_the_recipe_names_must_be_there(tmp_path):
    rows = [{"messages": turns(f"a {n}", f"b {n}"), "system_prompt": "x"} for n in range(4)]
    with pytest.raises(DataError, match=r"'system_promt'.*data\.columns\.system names.*did you mean 'system_prompt'"):
        prepared(tmp_path / "rows.jsonl", rows, columns={"system": "system_promt"})


def test_prompts_to_generate_from_are_read_like_rows():
    data = config(system="Be kind.")
    expected = turns("One?", "Yes.", "Hi", system="Be brief.")
    for row in (FORMATS["alpaca"], FORMATS["prompt_completion"]):
        row = {**row, "system": "Be brief.", "history": [["One?", "Yes."]]}
        assert conversation.read_prompt(row, data) == expected
    assert conversation.read_prompt({"messages": PAIR, "system": "Be brief."}, data) == turns("Hi", system="Be brief.")
    assert conversation.read_prompt({"prompt": "Hi", "id": 3}, data) == "Hi"
    assert conversation.read_prompt({"prompt": json.dumps([ASKED])}, data) == [ASKED]
    with pytest.raises(DataError, match="turn 2: 'tool_calls' is not read yet"):
        conversation.read_prompt({"messages": [ASKED, {**SAID, "tool_calls": [{"id": 1}]}, ASKED]}, data)


# -- which turns are learned -----------------------------------------------------------------------------------------


def learned_by_transformers(messages, tokenizer, masked):
    """Input ids and labels from transformers' own mask, of which the runs of the masked answers are cleared."""
    made = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    labels, run, before = [], -1, 0
    for token, inside in zip(made["input_ids"], made["assistant_masks"], strict=True):
        run += inside and not before
        labels.append(token if inside and run not in masked else -100)
        before = inside
    return made["input_ids"], labels


@pytest.mark.parametrize("key", ["loss", "train", "weight"])
@pytest.mark.parametrize("values", [(False, True), (0, 1), (0.0, 1.0), (False, None)])
def test_flagged_answers_are_read_and_not_learned(key, values, tokenizer):
    row = canonical({"messages": turns("Hi", "a bad one", "no, again", "Hello", **{key: values})})
    assert row["messages"] == turns("Hi", "a bad one", "no, again", "Hello")
    made = Instruction().encode({name: [value] for name, value in row.items()}, tokenizer, config(), None)
    ids, labels = learned_by_transformers(row["messages"], tokenizer, {0})
    ours = made["input_ids"][0]
    assert (ours, made["labels"][0]) == (ids[: len(ours)], labels[: len(ours)])
    assert tokenizer.decode(ids[len(ours) :]) == "\n"
    assert made["weight"] == [sum(label != -100 for label in labels)]


def test_what_follows_the_last_learned_answer_is_left_out(tokenizer):
    row = canonical({"messages": turns("Hi", "Hello", "more", "a bad one", loss=(True, False))})
    made = Instruction().encode({name: [value] for name, value in row.items()}, tokenizer, config(), None)
    assert tokenizer.decode(made["input_ids"][0]).endswith("Hello<|im_end|>")
    assert Instruction().prompt(row) == ([ASKED], "Hello")


def test_flags_under_the_other_choices_of_what_is_learned(tokenizer):
    row = {"messages": turns("Hi", "a bad one", "no, again", "Hello", loss=(False, True))}
    whole = Instruction(train_on="all")
    columns = {name: [value] for name, value in whole.canonical(row, config(), None).items()}
    made = whole.encode(columns, tokenizer, config(), None)
    unlearned = [token for token, label in zip(made["input_ids"][0], made["labels"][0]) if label == -100]
    assert tokenizer.decode(unlearned[1:]) == "a bad one<|im_end|>"
    last = Instruction(train_on="last").encode(columns, tokenizer, config(), None)
    assert tokenizer.decode([label for label in last["labels"][0] if label != -100]) == "Hello<|im_end|>"
    bad_last = {"messages": turns("Hi", "Hello", "more", "bad", loss=(True, False))}
    assert "the last answer is flagged as not to be learned" in refusal(bad_last, train_on="last")


def test_flags_survive_packing_and_a_template_that_rewrites_earlier_turns(tokenizer):
    row = canonical({"messages": turns("Hi", "a bad one", "no, again", "Hello", weight=(0, 1))})
    columns = {name: [value] * 3 for name, value in row.items()}
    packed = Instruction(packing=True).encode(columns, tokenizer, config(), None)
    assert tokenizer.decode([label for label in packed["labels"][0] if label != -100]) == "Hello<|im_end|>" * 3
    rewriting = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    rewriting.chat_template = MARKED.replace("m['content'] + '<|im_end|>' }}{% endg", (
        "(m['content'] if loop.last else m['content'][:1]) + '<|im_end|>' }}{% endg"
    ))  # fmt: skip
    made = Instruction().encode({name: [value] for name, value in row.items()}, rewriting, config(), None)
    assert [[rewriting.decode([label for label in labels if label != -100])] for labels in made["labels"]] == [
        ["Hello<|im_end|>"]
    ]
    with pytest.raises(DataError, match=r"an example of every answer.*set task\.train_on=assistant"):
        Instruction(train_on="all").encode({name: [value] for name, value in row.items()}, rewriting, config(), None)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (turns("Hi", "Hello", weight=(0.5,)), "turn 2: expected true, false, 1 or 0 for 'weight', found float '0.5'"),
        (turns("Hi", "Hello", loss=("no",)), r"for 'loss', found str 'no'; .* set data.ignore='[loss]'"),
        (turns("Hi", "Hello", loss=(True,), weight=(0,)), "turn 2: loss and weight contradict each other"),
        ([{**ASKED, "train": True}, SAID], "turn 1: this turn of the user's is flagged as to be learned"),
        (turns("Hi", "Hello", loss=(False,)), "every answer is flagged as not to be learned, so nothing can be"),
    ],
)
def test_flags_that_cannot_be_followed_are_refused(row, said):
    message = refusal({"messages": row})
    assert all(part in message for part in said.split(" .* "))


def test_flags_of_other_turns_may_say_what_is_so_anyway():
    assert messages_of({"messages": [{**ASKED, "train": False}, {**SAID, "train": True}]}) == PAIR
    assert "flagged as not to be learned, against task.train_on=all; take the flag off" in refusal(
        {"messages": [{**ASKED, "train": False}, SAID]}, train_on="all"
    )
    assert messages_of({"messages": turns("Hi", "Hello", loss=(False,))}, ignore=["loss"]) == PAIR


def test_masked_turns_are_counted_and_rows_without_flags_stay_as_they_were(tmp_path):
    plain = [{"messages": turns(f"a {n}", f"b {n}")} for n in range(6)]
    same = prepared(tmp_path / "plain.jsonl", [{"messages": turns(f"a {n}", f"b {n}", loss=(1,))} for n in range(6)])
    assert same.fingerprint == prepared(tmp_path / "same.jsonl", plain).fingerprint
    flagged = [*plain, {"messages": turns("a", "bad", "again", "b", loss=(0, 1))}]
    data = prepared(tmp_path / "flagged.jsonl", flagged)
    assert step(data, "masked_turns").rows == 1
    assert step(data, "masked_turns").examples == (f"{tmp_path}/flagged.jsonl:7",)
    assert {line: row["masked"] for line, row in by_line(data).items() if row["masked"]} == {7: [1]}


# -- what is not read -------------------------------------------------------------------------------------------------

CALL = [{"type": "function", "function": {"name": "look_up", "arguments": {"word": "x"}}}]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tool_calls", CALL), ("function_call", {"name": "look_up", "arguments": "{}"}),
        ("reasoning_content", "Let me think."), ("reasoning", "Let me think."), ("thinking", "Let me think."),
    ],
)  # fmt: skip
def test_what_would_change_an_answer_is_refused_by_name(key, value):
    row = {"messages": [ASKED, {**SAID, key: value}]}
    message = refusal(row)
    assert f"column 'messages': turn 2: '{key}' is not read yet" in message
    assert f"data.ignore='[{key}]'" in message
    assert messages_of(row, ignore=[key]) == PAIR
    assert f"'{key}' is not read yet" in refusal({"messages": [ASKED, {"role": "assistant", key: value}]})
    assert f"column '{key}': '{key}' is not read yet" in refusal({**FORMATS["alpaca"], key: value})
    for nothing in (None, [], "", {}, {"name": None}):
        assert messages_of({"messages": [ASKED, {**SAID, key: nothing}], key: nothing}) == PAIR


@pytest.mark.parametrize("role", ["tool", "function_call", "observation", "Function"])
def test_results_of_tools_are_refused_by_name(role):
    said = refusal({"messages": [ASKED, {"role": role, "content": "0"}, SAID]})
    assert f"turn 2: role '{role}': calls of tools and their results are not read yet" in said


def test_what_is_not_used_is_listed_once_with_its_rows(tmp_path):
    rows = [{"messages": turns(f"a {n}", f"b {n}"), "tools": CALL, "id": n, "empty": [""]} for n in range(6)]
    rows[2]["messages"][0]["name"] = "Ann"
    rows[3]["system_prompt"] = "Be brief."
    found = step(data := prepared(tmp_path / "rows.jsonl", rows), "not_used")
    assert (found.action, found.rows) == ("reported", 6)
    assert set(found.examples[0].split(", ")) == {
        "tools", "id", "messages[].name (1 row)",
        "system_prompt (data.columns.system=system_prompt reads it) (1 row)",
    }  # fmt: skip
    assert len([step for step in data.steps if step.name == "not_used"]) == 1
    quiet = prepared(tmp_path / "rows.jsonl", rows, ignore=["tools", "id", "name", "system_prompt"])
    assert step(quiet, "not_used") is None
    assert quiet.fingerprint == data.fingerprint


def test_columns_of_a_second_format_are_listed_too(tmp_path):
    rows = [{"messages": turns(f"a {n}", f"b {n}"), "prompt": "x", "completion": "y"} for n in range(6)]
    assert step(prepared(tmp_path / "rows.jsonl", rows), "not_used").examples == ("prompt, completion",)


def test_turns_without_an_answer_and_words_for_nothing_are_counted(tmp_path):
    rows = [{"messages": [*turns(f"a {n}", f"b {n}"), ASKED]} for n in range(6)]
    assert step(prepared(tmp_path / "open.jsonl", rows), "unanswered_turns").rows == 6
    rows = [{"instruction": f"a {n}", "input": "nan" if n % 2 else "", "output": "None"} for n in range(6)]
    found = step(prepared(tmp_path / "alpaca.jsonl", rows), "null_words")
    assert (found.rows, found.examples) == (3, ("input=nan",))


def test_texts_that_spell_a_control_token_are_named(tokenizer, caplog):
    rows = {"messages": [PAIR, turns("a<|im_end|>\n<|im_start|>assistant", "b")], "_file": ["f", "f"], "_line": [1, 2]}
    made = Instruction().encode(rows, tokenizer, config(), None)
    assert made["input_ids"][1] == learned_by_transformers(rows["messages"][1], tokenizer, ())[0][:-1]
    assert "1 of 2 rows spell control tokens (<|im_end|>), which are read as such" in caplog.text
    assert caplog.text.rstrip().endswith("(f:2)")

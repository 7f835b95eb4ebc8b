"""Instruction rows in every format, what is refused of them, and how long conversations fit a window."""

from __future__ import annotations

import logging

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from peftkit.data.batching import collate
from peftkit.errors import DataError, ModelError, RecipeError
from peftkit.heads.causal_lm import NAME, CausalLM
from peftkit.models.tokenizer import load_tokenizer
from peftkit.schema.recipe import DataConfig, EvaluationConfig, ModelConfig
from peftkit.schema.registries import TASKS
from peftkit.schema.types import TaskInfo
from peftkit.tasks.instruction import Instruction
from peftkit.tasks.windows import Stretch, pack
from tests.tiny import tiny_llama, tiny_tokenizer

HEAD = CausalLM(TaskInfo(NAME))
ASKED = {"role": "user", "content": "Hi"}
SAID = {"role": "assistant", "content": "Hello"}
IM_END = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def config(**fields):
    return DataConfig(source="unused", **{"max_length": 128, **fields})


def messages_of(row, **fields):
    return Instruction().canonical(row, config(**fields), None)["messages"]


def turns(*texts, system=None):
    roles = ["user", "assistant"] * len(texts)
    start = [{"role": "system", "content": system}] if system else []
    return start + [{"role": role, "content": text} for role, text in zip(roles, texts)]


def answers(made, tokenizer):
    return [tokenizer.decode([label for label in labels if label != -100]) for labels in made["labels"]]


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"instruction": "Hi", "input": "", "output": "Hello"}, {}),
        ({"instruction": "Hi", "output": "Hello", "text": "whatever"}, {}),
        ({"instruction": "Hi", "input": None, "output": "Hello", "system": None}, {}),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, {}),
        ({"conversations": [ASKED, SAID]}, {}),
        ({"messages": [{**ASKED, "from": None, "value": None}, SAID], "prompt": "other"}, {}),
        ({"prompt": "Hi", "completion": "Hello"}, {}),
        ({"prompt": [ASKED], "completion": [SAID]}, {}),
        ({"question": "Hi", "answer": "Hello"}, {"columns": {"prompt": "question", "completion": "answer"}}),
        (
            {"q": "Hi", "a": "Hello", "messages": 3},
            {"format": "alpaca", "columns": {"instruction": "q", "output": "a"}},
        ),
    ],
)
def test_every_format_is_read_as_the_same_messages(row, fields):
    assert messages_of(row, **fields) == [ASKED, SAID]


def test_alpaca_puts_the_input_under_the_instruction():
    made = messages_of({"instruction": "Translate.", "input": "chat", "output": "cat", "system": "Be brief."})
    assert made == turns("Translate.\n\nchat", "cat", system="Be brief.")


def test_a_system_prompt_of_the_recipe_goes_before_conversations_that_have_none():
    assert messages_of({"messages": [ASKED, SAID]}, system="Be kind.") == turns("Hi", "Hello", system="Be kind.")
    own = turns("Hi", "Hello", system="Be brief.")
    assert messages_of({"messages": own}, system="Be kind.") == own


def test_a_canonical_row_survives_arrow():
    row = Instruction().canonical({"messages": [ASKED, SAID], "_file": "a.jsonl", "_line": 7, "id": 3}, config(), None)
    assert Dataset.from_list([row])[0] == {"messages": [ASKED, SAID]}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": []}, "column 'messages': the conversation is empty"),
        ({"messages": None}, "column 'messages': expected a list of turns, found nothing"),
        ({"messages": "Hi"}, "column 'messages': expected a list of turns, found str 'Hi'"),
        ({"messages": [ASKED, "Hello"]}, "column 'messages': turn 2: expected a mapping with role and content"),
        ({"messages": [ASKED, {"role": "assistant"}]}, "turn 2: expected role and content .*, found role"),
        ({"messages": [ASKED, {"role": "asistant", "content": "x"}]}, "turn 2: .*'asistant': did you mean 'assistant'"),
        ({"conversations": [{"from": "humans", "value": "x"}]}, "'conversations': turn 1: .*did you mean 'human'"),
        ({"messages": [ASKED, {"role": "assistant", "content": [1]}]}, "turn 2: expected text, found list"),
        ({"messages": [ASKED]}, "no assistant turn"),
        ({"messages": [ASKED, ASKED, SAID]}, "turns 1 and 2 are both the user's"),
        (
            {"messages": [ASKED, SAID, {"role": "system", "content": "x"}]},
            "turn 3: the system prompt must be the first",
        ),
        ({"messages": [ASKED, {"role": "assistant", "content": " \n"}]}, "turn 2: the assistant's answer is empty"),
        ({"instruction": "Hi", "output": ""}, "column 'output': turn 2: the assistant's answer is empty"),
        ({"instruction": "Hi", "output": None}, "column 'output': expected text, found nothing"),
        ({"instruction": 3, "output": "x"}, "column 'instruction': expected text, found int '3'"),
        ({"prompt": "Hi", "completion": {"a": 1}}, "column 'completion': expected a list of turns, found dict"),
        (
            {"question": "Hi", "answer": "x"},
            "found question, answer; set data.columns.instruction=question data.columns.output=answer",
        ),
    ],
)
def test_a_bad_row_is_one_message_that_names_column_and_turn(row, said):
    with pytest.raises(DataError, match=said):
        messages_of(row)


def test_rows_with_an_empty_answer_count_as_empty_where_these_are_dropped():
    task, data = Instruction(), config(cleaning={"empty": "drop"})
    row = task.canonical({"instruction": "Hi", "output": ""}, data, None)
    assert task.text_of(row) == ""
    assert task.text_of(task.canonical({"instruction": "Hi", "output": "Hello"}, data, None)) == "Hi\nHello"


def test_settings_that_cannot_work_are_refused():
    task, rows = Instruction(), Dataset.from_list([{"instruction": "Hi", "output": "Hello"}])
    assert task.describe({"train": rows}, config()).problem_type == "causal_lm"
    with pytest.raises(DataError, match=r"column 'conversations': data\.format=sharegpt needs this column"):
        task.describe({"train": rows}, config(format="sharegpt"))
    with pytest.raises(RecipeError, match=r"data\.columns: 'instructions' is no field .* did you mean 'instruction'"):
        task.describe({"train": rows}, config(columns={"instructions": "instruction"}))
    with pytest.raises(RecipeError, match="learn to write them so"):
        task.describe({"train": rows}, config(augmentation={}))


def test_cleaning_reaches_every_turn():
    row = Instruction().with_text({"messages": turns("a", "b"), "_line": 1}, str.upper)
    assert row == {"messages": turns("A", "B"), "_line": 1}


def test_train_on_chooses_the_scored_turns(tokenizer):
    rows = {"messages": [turns("one", "two", "three", "four")]}
    every = Instruction().encode(rows, tokenizer, config(), None)
    last = Instruction(train_on="last").encode(rows, tokenizer, config(), None)
    whole = Instruction(train_on="all").encode(rows, tokenizer, config(), None)
    assert answers(every, tokenizer) == ["two<|im_end|>four<|im_end|>"]
    assert answers(last, tokenizer) == ["four<|im_end|>"]
    assert whole["labels"][0] == [-100, *whole["input_ids"][0][1:]]
    assert whole["weight"] == [len(whole["input_ids"][0]) - 1]
    assert every["input_ids"] == last["input_ids"] == whole["input_ids"]


def test_a_long_conversation_keeps_whole_turns_and_says_what_was_cut(tokenizer):
    rows = {"messages": [turns("one", "two", "three", "four " * 30)]}
    full = Instruction().encode(rows, tokenizer, config(max_length=256), None)
    made = Instruction().encode(rows, tokenizer, config(max_length=60), None)
    assert answers(made, tokenizer) == ["two<|im_end|>"]
    assert made["input_ids"][0][-1] == IM_END
    assert made["truncated"] == [len(full["input_ids"][0]) - len(made["input_ids"][0])]


def test_a_first_answer_that_is_too_long_is_cut(tokenizer):
    made = Instruction().encode({"messages": [turns("one", "two " * 60)]}, tokenizer, config(max_length=40), None)
    assert len(made["input_ids"][0]) == 40
    assert IM_END not in made["labels"][0]
    assert made["weight"] == [sum(label != -100 for label in made["labels"][0])]
    assert made["truncated"][0] > 0


def test_rows_whose_prompt_fills_the_window_make_no_example_and_are_named(tokenizer, caplog):
    rows = {"messages": [turns("one", "two"), turns("long " * 40, "two"), turns("three", "four")]}
    rows |= {"_file": ["a"] * 3, "_line": [1, 2, 3]}
    made = Instruction().encode(rows, tokenizer, config(max_length=40), None)
    assert made["row"] == [0, 2]
    assert made["row_offsets"] == [[0], [0]]
    assert "1 of 3 rows are left out: their prompts alone fill data.max_length=40 (a:2)" in caplog.text


def test_a_prompt_that_fills_the_window_is_an_error_on_demand(tokenizer):
    rows = {"messages": [turns("one", "two"), turns("long " * 40, "two")], "_file": ["a", "a"], "_line": [1, 9]}
    with pytest.raises(DataError, match=r"a, line 9, column 'messages': the prompt takes \d+ tokens .* is 40"):
        Instruction(too_long="error").encode(rows, tokenizer, config(max_length=40), None)


def test_early_turns_give_way_where_only_the_last_answer_counts(tokenizer):
    long = turns("one", "two " * 40, "three", "four", system="Be brief.")
    made = Instruction(train_on="last").encode({"messages": [long]}, tokenizer, config(max_length=60), None)
    assert answers(made, tokenizer) == ["four<|im_end|>"]
    kept = tokenizer.decode(made["input_ids"][0])
    assert "Be brief." in kept
    assert "two" not in kept


def test_a_template_that_refuses_a_row_is_an_error_with_its_place(tokenizer):
    tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system prompts') }}" + (
        "{% endif %}" + tokenizer.chat_template
    )
    rows = {"messages": [turns("a", "b"), turns("a", "b", system="x")], "_file": ["f", "f"], "_line": [4, 5]}
    fault = "f, line 5, column 'messages': turn 3: the chat template fails: no system prompts; .*model.fold_system=true"
    with pytest.raises(DataError, match=fault):
        Instruction().encode(rows, tokenizer, config(), None)


def test_a_system_prompt_is_folded_into_the_first_user_turn(folder):
    base = {"source": str(folder), "chat_template": "plain"}
    rows, plain = {"messages": [turns("a", "b", "c", "d", system="x")]}, load_tokenizer(ModelConfig(**base))
    folded = Instruction().encode(rows, load_tokenizer(ModelConfig(**base, fold_system=True)), config(), None)
    assert folded == Instruction().encode({"messages": [turns("x\n\na", "b", "c", "d")]}, plain, config(), None)
    assert folded != Instruction().encode(rows, plain, config(), None)


@pytest.mark.parametrize(
    ("role", "condition", "hint"),
    [
        ("system", "message['role'] != 'system'", "set model.fold_system=true"),
        ("user", "loop.index != 4", "choose another template with model.chat_template"),
    ],
)
def test_a_template_that_leaves_a_text_out_is_refused(role, condition, hint, tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content']", f"(message['content'] if {condition} else '')"
    )
    row = {"messages": [turns("one", "two", "three", "four", system="Be brief.")]}
    with pytest.raises(DataError, match=f"turn [14]: the chat template leaves this text of the {role}'s out; .*{hint}"):
        Instruction().encode(row, tokenizer, config(), None)


def test_a_template_that_changes_an_answer_is_refused(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content']", "(message['content'] if loop.first else message['content'].replace('secret', ''))"
    )
    with pytest.raises(DataError, match="turn 2: the chat template does not keep this answer's text"):
        Instruction().encode({"messages": [turns("a", "a secret b")]}, tokenizer, config(), None)


def test_an_assistant_may_begin_after_a_system_prompt_only(tokenizer):
    row = {"messages": [SAID, ASKED, SAID]}
    with pytest.raises(DataError, match=r"turn 1: the assistant's, .* set data\.system"):
        messages_of(row)
    made = Instruction().encode({"messages": [messages_of(row, system="Be kind.")]}, tokenizer, config(), None)
    assert answers(made, tokenizer) == ["Hello<|im_end|>" * 2]


def test_a_template_that_rewrites_the_prompt_once_it_is_answered_is_refused(tokenizer):
    counted = "{{ messages | length if messages[0]['role'] == 'system' else '' }}"
    tokenizer.chat_template = counted + tokenizer.chat_template
    row = {"messages": [turns("a", "b", system="x")]}
    with pytest.raises(DataError, match="turn 3: the chat template writes what comes before this answer differently"):
        Instruction().encode(row, tokenizer, config(), None)


def test_no_template_and_too_wide_a_window_are_refused_before_a_model_is_there(tokenizer, tmp_path):
    bare = AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path, "gpt2"))
    with pytest.raises(ModelError, match="no chat template"):
        Instruction().encode({"messages": [[ASKED, SAID]]}, bare, config(), None)
    with pytest.raises(RecipeError, match=r"this base model reads 256 tokens; set data\.max_length=256"):
        Instruction().encode({"messages": [[ASKED, SAID]]}, tokenizer, config(max_length=512), None)


def test_what_was_mended_is_said(tokenizer, caplog):
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "")
    with caplog.at_level(logging.WARNING):
        made = Instruction().encode({"messages": [[ASKED, SAID]]}, tokenizer, config(), None)
    assert answers(made, tokenizer) == ["Hello<|im_end|>"]
    assert "no end-of-turn token: every answer is ended with <|im_end|>" in caplog.text


def test_a_pad_token_equal_to_the_stop_token_takes_no_label_away(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    made = Instruction().encode({"messages": [turns("a", "b"), turns("a b c d", "e f g h")]}, tokenizer, config(), None)
    batch = collate(made, tokenizer)
    assert [int((row == IM_END).sum()) for row in batch["labels"]] == [1, 1]
    assert torch.equal((batch["labels"] != -100).sum(-1), torch.tensor(made["weight"]).long())
    assert int((batch["input_ids"][0] == IM_END).sum()) > 2


def test_packed_windows_hold_every_example_and_score_the_same(folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    rows = {"messages": [turns("one " * count, "two " * (count % 5 + 1), "x", "y") for count in range(1, 20)]}
    single = Instruction().encode(rows, tokenizer, config(), None)
    packed = Instruction(packing=True).encode(rows, tokenizer, config(), None)
    assert len(packed["row"]) < len(single["row"])
    held = [row + offset for row, offsets in zip(packed["row"], packed["row_offsets"]) for offset in offsets]
    assert sorted(held) == single["row"]
    assert all(len(ids) <= 128 for ids in packed["input_ids"])
    assert packed == Instruction(packing=True).encode(rows, tokenizer, config(), None)
    figures = []
    for made in (single, packed):
        outputs = HEAD.outputs(model, collate(made, tokenizer), "own")
        figures.append(HEAD.metrics({k: v.numpy() for k, v in outputs.items()}, EvaluationConfig()))
    assert figures[0]["tokens"] == sum(single["weight"]) == sum(packed["weight"])
    assert figures[1] == pytest.approx(figures[0], rel=1e-5)


def test_packing_puts_each_example_where_it_leaves_the_least_room():
    parts = [Stretch([0] * length, [0] * length, row) for row, length in enumerate([3, 6, 4, 7, 2])]
    windows = pack(parts, 10)
    assert [[len(part.ids) for part in window] for window in windows] == [[3, 7], [6, 4], [2]]


def test_loss_and_accuracy_are_those_of_transformers(folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    task, rows = Instruction(), [turns("one", "two three", "four", "five"), turns("why", "because " * 9)]
    made = task.encode({"messages": rows}, tokenizer, config(), None)
    batch = collate(made, tokenizer)
    with torch.no_grad():
        theirs = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"],
            num_items_in_batch=int(sum(made["weight"])),
        )  # fmt: skip
    outputs = HEAD.outputs(model, batch, "own")
    figures = HEAD.metrics({k: v.numpy() for k, v in outputs.items()}, EvaluationConfig())
    assert figures["loss"] == pytest.approx(float(theirs.loss), rel=1e-5)
    scored = batch["labels"][:, 1:] != -100
    right = (theirs.logits[:, :-1].argmax(-1) == batch["labels"][:, 1:])[scored]
    assert figures["token_accuracy"] == pytest.approx(float(right.float().mean()))
    assert float(HEAD.loss(model, batch, "own").detach()) == pytest.approx(float(theirs.loss) * scored.sum().item())


def test_the_prompt_for_generation_is_all_before_the_last_answer():
    row = {"messages": [*turns("one", "two", "three", "four"), ASKED]}
    assert Instruction().prompt(row) == (turns("one", "two", "three", "four")[:3], "four")


def test_tasks_are_registered_without_loading_torch():
    import subprocess
    import sys

    code = (
        "import sys; from peftkit.schema.registries import TASKS; names = TASKS.names(); "
        "slow = {'torch', 'transformers', 'datasets', 'jinja2', 'numpy'} & set(sys.modules); print(names, slow)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert {"instruction", "style"} <= set(TASKS.names())
    assert said.strip().endswith("set()")

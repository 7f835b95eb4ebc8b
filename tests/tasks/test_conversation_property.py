"""Conversations written in every way that data sets use, each read as transformers renders it, or refused by name."""

from __future__ import annotations

import json
import random

import pytest
from transformers import AutoTokenizer

from peftkit.data.pipeline import prepare
from peftkit.errors import DataError
from peftkit.schema.recipe import DataConfig, Recipe
from peftkit.tasks.instruction import Instruction
from tests.tasks.test_conversation import MARKED, learned_by_transformers
from tests.tiny import WORDS, tiny_tokenizer

SEEDS = 150
ROLE_NAMES = {
    "system": ["system", "System", "developer"],
    "user": ["user", "human", "Human", "prompter", " user "],
    "assistant": ["assistant", "gpt", "AI", "bot", "model", "ChatGPT"],
}
ODD = [
    'say "it\'s"',
    "a, b; c\td",
    "é – 漢字 🙂",
    "{'a': 1}",
    '{"a": [1, 2]}',
    "if x:\n    y()",
    "None",
    "nan",
    "<b>",
    "01",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path_factory.mktemp("chatml"), "chatml"))
    tokenizer.chat_template = MARKED
    return tokenizer


# -- conversations and how they are written ---------------------------------------------------------------------------


def text(dice):
    words = dice.choices(WORDS, k=dice.randint(1, 6))
    words[dice.randrange(len(words))] = dice.choice([*ODD, *WORDS])
    return " ".join(words)


def plain(dice):
    """A conversation as ``apply_chat_template`` takes it, and the numbers of its answers that are not learned."""
    messages = [{"role": "system", "content": text(dice)}] if dice.random() < 0.4 else []
    for _ in range(dice.randint(1, 3)):
        messages += [{"role": role, "content": text(dice)} for role in ("user", "assistant")]
    return messages


def as_turns(messages, dice, keys):
    return [dict(zip(keys, (dice.choice(ROLE_NAMES[message["role"]]), message["content"]))) for message in messages]


def in_parts(content, dice):
    cut = dice.randint(0, len(content))
    parts = [{"type": "text", "text": piece} for piece in (content[:cut], content[cut:]) if piece]
    return [{**part, "image_url": None} if dice.random() < 0.3 else part for part in parts]


def as_text(turns, dice):
    return dice.choice([json.dumps, str, lambda value: json.dumps(value, ensure_ascii=False, indent=1)])(turns)


def written(messages, dice):
    """(format, row, answers that are flagged as not to be learned) of a conversation."""
    start = int(messages[0]["role"] == "system")
    row = {"id": dice.randrange(99), "meta": {"a": None}} if dice.random() < 0.4 else {}
    if start and dice.random() < 0.4:
        row["system"], messages = messages[0]["content"], messages[1:]
        start = 0
    kind = dice.choice(["messages", "sharegpt", *([] if start else ["alpaca"]), "prompt_completion"])
    if kind == "alpaca":
        return kind, {**row, **alpaca(messages, dice)}, set()
    keys = ("from", "value") if kind == "sharegpt" else ("role", "content")
    turns = as_turns(messages, dice, keys)
    for turn in turns:
        if dice.random() < 0.3:
            turn[keys[1]] = in_parts(turn[keys[1]], dice)
        if dice.random() < 0.2:
            turn |= dice.choice([{"name": "Ann"}, {"tool_calls": []}, {"tool_calls": None, "weight": None}])
    masked = flag(turns[start + 1 :: 2], dice) if dice.random() < 0.4 else set()
    if kind == "prompt_completion":
        row |= {"prompt": turns[:-1], "completion": turns[-1:]}
        if len(messages) == 2 and dice.random() < 0.5 and not masked:
            row |= {"prompt": messages[0]["content"], "completion": messages[1]["content"]}
    else:
        row[{"messages": "messages", "sharegpt": "conversations"}[kind]] = turns
    for name in ("messages", "conversations", "prompt", "completion"):
        if isinstance(row.get(name), list) and dice.random() < 0.3:
            row[name] = as_text(row[name], dice)
    return kind, row, masked


def alpaca(messages, dice):
    *earlier, question, answer = (message["content"] for message in messages)
    row = {"instruction": question, "input": dice.choice(["", None, " "]), "output": answer}
    if earlier or dice.random() < 0.3:
        history = [[one, other] for one, other in zip(earlier[::2], earlier[1::2], strict=True)]
        row["history"] = as_text(history, dice) if dice.random() < 0.4 else history
    return row


def flag(answers, dice):
    """Flags answers, at least one of which is still learned; returns which are not."""
    key, values = dice.choice(["loss", "train", "weight"]), dice.choice([(False, True), (0, 1), (0.0, 1)])
    learned = [dice.random() < 0.5 for _ in answers]
    learned[dice.randrange(len(answers))] = True
    for turn, value in zip(answers, learned, strict=True):
        turn[key] = values[value]
    return {number for number, value in enumerate(learned) if not value}


def cases():
    for seed in range(SEEDS):
        dice = random.Random(seed)
        messages = plain(dice)
        yield seed, messages, *written(messages, dice)


# -- each is read as transformers renders it --------------------------------------------------------------------------


def encoded(row, tokenizer):
    made = Instruction().encode({name: [value] for name, value in row.items()}, tokenizer, DATA, None)
    return made["input_ids"][0], made["labels"][0]


DATA = DataConfig(source="unused", max_length=256)


def expected(messages, masked, tokenizer):
    """transformers' tokens up to the last learned answer, and their labels."""
    ids, labels = learned_by_transformers(messages, tokenizer, masked)
    end = max(place for place, label in enumerate(labels) if label != -100) + 1
    return ids[:end], labels[:end]


def test_every_spelling_is_what_apply_chat_template_renders(tokenizer):
    kinds = set()
    for seed, messages, kind, row, masked in cases():
        kinds.add((kind, bool(masked), "system" in row))
        made = Instruction().canonical(row, DATA, None)
        assert made["messages"] == messages, (seed, row)
        assert encoded(made, tokenizer) == expected(messages, masked, tokenizer), (seed, row)
    assert {kind for kind, _, _ in kinds} == {"messages", "sharegpt", "alpaca", "prompt_completion"}
    assert len(kinds) >= 10


@pytest.mark.parametrize("kind", ["messages", "sharegpt", "alpaca", "prompt_completion"])
def test_so_they_are_out_of_one_file(kind, tokenizer, tmp_path):
    mine = [(messages, row, masked) for _, messages, other, row, masked in cases() if other == kind]
    lines = [json.dumps(row, ensure_ascii=number % 2 == 0) for number, (_, row, _) in enumerate(mine)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    data = {"source": str(tmp_path / "rows.jsonl"), "test_size": 0, "max_length": 256}
    recipe = {"name": "r", "model": {"source": "./m"}, "task": {"kind": "instruction"}, "data": data}
    splits = prepare(Recipe.parse(recipe)).splits
    rows = {row["_line"]: row for split in splits.values() for row in split}
    assert len(rows) == len(mine) > 20
    for line, (messages, _, masked) in enumerate(mine, 1):
        made = {name: value for name, value in rows[line].items() if name in ("messages", "masked")}
        assert encoded(made, tokenizer) == expected(messages, masked, tokenizer)


# -- or refused by the name of what is wrong --------------------------------------------------------------------------

BROKEN = {
    "tool_calls": (lambda turns: turns[-1].update(tool_calls=[{"id": "c"}]), "'tool_calls' is not read yet"),
    "reasoning": (lambda turns: turns[-1].update(reasoning_content="so"), "'reasoning_content' is not read yet"),
    "tool": (lambda turns: turns.insert(-1, {"role": "tool", "content": "0"}), "role 'tool': calls of tools"),
    "image": (lambda turns: turns[-2].update(content=[{"type": "image", "url": "x"}]), "part 1 of the content is 'im"),
    "weight": (lambda turns: turns[-1].update(weight=0.3), "1 or 0 for 'weight', found float '0.3'"),
    "word": (lambda turns: turns[-1].update(loss="false"), "1 or 0 for 'loss', found str 'false'"),
    "contrary": (lambda turns: turns[-1].update(loss=0, train=1), "loss and train contradict each other"),
    "none": (lambda turns: [turn.update(loss=0) for turn in turns if turn["role"] != "user"], "not to be learned"),
    "user": (lambda turns: turns[-2].update(train=True), "the user's is flagged as to be learned"),
    "blank": (lambda turns: turns[-1].update(content=" \n"), "the assistant's answer is empty"),
    "null": (lambda turns: turns[-1].update(content=None), "expected role and content (or from and value), found role"),
    "number": (lambda turns: turns[-1].update(content=3), "expected text, found int '3'"),
    "twice": (lambda turns: turns.insert(-1, dict(turns[-2])), "are both the user's"),
    "late": (lambda turns: turns.append({"role": "system", "content": "x"}), "the system prompt must be the first"),
    "role": (lambda turns: turns[-1].update(role="asistant"), "did you mean 'assistant'"),
    "cut": (lambda turns: turns[-1].update(content="half \ud83d"), "is half of a character"),
    "open": (lambda turns: turns.__delitem__(slice(1, None)), "has no assistant turn"),
    "bare": (lambda turns: turns.__setitem__(-1, "Hello"), "expected a mapping with role and content, found str"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize("seed", range(3))
def test_a_fault_is_refused_by_its_name(fault, seed):
    dice = random.Random(seed)
    turns = [message for message in plain(dice) if message["role"] != "system"]
    spoil, said = BROKEN[fault]
    spoil(turns)
    row = {"messages": turns} if "\ud83d" in str(turns) or dice.random() < 0.5 else {"messages": json.dumps(turns)}
    with pytest.raises(DataError) as caught:
        Instruction().canonical(row, DATA, None)
    assert said in str(caught.value)
    assert caught.value.column == "messages"

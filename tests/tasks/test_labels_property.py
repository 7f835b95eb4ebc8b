"""On generated conversations, the scored tokens spell the assistant's turns and their stop tokens, and nothing else."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from peftkit.errors import DataError
from peftkit.models import chat_template
from peftkit.schema.recipe import DataConfig
from peftkit.tasks.instruction import Instruction
from tests.tiny import CHATML, WORDS, tiny_tokenizer

CONVERSATIONS = 250  # for each of eight templates
DATA = DataConfig(source="unused", max_length=1_000_000)
HEADERS = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n\\n' }}"
TRIMMED = (
    HEADERS + "{{ message['content'] | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n\\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages and messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML
)
# the system prompt moves to the last question, so that earlier turns read differently once others follow
MOVING = (
    "{% set asked = namespace(last=0, system='') %}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{% set asked.last = loop.index0 %}{% endif %}"
    "{% if message['role'] == 'system' %}{% set asked.system = message['content'] + ' ' %}{% endif %}{% endfor %}"
    "{% for message in messages if message['role'] != 'system' %}"
    "{% if message['role'] == 'user' %}"
    "{{ '[Q]' + (asked.system if message == messages[asked.last] else '') + message['content'] + '[A]' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
ENDLESS = (
    "{% for message in messages %}{{ message['role'] + ':\\n' + message['content'] + '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)
PIECES = [
    *WORDS, *"aeiou.,;!?", " ", "  ", "\n", "\n\n", "\t", "e\u0301", "n\u0303", "\u0301", "é", "ß", "漢字", "한국어",
    "עברית", "🙂", "👩\u200d👩\u200d👧\u200d👦", "🇳🇿", "\u00a0", "\u2028", "𝒳", "assistant", "user:", "[A]",
    "### Assistant:", "```python\nx = 1\n```", "</", "<|",
]  # fmt: skip


def conversation(chance: random.Random) -> list[dict[str, str]]:
    """Up to six exchanges; some empty turns, some of thousands of characters, some with a system prompt."""

    def text() -> str:
        kind = chance.random()
        if kind < 0.06:
            return ""
        count = chance.randint(800, 3000) if kind > 0.985 else chance.randint(1, 20)
        return "".join(chance.choice(PIECES) + chance.choice(["", " "]) for _ in range(count))

    messages = [{"role": "system", "content": text()}] if chance.random() < 0.4 else []
    for _ in range(chance.choice([1, 1, 1, 2, 3, 6])):
        messages += [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]
    if chance.random() < 0.1:
        messages.append({"role": "user", "content": text()})
    return messages


def metaspace() -> PreTrainedTokenizerFast:
    """Like Llama 2's: a space before each text becomes part of its first token, unknown characters become bytes."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    backend.train_from_iterator([" ".join(WORDS) + " [INST] [/INST] <<SYS>> <</SYS>>"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def trimmed(text: str) -> str:
    return text.strip()


CASES = {
    "chatml": ("chatml", CHATML, str, "<|im_end|>"),
    "default system prompt": ("chatml", DEFAULT_SYSTEM, str, "<|im_end|>"),
    "trimmed turns": ("chatml", TRIMMED, trimmed, "<|im_end|>"),
    "system prompt that moves": ("chatml", MOVING, str, "<|im_end|>"),
    "no end of turn": ("gpt2", ENDLESS, str, "<|endoftext|>"),
    "plain": ("gpt2", chat_template.NAMED["plain"], str, "<|endoftext|>"),
    "zephyr": ("gpt2", chat_template.NAMED["zephyr"], str, "<|endoftext|>"),
    "llama2": ("chatml", chat_template.NAMED["llama2"], lambda text: f" {text} ", "<|im_end|>"),
}


def scored_runs(labels: list[int]) -> list[list[int]]:
    """The stretches of scored tokens between tokens that are not."""
    runs: list[list[int]] = [[]]
    for label in labels:
        if label == -100:
            runs.append([])
        else:
            runs[-1].append(label)
    return [run for run in runs if run]


@pytest.mark.parametrize("case", CASES)
def test_scored_tokens_spell_every_answer_and_its_stop_token(case, tmp_path):
    kind, template, shown, stop = CASES[case]
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path, kind))
    tokenizer.chat_template = template
    tokenizer.model_max_length = DATA.max_length
    chance = random.Random(20)
    rows = [conversation(chance) for _ in range(CONVERSATIONS)]
    made = Instruction().encode({"messages": rows}, tokenizer, DATA, None)
    found: dict[int, list[str]] = {}
    for ids, labels, weight, row in zip(made["input_ids"], made["labels"], made["weight"], made["row"], strict=True):
        assert all(label in (-100, token) for label, token in zip(labels, ids, strict=True))
        assert weight == sum(label != -100 for label in labels[1:])
        runs = scored_runs(labels)
        assert all(tokenizer.convert_ids_to_tokens(run[-1]) == stop for run in runs)
        found.setdefault(row, []).extend(tokenizer.decode(run) for run in runs)
    for row, messages in enumerate(rows):
        assert found[row] == [shown(m["content"]) + stop for m in messages if m["role"] == "assistant"]


def test_a_tokenizer_that_puts_a_space_before_each_text_keeps_the_tokens_of_the_whole():
    tokenizer = metaspace()
    tokenizer.chat_template = chat_template.NAMED["zephyr"]
    chance = random.Random(3)
    asked, said = {"role": "user", "content": "who are you"}, [*WORDS, "é", "漢"]
    rows = [
        [asked, {"role": "assistant", "content": " ".join(chance.choices(said, k=chance.randint(1, 9)))}] * 2
        for _ in range(50)
    ]
    made = Instruction().encode({"messages": rows}, tokenizer, DATA, None)
    for messages, ids, labels in zip(rows, made["input_ids"], made["labels"], strict=True):
        whole = chat_template.render(tokenizer, messages).removesuffix("\n")
        assert ids == tokenizer(whole, add_special_tokens=False)["input_ids"]
        answers = [message["content"] + "</s>" for message in messages[1::2]]
        assert [tokenizer.decode(run) for run in scored_runs(labels)] == answers


def test_an_answer_that_shares_a_token_with_its_prompt_is_refused():
    tokenizer = metaspace()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    rows = [[{"role": "user", "content": "who are y"}, {"role": "assistant", "content": "ou"}]]
    with pytest.raises(DataError, match=r"column 'messages': the tokenizer joins .* in one token, ' you'"):
        Instruction().encode({"messages": rows}, tokenizer, DATA, None)


def test_the_prompt_is_tokenized_as_it_will_be_for_generation(tmp_path):
    """Line breaks before a word are other tokens than line breaks at the end of a text, in byte-level tokenizers."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path, "chatml"))
    tokenizer.chat_template = TRIMMED
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "you"}]
    made = Instruction().encode({"messages": [messages]}, tokenizer, DATA.model_copy(update={"max_length": 256}), None)
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert made["input_ids"][0][: len(prompt)] == prompt
    assert made["labels"][0][: len(prompt)] == [-100] * len(prompt)


MARKED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n' }}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def test_labels_equal_those_of_transformers_where_a_template_marks_its_answers(tmp_path):
    """``{% generation %}`` is what trl's assistant_only_loss reads; one line break after the last turn is left out."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path, "chatml"))
    chance = random.Random(7)
    rows = [conversation(chance) for _ in range(300)]
    rows = [messages if messages[-1]["role"] == "assistant" else messages[:-1] for messages in rows]
    tokenizer.model_max_length = DATA.max_length
    made = Instruction().encode({"messages": rows}, tokenizer, DATA, None)
    tokenizer.chat_template = MARKED
    for messages, ids, labels in zip(rows, made["input_ids"], made["labels"], strict=True):
        theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        masked = [
            token if scored else -100
            for token, scored in zip(theirs["input_ids"], theirs["assistant_masks"], strict=True)
        ]
        assert tokenizer.decode(theirs["input_ids"][len(ids) :]) == "\n"
        assert (ids, labels) == (theirs["input_ids"][: len(ids)], masked[: len(ids)])

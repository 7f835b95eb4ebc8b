"""Named templates, and what is read off a template before it is used for labels."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from peftkit.errors import ModelError
from peftkit.models import chat_template
from tests.tiny import CHATML, tiny_tokenizer

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Who?"},
]
BODY = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"


@pytest.fixture
def chatml(tmp_path):
    return AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path, "chatml"))


@pytest.fixture
def gpt2(tmp_path):
    return AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path, "gpt2"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", CHATML),
        (
            "llama2",
            "<|im_start|>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello <|im_end|>"
            "<|im_start|>[INST] Who? [/INST]",
        ),
        (
            "zephyr",
            "<|system|>\nBe brief.<|im_end|>\n<|user|>\nHi<|im_end|>\n<|assistant|>\nHello<|im_end|>\n"
            "<|user|>\nWho?<|im_end|>\n<|assistant|>\n",
        ),
        (
            "plain",
            "### System:\nBe brief.\n\n### User:\nHi\n\n### Assistant:\nHello<|im_end|>\n\n"
            "### User:\nWho?\n\n### Assistant:\n",
        ),
    ],
)
def test_named_templates_write_their_format(name, expected, chatml):
    if name == "chatml":  # the same text as the template that such models carry
        expected = chatml.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    chat_template.install(chatml, name)
    assert chat_template.render(chatml, TALK, generate=True) == expected


def test_every_named_template_can_be_used_for_labels(chatml):
    for name in chat_template.NAMED:
        chat_template.install(chatml, name)
        style = chat_template.read(chatml)
        assert (style.stop.strip(), style.note) == ("<|im_end|>", "")
        assert chat_template.stop_ids(chatml) == [chatml.eos_token_id]


def test_an_unknown_name_points_to_the_nearest(gpt2):
    with pytest.raises(ModelError, match="did you mean 'zephyr'"):
        chat_template.install(gpt2, "zephir")


def test_chatml_is_refused_where_its_markers_are_no_tokens(gpt2):
    with pytest.raises(ModelError, match=r"needs the token <\|im_start\|>.*'plain' and 'zephyr' work"):
        chat_template.install(gpt2, "chatml")
    assert gpt2.chat_template is None


def test_a_tokenizer_without_template_is_told_how_to_get_one(gpt2):
    with pytest.raises(ModelError, match=r"no chat template; choose one with model\.chat_template: chatml, llama2"):
        chat_template.read(gpt2)


def test_a_template_without_end_of_turn_is_mended_by_the_end_of_text(gpt2):
    gpt2.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}" + (
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    style = chat_template.read(gpt2)
    assert (style.stop, style.after, style.stop_id) == ("", "\n", gpt2.eos_token_id)
    assert "every answer is ended with <|endoftext|>" in style.note


def test_several_stop_tokens_in_a_row_all_belong_to_the_answer(chatml):
    chatml.chat_template = CHATML.replace("'<|im_end|>'", "'<|im_end|><|endoftext|>'")
    style = chat_template.read(chatml)
    assert (style.stop, style.after) == ("<|im_end|><|endoftext|>", "\n")
    assert style.stop_id == chatml.convert_tokens_to_ids("<|endoftext|>")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('no such luck') }}", "the chat template fails: no such luck"),
        ("{% for m in messages %}{{ m['role'] }}", r"the chat template fails \(line 1 of the template\)"),
        ("{{ messages[0]['content'] + eos_token }}", "prints the assistant's text 0 times"),
        ("{{ messages[-1]['content'] + eos_token }}", "prints the user's text 0 times"),
        (BODY, "omits the start of an assistant turn from its generation prompt: 'assistant: '"),
        (BODY + "{% if add_generation_prompt %}bot: {% endif %}", "differently from its own generation prompt"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_with_its_fault(template, said, chatml):
    chatml.chat_template = template
    with pytest.raises(ModelError, match=said):
        chat_template.read(chatml)


def test_no_end_of_turn_and_no_end_of_text_is_refused(chatml):
    chatml.chat_template = CHATML.replace("<|im_end|>", "").replace("<|im_start|>", "")
    chatml.eos_token = None
    with pytest.raises(ModelError, match="no end-of-text token to end a turn with"):
        chat_template.read(chatml)


def test_a_doubled_bos_is_mended(chatml):
    chatml.chat_template = "{{ bos_token }}" + CHATML
    prompt = chat_template.render(chatml, TALK[1:2], generate=True)
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    style = chat_template.read(chatml)
    assert style.stop == "<|im_end|>"
    assert style.note == "the chat template writes <|im_start|> twice at the start of a text: one is removed"


def test_generation_ends_at_end_of_text_where_no_template_can_be_used(chatml, gpt2):
    assert chat_template.stop_ids(gpt2) == [gpt2.eos_token_id]
    chatml.chat_template = "{{ raise_exception('no') }}"
    assert chat_template.stop_ids(chatml) == [chatml.eos_token_id]
    chatml.chat_template = CHATML.replace("<|im_end|>", "<|endoftext|>")
    assert chat_template.stop_ids(chatml) == [chatml.convert_tokens_to_ids("<|endoftext|>"), chatml.eos_token_id]


NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\n"
FOLDED = [{"role": "user", "content": "Be brief.\n\nHi"}, *TALK[2:]]


@pytest.mark.parametrize(
    "template",
    [
        NO_SYSTEM + CHATML,
        "\n" + CHATML,
        f"  {{% if true %}}\n  {{% endif %}}\n{CHATML}",
        "{%- if true %}x{% endif %}" + CHATML,
    ],
)
def test_a_folded_system_prompt_is_the_start_of_the_first_user_turn(template, chatml):
    chatml.chat_template = template
    expected = [
        chatml.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for messages in (FOLDED, TALK[1:])
    ]
    chat_template.fold_system(chatml)
    assert [chat_template.render(chatml, messages, generate=True) for messages in (TALK, TALK[1:])] == expected


def test_a_folding_template_is_saved_for_whatever_serves_the_model(chatml, tmp_path):
    chatml.chat_template = NO_SYSTEM + CHATML
    chat_template.fold_system(chatml)
    chatml.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    text = saved.apply_chat_template(TALK, tokenize=False)
    assert text.startswith("<|im_start|>user\nBe brief.\n\nHi<|im_end|>")


def test_a_template_without_system_prompts_says_what_helps(chatml):
    chatml.chat_template = NO_SYSTEM + CHATML
    with pytest.raises(ModelError, match=r"System role not supported; .* train with model\.fold_system=true"):
        chat_template.render(chatml, TALK, generate=True)
    chatml.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(ModelError, match=r"the chat template fails: never$"):
        chat_template.render(chatml, TALK, generate=True)


def test_there_must_be_a_template_to_fold_into(gpt2):
    with pytest.raises(ModelError, match="no chat template"):
        chat_template.fold_system(gpt2)


def test_what_a_template_puts_before_an_answer_is_reported(chatml):
    chatml.chat_template = CHATML.replace(
        "message['content']",
        "('<think>\\n\\n</think>\\n\\n' if message['role'] == 'assistant' else '') + message['content']",
    )
    assert chat_template.read(chatml).note == (
        "the chat template begins an answer with '<think>\\n\\n</think>\\n\\n' where its messages do not: "
        "that is learned as well"
    )

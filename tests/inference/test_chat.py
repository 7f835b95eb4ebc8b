"""The chat loop with a speaker made here: history, commands, pipes and terminals."""

from __future__ import annotations

import io

import pytest

from peftkit.errors import ModelError
from peftkit.inference.chat import Chat


class Echo:
    """Answers with the number of messages it was given and the last one's text, in three pieces."""

    adapters = ("default",)

    def __init__(self) -> None:
        self.heard: list[list[dict[str, str]]] = []

    def stream(self, messages):
        self.heard.append([dict(message) for message in messages])
        yield from (str(len(messages)), ":", messages[-1]["content"])


class Two(Echo):
    """Has two adapters."""

    name = "kjv"
    adapters = ("kjv", "shakespeare")

    def use_adapter(self, name):
        self.name = name

    def stream(self, messages):
        yield f"{self.name} says {messages[-1]['content']}"


class Terminal(io.StringIO):
    """Lines typed by a person."""

    def isatty(self) -> bool:
        return True


def talk(speaker, text, **options):
    output, notices = io.StringIO(), io.StringIO()
    source = options.pop("source", io.StringIO)(text)
    conversation = Chat(speaker, source, output, notices, **options)
    conversation.run()
    return output.getvalue(), notices.getvalue(), conversation.messages


def test_history_grows_and_a_pipe_carries_answers_only():
    speaker = Echo()
    output, notices, messages = talk(speaker, "Hello\n\nÜber what?")
    assert output == "1:Hello\n3:Über what?\n"
    assert notices == ""
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2
    assert speaker.heard[1] == [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "1:Hello"},
        {"role": "user", "content": "Über what?"},
    ]


def test_reset_system_and_quit():
    speaker = Echo()
    output, notices, _ = talk(speaker, "a\n/reset\nb\n/system Be kind.\nc\n/quit\nnever\n", system="Be brief.")
    assert output == "2:a\n2:b\n4:c\n"
    assert [heard[0]["content"] for heard in speaker.heard] == ["Be brief.", "Be brief.", "Be kind."]
    assert "conversation cleared" in notices


def test_adapters_are_switched_by_name():
    output, notices, _ = talk(Two(), "a\n/adapter\n/adapter shakespear\n/adapter shakespeare\nb\n")
    assert output == "kjv says a\nshakespeare says b\n"
    assert "adapters: kjv, shakespeare" in notices
    assert "did you mean 'shakespeare'?" in notices
    assert "only one adapter" in talk(Echo(), "/adapter kjv\n")[1]


def test_unknown_command_names_the_nearest_and_help_lists_all():
    _, notices, _ = talk(Echo(), "/rest\n/help\n")
    assert "did you mean 'reset'?" in notices
    assert all(f"/{name}" in notices for name in ("reset", "adapter", "system", "quit"))


def test_pieces_are_written_as_they_come():
    seen = []

    class Watching(io.StringIO):
        def flush(self):
            seen.append(self.getvalue())

    Chat(Echo(), io.StringIO("hi\n"), Watching(), io.StringIO()).run()
    assert seen == ["1", "1:", "1:hi", "1:hi\n"]


class Failing:
    """Fails at the second turn."""

    turns = 0

    def __init__(self, error):
        self.error = error

    def stream(self, messages):
        self.turns += 1
        if self.turns == 2:
            yield "half"
            raise self.error
        yield str(len(messages))


def test_a_failed_turn_is_reported_and_dropped_on_a_terminal_and_raised_over_a_pipe():
    output, notices, messages = talk(Failing(ModelError("too long")), "a\nb\nc\n", source=Terminal)
    assert "too long" in notices
    assert [m["content"] for m in messages] == ["a", "1", "c", "3"]
    assert output.endswith("3\n")
    with pytest.raises(ModelError):
        talk(Failing(ModelError("too long")), "a\nb\nc\n")


def test_control_c_interrupts_an_answer_on_a_terminal():
    _, notices, messages = talk(Failing(KeyboardInterrupt()), "a\nb\nc\n", source=Terminal)
    assert "interrupted" in notices
    assert len(messages) == 4
    assert notices.count("> ") == 4  # three lines and the end of the input


def test_with_a_real_model(tmp_path):
    from functools import partial

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from peftkit.evaluation import generation
    from peftkit.schema.recipe import GenerationConfig
    from tests.tiny import tiny_llama

    folder = tiny_llama(tmp_path / "llama")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    config = GenerationConfig(max_new_tokens=6)

    class Model:
        stream = staticmethod(partial(generation.stream, model, tokenizer, config=config))

    _, _, messages = talk(Model(), "hello\nwho is the king\n")
    assert messages[3]["content"] == generation.generate(model, tokenizer, [messages[:3]], config)[0]

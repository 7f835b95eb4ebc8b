"""A Modelfile for Ollama: the file, the chat template in Go's template language, and the stop tokens.

Ollama does not read Jinja. Most chat templates put fixed text in front of each turn, so that the Go template is made of
the texts that the tokenizer's own template writes around probe messages. It is written only if it renders every one
of several conversations to the same text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from peftkit.errors import ModelError
from peftkit.export.gguf.vocabulary import begins_with_bos
from peftkit.models import chat_template

FILE = "Modelfile"
SYSTEM, QUESTION, ANSWER, NEXT = (f"peftkit probe {name}" for name in ("system", "question", "answer", "next"))
QUOTES = '"""'
PLAIN = "{{ .Prompt }}"
"""Template of a model that continues texts."""


@dataclass(frozen=True)
class Turns:
    """The text that a chat template writes in front of each turn, and before the answer."""

    system: str | None
    """None if the template takes no system prompt."""
    first: str
    """In front of the user's turn at the beginning of a conversation."""
    after_system: str
    question: str
    answer: str
    generate: str

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The conversation as the Go template renders it."""
        text, previous = "", ""
        for message in messages:
            role = message["role"]
            before = {"": self.first, "system": self.after_system}.get(previous, self.question)
            text += {"system": self.system or "", "assistant": self.answer}.get(role, before) + message["content"]
            previous = role
        return text + self.generate

    def go_template(self) -> str:
        """In Go's template language, with the fields that Ollama passes."""
        later = self.question
        if self.system is not None and self.after_system != self.question:
            after_system = '{{ else if and (eq $i 1) (eq (index $.Messages 0).Role "system") }}'
            later = f"{{{{ if eq $i 0 }}}}{after_system}{self.after_system}{{{{ else }}}}{self.question}{{{{ end }}}}"
            later = later.replace("{{ if eq $i 0 }}", f"{{{{ if eq $i 0 }}}}{self.first}", 1)
        elif self.first != self.question:
            later = f"{{{{ if eq $i 0 }}}}{self.first}{{{{ else }}}}{self.question}{{{{ end }}}}"
        branches = [] if self.system is None else [("system", self.system)]
        branches += [("user", later), ("assistant", self.answer)]
        tests = [f'{{{{ if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}' for role, before in branches]
        turn = "{{ else ".join(test.removeprefix("{{ ") if n else test for n, test in enumerate(tests))
        return f"{{{{ range $i, $_ := .Messages }}}}{turn}{{{{ end }}}}{{{{ end }}}}{self.generate}"


def text_of(
    files: Mapping[str, str], tokenizer: Any, stops: Sequence[int], *, chat: bool, system: str | None = None
) -> str:
    """The Modelfile.

    Args:
        files: instruction (FROM, ADAPTER) → file name.
        stops: ids that end an answer.
        chat: whether the model answers conversations; else it continues texts.
        system: the prompt that it was trained under.
    """
    turns = read_turns(tokenizer) if chat else None
    lines = ["# ollama create NAME -f Modelfile", *(f"{name} ./{file}" for name, file in files.items())]
    if chat and turns is None:
        lines.append("# the chat template cannot be written in Go's template language; Ollama guesses one")
    else:
        lines.append(f"TEMPLATE {QUOTES}{turns.go_template() if turns else PLAIN}{QUOTES}")
    lines += [f'PARAMETER stop "{tokenizer.convert_ids_to_tokens(token)}"' for token in stops]
    if system and QUOTES not in system:
        lines.append(f"SYSTEM {QUOTES}{system}{QUOTES}")
    return "\n".join(lines) + "\n"


def read_turns(tokenizer: Any) -> Turns | None:
    """The texts around turns; None if the template does more than put fixed text in front of each."""
    try:
        with_system = _texts_between(tokenizer, [SYSTEM, QUESTION, ANSWER, NEXT])
    except ModelError:  # it takes no system prompt
        with_system = None
    try:
        without = _texts_between(tokenizer, [QUESTION, ANSWER, NEXT])
    except ModelError:
        return None
    if without is None:
        return None
    first, answer, question, generate = without
    system, after_system = with_system[:2] if with_system else (None, question)
    turns = Turns(system, first, after_system, question, answer, generate)
    written = [system or "", first, after_system, question, answer, generate]
    if any("{{" in text or QUOTES in text for text in written):
        return None
    return turns if _renders_alike(turns, tokenizer) else None


def _texts_between(tokenizer: Any, contents: list[str]) -> list[str] | None:
    """What the template writes before, between and after the messages; None if it changes one of them."""
    text = _render(tokenizer, contents)
    places = [0]
    for content in contents:
        if text.count(content) != 1:
            return None
        places += [text.index(content), text.index(content) + len(content)]
    places.append(len(text))
    if places != sorted(places):
        return None
    return [text[start:end] for start, end in list(pairwise(places))[::2]]


def _render(tokenizer: Any, contents: Sequence[str]) -> str:
    """The conversation without the beginning-of-text token that the runtime adds by itself."""
    text = chat_template.render(tokenizer, _messages(contents), generate=True)
    return text.removeprefix(str(tokenizer.bos_token)) if begins_with_bos(tokenizer) else text


def _messages(contents: Sequence[str]) -> list[dict[str, str]]:
    """Turns by content; a system prompt is known by its text."""
    roles = ["system", "user", "assistant"] if contents[0] == SYSTEM else ["user", "assistant"]
    order = roles + ["user", "assistant"] * len(contents)
    return [{"role": role, "content": content} for role, content in zip(order, contents, strict=False)]


def _renders_alike(turns: Turns, tokenizer: Any) -> bool:
    shorter = [[QUESTION], [QUESTION, ANSWER, NEXT], [QUESTION, ANSWER, NEXT, f"{ANSWER} 2", f"{NEXT} 2"]]
    if turns.system is not None:
        shorter += [[SYSTEM, *contents] for contents in shorter]
    return all(turns.render(_messages(contents)) == _render(tokenizer, contents) for contents in shorter)

"""A conversation on the terminal or over a pipe: reads a line, streams the answer, keeps the history.

printf 'Hello\\nAnd then?\\n' | peftkit chat RUN

/reset          clear the conversation          /adapter NAME   switch to another adapter
/system TEXT    set the system prompt           /adapter        list the adapters
/help           list these commands             /quit           end the chat, like the end of the input
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TextIO, runtime_checkable

from peftkit.errors import PeftkitError, did_you_mean

Message = dict[str, str]


class ChatModel(Protocol):
    """A model that streams answers."""

    def stream(self, messages: Sequence[Mapping[str, str]]) -> Iterator[str]:
        """Yields the answer to a conversation in chunks."""


@runtime_checkable
class MultiAdapterModel(Protocol):
    """A chat model with several adapters on one base."""

    @property
    def adapters(self) -> Sequence[str]:
        """Names of the adapters."""

    def use_adapter(self, name: str) -> None:
        """Switches to an adapter."""


@dataclass
class Chat:
    """A conversation and its commands."""

    model: ChatModel
    output: TextIO
    notices: TextIO
    """Where everything but answers goes, so that a pipe carries answers only."""
    system: str | None = None
    messages: list[Message] = field(default_factory=list)

    def answer(self, text: str) -> None:
        """Streams the answer to ``text`` and adds both to the history, unless it fails or is interrupted."""
        messages = [*self.messages, {"role": "user", "content": text}]
        system = [{"role": "system", "content": self.system}] if self.system else []
        chunks = []
        for chunk in self.model.stream([*system, *messages]):
            chunks.append(chunk)
            self.output.write(chunk)
            self.output.flush()
        self.output.write("\n")
        self.output.flush()
        self.messages = [*messages, {"role": "assistant", "content": "".join(chunks)}]

    def run_command(self, line: str) -> bool:
        """Runs a line that begins with a slash; False ends the chat."""
        name, _, argument = line[1:].strip().partition(" ")
        if name in {"quit", "exit"}:
            return False
        commands: dict[str, Callable[[str], str]] = {
            "reset": self._reset, "adapter": self._adapter, "system": self._system, "help": self._help,
        }  # fmt: skip
        if name in commands:
            self.notify(commands[name](argument.strip()))
        else:
            self.notify(f"unknown command /{name}: {did_you_mean(name, [*commands, 'quit'])}")
        return True

    def notify(self, text: str) -> None:
        """Prints a line that is not part of an answer."""
        print(text, file=self.notices, flush=True)

    def _reset(self, _: str) -> str:
        self.messages = []
        return "conversation cleared"

    def _system(self, text: str) -> str:
        self.system = text or None
        return "system prompt set" if text else "system prompt removed"

    def _help(self, _: str) -> str:
        return (__doc__ or "").split("\n\n")[-1].rstrip()

    def _adapter(self, name: str) -> str:
        names = list(self.model.adapters) if isinstance(self.model, MultiAdapterModel) else []
        if not isinstance(self.model, MultiAdapterModel) or len(names) < 2:
            return "there is only one adapter; add others with --adapter NAME=RUN to switch between them"
        if not name:
            return f"adapters: {', '.join(names)}"
        if name not in names:
            return f"no adapter is called '{name}': {did_you_mean(name, names)}"
        self.model.use_adapter(name)
        return f"switched to adapter '{name}'; the conversation continues"


def chat(
    model: ChatModel,
    *,
    source: TextIO | None = None,
    output: TextIO | None = None,
    notices: TextIO | None = None,
    system: str | None = None,
) -> list[Message]:
    """Chats until ``/quit`` or the end of the input; returns the conversation.

    On a terminal a prompt is shown, and Ctrl-C interrupts an answer or, at the prompt, ends the chat. Over a pipe the
    output holds only the answers.

    Raises:
        PeftkitError: an answer failed, over a pipe; on a terminal the message is shown and the chat continues.
    """
    source = source or sys.stdin
    conversation = Chat(model, output or sys.stdout, notices or sys.stderr, system)
    terminal = source.isatty()
    if terminal:
        conversation.notify("Type /help for commands, /quit to end.")
    while (line := _read_line(source, conversation, terminal)) is not None:
        if line.startswith("/"):
            if not conversation.run_command(line):
                break
        elif line:
            _answer(conversation, line, terminal)
    return conversation.messages


def _answer(conversation: Chat, line: str, terminal: bool) -> None:
    try:
        conversation.answer(line)
    except KeyboardInterrupt:
        if not terminal:
            raise
        conversation.notify("\n(interrupted; this turn is not kept)")
    except PeftkitError as error:
        if not terminal:
            raise
        conversation.notify(str(error))


def _read_line(source: TextIO, conversation: Chat, terminal: bool) -> str | None:
    """The next line, stripped, or None at the end."""
    if terminal:
        print("> ", end="", file=conversation.notices, flush=True)
    try:
        line = source.readline()
    except KeyboardInterrupt:
        if not terminal:
            raise
        return None
    return line.strip() if line else None

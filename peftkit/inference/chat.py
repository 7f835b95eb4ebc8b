"""A conversation on the terminal or over a pipe: reads a line, streams the answer, keeps the history.

printf 'Hello\\nAnd then?\\n' | peftkit chat RUN

/reset          forgets the conversation        /adapter NAME   answers with another adapter
/system TEXT    sets the system prompt          /adapter        lists the adapters
/help           lists these                     /quit           ends, as does the end of the input
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TextIO, runtime_checkable

from peftkit.errors import PeftkitError, did_you_mean

Message = dict[str, str]


class ChatModel(Protocol):
    """What answers: anything that streams."""

    def stream(self, messages: Sequence[Mapping[str, str]]) -> Iterator[str]:
        """The answer to a conversation, piece by piece."""


@runtime_checkable
class SeveralAdapters(Protocol):
    """What a speaker with several adapters on one base offers besides."""

    @property
    def adapters(self) -> Sequence[str]:
        """The adapters' names."""

    def use_adapter(self, name: str) -> None:
        """Answers with that adapter from now on."""


@dataclass
class Chat:
    """A running conversation."""

    speaker: ChatModel
    output: TextIO
    notices: TextIO
    """Where everything but answers goes, so that a pipe carries answers only."""
    system: str | None = None
    messages: list[Message] = field(default_factory=list)

    def say(self, text: str) -> None:
        """Streams the answer to ``text`` and remembers both; an answer that fails or is cut short is not remembered."""
        asked = [*self.messages, {"role": "user", "content": text}]
        opening = [{"role": "system", "content": self.system}] if self.system else []
        pieces = []
        for piece in self.speaker.stream([*opening, *asked]):
            pieces.append(piece)
            self.output.write(piece)
            self.output.flush()
        self.output.write("\n")
        self.output.flush()
        self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]

    def command(self, line: str) -> bool:
        """Carries out a line that begins with a slash; False when the conversation is over."""
        name, _, argument = line[1:].strip().partition(" ")
        if name in {"quit", "exit"}:
            return False
        commands: dict[str, Callable[[str], str]] = {
            "reset": self._reset, "adapter": self._adapter, "system": self._system, "help": self._help,
        }  # fmt: skip
        if name in commands:
            self.note(commands[name](argument.strip()))
        else:
            self.note(f"unknown command /{name}: {did_you_mean(name, [*commands, 'quit'])}")
        return True

    def note(self, text: str) -> None:
        """A line for the person, apart from the answers."""
        print(text, file=self.notices, flush=True)

    def _reset(self, _: str) -> str:
        self.messages = []
        return "the conversation is forgotten"

    def _system(self, text: str) -> str:
        self.system = text or None
        return "the system prompt is set" if text else "there is no system prompt now"

    def _help(self, _: str) -> str:
        return (__doc__ or "").split("\n\n")[-1].rstrip()

    def _adapter(self, name: str) -> str:
        names = list(self.speaker.adapters) if isinstance(self.speaker, SeveralAdapters) else []
        if not isinstance(self.speaker, SeveralAdapters) or len(names) < 2:
            return "there is one adapter only; add others with --adapter NAME=RUN to switch between them"
        if not name:
            return f"adapters: {', '.join(names)}"
        if name not in names:
            return f"no adapter is called '{name}': {did_you_mean(name, names)}"
        self.speaker.use_adapter(name)
        return f"answers now come from '{name}'; the conversation goes on"


def chat(
    speaker: ChatModel,
    *,
    source: TextIO | None = None,
    output: TextIO | None = None,
    notices: TextIO | None = None,
    system: str | None = None,
) -> list[Message]:
    """Talks until ``/quit`` or the end of the input; returns the conversation.

    On a terminal a prompt is shown, and Ctrl-C cuts an answer short or, at the prompt, ends the chat. Over a pipe the
    output holds the answers and nothing else.

    Raises:
        PeftkitError: an answer failed, over a pipe; on a terminal the message is shown and the chat goes on.
    """
    source = source or sys.stdin
    talk = Chat(speaker, output or sys.stdout, notices or sys.stderr, system)
    terminal = source.isatty()
    if terminal:
        talk.note("Type /help for commands, /quit to end.")
    while (line := _read(source, talk, terminal)) is not None:
        if line.startswith("/"):
            if not talk.command(line):
                break
        elif line:
            _answer(talk, line, terminal)
    return talk.messages


def _answer(talk: Chat, line: str, terminal: bool) -> None:
    try:
        talk.say(line)
    except KeyboardInterrupt:
        if not terminal:
            raise
        talk.note("\n(cut short; this turn is forgotten)")
    except PeftkitError as error:
        if not terminal:
            raise
        talk.note(str(error))


def _read(source: TextIO, talk: Chat, terminal: bool) -> str | None:
    """The next line without its spaces, or None at the end."""
    if terminal:
        print("> ", end="", file=talk.notices, flush=True)
    try:
        line = source.readline()
    except KeyboardInterrupt:
        if not terminal:
            raise
        return None
    return line.strip() if line else None

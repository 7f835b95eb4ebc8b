"""A conversation on the terminal or over a pipe: reads a line, streams the answer, keeps the history.

printf 'Hello\\nAnd then?\\n' | peftkit chat RUN

/reset          clear the conversation          /adapter NAME   switch to another adapter
/system TEXT    set the system prompt           /adapter        list the adapters
/help           list these commands             /quit           end the chat, like the end of the input
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TextIO

from peftkit.errors import PeftkitError, did_you_mean

if TYPE_CHECKING:
    from peftkit.inference.remote import RemoteModel
    from peftkit.inference.trained_model import LoadedRun


COMMANDS = ("reset", "system", "adapter", "help", "quit")


@dataclass
class Chat:
    """A conversation and its commands.

    On a terminal a prompt is shown, and Ctrl-C interrupts an answer or, at the prompt, ends the chat. Over a pipe the
    output holds only the answers.
    """

    model: LoadedRun | RemoteModel
    source: TextIO
    output: TextIO
    notices: TextIO
    """Where everything but answers goes, so that a pipe carries answers only."""
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def run(self) -> None:
        """Chats until ``/quit`` or the end of the input.

        Raises:
            PeftkitError: an answer failed, over a pipe; on a terminal the message is shown and the chat continues.
        """
        if self.source.isatty():
            self.notify("Type /help for commands, /quit to end.")
        while (line := self._read_line()) is not None:
            if line.startswith("/"):
                if not self.run_command(line):
                    break
            elif line:
                try:
                    self.answer(line)
                except (KeyboardInterrupt, PeftkitError) as error:
                    if not self.source.isatty():
                        raise
                    interrupted = isinstance(error, KeyboardInterrupt)
                    self.notify("\n(interrupted; this turn is not kept)" if interrupted else str(error))

    def answer(self, text: str) -> None:
        """Streams the answer to ``text`` and adds both to the history, unless it fails or is interrupted."""
        messages = [*self.messages, {"role": "user", "content": text}]
        system = [{"role": "system", "content": self.system}] if self.system else []
        chunks = []
        for chunk in self.model.stream([*system, *messages]):
            chunks.append(chunk)
            print(chunk, end="", file=self.output, flush=True)
        print(file=self.output, flush=True)
        self.messages = [*messages, {"role": "assistant", "content": "".join(chunks)}]

    def run_command(self, line: str) -> bool:
        """Runs a line that begins with a slash; False ends the chat."""
        name, _, argument = line[1:].strip().partition(" ")
        if name in {"quit", "exit"}:
            return False
        argument = argument.strip()
        match name:
            case "reset":
                self.messages = []
                self.notify("conversation cleared")
            case "system":
                self.system = argument or None
                self.notify("system prompt set" if argument else "system prompt removed")
            case "adapter":
                self.notify(self._use_adapter(argument))
            case "help":
                self.notify((__doc__ or "").split("\n\n")[-1].rstrip())
            case _:
                self.notify(f"unknown command /{name}: {did_you_mean(name, COMMANDS)}")
        return True

    def notify(self, text: str) -> None:
        """Prints a line that is not part of an answer."""
        print(text, file=self.notices, flush=True)

    def _use_adapter(self, name: str) -> str:
        names = self.model.adapters
        if len(names) < 2:
            return "there is only one adapter; add others with --adapter NAME=RUN to switch between them"
        if not name:
            return f"adapters: {', '.join(names)}"
        if name not in names:
            return f"no adapter is called '{name}': {did_you_mean(name, names)}"
        self.model.use_adapter(name)
        return f"switched to adapter '{name}'; the conversation continues"

    def _read_line(self) -> str | None:
        """The next line, stripped, or None at the end."""
        terminal = self.source.isatty()
        if terminal:
            print("> ", end="", file=self.notices, flush=True)
        try:
            line = self.source.readline()
        except KeyboardInterrupt:
            if not terminal:
                raise
            return None
        return line.strip() if line else None

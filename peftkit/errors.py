"""Every exception that peftkit raises on purpose: UserErrors for wrong input, other PeftkitErrors for failed work.

A message says what was expected, what was found and where, and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class PeftkitError(Exception):
    """Base of all errors raised on purpose; shown as one message without a traceback. Exit code 1: the work failed."""

    exit_code = 1
    shared = False
    """Whether all processes of a job raise it, so that only the main one prints it."""


class TrainingError(PeftkitError):
    """The run cannot continue (non-finite numbers, a rank that died)."""


class CheckpointError(PeftkitError):
    """There is no valid checkpoint where one is needed, or one could not be written."""


class ExportError(PeftkitError):
    """An export does not reproduce the trained model."""


class Interrupted(PeftkitError):
    """Stopped by a signal, resumable; ``exit_code`` is 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number

    def __reduce__(self) -> tuple[type, tuple[str, int]]:
        """Pickling, with which an error reaches other processes, calls the constructor with both arguments."""
        return type(self), (str(self), self.exit_code - 128)


class UserError(PeftkitError, ValueError):
    """Wrong input, exit code 2; nothing was lost and nothing was started."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe, an override or one of their fields is wrong."""


class DataError(UserError):
    """A data set is wrong; says in which file, line and column where these are known."""

    def __init__(
        self, message: str, *, file: str | Path | None = None, line: int | None = None, column: str | None = None
    ) -> None:
        message = _bounded(message)
        self.message, self.file, self.line, self.column = message, file, line, column
        where = [str(file)] if file else []
        where += [f"line {line}"] if line else []
        where += [f"column '{_bounded(' '.join(column.split()), 60)}'"] if column else []
        super().__init__(f"{', '.join(where)}: {message}" if where else message)


def _bounded(message: str, width: int = 1500) -> str:
    """At most 16 lines of at most ``width`` characters: names and values come from files with any content."""
    lines = message.split("\n")
    if len(lines) > 16:
        lines = [*lines[:15], f"… and {len(lines) - 15} more lines"]
    return "\n".join(line if len(line) <= width else f"{line[: width - 1]}…" for line in lines)


class ModelError(UserError):
    """A base model, tokenizer or adapter cannot be used."""


class MethodError(UserError):
    """A method cannot work on this model or task."""


class HubError(UserError):
    """The hub is unreachable, gated, or lacks what was asked for."""


class RunError(UserError):
    """A run folder is missing, foreign, locked, or does not fit what is asked of it."""


def did_you_mean(name: str, known: Iterable[str], *, limit: int = 12) -> str:
    """A sentence that points from a wrong name to the nearest right one, or lists the right ones.

    >>> did_you_mean("rnak", ["rank", "alpha"])
    "did you mean 'rank'?"
    """
    options = sorted(known)
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    shown = ", ".join(options[:limit])
    return f"known names: {shown}{', …' if len(options) > limit else ''}" if options else "none are known"

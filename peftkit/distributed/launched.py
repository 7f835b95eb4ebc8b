"""How many processes a launcher was asked for, and a note if fewer have started.

``accelerate launch`` starts one process on a CPU, whatever its command line or configuration file asks for.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

ON_CPUS = "ACCELERATE_USE_CPU=true torchrun --nproc_per_node {processes} FILE"
"""The command that really starts several processes on a CPU."""


def missing_processes(world_size: int) -> str | None:
    """A note if more processes were requested than ``world_size``; None if all have started."""
    import psutil

    parent: list[str] = []
    with contextlib.suppress(psutil.Error, AttributeError):
        parent = psutil.Process().parent().cmdline()  # type: ignore[union-attr]
    requested = max(requested_processes(parent), int(os.environ.get("WORLD_SIZE") or 1))
    if requested <= world_size:
        return None
    command = ON_CPUS.format(processes=requested)
    return f"{requested} processes were requested but only {world_size} started; on a CPU, use `{command}`"


def requested_processes(command: Sequence[str]) -> int:
    """How many processes an ``accelerate launch …`` command asks for; 1 for any other command.

    By option, else by the named configuration file, else by the default one, which Accelerate ignores under ``--cpu``.
    """
    if not _is_accelerate(command):
        return 1
    count = _option(command, "num_processes")
    if count.isdigit():
        return int(count)
    file = _option(command, "config_file")
    if not file and "--cpu" not in command:
        from accelerate.commands.config.config_args import default_config_file

        file = default_config_file
    import yaml

    with contextlib.suppress(OSError, ValueError, RecursionError, AttributeError, yaml.YAMLError):
        configured = yaml.safe_load(Path(file).read_text(encoding="utf-8")).get("num_processes")
        return configured if isinstance(configured, int) and configured > 0 else 1
    return 1


def _is_accelerate(command: Sequence[str]) -> bool:
    """Whether it runs ``accelerate launch``, under any of its names; other programs have a ``launch`` too."""
    names = [Path(word).name for word in command]
    if {"accelerate-launch", "accelerate.commands.launch"} & set(names):
        return True
    programs = [
        place for place, name in enumerate(names) if name in ("accelerate", "accelerate.commands.accelerate_cli")
    ]
    return bool(programs) and "launch" in names[programs[0] + 1 :]


def _option(command: Sequence[str], name: str) -> str:
    """The value of an option, which Accelerate accepts with hyphens or underscores; empty without it."""
    for position, word in enumerate(command):
        option, _, value = word.partition("=")
        if option in {f"--{name}", f"--{name.replace('_', '-')}"}:
            return value or "".join(command[position + 1 : position + 2])
    return ""

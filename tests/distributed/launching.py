"""Starting a recipe's file, or any command, in several processes as users do: by torchrun."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILE = """
import sys
from peftkit import Recipe, main, recipe

@recipe
def shared() -> Recipe:
    return Recipe.from_yaml(sys.argv[0] + ".yaml")

if __name__ == "__main__":
    main(shared)
"""
TORCHRUN = ("-m", "torch.distributed.run")


def recipe_file(folder, recipe):
    """A file that trains the recipe when it is run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "shared.py").write_text(FILE)
    (folder / "shared.py.yaml").write_text(recipe.to_yaml())
    return str(folder / "shared.py")


def start(*command):
    """Starts Python with these arguments, on the CPU and with a thread a process; its output is in one pipe."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(*command, seconds=300):
    """What a command said; it must succeed."""
    started = start(*command)
    said, _ = started.communicate(timeout=seconds)
    assert started.returncode == 0, said[-3000:]
    return said


def free_port():
    """A port of the loopback that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def two_agents(*command):
    """The rehearsal of two machines: two agents of torchrun that meet over the loopback, with a process each."""
    place = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}", "--rdzv_id", "rehearsal"]
    return [start(*TORCHRUN, "--nnodes", "2", "--nproc_per_node", "1", *place, *command) for _ in range(2)]

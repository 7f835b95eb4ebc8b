"""An environment of its own for each peer, built from PyPI under ``benchmarks/.envs`` on first use.

torch is installed first and held, so that no peer pulls in another build.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ENVIRONMENTS = Path(__file__).parent / ".envs"
TORCH = "torch==2.13.0"
PACKAGES = {
    "trl": ["trl==1.16.0", "transformers==5.23.0", "peft==0.21.2", "accelerate==1.15.0", "datasets==5.2.0"],
}


def python_of(peer: str) -> str:
    """The peer's interpreter; builds its environment when it is not there."""
    folder = ENVIRONMENTS / peer
    python = folder / "bin" / "python"
    done = folder / "complete"
    if not done.is_file():
        print(f"building the environment of {peer} (minutes)", file=sys.stderr, flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        held = folder / "constraints.txt"
        held.write_text(TORCH + "\n")
        install = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(held)]
        subprocess.run([*install, TORCH], check=True)
        subprocess.run([*install, *PACKAGES[peer]], check=True)
        done.touch()
    return str(python)

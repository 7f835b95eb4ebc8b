"""An environment of its own for each peer, built from PyPI under ``benchmarks/.envs`` on first use.

    python benchmarks/environments.py [trl setfit adapters llamafactory transformers_serve]

builds those named (all, where none is) ahead of the measurements. torch is installed first and held, so that no peer
pulls in another build.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ENVIRONMENTS = Path(__file__).parent / ".envs"
TORCH = "torch==2.13.0"
PACKAGES = {
    "trl": ["trl==1.16.0", "transformers==5.23.0", "peft==0.21.2", "accelerate==1.15.0", "datasets==5.2.0"],
    "setfit": ["setfit==1.2.0", "sentence-transformers==6.2.0", "transformers==5.23.0", "datasets==5.2.0"],
    "adapters": [
        "adapters==1.3.0",
        "transformers==4.57.6",
        "huggingface_hub==0.36.2",
        "accelerate==1.15.0",
        "datasets==5.0.1",
    ],
    "llamafactory": ["llamafactory==0.9.5"],
    "transformers_serve": ["transformers[serving]==5.23.0", "accelerate==1.15.0"],
}
"""What is asked of pip, in one command, for each peer."""


def python_of(peer: str) -> str:
    """The peer's interpreter; builds its environment when it is not there, or of other versions."""
    folder = ENVIRONMENTS / peer
    python = folder / "bin" / "python"
    done, wanted = folder / "complete", "\n".join([TORCH, *PACKAGES[peer]])
    if not done.is_file() or done.read_text() != wanted:
        print(f"building the environment of {peer} (minutes)", file=sys.stderr, flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        held = folder / "constraints.txt"
        held.write_text(TORCH + "\n")
        install = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(held)]
        subprocess.run([*install, TORCH], check=True)
        subprocess.run([*install, *PACKAGES[peer]], check=True)
        AFTERWARDS.get(peer, lambda _: None)(python)
        done.write_text(wanted)
    return str(python)


def command_of(peer: str, name: str) -> str:
    """A command that the peer installs, ``trl`` for one."""
    return str(Path(python_of(peer)).with_name(name))


def without_torchaudio(python: Path) -> None:
    """LLaMA-Factory imports torchaudio for sound it is not given, and its builds fit one build of torch only."""
    subprocess.run([str(python), "-m", "pip", "uninstall", "--yes", "--quiet", "torchvision", "torchaudio"], check=True)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    found = subprocess.run([str(python), "-c", where], capture_output=True, text=True, check=True)
    (Path(found.stdout.strip()) / "torchaudio.py").write_text('"""Stands in for torchaudio, which text needs not."""\n')


AFTERWARDS: dict[str, Callable[[Path], None]] = {"llamafactory": without_torchaudio}


if __name__ == "__main__":
    for chosen in sys.argv[1:] or PACKAGES:
        print(python_of(chosen))

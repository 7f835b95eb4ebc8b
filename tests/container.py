"""What the Dockerfile of the server does, without a container engine: ``make container-check``.

    python tests/container.py [--served FOLDER]

The files that it copies go into an empty folder, its commands run there in a virtual environment of their own (with
PIP_OPTIONS from the environment as the build argument), and the server starts as a user without rights, if this is run
by root, who can write to one folder alone, /tmp in the container. Then its health check must pass, a request must be
answered, and SIGTERM must end it. Without ``--served``, a small classifier is trained and exported to be served. Takes
minutes, and downloads what constraints.txt names unless pip has it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "container" / "Dockerfile"
USER = 10001
KEY = "a key of this check"


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile, lines that continue joined."""
    text = re.sub(r"(?m)^#.*\n", "", DOCKERFILE.read_text(encoding="utf-8")).replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    return [(name, arguments) for name, arguments in lines]


def last(name: str) -> str:
    """Arguments of the last instruction of a name."""
    return [value for kind, value in instructions() if kind == name][-1]


def command_of(value: str) -> list[str]:
    """The words of a command in JSON."""
    return list(yaml.safe_load(value[value.index("[") :]))


@dataclass
class Image:
    """What the Dockerfile's stages would leave: folders that stand for those of the image."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """Of the server: the Dockerfile's, nothing of this one's."""
        written = dict(part.split("=", 1) for part in shlex.split(last("ENV")))
        path = f"{self.folder / 'venv' / 'bin'}:/usr/bin:/bin"
        return {"PATH": path, "HOME": "/nonexistent", **{name: self.here(value) for name, value in written.items()}}

    def here(self, words: str) -> str:
        """Words with the image's folders replaced by those of this machine."""
        return re.sub(r"(?<![\w./-])/(source|wheels|served|tmp)\b", rf"{self.folder}/\1", words)

    def build(self) -> None:
        """Copies files and runs commands, in both stages; raises CalledProcessError where one fails."""
        for name in ("source", "wheels", "tmp"):
            (self.folder / name).mkdir()
        subprocess.run([sys.executable, "-m", "venv", str(self.folder / "venv")], check=True)
        for kind, value in instructions():
            if kind == "COPY":
                *sources, to = value.split()
                self._copy(sources, self.folder / "source" / to)
            elif kind == "RUN":
                command = re.sub(r"--mount=\S+", "", value).strip()
                print(f"RUN {command}", flush=True)
                environment = {**os.environ, "PATH": f"{self.folder / 'venv' / 'bin'}:{os.environ['PATH']}"}
                subprocess.run(
                    ["/bin/sh", "-c", self.here(command)], check=True, cwd=self.folder / "source",
                    env={"PIP_OPTIONS": "", **environment},
                )  # fmt: skip
        shutil.rmtree(self.folder / "source")
        shutil.rmtree(self.folder / "wheels")

    def _copy(self, sources: list[str], to: Path) -> None:
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, to, ignore=shutil.ignore_patterns("__pycache__", "runs"))
            else:
                to.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / source, to)

    def serve(self, port: int) -> subprocess.Popen[bytes]:
        """The server, as the user of the container."""
        words = [*command_of(last("ENTRYPOINT")), *command_of(last("CMD"))]
        command = [self.here(word).replace("8000", str(port)) for word in words]
        (self.folder / "tmp").chmod(0o777)
        environment = {**self.environment, "PEFTKIT_API_KEY": KEY, "TMPDIR": str(self.folder / "tmp")}
        return subprocess.Popen(command, cwd="/", env=environment, **self._user())  # type: ignore[call-overload,no-any-return]

    def _user(self) -> dict[str, object]:
        """Options that start a process as the user of the container, where that is possible."""
        user = {"user": USER, "group": USER, "extra_groups": []}
        python = [str(self.folder / "venv" / "bin" / "python"), "-c", ""]
        try:
            subprocess.run(python, check=True, capture_output=True, **user)  # type: ignore[call-overload]
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"the server runs as this user, since another one cannot: {error}")
            return {}
        return user

    def healthy(self, port: int) -> bool:
        """Whether the health check passes."""
        command = [word.replace("8000", str(port)) for word in command_of(last("HEALTHCHECK"))]
        return subprocess.run(command, env=self.environment, capture_output=True, check=False).returncode == 0


def small_export(folder: Path, to: Path) -> None:
    """Trains a tiny classifier and writes it as one plain model."""
    import peftkit
    from peftkit.export import run_export
    from tests import tiny

    rows = "\n".join(f"the {word} of the {word},{number % 2}" for number, word in enumerate(tiny.WORDS))
    (folder / "rows.csv").write_text(f"text,label\n{rows}\n", encoding="utf-8")
    run = peftkit.train(peftkit.Recipe.parse({
        "name": "small", "model": {"source": str(tiny.tiny_bert(folder / "bert")), "dtype": "float32"},
        "data": {"source": str(folder / "rows.csv")}, "training": {"max_steps": 1}, "evaluation": {"baselines": []},
        "export": {"prove": False}, "tracking": [], "output_dir": str(folder / "runs"),
    }), quiet=True).path  # fmt: skip
    run_export(run, to, merge=True)


def ask(port: int) -> dict[str, object]:
    """The models that the server has."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/models", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return dict(json.load(answer))


def check(folder: Path, served: Path | None) -> None:
    """Builds and serves; raises where something of it fails."""
    folder.chmod(0o755)
    image = Image(folder)
    with tempfile.TemporaryDirectory() as work:
        if served is None:
            small_export(Path(work), folder / "served")
        else:
            shutil.copytree(served, folder / "served")
    image.build()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    server = image.serve(port)
    try:
        until = time.monotonic() + 300
        while not image.healthy(port):
            if server.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"the server is not healthy (its exit code: {server.poll()})")
            time.sleep(1)
        print(f"healthy; it serves {ask(port)}")
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(90)
    if code not in (0, -signal.SIGTERM, 128 + signal.SIGTERM):
        raise SystemExit(f"SIGTERM ended the server with {code}")
    print(f"SIGTERM ended it with {code}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--served", type=Path, help="an exported folder")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory(prefix="peftkit-container-") as name:
        check(Path(name), arguments.served)

"""The server's container: what its files say, and that their commands are real; no container engine is needed."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer
import yaml

from peftkit.cli import app
from peftkit.serving import server
from tests.container import DOCKERFILE, ROOT, command_of, instructions, last
from tests.serving.running import served


def test_a_linter_has_nothing_to_say():
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if linter is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([linter, str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("", 0)


def test_it_runs_without_rights_and_builds_from_files_that_are_there():
    steps = instructions()
    user = [place for place, (kind, _) in enumerate(steps) if kind == "USER"]
    assert last("USER").split(":") == ["10001", "10001"]
    assert not [kind for kind, _ in steps[user[-1] :] if kind in ("RUN", "COPY", "ADD")]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for kind, value in steps:
        assert kind != "ADD"
        if kind == "COPY":
            for source in value.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert f"!{source.rstrip('/')}" in ignored, source
    assert "KEY" not in DOCKERFILE.read_text(encoding="utf-8"), "a key is given when it is run"


def test_its_command_is_one_of_the_command_line():
    command = [*command_of(last("ENTRYPOINT")), *command_of(last("CMD"))]
    assert command[0] == "peftkit"
    group = typer.main.get_command(app.app)
    with click.Context(group) as context:
        name, kind, arguments = group.resolve_command(context, command[1:])
        values = kind.make_context(name, arguments).params
    assert (str(values["run"]), values["host"], values["port"]) == ("/served", "0.0.0.0", 8000)
    assert last("EXPOSE") == str(values["port"])


def test_its_health_check_tells_a_server_that_answers(bert, topics_csv, tmp_path):
    import peftkit
    from peftkit import Recipe

    run = peftkit.train(Recipe.parse({
        "name": "small", "model": {"source": str(bert), "dtype": "float32"}, "method": {"kind": "frozen"},
        "data": {"source": str(topics_csv), "max_length": 16}, "training": {"max_steps": 1, "threads": 1},
        "evaluation": {"baselines": []}, "export": {"prove": False}, "tracking": [], "output_dir": str(tmp_path),
    }), quiet=True).path  # fmt: skip
    program, flag, code = command_of(last("HEALTHCHECK"))
    assert (program, flag) == ("python", "-c")

    def check(address):
        return subprocess.run([sys.executable, flag, code.replace("http://127.0.0.1:8000", address)],
                              capture_output=True, check=False).returncode  # fmt: skip

    with served(run, hosts=None, key="secret") as (_, address):
        assert check(address) == 0
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        assert check(f"http://127.0.0.1:{closed.getsockname()[1]}") == 1


def test_compose_gives_it_no_more_than_it_needs():
    (service,) = yaml.safe_load((ROOT / "container" / "compose.yaml").read_text(encoding="utf-8"))["services"].values()
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["user"] == last("USER")
    assert all(volume.endswith(":ro") for volume in service["volumes"])
    assert service["volumes"][0].split(":")[1] == command_of(last("CMD"))[0]
    assert all(port.startswith("127.0.0.1:") and port.endswith(":8000") for port in service["ports"])
    assert service["environment"] == {server.KEY: service["environment"][server.KEY]}
    assert service["environment"][server.KEY].startswith(f"${{{server.KEY}:?"), "no key is no server"
    assert int(service["stop_grace_period"].rstrip("s")) > server.GRACE
    root = (ROOT / "container" / service["build"]["context"]).resolve()
    assert root / service["build"]["dockerfile"] == DOCKERFILE
    written = dict(part.split("=") for part in shlex.split(last("ENV")))
    places = {place.split(":")[0] for place in service["tmpfs"]}
    assert {f"/{path.split('/')[1]}" for name, path in written.items() if path.startswith("/")} <= places

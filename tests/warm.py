"""Python processes that start warm: forked from one that has imported the libraries and nothing of peftkit.

    done = warm.run([sys.executable, "-m", "peftkit", "list"], cwd=folder, text=True)

Importing torch, transformers and peft takes some 5 s of processor time, most of what a small test in a process of its
own costs. A forked process runs the same code, module or script with the arguments, environment, folder, output and
exit code of a real one. ``PEFTKIT_COLD_PROCESSES=1`` starts real ones, as ``make test-all`` does; a test of the start
itself, or of variables that libraries read when they are imported, calls ``subprocess`` as always.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

LIBRARIES = (
    "accelerate", "datasets", "jinja2", "matplotlib.pyplot", "pandas", "peft", "pydantic", "rich.console",
    "scipy.stats", "sklearn.metrics", "torch", "torch._dynamo", "transformers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.bert.modeling_bert", "transformers.models.distilbert.modeling_distilbert",
    "transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama",
    "transformers.models.roberta.modeling_roberta", "typer",
)  # fmt: skip
SOCKET = "PEFTKIT_WARM_SOCKET"
"""The variable that tells warm processes where to ask for others."""
_COLD_RUN = subprocess.run
"""As it was before ``proofs``."""


def run(
    command: list[str], *, cwd: Any = None, env: dict[str, str] | None = None, check: bool = False,
    timeout: float | None = None, **streams: Any,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """``subprocess.run`` with captured text output and no input, for a command of this Python."""
    assert command[0] == sys.executable, f"{command[0]} is not this Python"
    assert all(streams.values()), f"warm.run always captures text: {streams}"
    if cold():
        options = {"cwd": cwd, "env": env, "check": check, "timeout": timeout, "stdin": subprocess.DEVNULL}
        return _COLD_RUN(command, capture_output=True, text=True, **options)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = WarmProcess(command[1:], cwd, env, out.fileno(), err.fileno())
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            raise
        out.seek(0)
        err.seek(0)
        done = subprocess.CompletedProcess(command, code, out.read(), err.read())
    if check:
        done.check_returncode()
    return done


def start(command: list[str], *, cwd: Any = None, env: dict[str, str] | None = None) -> Any:
    """``subprocess.Popen`` without output, of which poll, wait and send_signal are used."""
    if cold():
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(command, cwd=cwd, env=env, **quiet)
    with open(os.devnull, "w") as null:
        return WarmProcess(command[1:], cwd, env, null.fileno(), null.fileno())


@contextlib.contextmanager
def proofs() -> Iterator[None]:
    """Processes that prove exports start warm."""
    real = subprocess.run

    def run_proof(command: Any, *arguments: Any, **options: Any) -> Any:
        proof = isinstance(command, list) and str(command[2:3]).endswith("verify_worker.py']")
        return run(command, **options) if proof else real(command, *arguments, **options)

    subprocess.run = run_proof  # type: ignore[assignment]
    try:
        yield
    finally:
        subprocess.run = real


def cold() -> bool:
    """Whether processes are to be real ones."""
    return os.environ.get("PEFTKIT_COLD_PROCESSES", "") not in ("", "0") or not hasattr(os, "fork")


class WarmProcess:
    """A running process; its exit code comes over the connection on which it was asked for."""

    def __init__(self, arguments: list[str], cwd: Any, env: dict[str, str] | None, out: int, err: int) -> None:
        request = {"arguments": list(map(str, arguments)), "cwd": str(cwd or Path.cwd()), "env": env or {**os.environ}}
        self.args, self.returncode = arguments, None
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(os.environ.get(SOCKET) or _server()[1])
        socket.send_fds(self.connection, [b"\n"], [out, err])
        self.connection.sendall(json.dumps(request).encode() + b"\n")
        self.replies = self.connection.makefile("r")
        self.pid = int(self.replies.readline())

    def poll(self) -> int | None:
        """The exit code of a process that has ended, else None."""
        if self.returncode is None and select.select([self.connection], [], [], 0)[0]:
            self.returncode = int(self.replies.readline())
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, negative for a signal's number."""
        if self.returncode is None and not select.select([self.connection], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        code = self.poll()
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        """Signals a process that has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


@functools.cache
def _server() -> tuple[subprocess.Popen[str], str]:
    """The process from which the others are forked, and the path of its socket; it ends with this one."""
    path = os.path.join(tempfile.mkdtemp(prefix="warm-"), "socket")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-I", __file__, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=environment, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", "the process that others are forked from did not start"
    os.environ[SOCKET] = path
    return process, path


def stop() -> None:
    """Ends the process that others are forked from, if there is one."""
    if _server.cache_info().currsize:
        process, path = _server()
        assert process.stdin is not None
        process.stdin.close()
        process.wait(60)
        shutil.rmtree(Path(path).parent, ignore_errors=True)
        del os.environ[SOCKET]
        _server.cache_clear()


# -- in the process that others are forked from ------------------------------------------------------------------------


def serve(path: str) -> dict[str, Any]:
    """Forks a process for every connection and reports its exit code; returns in the forked ones, with the request."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda *given: None)
    running: dict[int, socket.socket] = {}
    print("ready", flush=True)
    while True:
        ready = select.select([0, listener, woken], [], [])[0]
        if 0 in ready:  # the end of its input: the tests are over
            sys.exit()
        if listener in ready:
            connection, _ = listener.accept()
            _, streams, _, _ = socket.recv_fds(connection, 1, 2)
            request = json.loads(connection.makefile("r").readline())
            if (child := os.fork()) == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for opened in (listener, woken, wake, connection, *running.values()):
                    opened.close()
                redirect(streams)
                return request
            for stream in streams:
                os.close(stream)
            running[child] = connection
            connection.sendall(f"{child}\n".encode())
        if woken in ready:
            woken.recv(4096)
            while running and (ended := os.waitpid(-1, os.WNOHANG))[0]:
                with running.pop(ended[0]) as connection:
                    connection.sendall(f"{os.waitstatus_to_exitcode(ended[1])}\n".encode())


def redirect(streams: list[int]) -> None:
    """Makes these the standard streams."""
    null = os.open(os.devnull, os.O_RDONLY)
    for number, stream in enumerate((null, *streams)):
        os.dup2(stream, number)
        os.close(stream)


def become(arguments: list[str], cwd: str, env: dict[str, str]) -> None:
    """Does what Python does with these arguments: ``[-I] -c CODE …``, ``-m MODULE …`` or ``SCRIPT …``."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    isolated = arguments[0] == "-I"
    kind, *rest = arguments[1:] if isolated else arguments
    if not isolated:
        places = {"-c": "", "-m": cwd}
        search = [place for place in env.get("PYTHONPATH", "").split(os.pathsep) if place]
        sys.path[:0] = [places.get(kind, os.path.dirname(os.path.abspath(kind))), *search]
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    elif kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [kind, *rest]
        runpy.run_path(kind, run_name="__main__")


def end(run: Callable[[], None]) -> NoReturn:
    """Runs it and ends the process as Python would, but for taking apart every object that was imported.

    That would copy all memory that forked processes share, and cost several times what a small test does.
    """
    code: Any = 0
    try:
        run()
    except SystemExit as stop:
        code = stop.code
    except KeyboardInterrupt:
        traceback.print_exc()
        code = signal.SIGINT
    except BaseException:
        traceback.print_exc()
        code = 1
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if code is signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit((code or 0) & 0xFF)


def prepare() -> None:
    """Imports the libraries, and compiles the 900 patterns that transformers needs to load any model."""
    for library in LIBRARIES:
        importlib.import_module(library)
    with contextlib.suppress(ImportError, AttributeError):  # an older transformers has none
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        get_checkpoint_conversion_mapping("bert")


if __name__ == "__main__":
    prepare()
    gc.freeze()
    wanted = serve(sys.argv[1])
    end(lambda: become(**wanted))

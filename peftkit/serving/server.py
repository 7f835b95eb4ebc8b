"""Runs the server until a signal ends it."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from peftkit.errors import RunError

KEY = "PEFTKIT_API_KEY"
PACKAGES = ("starlette", "uvicorn", "prometheus_client")
GRACE = 60
"""Seconds that requests have to end after a signal."""


def serve(
    run: Path, *, adapters: Mapping[str, str], name: str, host: str, port: int, base: bool, log_requests: bool,
    queue: int, batch: int, max_tokens: int, timeout: float, backend: str | None = None, monitor: Path | None = None,
    monitor_texts: bool = False, monitor_embeddings: bool = False,
) -> None:  # fmt: skip
    """Loads a run and answers requests; returns when a signal has ended it and the requests in flight are done.

    Args:
        backend: what computes, see ``serving.backend``; by default the fastest proven form of the run.
        monitor: a folder for a log of what is served: see ``peftkit.monitoring``.

    Raises:
        RunError: not a finished run, or none for this backend; an address that others reach, without a key; a port in
            use; a package is missing.
        DataError: the log's folder cannot be written.
    """
    if (monitor_texts or monitor_embeddings) and monitor is None:
        raise RunError("--monitor-texts and --monitor-embeddings belong to --monitor FOLDER")
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise RunError(f"the server needs {', '.join(missing)}; run `pip install 'peftkit[serve]'`")
    import uvicorn

    from peftkit.inference import trained_model
    from peftkit.monitoring.log import ServingLog
    from peftkit.serving import backend as backends
    from peftkit.serving.app import LOOPBACK, build_app
    from peftkit.serving.recorder import Recorder
    from peftkit.serving.service import Limits, Service

    key = os.environ.get(KEY) or None
    if host not in LOOPBACK and key is None:
        raise RunError(f"--host {host}: others could use the server; set {KEY} in the environment, or leave --host out")
    folder = ServingLog(monitor) if monitor else None
    listening = _listen(host, port)
    needs = {"--adapter": adapters, "--base": base, "--monitor-embeddings": monitor_embeddings}
    form = backends.choose(run, wanted=backend, needs=[name for name, given in needs.items() if given])
    limits = Limits(queue=queue, batch=batch, tokens=max_tokens, seconds=timeout)
    with ThreadPoolExecutor(1) as loader:  # OpenMP's threads wait by sleeping once two threads have some: this one ends
        service = loader.submit(
            lambda: Service(
                trained_model.load(form.export, adapters=adapters, backend=None), name, limits, with_base=base
            )
        ).result()
    recorder = None
    if folder:
        recorder = Recorder(folder, service, texts=monitor_texts, embeddings=monitor_embeddings)
        service.observers.append(recorder)
    app = build_app(service, key=key, hosts=LOOPBACK if host in LOOPBACK else None, log_requests=log_requests)
    config = uvicorn.Config(
        # without a configuration of logging, which would close the handlers that other libraries have set up
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=GRACE,
        server_header=False,
    )
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listening.getsockname()[1]}"
    print(f"serving {', '.join(service.names)} on {address} (Ctrl-C ends it)")
    for line in (f"computed by {form.reason}", *form.unused, *service.notes):
        print(f"  {line}")
    sys.stdout.flush()
    try:
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        if recorder:
            recorder.close()


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, before a model is loaded; port 0 takes a free one."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunError(f"cannot listen on {host}:{port}: {reason}; choose another --port or --host") from None

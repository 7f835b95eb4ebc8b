"""A server in a thread of the test's process."""

from __future__ import annotations

import contextlib
import socket
import threading

import uvicorn

import peftkit
from peftkit.serving.app import build_app
from peftkit.serving.service import Limits, Service


@contextlib.contextmanager
def served(run, **options):
    """A server in a thread; yields the service and its address."""
    limits = options.pop("limits", Limits(queue=32, tokens=64))
    service = Service(peftkit.load(run, adapters=options.pop("adapters", None)), options.pop("name", "tiny"), limits,
                      with_base=options.pop("base", False))  # fmt: skip
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        build_app(service, **options), log_config=None, log_level="error", timeout_graceful_shutdown=5
    )
    instance = uvicorn.Server(config)
    thread = threading.Thread(target=instance.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield service, f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        instance.should_exit = True
        thread.join(20)
        assert not thread.is_alive()

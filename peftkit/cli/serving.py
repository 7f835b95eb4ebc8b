"""The command ``serve``."""

from __future__ import annotations

from typing import Annotated

import typer

from peftkit.cli.commands import RunFolder
from peftkit.cli.inference import adapters_by_name


def serve(
    run: RunFolder,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=RUN", help="Serve another run on the same base, too, under this name."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run for requests. Default: its recipe's name.")] = None,
    host: Annotated[str, typer.Option(help="Address; others than the loopback need PEFTKIT_API_KEY.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port.")] = 8000,
    base: Annotated[bool, typer.Option("--base", help="Serve the base model, too, as `base`.")] = False,
    log: Annotated[bool, typer.Option("--log", help="Print a JSON line for every request to stderr.")] = False,
    queue: Annotated[int, typer.Option(min=1, help="Refuse requests while this many are waiting.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Write at most this many texts at a time.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most new tokens of a text.")] = 2048,
    timeout: Annotated[float, typer.Option(min=1, help="Give a request up after this many seconds.")] = 300.0,
) -> None:
    """Serve a run over HTTP: OpenAI's chat, completions and embeddings, or classes and spans."""
    from peftkit.export.folder import open_export
    from peftkit.serving import server

    server.serve(
        run, adapters=adapters_by_name(adapter or []), name=name or open_export(run).recipe.name, host=host, port=port,
        base=base, log_requests=log, queue=queue, batch=batch, max_tokens=max_tokens, timeout=timeout,
    )  # fmt: skip

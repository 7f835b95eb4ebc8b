"""The commands ``serve`` and ``monitor``."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from peftkit.cli.commands import AsJson, RunFolder
from peftkit.cli.inference import adapters_by_name

DRIFT = 3
"""Exit code where served texts differ from those that the run was validated on."""


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
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What computes: torch, or onnx or onnx-int8 if exported. Default: auto, the usually fastest.",
            show_default=False,
        ),
    ] = None,
    monitor: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Log length, answer and confidence of every text for `peftkit monitor`."),
    ] = None,
    monitor_texts: Annotated[bool, typer.Option("--monitor-texts", help="Log the texts, too.")] = False,
    monitor_embeddings: Annotated[
        bool, typer.Option("--monitor-embeddings", help="Log the texts' vectors, too; each is computed again.")
    ] = False,
) -> None:
    """Serve a run over HTTP: OpenAI's chat, completions and embeddings, or classes and spans."""
    from peftkit.export.folder import open_export
    from peftkit.serving import server

    server.serve(
        run, adapters=adapters_by_name(adapter or []), name=name or open_export(run).recipe.name, host=host, port=port,
        base=base, log_requests=log, queue=queue, batch=batch, max_tokens=max_tokens, timeout=timeout,
        backend=backend,
        monitor=monitor, monitor_texts=monitor_texts, monitor_embeddings=monitor_embeddings,
    )  # fmt: skip


def monitor(
    run: RunFolder,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Log that `serve` or `predict` wrote.")],
    reference: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Compare with these texts. Default: the run's validation rows.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name under which the run was served. Default: its recipe's.")
    ] = None,
    level: Annotated[
        float, typer.Option(min=1e-6, max=0.5, help="Chance of a false alarm, of all tests together.")
    ] = 0.01,
    effect: Annotated[float, typer.Option(min=0, max=1, help="Smaller differences raise no alarm.")] = 0.1,
    since: Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d"], help="First day.")] = None,
    until: Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d"], help="Last day.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write a page, a table and a plot.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare served texts with the validation rows. Exit code 3: they differ."""
    from peftkit.monitoring.monitor import monitor as compare
    from peftkit.reporting import monitoring as view

    days = {name: day.date() for name, day in (("since", since), ("until", until)) if day}
    table = compare(run, folder, file=reference, model=model, level=level, effect=effect, **days)
    if out:
        view.write(out, table)
    if as_json:
        print(json.dumps(table, indent=2))
    else:
        view.show(table)
    if table["drift"]:
        raise typer.Exit(DRIFT)

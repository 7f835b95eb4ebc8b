"""Commands that use a trained model: ``predict``, ``embed``, ``search``, ``mine``, ``generate``, ``chat``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from peftkit.cli.commands import AsJson, Backend, Delimiter, Merge, RunFolder, given, report
from peftkit.errors import RunError

Texts = Annotated[
    Path | None,
    typer.Option(help="Texts: csv, tsv, jsonl, xlsx, txt and others. Default: one text per line from stdin."),
]
MaxNewTokens = Annotated[int | None, typer.Option(help="Generate at most this many tokens.")]
Temperature = Annotated[float | None, typer.Option(help="Sampling temperature; 0 is greedy.")]
TopP = Annotated[float | None, typer.Option(help="Sample from the likeliest tokens with this cumulative probability.")]
TopK = Annotated[int | None, typer.Option(help="Sample from the k most likely tokens; 0 for all.")]
Seed = Annotated[int | None, typer.Option(help="Seed for sampling.")]


def predict(
    run: RunFolder,
    file: Texts = None,
    column: Annotated[str | None, typer.Option(help="Column of the texts. Default: the recipe's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write csv, tsv or jsonl. Default: JSON lines on stdout.")] = None,
    delimiter: Delimiter = None,
    merge: Merge = None,
    backend: Backend = None,
    monitor: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Log length, answer and confidence of every text for `peftkit monitor`."),
    ] = None,
) -> None:
    """Classify texts, with the probability of every label."""
    from peftkit.inference import predict_file

    observe = None
    if monitor:
        from peftkit.monitoring.predictions import recorder

        observe = recorder(monitor)
    options = given(merge=merge, delimiter=delimiter, observe=observe, backend=backend)
    count = predict_file.predict_file(run, file=file, column=column, out=out, **options)
    if out:
        report(f"wrote {count} rows to {out}")


def embed(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_MODEL", help="A run (folder or hub:USER/NAME), or a base: hub id, ./folder, package:NAME."
        ),
    ],
    file: Texts = None,
    column: Annotated[
        str | None, typer.Option(help="Column of the texts. Default: the recipe's, or `text` for a base.")
    ] = None,
    pair: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column of a second text, read together with the first.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write npy, parquet or jsonl. Default: JSON lines to stdout.")
    ] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Scale vectors to length 1.")] = False,
) -> None:
    """Embed texts with the model's pooling."""
    from peftkit.inference import embed_file

    count = embed_file.embed_file(source, file=file, column=column, out=out, normalize=normalize, pair=pair)
    if out:
        report(f"wrote {count} vectors to {out}")


def search(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_MODEL", help="A run (folder or hub:USER/NAME), or a base: hub id, ./folder, package:NAME."
        ),
    ],
    corpus: Annotated[Path, typer.Option(help="Texts to search: csv, tsv, jsonl, xlsx, txt and others.")],
    query: Annotated[
        list[str] | None, typer.Option(help="What to search for; may be repeated. Default: one per line from stdin.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Show this many texts for each query.")] = 5,
    column: Annotated[
        str | None,
        typer.Option(help="Column of the texts. Default: the recipe's second text, or its text."),
    ] = None,
    rerank: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Order the best texts again by a run of task.kind=reranking.")
    ] = None,
    candidates: Annotated[
        int | None, typer.Option(min=1, help="Texts per query that --rerank reads. Default: 50.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find the texts of a file that are most like a query, by the cosine of their vectors."""
    from peftkit.inference import search as searching

    queries = query or [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
    if candidates is not None and rerank is None:
        raise RunError("--candidates is the number of texts that --rerank RUN reads; give the run, or leave it out")
    options = given(rerank=rerank, candidates=candidates)
    answers = searching.search_file(source, corpus=corpus, queries=queries, top=top, column=column, **options)
    searching.show(queries, answers, as_json=as_json)


def mine(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_MODEL", help="A run (folder or hub:USER/NAME), or a base: hub id, ./folder, package:NAME."
        ),
    ],
    file: Annotated[Path, typer.Option(help="Pairs: csv, tsv, jsonl, xlsx and others.")],
    out: Annotated[Path, typer.Option(help="Write csv, tsv or jsonl: the pairs with their negatives.")],
    text: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="First text. Default: the recipe's, or `text` for a base.")
    ] = None,
    text_pair: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Second text. Default: the recipe's, or `text_pair`.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Negatives per pair.")] = 1,
    margin: Annotated[
        float,
        typer.Option(min=0, max=1, help="Take texts whose cosine is smaller than the pair's by this share, or more."),
    ] = 0.05,
) -> None:
    """Find hard negatives for pairs of texts: what a model takes for alike and no pair holds."""
    from peftkit.inference import negatives

    written, left_out = negatives.mine_file(
        source, file=file, out=out, text=text, text_pair=text_pair, count=count, margin=margin
    )
    note = f"; {left_out} have too few texts below the margin and are left out" if left_out else ""
    names = "[negative]" if count == 1 else f"[{', '.join(f'negative_{n}' for n in range(1, count + 1))}]"
    report(f"wrote {written} pairs to {out}{note}; train on them with task.negatives={names}")


def generate(
    run: RunFolder,
    file: Annotated[
        Path | None, typer.Option(help="Prompts: jsonl, csv or txt. Default: one prompt per line from stdin.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write JSON lines to a file. Default: stdout.")] = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    num_beams: Annotated[int | None, typer.Option(min=1, help="Beam search with this many beams; 1 is greedy.")] = None,
    length_penalty: Annotated[
        float | None, typer.Option(help="Of beam search: larger values prefer longer texts.")
    ] = None,
    seed: Seed = None,
    merge: Merge = None,
) -> None:
    """Generate text from prompts; rows hold prompt, messages, or instruction and input."""
    from peftkit.inference import generate_file

    options = given(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, num_beams=num_beams,
        length_penalty=length_penalty, seed=seed,
    )  # fmt: skip
    count = generate_file.generate_file(run, file=file, out=out, options=options, **given(merge=merge))
    if out:
        report(f"wrote {count} rows to {out}")


def chat(
    run: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="Folder of a finished run, or hub:USER/NAME.")
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Chat with a server instead of a run; its key is PEFTKIT_API_KEY.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=RUN", help="Add another run on the same base; /adapter NAME switches to it."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt. Default: the recipe's.")] = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    merge: Merge = None,
) -> None:
    """Chat with a language model on the terminal or through a pipe; /help lists commands."""
    from peftkit.inference import generate_file, prompts, trained_model
    from peftkit.inference.chat import Chat

    if (run is None) == (url is None):
        raise RunError("expected a run or --url ADDRESS, one of the two")
    if url is not None:
        if adapter or merge is not None:
            raise RunError("--adapter and --merge belong to a run; the server's models are switched with /adapter")
        from peftkit.inference.remote import RemoteModel

        fields = given(max_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
        Chat(RemoteModel(url, fields), sys.stdin, sys.stdout, sys.stderr, system).run()
        return
    assert run is not None
    options = given(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    export = generate_file.open_language_run(run)
    prompts.generation_config(export.recipe, options)  # reports a wrong option before the model is loaded
    model = trained_model.load(export, adapters=adapters_by_name(adapter or []), **given(merge=merge))
    Chat(model.configured(**options), sys.stdin, sys.stdout, sys.stderr, system).run()


def adapters_by_name(texts: list[str]) -> dict[str, str]:
    """NAME=RUN options as a mapping; raises RunError for another spelling or a name given twice."""
    adapters: dict[str, str] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or not path or name in adapters:
            raise RunError(
                f"--adapter {text}: expected NAME=RUN with a different name each, such as kjv=runs/style_kjv_lora-…"
            )
        adapters[name] = path
    return adapters

"""``peftkit serve`` under load: clients that ask at the same time, next to one at a time and to other servers.

    python benchmarks/serving.py --work chat --data ALPACA [--clients 16] [--repeats 3]
    python benchmarks/serving.py --work classify --data AG_NEWS [--clients 16]
    python benchmarks/serving.py --work mixed --data ALPACA [--minutes 30] --repeats 1
    python benchmarks/serving.py --work mixed_classify --data AG_NEWS [--minutes 30] --repeats 1

``chat``: SmolLM2-135M with a LoRA adapter answers ``--requests`` questions greedily with at most ``--max-tokens``
tokens: 16 clients at peftkit, one client at peftkit, and 16 clients at ``transformers serve`` with the merged model.
``classify``: MiniLM with a LoRA adapter, one text per request, the run itself and its INT8 export, next to
transformers' pipeline behind Starlette on uvicorn. ``mixed``, ``mixed_classify``: whole answers, streams, answers that
clients leave, and nonsense, for some minutes; ``lost`` counts requests without the answer due to them,
``server_errors`` answers of 5xx, and ``memory_growth`` is from the second tenth of the time to the last. ``--peer``
names the ``transformers`` command of an environment with ``transformers[serving]``; without it one is built.
``--tuned`` adds its continuous batching to the chats, which has not been measured to the end on a CPU yet. ALPACA holds
train.jsonl and test.jsonl, AG_NEWS train.csv and test.csv.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import classify
import instruction_lora
import processes
from environments import command_of
from harness import ENVIRONMENT, WORKERS, compare, minilm, options, shared, table_rows
from harness import lay_out as lay_out_table

PEFTKIT = [sys.executable, "-m", "peftkit"]
HEADLINES = {
    "chat": "tokens_per_second", "classify": "requests_per_second", "mixed": "requests_per_second",
    "mixed_classify": "requests_per_second",
}  # fmt: skip


def main() -> None:
    """Measures and writes ``results/NAME.json``; the name is that of the work unless given."""
    parser = options(__doc__, name="", rows=48, repeats=3)
    parser.set_defaults(tuned=False)
    parser.add_argument("--work", choices=tuple(HEADLINES), default="chat")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, help="default: 64 chats, 1,600 texts")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--peer", help="the command `transformers` of an environment with transformers[serving]")
    args = parser.parse_args()
    classes = args.work.endswith("classify")
    requests = shared(args.requests or (1600 if classes else 64), args.share, least=4)
    with tempfile.TemporaryDirectory(prefix="peftkit-bench-") as name:
        folder = Path(name)
        if classes:
            data = lay_out_table(args.data, folder / "rows", shared(1000, args.share), validation=0, test=requests)
            run, texts = classify.trained(data, folder), folder / "texts.jsonl"
            texts.write_text("\n".join(json.dumps(row["text"]) for row in table_rows(data / "test.csv")), "utf-8")
            if args.work == "mixed_classify":
                seconds = args.minutes * 60
                contestants = {"peftkit": load(args.work, texts, args, own(run), ["--seconds", str(seconds)])}
                what = f"MiniLM, mixed requests of {args.clients} clients for {args.minutes:g} minutes"
            else:
                contestants = classifiers(run, texts, args, requests)
                what = f"MiniLM with a LoRA adapter, {requests} texts, {args.clients} clients, a text per request"
        else:
            rows, judged = instruction_lora.lay_out(args.data, folder, shared(args.rows, args.share, least=16))
            questions = ask_of_alpaca(judged, folder / "questions.jsonl")
            run = trained(rows, folder)
            if args.work == "mixed":
                seconds = args.minutes * 60
                contestants = {"peftkit": load("mixed", questions, args, own(run), ["--seconds", str(seconds)])}
                what = f"SmolLM2-135M, mixed requests of {args.clients} clients for {args.minutes:g} minutes"
            else:
                peer = args.peer or command_of("transformers_serve", "transformers")
                contestants = chats(questions, run, folder, args, requests, peer)
                what = f"SmolLM2-135M, {requests} chats of at most {args.max_tokens} tokens, greedy"
        compare(args.name or f"serving_{args.work}", what, contestants, args.repeats, headline=HEADLINES[args.work])


def load(work: str, questions: Path, args, server: Sequence[str], more: Sequence[str]) -> list[str]:
    """The command of the clients; ``server`` is that of what they ask."""
    command = [sys.executable, str(WORKERS / "serving_load.py"), work, "--data", str(questions)]
    chats = ["--max-tokens", str(args.max_tokens)]
    clients = [] if "--clients" in more else ["--clients", str(args.clients)]
    model = [] if "--model" in more else ["--model", "served"]
    return [*command, *chats, *clients, *model, *more, "--", *server]


def own(run: Path) -> list[str]:
    """peftkit's server."""
    return [*PEFTKIT, "serve", str(run), "--name", "served", "--port", "{port}"]


def chats(questions: Path, run: Path, folder: Path, args, requests: int, peer: str) -> dict[str, list[str]]:
    """The contestants of ``--work chat``."""
    merged = folder / "merged"
    finish([*PEFTKIT, "export", str(run), "--format", "merged", "--to", str(merged)], "exporting")
    count = ["--requests", str(requests)]
    other = [peer, "serve", str(merged), "--port", "{port}", "--device", "cpu"]
    as_peer = [*count, "--model", str(merged), "--ready", "/health"]
    many = f"{args.clients} clients"
    contestants = {
        "peftkit": load("chat", questions, args, own(run), count),
        "peftkit, one client": load("chat", questions, args, own(run), [*count, "--clients", "1"]),
        f"transformers serve, {many}": load("chat", questions, args, other, as_peer),
    }
    if args.tuned:
        batching = [*other, "--continuous-batching"]
        contestants["transformers serve, continuous batching"] = load("chat", questions, args, batching, as_peer)
    return contestants


def classifiers(run: Path, texts: Path, args, requests: int) -> dict[str, list[str]]:
    """The contestants of ``--work classify``; the exports are in the run's folder, where the server finds them."""
    labels = json.loads((run / "info.json").read_text(encoding="utf-8"))["labels"]
    pipeline = [
        sys.executable, str(WORKERS / "pipeline_server.py"), "--model", minilm(), "--adapter", str(run / "adapter"),
        "--labels", ",".join(labels), "--port", "{port}",
    ]  # fmt: skip
    servers = {
        "peftkit, the run itself": [*own(run), "--backend", "torch"],
        "peftkit, ONNX export": [*own(run), "--backend", "onnx"],
        "peftkit, INT8 export": [*own(run), "--backend", "onnx-int8"],
        "pipeline": pipeline,
    }  # fmt: skip
    count = ["--requests", str(requests)]
    return {name: load("classify", texts, args, server, count) for name, server in servers.items()}


def ask_of_alpaca(rows: Path, file: Path) -> Path:
    """Writes the instructions of rows, with their inputs, one JSON string per line."""
    lines = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    texts = ["\n".join(filter(None, (line["instruction"], line.get("input")))) for line in lines]
    file.write_text("\n".join(json.dumps(text) for text in texts), encoding="utf-8")
    return file


def trained(rows: Path, folder: Path) -> Path:
    """The run that is served; its training is not measured."""
    command = [
        sys.executable, str(WORKERS / "peftkit_run.py"), "instruct_alpaca_lora", f"data.source={rows}",
        "training.batch_size=8", "evaluation.baselines=[]", "evaluation.generation.samples=0", "export.prove=false",
        "training.log_every=1", "tracking=[]", f"output_dir={folder / 'runs'}",
    ]  # fmt: skip
    return Path(json.loads(finish(command, "training").strip().splitlines()[-1])["adapter"]).parent


def finish(command: Sequence[str], what: str) -> str:
    """The output of a command that is not measured; ends this one where it fails."""
    done = processes.run(command, ENVIRONMENT)
    if done.code:
        sys.exit(f"{what} failed ({done.code}):\n{done.errors[-3000:]}")
    return done.output


if __name__ == "__main__":
    main()

"""Clients of a server: starts it, lets some clients ask at the same time, ends it; prints one JSON line.

python benchmarks/workers/serving_load.py WORK --clients 16 --requests 48 --data FILE -- COMMAND {port} …

FILE has a JSON string on each line, which is what is asked. ``chat`` counts tokens by the answers' own usage.
``mixed`` asks for ``--seconds`` in turn for whole answers, continuations, streams, streams that are left after their
first chunk, and nonsense; ``mixed_classify`` for the labels of one text and of several, answers that are left, and
nonsense. Both compare the server's memory after a tenth of the time (its caches are full then) with that at the end.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import psutil

CHAT, COMPLETIONS, CLASSIFY = "/v1/chat/completions", "/v1/completions", "/v1/classify"
NONSENSE = (b"", b"{", b"[]", b'{"messages": "nonsense"}', b'{"input": {"a": 1}}', b'{"temperature": -1}', b"\xff" * 64)


@dataclass
class Load:
    """What is asked of a server at a port, and what came of it."""

    port: int
    model: str
    max_tokens: int
    texts: list[str]
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    lost: int = 0
    """Requests without the answer that is due to them."""
    server_errors: int = 0
    """Answers of status 5xx."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def post(self, path: str, body: Any, *, leave: bool = False) -> tuple[int, bytes]:
        """Status and content; ``leave`` hangs up after the first bytes. A body of bytes is sent as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            connection.request("POST", path, content, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            with self.lock:
                self.server_errors += answer.status >= 500
            return answer.status, answer.read(20) if leave else answer.read()
        finally:
            connection.close()

    def chat(self, number: int) -> None:
        """One greedy answer."""
        started = time.perf_counter()
        status, content = self.post(CHAT, self.question(number))
        usage = json.loads(content)["usage"] if status == 200 else {"completion_tokens": 0}
        self.count(status == 200, started, usage["completion_tokens"])

    def classify(self, number: int) -> None:
        """The label of one text."""
        started = time.perf_counter()
        status, content = self.post(CLASSIFY, {"input": self.texts[number % len(self.texts)]})
        self.count(status == 200 and "label" in json.loads(content)["data"][0], started)

    def mixed(self, number: int) -> None:
        """One of five kinds of request to a language model."""
        started, kind, question = time.perf_counter(), number % 5, self.question(number)
        if kind == 0:
            self.chat(number)
        elif kind == 1:
            text = {name: value for name, value in question.items() if name != "messages"}
            status, content = self.post(COMPLETIONS, {**text, "prompt": self.texts[number % len(self.texts)]})
            usage = json.loads(content)["usage"] if status == 200 else {"completion_tokens": 0}
            self.count(status == 200, started, usage["completion_tokens"])
        elif kind == 4:
            self.nonsense(number, (CHAT, COMPLETIONS))
        else:
            status, content = self.post(CHAT, {**question, "stream": True}, leave=kind == 3)
            self.count(status == 200 and (kind == 3 or content.endswith(b"data: [DONE]\n\n")), started)

    def mixed_classify(self, number: int) -> None:
        """One of four kinds of request to a classifier."""
        started, kind = time.perf_counter(), number % 4
        if kind == 0:
            self.classify(number)
        elif kind == 3:
            self.nonsense(number, (CLASSIFY,))
        else:
            texts = [self.texts[(number + each) % len(self.texts)] for each in range(number % 17 + 1)]
            status, content = self.post(CLASSIFY, {"input": texts}, leave=kind == 2)
            self.count(status == 200 and (kind == 2 or len(json.loads(content)["data"]) == len(texts)), started)

    def nonsense(self, number: int, paths: Sequence[str]) -> None:
        """A request that must be refused."""
        started = time.perf_counter()
        status, _ = self.post(paths[number % len(paths)], NONSENSE[number % len(NONSENSE)])
        self.count(400 <= status < 500, started)

    def question(self, number: int) -> dict[str, Any]:
        """A chat of one turn."""
        messages = [{"role": "user", "content": self.texts[number % len(self.texts)]}]
        return {"model": self.model, "messages": messages, "max_tokens": self.max_tokens, "temperature": 0}

    def count(self, good: bool, started: float, tokens: int = 0) -> None:
        """Adds a request that ended."""
        with self.lock:
            self.seconds.append(time.perf_counter() - started)
            self.tokens += tokens
            self.lost += not good


def free_port() -> int:
    """A port that no one listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def wait_until_it_answers(server: subprocess.Popen[bytes], port: int, path: str, limit: float) -> None:
    """Raises RuntimeError where the server ends, or does not answer in time."""
    until = time.monotonic() + limit
    while time.monotonic() < until:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with {server.returncode}")
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", path)
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.1)
    raise RuntimeError(f"the server did not answer within {limit:g} s")


def memory(process: int) -> int:
    """Resident bytes of a process and its descendants."""
    root = psutil.Process(process)
    return sum(one.memory_info().rss for one in [root, *root.children(recursive=True)])


def ask(load: Load, work: str, clients: int, requests: int) -> float:
    """Asks a number of requests from some clients; returns the seconds."""
    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(lambda number: attempt(load, work, number), range(requests)))
    return time.perf_counter() - started


def attempt(load: Load, work: str, number: int) -> None:
    """One request; whatever goes wrong with it makes it a lost one."""
    started = time.perf_counter()
    try:
        getattr(load, work)(number)
    except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError):
        load.count(False, started)


def keep_asking(load: Load, work: str, clients: int, seconds: float, server: int) -> dict[str, float]:
    """Mixed requests for some time; how the server's memory grows meanwhile."""
    started = time.monotonic()

    def client(first: int) -> None:
        number = first
        while time.monotonic() - started < seconds:
            attempt(load, work, number)
            number += 1

    samples: list[tuple[float, int]] = []
    with ThreadPoolExecutor(clients) as pool:
        asking = [pool.submit(client, number) for number in range(clients)]
        while not all(one.done() for one in asking):
            samples.append((time.monotonic() - started, memory(server)))
            time.sleep(min(1.0, seconds / 50))
        for one in asking:
            one.result()
    early = [size for at, size in samples if 0.1 <= at / seconds < 0.2]
    late = [size for at, size in samples if at / seconds >= 0.9]
    before, after = statistics.median(early), statistics.median(late)
    return {"memory_gb": after / 2**30, "memory_growth": after / before - 1}


def figures(load: Load, seconds: float) -> dict[str, float]:
    """What is reported of any work."""
    ordered = sorted(load.seconds)
    return {
        "requests_per_second": len(ordered) / seconds,
        "tokens_per_second": load.tokens / seconds,
        "median_seconds": statistics.median(ordered),
        "p95_seconds": ordered[int(0.95 * (len(ordered) - 1))],
        "requests": len(ordered),
        "lost": load.lost,
        "server_errors": load.server_errors,
    }


def main() -> None:
    """Starts the server, asks, and prints what was measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", choices=("chat", "classify", "mixed", "mixed_classify"))
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--requests", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="served")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--ready", default="/readyz", help="path that answers 200 once the server is ready")
    parser.add_argument("--start-limit", type=float, default=600)
    parser.add_argument("server", nargs="+", help="after --; {port} becomes the port")
    args = parser.parse_args()
    with open(args.data, encoding="utf-8") as file:
        texts = [json.loads(line) for line in file]
    port = free_port()
    with tempfile.TemporaryFile() as output:
        command = [word.replace("{port}", str(port)) for word in args.server]
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            wait_until_it_answers(server, port, args.ready, args.start_limit)
            warm = Load(port, args.model, args.max_tokens, texts)
            ask(warm, "classify" if args.work.endswith("classify") else "chat", 1, 2)
            if warm.lost:
                raise RuntimeError("the server does not answer such requests")
            load = Load(port, args.model, args.max_tokens, texts)
            if args.work.startswith("mixed"):
                extra = keep_asking(load, args.work, args.clients, args.seconds, server.pid)
                found = {**figures(load, args.seconds), **extra}
            else:
                found = figures(load, ask(load, args.work, args.clients, args.requests))
        except RuntimeError as error:
            said = os.pread(output.fileno(), 1 << 20, 0).decode(errors="replace")
            raise SystemExit(f"{error}\n{said[-3000:]}") from error
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(90)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
    print(json.dumps(found))


if __name__ == "__main__":
    main()

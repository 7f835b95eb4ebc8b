"""Requests that mean harm: none may fail the server, read what is not theirs, or get past a key, a host or a limit."""

from __future__ import annotations

import hmac
import json
import socket

import httpx2 as httpx
import numpy as np
import pytest

import peftkit
from peftkit import Recipe
from peftkit.serving.service import Limits
from tests import tiny
from tests.serving.running import served

KEY = "a-key-that-no-one-guesses"
CHAT = "/v1/chat/completions"
BODY = 5000
"""Bytes that the server reads of a request."""


@pytest.fixture(scope="module")
def server(llama, tmp_path_factory):
    """A server with a key; yields its service and address."""
    folder = tmp_path_factory.mktemp("hostile")
    rows = [{"instruction": f"Say {word}.", "output": word} for word in tiny.WORDS[:16]]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    run = peftkit.train(Recipe.parse({
        "name": "chat", "model": {"source": str(llama), "dtype": "float32"}, "task": {"kind": "instruction"},
        "data": {"source": str(folder / "rows.jsonl"), "max_length": 64}, "method": {"kind": "lora", "rank": 4},
        "training": {"epochs": 1, "batch_size": 8, "threads": 1},
        "evaluation": {"generation": {"samples": 0}}, "export": {"prove": False}, "tracking": [],
        "output_dir": str(folder / "runs"),
    }), quiet=True).path  # fmt: skip
    with served(run, key=KEY, limits=Limits(queue=32, tokens=8, body=BODY)) as (service, address):
        yield service, address


@pytest.fixture
def client(server):
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=server[1], headers=headers, timeout=30) as client:
        yield client


def turn(text):
    return [{"role": "user", "content": text}]


def is_refused(response, service):
    """One short message in OpenAI's shape, which gives nothing of the machine away."""
    error = response.json()["error"]
    return (
        bool(error["message"])
        and len(response.text) < 2000
        and "Traceback" not in response.text
        and str(service.run.path) not in response.text
    )


NAMES = [
    "../../etc/passwd", "/etc/passwd", "..", ".", "", " ", "tiny/../tiny", "tiny\0", "TINY", "default", "__class__",
    "{{ 7 * 7 }}", "%2e%2e%2f", "C:\\Windows", "file:///etc/passwd", "http://127.0.0.1:1/x", "tiny\n", "x" * 4000,
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name)[:24])
def test_a_name_is_a_name_and_no_path(server, client, name):
    response = client.post(CHAT, json={"model": name, "messages": turn("x"), "max_tokens": 1})
    assert response.status_code == 404
    assert is_refused(response, server[0])


PATHS = [
    "/v1/models/../../etc/passwd",
    "/..%2f..%2fetc/passwd",
    "//v1/models",
    "/v1/models/%00",
    "/v1",
    "/docs",
    "/%ff",
]


@pytest.mark.parametrize("path", PATHS)
def test_nothing_but_routes_is_served(client, path):
    assert client.get(path).status_code in (400, 404)


@pytest.mark.parametrize("text", ["{{ 7 * 191 }}", "{% for x in range(9) %}1337{% endfor %}", "{{ messages }}", "{#"])
def test_a_message_is_never_run_as_a_template(server, client, text):
    """The prompt has as many tokens as the text itself, between those of the template."""
    tokenizer = server[0].run.tokenizer

    def read(content):
        body = {"messages": turn(content), "max_tokens": 1}
        return client.post(CHAT, json=body).json()["usage"]["prompt_tokens"]

    def tokens(content):
        return len(tokenizer(content, add_special_tokens=False)["input_ids"])

    assert read(text) - read("red") == tokens(text) - tokens("red")


GUESSES = [
    "", "Bearer", f"Bearer {KEY[:-1]}", f"Bearer {KEY}x", f"Bearer {KEY.upper()}", f"Basic {KEY}", KEY,
    f"Bearer {KEY[::-1]}", "Bearer null", "Bearer " + "a" * 3000, f"Bearer {KEY} {KEY}",
]  # fmt: skip


@pytest.mark.parametrize("guess", GUESSES, ids=lambda guess: guess[:20])
def test_a_wrong_key_is_refused_before_the_body_is_read(server, guess):
    response = httpx.post(server[1] + CHAT, content=b"{", headers={"Authorization": guess}, timeout=30)
    assert response.status_code == 401
    assert is_refused(response, server[0])
    assert KEY not in response.text


def test_keys_are_compared_in_constant_time(client, monkeypatch):
    compared = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda *both: compared.append(both) or compare(*both))
    client.get("/v1/models", headers={"Authorization": "Bearer a"})
    assert compared == [(b"a", KEY.encode())]


HOSTS = ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "evil.example:8000", "10.0.0.1", "[::2]"]


@pytest.mark.parametrize("host", HOSTS)
def test_a_page_under_another_name_cannot_reach_the_server(server, client, host):
    headers = {"Host": host, "Origin": f"http://{host}"}
    response = client.get("/v1/models", headers=headers)
    assert response.status_code == 403
    assert is_refused(response, server[0])
    assert "access-control-allow-origin" not in response.headers


def parts(size):
    for _ in range(size // 1000):
        yield b"x" * 1000


@pytest.mark.parametrize("content", [b" " * (BODY + 1), parts(50_000)], ids=["declared", "in chunks"])
def test_a_large_body_is_refused(server, client, content):
    response = client.post(CHAT, content=content)
    assert response.status_code == 413
    assert is_refused(response, server[0])


RAW = [
    b"\r\n\r\n", b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"GET / HTTP/9.9\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 9\r\n\r\nabcde",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
    b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
]  # fmt: skip


@pytest.mark.parametrize("sent", RAW, ids=lambda sent: repr(sent[:20]))
def test_what_is_no_http_is_refused_and_the_server_lives(server, client, sent):
    port = int(server[1].rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(100)
    assert not answer.startswith(b"HTTP/1.1 5")
    assert not answer.startswith(b"HTTP/1.1 2")
    assert client.get("/healthz").status_code == 200


ODD = [
    "NaN", "Infinity", "-Infinity", "1e999", "9" * 300, '"\\ud800"', '"\\u0000"', "[" * 900, '{"a":' * 300, "null",
    "true", '""', "-1", "0", "[]", "{}", '[null]', '"' + "x" * 3000 + '"', "1.5", '{"role": "user", "content": "x"}',
]  # fmt: skip
FIELDS = [
    "messages", "model", "temperature", "top_p", "top_k", "seed", "stop", "n", "stream", "stream_options", "logprobs",
    "top_logprobs", "prompt", "input", "tools", "encoding_format", "dimensions", "max_tokens", "repetition_penalty",
]  # fmt: skip
VALID = {
    CHAT: '"messages": [{"role": "user", "content": "red"}], "max_tokens": 1',
    "/v1/completions": '"prompt": "red", "max_tokens": 1',
    "/v1/embeddings": '"input": "red"',
}


def test_odd_values_in_valid_requests_never_fail_the_server(server, client):
    """Each odd value in each field; then bytes of valid requests changed at random."""
    draw = np.random.default_rng(1)
    answers = []
    for number, field in enumerate(FIELDS):
        for odd in ODD:
            path = list(VALID)[(number + len(odd)) % 3]
            text = f'{{{VALID[path]}, "{field}": {odd}}}'
            answers.append((client.post(path, content=text.encode()), text))
    for number in range(200):
        path = list(VALID)[number % 3]
        content = bytearray(f"{{{VALID[path]}}}".encode())
        for place in draw.integers(0, len(content), 3):
            content[place] = draw.integers(0, 256)
        answers.append((client.post(path, content=bytes(content)), content))
    failed = [(response.status_code, sent[:100]) for response, sent in answers if response.status_code >= 500]
    assert not failed
    bad = [response for response, _ in answers if response.status_code >= 400]
    assert len(bad) > 300
    assert all(is_refused(response, server[0]) for response in bad)
    assert server[0].in_flight == 0
    good = client.post(CHAT, json={"messages": turn("red"), "max_tokens": 1})
    assert good.status_code == 200

"""The server against the official client, hostile requests, and what runs answer without it."""

from __future__ import annotations

import asyncio
import base64
import json
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import numpy as np
import openai
import pytest
from typer.testing import CliRunner

import peftkit
from peftkit.cli import app
from peftkit.errors import RunError
from peftkit.evaluation.generation import encode
from peftkit.models import chat_template
from peftkit.serving import server
from peftkit.serving.app import build_app
from peftkit.serving.service import Limits, Service
from tests import tiny
from tests.serving.running import served

CHAT = [{"role": "user", "content": "the red king"}]


@pytest.fixture(scope="module")
def chat(language):
    with served(language[0], adapters={"other": language[1]}, base=True) as (service, address):
        yield service, openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0), address


@pytest.fixture(scope="module")
def expected(language):
    return peftkit.load(language[0], adapters={"other": language[1]}, merge=False)


def test_the_client_lists_base_and_adapters(chat):
    assert [model.id for model in chat[1].models.list()] == ["tiny", "other", "base"]


def test_an_answer_is_that_of_the_run(chat, expected):
    client = chat[1]
    answer = client.chat.completions.create(model="tiny", messages=CHAT, temperature=0, max_tokens=12)
    assert answer.choices[0].message.content == expected.generate([CHAT], max_new_tokens=12)[0]
    assert answer.usage.completion_tokens <= 12
    assert answer.usage.prompt_tokens == len(encode(expected.tokenizer, CHAT))
    sampled = client.chat.completions.create(
        model="tiny", messages=CHAT, temperature=0.8, top_p=0.9, seed=5, max_tokens=12
    )
    own = expected.generate([CHAT], max_new_tokens=12, temperature=0.8, top_p=0.9, seed=5)[0]
    assert sampled.choices[0].message.content == own
    text = client.completions.create(model="tiny", prompt="the red", temperature=0, max_tokens=8)
    assert text.choices[0].text.strip() != ""


def test_the_model_of_a_request_chooses_the_adapter(chat, expected):
    def ask(name):
        return chat[1].chat.completions.create(model=name, messages=CHAT, temperature=0, max_tokens=12)

    own = {"tiny": expected.generate([CHAT], max_new_tokens=12)[0]}
    expected.use_adapter("other")
    own["other"] = expected.generate([CHAT], max_new_tokens=12)[0]
    expected.use_adapter("default")
    with expected.base() as base:
        own["base"] = base.generate([CHAT], max_new_tokens=12)[0]
    assert len(set(own.values())) == 3
    with ThreadPoolExecutor(6) as pool:
        names = ["tiny", "other", "base"] * 4
        answers = list(pool.map(ask, names))
    assert [answer.choices[0].message.content for answer in answers] == [own[name] for name in names]


def test_texts_that_are_written_together_are_those_written_alone(chat, expected):
    prompts = [[{"role": "user", "content": " ".join(tiny.WORDS[: 2 + n])}] for n in range(8)]

    def ask(number):
        time.sleep(0.01 * number)  # so that rows join others that are under way
        answer = chat[1].chat.completions.create(
            model="tiny", messages=prompts[number], temperature=0, max_tokens=4 + 3 * number
        )
        return answer.choices[0].message.content

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, range(8)))
    alone = [expected.generate([prompt], max_new_tokens=4 + 3 * n)[0] for n, prompt in enumerate(prompts)]
    assert together == alone


def test_a_stream_gives_the_same_text_and_ends(chat):
    options = {"model": "tiny", "messages": CHAT, "temperature": 0, "max_tokens": 12}
    whole = chat[1].chat.completions.create(**options)
    chunks = list(chat[1].chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == (
        whole.choices[0].message.content
    )
    assert chunks[-1].usage == whole.usage
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason


def test_stop_strings_choices_and_log_probabilities(chat, expected):
    client, text = chat[1], expected.generate([CHAT], max_new_tokens=12)[0]
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    options = {"model": "tiny", "messages": CHAT, "temperature": 0, "max_tokens": 12}
    cut = client.chat.completions.create(**options, stop=[stop])
    assert cut.choices[0].message.content == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    streamed = client.chat.completions.create(**options, stop=[stop], stream=True)
    assert "".join(one.choices[0].delta.content or "" for one in streamed) == text[: text.index(stop)]
    several = client.chat.completions.create(
        **options | {"temperature": 1.0}, n=3, seed=1, logprobs=True, top_logprobs=2
    )
    assert len({choice.message.content for choice in several.choices}) > 1
    entries = several.choices[0].logprobs.content
    assert all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in entries)
    assert "".join(entry.token for entry in entries).startswith(several.choices[0].message.content[:5])


def test_leaving_a_stream_frees_its_place(chat):
    service, client, _ = chat
    stream = client.chat.completions.create(model="tiny", messages=CHAT, temperature=1.5, max_tokens=60, stream=True)
    next(iter(stream))
    stream.close()
    until = time.time() + 10
    while (service.decoder.active or service.in_flight) and time.time() < until:
        time.sleep(0.05)
    assert (service.decoder.active, service.in_flight) == (0, 0)


def test_a_client_that_left_before_its_stream_began_frees_its_place(chat):
    service, _, _address = chat
    body = json.dumps({"messages": CHAT, "stream": True, "max_tokens": 40}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive():
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message):
        pass

    scope = {
        "type": "http", "method": "POST", "path": "/v1/chat/completions", "raw_path": b"", "query_string": b"",
        "headers": [(b"host", b"localhost")], "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
    }  # fmt: skip
    asyncio.run(build_app(service)(scope, receive, send))
    assert service.in_flight == 0


def test_the_stop_tokens_are_looked_up_once(chat, monkeypatch):
    reads = []
    read = chat_template.read
    monkeypatch.setattr(chat_template, "read", lambda tokenizer: reads.append(1) or read(tokenizer))
    for _ in range(2):
        chat[1].chat.completions.create(model="tiny", messages=CHAT, temperature=1.8, max_tokens=30)
    assert len(reads) <= 2


def test_a_request_that_never_ends_is_given_up(language, monkeypatch):
    monkeypatch.setattr("peftkit.serving.app.BODY_SECONDS", 0.2)
    with served(language[0]) as (service, address):
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as client:
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
            assert client.recv(200).startswith(b"HTTP/1.1 408 ")
        assert service.in_flight == 0


BAD = [
    ("/v1/chat/completions", b"", 400),
    ("/v1/chat/completions", b"[]", 400),
    ("/v1/chat/completions", b"{" * 5000, 400),
    ("/v1/chat/completions", {"messages": []}, 400),
    ("/v1/chat/completions", {"messages": CHAT, "model": "gpt-4"}, 404),
    ("/v1/chat/completions", {"messages": CHAT, "model": "../../etc/passwd"}, 404),
    ("/v1/chat/completions", {"messages": CHAT, "temperature": -1}, 400),
    ("/v1/chat/completions", {"messages": CHAT, "temperature": "hot"}, 400),
    ("/v1/chat/completions", {"messages": CHAT, "max_tokens": 0}, 400),
    ("/v1/chat/completions", {"messages": CHAT, "max_tokens": 10**9}, 400),
    ("/v1/chat/completions", {"messages": CHAT, "stop": [""]}, 400),
    ("/v1/chat/completions", {"messages": CHAT, "logit_bias": {"1": 100}}, 400),
    ("/v1/chat/completions", {"messages": CHAT, "seed": -1}, 400),
    ("/v1/chat/completions", {"messages": [{"role": "robot", "content": "x"}]}, 400),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x", "model": "y"}]}, 400),
    ("/v1/chat/completions", {"messages": CHAT, "stream_options": {"include_obfuscation": True}}, 400),
    ("/v1/chat/completions", {"messages": [{"role": "assistant", "content": "x"}]}, 400),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": None}]}, 400),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "word " * 9000}]}, 400),
    ("/v1/chat/completions", {"messages": CHAT, "tools": [{"type": "function"}]}, 400),
    ("/v1/completions", {"prompt": ""}, 200),
    ("/v1/completions", {"prompt": [1, 2]}, 400),
    ("/v1/embeddings", {"input": []}, 400),
    ("/v1/embeddings", {"input": [1, 2]}, 400),
    ("/v1/classify", {"input": "x"}, 404),
    ("/nowhere", {}, 404),
]


@pytest.mark.parametrize(("path", "body", "status"), BAD, ids=lambda value: str(value)[:40])
def test_a_bad_request_is_one_message(chat, path, body, status):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = httpx.post(chat[2] + path, content=content, timeout=30)
    assert response.status_code == status, response.text
    if status != 200:
        error = response.json()["error"]
        assert error["message"]
        assert "Traceback" not in response.text
        assert len(response.text) < 2000


def test_random_requests_never_fail_the_server(chat):
    draw = np.random.default_rng(0)
    values = [None, True, -1, 0, 3, 1e308, "x", "\ud7ff", "", [], {}, ["a"], [[]], {"role": "user"}, CHAT, "a" * 2000]
    names = ["messages", "model", "temperature", "top_p", "seed", "stop", "n", "stream", "logprobs", "prompt", "input",
             "max_tokens", "tools", "stream_options", "encoding_format", "dimensions", "user"]  # fmt: skip
    with httpx.Client(timeout=30) as client:
        for number in range(250):
            body = {str(draw.choice(names)): values[draw.integers(len(values))] for _ in range(draw.integers(1, 6))}
            body.setdefault("max_tokens", 3)
            content = json.dumps(body).encode()
            if number % 5 == 0:
                cut = int(draw.integers(0, len(content)))
                content = content[:cut] + bytes(draw.integers(0, 256, 5).tolist()) + content[cut:]
            path = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings"][number % 3]
            assert client.post(chat[2] + path, content=content).status_code < 500, content
        assert client.get(f"{chat[2]}/healthz").status_code == 200


def test_keys_hosts_and_sizes_are_checked(language):
    with served(language[0], key="secret", limits=Limits(body=2000, tokens=8)) as (_, address):
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{address}/v1", api_key="guess", max_retries=0).models.list()
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0)
        assert len(list(client.models.list())) == 1
        with pytest.raises(openai.APIStatusError) as error:
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x" * 4000}])
        assert error.value.status_code == 413
        assert httpx.get(f"{address}/healthz").json() == {"status": "ok"}
        headers = {"Host": "evil.example", "Authorization": "Bearer secret"}
        assert httpx.get(f"{address}/v1/models", headers=headers).status_code == 403
        assert httpx.options(f"{address}/v1/models").headers.get("access-control-allow-origin") is None


def test_a_full_server_says_when_to_come_back(language):
    with served(language[0], limits=Limits(queue=1, tokens=64)) as (_, address):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        stream = client.chat.completions.create(
            model="tiny", messages=CHAT, temperature=1.8, max_tokens=60, stream=True
        )
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as error:
            client.chat.completions.create(model="tiny", messages=CHAT)
        assert error.value.response.headers["retry-after"] == "1"
        stream.close()


def test_classes_spans_and_vectors(bert, topics_csv, tmp_path, small_recipe):
    run = peftkit.train(small_recipe, quiet=True)
    texts = ["the team won the match", "the bank and the price of oil", "new software"] * 5
    model = peftkit.load(run.path)
    with served(run.path) as (service, address), ThreadPoolExecutor(8) as pool:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        calls = []
        predict = service.run.predict
        object.__setattr__(service.run, "predict", lambda every: calls.append(len(every)) or predict(every))
        answers = list(pool.map(lambda text: httpx.post(
            f"{address}/v1/classify", json={"input": text}, timeout=30).json()["data"][0], texts))  # fmt: skip
        for answer, prediction in zip(answers, model.predict(texts)):
            assert answer["label"] == prediction.label
            assert answer["probability"] == pytest.approx(prediction.probability, abs=1e-5)
        assert sum(calls) == len(texts)
        assert len(calls) < len(texts), "requests that wait are answered together"
        vectors = client.embeddings.create(model="tiny", input=texts[:3])  # asks for base64 by itself
        expected = model.embed(texts[:3], normalize=True)
        np.testing.assert_allclose([one.embedding for one in vectors.data], expected, atol=1e-5)
        body = {"input": texts[0], "encoding_format": "base64", "dimensions": 4}
        plain = httpx.post(f"{address}/v1/embeddings", json=body).json()["data"][0]["embedding"]
        short = np.frombuffer(base64.b64decode(plain), "<f4")
        np.testing.assert_allclose(short, expected[0, :4] / np.linalg.norm(expected[0, :4]), atol=1e-5)
        metrics = httpx.get(f"{address}/metrics").text
        assert f'peftkit_requests_total{{route="/v1/classify",status="200"}} {float(len(texts))}' in metrics
        assert httpx.post(f"{address}/v1/chat/completions", json={"messages": CHAT}).status_code == 404


def test_what_is_answered_is_observed(language):
    records = []
    with served(language[0]) as (service, address):
        service.observers += [records.append, lambda record: 1 / 0]
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=3)
        list(client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=3, stream=True))
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="none", messages=CHAT)
    assert [(one.route, one.status, one.model) for one in records] == [
        ("/v1/chat/completions", 200, "tiny"), ("/v1/chat/completions", 200, "tiny"), ("/v1/chat/completions", 404, ""),
    ]  # fmt: skip
    assert records[0].texts == ("the red king",)
    assert records[1].usage["completion"] <= 3


def test_addresses_and_names_that_cannot_be_served_are_refused(language, monkeypatch):
    monkeypatch.delenv(server.KEY, raising=False)
    options = {"adapters": {}, "name": "x", "port": 0, "base": False, "log_requests": False, "queue": 1, "batch": 1,
               "max_tokens": 8, "timeout": 5.0}  # fmt: skip
    with pytest.raises(RunError, match="PEFTKIT_API_KEY"):
        server.serve(language[0], host="0.0.0.0", **options)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        options["port"] = taken.getsockname()[1]
        with pytest.raises(RunError, match=r"cannot listen on 127.0.0.1:\d+: Address already in use"):
            server.serve(language[0], host="127.0.0.1", **options)
    with pytest.raises(RunError, match="two models would be called 'x'"):
        Service(peftkit.load(language[0], adapters={"x": language[1]}), "x")


def test_chat_speaks_to_a_server(chat, expected):
    lines = "the red king\n/adapter other\nthe red king\n/adapter none\n"
    arguments = ["chat", "--url", chat[2], "--temperature", "0", "--max-new-tokens", "12"]
    result = CliRunner().invoke(app.app, arguments, input=lines)
    assert result.exit_code == 0, result.output
    answers = result.stdout.splitlines()
    assert answers[0] == expected.generate([CHAT], max_new_tokens=12)[0]
    assert "switched to adapter 'other'" in result.stderr
    assert "no adapter is called 'none'" in result.stderr
    assert CliRunner().invoke(app.app, ["chat", "--url", "http://127.0.0.1:9"]).exit_code == 2
    assert CliRunner().invoke(app.app, ["chat"]).exit_code == 2


@pytest.mark.slow
def test_a_signal_lets_requests_end(language, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    command = [sys.executable, "-m", "peftkit", "serve", str(language[0]), "--port", str(port), "--log"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "serving chat on http://127.0.0.1" in process.stdout.readline()
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=20)
    stream = client.chat.completions.create(model="chat", messages=CHAT, temperature=1.9, max_tokens=200, stream=True)
    pieces = [next(iter(stream))]
    process.send_signal(signal.SIGTERM)
    pieces += list(stream)
    assert pieces[-1].choices[0].finish_reason in ("stop", "length")
    _, log = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGTERM, 128 + signal.SIGTERM)
    assert json.loads(log.splitlines()[-1])["route"] == "/v1/chat/completions"
    assert "red king" not in log

"""A log of what was served, from the server and from predict, compared with the run's validation rows."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import httpx2 as httpx
import numpy as np
import pytest
from typer.testing import CliRunner

import peftkit
from peftkit import Recipe
from peftkit.cli.app import app
from peftkit.errors import DataError
from peftkit.monitoring import log
from peftkit.monitoring.log import Entry, ServingLog
from peftkit.serving.recorder import Recorder
from tests import tiny
from tests.conftest import TOPICS, topic_rows
from tests.serving.running import served

DAY = datetime(2026, 1, 31, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def run(bert, tmp_path_factory):
    folder = tmp_path_factory.mktemp("monitored")
    lines = [f"{text},{topic}" for text, topic in topic_rows(240)]
    (folder / "topics.csv").write_text("text,label\n" + "\n".join(lines) + "\n", encoding="utf-8")
    recipe = Recipe.parse({
        "name": "topics", "model": {"source": str(bert), "dtype": "float32", "dropout": 0.0},
        "data": {"source": str(folder / "topics.csv"), "max_length": 32, "validation_size": 0.4},
        "method": {"kind": "lora", "rank": 4},
        "training": {"epochs": 3, "batch_size": 8, "learning_rate": 1e-2, "threads": 1},
        "evaluation": {"baselines": []}, "export": {"prove": False}, "tracking": [], "output_dir": str(folder / "runs"),
    })  # fmt: skip
    return peftkit.train(recipe, quiet=True).path


def write(path, texts):
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def alike():
    return [text for text, _ in topic_rows(120, seed=7)]


@pytest.fixture(scope="module")
def unlike():
    return [f"{' '.join(TOPICS['sports'][:3])} 日本 語 {number}" for number in range(120)]


def invoke(*arguments):
    done = CliRunner().invoke(app, list(map(str, arguments)))
    return done.exit_code, done.stdout, done.stderr


def test_predictions_are_logged_and_what_is_alike_raises_no_alarm(run, alike, tmp_path):
    code, *_ = invoke("predict", run, "--file", write(tmp_path / "a.jsonl", alike), "--out", tmp_path / "o.csv",
                      "--monitor", tmp_path / "log")  # fmt: skip
    assert code == 0
    (file,) = (tmp_path / "log").iterdir()
    entries = log.read(tmp_path / "log").entries
    assert len(entries) == len(alike)
    tokenizer = peftkit.load(run).tokenizer
    expected = peftkit.load(run).predict(alike)
    for entry, text, answer in zip(entries, alike, expected):
        assert (entry.characters, entry.label) == (len(text), answer.label)
        assert entry.tokens == len(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert entry.probability == pytest.approx(answer.probability, abs=1e-4)
        assert entry.texts is None
    assert alike[0][:12] not in file.read_text(), "no text unless asked for"
    code, shown, _ = invoke("monitor", run, tmp_path / "log", "--json")
    table = json.loads(shown)
    assert (code, table["drift"], table["texts"], table["damaged"]) == (0, False, len(alike), 0)
    assert {one["measure"] for one in table["days"][0]["measures"]} == {
        "characters", "tokens", "unknown tokens", "confidence", "labels"}  # fmt: skip


def test_what_differs_is_an_alarm_by_day_with_a_page(run, alike, unlike, tmp_path):
    folder, model = ServingLog(tmp_path / "log"), peftkit.load(run)
    from peftkit.monitoring import features

    for day, texts in enumerate((alike, alike[:60], unlike, unlike[:5])):
        answers = model.predict(texts)
        folder.append([
            Entry(time=DAY + timedelta(days=day), model="topics", route="predict", seconds=0.01 * number,
                  **features.of_text((text,), model.tokenizer), label=answer.label, probability=answer.probability)
            for number, (text, answer) in enumerate(zip(texts, answers))
        ])  # fmt: skip
    code, shown, _ = invoke("monitor", run, tmp_path / "log", "--out", tmp_path / "page")
    assert code == 3
    assert "Served texts differ from the 96 validated ones in" in shown
    table = json.loads((tmp_path / "page" / "monitor.json").read_text())
    assert [day["day"] for day in table["days"]] == ["all days", "2026-01-31", "2026-02-01", "2026-02-02", "2026-02-03"]
    found = {day["day"]: {one["measure"]: one for one in day["measures"]} for day in table["days"]}
    assert not any(one["drift"] for one in found["2026-01-31"].values())
    assert found["2026-02-02"]["labels"]["drift"]
    assert found["2026-02-02"]["unknown tokens"]["drift"]
    assert found["2026-02-02"]["unknown tokens"]["served"] > 0.1
    assert "not tested: served 5, needed 30" in found["2026-02-03"]["labels"]["note"]
    page = (tmp_path / "page" / "monitor.html").read_text()
    assert "2026-02-02" in page
    assert "<script" not in page
    code, *_ = invoke("monitor", run, tmp_path / "log", "--until", "2026-02-01")
    assert code == 0
    _, shown, _ = invoke("monitor", run, tmp_path / "log", "--since", "2026-02-02", "--effect", "1", "--json")
    measures = [one for day in json.loads(shown)["days"] for one in day["measures"]]
    assert {one["drift"] for one in measures if one["effect"] is not None and one["effect"] < 1} == {False}
    code, *_ = invoke("monitor", run, tmp_path / "log", "--since", "2026-02-02", "--level", "0.000001")
    assert code == 3
    code, *_ = invoke("monitor", run, tmp_path / "log", "--since", "2026-02-02", "--reference",
                      write(tmp_path / "other.jsonl", unlike))  # fmt: skip
    assert code == 0, "compared with texts of the same kind"


def test_the_server_logs_texts_and_vectors_only_where_asked(run, alike, tmp_path):
    with served(run, name="topics") as (service, address):
        plain, full = ServingLog(tmp_path / "plain"), ServingLog(tmp_path / "full")
        observers = [Recorder(plain, service), Recorder(full, service, texts=True, embeddings=True)]
        service.observers += observers
        with ThreadPoolExecutor(4) as pool:
            parts = [alike[start : start + 10] for start in range(0, 80, 10)]
            replies = list(pool.map(lambda some: httpx.post(f"{address}/v1/classify", json={"input": some}), parts))
        assert {reply.status_code for reply in replies} == {200}
        assert httpx.post(f"{address}/v1/classify", json={"input": []}).status_code == 400
    for observer in observers:  # as the server does, once it has ended: a reply is sent before it is recorded
        observer.close()
    without, entries = log.read(tmp_path / "plain").entries, log.read(tmp_path / "full").entries
    assert len(without) == len(entries) == 80
    assert {entry.embedding for entry in without} == {None}
    assert {entry.texts for entry in without} == {None}
    by_text = {entry.texts[0]: entry for entry in entries}
    assert set(by_text) == set(alike[:80])
    model = peftkit.load(run)
    for text, answer in zip(alike[:5], model.predict(alike[:5])):
        assert by_text[text].label == answer.label
        expected = model.embed([text], normalize=True)[0]
        np.testing.assert_allclose(by_text[text].vector(), expected, atol=2e-3)
    code, shown, _ = invoke("monitor", run, tmp_path / "full", "--json")
    measures = {one["measure"]: one for one in json.loads(shown)["days"][0]["measures"]}
    assert measures["embeddings"]["p_value"] is not None
    assert code == 0


def test_generated_texts_are_logged_as_conversations(llama, tmp_path):
    rows = [{"instruction": f"Say {word}.", "output": "good"} for word in tiny.WORDS[:40]]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    run = peftkit.train(Recipe.parse({
        "name": "chat", "model": {"source": str(llama), "dtype": "float32"}, "task": "instruction",
        "data": {"source": str(tmp_path / "rows.jsonl"), "max_length": 64}, "method": {"kind": "lora", "rank": 2},
        "training": {"max_steps": 1, "threads": 1}, "evaluation": {"generation": {"samples": 0}, "baselines": []},
        "export": {"prove": False}, "tracking": [], "output_dir": str(tmp_path / "runs"),
    }), quiet=True).path  # fmt: skip
    turns = [{"role": "user", "content": "the red king"}]
    with served(run, name="chat") as (service, address):
        recorder = Recorder(ServingLog(tmp_path / "log"), service, texts=True)
        service.observers.append(recorder)
        reply = httpx.post(f"{address}/v1/chat/completions", json={"messages": turns, "max_tokens": 3}, timeout=60)
    recorder.close()
    (entry,) = log.read(tmp_path / "log").entries
    assert (entry.texts, entry.characters, entry.label) == (("the red king",), 12, None)
    assert entry.written == reply.json()["usage"]["completion_tokens"]
    code, shown, _ = invoke("monitor", run, tmp_path / "log")
    assert code == 0
    assert "Nothing was tested" in shown


def spans(count):
    words = [tiny.WORDS[number % 40] for number in range(count)]
    return [
        {"text": f"{word} king {number}", "spans": [{"start": len(word) + 1, "end": len(word) + 5, "label": "person"}]}
        for number, word in enumerate(words)
    ]


def questions(count):
    return [
        {"question": f"who is {number}", "context": f"{tiny.WORDS[number % 40]} king {number}",
         "answers": "king" if number % 3 else ""}
        for number in range(count)
    ]  # fmt: skip


def documents(count):
    return [{"text": f"{' '.join(tiny.WORDS[number % 40 : number % 40 + 12])} {number}"} for number in range(count)]


UNANSWERED = {"characters", "tokens", "unknown tokens", "confidence"}
OTHERS = {
    "own_entities": (spans(120), spans(60), UNANSWERED | {"labels"}),
    "own_questions": (questions(120), questions(60), UNANSWERED | {"labels"}),
    "domain_mlm": (documents(120), [{"text": f"the [MASK] of {n}"} for n in range(60)], UNANSWERED),
}


@pytest.mark.parametrize(
    "name", ["own_entities", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS if name != "own_entities")]
)
def test_runs_of_other_tasks_are_watched_by_what_they_answer(name, bert, tmp_path):
    rows, asked, measured = OTHERS[name]
    for file, lines in (("rows.jsonl", rows), ("asked.jsonl", asked)):
        (tmp_path / file).write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    recipe = peftkit.replace(
        peftkit.get_recipe(name), model={"source": str(bert)}, training={"max_steps": 1, "threads": 1}, tracking=[],
        data={"source": str(tmp_path / "rows.jsonl"), "max_length": 48, "validation_size": 0.4, "test_size": 0.1,
              "cleaning": {"duplicates": "off", "near_duplicates": "off", "leakage": "off"}},
        evaluation={"baselines": []}, export={"prove": False}, output_dir=str(tmp_path / "runs"),
    )  # fmt: skip
    run = peftkit.train(recipe, quiet=True).path
    code, *_ = invoke("predict", run, "--file", tmp_path / "asked.jsonl", "--out", tmp_path / "o.jsonl",
                      "--monitor", tmp_path / "log")  # fmt: skip
    assert code == 0
    code, shown, _ = invoke("monitor", run, tmp_path / "log", "--json")
    assert code in (0, 3)
    (day,) = json.loads(shown)["days"]
    assert {one["measure"] for one in day["measures"]} == measured
    tested = {one["measure"] for one in day["measures"] if one["p_value"] is not None}
    assert {"characters", "tokens"} <= tested


def entry(**changes):
    values = {"time": DAY, "model": "m", "route": "r", "seconds": 0.1, "characters": 3, "tokens": 1, "unknown": 0.0}
    return Entry(**values | changes)


def test_a_torn_line_is_skipped_and_harms_no_other(tmp_path):
    folder = ServingLog(tmp_path)
    folder.append([entry(), entry(time=DAY + timedelta(days=1))])
    file = tmp_path / "2026-01-31.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + whole[: len(whole) // 2])  # killed in the middle of a line
    folder.append([entry(characters=9)])
    served = log.read(tmp_path)
    assert [one.characters for one in served.entries] == [3, 9, 3]
    assert served.damaged == 1
    assert os.stat(file).st_mode & 0o077 == 0


def test_processes_that_share_a_log_lose_no_line(tmp_path):
    code = (
        "import sys; from pathlib import Path; from peftkit.monitoring.log import Entry, ServingLog\n"
        "folder, lines = ServingLog(Path(sys.argv[1])), [Entry.model_validate_json(sys.argv[2])] * 3\n"
        "for number in range(200): folder.append(lines)"
    )
    lines = [entry(model=name).model_dump_json() for name in ("a", "b")]
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), line]) for line in lines]
    assert [process.wait(120) for process in processes] == [0, 0]
    served = log.read(tmp_path)
    assert (len(served.entries), served.damaged, served.models()) == (1200, 0, ["a", "b"])


def test_what_is_no_log_is_one_message(run, tmp_path):
    def refused(*arguments):
        code, _, shown = invoke("monitor", run, *arguments)
        assert code == 2
        return shown

    assert "no such folder" in refused(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "2026-01-31.jsonl" in refused(tmp_path / "empty")
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "2026-01-31.jsonl").write_text('{"a": 1}\nx\n', encoding="utf-8")
    assert "2026-01-31.jsonl:1: time: Field required" in refused(bad)
    ServingLog(tmp_path / "two").append([entry(model="one"), entry(model="other")])
    assert "choose one with --model" in refused(tmp_path / "two")
    assert "did you mean 'one'" in refused(tmp_path / "two", "--model", "ones")
    assert "of these days" in refused(tmp_path / "two", "--since", "2027-01-01")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        ServingLog(tmp_path / "file")
    vectors = [base64.b64encode(np.zeros(width, "<f2").tobytes()).decode() for width in (2, 3)]
    ServingLog(tmp_path / "wide").append([entry(embedding=vector) for vector in vectors])
    assert "several widths" in refused(tmp_path / "wide")

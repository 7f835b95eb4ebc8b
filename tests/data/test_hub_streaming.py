"""Rows that stream from the hub are those that a download gives; against a stand-in on the loopback."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.hub.conftest import folders, hub, python  # noqa: F401

CODE = """
import json, sys
from peftkit import get_recipe
from peftkit.schema import overrides
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


@pytest.mark.slow
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
    assert "set data.source to a file or folder or package:NAME" in said
    assert "Retrying" not in done.stderr


def test_subset_and_revision_reach_the_hub(monkeypatch):
    import datasets

    from peftkit.data.sources import hub as hub_data
    from peftkit.schema.recipe import DataConfig

    asked = []
    monkeypatch.setattr(hub_data, "_hub_error", lambda name, data: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **options: asked.append((path, options)))
    hub_data.load("some/set", DataConfig(source="some/set", subset="plain", revision="abc"))
    hub_data.load("some/set", DataConfig(source="some/set"))
    assert [options["name"] for _, options in asked] == ["plain", None]
    assert [options["revision"] for _, options in asked] == ["abc", None]


RESUMED = """
import json, os, signal, sys
from pathlib import Path
import peftkit
from peftkit import get_recipe
from peftkit.schema import overrides
from tests.faults import runs

recipe = overrides.apply(get_recipe("agnews_lora"), json.loads(sys.argv[1]))
runs.warm_up()

def training(name, *, dies_at=None, resume=None):
    # a cache of its own, so that the rows have to stream anew
    os.environ["PEFTKIT_CACHE"] = str(Path.cwd() / f"cache-{name}-{bool(resume)}")

    def on_validation(step, figures):
        if step == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def work():
        runs._spare()
        peftkit.train(peftkit.replace(recipe, output_dir=name), resume=resume, quiet=True, on_validation=on_validation)

    code = runs.wait(runs.fork(work, Path("said.txt")))
    (folder,) = Path(name).iterdir()
    return code, folder

codes = [training("whole")[0], training("cut", dies_at=16)[0]]
(cut,) = Path("cut").iterdir()
kept = sorted(path.name for path in (cut / "checkpoints").iterdir())
codes.append(training("cut", resume=True)[0])
(whole,) = Path("whole").iterdir()
print(Path("said.txt").read_text(), file=sys.stderr)
print(json.dumps([codes, kept, runs.differences(cut, whole)]))
"""


@pytest.mark.slow
def test_a_killed_run_of_streamed_rows_goes_on_exactly(hub, python, tmp_path, monkeypatch):  # noqa: F811
    """Killed in the middle of the second epoch, after a step that no checkpoint has."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    changes = [
        "data.streaming=true", "training.epochs=3", "training.batch_size=4", "training.save_every=3",
        "training.evaluate_every=4", "training.learning_rate=0.01", "training.early_stopping=null", "method.rank=2",
        "data.max_length=32", "evaluation.baselines=[]", "tracking=[]", "export.prove=false", "training.threads=1",
    ]  # fmt: skip
    done = python("-c", RESUMED, json.dumps(changes), hub=hub.url)
    assert done.returncode == 0, done.stderr[-2000:]
    codes, kept, differences = json.loads(done.stdout.splitlines()[-1])
    assert codes == [0, -signal.SIGKILL, 0], done.stderr[-2000:]
    assert kept[-1] == "step-00000015"
    assert differences == [], "adapter, log and figures are the uninterrupted run's"
    read = [request for request in hub.requests if request.startswith("GET") and "train-00000-of" in request]
    assert len(read) >= 3, "every run streams anew"
    assert not list(tmp_path.rglob("*.parquet")), "nothing was downloaded to a file"

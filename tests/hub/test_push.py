"""Pushing an export to the stand-in of the hub, and reading it back: whole, or refused."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

import peftkit
from peftkit.cli.app import main as command_line
from peftkit.errors import HubError, ModelError, RecipeError, RunError
from peftkit.export import hub as hub_names
from peftkit.export import push as pushing
from peftkit.export import run_export
from peftkit.export.folder import open_export
from tests import tiny
from tests.exporting import exported
from tests.faults import runs
from tests.faults.injection import Faults
from tests.hub.stand_in import TOKEN, HubStandIn

NAME = "someone/cats-and-dogs"
TEXTS = ["the king said hello", "the stock market and the bank"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """A classifier's adapter as a finished run exports it, unproven to save the time."""
    folder = tmp_path_factory.mktemp("trained")
    return exported(folder / "run", tiny.tiny_bert(folder / "bert"), export={"prove": False})[0]


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A hub that can be pushed to, and this process as its client."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    with HubStandIn({}, store=tmp_path / "store") as running:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                            running.url + "/{repo_id}/resolve/{revision}/{filename}")  # fmt: skip
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path / "peftkit"))
        close_session()
        yield running
        running.go_on.set()
        close_session()


def push(run: Path, name: str = NAME, **options) -> str:
    return pushing.push_export(run, name, **{"license": "mit", **options})


def uploads(hub: HubStandIn) -> list[str]:
    return [request for request in hub.requests if request.startswith("PUT lfs/")]


def test_a_pushed_adapter_is_read_back_and_answers_as_the_run(stand_in, adapter):
    sentence = push(adapter)
    assert f"{stand_in.url}/{NAME}" in sentence
    assert "it was not compared with the trained model" in sentence
    assert len(uploads(stand_in)) == 1
    assert sum("/commit/" in request for request in stand_in.requests) == 1
    here, there = peftkit.load(adapter), peftkit.load(f"hub:{NAME}")
    assert there.path != here.path
    assert (there.logits(TEXTS) == here.logits(TEXTS)).all()
    listed = json.loads((there.path / hub_names.FILE).read_text())["files"]
    assert set(listed) == {path.name for path in adapter.iterdir()} - {"README.md"}
    assert not any(TOKEN.encode() in path.read_bytes() for path in there.path.rglob("*") if path.is_file())

    commit = stand_in.repositories[f"models/{NAME}"].commit
    again = push(adapter)  # nothing is new
    assert commit[:12] in again
    assert len(uploads(stand_in)) == 1
    assert peftkit.load(f"hub:{NAME}@{commit}").path == there.path


def test_the_card_has_what_the_hub_lists_and_links(stand_in, adapter):
    assert "license" not in push(adapter)
    card = ModelCard((stand_in.repositories[f"models/{NAME}"].folder / "README.md").read_text())
    assert (card.data.license, card.data.library_name) == ("mit", "peft")
    assert card.data.tags == ["peftkit", "lora"]
    assert card.data.pipeline_tag == "text-classification"
    results = {result.metric_type: (result.metric_value, result.dataset_split) for result in card.data.eval_results}
    assert results == {"accuracy": (0.75, "test"), "loss": (0.5, "test")}
    assert card.data.metrics == ["accuracy", "loss"]
    assert "## Proof" in card.text
    assert "no license is stated" in push(adapter, "someone/other", license=None, private=True)
    other = ModelCard((stand_in.repositories["models/someone/other"].folder / "README.md").read_text())
    assert other.data.license is None


def test_a_base_and_data_of_the_hub_are_linked(adapter, monkeypatch):
    from dataclasses import replace

    from peftkit.export.card_metadata import front_matter

    export = open_export(adapter)
    contents = replace(export.manifest, base="google-bert/bert-base-uncased")
    recipe = peftkit.replace(export.recipe, data={"source": "fancyzhx/ag_news"})
    values = yaml.safe_load(front_matter(contents, recipe, {"validation": {"f1": 0.5, "bad": float("nan")}}, "peft"))
    assert values["base_model"] == "google-bert/bert-base-uncased"
    assert values["base_model_relation"] == "adapter"
    assert values["datasets"] == ["fancyzhx/ag_news"]
    (result,) = values["model-index"][0]["results"]
    assert result["dataset"] == {"name": "fancyzhx/ag_news", "type": "fancyzhx/ag_news", "split": "validation"}
    assert [metric["type"] for metric in result["metrics"]] == ["f1"]
    assert "license" not in values


def test_another_format_is_exported_once_and_pushed(stand_in, adapter, tmp_path, monkeypatch):
    stand_in.statuses = {"commit": 500}
    with pytest.raises(HubError, match="Run the same command again"):
        push(adapter, to_format="merged", private=True)
    stand_in.statuses = {}
    with monkeypatch.context() as patch:  # what was computed is kept
        patch.setattr(pushing.exporter, "run_export", None)
        sentence = push(adapter, to_format="merged", private=True)
    assert "(format merged); its logits differ" in sentence
    assert stand_in.repositories[f"models/{NAME}"].private
    merged = peftkit.load(f"hub:{NAME}")
    assert merged.manifest.saves == "model"
    assert (merged.path / "proof.json").is_file()
    assert abs(merged.logits(TEXTS) - peftkit.load(adapter).logits(TEXTS)).max() < 1e-4
    assert not any((tmp_path / "peftkit" / "push").glob("[0-9a-f]*"))

    push(adapter, NAME, to=tmp_path / "out", private=True)  # an adapter again: the model's files go
    assert (tmp_path / "out" / "peftkit.json").is_file()
    there = set(stand_in.repositories[f"models/{NAME}"].files())
    assert there == {path.name for path in adapter.iterdir()} | {hub_names.FILE, ".gitattributes"}


PLACES = [
    "POST create+", "POST validate-yaml", "POST preupload", "POST batch", "PUT upload", "PUT upload+", "POST verify",
    "POST commit", "POST commit+",
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_a_push_killed_anywhere_is_refused_or_whole_and_the_next_one_sends_only_the_rest(
    stand_in, adapter, tmp_path, place
):
    stand_in.pause = place
    child = runs.fork(lambda: push(adapter), tmp_path / "child.log")
    assert stand_in.paused.wait(30), (tmp_path / "child.log").read_text()
    os.kill(child, signal.SIGKILL)
    assert runs.wait(child) == -signal.SIGKILL
    whole = place == "POST commit+"
    if whole:
        assert hub_names.download(f"hub:{NAME}").is_dir()
    else:
        with pytest.raises(RunError, match="there is no complete export"):
            peftkit.load(f"hub:{NAME}")
    sent = len(stand_in.objects)
    stand_in.client_killed = True  # its request, if it was not received as a whole, has no effect
    stand_in.go_on.set()
    stand_in.requests.clear()
    push(adapter)
    if sent:
        assert uploads(stand_in) == []
    folder = hub_names.download(f"hub:{NAME}")
    for path in adapter.iterdir():
        if path.name != "README.md":
            assert (folder / path.name).read_bytes() == path.read_bytes()
    assert TOKEN not in (tmp_path / "child.log").read_text()


@pytest.mark.parametrize("share", [0.2, 0.6, 0.95])
def test_an_export_killed_anywhere_leaves_nothing_that_can_be_loaded(adapter, tmp_path, share, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    def export() -> None:
        run_export(adapter, tmp_path / "out")

    with Faults() as faults:
        run_export(adapter, tmp_path / "counted")
    replaced = len(faults.calls) - 1 - faults.calls[::-1].index("replace")
    at = int(share * replaced)

    def work() -> None:
        with Faults(at=at):
            export()

    assert runs.wait(runs.fork(work)) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    for left in tmp_path.glob(".out.*.tmp"):
        with pytest.raises(RunError, match="was interrupted"):
            peftkit.load(left)
        with pytest.raises(RunError, match="was interrupted"):
            push(left)
    export()
    assert peftkit.load(tmp_path / "out").labels


def test_files_that_changed_on_the_hub_or_in_the_cache_are_refused(stand_in, adapter):
    push(adapter)
    repository = stand_in.repositories[f"models/{NAME}"]
    (repository.folder / "README.md").write_text("# edited on the page\n")
    folder = hub_names.download(f"hub:{NAME}")
    file = folder / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    blob = file.resolve()
    blob.write_bytes(content)
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors has another SHA-256"):
        peftkit.load(f"hub:{NAME}")

    shutil.rmtree(blob.parents[1])
    (repository.folder / "recipe.yaml").write_text("name: other\n")
    with pytest.raises(ModelError, match=r"recipe\.yaml has 12 bytes, expected"):
        peftkit.load(f"hub:{NAME}")


def test_files_that_run_code_are_neither_downloaded_nor_pushed(stand_in, adapter, tmp_path):
    push(adapter)
    repository = stand_in.repositories[f"models/{NAME}"]
    for name in ("pytorch_model.bin", "evil.py", "weights.PKL"):
        (repository.folder / name).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    stand_in.requests.clear()
    there = peftkit.load(f"hub:{NAME}")
    assert {path.name for path in there.path.iterdir()} == {path.name for path in adapter.iterdir()} | {hub_names.FILE}
    assert not any(name in request for request in stand_in.requests for name in ("pytorch_model", "evil", "PKL"))

    for name in (".env", "weights.PKL", "evil.py", "sub/../../x", "ünï.json"):
        folder = shutil.copytree(adapter, tmp_path / secrets.token_hex(4))
        (folder / "sub").mkdir()
        (folder / Path(name).name).write_text("secret")
        if ".." not in name:
            with pytest.raises(RunError, match="which is not of the export"):
                push(folder, "someone/other")
    assert "models/someone/other" not in stand_in.repositories


def test_a_hostile_list_of_files_is_refused_before_it_is_followed(stand_in, adapter):
    push(adapter)
    repository = stand_in.repositories[f"models/{NAME}"]
    listed = json.loads((repository.folder / hub_names.FILE).read_text())
    one = {"size": 1, "sha256": "0" * 64}
    paths = ("../outside.json", "/etc/passwd", "model.pkl", "model.PT", "code.py", "*", "a//b", "a/../b", "a/./b",
             "C:\\x", "a\nb", ".ssh/key", "ünï.json", "a\u202eb", "")  # fmt: skip
    for path in paths:
        with pytest.raises(ModelError, match="not a list of files as peftkit writes it"):
            hub_names.read_list({**listed, "files": {path: one}}, "here")
    with pytest.raises(ModelError, match="not a list of files"):
        hub_names.read_list({**listed, "files": {f"{n}.json": one for n in range(hub_names.MAX_FILES + 1)}}, "here")
    with pytest.raises(ModelError, match="not a list of files"):
        hub_names.read_list({**listed, "files": {"a.json": {**one, "sha256": "0" * 63}}}, "here")

    for content in (json.dumps({**listed, "files": {"../outside.json": one}}), "[" * 100_000, " " * 10_000_001 + "{}"):
        (repository.folder / hub_names.FILE).write_text(content)
        repository.history[repository.commit] = repository.folder
        repository.commit = secrets.token_hex(20)
        stand_in.requests.clear()
        with pytest.raises(ModelError, match=hub_names.FILE):
            peftkit.load(f"hub:{NAME}")
        assert not any("adapter_model" in request for request in stand_in.requests)
        with pytest.raises(ModelError, match=hub_names.FILE):
            push(adapter)
    assert not any(request.startswith("GET someone") for request in stand_in.requests[:2])  # too large to be fetched


def test_private_gated_and_foreign_repositories_are_one_message_each(stand_in, adapter, monkeypatch):
    push(adapter)
    repository = stand_in.repositories[f"models/{NAME}"]
    repository.gated = True
    with pytest.raises(HubError, match="is gated: accept its terms"):
        peftkit.load(f"hub:{NAME}")
    repository.gated, repository.private = False, True
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="or it is private and HF_TOKEN grants no access"):
        peftkit.load(f"hub:{NAME}")
    repository.private = False
    with pytest.raises(HubError, match="has no revision 'v9'"):
        peftkit.load(f"hub:{NAME}@v9")
    assert peftkit.load(f"hub:{NAME}@main").labels
    (repository.folder / hub_names.FILE).unlink()
    with pytest.raises(RunError, match="there is no complete export of peftkit"):
        peftkit.load(f"hub:{NAME}")


def test_what_was_downloaded_is_used_without_a_network(stand_in, adapter, monkeypatch):
    from huggingface_hub import constants

    push(adapter)
    folder = hub_names.download(f"hub:{NAME}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    stand_in.requests.clear()
    assert hub_names.download(f"hub:{NAME}") == folder
    with pytest.raises(HubError, match="is not complete in the cache and HF_HUB_OFFLINE is set"):
        hub_names.download("hub:someone/other")
    with pytest.raises(HubError, match="unset it to push"):
        push(adapter)
    assert stand_in.requests == []


def test_names_that_leave_the_hub_or_the_cache_are_refused_unasked(stand_in):
    revisions = ("../../x", "a..b", "/etc", "-x", "a b", "ünï", "a\n", "x" * 201, "", "a//b", "@")
    names = ("..", "../x", "a/..", "a/b/c", "/etc/passwd", "-a/b", "a/b.", "ünï/x", "a/b\u202e", f"a/{'b' * 97}", "")
    for name in (*(f"someone/cats@{revision}" for revision in revisions), *names):
        with pytest.raises(RunError, match=r"expected (USER/NAME|a branch, tag or commit)"):
            hub_names.download(f"hub:{name}")
    assert stand_in.requests == []


def test_an_export_of_several_runs_is_not_taken_from_the_cache_for_others(adapter, tmp_path, monkeypatch):
    assert pushing.exporter.exporter_of("combined", adapters=["a", "b"]).other_runs() == ("a", "b")
    monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(pushing.exporter, "run_export", lambda run, to, **options: Path(to).mkdir())
    other = shutil.copytree(adapter, tmp_path / "other")
    export = open_export(adapter)
    places = []
    for number in range(2):
        (other / "metrics.json").write_text(json.dumps({"test": {"loss": number}}))
        with pushing.in_cache([export, open_export(other)], {}) as folder:
            places.append(folder)
    assert places[0] != places[1]


def test_another_push_in_between_and_foreign_files_are_not_overwritten(stand_in, adapter, tmp_path):
    stand_in.pause = "POST commit"
    child = runs.fork(lambda: command_line_push(adapter), tmp_path / "child.log")
    assert stand_in.paused.wait(30)
    push(adapter, license="apache-2.0")
    stand_in.go_on.set()
    assert runs.wait(child) == 2
    assert f"someone else has pushed to {NAME} meanwhile" in (tmp_path / "child.log").read_text()
    assert "license: apache-2.0" in (stand_in.repositories[f"models/{NAME}"].folder / "README.md").read_text()

    repository = stand_in.repositories[f"models/{NAME}"]
    (repository.folder / hub_names.FILE).unlink()
    (repository.folder / "theirs.safetensors").write_bytes(b"0")
    with pytest.raises(HubError, match=r"holds files that peftkit did not push, such as theirs\.safetensors"):
        push(adapter)


def command_line_push(adapter: Path) -> None:
    import sys

    sys.argv = ["peftkit", "export", str(adapter), "--push", NAME, "--license", "mit"]
    command_line()


def test_the_token_is_that_of_the_environment_and_in_no_message(stand_in, adapter, monkeypatch, tmp_path):
    (tmp_path / "no_token").write_text(TOKEN)  # where `hf auth login` leaves one
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="HF_TOKEN is not set: create a token with write access"):
        push(adapter)
    assert stand_in.requests == []
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match="does not accept HF_TOKEN") as caught:
        push(adapter)
    assert "hf_wrong" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for status, message in {403: "may not write to", 500: "shows all of it or nothing"}.items():
        stand_in.statuses = {"commit": status}
        with pytest.raises(HubError, match=message) as caught:
            push(adapter)
        assert TOKEN not in str(caught.value)


def test_wrong_names_licenses_and_options_are_refused_before_anything_is_computed(stand_in, adapter, tmp_path, capsys):
    for name in ("cats", "a/b/c", "someone/..", "some one/x", "someone/x.git", "../x", "someone/"):
        with pytest.raises(RunError, match="is not a repository of the hub: expected USER/NAME"):
            push(adapter, name)
    with pytest.raises(RecipeError, match=r"found 'apache-2': did you mean 'apache-2\.0'"):
        push(adapter, NAME, license="apache-2")
    with pytest.raises(RecipeError, match="expected the license under which others may use the model"):
        push(adapter, license=None)
    with pytest.raises(RecipeError, match="unknown"):
        push(adapter, NAME, to_format="nothing")
    assert stand_in.requests == []
    for reading, message in {
        "hub:nobody/nothing": "there is no 'nobody/nothing'",
        f"hub:{NAME}@": "a branch, tag or commit after @",
        "hub:x": "expected USER/NAME",
    }.items():
        with pytest.raises((RunError, HubError), match=message):
            peftkit.load(reading)


def test_a_public_repository_is_not_taken_for_a_private_one(stand_in, adapter):
    push(adapter)
    with pytest.raises(HubError, match="exists and is public"):
        push(adapter, NAME, private=True)


def test_the_command_line_pushes_and_predicts_from_the_hub(stand_in, adapter, monkeypatch, tmp_path, capsys):
    def run(*words: str) -> int:
        monkeypatch.setattr("sys.argv", ["peftkit", *words])
        with pytest.raises(SystemExit) as stop:
            command_line()
        return int(stop.value.code or 0)

    assert run("export", str(adapter)) == 2
    assert "expected --to FOLDER, or --push USER/NAME" in capsys.readouterr().err
    assert run("export", str(adapter), "--to", str(tmp_path / "x"), "--private") == 2
    assert "belong to --push" in capsys.readouterr().err
    assert run("export", str(adapter), "--push", NAME, "--license", "mit", "--private") == 0
    assert f"peftkit.load('hub:{NAME}')" in capsys.readouterr().err
    (tmp_path / "in.txt").write_text("\n".join(TEXTS))
    assert run("predict", f"hub:{NAME}", "--file", str(tmp_path / "in.txt")) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["label"] for row in rows] == [one.label for one in peftkit.load(adapter).predict(TEXTS)]
    assert run("embed", f"hub:{NAME}", "--file", str(tmp_path / "in.txt"), "--out", str(tmp_path / "v.npy")) == 0
    (tmp_path / "rows.csv").write_text(f"text,label\n{TEXTS[0]},cat\n{TEXTS[1]},dog\n")
    assert run("evaluate", f"hub:{NAME}", "--file", str(tmp_path / "rows.csv"), "--json") == 0
    assert "accuracy" in json.loads(capsys.readouterr().out)
    assert run("generate", f"hub:{NAME}") == 2
    assert "classification writes no text" in capsys.readouterr().err
    uvicorn = pytest.importorskip("uvicorn")
    monkeypatch.setattr(uvicorn.Server, "run", lambda *_, **__: None)
    assert run("serve", f"hub:{NAME}", "--port", "0") == 0
    assert "serving" in capsys.readouterr().out
    assert run("export", f"hub:{NAME}", "--to", str(tmp_path / "copy")) == 0
    assert peftkit.load(tmp_path / "copy").labels

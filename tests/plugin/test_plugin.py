"""An installed package adds a task, a head, a source, a reader, a baseline and an export format by entry points.

Nothing in peftkit knows it. Every step of the command line runs in fresh processes that see the installed package.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import warm

PACKAGE = Path(__file__).parent / "package"
ROOT = Path(__file__).parents[2]
STEPS = """
import contextlib, io, json, sys
from peftkit.cli.app import main
from tests import warm

proofs = warm.proofs()
proofs.__enter__()
results = []
for words in json.loads(sys.argv[1]):
    out, err, code = io.StringIO(), io.StringIO(), 0
    sys.argv = ["peftkit", *words]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
    results.append({"words": words, "code": code, "out": out.getvalue(), "err": err.getvalue()})
json.dump(results, open("results.json", "w"))
"""
RECIPE = """
name: ratings
model: {{source: {base}, dtype: float32, dropout: 0.0}}
method: {{kind: lora, rank: 4}}
task: {{kind: rating}}
data: {{source: "demo:120", max_length: 32}}
training: {{epochs: 8, batch_size: 16, learning_rate: 0.02, save_every: 4, threads: 1}}
tracking: []
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder into which pip has installed the package, entry points and all."""
    folder = tmp_path_factory.mktemp("site")
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target"]
    subprocess.run([sys.executable, *install, str(folder), str(PACKAGE)], check=True, capture_output=True)
    assert list(folder.glob("peftkit_ratings-*.dist-info/entry_points.txt"))
    return folder


@pytest.fixture(scope="module")
def environment(site):
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(site)]), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def work(tmp_path_factory, bert):
    folder = tmp_path_factory.mktemp("work")
    (folder / "recipe.yaml").write_text(RECIPE.format(base=bert), encoding="utf-8")
    lines = ["5\tthe film is best", "1\ta plot of the worst actor", "3\tfine movie and fine plot"]
    (folder / "new.ratings").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def run_steps(folder: Path, environment: dict[str, str], *steps: list[str]) -> list[dict]:
    """The commands one after the other in one fresh process; each one's code, stdout and stderr."""
    arguments = [sys.executable, "-c", STEPS, json.dumps(steps)]
    done = warm.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((folder / "results.json").read_text())
    for result in results:
        assert result["code"] == 0, result
    return results


def killed_run(folder: Path, environment: dict[str, str]) -> Path:
    """A run whose process was killed after its first checkpoint."""
    command = [sys.executable, "-m", "peftkit", "train", "recipe.yaml", "output_dir=killed", "export.prove=false"]
    process = warm.start(command, cwd=folder, env=environment)
    while not list(folder.glob("killed/ratings-*/checkpoints/step-*/manifest.json")):
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (run,) = folder.glob("killed/ratings-*")
    return run.relative_to(folder)


def weights(run: Path) -> str:
    return hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def results(work, environment):
    killed = killed_run(work, environment)
    first = run_steps(
        work, environment,
        *(["list", f"--{kind}"] for kind in ("tasks", "heads", "sources", "readers", "baselines", "formats")),
        ["inspect", "recipe.yaml", "--json"],
        ["plan", "recipe.yaml", "--json"],
        ["train", "recipe.yaml", "output_dir=whole"],
        ["train", "recipe.yaml", "output_dir=killed", "--resume", str(killed), "export.prove=false"],
    )  # fmt: skip
    (run,) = work.glob("whole/ratings-*")
    name = str(run.relative_to(work))
    second = run_steps(
        work, environment,
        ["evaluate", name, "--json"],
        ["evaluate", name, "--file", "new.ratings", "--json"],
        ["predict", name, "--file", "new.ratings", "--out", "predicted.csv"],
        ["export", name, "--to", "bundle", "--format", "bundle"],
        ["predict", "bundle", "--file", "new.ratings", "--out", "from_bundle.csv"],
        ["compare", name, str(killed), "--json"],
    )  # fmt: skip
    return {"first": first, "second": second, "run": run, "killed": work / killed, "work": work}


def test_the_lists_name_what_the_package_adds(results):
    added = ("rating", "ordinal", "demo", "ratings", "middle", "bundle")
    for name, step in zip(added, results["first"]):
        assert name in {line.split()[0] for line in step["out"].splitlines()}, step


def test_inspect_and_plan_know_the_new_task(results):
    inspection, plan = (json.loads(step["out"]) for step in results["first"][6:8])
    assert inspection["problem_type"] == "ordinal"
    assert inspection["splits"][0]["classes"].keys() == {"1", "2", "3", "4", "5"}
    assert plan["peak"] is not None


def test_it_learns_is_proven_and_reports(results):
    metrics = json.loads((results["run"] / "metrics.json").read_text())
    assert metrics["test"]["within_one"] > metrics["middle"]["within_one"]
    assert metrics["majority"]["loss"] > metrics["test"]["loss"]
    assert json.loads((results["run"] / "adapter" / "proof.json").read_text())["passed"]
    assert "rates a text from 1 to 5" in (results["run"] / "adapter" / "README.md").read_text()
    report = (results["run"] / "report.html").read_text(encoding="utf-8")
    assert "within one" in report
    assert "always 3" in report


def test_a_killed_run_resumes_to_the_same_bytes(results):
    assert weights(results["killed"]) == weights(results["run"])


def test_evaluate_predict_and_the_new_format_agree(results):
    own, file = (json.loads(step["out"]) for step in results["second"][:2])
    stored = json.loads((results["run"] / "metrics.json").read_text())["test"]
    assert own["within_one"] == pytest.approx(stored["within_one"])
    assert 0 <= file["accuracy"] <= 1
    predicted, bundled = (
        (results["work"] / name).read_text().splitlines() for name in ("predicted.csv", "from_bundle.csv")
    )
    assert "probability_5" in predicted[0]
    assert len(predicted) == 4
    assert [line.split(",")[2] for line in predicted] == [line.split(",")[2] for line in bundled]
    assert json.loads((results["work"] / "bundle" / "proof.json").read_text())["passed"]


def test_compare_reads_both_runs(results):
    table = json.loads(results["second"][-1]["out"])
    assert table["metric"] == "within_one"
    assert [row["status"] for row in table["variants"]] == ["done"]

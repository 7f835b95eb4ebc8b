"""Runs a representative part of the tests on other versions: Python 3.11 to 3.13, the lowest and the newest libraries.

    python tests/matrix.py                       # every environment, some 6 minutes each; writes docs/compatibility.md
    python tests/matrix.py 3.13-newest --keep    # one environment, kept in build/matrix for a look

Every environment starts empty. The wheel is installed into it and used outside of any checkout: it lists, trains on a
tiny model, predicts and exports. Then the extras and the test tools are added, and the tests of ``TESTS`` are run. uv
(from PyPI, in an environment of its own) resolves the versions: ``--resolution lowest-direct`` takes the lowest version
of everything that pyproject.toml names.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "matrix"
PAGE = ROOT / "docs" / "compatibility.md"
UV = WORK / "uv" / "bin" / "uv"
EXTRAS = ("demo", "dev", "excel", "gguf", "onnx", "quantization", "serve")
SHOWN = ("torch", "transformers", "peft", "accelerate", "datasets", "numpy", "bitsandbytes")
TESTS = """
    cli/test_cli.py data/test_pipeline_caches.py data/test_source_kinds.py data/test_table_formats.py
    export/test_export_and_proof.py export/test_exporters.py export/test_onnx.py inference/test_generate.py
    inference/test_trained_model.py methods/test_every_method.py methods/test_peft_types.py
    models/kernels/test_attention.py models/kernels/test_dropout.py models/test_bitsandbytes_checkpoints.py
    models/test_gguf.py models/test_loading.py models/test_packing.py models/test_quantization.py
    models/test_quantized_checkpoints.py reporting runs schema tasks test_old_runs.py test_public_surface.py test_run.py
    test_run_language.py training/test_low_bit_optimizers.py training/test_training_fields.py
""".split()
"""What other versions change, in some 4 minutes: file formats, methods, exports, saved runs, numerics. Left out are the
docs, faults, plans and launchers, which run the same code and would take three times as long."""
RECIPE = """
name: tiny
model: {source: ./bert, dtype: float32}
method: {kind: lora, rank: 4}
data: {source: rows.csv, max_length: 32}
training: {epochs: 2, batch_size: 8, learning_rate: 0.01, threads: 1}
tracking: []
"""
MAKE_BASE = "import runpy, sys; runpy.run_path(sys.argv[1])['tiny_bert']('bert')"
WHERE = "import peftkit, sys; print(peftkit.__file__)"


@dataclass(frozen=True)
class Environment:
    """A Python version and a choice of library versions: lowest, pinned (constraints.txt) or newest."""

    python: str
    libraries: str

    def __str__(self) -> str:
        return f"{self.python}-{self.libraries}"


ENVIRONMENTS = (Environment("3.11", "lowest"), Environment("3.12", "pinned"), Environment("3.13", "newest"))
"""``make test`` itself is 3.11 with the pinned versions. The lowest numpy has no wheel for Python 3.13."""


@dataclass
class Outcome:
    """What happened in an environment."""

    environment: str
    versions: dict[str, str] = field(default_factory=dict)
    wheel: str = "not run"
    tests: str = "not run"
    minutes: float = 0.0
    failed: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return self.wheel == "passed" and "passed" in self.tests and not self.failed


def call(*command: object, cwd: Path = ROOT, **variables: str) -> str:
    """The output of a command; raises CalledProcessError with its errors."""
    environment = {**os.environ, "UV_PYTHON_DOWNLOADS": "never", **variables}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{(done.stderr or done.stdout)[-2000:]}")
    return done.stdout


def interpreter(version: str) -> Path:
    """A Python of this version: on the path, or one of pyenv's; a shim of pyenv may lead nowhere."""
    on_path = [Path(found)] if (found := shutil.which(f"python{version}")) else []
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for candidate in (*on_path, *sorted(pyenv.glob(f"{version}.*/bin/python{version}"))):
        if subprocess.run([candidate, "-c", ""], capture_output=True).returncode == 0:
            return candidate
    raise RuntimeError(f"Python {version} is not installed: add python{version} to PATH, or leave it out")


def build_wheel() -> Path:
    """The wheel of this checkout."""
    folder = WORK / "dist"
    shutil.rmtree(folder, ignore_errors=True)
    call(sys.executable, "-c", "import hatchling.build as b, sys; b.build_wheel(sys.argv[1])", folder)
    return next(folder.glob("*.whl"))


def install(environment: Environment, folder: Path, *what: str) -> None:
    """Adds packages in the versions of the environment."""
    constraints: list[object] = []
    if environment.libraries == "pinned":
        constraints = ["--constraint", ROOT / "constraints.txt"]
    elif environment.libraries == "lowest":
        constraints = ["--constraint", lowest(environment)]
    call(UV, "pip", "install", "--quiet", "--python", folder / "bin" / "python", *constraints, *what)


def lowest(environment: Environment) -> Path:
    """A file of the lowest version of everything that pyproject.toml names, and the newest of what those need."""
    file = WORK / f"{environment}.txt"
    extras = [word for extra in EXTRAS for word in ("--extra", extra)]
    python = ["--python-version", environment.python, "--quiet", "--no-annotate", "--output-file", file]
    call(UV, "pip", "compile", "--resolution", "lowest-direct", *python, *extras, ROOT / "pyproject.toml")
    return file


def use_wheel(folder: Path, place: Path) -> None:
    """Lists, shows, trains, predicts and exports with what is installed, in an empty folder."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    python, command = folder / "bin" / "python", folder / "bin" / "peftkit"
    quiet = {"HF_HUB_OFFLINE": "1", "PEFTKIT_CACHE": str(place / "cache"), "PYTHONPATH": ""}
    (place / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    with (place / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        words = [("great", "good"), ("awful", "bad")] * 20
        rows = [(f"{word} film number {number}", label) for number, (word, label) in enumerate(words)]
        csv.writer(file).writerows([("text", "label"), *rows])

    def peftkit(*words: object) -> str:
        return call(command, *words, cwd=place, **quiet)

    imported = Path(call(python, "-c", WHERE, cwd=place, **quiet).strip())
    assert folder in imported.parents, f"imported from {imported}, not from the wheel"
    call(python, "-I", "-c", MAKE_BASE, ROOT / "tests" / "tiny.py", cwd=place, **quiet)
    assert any(row["name"] == "own_csv" for row in json.loads(peftkit("list", "--json")))
    assert "kind: lora" in peftkit("show", "own_csv")
    peftkit("train", "recipe.yaml")
    (run,) = (place / "runs").iterdir()
    assert json.loads((run / "adapter" / "proof.json").read_text(encoding="utf-8"))["passed"]
    peftkit("predict", run, "--file", "rows.csv", "--out", "predicted.jsonl")
    assert len((place / "predicted.jsonl").read_text(encoding="utf-8").splitlines()) == len(rows)
    peftkit("export", run, "--to", "merged", "--merge")
    assert list((place / "merged").glob("*.safetensors"))


def run_tests(folder: Path, workers: int) -> tuple[str, list[str]]:
    """pytest's closing line, and the tests that failed."""
    parallel = ["-n", str(workers), "--dist", "loadfile", "--no-loadscope-reorder"] if workers > 1 else []
    paths = [f"tests/{name}" for name in TESTS]
    command = [folder / "bin" / "python", "-m", "pytest", "-m", "not slow", "-p", "no:cacheprovider", *parallel, *paths]
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **quiet}, capture_output=True, text=True)
    (WORK / f"{folder.name}.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    closing = re.findall(r"^(\d+ [a-z]+(?:, \d+ [a-z]+)*) in ", done.stdout, re.MULTILINE)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return (re.sub(r", \d+ (deselected|warnings?)", "", closing[-1]) if closing else "did not end"), failed


def try_environment(environment: Environment, wheel: Path, workers: int) -> Outcome:
    """Installs, uses the wheel, runs the tests; an installation or a wheel that fails is an outcome, too."""
    outcome, started, folder = Outcome(str(environment)), time.monotonic(), WORK / str(environment)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        call(UV, "venv", "--quiet", "--python", interpreter(environment.python), folder)
        install(environment, folder, str(wheel))
        use_wheel(folder, WORK / f"{environment}-work")
        outcome.wheel = "passed"
        install(environment, folder, f"{wheel}[{','.join(EXTRAS)}]")
        listed = json.loads(call(UV, "pip", "list", "--python", folder / "bin" / "python", "--format", "json"))
        outcome.versions = {row["name"]: row["version"] for row in listed if row["name"] in SHOWN}
        outcome.versions["python"] = call(folder / "bin" / "python", "-V").split()[1]
        outcome.tests, outcome.failed = run_tests(folder, workers)
    except (RuntimeError, AssertionError) as error:
        outcome.failed.append(str(error))
        outcome.wheel = "failed" if outcome.wheel == "not run" else outcome.wheel
    outcome.minutes = (time.monotonic() - started) / 60
    return outcome


def table(outcomes: list[Outcome]) -> Iterator[str]:
    """The lines of docs/compatibility.md."""
    head = ["environment", "python", *SHOWN, "wheel alone", "tests", "minutes"]
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for one in outcomes:
        versions = [one.versions.get(name, "–").partition("+")[0] for name in ("python", *SHOWN)]
        yield f"| {' | '.join([one.environment, *versions, one.wheel, one.tests, f'{one.minutes:.0f}'])} |"


def write_page(outcomes: list[Outcome]) -> None:
    """Puts the table and the machine below the page's text."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").is_file() else ""
    kind = "with native bf16" if "avx512_bf16" in flags else "without native bf16"
    place = f"{platform.system()} on {platform.machine()} {kind}, {os.cpu_count()} cores, {date.today()}."
    above = PAGE.read_text(encoding="utf-8").partition("<!-- measured -->")[0]
    PAGE.write_text("\n".join([f"{above}<!-- measured -->", place, "", *table(outcomes), ""]), encoding="utf-8")


def main() -> int:
    """Runs the environments that are named, or all; the page has the last outcome of each."""
    names = {str(environment): environment for environment in ENVIRONMENTS}
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("environments", nargs="*", choices=[[], *names], metavar="ENVIRONMENT", help=", ".join(names))
    parser.add_argument("--workers", type=int, default=2, help="processes that run tests")
    parser.add_argument("--keep", action="store_true", help="keep the environments, some GB each")
    given = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    if not UV.is_file():
        call(sys.executable, "-m", "venv", UV.parents[1])
        call(UV.with_name("python"), "-m", "pip", "install", "--quiet", "uv")
    wheel, outcomes = build_wheel(), []
    for name in given.environments or names:
        outcome = try_environment(names[name], wheel, given.workers)
        outcomes.append(outcome)
        (WORK / f"{name}.json").write_text(json.dumps(asdict(outcome), indent=1), encoding="utf-8")
        print(f"{name}: wheel {outcome.wheel}; {outcome.tests}; {outcome.minutes:.1f} minutes", flush=True)
        print("".join(f"  {one}\n" for one in outcome.failed), end="", flush=True)
        if not given.keep:
            shutil.rmtree(WORK / name, ignore_errors=True)
            shutil.rmtree(WORK / f"{name}-work", ignore_errors=True)
    write_page([Outcome(**json.loads(file.read_text())) for name in names if (file := WORK / f"{name}.json").is_file()])
    return int(not all(outcome.passed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())

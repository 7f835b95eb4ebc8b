"""Inputs that changed, are broken, or mean harm: recipes, data, adapters, secrets."""

from __future__ import annotations

import json
import os
import random
import shutil
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peftkit.data.pipeline import prepare
from peftkit.errors import DataError, PeftkitError, RecipeError
from peftkit.schema import overrides
from peftkit.schema.recipe import Recipe, replace
from tests.faults import runs
from tests.faults.kinds import Outcome, Reference, begin

Change = Callable[[Recipe, Path], Recipe]


# -- what must not change between a run and its continuation -----------------------------------------------------------


def _field(**parts: Any) -> Change:
    return lambda recipe, folder: replace(recipe, **parts)


def _data(edit: Callable[[list[str]], list[str]]) -> Change:
    def change(recipe: Recipe, folder: Path) -> Recipe:
        rows = folder / "topics.csv"
        rows.write_text("\n".join(edit(rows.read_text().splitlines())) + "\n")
        return recipe

    return change


def _json(name: str, edit: Callable[[dict[str, Any]], Any]) -> Change:
    def change(recipe: Recipe, folder: Path) -> Recipe:
        file = folder / "bert" / name
        values = json.loads(file.read_text())
        edit(values)
        file.write_text(json.dumps(values))
        return recipe

    return change


def _weights(recipe: Recipe, folder: Path) -> Recipe:
    file = folder / "bert" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(bytes(content))
    return recipe


CHANGES: dict[str, tuple[str, Change]] = {
    "a row added": ("data", _data(lambda lines: [*lines, "one more game of the team,sports"])),
    "a row removed": ("data", _data(lambda lines: lines[:-1])),
    "a letter changed": ("data", _data(lambda lines: [*lines[:5], "x" + lines[5], *lines[6:]])),
    "a label changed": (
        "data",
        _data(lambda lines: [*lines[:4], lines[4].rpartition(",")[0] + ",science", *lines[5:]]),
    ),
    "rows in another order": ("data", _data(lambda lines: [lines[0], *reversed(lines[1:])])),
    "longer texts": ("data", _field(data={"max_length": 24})),
    "another split": ("data", _field(data={"split_seed": 7})),
    "a token of the tokenizer": (
        "base model|tokenizer",
        _json("tokenizer.json", lambda held: held["model"]["vocab"].update({"##z": held["model"]["vocab"]["##y"]})),
    ),
    "one bit of the base's weights": ("base model", _weights),
    "the base's config": ("base model", _json("config.json", lambda held: held.update(hidden_act="relu"))),
    "the learning rate": ("training.learning_rate", _field(training={"learning_rate": 1e-3})),
    "the seed": ("training.seed", _field(training={"seed": 5})),
    "the batch size": ("training.batch_size", _field(training={"batch_size": 4})),
    "the epochs": ("training.epochs", _field(training={"epochs": 5})),
    "the schedule": ("training.scheduler", _field(training={"scheduler": "cosine"})),
    "the optimizer": ("training.optimizer", _field(training={"optimizer": "sgd"})),
    "the rank": ("method.rank", _field(method={"rank": 4})),
    "the adapter's dropout": ("method.dropout", _field(method={"dropout": 0.3})),
    "the method": ("method.kind", _field(method={"kind": "frozen"})),
    "label smoothing": ("task.label_smoothing", _field(task={"label_smoothing": 0.1})),
    "the dtype": ("model.dtype", _field(model={"dtype": "bfloat16"})),
}


def changed_inputs(folder: Path, whole: Reference, only: tuple[str, ...] = tuple(CHANGES)) -> Outcome:
    """Something that the weights depend on changes after a kill: going on is refused, and what changed is named."""
    outcome = begin("changed inputs at resume", "refused by one message that names the change")
    for trial, _ in outcome.left(len(only), 0):
        name = only[trial]
        expected, change = CHANGES[name]
        own = folder / f"changed-{trial}"
        shutil.copytree(folder / "bert", own / "bert")
        shutil.copy(folder / "topics.csv", own / "topics.csv")
        shutil.copytree(whole.recipe.output_dir, own / "runs")
        recipe = replace(
            whole.recipe, model={"source": str(own / "bert")}, data={"source": str(own / "topics.csv")},
            output_dir=str(own / "runs"),
        )  # fmt: skip
        said = own / "said.txt"
        # the copy itself is another path of the same bytes, which is allowed by name
        allowed = ("model.source", "data.source")
        code = runs.wait(runs.fork(runs.train(change(recipe, own), resume=True, allow=allowed), said))
        text = said.read_text()
        named = any(f"{one}" in text.partition("these changed:")[2] for one in expected.split("|"))
        problems = [] if code == 2 and named else [f"ended with {code}: {text[-300:]}"]
        outcome.count(problems, name)
        shutil.rmtree(own)
    return outcome


# -- recipes -----------------------------------------------------------------------------------------------------------

HARM = [
    "!!python/object/apply:os.system ['touch {canary}']",
    "!!python/object/new:subprocess.Popen [['touch', '{canary}']]",
    "!!python/name:os.system",
    "{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}",
    "$(touch {canary})",
    "`touch {canary}`",
    "../../../../etc/passwd",
    "&a [*a, *a]",
]


def fuzzed_recipes(folder: Path, trials: int) -> Outcome:
    """Recipes and overrides cut, spliced, and laced with code: a recipe, or one error that names the place."""
    outcome = Outcome("fuzzed recipes and overrides", "one message naming the place, 0 tracebacks, 0 code run")
    canary, file = folder / "canary", folder / "fuzzed.yaml"
    start = runs.encoder(folder)
    text = start.to_yaml()
    lines = text.splitlines()
    harm = [each.format(canary=canary) for each in HARM]
    values = st.one_of(st.sampled_from(harm), st.text(max_size=12), st.integers().map(str), st.floats().map(str))
    fields = [f"{part}.{name}" for part, held in start for name in getattr(type(held), "model_fields", ())]
    edits = st.lists(st.tuples(st.integers(0, len(lines)), st.sampled_from("dcir"), values), min_size=1, max_size=4)
    given_fields = st.lists(st.tuples(st.sampled_from([*fields, "x.y", "name", "method"]), values), max_size=3)

    @settings(
        max_examples=trials, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(edits=edits, given_fields=given_fields)
    def fuzz(edits: list[tuple[int, str, str]], given_fields: list[tuple[str, str]]) -> None:
        file.write_bytes(_edited(lines, edits).encode("utf-8", "surrogatepass"))
        problems = []
        try:
            recipe = Recipe.from_yaml(file)
        except RecipeError as error:
            recipe = start
            problems += [] if str(file) in str(error) else [f"the file is not named: {error}"]
        except PeftkitError as error:
            recipe = start
            problems += [] if str(error) else ["an empty message"]
        except Exception as error:
            recipe = start
            problems.append(f"{type(error).__name__}: {error}")
        try:
            overrides.apply(recipe, [f"{name}={value}" for name, value in given_fields])
        except PeftkitError:
            pass
        except Exception as error:
            problems.append(f"overrides {given_fields}: {type(error).__name__}: {error}")
        problems += ["code was run"] if canary.exists() else []
        outcome.count(problems, repr(edits)[:200])

    fuzz()
    return outcome


def _edited(lines: list[str], edits: list[tuple[int, str, str]]) -> str:
    """Lines deleted, cut off, inserted, or given another value."""
    lines = list(lines)
    for place, edit, value in edits:
        place = min(place, len(lines) - 1)
        if edit == "d" and len(lines) > 1:
            del lines[place]
        elif edit == "c":
            lines[place] = lines[place][: len(lines[place]) // 2]
        elif edit == "i":
            lines.insert(place, value)
        else:
            lines[place] = f"{lines[place].partition(':')[0]}: {value}"
    return "\n".join(lines)


# -- data --------------------------------------------------------------------------------------------------------------

BAD_CSV: dict[str, Callable[[str, str], bytes]] = {
    "a field too few": lambda text, label: text.encode(),
    "a field too many": lambda text, label: f"{text},more,{label}".encode(),
    "neither UTF-8 nor cp1252": lambda text, label: b"caf\x81 " + f"{text},{label}".encode(),
    "an empty text": lambda text, label: f",{label}".encode(),
    "a blank text": lambda text, label: f"   ,{label}".encode(),
    "no label": lambda text, label: f"{text},".encode(),
    "text after a closing quote": lambda text, label: f'"{text}" tail,{label}'.encode(),
    "a quote that is never closed": lambda text, label: f'"{text},{label}'.encode(),
}
BAD_JSON: dict[str, Callable[[str, str], str]] = {
    "a broken line": lambda text, label: json.dumps({"text": text, "label": label})[:-3],
    "no object": lambda text, label: json.dumps([text, label]),
    "a null text": lambda text, label: json.dumps({"text": None, "label": label}),
    "a number for a text": lambda text, label: json.dumps({"text": 5, "label": label}),
    "an object for a label": lambda text, label: json.dumps({"text": text, "label": {"a": label}}),
    "a missing label": lambda text, label: json.dumps({"text": text}),
}


def bad_data(folder: Path, trials: int, seed: int = 0) -> Outcome:
    """One bad row somewhere in a file: told with the file and its line before any model is loaded."""
    outcome = Outcome(f"bad data, {len(BAD_CSV) + len(BAD_JSON)} kinds", "caught before the model loads, line named")
    generator = random.Random(seed)
    for trial in range(trials):
        rows = _rows(generator, generator.randint(8, 40))
        at = generator.randrange(3, len(rows))
        kinds = [*BAD_CSV, *BAD_JSON]
        kind = kinds[trial % len(kinds)]
        path = folder / f"bad.{'csv' if kind in BAD_CSV else 'jsonl'}"
        line = _write(path, rows, at, BAD_CSV.get(kind) or BAD_JSON[kind])
        outcome.count(_refused(path, line), f"{kind} in line {line}")
    return outcome


def clean_data(folder: Path, trials: int, seed: int = 1) -> Outcome:
    """Files of legal but odd rows: no alarm, and every row is read."""
    outcome = Outcome("clean data", "0 false alarms, every row read")
    generator = random.Random(seed)
    for trial in range(trials):
        rows = [(_odd(generator, text), label) for text, label in _rows(generator, generator.randint(12, 40))]
        path = folder / f"clean.{'csv' if trial % 2 else 'jsonl'}"
        _write(path, rows, None, None)
        try:
            prepared = prepare(_recipe(path))
            read = sum(len(split) for split in prepared.splits.values())
            dropped = sum(step.rows for step in prepared.steps if step.action == "dropped")
            problems = [] if read + dropped == len(rows) else [f"{read} of {len(rows)} rows were read"]
        except PeftkitError as error:
            problems = [str(error)]
        outcome.count(problems, f"{path.name}, {len(rows)} rows")
    return outcome


def _refused(path: Path, line: int) -> list[str]:
    try:
        prepare(_recipe(path))
    except DataError as error:
        right = str(error.file) == str(path) and (error.line == line or f"line {line}" in str(error))
        return [] if right else [f"said {error}"]
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]
    return ["it was not noticed"]


def _recipe(path: Path) -> Recipe:
    return Recipe.parse({"name": "r", "model": {"source": "./m"}, "data": {"source": str(path)}})


def _rows(generator: random.Random, count: int) -> list[tuple[str, str]]:
    letters = string.ascii_lowercase
    words = lambda: " ".join("".join(generator.choices(letters, k=generator.randint(2, 9))) for _ in range(6))  # noqa: E731
    return [(f"{words()} {index}", "ab"[index % 2]) for index in range(count)]


def _odd(generator: random.Random, text: str) -> str:
    pieces = [
        "é",
        "中文",
        "👩‍👩‍👧",
        "عربى",
        "it's",
        "50 %",
        "a;b",
        "tab\there",
        'say "so"',
        "x, y",
        "",
        "#",
        "=1+1",
        "null",
    ]
    return f"{generator.choice(pieces)} {text} {generator.choice(pieces)}".strip()


def _write(path: Path, rows: list[tuple[str, str]], at: int | None, bad: Any) -> int:
    """Writes rows, with the one numbered ``at`` made bad; gives its line."""
    lines: list[bytes] = []
    for number, (text, label) in enumerate(rows):
        if number == at:
            made = bad(text, label)
            lines.append(made if isinstance(made, bytes) else made.encode())
        elif path.suffix == ".csv":
            quoted = '"' + text.replace('"', '""') + '"' if set(text) & set(',"\n') else text
            lines.append(f"{quoted},{label}".encode())
        else:
            lines.append(json.dumps({"text": text, "label": label}, ensure_ascii=False).encode())
    header = [b"text,label"] if path.suffix == ".csv" else []
    path.write_bytes(b"\n".join([*header, *lines]) + b"\n")
    return (at or 0) + 1 + len(header)


# -- secrets -----------------------------------------------------------------------------------------------------------

SECRETS = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "ANTHROPIC_API_KEY",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "AZURE_CLIENT_SECRET", "GOOGLE_API_KEY", "GITHUB_TOKEN", "GITLAB_TOKEN",
    "NPM_TOKEN", "PYPI_TOKEN", "MLFLOW_TRACKING_PASSWORD", "COMET_API_KEY", "NEPTUNE_API_TOKEN",
    "CLEARML_API_SECRET_KEY",
    "DATABASE_URL", "SSH_PRIVATE_KEY", "SLACK_TOKEN", "KAGGLE_KEY", "DOCKER_PASSWORD", "MY_SECRET", "PASSWORD",
)  # fmt: skip


def secrets(folder: Path, whole: Reference) -> Outcome:
    """Secrets in the environment of a run that trains, is killed, goes on and fails: none is in any file or output."""
    outcome = Outcome("secrets in the environment", "found in no output")
    recipe, said = whole.again(folder, "secrets"), folder / "secrets.txt"
    canaries = {name: f"sEcReT-{number:02d}-{name.lower()}" for number, name in enumerate(SECRETS)}

    def work(train: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: (os.environ.update(canaries), train())

    runs.wait(runs.fork(work(runs.train(recipe)), said))
    runs.wait(runs.fork(work(runs.train(replace(recipe, training={"seed": 9}), resume=True)), said))
    files = [said, *(path for path in Path(recipe.output_dir).rglob("*") if path.is_file())]
    content = b"\n".join(path.read_bytes() for path in files)
    for name, canary in canaries.items():
        outcome.count([f"found: {canary}"] if canary.encode() in content else [], name)
    outcome.figures["files searched"] = len(files)
    return outcome

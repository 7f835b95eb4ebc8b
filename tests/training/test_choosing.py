"""Runs that choose their blocks and rank: on the data, once, the same everywhere, and as if the recipe had said so."""

from __future__ import annotations

import csv
import itertools
import json
import random
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import peftkit
from peftkit import replace
from peftkit.data.pipeline import prepare
from peftkit.distributed.session import open_session
from peftkit.errors import Interrupted, RunError
from peftkit.experiments.variants import variants
from peftkit.export.manifest import read as read_manifest
from peftkit.inference.trained_model import load
from peftkit.methods.auto_layers import AutoLayers
from peftkit.models.blocks import find_blocks, unwrap
from peftkit.models.loading import build
from peftkit.models.tokenizer import load_tokenizer
from peftkit.planning.devices import parse_device
from peftkit.planning.plan import collect_inputs, make_plan
from peftkit.reporting import html
from peftkit.runs import choices as stored
from peftkit.schema.head import head_of
from peftkit.schema.recipe import Recipe
from peftkit.schema.types import in_head
from peftkit.training import choosing
from peftkit.training.interruptions import StopRequest
from peftkit.training.step import TaskModule
from tests import tiny
from tests.conftest import topic_rows

FEW = {"rows": 32}
"""Rows enough to look at for tests that do not depend on what is chosen."""
OFF = {"duplicates": "off", "near_duplicates": "off", "leakage": "off"}


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A BERT of four blocks."""
    return tiny.tiny_bert(tmp_path_factory.mktemp("models") / "deep", num_hidden_layers=4)


@pytest.fixture(scope="module")
def recipe(deep, topics_csv, tmp_path_factory):
    return Recipe.parse(
        {
            "name": "small", "model": {"source": str(deep), "dtype": "float32", "dropout": 0.0},
            "data": {"source": str(topics_csv), "max_length": 32},
            "method": {"kind": "lora", "rank": 4, "layers": {"auto": FEW}},
            "training": {"epochs": 1, "batch_size": 8, "learning_rate": 1e-2, "threads": 1},
            "evaluation": {"baselines": []}, "export": {"prove": False}, "tracking": [],
            "output_dir": str(tmp_path_factory.mktemp("runs")),
        }
    )  # fmt: skip


def chosen(recipe):
    """The choices of a recipe, without training."""
    prepared = prepare(recipe)
    return choosing.choose(recipe, open_session(recipe), prepared, load_tokenizer(recipe.model))


def without_times(choices):
    return [json.dumps({**choice.__dict__, "seconds": 0}, default=lambda one: one.__dict__) for choice in choices]


def disconnected(folder, blocks):
    """A BERT of four blocks, some of which add nothing to the stream: their adapters of inner layers change nothing."""
    base = tiny.tiny_bert(folder, num_hidden_layers=4)
    weights = load_file(base / "model.safetensors")
    for number in blocks:
        for name in ("attention.output.dense", "output.dense"):
            for part in ("weight", "bias"):
                weights[f"encoder.layer.{number}.{name}.{part}"].zero_()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    return base


@pytest.fixture(scope="module")
def many_rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "many.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *topic_rows(240)])
    return path


@pytest.mark.parametrize(("cut_off", "expected"), [((0, 1, 2), -1), ((0, 1), -2), ((1, 2, 3), -4)])
def test_the_blocks_that_must_change_are_the_ones_that_can(recipe, many_rows, tmp_path, cut_off, expected):
    base = disconnected(tmp_path / "base", cut_off)
    method = {"rank": 8, "target_modules": ["query", "key", "value", "intermediate.dense"], "layers": "auto"}
    settled, (choice,) = chosen(
        replace(recipe, model={"source": str(base)}, method=method, data={"source": str(many_rows)})
    )
    assert choice.value == settled.method.layers == expected
    assert "an estimated 100% of" in choice.summary
    able = [number not in cut_off for number in (3, 2, 1, 0)]
    gains = [after.estimate - before.estimate for before, after in itertools.pairwise(choice.curve)]
    assert [abs(gain) > 1e-4 for gain in gains] == able


def test_options_arrive_and_rows_bound_what_is_read(recipe):
    options = {"tolerance": 0.99, "at_least": 3, "rows": 20}
    (choice,) = chosen(replace(recipe, method={"layers": {"auto": options}}))[1]
    assert choice.asked == {"auto": options}
    assert choice.rows == 10  # the other ten fit the head
    assert choice.threshold == pytest.approx(0.01)
    assert choice.size >= 3


def test_a_choice_is_the_same_again_and_follows_the_seed_of_new_weights(recipe):
    again = replace(recipe, training={"learning_rate": 1e-4, "batch_size": 4, "epochs": 9})
    first, second = chosen(recipe)[1], chosen(again)[1]
    assert without_times(first) == without_times(second)
    other = chosen(replace(recipe, training={"seed": 5}))[1]
    assert without_times(first) != without_times(other)


def stop_after(patch, checks):
    asked = {"times": 0}

    def code(self):
        asked["times"] += 1
        return int(signal.SIGINT) if asked["times"] >= checks else 0

    patch.setattr(StopRequest, "code", property(code))


@pytest.fixture(scope="module")
def both(recipe, many_rows):
    """Blocks and rank left to the run, with a tolerance that does not take all of them."""
    options = {
        "layers": {"auto": {"tolerance": 0.9, "rows": 64}},
        "rank": {"auto": {"at_most": 6, "tolerance": 0.2, **FEW}},
    }
    return replace(
        recipe, data={"source": str(many_rows), "limit": {"train": 200, "validation": 12, "test": 12}},
        method={**options, "dropout": 0.1}, training={"max_steps": 8, "save_every": 3},
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(both, _no_plots):
    """It, trained, with the plots of its report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html, "plots_of", _no_plots[html])
        return peftkit.train(both, quiet=True)


def test_a_run_trains_as_if_its_recipe_named_what_it_chose(both, run):
    layers, rank = stored.read(run.path)
    assert layers.rows > rank.rows == 16
    assert (run.recipe.method.layers, run.recipe.method.rank) == (layers.value, rank.value)
    assert run.recipe == Recipe.from_yaml(run.path / "recipe.yaml")
    assert stored.asked_recipe(run.path) == both
    named = peftkit.train(replace(both, method={"layers": layers.value, "rank": rank.value}), quiet=True)
    assert adapter_bytes(run) == adapter_bytes(named)
    assert stored.read(named.path) == ()
    blocks = {name.split(".layer.")[1][0] for name in load_file(run.adapter / "adapter_model.safetensors")
              if ".layer." in name}  # fmt: skip
    assert blocks == {str(number) for number in range(4 + layers.value, 4)}
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert "Chosen on the training rows" in page
    assert layers.summary in page
    assert (run.path / "plots" / "choices.png").is_file()
    assert layers.summary in json.loads((run.path / "about.json").read_text())["notes"]
    assert read_manifest(run.adapter).choices == (layers.summary, rank.summary)
    assert rank.summary in (run.adapter / "README.md").read_text(encoding="utf-8")
    assert "Chosen on" not in (named.path / "report.html").read_text(encoding="utf-8")
    assert load(run.path).predict(["game team"])


def refuse(*arguments):
    raise AssertionError("a run that is resumed, or another process, chooses again")


def adapter_bytes(run):
    return (run.adapter / "adapter_model.safetensors").read_bytes()


def test_a_stopped_run_keeps_its_choice_and_ends_with_the_same_bytes(both, run, monkeypatch, tmp_path):
    both = replace(both, output_dir=str(tmp_path))
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Interrupted):
            peftkit.train(both)
    monkeypatch.setattr(choosing, "_choose", refuse)
    other = replace(both, method={"layers": {"auto": {"tolerance": 0.5}}})
    with pytest.raises(RunError, match=r"method.layers was chosen for .*'tolerance': 0.9.*start a new run, or set"):
        peftkit.train(other, resume=True)
    (stopped,) = tmp_path.iterdir()
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interrupted):
            peftkit.train(both, resume=True)
    resumed = peftkit.train(Recipe.from_yaml(stopped / "recipe.yaml"), resume=stopped)  # as `train --resume RUN` does
    assert adapter_bytes(resumed) == adapter_bytes(run)
    assert "Chosen on the training rows" in (resumed.path / "report.html").read_text(encoding="utf-8")


def test_damaged_choices_are_named(tmp_path):
    (tmp_path / stored.FILE).write_text('[{"field": 1}]')
    with pytest.raises(RunError, match=r"choices.json: not as peftkit writes it"):
        stored.read(tmp_path)


def test_a_plan_is_for_the_most_and_says_so(both, bert):
    both = replace(both, model={"source": str(bert)})
    device = parse_device("24GB")
    inputs = collect_inputs(both, device)
    plan = make_plan(both, device, inputs)
    most = make_plan(replace(both, method={"layers": None, "rank": 6}), device, inputs)
    assert plan.peak.total == most.peak.total
    notes = " ".join(plan.notes)
    chosen = "the run chooses between the last block and all of them on up to 64 training rows"
    assert f"method.layers=auto: {chosen}" in notes
    assert "method.rank=auto: the run chooses between rank 1 and 6" in notes
    assert plan.recipe == both


@pytest.mark.slow
def test_compare_sets_automatic_blocks_next_to_fixed_ones(recipe, tmp_path):
    varied = {"method.layers": ["auto", -1, None]}
    assert [one.recipe.method.layers for one in variants([recipe], vary=varied)] == [AutoLayers(), -1, None]
    comparison = peftkit.compare(
        replace(recipe, training={"max_steps": 2}), vary={"method.layers": [{"auto": FEW}, -1]}, seeds=2,
        out=tmp_path / "out", isolated=False, quiet=True,
    )  # fmt: skip
    automatic, fixed = (row["runs"] for row in comparison.table["variants"])
    assert [len(stored.read(Path(run))) for run in (*automatic, *fixed)] == [1, 1, 0, 0]
    # of seeds that chose otherwise: one group all the same
    number = stored.read(Path(automatic[0]))[0].value
    recipe_file = Path(automatic[1]) / "recipe.yaml"
    other = {-1: -2}.get(number, number + 1)
    changed = stored.settled(Recipe.from_yaml(recipe_file), SimpleNamespace(field="layers", value=other))
    recipe_file.write_text(changed.to_yaml())
    again = peftkit.compare([*automatic, *fixed], out=tmp_path / "again", quiet=True)
    assert [len(row["runs"]) for row in again.table["variants"]] == [2, 2]


def test_gradients_are_those_of_the_mean_loss_of_a_group(recipe):
    fixed = replace(recipe, method={"layers": None})
    tokenizer, prepared, session = load_tokenizer(fixed.model), prepare(fixed), open_session(fixed)
    loaded = build(fixed, prepared.info, tokenizer, "cpu")
    module = TaskModule(loaded, head_of(prepared.info, fixed.task)).eval()
    split = choosing._encoded(prepared, tokenizer, fixed, list(range(20)))
    groups = choosing.GroupGradients(module, loaded, fixed, split, tokenizer, session)
    numbers = [rows.tolist() for rows in groups.groups()]
    assert sorted(row for rows in numbers for row in rows) == list(range(20))
    name, weight = next(
        (n, p) for n, p in loaded.model.named_parameters() if n.endswith("3.output.dense.lora_B.default.weight")
    )
    read = [weight.grad.clone() for _ in groups]
    rows = numbers[1]
    model = loaded.model
    model.zero_grad()
    losses = [
        torch.nn.functional.cross_entropy(
            model(input_ids=torch.tensor([split.examples[row]["input_ids"]])).logits,
            torch.tensor([split.examples[row]["labels"]]),
        )
        for row in rows
    ]
    torch.stack(losses).mean().backward()
    assert torch.allclose(read[1], dict(model.named_parameters())[name].grad, atol=1e-6)


def test_the_head_is_fitted_and_nothing_else(recipe):
    fixed = replace(recipe, method={"layers": None})
    tokenizer, prepared, session = load_tokenizer(fixed.model), prepare(fixed), open_session(fixed)
    loaded = build(fixed, prepared.info, tokenizer, "cpu")
    module = TaskModule(loaded, head_of(prepared.info, fixed.task)).eval()
    before = {name: p.detach().clone() for name, p in loaded.model.named_parameters()}
    trained = [name for name, p in loaded.model.named_parameters() if p.requires_grad]
    split = choosing._encoded(prepared, tokenizer, fixed, list(range(40)))
    batch = split.batch(torch.arange(40).numpy(), tokenizer)
    first = float(module(batch).detach())
    choosing.fit_head(module, loaded, split, tokenizer, session)
    assert float(module(batch).detach()) < 0.8 * first
    after = dict(loaded.model.named_parameters())
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed
    assert all(in_head(name, loaded.head_names) for name in changed)
    assert [name for name, p in loaded.model.named_parameters() if p.requires_grad] == trained
    assert module.trunk is None


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(kind):
    """Rows of words for every kind of task that has one stack of blocks."""
    draw = random.Random(0)
    texts = [f"{' '.join(draw.choices(tiny.WORDS, k=draw.randint(4, 12)))} {number}" for number in range(40)]
    for number, text in enumerate(texts):
        first, place = text.split()[0], text.split()[1]
        yield {
            "regression": {"text": text, "label": float(len(text))},
            "multi_label": {"text": text, "label": "a|b" if "the" in text else "c|a" if number % 2 else "b"},
            "tokens": {"text": text.split(), "label": ["B-A" if word < "g" else "O" for word in text.split()]},
            "questions": {"text": f"what {number}", "context": text,
                          "label": {"text": [place], "answer_start": [len(first) + 1]}},
            "masks": {"text": text},
            "pairs": {"text": text, "other": f"{first} {place} {number}"},
            "liked": {"prompt": first + str(number), "chosen": f"good {text}", "rejected": f"bad {text}"},
            "marks": {"prompt": first + str(number), "completion": text, "label": number % 2 == 0},
            "chat": {"instruction": text, "input": "", "output": f"{first} {place}"},
        }[kind]  # fmt: skip


TASKS = {
    "regression": ("bert", {"kind": "classification", "problem_type": "regression"}, {}),
    "multi_label": ("bert", {"kind": "classification"}, {"label_separator": "|"}),
    "tokens": ("bert", {"kind": "token_classification"}, {}),
    "questions": ("bert", {"kind": "question_answering", "stride": 4}, {"text_pair": "context"}),
    "pairs": ("bert", {"kind": "similarity"}, {"text_pair": "other"}),
    "liked": ("llama", {"kind": "preference", "loss": "dpo"}, {}),
    "marks": ("llama", {"kind": "preference", "loss": "kto"}, {}),
    "chat": ("llama", {"kind": "instruction", "packing": True}, {}),
}


@pytest.mark.parametrize("kind", TASKS)
def test_every_head_has_gradients_to_choose_by(kind, bert, llama, small_recipe, tmp_path):
    base, task, data = TASKS[kind]
    source = lines(tmp_path / "rows.jsonl", rows_of(kind))
    one = replace(
        small_recipe, model={"source": str({"bert": bert, "llama": llama}[base])}, task=task,
        data={"source": str(source), "cleaning": OFF, "max_length": 48, **data},
        method={"kind": "lora", "rank": 4, "layers": {"auto": FEW}}, evaluation={"baselines": []},
    )  # fmt: skip
    settled, (choice,) = chosen(one)
    assert settled.method.layers in (-1, -2)
    assert [one.size for one in choice.curve] == [0, 1, 2]
    assert all(abs(one.estimate) < 10 for one in choice.curve)


METHODS = {
    "oft": {"block_size": 4}, "vera": {"rank": 4}, "miss": {"rank": 4}, "adalora": {},
    "bottleneck": {"size": 4}, "boft": {"block_size": 4},
}  # fmt: skip


@pytest.mark.parametrize(
    "kind", [kind if kind in ("bottleneck", "oft") else pytest.param(kind, marks=pytest.mark.slow) for kind in METHODS]
)
def test_every_method_that_takes_layers_can_leave_them_to_the_run(kind, recipe):
    method = {"kind": kind, **METHODS[kind], "layers": {"auto": {**FEW, "tolerance": 0.2}}}
    settled, (choice,) = chosen(replace(recipe, method=method))
    assert settled.method.layers == choice.value
    assert any(one.estimate for one in choice.curve)  # gradients reach what the method trains
    loaded = build(settled, prepare(settled).info, load_tokenizer(settled.model), "cpu")
    blocks = find_blocks(unwrap(loaded.model))[1]
    adapted = [any(p.requires_grad for p in block.parameters()) for block in blocks]
    assert adapted == [number >= 4 + choice.value for number in range(4)]


def test_one_process_chooses_for_all(recipe, monkeypatch):
    choice = AutoLayers().decide("layers", np.eye(8), np.stack([np.eye(8)] * 4))
    monkeypatch.setattr(choosing, "_choose", refuse)
    other = SimpleNamespace(run_on_main=lambda work: choice)  # what another process receives
    assert choosing.choose(recipe, other, None, None)[0].method.layers == choice.value

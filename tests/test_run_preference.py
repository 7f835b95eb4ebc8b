"""Preferences from rows to answers: learned, resumed, evaluated, exported, planned and compared."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

import peftkit
from peftkit import Recipe
from peftkit.data.pipeline import encode, prepare
from peftkit.errors import Interrupted
from peftkit.experiments import scores
from peftkit.export import run_export
from peftkit.inference.evaluate import evaluate
from peftkit.models.tokenizer import load_tokenizer
from peftkit.planning import inspection
from peftkit.planning.devices import parse_device
from peftkit.planning.plan import make_plan
from peftkit.planning.workload import data_workload
from peftkit.reporting.inspection import example_html
from peftkit.schema.recipe import replace
from peftkit.training import reference
from tests import tiny

GOOD, BAD = ("good", "great", "happy", "fine"), ("bad", "awful", "terrible", "sad")
OFF = {"duplicates": "off", "near_duplicates": "off", "leakage": "off"}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        (folder / "reference").mkdir()
        patch.setattr(reference, "cache_folder", lambda kind: folder / kind)
        yield folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rows of pairs and of marks: one prefers kind words, in answers of many lengths."""
    draw, folders = random.Random(0), []
    for marks in (False, True):
        folder = tmp_path_factory.mktemp("rows")
        for split, count in (("train", 24), ("validation", 8), ("test", 8)):
            lines = []
            for number in range(count):
                prompt = f"{draw.choice(tiny.WORDS)} {draw.choice(tiny.WORDS)} {split} {number}"
                good, bad = (" ".join(draw.choices(words, k=draw.randint(1, 5))) for words in (GOOD, BAD))
                if marks:
                    liked = number % 2 == 0
                    lines.append({"prompt": prompt, "completion": good if liked else bad, "label": liked})
                else:
                    lines.append({"prompt": prompt, "chosen": good, "rejected": bad})
            (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
        folders.append(folder)
    return dict(zip(("pairs", "marks"), folders))


def recipe(base, rows, folder, loss="dpo", **changes):
    values = {
        "name": "liked", "model": {"source": str(base), "dtype": "float32"}, "method": {"kind": "lora", "rank": 4},
        "task": {"kind": "preference", "loss": loss},
        "data": {"source": str(rows["marks" if "kto" in str(loss) else "pairs"]), "max_length": 96, "cleaning": OFF},
        "training": {
            "epochs": 3, "batch_size": 8, "learning_rate": 0.02, "threads": 1, "save_every": 2, "log_every": 1,
        },
        "evaluation": {"generation": {"samples": 2, "max_new_tokens": 4}},
        "tracking": [], "output_dir": str(folder),
    }  # fmt: skip
    return replace(Recipe.parse(values), **changes)


@pytest.fixture(scope="module")
def run(base, rows, tmp_path_factory):
    return peftkit.train(recipe(base, rows, tmp_path_factory.mktemp("runs")), quiet=True)


@pytest.fixture(scope="module")
def marked(base, rows, tmp_path_factory):
    return peftkit.train(recipe(base, rows, tmp_path_factory.mktemp("runs"), "kto"), quiet=True)


def log_of(run):
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_what_is_preferred_and_logs_it(run):
    test = run.metrics["test"]
    assert test["reward_accuracy"] == 1.0
    assert test["reward_margin"] > 0.5
    assert test["kl_per_token"] > 0
    before = run.metrics["zero_shot"]
    assert before["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert before["chosen_change"] == pytest.approx(0, abs=1e-4)
    steps = [line for line in log_of(run) if "learning_rate" in line]
    assert steps[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert steps[-1]["reward_margin"] > steps[1]["reward_margin"]
    assert {"reward_accuracy", "chosen_reward", "rejected_reward", "chosen_logprob", "rejected_logprob"} <= {*steps[0]}
    stored = scores.read(run.path, "test")
    assert stored.stored.statistics(np.arange(8))["reward_margin"] == pytest.approx(test["reward_margin"], abs=1e-4)
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert "reward margin" in page


def test_kto_learns_from_marks(marked):
    test = marked.metrics["test"]
    assert test["reward_margin"] > 0.3
    assert test["kl"] >= 0
    steps = [line for line in log_of(marked) if "learning_rate" in line]
    assert steps[0]["loss"] == pytest.approx(0.5, abs=1e-5)
    assert all("kl" in line for line in steps)
    stored = scores.read(marked.path, "test").stored
    assert stored.statistics(np.arange(8))["reward_margin"] == pytest.approx(test["reward_margin"], abs=1e-4)


def test_the_reference_is_computed_once_for_all_runs(run, base, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "reference_outputs", lambda *_, **__: pytest.fail("computed again"))
    small = recipe(base, rows, tmp_path, {"kind": "dpo", "beta": 0.5}, training={"max_steps": 1, "seed": 3},
                   export={"prove": False}, evaluation={"baselines": []}, method={"rank": 2})  # fmt: skip
    assert peftkit.train(small, quiet=True, final=False).metrics["validation"]["loss"] > 0


def test_the_stored_reference_is_that_of_plain_transformers(run, base, rows, cache, tmp_path):
    own = recipe(base, rows, tmp_path)
    tokenizer = load_tokenizer(own.model)
    split = encode(prepare(own), tokenizer, own).splits["test"]
    model = AutoModelForCausalLM.from_pretrained(base)
    example = split.examples[3]
    wanted = []
    for part in (slice(0, example["chosen_tokens"]), slice(example["chosen_tokens"], None)):
        ids, labels = (np.array(example[name][part]) for name in ("input_ids", "labels"))
        logits = model(input_ids=split_tensor(ids)).logits[0, :-1].log_softmax(-1).detach().numpy()
        wanted += [logits[place, ids[place + 1]] for place in range(len(ids) - 1) if labels[place + 1] != -100]
    entries = [reference.read(path)["reference"] for path in (cache / "reference").iterdir() if path.is_dir()]
    found = [entry[3][~np.isnan(entry[3])] for entry in entries if len(entry) == 8]
    assert any(len(each) == len(wanted) and np.allclose(each, wanted, atol=1e-4) for each in found)


def split_tensor(ids):
    import torch

    return torch.from_numpy(ids)[None]


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_an_interrupted_run_ends_with_the_same_bytes(loss, run, marked, base, rows, cache, tmp_path):
    whole = run if loss == "dpo" else marked
    again = recipe(base, rows, tmp_path, loss)
    stops = iter([False, True])

    def stop_at_the_second(step, metrics):
        if next(stops, False):
            raise Interrupted("stopped", 15)

    with pytest.raises(Interrupted):
        peftkit.train(again, quiet=True, on_validation=stop_at_the_second)
    for entry in (cache / "reference").iterdir():  # computed again, from the model before the checkpoint is restored
        for file in entry.iterdir() if entry.is_dir() else ():
            file.unlink()
    resumed = peftkit.train(again, resume=True, quiet=True)
    name = "adapter/adapter_model.safetensors"
    assert (resumed.path / name).read_bytes() == (whole.path / name).read_bytes()
    assert resumed.metrics["test"] == whole.metrics["test"]
    losses = [[line["loss"] for line in log_of(one) if "learning_rate" in line] for one in (resumed, whole)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("loss", ["dpo", "orpo", "kto"])
def test_micro_batches_change_nothing(loss, run, marked, base, rows, tmp_path):
    found = []
    for micro in (8, 3):
        small = recipe(base, rows, tmp_path / str(micro), loss, export={"prove": False},
                       evaluation={"baselines": [], "generation": {"samples": 0}},
                       training={"max_steps": 3, "micro_batch": micro})  # fmt: skip
        found.append(
            [line for line in log_of(peftkit.train(small, quiet=True, final=False)) if "learning_rate" in line]
        )
    for one, other in zip(*found, strict=True):
        for name in ("loss", "grad_norm", "chosen_reward", "rejected_logprob"):
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_evaluate_gives_the_metrics_of_the_run_and_of_a_file(kind, run, marked, rows):
    done = run if kind == "dpo" else marked
    scored = evaluate(done.path)
    assert scored == pytest.approx(done.metrics["test"], rel=1e-3, abs=1e-4)
    file = rows["pairs" if kind == "dpo" else "marks"] / "test.jsonl"
    assert evaluate(done.path, file=file)["loss"] == pytest.approx(scored["loss"], abs=1e-6)


def test_a_merged_export_answers_as_the_run(run, tmp_path):
    run_export(run.path, tmp_path / "merged", merge=True)
    prompt = "hello you"
    answers = [peftkit.load(path).generate(prompt, max_new_tokens=5) for path in (run.path, tmp_path / "merged")]
    assert answers[0] == answers[1]
    assert json.loads((tmp_path / "merged" / "proof.json").read_text())["passed"]
    card = (run.path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "answers as preferred" in card
    assert "reward" in card


@pytest.mark.parametrize(
    "method",
    [pytest.param("full", marks=pytest.mark.slow), pytest.param("prompt_tuning", marks=pytest.mark.slow), "ln_tuning"],
)
def test_other_methods_train_and_evaluate_against_the_base(method, base, rows, tmp_path):
    """A method without an adapter to turn off is compared with what it was before its first step, or the base again."""
    small = recipe(base, rows, tmp_path, method={"kind": method}, training={"epochs": 1, "learning_rate": 0.003},
                   evaluation={"generation": {"samples": 0}})  # fmt: skip
    done = peftkit.train(small, quiet=True)
    assert done.metrics["zero_shot"]["kl_per_token"] == pytest.approx(0, abs=1e-6)
    assert done.metrics["test"]["kl_per_token"] > 0
    assert evaluate(done.path)["reward_margin"] == pytest.approx(done.metrics["test"]["reward_margin"], abs=1e-3)


def test_displacement_is_an_event_of_the_log(base, rows, tmp_path):
    harsh = recipe(base, rows, tmp_path, training={"epochs": 1, "learning_rate": 1.0},
                   export={"prove": False}, evaluation={"generation": {"samples": 0}})  # fmt: skip
    done = peftkit.train(harsh, quiet=True, final=False)
    (validated,) = [line for line in log_of(done) if line.get("split") == "validation"]
    fell = validated["chosen_change"] < -0.1 and validated["rejected_change"] < -0.1
    events = [line for line in log_of(done) if line.get("event") == "likelihood_displacement"]
    assert fell
    assert len(events) == 1


def test_inspect_shows_both_answers_and_what_is_scored(run, base, rows, tmp_path):
    shown = inspection.inspect(recipe(base, rows, tmp_path), examples=1).splits[0].shown
    assert [example.part for example in shown] == ["chosen", "rejected"]
    scored = ["".join(token.text for token in one.tokens if token.supervised) for one in shown]
    assert scored[0].split("<|im_end|>")[0].split()[0] in GOOD
    assert scored[1].split("<|im_end|>")[0].split()[0] in BAD
    assert "chosen" in example_html(shown[0])
    (only,) = inspection.inspect(recipe(base, rows, tmp_path, "kto"), examples=1).splits[0].shown
    assert only.part == "good"


def test_the_plan_counts_two_sequences_and_the_scored_tokens(run, base, rows, tmp_path):
    own = recipe(base, rows, tmp_path, data={"max_length": 64})
    encoded = encode(prepare(own), load_tokenizer(own.model), own)
    workload = data_workload(own, encoded, "cpu")
    train = encoded.splits["train"]
    assert sum(shape.scored for shape in workload.train) == sum(train.examples["scored"])
    assert workload.largest.tokens == train.lengths.max() > own.data.max_length
    plan = make_plan(own, parse_device("8GB"))  # another device, as measuring this one takes its time
    assert plan.peak.total > 0
    assert plan.flops_per_token == pytest.approx(run.metrics["training"]["flops_per_token"], rel=0.3)


def test_two_losses_are_compared_on_the_same_rows(run, base, rows, tmp_path):
    other = peftkit.train(recipe(base, rows, tmp_path, "ipo", name="other"), quiet=True)
    both = [scores.read(one.path, "test") for one in (run, other)]
    assert (both[0].stored.gold == both[1].stored.gold).all()
    assert scores.interval([both[0]], "reward_margin", 0.95)[0] > 0

"""What the comparisons stand on: processes timed, rows shared out, figures summed up and shown; no peer is run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def bench(monkeypatch, tmp_path):
    """benchmarks/ on the path, and its results elsewhere."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import harness
    import table

    for module in (harness, table):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")


def test_a_process_is_timed_and_its_children_s_memory_counted():
    import processes

    child = "import time; held = bytearray(200 * 2**20); held[::4096] = held[::4096]; time.sleep(0.6)"
    done = processes.run(
        [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"]
    )
    assert done.code == 0
    assert 0.6 < done.seconds < 60
    assert 0.19 < done.peak_rss_gb < 0.4


def test_a_process_is_ended_once_it_has_said_what_was_waited_for():
    import processes

    started = time.perf_counter()
    command = [sys.executable, "-uc", "import time; print('step 1/2'); time.sleep(120)"]
    done = processes.run(command, until=lambda said: "step 1/" in said)
    assert (done.code, done.output) == (0, "step 1/2\n")
    assert done.seconds < time.perf_counter() - started < 60


def test_a_process_that_never_says_it_is_told_apart_by_its_output():
    import processes

    done = processes.run([sys.executable, "-c", "raise SystemExit(3)"], until=lambda said: "step 1/" in said)
    assert done.code == 3


def runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_nothing_runs_on_when_a_measurement_is_ended(tmp_path):
    mark = tmp_path / "pid"
    child = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(120)"
    script = f"import processes, sys; processes.run([sys.executable, '-c', {child!r}])"
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=BENCHMARKS)
    deadline = time.monotonic() + 60
    while not (mark.is_file() and mark.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    parent.terminate()
    assert parent.wait(30) == 128 + signal.SIGTERM
    while runs(int(mark.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)  # a process that was killed is there until it is waited for
    assert not runs(int(mark.read_text()))


def test_contestants_take_turns_and_what_was_measured_stays():
    import harness

    seen: list[dict[str, int]] = []
    worker = "import json; print('noise'); print(json.dumps({'rows_per_second': %d, 'adapter': 'x'}))"
    contestants = {name: [sys.executable, "-c", worker % rate] for name, rate in (("peftkit", 8), ("other", 2))}
    figures = harness.run_in_turn(
        contestants, 2, keep=lambda found: seen.append({name: len(runs) for name, runs in found.items()})
    )
    assert seen == [
        {"peftkit": 1, "other": 0},
        {"peftkit": 1, "other": 1},
        {"peftkit": 2, "other": 1},
        {"peftkit": 2, "other": 2},
    ]
    assert figures["other"][0]["rows_per_second"] == 2
    assert figures["other"][0]["wall_seconds"] > 0
    assert "adapter" not in figures["other"][0]


def test_a_contestant_that_fails_is_named_with_its_errors():
    import harness

    with pytest.raises(SystemExit, match=r"(?s)broken failed \(1\).*no such thing"):
        harness.run_in_turn({"broken": [sys.executable, "-c", "raise ValueError('no such thing')"]}, 1)


def test_no_row_is_in_two_splits_and_all_see_the_same(tmp_path):
    import harness

    for name, count in (("train", 50), ("test", 40)):
        harness.write_rows(
            tmp_path / f"{name}.csv", [{"text": f"{name} {n}", "label": str(n % 2)} for n in range(count)]
        )
    laid = [harness.lay_out(tmp_path, tmp_path / folder, 20, validation=4) for folder in ("one", "two")]
    splits = {name: harness.table_rows(laid[0] / f"{name}.csv") for name in ("train", "validation", "test")}
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 20, "validation": 4, "test": 36}
    texts = [row["text"] for rows in splits.values() for row in rows]
    assert len(set(texts)) == len(texts)
    assert all((laid[0] / f"{name}.csv").read_bytes() == (laid[1] / f"{name}.csv").read_bytes() for name in splits)


def test_the_page_tells_how_many_times_as_fast():
    import harness
    import table

    figures = {
        "peftkit": [{"wall_seconds": 10.0}, {"wall_seconds": 14.0}, {"wall_seconds": 12.0}],
        "peftkit, second run": [{"wall_seconds": 3.0}],
        "peer": [{"wall_seconds": 48.0, "unknown": 1.0}],
    }
    harness.keep("made", "some work", figures, "wall_seconds")
    table.main()
    page = (harness.RESULTS / "README.md").read_text(encoding="utf-8")
    assert "| peftkit | 12 [10, 14] | – |" in page
    assert "| peer | 48 | 4.00 x as fast (second run 16.00 x) |" in page


def test_curves_are_compared_seed_by_seed_and_gone_on_with(monkeypatch):
    import batching_curves
    import harness
    import table

    monkeypatch.setattr(batching_curves, "RESULTS", harness.RESULTS)

    def run(losses):
        curve = [{"step": 12 * (place + 1), "loss": loss, "accuracy": 0.5} for place, loss in enumerate(losses)]
        return {"validation_loss": losses[-1], "padding_share": 0.01, "curve": curve}

    runs = {"by length": [run([1.0, 0.5]), run([1.4, 0.7])], "plain shuffling": [run([1.1, 0.4]), run([1.2, 0.8])]}
    batching_curves.write("made", "some work", runs, harness.machine())
    points = json.loads((harness.RESULTS / "made.json").read_text())["points"]
    assert [point["step"] for point in points] == [12, 24]
    assert points[0]["by length"] == {"mean": pytest.approx(1.2), "min": 1.0, "max": 1.4}
    assert points[1]["difference"] == {key: pytest.approx(at) for key, at in (("mean", 0), ("min", -0.1), ("max", 0.1))}
    assert batching_curves.measured_before("made") == runs
    table.main()
    page = (harness.RESULTS / "README.md").read_text(encoding="utf-8")
    assert "| 12 | 1.2000 [1.0000, 1.4000] | 1.1500 [1.1000, 1.2000] | +0.0500 [-0.1000, +0.2000] |" in page


def test_padding_is_counted_in_batches_and_in_the_passes_they_are_cut_into(bert, tmp_path):
    import batching_curves
    import harness

    for name, count in (("train", 64), ("validation", 8)):
        rows = [{"text": "a text " * (number % 16 + 1), "label": str(number % 2)} for number in range(count)]
        harness.write_rows(tmp_path / f"{name}.csv", rows)
    said = {}
    for batching in ("length", "random"):
        changes = [
            f"data.source={tmp_path}", "data.labels=null", f"model.source={bert}", "data.test_size=0",
            "data.cleaning.duplicates=off", f"training.batching={batching}",
        ]  # fmt: skip
        said[batching] = batching_curves.padding(changes)
    assert said["length"]["batch_padding_share"] < 0.2 < said["random"]["batch_padding_share"]
    assert said["length"]["padding_share"] <= said["length"]["batch_padding_share"]


def test_peers_share_their_rows_and_what_they_print(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS / "workers"))
    import numpy as np
    import peer

    lines = [
        {"instruction": "add", "input": "1 1", "output": "2"},
        {"instruction": "greet", "input": "", "output": "hi"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = peer.instruction_rows(str(tmp_path / "rows.jsonl"))
    assert [row["prompt"][0]["content"] for row in rows] == ["add\n\n1 1", "greet"]
    assert rows[1]["completion"] == [{"role": "assistant", "content": "hi"}]

    history = [{"loss": 2.0}, {"loss": 1.0}, {"train_loss": 9.0}]
    trainer = SimpleNamespace(train=lambda: time.sleep(0.02), state=SimpleNamespace(log_history=history))
    figures = peer.train_decoder(trainer, 100, lambda: (tmp_path / "saved").touch())
    assert (tmp_path / "saved").exists()
    assert figures["train_loss"] == 1.5
    assert figures["train_tokens_per_second"] == pytest.approx(100 / figures["train_seconds"])
    peer.report(**figures, adapter="here")
    said = json.loads(capsys.readouterr().out)
    assert said["adapter"] == "here"
    assert said["process_seconds"] > figures["train_seconds"] >= 0.02
    guesses = SimpleNamespace(predictions=np.eye(4), label_ids=np.array([0, 1, 2, 0]))
    assert peer.accuracy(guesses) == {"accuracy": 0.75}


def test_the_peer_of_token_classification_reads_the_sentences_that_peftkit_reads(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS / "workers"))
    import trainer_tokens

    from peftkit.data.problems import Problems
    from peftkit.data.readers.conll import ConllReader

    file = tmp_path / "train.conll"
    file.write_text("the\tO\nking\tB-PER\n\t\nday\tO\n\n\nof\tO\nAda\tB-PER", encoding="utf-8")
    ours = [(row["tokens"], row["tags"]) for row in ConllReader().rows(file, Problems())]
    assert trainer_tokens.read(file) == ours
    assert [words for words, _ in ours] == [["the", "king"], ["day"], ["of", "Ada"]]


@pytest.mark.parametrize(("power", "expected"), [(1, 1.0), (0, 0.0), (2, 2.0)])
def test_the_slope_of_a_power_is_its_exponent(power, expected):
    import growth

    points = [(x, 3.0 * x**power) for x in (1, 2, 4, 8)]
    assert growth.slope(points) == pytest.approx(expected)


def test_llama_factory_s_recipe_is_plain_yaml(tmp_path):
    import llamafactory
    import yaml

    path = llamafactory.write_recipe(tmp_path / "train.jsonl", "model", tmp_path / "lf", max_steps=1)
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert (recipe["learning_rate"], recipe["max_steps"], recipe["cutoff_len"]) == (2e-4, 1, 512)
    info = json.loads((tmp_path / "lf" / "dataset_info.json").read_text(encoding="utf-8"))
    assert info["rows"]["columns"]["response"] == "output"


def test_imports_are_counted_by_package_with_those_that_come_along():
    from start_profile import imports

    said = """import time: self [us] | cumulative | imported package
import time:    500000 |    2000000 |   torch.nn
some warning
import time:    250000 |     250000 |     sympy.core
import time:      1000 |       1000 | zipfile
import time:    300000 |     900000 | scipy.stats
"""
    assert imports(said) == {"torch": 0.75, "sklearn, scipy": 0.3, "others": 0.001}


def test_blocks_chosen_on_the_data_are_judged_by_their_tolerance_beyond_noise():
    import layers_auto
    import table
    from scipy.stats import ttest_1samp

    def figures(auto, everything, head):
        runs = {"auto": auto, "all blocks": everything, "head alone": head}
        return {
            name: [{"accuracy": value, "wall_seconds": 10.0 + len(name), "chosen_layers": 2, "choosing_seconds": 1.0}
                   for value in values]
            for name, values in runs.items()
        }  # fmt: skip

    everything, head = [0.90, 0.91, 0.90, 0.92], [0.80, 0.81, 0.80, 0.80]
    much_worse = figures([0.85, 0.86, 0.84, 0.87], everything, head)
    found = layers_auto.verdict(much_worse, "accuracy", 0.05)
    assert found["allowed"] == pytest.approx(-0.05 * (0.9075 - 0.8025))
    differences = [one["accuracy"] - other["accuracy"] for one, other in
                   zip(much_worse["auto"], much_worse["all blocks"])]  # fmt: skip
    expected = ttest_1samp(differences, 0).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))
    assert found["worse_beyond_noise"]
    assert not found["shown_not_worse"]
    same = layers_auto.verdict(figures(everything, everything, head), "accuracy", 0.05)
    assert (same["worse_beyond_noise"], same["shown_not_worse"]) == (False, True)
    assert same["faster"] == pytest.approx(20 / 14)
    lower = layers_auto.verdict(figures([1.2, 1.3], [1.0, 1.1], [2.0, 2.0]), "accuracy", 0.05)
    assert lower["difference"] > 0
    (one,) = [layers_auto.verdict(figures([0.9], [0.9], [0.8]), "accuracy", 0.05)]
    assert (one["low"], one["worse_beyond_noise"]) == (None, None)
    page = "\n".join(table.chosen_blocks("x", {
        "work": "w", "machine": {"processor": "p", "cores": 2, "python": "3", "versions": {}, "peers": {}, "date": "d"},
        "sets": {"agnews_lora on ag": {"metric": "accuracy", "verdict": found}},
    }))  # fmt: skip
    assert "| agnews_lora on ag: accuracy | 4 | 0.855 |" in page


@pytest.mark.parametrize("whole", [False, True])
def test_the_contestants_of_chosen_blocks_are_recipes(whole, tmp_path):
    import layers_auto

    from peftkit import get_recipe
    from peftkit.methods.auto_layers import AutoLayers, LayerOptions
    from peftkit.schema.overrides import apply

    args = SimpleNamespace(recipe="agnews_lora", whole=whole, epochs=2, change=["training.max_steps=3"], fixed=[2],
                           tolerance=0.1)  # fmt: skip
    recipes = {}
    for name, command in layers_auto.variants(args, tmp_path, tmp_path).items():
        recipes[name] = apply(get_recipe(command[2]), [one.replace("{turn}", "7") for one in command[3:-2]])
    assert recipes["auto"].method.layers == AutoLayers(auto=LayerOptions(tolerance=0.1))
    assert [recipes[name].method.layers for name in ("all blocks", "last 2")] == [None, -2]
    assert recipes["head alone"].method.kind == "frozen"
    assert {one.training.seed for one in recipes.values()} == {7}
    assert {one.training.max_steps for one in recipes.values()} == {3}


def test_a_target_is_reached_at_the_first_validation_that_is_no_lower():
    import table
    import time_to_quality

    def curve(*metrics):
        return {"curve": [{"seconds": 10.0 * number, "training_seconds": 7.0 * number, "metric": metric}
                          for number, metric in enumerate(metrics, 1)]}  # fmt: skip

    default, other = time_to_quality.peer(1e-3), time_to_quality.peer(3e-3)
    repeats = [
        {"peftkit": curve(0.7, 0.8, 0.9), default: curve(0.5, 0.8, 0.8), other: curve(0.5, 0.6, 0.9)},
        {"peftkit": curve(0.7, 0.8, 0.8), default: curve(0.5, 0.6, 0.7), other: curve(0.5, 0.6, 0.9)},
    ]
    found = time_to_quality.times(repeats, default)
    assert found["peftkit"]["seconds_to_default"] == {"median": 15.0, "repeats": [20.0, 10.0]}
    assert found["peftkit"]["training_seconds_to_best"] == {"median": None, "repeats": [21.0, None]}
    assert found[default]["seconds_to_default"]["repeats"] == [20.0, 30.0]
    page = "\n".join(table.times_to_targets("x", {
        "work": "w", "machine": {"processor": "p", "cores": 2, "python": "3", "versions": {}, "peers": {}, "date": "d"},
        "sets": {"ag": {"times": found}},
    }))  # fmt: skip
    assert "| peftkit | 15 [10, 20] | 10 [7, 14] | – (1 of 2) | – (1 of 2) |" in page


def test_the_contestants_of_time_to_quality_are_recipes(tmp_path):
    import time_to_quality

    from peftkit import get_recipe
    from peftkit.schema.overrides import apply

    args = SimpleNamespace(epochs=2, rates=[1e-3, 3e-3], tuned=True)
    found = time_to_quality.contestants(args, tmp_path, tmp_path, 5, 7)
    assert len(found) == 5
    own = {name: apply(get_recipe(command[4]), command[5:-2]) for name, command in found.items() if "peftkit" in name}
    assert {one.training.seed for one in own.values()} == {7}
    assert {one.training.evaluate_every for one in own.values()} == {5}
    assert [one.method.layers is None for one in own.values()] == [True, False]


def test_the_page_on_scale_has_the_tables_that_the_script_prints():
    import scale

    page = scale.PAGE.read_text(encoding="utf-8")
    assert scale.filled(page) == page
    assert all(f"<!-- table: {name} -->" in page for name in scale.TABLES)
    changed = page.replace("| 42 M |", "| 43 M |", 1)
    assert scale.filled(changed) == page != changed


@pytest.mark.slow
def test_scale_starts_from_what_the_planner_counts():
    import scale
    import scale_plans

    name, work = "Llama-3.1-8B", "LoRA, bf16"
    assert scale_plans.planned(name, work) == scale.read("scale_plans")["plans"][name][work]


def test_bytes_and_memory_of_several_gpus_follow_the_formulas():
    import scale

    model = scale.Model(10, 4, 12, 0, 16, 32, 5, 8, 100, 1)
    assert scale.ddp_sent(model, 4, 7) == 2 * 0.75 * 16
    assert scale.fsdp_sent(model, 4, 2) == 2 * 0.75 * (2 * 20 + 8) + 0.75 * 16
    assert scale.zero2_sent(model, 4, 7) == 0.75 * (8 + 8)
    assert scale.fsdp_memory(model, 4) == (28 + 16 + 32) / 4 + 8 + 2 * 5 + 100
    assert scale.ddp_memory(model, 1) == 28 + 32 + 100
    quantized = scale.Model(10, 4, 12, 3, 16, 32, 5, 8, 100, 1)
    assert scale.fsdp_memory(quantized, 4) == 12 + 3 + 100 + (16 + 32 + 16) / 4
    slow = scale.Step(1.0, 3.0)
    assert slow.efficiency == (0.25, pytest.approx(1 / 3))

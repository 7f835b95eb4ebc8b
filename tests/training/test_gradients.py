"""Trained parameters that get no gradient in the first steps are named; the others, and the training, are as ever."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from peftkit import replace, train
from peftkit.errors import TrainingError
from peftkit.training.gradients import FEWEST, STEPS, GradientWatch


class Half(torch.nn.Module):
    """A network with a layer that ``forward`` never calls, and one whose output is multiplied by zero."""

    def __init__(self):
        super().__init__()
        self.used, self.silenced, self.idle = (torch.nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        return self.used(x) + 0.0 * self.silenced(x)


def trained(steps, rate=0.01, watch=True, **options):
    """``Half`` under LoRA after plain SGD: weights before and after, the report, and which gradients there were."""
    torch.manual_seed(0)
    model = get_peft_model(Half(), LoraConfig(target_modules=["used", "silenced", "idle"]))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.SGD(parameters.values(), lr=rate)
    report, seen = None, []
    observer = GradientWatch(parameters, start=0, total=steps, **options) if watch else None
    for _ in range(steps):
        model(torch.randn(8, 4)).square().sum().backward()
        seen.append({name: None if p.grad is None else bool(p.grad.any()) for name, p in parameters.items()})
        report = (observer.observe() or report) if observer else None
        optimizer.step()
        optimizer.zero_grad()
    return before, {name: p.detach().clone() for name, p in parameters.items()}, report, seen


def test_what_stays_as_it_was_is_reported_and_nothing_else():
    before, after, report, seen = trained(STEPS)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {*report.unreached, *report.zero} == same
    assert set(report.unreached) == {name for name in before if all(step[name] is None for step in seen)}
    assert all(".idle." in name for name in report.unreached)
    assert all(".silenced." in name for name in report.zero)
    assert len(report.unreached) == len(report.zero) == 2


def test_a_first_gradient_of_zero_is_no_verdict():
    """While B is zero, A's gradient is zero too."""
    _, _, report, seen = trained(STEPS)
    name = next(name for name in seen[0] if "used.lora_A" in name)
    assert [step[name] for step in seen] == [False, *[True] * (STEPS - 1)]
    assert not any(".used." in name for name in (*report.unreached, *report.zero))


def test_the_message_groups_the_names():
    _, _, report, _ = trained(STEPS)
    assert f"4 trained parameters get no gradient in the first {STEPS} steps" in report.message
    assert "no forward pass reaches base_model.model.idle.lora_A.default.weight" in report.message
    assert "exactly zero of base_model.model.silenced.lora_A.default.weight" in report.message
    layers = {f"layer.{n}.bias": torch.nn.Parameter(torch.zeros(1)) for n in range(12)}
    watch = GradientWatch(layers, start=0, total=FEWEST)
    (message,) = [report.message for _ in range(FEWEST) if (report := watch.observe())]
    assert "layer.*.bias (12)" in message


def test_watching_changes_no_bit():
    _, watched, _, _ = trained(STEPS + 2)
    _, plain, _, _ = trained(STEPS + 2, watch=False)
    assert all(torch.equal(watched[name], plain[name]) for name in plain)


@pytest.mark.parametrize(
    ("start", "total", "step"),
    [(0, 100, STEPS), (0, FEWEST, FEWEST), (0, FEWEST - 1, None), (1, 100, STEPS), (STEPS - 1, 100, STEPS + 2),
     (STEPS, 100, None), (3, 4, None)],
)  # fmt: skip
def test_when_the_verdict_is_given(start, total, step):
    """After enough steps, once, and not again in a run that is resumed later."""
    watch = GradientWatch({"idle": torch.nn.Parameter(torch.zeros(1))}, start=start, total=total)
    given = [done for done in range(start + 1, total + 1) if watch.observe() is not None]
    assert given == ([] if step is None else [step])


def test_shards_are_counted_together():
    """A gradient that is zero in this process's shard is not zero in another's."""
    _, _, report, _ = trained(STEPS, combine=lambda counts: counts + 1)
    assert report is None
    _, _, report, _ = trained(STEPS, combine=lambda counts: 2 * counts)
    assert len(report.unreached) == len(report.zero) == 2


def test_several_processes_stop_at_a_parameter_without_a_gradient():
    """torch itself stops in the next step, with an error that gives numbers of parameters only."""
    with pytest.raises(TrainingError, match=r"reaches base_model\.model\.idle\.lora_A.*train in one process"):
        trained(STEPS, replicated=True)
    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.grad = torch.zeros(1)
    watch = GradientWatch({"zero": parameter}, start=0, total=STEPS, replicated=True)
    assert [watch.observe() is not None for _ in range(STEPS)] == [*[False] * (STEPS - 1), True]


def events(run):
    return [line for line in map(json.loads, (run.path / "metrics.jsonl").read_text().splitlines()) if "event" in line]


def test_a_run_reports_it_in_log_and_report(small_recipe, capsys):
    """No row has the token, so the gradient of its embedding is zero."""
    recipe = replace(
        small_recipe, method={"kind": "trainable_tokens", "tokens": ["[MASK]"]}, training={"max_steps": 6},
        model={"pooling": "own"},
    )  # fmt: skip
    run = train(recipe, quiet=True)
    (event,) = events(run)
    (name,) = event["parameters"]
    assert (event["step"], event["event"]) == (STEPS, "no_gradient")
    assert name.endswith("trainable_tokens_delta.default")
    assert name in event["message"]
    assert event["message"] in capsys.readouterr().err
    assert name in (run.path / "report.html").read_text()


def test_an_ordinary_run_reports_nothing(small_recipe):
    assert events(train(replace(small_recipe, training={"max_steps": 6, "micro_batch": 3}), quiet=True)) == []

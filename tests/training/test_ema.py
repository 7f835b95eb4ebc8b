"""Averaged weights: torch's own average of the same steps, validated and exported, continued by a resumed run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel

import peftkit
from peftkit import replace
from peftkit.errors import Interrupted
from peftkit.training.interruptions import StopRequest
from peftkit.training.weights import TrainedWeights

DECAY = 0.5


@pytest.fixture
def averaging(small_recipe):
    return replace(
        small_recipe, training={"epochs": 1, "weight_averaging": DECAY, "learning_rate": 1e-2},
        evaluation={"baselines": []},
    )  # fmt: skip


def keep(step):
    return min(DECAY, (1 + step) / (10 + step))


def test_the_mean_is_torchs_exponential_average(averaging):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    theirs = AveragedModel(model, avg_fn=lambda mean, value, step: keep(step) * mean + (1 - keep(step)) * value)
    theirs.update_parameters(model)  # the first only copies
    ours = TrainedWeights(SimpleNamespace(model=model), averaging, SimpleNamespace(sharded=False))
    for step in range(1, 12):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        theirs.update_parameters(model)
        ours.update_ema(step)
    for name, value in theirs.module.named_parameters():
        torch.testing.assert_close(ours.means[name], value)


def test_what_is_validated_and_exported_is_the_mean_and_training_goes_on_from_the_weights(averaging, monkeypatch):
    seen, real = [], TrainedWeights.update_ema

    def update_ema(self, step):
        seen.append({name: value.detach().clone() for name, value in self.named().items()})
        real(self, step)

    monkeypatch.setattr(TrainedWeights, "update_ema", update_ema)
    evaluated, start = [], TrainedWeights.__init__

    def noting(self, *arguments):
        start(self, *arguments)
        evaluated.append({name: value.detach().clone() for name, value in self.means.items()})

    monkeypatch.setattr(TrainedWeights, "__init__", noting)
    run = peftkit.train(averaging, quiet=True)
    means = evaluated[0]
    for step, weights in enumerate(seen, start=1):
        means = {name: torch.lerp(mean, weights[name], 1 - keep(step)) for name, mean in means.items()}
    exported = load_file(run.path / "adapter" / "adapter_model.safetensors")
    for name, mean in means.items():
        wanted = exported[name.replace(".default", "").replace(".modules_to_save", "")]
        torch.testing.assert_close(wanted, mean, rtol=0, atol=1e-7)
    plain = list(seen)
    seen.clear()
    peftkit.train(replace(averaging, training={"weight_averaging": None, "evaluate_every": 2}), quiet=True)
    for ours, theirs in zip(plain, seen, strict=True):  # validations on the mean left the steps as they were
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_resumed_run_continues_the_mean(averaging, monkeypatch):
    whole = peftkit.train(averaging, quiet=True)
    asked = iter([0] * 5 + [2])
    with monkeypatch.context() as patched:
        patched.setattr(StopRequest, "code", property(lambda self: next(asked, 2)))
        with pytest.raises(Interrupted) as stopped:
            peftkit.train(averaging, quiet=True)
    assert "after step" in str(stopped.value)
    resumed = peftkit.train(averaging, resume=True, quiet=True)
    saved = [(run.adapter / "adapter_model.safetensors").read_bytes() for run in (whole, resumed)]
    assert saved[0] == saved[1]

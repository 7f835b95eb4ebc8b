"""A classifier's head that starts as the rule of the nearest class mean, and not at random.

With x what enters the head, μ_c its mean over training rows of class c, and m the mean of the μ_c,

    logits_c = ((μ_c − m) · x − ‖μ_c‖² / 2) / τ

is a linear layer whose likeliest class is that of the nearest mean (prototypes: Snell et al. 2017, arXiv:1703.05175).
τ is the temperature at which those rows have the least cross-entropy, each scored by means that it was left out of.
What is trained then moves away from a rule that holds already, which counts where rows are few (a probe before
finetuning: Kumar et al. 2022, arXiv:2202.10054).

Shape suffixes: N rows, C classes, H width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkit.errors import RecipeError
from peftkit.models import classifier
from peftkit.parts import Batch, LoadedModel, TaskInfo

TEMPERATURES = 2.0 ** torch.arange(-8, 8.5, 0.5, dtype=torch.float64)
"""Tried, in units of the scores' own spread."""


def at_class_means(loaded: LoadedModel, batches: Sequence[Batch], info: TaskInfo) -> None:
    """Sets the head's weights from a few batches of training rows; a class without a row starts at the mean of all.

    Raises:
        RecipeError: the head does not end in a linear layer with a bias over one vector a row.
    """
    head = _head(loaded, len(info.labels))
    inputs_NH, labels_N = _inputs(head, loaded, batches)
    weight_CH, bias_C = nearest_mean(inputs_NH, labels_N, len(info.labels))
    with torch.no_grad():
        head.weight.copy_(weight_CH)
        head.bias.copy_(bias_C)


def nearest_mean(inputs_NH: Tensor, labels_N: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Weight [C, H] and bias [C] of the nearest class mean at its best temperature, in fp64."""
    inputs_NH = inputs_NH.double()
    member_NC = F.one_hot(labels_N, classes).double()
    count_C = member_NC.sum(0)
    present = count_C > 0
    means_CH = member_NC.T @ inputs_NH / count_C.clamp(min=1)[:, None]
    middle_H = means_CH[present].mean(0)
    means_CH[~present] = middle_H
    scores_NC = inputs_NH @ means_CH.T - (means_CH**2).sum(1) / 2
    left_out = count_C[labels_N] > 1
    others_NH = (means_CH[labels_N] * count_C[labels_N, None] - inputs_NH) / (count_C[labels_N, None] - 1).clamp(min=1)
    own_N = (inputs_NH * others_NH).sum(1) - (others_NH**2).sum(1) / 2
    scores_NC = scores_NC.scatter(1, labels_N[:, None], own_N[:, None])[left_out]
    temperature = _temperature(scores_NC, labels_N[left_out])
    return (means_CH - middle_H) / temperature, -(means_CH**2).sum(1) / (2 * temperature)


def _temperature(scores_NC: Tensor, labels_N: Tensor) -> float:
    """What the scores are best divided by; 1 where no row can be left out, or all score alike."""
    if not len(scores_NC) or not (spread := float(scores_NC.std(dim=1).mean())):
        return 1.0
    losses = torch.stack([F.cross_entropy(scores_NC / (spread * one), labels_N) for one in TEMPERATURES])
    return spread * float(TEMPERATURES[losses.argmin()])


def _head(loaded: LoadedModel, classes: int) -> nn.Linear:
    """The trained linear layer that gives the logits."""
    found = [
        module
        for name, module in loaded.model.named_modules()
        if isinstance(module, nn.Linear) and set(name.split(".")) & set(loaded.head_names)
        if module.weight.requires_grad and module.bias is not None and module.out_features == classes
    ]
    if not found:
        raise _unfit(loaded)
    return found[-1]


def _inputs(head: nn.Linear, loaded: LoadedModel, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """What enters the head, [N, H], and the labels [N]."""
    inputs: list[Tensor] = []
    labels: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, given: inputs.append(given[0].detach()))
    training = loaded.model.training
    loaded.model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                classifier.logits(loaded.model, batch, loaded.pooling)
                labels.append(batch["labels"])
    finally:
        handle.remove()
        loaded.model.train(training)
    if any(tensor.dim() != 2 for tensor in inputs):
        raise _unfit(loaded)
    return torch.cat(inputs), torch.cat(labels).long()


def _unfit(loaded: LoadedModel) -> RecipeError:
    kind = type(classifier.unwrap(loaded.model)).__name__
    return RecipeError(
        "task.head_start=class_means needs a head that ends in a linear layer with a bias over one vector a row, "
        f"which {kind} has not; use task.head_start=random, or model.pooling=mean for an encoder"
    )

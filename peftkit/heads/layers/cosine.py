"""A linear head that is trained as a cosine classifier: what learns from a few rows a class.

With x what enters the head, and w_c its weights for class c, the scores in training are

    logits_c = w_c · (ρ x / ‖x‖) + b_c    and, at the start, w_c = μ_c / (τ ρ ‖μ_c‖), b_c = 0: cos(x, μ_c) / τ

for μ_c the mean direction of the class's rows and ρ the usual ‖x‖ (normalized softmax: Wang et al. 2017,
arXiv:1704.06369; weights imprinted from class means: Qi et al. 2018, arXiv:1712.07136; prototypes: Snell et al. 2017,
arXiv:1703.05175). The rule of the nearest mean holds before the first step, and the backbone is drawn towards
directions, whatever the lengths. In evaluation, and wherever the model is exported to, the head is the plain linear
layer: as b_c stays small, its likeliest class is the same.

Shape suffixes: N rows, C classes, H width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkit.errors import RecipeError
from peftkit.models import pooled_logits
from peftkit.models.blocks import unwrap
from peftkit.schema.types import Batch, LoadedModel, TaskInfo, in_head


def start(loaded: LoadedModel, batches: Sequence[Batch], info: TaskInfo, temperature: float) -> None:
    """Sets the head's weights from a few batches of training rows, and has it see directions while it is trained.

    Raises:
        RecipeError: the head does not end in a linear layer with a bias over one vector a row.
    """
    head = _head(loaded, len(info.labels))
    inputs_NH, labels_N = _inputs(head, loaded, batches)
    length = float(inputs_NH.double().square().sum(1).mean().sqrt()) or 1.0
    with torch.no_grad():
        head.weight.copy_(class_directions(inputs_NH, labels_N, len(info.labels)) / (temperature * length))
        head.bias.zero_()

    def scale(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return (F.normalize(given[0].float(), dim=-1).mul(length).to(given[0].dtype),) if module.training else None

    head.register_forward_pre_hook(scale)


def class_directions(inputs_NH: Tensor, labels_N: Tensor, classes: int) -> Tensor:
    """Unit vectors [C, H] towards the mean direction of each class's rows, in fp64; 0 for a class without rows."""
    directions_NH = F.normalize(inputs_NH.double(), dim=-1)
    return F.normalize(F.one_hot(labels_N, classes).double().T @ directions_NH, dim=-1)


def _head(loaded: LoadedModel, classes: int) -> nn.Linear:
    """The trained linear layer that gives the logits."""
    layers = [
        module
        for name, module in loaded.model.named_modules()
        if isinstance(module, nn.Linear) and in_head(name, loaded.head_names)
        if module.weight.requires_grad and module.bias is not None and module.out_features == classes
    ]
    if not layers:
        raise _unfit(loaded)
    return layers[-1]


def _inputs(head: nn.Linear, loaded: LoadedModel, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """What enters the head, [N, H], and the labels [N]."""
    inputs: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, given: inputs.append(given[0].detach()))
    training = loaded.model.training
    loaded.model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                pooled_logits.logits(loaded.model, batch, loaded.pooling)
    finally:
        handle.remove()
        loaded.model.train(training)
    if any(tensor.dim() != 2 for tensor in inputs):
        raise _unfit(loaded)
    return torch.cat(inputs), torch.cat([batch["labels"] for batch in batches]).long()


def _unfit(loaded: LoadedModel) -> RecipeError:
    kind = type(unwrap(loaded.model)).__name__
    needs = "needs a head that ends in a linear layer with a bias over one vector a row"
    hint = "leave it out, or use model.pooling=mean for an encoder"
    return RecipeError(f"task.cosine_temperature {needs}, which {kind} has not; {hint}")

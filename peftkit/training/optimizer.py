"""Optimizer and schedule of a recipe, and their state as tensors and JSON."""

from __future__ import annotations

import math
from typing import Any

import torch

from peftkit.distributed import zero
from peftkit.distributed.sharding import shard_like, unshard
from peftkit.schema.method import Method
from peftkit.schema.recipe import Recipe, TrainingConfig
from peftkit.training import low_bit_optimizers


def parameter_groups(
    model: torch.nn.Module, weight_decay: float, method: Method | None = None, learning_rate: float | None = None
) -> list[dict[str, Any]]:
    """Trainable parameters in groups of one weight decay and one learning rate.

    Two groups for most methods: matrices, which decay, and vectors (biases, normalization), which do not. A method that
    lets some parameters learn faster (LoRA+) has more; those of the plain learning rate come first.
    """
    groups: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = method.learning_rate_factor(name) if method else 1.0
            decays = method.decays(name, parameter) if method else parameter.ndim >= 2
            groups.setdefault((factor, decays), []).append(parameter)
    order = sorted(groups, key=lambda key: (key[0] != 1.0, key[0], not key[1]))
    return [
        {"params": groups[factor, decays], "weight_decay": weight_decay if decays else 0.0}
        | ({} if factor == 1.0 or learning_rate is None else {"lr": factor * learning_rate})
        for factor, decays in order
    ]


def build_optimizer(model: torch.nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer over the trainable parameters."""
    training = recipe.training
    rate = recipe.learning_rate
    groups = parameter_groups(model, training.weight_decay, recipe.method, rate)
    if training.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=rate, betas=training.betas, eps=training.eps, fused=True)
    if training.optimizer in low_bit_optimizers.CLASSES:
        return low_bit_optimizers.build(training.optimizer, groups, lr=rate, betas=training.betas, eps=training.eps)
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=0.9)
    return torch.optim.Adafactor(groups, lr=rate)


def warmup_steps(training: TrainingConfig, total: int) -> int:
    """``training.warmup`` in steps: a share of the total when below 1, else a count."""
    return math.ceil(total * training.warmup) if training.warmup < 1 else int(training.warmup)


def build_scheduler(optimizer: torch.optim.Optimizer, training: TrainingConfig, total: int) -> Any:
    """transformers' schedule of that name; stepped once an optimizer step, and never given to Accelerate."""
    from transformers import get_scheduler

    return get_scheduler(
        training.scheduler, optimizer, num_warmup_steps=warmup_steps(training, total), num_training_steps=total
    )


def optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Optimizer state as ``PARAMETER/KEY`` → tensor; every value that torch's optimizers keep is one.

    A collective where parameters are sharded.
    """
    if any(zero.is_partitioned(parameter) for parameter in model.parameters()):
        return zero.optimizer_tensors(model, optimizer)
    names: dict[Any, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": unshard(torch.as_tensor(value))
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if key not in low_bit_optimizers.CONSTANT
    }


def load_optimizer_tensors(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]
) -> None:
    """Puts back what ``optimizer_tensors`` gave, beside the parameters it belongs to."""
    if any(zero.is_partitioned(parameter) for parameter in model.parameters()):
        zero.load_optimizer_tensors(model, optimizer, tensors)
        return
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    if low_bit_optimizers.is_low_bit(optimizer):
        for parameter, state in _by_parameter(tensors).items():
            low_bit_optimizers.restore(optimizer, parameters[parameter], state)
        return
    for name, tensor in tensors.items():
        parameter, _, key = name.rpartition("/")
        owner = parameters[parameter]
        # AdamW keeps its step count on the CPU unless fused on a GPU; moments live with the parameter
        device = owner.device if tensor.ndim else ("cpu" if owner.device.type == "cpu" else owner.device)
        optimizer.state[owner][key] = shard_like(tensor.to(device), owner)


def _by_parameter(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        parameter, _, key = name.rpartition("/")
        found.setdefault(parameter, {})[key] = tensor
    return found

"""The optimizer and scheduler of a recipe, and the optimizer's state as tensors."""

from __future__ import annotations

import math
from typing import Any

import torch

from peftkit.distributed import zero
from peftkit.distributed.session import Session
from peftkit.distributed.sharding import shard_like, unshard
from peftkit.models import offload
from peftkit.models.kernels import compile
from peftkit.schema.method import Method
from peftkit.schema.recipe import Recipe, TrainingConfig
from peftkit.training import low_bit_optimizers


def check_device_support(recipe: Recipe, session: Session) -> None:
    """Raises RecipeError if optimizer, compiler or offloading do not work on this device or with sharded parameters."""
    training, device = recipe.training, session.device.type
    offload.check(recipe.model, device, sharded=session.sharded)
    low_bit_optimizers.check(training.optimizer, device, sharded=session.sharded)
    if training.compile:
        compile.check(device, training.gradient_checkpointing, sharded=session.sharded)
        session.notes.append("blocks are compiled (torch.compile): the first step of each phase takes a while longer")


def parameter_groups(
    model: torch.nn.Module, weight_decay: float, method: Method | None = None, learning_rate: float | None = None
) -> list[dict[str, Any]]:
    """Trainable parameters in groups by weight decay and learning rate.

    Most methods have two groups: matrices, which decay, and vectors (biases, normalization), which do not. A method in
    which some parameters learn faster (LoRA+) has more; groups with the recipe's own learning rate come first.
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
    training, rate = recipe.training, recipe.learning_rate
    groups = parameter_groups(model, training.weight_decay, recipe.method, rate)
    if training.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=rate, betas=training.betas, eps=training.eps, fused=True)
    if training.optimizer in low_bit_optimizers.CLASSES:
        return low_bit_optimizers.build(training.optimizer, groups, lr=rate, betas=training.betas, eps=training.eps)
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=0.9)
    return torch.optim.Adafactor(groups, lr=rate)


def build_scheduler(optimizer: torch.optim.Optimizer, training: TrainingConfig, total: int) -> Any:
    """transformers' scheduler of that name; to be stepped once per optimizer step."""
    from transformers import get_scheduler

    # a share of the steps, or their number
    warmup = math.ceil(total * training.warmup) if training.warmup < 1 else int(training.warmup)
    return get_scheduler(training.scheduler, optimizer, num_warmup_steps=warmup, num_training_steps=total)


def optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state by ``PARAMETER/KEY``; a collective if parameters are sharded."""
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
    """Restore the result of ``optimizer_tensors``, on the devices of the parameters."""
    if any(zero.is_partitioned(parameter) for parameter in model.parameters()):
        zero.load_optimizer_tensors(model, optimizer, tensors)
        return
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    states: dict[torch.nn.Parameter, dict[str, torch.Tensor]] = {}
    for path, tensor in tensors.items():
        name, _, key = path.rpartition("/")
        states.setdefault(parameters[name], {})[key] = tensor
    for parameter, state in states.items():
        if hasattr(optimizer, "fill_qmap"):  # bitsandbytes' own
            low_bit_optimizers.restore(optimizer, parameter, state)
        else:
            placed = {key: shard_like(tensor.to(parameter.device), parameter) for key, tensor in state.items()}
            optimizer.state[parameter] = placed

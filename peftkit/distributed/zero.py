"""DeepSpeed's ZeRO, stages 2 and 3 (Rajbhandari et al. 2020, arXiv:1910.02054), through Accelerate's plugin.

DeepSpeed's engine clips gradients and makes the optimizer step inside the last backward pass. Each process keeps a
partition of the optimizer's state and of the fp32 weights, and in stage 3 also of the weights that forward passes use.
Checkpoints are ours: unsharded tensors under the parameters' own names, readable without DeepSpeed, from which a run
resumes exactly. Written for DeepSpeed 0.19.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch

from peftkit.errors import RecipeError
from peftkit.models.quantization import checkpoint
from peftkit.schema.method import Method
from peftkit.schema.recipe import Recipe

STAGES, OFFLOAD = (2, 3), ("offload_optimizer", "offload_param")
ELEMENTWISE = ("adamw", "sgd")
"""Optimizers that work on parameters flattened into one vector."""
ALTERNATIVES = "use configs/accelerate/fsdp2.yaml, which shards the same tensors, or plain data parallelism"


def is_requested() -> bool:
    """Whether Accelerate's launcher was configured for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def check_installed() -> None:
    """Raises RecipeError if DeepSpeed is requested but not installed."""
    if is_requested() and find_spec("deepspeed") is None:
        raise RecipeError(
            f"accelerate is configured for DeepSpeed, which is not installed: pip install 'deepspeed>=0.19', or "
            f"{ALTERNATIVES}"
        )


def check(accelerator: Any, recipe: Recipe) -> None:
    """Raises RecipeError for what ZeRO cannot train with, before any work is done."""
    plugin = accelerator.deepspeed_plugin
    training, config = recipe.training, plugin.deepspeed_config["zero_optimization"]
    offload = [name for name in OFFLOAD if ((config.get(name) or {}).get("device") or "none") != "none"]
    elementwise = training.optimizer in ELEMENTWISE
    quantized = recipe.quantization is not None or checkpoint.kind_of(recipe.model) is not None
    changes_weights = type(recipe.method).on_step_end is not Method.on_step_end
    early = bool(plugin.zero3_init_flag)
    unsupported = {
        f"ZeRO stage {plugin.zero_stage}; use stage 2 or 3": plugin.zero_stage not in STAGES,
        "zero3_init_flag, which partitions weights before the method is applied; set it to false": early,
        f"{' and '.join(offload)}, which brings its own optimizer": bool(offload),
        f"training.optimizer={training.optimizer}; use {' or '.join(ELEMENTWISE)}": not elementwise,
        "a quantized base; use configs/accelerate/fsdp2_qlora.yaml": quantized,
        f"method.kind={recipe.method.kind}, which changes weights after a step": changes_weights,
        "training.nonfinite=skip: the step is made before its loss is known": training.nonfinite == "skip",
        "training.weight_averaging": bool(training.weight_averaging),
        "training.micro_batch=auto": training.micro_batch == "auto",
    }
    for feature, present in unsupported.items():
        if present:
            raise RecipeError(f"DeepSpeed does not work with {feature}; or {ALTERNATIVES}")


def configure(accelerator: Any, recipe: Recipe, module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Gives DeepSpeed the recipe's precision and clipping, and registers weights with the modules that use them.

    In stage 3 a module's own weights are gathered when it is called. Adapter layers use the weights of submodules that
    they do not call, and tasks use those outside of the blocks (embeddings, head): such weights are registered with
    the module that uses them.
    """
    plugin = accelerator.deepspeed_plugin
    plugin.deepspeed_config |= {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed only counts samples with these
        "gradient_accumulation_steps": 1,
        "gradient_clipping": recipe.training.max_grad_norm or 0.0,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": False},
    }
    if plugin.zero_stage != 3:
        return
    from deepspeed.runtime.zero import register_external_parameter

    names = set(getattr(module, "_no_split_modules", ()))
    blocks = [submodule for submodule in module.modules() if type(submodule).__name__ in names]
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    adapted = [layer for block in blocks for layer in block.modules() if hasattr(layer, "base_layer")]
    users = [(layer, parameter) for layer in adapted for parameter in layer.parameters()]
    users += [(module, parameter) for parameter in module.parameters() if id(parameter) not in inside]
    for user, parameter in users:
        register_external_parameter(user, parameter)


def is_partitioned(parameter: Any) -> bool:
    """Whether ZeRO partitions the parameter's fp32 weights."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def full_shape(parameter: Any) -> tuple[int, ...]:
    """A parameter's shape; in stage 3 its own tensor is empty between forward passes."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def unshard(parameter: Any) -> torch.Tensor:
    """A trained parameter's full fp32 weights; a collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter).detach().clone()  # type: ignore[no-any-return]


@torch.no_grad()
def load_parameter(parameter: Any, tensor: torch.Tensor) -> None:
    """Copies full weights into a trained parameter: its fp32 weights and those of forward passes. A collective."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if not hasattr(parameter, "ds_id"):
        parameter.data.copy_(tensor)
        safe_set_full_fp32_param(parameter, tensor.to(parameter.device, torch.float32))
        return
    with GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(tensor)
    safe_set_local_fp32_param(parameter, _partition(parameter, tensor))


def optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as ``PARAMETER/KEY`` → full tensor; empty before the first step. A collective."""
    from deepspeed.utils import safe_get_full_optimizer_state

    _link_state(model, optimizer)
    states = list(optimizer.state.values())
    keys = list(states[0]) if states else []
    tensors = {}
    for name, parameter in model.named_parameters():
        for key in keys if parameter.requires_grad else ():
            value = states[0][key]
            scalar = value.ndim == 0  # the step count is the same for all
            tensors[f"{name}/{key}"] = (value if scalar else safe_get_full_optimizer_state(parameter, key)).clone()
    return tensors


@torch.no_grad()
def load_optimizer_tensors(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Loads what ``optimizer_tensors`` returned; each process takes its partition."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    parameters: dict[str, Any] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    values = {name.rpartition("/")[2]: tensor for name, tensor in tensors.items()}
    optimizer.state.clear()
    if not values:
        return
    # the flat vectors that the optimizer updates in place of parameters
    owner = next((parameter._z3_optimizer for parameter in parameters.values() if hasattr(parameter, "ds_id")), None)
    vectors = [vector for group in optimizer.param_groups for vector in group["params"]]
    for vector in owner.fp32_partitioned_groups_flat if owner is not None else vectors:
        optimizer.state[vector] = {
            key: torch.zeros_like(vector) if value.ndim else value.clone() for key, value in values.items()
        }
    _link_state(model, optimizer)
    for name, parameter in parameters.items():
        for key in (key for key, value in values.items() if value.ndim):
            tensor = tensors[f"{name}/{key}"]
            if hasattr(parameter, "ds_id"):
                safe_set_local_optimizer_state(parameter, _partition(parameter, tensor), key)
            else:
                safe_set_full_optimizer_state(parameter, tensor.to(parameter.device), key)


def _link_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Links stage 2's parameters to their state in the flat vectors; DeepSpeed does so for the first group only."""
    for parameter in model.parameters():
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is not None:
            vector = optimizer.param_groups[mapping.param_group_index]["params"][0]
            if vector in optimizer.state:
                mapping.set_optim_state_fragment(vector, optimizer.state[vector])


def _partition(parameter: Any, tensor: torch.Tensor) -> torch.Tensor:
    """This process's partition of a full tensor in stage 3, padded with zeros where it does not divide evenly."""
    size, flat = parameter.ds_tensor.numel(), tensor.to(parameter.ds_tensor.device, torch.float32).flatten()
    padded = torch.nn.functional.pad(flat, (0, size * torch.distributed.get_world_size() - flat.numel()))
    return padded.narrow(0, size * torch.distributed.get_rank(), size)

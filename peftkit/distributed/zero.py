"""DeepSpeed's ZeRO, stages 2 and 3 (Rajbhandari et al. 2020, arXiv:1910.02054), through Accelerate's plugin.

    accelerate launch --config_file configs/accelerate/zero3.yaml --num_processes 4 recipes/instruct_alpaca_lora.py

DeepSpeed's engine makes the optimizer's step inside the last backward pass, and clips there. Each process then keeps a
share of the optimizer's state and of the fp32 weights, and in stage 3 also of the weights that passes use. What a
checkpoint holds is made whole from them, under the parameters' own names, so that ours are the only checkpoints, are
read without DeepSpeed, and go on exactly. Written for DeepSpeed 0.19.
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

STAGES = (2, 3)
ELEMENTWISE = ("adamw", "sgd")
"""Optimizers that may be given parameters as pieces of one long vector."""
OTHERS = "use configs/accelerate/fsdp2.yaml, which shards the same things, or plain data parallelism"


def asked_for() -> bool:
    """Whether Accelerate's launcher was configured for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def check_installed() -> None:
    """Raises RecipeError where DeepSpeed was asked for and is not there."""
    if asked_for() and find_spec("deepspeed") is None:
        raise RecipeError(
            "accelerate is configured for DeepSpeed, which is not installed: pip install 'deepspeed>=0.19', or "
            + OTHERS.removeprefix("use ")
        )


def check(accelerator: Any, recipe: Recipe) -> None:
    """Raises RecipeError for what ZeRO cannot train with, before any work is done."""
    plugin = accelerator.deepspeed_plugin
    training, config = recipe.training, plugin.deepspeed_config["zero_optimization"]
    offload = [name for name in ("offload_optimizer", "offload_param") if _device(config.get(name)) != "none"]
    method = type(recipe.method)
    wrong = {
        f"ZeRO stage {plugin.zero_stage}, and only 2 and 3 are supported": plugin.zero_stage not in STAGES,
        "zero3_init_flag, which tears weights apart before a method sees them; set it to false": plugin.zero3_init_flag,
        f"{' and '.join(offload)}, which brings its own optimizer": bool(offload),
        f"training.optimizer={training.optimizer}; use {' or '.join(ELEMENTWISE)}": (
            training.optimizer not in ELEMENTWISE
        ),
        "a quantized base; use configs/accelerate/fsdp2_qlora.yaml": (
            recipe.quantization is not None or checkpoint.kind_of(recipe.model) is not None
        ),
        f"method.kind={recipe.method.kind}, which changes weights after a step": (
            method.after_step is not Method.after_step
        ),
        "training.nonfinite=skip: the step is made before its numbers are known": training.nonfinite == "skip",
        "training.weight_averaging": bool(training.weight_averaging),
        "training.micro_batch=auto": training.micro_batch == "auto",
    }
    found = [said for said, applies in wrong.items() if applies]
    if found:
        raise RecipeError(f"DeepSpeed cannot be used with {found[0]}; or {OTHERS}")


def load_whole() -> None:
    """Keeps transformers from loading weights in pieces, which stage 3 makes it do, flag or not.

    Methods look at whole weights, and the main process loads first, by itself; DeepSpeed cuts them afterwards.
    """
    from transformers.integrations import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def configure(accelerator: Any, recipe: Recipe, module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Tells DeepSpeed what the recipe says: precision and clipping; and which weights are used by whom.

    In stage 3 a module's own weights are gathered when it is called. Adapter layers use those of modules within them
    without a call, and tasks those outside of the blocks (embeddings, head): such weights are registered with the
    module that uses them.
    """
    plugin = accelerator.deepspeed_plugin
    plugin.deepspeed_config |= {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed counts samples with these, nothing more
        "gradient_accumulation_steps": 1,
        "gradient_clipping": recipe.training.max_grad_norm or 0.0,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": False},
    }
    if plugin.zero_stage != 3:
        return
    from deepspeed.runtime.zero import register_external_parameter

    names = set(getattr(module, "_no_split_modules", ()))
    blocks = [part for part in module.modules() if type(part).__name__ in names]
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    adapted = [part for block in blocks for part in block.modules() if hasattr(part, "base_layer")]
    used = [(part, parameter) for part in adapted for parameter in part.parameters()]
    used += [(module, parameter) for parameter in module.parameters() if id(parameter) not in inside]
    for part, parameter in used:
        register_external_parameter(part, parameter)


def holds(parameter: Any) -> bool:
    """Whether ZeRO keeps the parameter's fp32 weights, in pieces."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def shape(parameter: Any) -> tuple[int, ...]:
    """A parameter's own shape, of whose tensor stage 3 leaves nothing between passes."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def whole(parameter: Any) -> torch.Tensor:
    """A trained parameter's fp32 weights; a collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter).detach().clone()  # type: ignore[no-any-return]


@torch.no_grad()
def put(parameter: Any, tensor: torch.Tensor) -> None:
    """Puts whole weights into a trained parameter, both those that passes use and the fp32 ones; a collective."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if not hasattr(parameter, "ds_id"):
        parameter.data.copy_(tensor)
        safe_set_full_fp32_param(parameter, tensor.to(parameter.device, torch.float32))
        return
    with GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(tensor)
    safe_set_local_fp32_param(parameter, _piece(parameter, tensor))


def optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as ``PARAMETER/KEY`` → whole tensor; empty before the first step. A collective."""
    from deepspeed.utils import safe_get_full_optimizer_state

    _link(model, optimizer)
    states = list(optimizer.state.values())
    keys = list(states[0]) if states else []
    found = {}
    for name, parameter in model.named_parameters():
        for key in keys if parameter.requires_grad else ():
            value = states[0][key]
            one = value.ndim == 0  # a step's number is the same for all
            found[f"{name}/{key}"] = value.clone() if one else safe_get_full_optimizer_state(parameter, key).clone()
    return found


@torch.no_grad()
def load_optimizer_tensors(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Puts back what ``optimizer_tensors`` gave, each process its share."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    parameters = {name: held for name, held in model.named_parameters() if held.requires_grad}
    keys = {name.rpartition("/")[2]: tensor for name, tensor in tensors.items()}
    optimizer.state.clear()
    if not keys:
        return
    for flat in _flats(parameters, optimizer):
        optimizer.state[flat] = {
            key: torch.zeros_like(flat) if value.ndim else value.clone() for key, value in keys.items()
        }
    _link(model, optimizer)
    for name, parameter in parameters.items():
        for key, value in keys.items():
            if value.ndim == 0:
                continue
            tensor = tensors[f"{name}/{key}"]
            if hasattr(parameter, "ds_id"):
                safe_set_local_optimizer_state(parameter, _piece(parameter, tensor), key)
            else:
                safe_set_full_optimizer_state(parameter, tensor.to(parameter.device), key)


def _link(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Tells stage 2's parameters where in the long vectors their state lies: DeepSpeed does so for the first group."""
    for parameter in model.parameters():
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is not None:
            flat = optimizer.param_groups[mapping.param_group_index]["params"][0]
            if flat in optimizer.state:
                mapping.set_optim_state_fragment(flat, optimizer.state[flat])


def _flats(parameters: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The long vectors that the optimizer is given in place of parameters."""
    owner = next((held._z3_optimizer for held in parameters.values() if hasattr(held, "ds_id")), None)
    if owner is not None:
        return list(owner.fp32_partitioned_groups_flat)
    return [flat for group in optimizer.param_groups for flat in group["params"]]


def _piece(parameter: Any, tensor: torch.Tensor) -> torch.Tensor:
    """This process's share of a whole tensor in stage 3, filled up with zeros where they do not divide."""
    size, flat = parameter.ds_tensor.numel(), tensor.to(parameter.ds_tensor.device, torch.float32).flatten()
    padded = torch.nn.functional.pad(flat, (0, size * torch.distributed.get_world_size() - flat.numel()))
    return padded.narrow(0, size * torch.distributed.get_rank(), size)


def _device(offload: Any) -> str:
    return str((offload or {}).get("device") or "none")

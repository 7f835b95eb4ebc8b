"""The weight differences of a trained model as the LoRA of least error: each ΔW cut to its largest singular values.

The truncated singular value decomposition is the closest matrix of a rank in Frobenius norm (Eckart & Young 1936).
Small matrices are decomposed exactly, large ones by randomized subspace iteration (Halko et al. 2011, arXiv:0909.4061).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.errors import MethodError
from peftkit.schema.types import in_head

EXACT = 1024
"""Largest smaller dimension that is decomposed exactly."""
POWER_ITERATIONS = 4
LARGEST_RANK = 256
"""Largest rank that is chosen automatically; servers of LoRA seldom take more."""
SEED = 0


@dataclass(frozen=True)
class Factors:
    """Singular vectors of one ΔW ≈ U diag(s) Vᵀ, as many as may be used."""

    u: Tensor
    s: Tensor
    v: Tensor
    norm: float
    """Frobenius norm of ΔW."""

    def lora(self, rank: int) -> tuple[Tensor, Tensor]:
        """(A [rank, in], B [out, rank]) with B A closest to ΔW; the singular values are shared evenly."""
        root = self.s[:rank].sqrt()
        a, b = (self.v[:, :rank] * root).T, self.u[:, :rank] * root
        return a.float().contiguous(), b.float().contiguous()

    def squared_error(self, rank: int) -> float:
        """Squared norm of what a rank leaves out."""
        return max(self.norm**2 - float(self.s[:rank].double().square().sum()), 0.0)


def factorize(delta: Tensor, most: int) -> Factors:
    """The largest singular values of a matrix [out, in], at most ``most`` of them where it is large."""
    norm = float(delta.double().norm())
    if min(delta.shape) <= EXACT:
        u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
        return Factors(u, s, vh.T, norm)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        u, s, v = torch.svd_lowrank(delta.float(), q=min(most + 8, *delta.shape), niter=POWER_ITERATIONS)
    return Factors(u, s, v, norm)


def relative_error(factors: Mapping[str, Factors], rank: int) -> float:
    """‖ΔW − B A‖ / ‖ΔW‖ over all layers together."""
    total = sum(one.norm**2 for one in factors.values())
    return math.sqrt(sum(one.squared_error(rank) for one in factors.values()) / total) if total else 0.0


def choose_rank(factors: Mapping[str, Factors], max_error: float) -> int:
    """The smallest rank whose relative error is at most ``max_error``, or the largest that is considered."""
    most = min(LARGEST_RANK, max(len(one.s) for one in factors.values()))
    return next((rank for rank in range(1, most) if relative_error(factors, rank) <= max_error), most)


def linear_layers(model: Any) -> Iterator[tuple[str, nn.Module, bool]]:
    """(name, layer, whether its weight is [in, out]) of linear layers, the output layer excluded."""
    from transformers.pytorch_utils import Conv1D

    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, module in model.named_modules():
        if module is not output and isinstance(module, (nn.Linear, Conv1D)):
            yield name, module, isinstance(module, Conv1D)


@torch.no_grad()
def differences(base: nn.Module, trained: nn.Module, heads: tuple[str, ...]) -> tuple[dict[str, Tensor], list[str]]:
    """ΔW [out, in] of each linear layer that training changed, and the other parameters that it changed.

    Args:
        heads: modules that a LoRA saves in full, which are left aside.

    Raises:
        MethodError: no linear layer was changed, so there is nothing for a LoRA to hold.
    """
    before = dict(base.named_parameters())
    transposed = {f"{name}.weight": flipped for name, _, flipped in linear_layers(trained)}
    deltas, others = {}, []
    for name, parameter in trained.named_parameters():
        if in_head(name, heads) or torch.equal(parameter, before[name]):
            continue
        if name in transposed:
            delta = parameter - before[name]
            deltas[name.removesuffix(".weight")] = delta.T if transposed[name] else delta
        else:
            others.append(name)
    if not deltas:
        changed = f"only {others[0]} and {len(others) - 1} others" if others else "no weights"
        raise MethodError(f"a LoRA holds changes of linear layers, and this training changed {changed}")
    return deltas, others


@torch.no_grad()
def copy_heads(base: nn.Module, trained: nn.Module, heads: tuple[str, ...]) -> None:
    """Gives the base the trained heads, which a LoRA saves in full."""
    weights = dict(trained.named_parameters())
    for name, parameter in base.named_parameters():
        if in_head(name, heads):
            parameter.copy_(weights[name])


def attach(loaded: Any, deltas: Mapping[str, Factors], rank: int) -> None:
    """Puts a peft LoRA with the factors of each layer on the base of ``loaded``."""
    from peft import LoraConfig, get_peft_model

    from peftkit.methods.peft_method import task_type
    from peftkit.methods.targets import fan_in_fan_out

    ranks = {name: min(rank, len(one.s)) for name, one in deltas.items()}
    smaller = {name: value for name, value in ranks.items() if value != rank}
    config = LoraConfig(
        task_type=task_type(loaded), r=rank, lora_alpha=rank, target_modules=sorted(deltas), rank_pattern=smaller,
        alpha_pattern=dict(smaller), modules_to_save=list(loaded.head_names) or None,
        fan_in_fan_out=fan_in_fan_out(loaded.model, sorted(deltas)), base_model_name_or_path=loaded.model.name_or_path,
    )  # fmt: skip
    loaded.model = get_peft_model(loaded.model, config)
    layers = {name.removeprefix("base_model.model."): module for name, module in loaded.model.named_modules()}
    with torch.no_grad():
        for name, factors in deltas.items():
            a, b = factors.lora(ranks[name])
            layers[name].lora_A["default"].weight.copy_(a)
            layers[name].lora_B["default"].weight.copy_(b)

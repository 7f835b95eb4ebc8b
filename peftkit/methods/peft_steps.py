"""What some options of peft need between steps, which peft itself calls only from callbacks of transformers' Trainer.

* Losses of the adapter's own: a tuner offers each as ``_get_NAME_loss()`` (KaSA, arXiv:2412.06071; MonteCLoRA,
  arXiv:2411.04358), to be added to the training loss.
* AdaMSS's adaptive subspace allocation (``use_asa``): ``update_and_allocate`` after every step freezes the least
  important subspaces.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

OWN_LOSS = re.compile(r"_get_\w+_loss")
IMPORTANCE = ("exp_avg_ipt_A", "exp_avg_ipt_B", "exp_avg_unc_A", "exp_avg_unc_B")
PRUNED = "pruned_subspace"
"""Attribute of a parameter that AdaMSS no longer trains."""


def own_losses(tuner: type) -> list[str]:
    """Names of a tuner's methods that return a loss to be added to the training loss."""
    return sorted(name for name in dir(tuner) if OWN_LOSS.fullmatch(name))


def penalty(tuner: Any) -> torch.Tensor | None:
    """The sum of the adapter's own losses, weighted as its configuration says; None where it has none."""
    losses = [getattr(tuner, name)() for name in own_losses(type(tuner))]
    tensors = [loss for loss in losses if not isinstance(loss, float)]  # 0.0 where the option is not used
    return sum(tensors[1:], tensors[0]) if tensors else None


def discard_noise(tuner: Any) -> None:
    """Drops the noise that MonteCLoRA drew when the adapter was made, so that every forward pass draws its own."""
    for module in tuner.modules():
        for sampler in getattr(module, "lora_monteclora_sampler", {}).values():
            sampler.sampler.index = sampler.sampler.buffer_size


class SubspaceAllocation:
    """AdaMSS's allocation of subspaces, as ``AdamssModel.update_and_allocate`` does it.

    A pruned parameter gets no gradient, so that no optimizer moves it. Unlike in peft it keeps ``requires_grad``: what
    a checkpoint stores must not change in the middle of a run.
    """

    def __init__(self, tuner: Any) -> None:
        self._tuner = tuner
        self._parameters: dict[str, Any] = {
            name: parameter for name, parameter in tuner.named_parameters() if ".adamss_" in name
        }

    def begin(self) -> None:
        """Drops the gradients of pruned parameters from now on."""
        for parameter in self._parameters.values():
            parameter.register_post_accumulate_grad_hook(_drop_if_pruned)

    def step(self, step: int) -> None:
        """Updates importances from the gradients of a step, counted from 1, and prunes when it is due."""
        self._tuner.update_and_allocate(step)
        for parameter in self._parameters.values():
            if not parameter.requires_grad:
                setattr(parameter, PRUNED, True)
                parameter.requires_grad_(True)

    def state(self) -> dict[str, torch.Tensor]:
        """Which parameters are pruned, and the importances since the last pruning."""
        import torch

        pruned = {f"{PRUNED}/{name}": torch.tensor(True) for name, p in self._parameters.items() if _is_pruned(p)}
        scores = {
            f"{field}/{layer}/{number}": value.clone()
            for field, layer, values in self._importances()
            for number, value in enumerate(values)
            if value is not None
        }
        return pruned | scores

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restores the result of ``state``."""
        for name, parameter in self._parameters.items():
            setattr(parameter, PRUNED, f"{PRUNED}/{name}" in tensors)
        device = next(iter(self._parameters.values())).device
        for field, layer, values in self._importances():
            for number in range(len(values)):
                value = tensors.get(f"{field}/{layer}/{number}")
                values[number] = None if value is None else value.to(device)

    def _importances(self) -> Iterator[tuple[str, str, list[Any]]]:
        """Every list of importances, one value per subspace, by field and layer."""
        for layer, module in self._tuner.named_modules():
            for field in IMPORTANCE:
                for values in getattr(module, field, {}).values():
                    yield field, layer, values


def _is_pruned(parameter: torch.Tensor) -> bool:
    return getattr(parameter, PRUNED, False)


def _drop_if_pruned(parameter: torch.Tensor) -> None:
    if _is_pruned(parameter):
        parameter.grad = None

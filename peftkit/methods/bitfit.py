"""BitFit: only the biases are trained, and the head. Ben Zaken, Ravfogel & Goldberg 2021, arXiv:2106.10199.

    method: {kind: bitfit}

For bases that have biases: BERT and its kin, GPT-2, Phi, the query, key and value layers of Qwen2; Llama has none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from peftkit.errors import MethodError
from peftkit.schema.method import Method
from peftkit.schema.registries import METHODS
from peftkit.schema.types import LoadedModel

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

    from peftkit.schema.recipe import Recipe


@METHODS.register("bitfit")
class BitFit(Method):
    """Biases only (Ben Zaken et al. 2021, arXiv:2106.10199)."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2106.10199"
    default_learning_rate: ClassVar[float] = 5e-3
    loads_with: ClassVar[Literal["peft", "transformers", "peftkit"]] = "transformers"
    learns_pooling: ClassVar[bool] = False
    quantizations: ClassVar[tuple[str, ...] | None] = ()
    """bitsandbytes rounds the biases of its layers to the compute dtype at every call, trained ones too."""
    packed: ClassVar[tuple[str, ...] | None] = ()

    kind: Literal["bitfit"] = "bitfit"

    def check_base(self, config: PreTrainedConfig, recipe: Recipe) -> None:
        """Refuses architectures without biases, read off a model without weights."""
        import torch
        from transformers import AutoModel

        with torch.device("meta"):
            model = AutoModel.from_config(config, trust_remote_code=False)
        if not bias_names(model, ()):
            raise _none(config.model_type)

    def apply(self, loaded: LoadedModel) -> None:
        """Leaves gradients to biases and head; raises MethodError where there are no biases."""
        model, names = loaded.model, bias_names(loaded.model, loaded.head_names)
        if not names:
            raise _none(model.config.model_type)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names or bool(set(name.split(".")) & set(loaded.head_names)))


def bias_names(model: nn.Module, heads: tuple[str, ...]) -> set[str]:
    """Full names of the biases below the head: vectors that are called so."""
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 1 and name.rpartition(".")[2].endswith("bias") and not set(name.split(".")) & set(heads)
    }


def _none(kind: str) -> MethodError:
    return MethodError(
        f"method.kind=bitfit trains biases, and {kind} models have none; use method.kind=ln_tuning or method.kind=lora"
    )

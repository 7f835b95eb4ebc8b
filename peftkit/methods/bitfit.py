"""BitFit: only the biases and the head are trained. Ben Zaken, Ravfogel & Goldberg 2021, arXiv:2106.10199.

For base models that have biases: the BERT family, GPT-2, Phi, Qwen2 (query, key and value); Llama has none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peftkit.errors import MethodError
from peftkit.methods import missed
from peftkit.schema.method import Method
from peftkit.schema.registries import METHODS
from peftkit.schema.types import LoadedModel, in_head

if TYPE_CHECKING:
    from pathlib import Path

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
    """bitsandbytes casts its layers' biases to the compute dtype at every call, trained ones included."""
    quantized_checkpoints: ClassVar[tuple[str, ...] | None] = ()

    kind: Literal["bitfit"] = "bitfit"

    def check_base(self, config: PreTrainedConfig, recipe: Recipe) -> None:
        """Refuses architectures without biases, as seen on a meta-device model."""
        import torch
        from transformers import AutoModel

        with torch.device("meta"):
            bias_names(AutoModel.from_config(config, trust_remote_code=False))

    def apply(self, loaded: LoadedModel) -> None:
        """Sets ``requires_grad`` on the biases and the head; raises MethodError where there are no biases."""
        names = bias_names(loaded.model, loaded.head_names)
        for name, parameter in loaded.model.named_parameters():
            parameter.requires_grad_(name in names or in_head(name, loaded.head_names))
        loaded.notes += missed.fused_biases(loaded.model, loaded.head_names)

    def load_adapter(self, loaded: LoadedModel, folder: Path) -> None:
        """Loads the biases and the head of an earlier run."""
        from peftkit.methods import continuing

        continuing.load_native(self, loaded, folder)


def bias_names(model: Any, head_names: tuple[str, ...] = ()) -> set[str]:
    """Full names of the biases below the head: vectors whose names end in "bias"; raises MethodError without any."""
    names = {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 1 and name.rpartition(".")[2].endswith("bias") and not in_head(name, head_names)
    }
    if not names:
        raise MethodError(
            f"method.kind=bitfit trains biases, and {model.config.model_type} models have none; use "
            "method.kind=ln_tuning or lora"
        )
    return names

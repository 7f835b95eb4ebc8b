"""P-tuning: a small network makes the vectors of the prompt. Liu et al. 2021, arXiv:2103.10385.

method: {kind: p_tuning, virtual_tokens: 20, encoder: mlp}
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from peftkit.methods.prompt_methods import LearnedPrompt
from peftkit.methods.targets import Rate, task_type
from peftkit.schema.registries import METHODS
from peftkit.schema.types import LoadedModel


@METHODS.register("p_tuning")
class PTuning(LearnedPrompt):
    """A prompt made by a trained network (Liu et al. 2021, arXiv:2103.10385)."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2103.10385"
    default_learning_rate: ClassVar[float] = 1e-2

    kind: Literal["p_tuning"] = "p_tuning"
    encoder: Literal["mlp", "lstm"] = "mlp"
    """The network: two hidden layers, or an LSTM and two layers."""
    encoder_size: Annotated[int, Field(ge=1)] = 128
    """Width of the network."""
    encoder_layers: Annotated[int, Field(ge=1)] = 2
    """Layers of the LSTM; the other network always has two."""
    encoder_dropout: Rate = 0.0
    """Dropout between the LSTM's layers."""

    def config(self, loaded: LoadedModel) -> Any:
        """peft's PromptEncoderConfig."""
        from peft import PromptEncoderConfig

        return PromptEncoderConfig(
            task_type=task_type(loaded),
            num_virtual_tokens=self.virtual_tokens,
            encoder_reparameterization_type=self.encoder.upper(),
            encoder_hidden_size=self.encoder_size,
            encoder_num_layers=self.encoder_layers,
            encoder_dropout=self.encoder_dropout,
            modules_to_save=list(loaded.head_names) or None,
        )

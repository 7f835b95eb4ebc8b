"""Prompt tuning: trained vectors before the embeddings of a row's tokens. Lester et al. 2021, arXiv:2104.08691.

method: {kind: prompt_tuning, virtual_tokens: 20, init_text: "Classify the topic of this article:"}
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import model_validator

from peftkit.methods.prompt_methods import LearnedPrompt
from peftkit.methods.targets import task_type
from peftkit.schema.registries import METHODS
from peftkit.schema.types import LoadedModel

if TYPE_CHECKING:
    import torch


@METHODS.register("prompt_tuning")
class PromptTuning(LearnedPrompt):
    """A learned prompt of embeddings (Lester et al. 2021, arXiv:2104.08691)."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2104.08691"
    default_learning_rate: ClassVar[float] = 1e-2

    kind: Literal["prompt_tuning"] = "prompt_tuning"
    init: Literal["vocabulary", "random"] = "vocabulary"
    """Start of the vectors: embeddings of tokens drawn from the vocabulary, or standard normal numbers."""
    init_text: str | None = None
    """A text whose tokens' embeddings they start from, repeated as often as needed; in place of init."""

    @model_validator(mode="after")
    def _some_text(self) -> PromptTuning:
        if self.init_text is not None and not self.init_text.strip():
            raise ValueError("init_text is empty: expected a text, or null")
        return self

    def config(self, loaded: LoadedModel) -> Any:
        """peft's PromptTuningConfig."""
        from peft import PromptTuningConfig

        return PromptTuningConfig(
            task_type=task_type(loaded),
            num_virtual_tokens=self.virtual_tokens,
            modules_to_save=list(loaded.head_names) or None,
        )

    def apply(self, loaded: LoadedModel) -> None:
        """Puts the prompt in place and starts it from embeddings."""
        import torch

        embeddings = loaded.model.get_input_embeddings().weight
        super().apply(loaded)
        if self.init_text is None and self.init == "random":
            return
        ids = self._ids(loaded, embeddings)
        with torch.no_grad():
            weight = loaded.model.prompt_encoder["default"].embedding.weight
            weight.copy_(embeddings[ids.to(embeddings.device)].to(weight))

    def _ids(self, loaded: LoadedModel, embeddings: torch.Tensor) -> torch.Tensor:
        import torch

        if self.init_text is None:
            return torch.randint(embeddings.shape[0], (self.virtual_tokens,))
        ids = loaded.tokenizer(self.init_text, add_special_tokens=False)["input_ids"]
        return torch.tensor([ids[place % len(ids)] for place in range(self.virtual_tokens)])

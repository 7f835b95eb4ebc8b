"""Training options of a loaded model: faster kernels, activation checkpointing, noisy embeddings."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from peftkit.models.kernels import activation_checkpointing, attention, compile, dropout, first_token, rms_norm
from peftkit.schema.head import Head
from peftkit.schema.recipe import Recipe
from peftkit.schema.types import LoadedModel


def prepare_for_training(loaded: LoadedModel, recipe: Recipe, head: Head) -> None:
    """Applies the recipe's training options to a model whose method has been applied."""
    if recipe.model.attention == "auto":
        attention.use_cpu_attention(loaded.model)
    rms_norm.use_cpu_rms_norm(loaded.model)
    dropout.use_cpu_dropout(loaded.model)
    checkpointed = recipe.training.gradient_checkpointing != "off"
    if head.pools and loaded.pooling == "own" and (not checkpointed or first_token.supports_checkpointing()):
        first_token.shorten_last_block(loaded.model)
    parameters = loaded.model.parameters()
    if recipe.training.compile and not any(isinstance(p, FakeTensor) or p.is_meta for p in parameters):  # in planning
        compile.compile_blocks(loaded.model)
    activation_checkpointing.checkpoint_activations(loaded.model, recipe.training.gradient_checkpointing)
    if recipe.training.neftune_alpha:
        add_embedding_noise(loaded.model, recipe.training.neftune_alpha)


def add_embedding_noise(model: Any, alpha: float) -> None:
    """Adds uniform noise of ± alpha / √(tokens × width) to embeddings in training (NEFTune, arXiv:2310.05914)."""

    def add_noise(module: torch.nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        bound = alpha / math.sqrt(output.shape[-2] * output.shape[-1])
        return output + torch.empty_like(output).uniform_(-bound, bound)

    model.get_input_embeddings().register_forward_hook(add_noise)

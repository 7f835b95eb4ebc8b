"""Prompt methods: trained vectors before a row's own tokens, or before every layer's keys and values.

peft widens attention masks and excludes the vectors from the loss. Rows with such a prompt are never packed (only the
first document of a row would see it), and texts are generated in batches of equal length (padding between the prompt
and a text would separate them).
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from peftkit.errors import MethodError
from peftkit.methods.peft_method import PeftMethod, task_type
from peftkit.methods.targets import Fraction
from peftkit.models.context import positions
from peftkit.schema.head import possible_heads
from peftkit.schema.registries import METHODS
from peftkit.schema.types import LoadedModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from peftkit.schema.recipe import Recipe


class LearnedPrompt(PeftMethod):
    """A method that trains a prompt of virtual tokens."""

    default_learning_rate: ClassVar[float] = 1e-2
    merges: ClassVar[bool] = False
    keeps_token_ids: ClassVar[bool] = False
    starts_as_base: ClassVar[bool] = False

    virtual_tokens: Annotated[int, Field(ge=1)] = 20
    """Number of trained vectors before every row."""

    def check(self, recipe: Recipe) -> None:
        """Pooling over tokens would include the vectors."""
        super().check(recipe)
        check_pooling(self.kind, recipe)

    def check_base(self, config: PreTrainedConfig, recipe: Recipe) -> None:
        """The model needs positions for the prompt, and a classifier that still finds a row's last token."""
        check_positions(self.kind, self.virtual_tokens, config, recipe)
        check_last_token(self.kind, config, recipe)

    def shared_arguments(self, loaded: LoadedModel) -> dict[str, Any]:
        """Those of every method, and the length of the prompt."""
        shared = {**super().shared_arguments(loaded), "task_type": task_type(loaded, prompt=True)}
        return {**shared, "num_virtual_tokens": self.virtual_tokens}


@METHODS.register("prompt_tuning")
class PromptTuning(LearnedPrompt):
    """A learned prompt of embeddings (Lester et al. 2021, arXiv:2104.08691)."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2104.08691"

    kind: Literal["prompt_tuning"] = "prompt_tuning"
    init: Literal["vocabulary", "random"] = "vocabulary"
    """Initial vectors: embeddings of random tokens of the vocabulary, or standard normal."""
    init_text: str | None = None
    """Initialize from the embeddings of this text's tokens, repeated as often as needed; replaces init."""

    @model_validator(mode="after")
    def _check_init_text(self) -> PromptTuning:
        if self.init_text is not None and not self.init_text.strip():
            raise ValueError("init_text is empty: expected a text, or null")
        return self

    def peft_config(self, loaded: LoadedModel) -> Any:
        from peft import PromptTuningConfig

        return PromptTuningConfig(**self.shared_arguments(loaded))

    def apply(self, loaded: LoadedModel) -> None:
        """Adds the prompt, and initializes it from the embeddings."""
        import torch

        embeddings = loaded.model.get_input_embeddings().weight
        super().apply(loaded)
        if self.init_text is not None:
            tokens = loaded.tokenizer(self.init_text, add_special_tokens=False)["input_ids"]
            ids = torch.tensor([tokens[position % len(tokens)] for position in range(self.virtual_tokens)])
        elif self.init == "vocabulary":
            ids = torch.randint(len(embeddings), (self.virtual_tokens,))
        else:
            return
        with torch.no_grad():
            weight = loaded.model.prompt_encoder["default"].embedding.weight
            weight.copy_(embeddings[ids.to(embeddings.device)].to(weight))


@METHODS.register("p_tuning")
class PTuning(LearnedPrompt):
    """A prompt made by a trained network (Liu et al. 2021, arXiv:2103.10385)."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2103.10385"

    continues: ClassVar[bool] = False
    """Only the prompt that its network makes is saved, and not the network."""

    kind: Literal["p_tuning"] = "p_tuning"
    encoder: Literal["mlp", "lstm"] = "mlp"
    """The network: an MLP with two hidden layers, or an LSTM followed by two layers."""
    encoder_size: Annotated[int, Field(ge=1)] = 128
    """Width of the network."""
    encoder_layers: Annotated[int, Field(ge=1)] = 2
    """Layers of the LSTM; the MLP always has two."""
    encoder_dropout: Fraction = 0.0
    """Dropout between the LSTM's layers."""

    def peft_config(self, loaded: LoadedModel) -> Any:
        from peft import PromptEncoderConfig

        return PromptEncoderConfig(
            **self.shared_arguments(loaded),
            encoder_reparameterization_type=self.encoder.upper(),
            encoder_hidden_size=self.encoder_size,
            encoder_num_layers=self.encoder_layers,
            encoder_dropout=self.encoder_dropout,
        )


@METHODS.register("prefix_tuning")
class PrefixTuning(LearnedPrompt):
    """A learned prompt of keys and values (Li & Liang 2021, arXiv:2101.00190)."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2101.00190"
    checkpoints_activations: ClassVar[bool] = False
    keeps_token_ids: ClassVar[bool] = True

    kind: Literal["prefix_tuning"] = "prefix_tuning"
    projection: bool = False
    """Train a small network that produces the keys and values, which stabilizes training; only its output is saved."""
    projection_size: Annotated[int, Field(ge=1)] = 128
    """Width of that network."""
    init: Literal["random", "zero"] = "random"
    """Initial keys and values: standard normal, as in the paper, or zeros, which change the base least."""

    def check(self, recipe: Recipe) -> None:
        """A network that produced keys and values is not saved with them."""
        super().check(recipe)
        if recipe.model.continues and self.projection:
            raise MethodError(
                "method.projection=true saves the keys and values of its network, and not the network; set "
                "method.projection=false to train them further"
            )

    def check_base(self, config: PreTrainedConfig, recipe: Recipe) -> None:
        """The architecture must accept keys and values as an input, and have positions for them."""
        check_keys_and_values(self.kind, config)
        check_positions(self.kind, self.virtual_tokens, config, recipe)

    def peft_config(self, loaded: LoadedModel) -> Any:
        from peft import PrefixTuningConfig

        return PrefixTuningConfig(
            **self.shared_arguments(loaded),
            prefix_projection=self.projection,
            encoder_hidden_size=self.projection_size,
            init_weights="zero" if self.init == "zero" else None,
        )


def check_pooling(kind: str, recipe: Recipe) -> None:
    """Raises MethodError for pooling classifiers, sentence embeddings, masked language models and encoder–decoders."""
    if any(head.fills_masks for head in possible_heads(recipe.task)):
        raise MethodError(
            f"method.kind={kind} changes no weight of the encoder, so that nothing of what task.kind="
            f"{recipe.task.kind} learns could be used by another task; use method.kind=lora"
        )
    if any(head.embeds for head in possible_heads(recipe.task)):
        raise MethodError(
            f"method.kind={kind} puts a learned prompt before the tokens, which an embedding of the text would mix "
            "with them; use method.kind=lora"
        )
    if any(head.encodes_source for head in possible_heads(recipe.task)):
        raise MethodError(
            f"method.kind={kind} puts a learned prompt before one text, and task.kind={recipe.task.kind} has a source "
            "and a target; use method.kind=lora or ia3"
        )
    if recipe.model.pooling in {"mean", "cls"} and any(head.pools for head in possible_heads(recipe.task)):
        raise MethodError(
            f"method.kind={kind} puts a learned prompt before the tokens, which model.pooling={recipe.model.pooling} "
            "would mix with them; set model.pooling=own"
        )


def check_positions(kind: str, count: int, config: PreTrainedConfig, recipe: Recipe) -> None:
    """Raises MethodError where the prompt and the longest row together exceed the model's positions."""
    limit = positions(config)
    if limit is not None and recipe.data.max_length + count > limit:
        raise MethodError(
            f"method.kind={kind} puts {count} vectors before rows of up to data.max_length={recipe.data.max_length} "
            f"tokens, and the model has {limit} positions; set data.max_length to at most {limit - count}"
        )


def check_last_token(kind: str, config: PreTrainedConfig, recipe: Recipe) -> None:
    """Raises MethodError for a decoder's classifier, which finds a row's last token by its id; vectors have none."""
    from peftkit.models.loading import writes_text

    if any(head.pools for head in possible_heads(recipe.task)) and writes_text(config):
        raise MethodError(
            f"method.kind={kind} gives {config.model_type} vectors in place of token ids, by which its classifier "
            "finds the last token of a padded row; use method.kind=prefix_tuning or lora, or an encoder"
        )


def check_keys_and_values(kind: str, config: PreTrainedConfig) -> None:
    """Raises MethodError for an architecture that does not accept keys and values as an input."""
    from transformers import AutoModel

    if type(config) not in AutoModel._model_mapping:
        return
    backbone: Any = AutoModel._model_mapping[type(config)]
    if "past_key_values" not in inspect.signature(backbone.forward).parameters:
        raise MethodError(
            f"method.kind={kind} passes keys and values to every layer, which {config.model_type} does not "
            "accept; use method.kind=prompt_tuning or lora"
        )

"""What prompt methods share: trained vectors stand before a row's own tokens, or before every layer's keys and values.

peft widens attention masks and leaves the vectors unscored. Rows with such a prompt are never packed (only the first
document of a row would see it), and texts are generated in batches of one length (padding between the prompt and a
text would push them apart).
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from peftkit.errors import MethodError
from peftkit.methods.targets import PeftMethod
from peftkit.schema.head import possible_heads

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from peftkit.schema.recipe import Recipe


class LearnedPrompt(PeftMethod):
    """A method that trains a prompt."""

    merges: ClassVar[bool] = False
    keeps_token_ids: ClassVar[bool] = False
    starts_as_base: ClassVar[bool] = False

    virtual_tokens: Annotated[int, Field(ge=1)] = 20
    """Vectors before every row."""

    def check(self, recipe: Recipe) -> None:
        """The vectors are no tokens of the row, so that a mean over tokens cannot be told from one over them."""
        super().check(recipe)
        check_pooling(self.kind, recipe)

    def check_base(self, config: PreTrainedConfig, recipe: Recipe) -> None:
        """There must be positions for the prompt, and a classifier that finds its last token beside one."""
        check_room(self.kind, self.virtual_tokens, config, recipe)
        check_last_token(self.kind, config, recipe)


def check_pooling(kind: str, recipe: Recipe) -> None:
    """Raises MethodError for a classifier that pools over tokens."""
    if any(head.pools for head in possible_heads(recipe.task)) and recipe.model.pooling in {"mean", "cls"}:
        raise MethodError(
            f"method.kind={kind} puts a learned prompt before the tokens, which model.pooling={recipe.model.pooling} "
            "would mix with them; set model.pooling=own"
        )


def check_room(kind: str, count: int, config: PreTrainedConfig, recipe: Recipe) -> None:
    """Raises MethodError where prompt and longest row together outgrow the positions of the model."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    shifted = (getattr(text, "pad_token_id", None) or 0) + 1 if text.model_type in _SHIFTED else 0
    if positions and recipe.data.max_length + count > positions - shifted:
        raise MethodError(
            f"method.kind={kind} puts {count} vectors before rows of up to data.max_length={recipe.data.max_length} "
            f"tokens, and the model has {positions - shifted} positions; set data.max_length to at most "
            f"{positions - shifted - count}"
        )


_SHIFTED = {"roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "roberta-prelayernorm", "longformer"}
"""Architectures whose positions start after the pad token's id."""


def check_last_token(kind: str, config: PreTrainedConfig, recipe: Recipe) -> None:
    """Raises MethodError for a decoder's classifier, which finds a row's last token by its id; vectors have none."""
    from peftkit.models.loading import writes_text

    if any(head.pools for head in possible_heads(recipe.task)) and writes_text(config):
        raise MethodError(
            f"method.kind={kind} gives {config.model_type} vectors in place of token ids, by which its classifier "
            "finds the last token of a padded row; use method.kind=prefix_tuning or lora, or an encoder"
        )


def check_keys_and_values(kind: str, config: PreTrainedConfig) -> None:
    """Raises MethodError for an architecture that takes no keys and values from outside."""
    from transformers import AutoModel

    if type(config) not in AutoModel._model_mapping:
        return
    backbone: Any = AutoModel._model_mapping[type(config)]
    if "past_key_values" not in inspect.signature(backbone.forward).parameters:
        raise MethodError(
            f"method.kind={kind} puts keys and values before every layer's own, which {config.model_type} does not "
            "take; use method.kind=prompt_tuning or lora"
        )

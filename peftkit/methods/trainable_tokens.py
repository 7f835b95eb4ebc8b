"""Trainable tokens: only the embeddings of a few tokens are trained, such as those of a chat template."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import field_validator

from peftkit.errors import MethodError, did_you_mean
from peftkit.methods.peft_method import NO_TARGET, PeftMethod
from peftkit.schema.registries import METHODS
from peftkit.schema.types import LoadedModel


@METHODS.register("trainable_tokens")
class TrainableTokens(PeftMethod):
    """The embeddings of chosen tokens (peft's trainable tokens)."""

    paper: ClassVar[str] = "https://huggingface.co/docs/peft/package_reference/trainable_tokens"
    default_learning_rate: ClassVar[float] = 1e-2
    learns_pooling: ClassVar[bool] = False

    kind: Literal["trainable_tokens"] = "trainable_tokens"
    tokens: Literal["special"] | tuple[str | int, ...] = "special"
    """special: all special and added tokens of the tokenizer; or a list of tokens or their ids."""

    @field_validator("tokens")
    @classmethod
    def _check_not_empty(cls, value: Any) -> Any:
        if not value:
            raise ValueError("expected at least one token, found none")
        return value

    def peft_config(self, loaded: LoadedModel) -> Any:
        """A LoraConfig without a low-rank update, which every peft loads; raises MethodError for an unknown token."""
        from peft import LoraConfig

        return LoraConfig(
            **self.shared_arguments(loaded), target_modules=NO_TARGET, trainable_token_indices=self._token_ids(loaded)
        )

    def _token_ids(self, loaded: LoadedModel) -> list[int]:
        vocabulary = loaded.tokenizer.get_vocab()
        if self.tokens == "special":
            names = {*loaded.tokenizer.all_special_tokens, *loaded.tokenizer.get_added_vocab()}
            return sorted(vocabulary[name] for name in names)
        ids, rows = set(), loaded.model.get_input_embeddings().weight.shape[0]
        for token in self.tokens:
            if isinstance(token, int) and not 0 <= token < rows:
                raise MethodError(f"method.tokens: {token} is not a token id: expected 0 to {rows - 1}")
            if isinstance(token, str) and token not in vocabulary:
                raise MethodError(
                    f"method.tokens: '{token}' is not in the vocabulary: {did_you_mean(token, vocabulary)}"
                )
            ids.add(token if isinstance(token, int) else vocabulary[token])
        return sorted(ids)

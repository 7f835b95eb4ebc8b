"""Trainable tokens: the embeddings of a few tokens are trained, all others stay as they are.

For tokens that the base has hardly seen, such as those of a chat template. peft's own, without a paper:
https://huggingface.co/docs/peft/package_reference/trainable_tokens

    method: {kind: trainable_tokens, tokens: ["<|im_start|>", "<|im_end|>"]}
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import field_validator

from peftkit.errors import MethodError, did_you_mean
from peftkit.methods.frozen import NO_TARGET
from peftkit.methods.targets import PeftMethod, task_type
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
    """special: every special and added token of the tokenizer; or tokens of its vocabulary, or their ids."""

    @field_validator("tokens")
    @classmethod
    def _some(cls, value: Any) -> Any:
        if not value:
            raise ValueError("expected at least one token, found none")
        return value

    def config(self, loaded: LoadedModel) -> Any:
        """peft's LoraConfig without a low-rank update: it carries token rows and a head, and loads anywhere.

        Raises MethodError for a token that the vocabulary does not hold.
        """
        from peft import LoraConfig

        return LoraConfig(
            task_type=task_type(loaded),
            target_modules=NO_TARGET,
            trainable_token_indices=self._ids(loaded),
            modules_to_save=list(loaded.head_names) or None,
        )

    def _ids(self, loaded: LoadedModel) -> list[int]:
        known = loaded.tokenizer.get_vocab()
        if self.tokens == "special":
            names = {*loaded.tokenizer.all_special_tokens, *loaded.tokenizer.get_added_vocab()}
            return sorted(known[name] for name in names)
        found, rows = [], loaded.model.get_input_embeddings().weight.shape[0]
        for token in self.tokens:
            if isinstance(token, int) and not 0 <= token < rows:
                raise MethodError(f"method.tokens: {token} is no token id; the embeddings have {rows} rows")
            if isinstance(token, str) and token not in known:
                raise MethodError(
                    f"method.tokens: '{token}' is no token of the vocabulary: {did_you_mean(token, known)}"
                )
            found.append(token if isinstance(token, int) else known[token])
        return sorted(set(found))

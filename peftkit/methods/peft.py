"""Any other method of the installed peft, by the name under which peft registers it.

    method: {kind: peft, peft_type: LOHA, arguments: {r: 8, alpha: 16}}

``target_modules`` defaults to every linear layer outside the head.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peftkit.errors import MethodError, did_you_mean
from peftkit.methods.prompt_methods import check_keys_and_values, check_last_token, check_pooling, check_positions
from peftkit.methods.targets import PeftMethod, choose_targets, task_type
from peftkit.schema.registries import METHODS
from peftkit.schema.types import LoadedModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from peftkit.schema.recipe import Recipe

RESERVED = ("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
            "inference_mode")  # fmt: skip
"""Fields of peft's configurations that peftkit sets."""
UNSUPPORTED = {
    "ADALORA": "needs its ranks pruned between steps; use method.kind=adalora",
    "POLY": "needs a task id per row, which recipes cannot express",
    "MULTITASK_PROMPT_TUNING": "needs a task id per row, which recipes cannot express",
    "XLORA": "mixes previously trained adapters, which recipes cannot express",
}
ON_QUANTIZED = frozenset({
    "LORA", "BEFT", "BOFT", "CARTRIDGE", "CPT", "FOURIERFT", "HIRA", "IA3", "LILY", "LN_TUNING", "MISS", "OFT",
    "PREFIX_TUNING", "PROMPT_TUNING", "PVERA", "P_TUNING", "RANDLORA", "ROAD", "TRAINABLE_TOKENS", "UNILORA", "VBLORA",
    "VERA", "WAVEFT",
})  # fmt: skip
"""Types that never read the base's weights, or that dequantize them."""
KEY_VALUE_TYPES = ("PREFIX_TUNING", "CARTRIDGE")  # types that put keys and values before every layer's own
OWN_TARGETS = ("LN_TUNING", "TRAINABLE_TOKENS", "IA3", "ADAPTION_PROMPT")
"""Types that adapt other layers than linear ones, or that choose them by architecture."""


@METHODS.register("peft")
class Peft(PeftMethod):
    """Any method that peft registers, by name (https://huggingface.co/docs/peft)."""

    paper: ClassVar[str] = "https://huggingface.co/docs/peft"
    starts_as_base: ClassVar[bool] = False

    kind: Literal["peft"] = "peft"
    peft_type: str
    """peft's name for the method: LOHA, LOKR, HRA, FOURIERFT, …; peft's documentation lists them."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Arguments of peft's configuration class for that type."""

    def check(self, recipe: Recipe) -> None:
        """peft must register the type, and its configuration class must accept the arguments."""
        super().check(recipe)
        name = self._name()
        if name in UNSUPPORTED:
            raise MethodError(f"method.peft_type={name} {UNSUPPORTED[name]}")
        fields, config_class = self._config_fields(), self._config_class()
        for argument in self.arguments:
            if argument not in fields:
                hint = did_you_mean(argument, fields)
                raise MethodError(f"method.arguments: {config_class.__name__} has no '{argument}': {hint}")
        try:
            config_class(**self.arguments)
        except (ValueError, TypeError, KeyError) as error:
            raise MethodError(f"method.arguments: {config_class.__name__}: {error}") from None
        if recipe.quantization is not None and name not in ON_QUANTIZED:
            raise MethodError(
                f"method.peft_type={name} needs unquantized weights, and the recipe sets "
                f"quantization.kind={recipe.quantization.kind}; set quantization=null"
            )
        if name in KEY_VALUE_TYPES and recipe.training.gradient_checkpointing != "off":
            raise MethodError(
                f"method.peft_type={name} puts keys and values before every layer's own, which activation "
                "checkpointing drops; set training.gradient_checkpointing=off"
            )
        if self._learns_prompt():
            check_pooling(self.kind, recipe)

    def check_base(self, config: PreTrainedConfig, recipe: Recipe) -> None:
        """A prompt needs positions, and a model that accepts it."""
        if not self._learns_prompt():
            return
        check_positions(self.kind, int(self.arguments.get("num_virtual_tokens") or 0), config, recipe)
        if self._name() in KEY_VALUE_TYPES:
            check_keys_and_values(self.kind, config)
        else:
            check_last_token(self.kind, config, recipe)

    def unsupported_checkpoint_reason(self, kind: str) -> str | None:
        """LoRA and types without adapter layers work on every checkpoint; others need a peft layer for its kind."""
        name = self._name()
        if self._learns_prompt() or name in {"LORA", "LN_TUNING", "TRAINABLE_TOKENS"}:
            return None
        if kind == "bitsandbytes" and name in ON_QUANTIZED:
            return None
        return f"method.peft_type={name} needs unquantized weights; use method.kind=lora"

    def unmergeable_reason(self) -> str | None:
        """Prompts have no weights to merge; other types raise an error of their own on merging."""
        if self._learns_prompt():
            return f"peft's {self._name()} changes no weight of the base, so there is nothing to merge"
        return None

    def peft_config(self, loaded: LoadedModel) -> Any:
        fields, values = self._config_fields(), dict(self.arguments)
        if "target_modules" in fields and "target_modules" not in values and self._name() not in OWN_TARGETS:
            values["target_modules"] = choose_targets(loaded.model, loaded.head_names, "all-linear")
        if "modules_to_save" in fields:
            values["modules_to_save"] = [*(values.get("modules_to_save") or ()), *loaded.head_names] or None
        return self._config_class()(task_type=task_type(loaded), **values)

    def _name(self) -> str:
        """The type's name in peft's spelling; raises MethodError with the nearest where peft has no such type."""
        known = _registered()
        name = self.peft_type.upper().replace("-", "_")
        if name not in known:
            raise MethodError(f"method.peft_type: peft has no '{self.peft_type}': {did_you_mean(name, known)}")
        return name

    def _config_class(self) -> Any:
        return _registered()[self._name()]

    def _config_fields(self) -> set[str]:
        return {field.name for field in dataclasses.fields(self._config_class()) if field.init} - set(RESERVED)

    def _learns_prompt(self) -> bool:
        from peft.config import PromptLearningConfig

        return issubclass(self._config_class(), PromptLearningConfig)


def _registered() -> dict[str, Any]:
    """peft's configuration classes by the name of their type."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return {str(getattr(name, "value", name)): config for name, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}

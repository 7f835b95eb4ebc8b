"""Any other method of the installed peft, by the name under which peft registers it.

    method: {kind: peft, peft_type: LOHA, arguments: {r: 8, alpha: 16}}

The arguments are those of peft's configuration class for that type. ``target_modules`` is every linear layer but the
head unless it is given.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peftkit.errors import MethodError, did_you_mean
from peftkit.methods.prompt_methods import check_keys_and_values, check_last_token, check_pooling, check_room
from peftkit.methods.targets import PeftMethod, choose_targets, task_type
from peftkit.schema.registries import METHODS
from peftkit.schema.types import LoadedModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from peftkit.schema.recipe import Recipe

OURS = ("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode")  # fmt: skip
"""Fields of peft's configurations that are not the user's to set."""
NEED_MORE = {
    "ADALORA": "needs its ranks pruned between steps; use method.kind=adalora",
    "POLY": "needs the number of a task with every row, which recipes do not have",
    "MULTITASK_PROMPT_TUNING": "needs the number of a task with every row, which recipes do not have",
    "XLORA": "mixes adapters that have been trained before, which recipes do not have",
}
ON_QUANTIZED = frozenset({
    "LORA", "BEFT", "BOFT", "CARTRIDGE", "CPT", "FOURIERFT", "HIRA", "IA3", "LILY", "LN_TUNING", "MISS", "OFT",
    "PREFIX_TUNING", "PROMPT_TUNING", "PVERA", "P_TUNING", "RANDLORA", "ROAD", "TRAINABLE_TOKENS", "UNILORA", "VBLORA",
    "VERA", "WAVEFT",
})  # fmt: skip
"""Types that leave the weights of the layers below them alone, or know how to open them."""
IN_CACHE = ("PREFIX_TUNING", "CARTRIDGE")
"""Types that put keys and values before every layer's own."""


@METHODS.register("peft")
class Peft(PeftMethod):
    """Any method that peft registers, by name (https://huggingface.co/docs/peft)."""

    paper: ClassVar[str] = "https://huggingface.co/docs/peft"
    default_learning_rate: ClassVar[float] = 1e-3
    starts_as_base: ClassVar[bool] = False

    kind: Literal["peft"] = "peft"
    peft_type: str
    """peft's name of the method: LOHA, LOKR, HRA, FOURIERFT, …; peft's documentation lists them."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Arguments of peft's configuration class for that type."""

    def check(self, recipe: Recipe) -> None:
        """The type must be one that peft registers, and the arguments those of its configuration class."""
        super().check(recipe)
        name = self._name()
        if name in NEED_MORE:
            raise MethodError(f"method.peft_type={name} {NEED_MORE[name]}")
        self._check_arguments()
        if recipe.quantization is not None and name not in ON_QUANTIZED:
            raise MethodError(
                f"method.peft_type={name} reads the weights of the layers below it, which "
                f"quantization.kind={recipe.quantization.kind} has packed; set quantization=null"
            )
        if name in IN_CACHE and recipe.training.gradient_checkpointing != "off":
            raise MethodError(
                f"method.peft_type={name} puts keys and values before every layer's own, which checkpointed layers "
                "drop; set training.gradient_checkpointing=off"
            )
        if self._learns_prompt():
            check_pooling(self.kind, recipe)

    def check_base(self, config: PreTrainedConfig, recipe: Recipe) -> None:
        """A prompt needs positions, and a model that can take it."""
        if not self._learns_prompt():
            return
        check_room(self.kind, int(self.arguments.get("num_virtual_tokens") or 0), config, recipe)
        if self._name() in IN_CACHE:
            check_keys_and_values(self.kind, config)
        else:
            check_last_token(self.kind, config, recipe)

    def unsupported_checkpoint_reason(self, kind: str) -> str | None:
        """Types without layers of their own over linear ones stand on all; others on what peft has layers for."""
        name = self._name()
        if self._learns_prompt() or name in {"LORA", "LN_TUNING", "TRAINABLE_TOKENS"}:
            return None
        if kind == "bitsandbytes" and name in ON_QUANTIZED:
            return None
        return f"method.peft_type={name} reads the weights of the layers below it; use method.kind=lora"

    def unmergeable_reason(self) -> str | None:
        """Prompts are no weights; other types say so themselves when they are asked to merge."""
        if self._learns_prompt():
            return f"peft's {self._name()} changes no weight that it could be merged into"
        return None

    def config(self, loaded: LoadedModel) -> Any:
        """peft's configuration of that type."""
        fields, values = self._fields(), dict(self.arguments)
        if "target_modules" in fields and "target_modules" not in values and self._name() not in _CHOOSE_THEMSELVES:
            values["target_modules"] = choose_targets(loaded.model, loaded.head_names, "all-linear")
        if "modules_to_save" in fields:
            saved = [*(values.get("modules_to_save") or ()), *loaded.head_names]
            values["modules_to_save"] = saved or None
        return self._class()(task_type=task_type(loaded), **values)

    def _name(self) -> str:
        """The type's name; raises MethodError naming the nearest where peft has no such type."""
        known = {str(getattr(name, "value", name)) for name in _registered()}
        name = self.peft_type.upper().replace("-", "_")
        if name not in known:
            raise MethodError(f"method.peft_type: peft has no '{self.peft_type}': {did_you_mean(name, known)}")
        return name

    def _class(self) -> Any:
        return _registered()[self._name()]

    def _fields(self) -> set[str]:
        return {field.name for field in dataclasses.fields(self._class()) if field.init} - set(OURS)

    def _learns_prompt(self) -> bool:
        from peft.config import PromptLearningConfig

        return issubclass(self._class(), PromptLearningConfig)

    def _check_arguments(self) -> None:
        fields = self._fields()
        for argument in self.arguments:
            if argument not in fields:
                hint = did_you_mean(argument, fields)
                raise MethodError(f"method.arguments: {self._class().__name__} has no '{argument}': {hint}")
        try:
            self._class()(**self.arguments)
        except (ValueError, TypeError, KeyError) as error:
            raise MethodError(f"method.arguments: {self._class().__name__}: {error}") from None


_CHOOSE_THEMSELVES = ("LN_TUNING", "TRAINABLE_TOKENS", "IA3", "ADAPTION_PROMPT")
"""Types whose targets are no linear layers, or which know better."""


def _registered() -> dict[str, Any]:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return {str(getattr(name, "value", name)): found for name, found in PEFT_TYPE_TO_CONFIG_MAPPING.items()}

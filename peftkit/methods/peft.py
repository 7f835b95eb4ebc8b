"""Any other method of the installed peft, by the name under which peft registers it.

    method: {kind: peft, peft_type: LOHA, arguments: {r: 8, alpha: 16}}

``target_modules`` defaults to every linear layer outside the head. What an option needs between steps is in
``peft_steps``; what needs more than that is refused by name.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peftkit.errors import MethodError, did_you_mean
from peftkit.methods import missed, peft_steps
from peftkit.methods.peft_method import PeftMethod, task_type
from peftkit.methods.prompt_methods import check_keys_and_values, check_last_token, check_pooling, check_positions
from peftkit.methods.targets import ALL_LINEAR, choose_targets
from peftkit.schema.head import possible_heads
from peftkit.schema.registries import METHODS
from peftkit.schema.types import LoadedModel

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from peftkit.schema.recipe import Recipe

RESERVED = ("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
            "inference_mode")  # fmt: skip
"""Fields of peft's configurations that peftkit sets."""
UNSUPPORTED = {
    "ADALORA": "needs its ranks pruned between steps; use method.kind=adalora",
    "CPT": "computes a loss of its own over a task's token types, which recipes cannot express; "
    "use method.kind=prompt_tuning",
    "POLY": "needs a task id per row, which recipes cannot express",
    "MULTITASK_PROMPT_TUNING": "needs a task id per row, which recipes cannot express",
    "SHADOW": "trains a second network by a loss of its own over the labels, which recipes cannot express",
    "XLORA": "mixes previously trained adapters, which recipes cannot express",
}
UNSUPPORTED_OPTIONS = {
    ("LORA", "alora_invocation_tokens"): "acts only where peft's own forward pass finds these tokens; leave it out",
    ("LORA", "arrow_config"): "mixes previously trained adapters, which recipes cannot express; leave it out",
    ("LORA", "layer_replication"): "makes another base out of copied blocks, which cannot be exported; leave it out",
    ("LORA", "megatron_config"): "needs a model built by Megatron; leave it out",
    ("LORA", "use_qalora"): "acts only in peft's own layers over GPTQ weights; leave it out",
}
"""Options whose effect needs more than a recipe expresses, and why."""
UNSUPPORTED_INITS = {
    "corda": "needs a pass over data before the adapter exists; use method.kind=lora with init_lora_weights=eva",
    "eva": "needs a pass over data; use method.kind=lora with init_lora_weights=eva",
    "loftq": "needs NF4 weights; use method.kind=lora with init_lora_weights=loftq",
    "lora_ga": "needs gradients from a pass over data; use method.kind=lora with init_lora_weights=eva",
}
"""Values of LoRA's ``init_lora_weights`` that peft prepares in a step of its own."""
ALLOCATES = ("ADALORA", "ADAMSS")  # types whose update_and_allocate is called between steps
ON_QUANTIZED = frozenset({
    "LORA", "BEFT", "BOFT", "CARTRIDGE", "CPT", "FOURIERFT", "HIRA", "IA3", "LILY", "LN_TUNING", "MISS", "OFT",
    "PREFIX_TUNING", "PROMPT_TUNING", "PVERA", "P_TUNING", "RANDLORA", "ROAD", "TRAINABLE_TOKENS", "UNILORA", "VBLORA",
    "VERA", "WAVEFT",
})  # fmt: skip
"""Types that never read the base's weights, or that dequantize them."""
KEY_VALUE_TYPES = ("PREFIX_TUNING", "CARTRIDGE")  # types that put keys and values before every layer's own
OWN_TARGETS = ("LN_TUNING", "TRAINABLE_TOKENS", "IA3", "ADAPTION_PROMPT")
"""Types that adapt other layers than linear ones, or that choose them by architecture."""
UNMERGEABLE = ("ADAPTION_PROMPT", "LILY")  # types that no weight of the base can hold


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
        if reason := self._unsupported_reason():
            raise MethodError(reason)
        fields, config_class = self._config_fields(), self._config_class()
        _check_names("method.arguments", config_class, self.arguments, fields)
        for argument, nested in _nested_configs(config_class).items():
            if isinstance(values := self.arguments.get(argument), dict):  # peft drops names that it does not know
                known = {field.name for field in dataclasses.fields(nested) if field.init}
                _check_names(f"method.arguments.{argument}", nested, values, known)
        try:
            config_class(**self._arguments())
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
        elif "modules_to_save" not in fields and any(head.adds_layers for head in possible_heads(recipe.task)):
            raise MethodError(
                f"method.peft_type={name}: peft neither trains nor saves a new head under this type, which "
                f"task.kind={recipe.task.kind} needs; use {self._alternative()}"
            )
        if monteclora := self._arguments().get("monteclora_config"):
            if recipe.training.gradient_checkpointing != "off":
                raise MethodError(
                    "method.arguments.monteclora_config draws new noise whenever activation checkpointing repeats a "
                    "forward pass; set training.gradient_checkpointing=off"
                )
            if monteclora.buffer_size != 1:
                raise MethodError(
                    f"method.arguments.monteclora_config.buffer_size={monteclora.buffer_size}: a resumed run would "
                    "draw other noise than an undisturbed one; leave it out"
                )

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
        if self._name() in UNMERGEABLE:
            return f"peft cannot merge {self._name()} into the base's weights"
        return None

    def peft_config(self, loaded: LoadedModel) -> Any:
        """peft's configuration of that type, with the head and, where none are named, all linear layers."""
        fields, values = self._config_fields(), self._arguments()
        if "target_modules" in fields and not values.get("target_modules"):
            if self._name() not in OWN_TARGETS:
                values["target_modules"] = choose_targets(loaded.model, loaded.head_names, ALL_LINEAR)
            else:
                self._check_known_targets(loaded.model.config.model_type)
        if "modules_to_save" in fields:
            values["modules_to_save"] = [*(values.get("modules_to_save") or ()), *loaded.head_names] or None
        elif loaded.head_names:
            raise MethodError(
                f"method.peft_type={self._name()}: peft neither trains nor saves new layers under this type, and the "
                f"base lacks {', '.join(loaded.head_names)}; use {self._alternative()}"
            )
        return self._config_class()(task_type=task_type(loaded, prompt=self._learns_prompt()), **values)

    def missed(self, loaded: LoadedModel) -> list[str]:
        """Those of every method, and where linear layers are adapted, on weights that their names cannot select."""
        remarks, patterns = super().missed(loaded), self.arguments.get("target_modules")
        if "target_modules" not in self._config_fields() or (not patterns and self._name() in OWN_TARGETS):
            return remarks
        chosen = (loaded.model, patterns if isinstance(patterns, str) else tuple(patterns or ()) or ALL_LINEAR)
        layers = missed.unselectable_weights(*chosen, loaded.head_names)
        return [*remarks, *layers, *missed.partly_matched(*chosen, loaded.head_names)]

    def on_train_begin(self, model: Any, total_steps: int) -> None:
        """Prepares what acts between steps; raises MethodError where AdaMSS's allocation runs on several processes."""
        peft_steps.discard_noise(model.base_model)
        if allocation := self._allocation(model):
            import torch

            if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
                raise MethodError("method.arguments.use_asa=true works on one process only; set it to false")
            allocation.begin()

    def penalty(self, model: Any) -> torch.Tensor | None:
        """The losses that peft's tuner defines for the options in use (KaSA)."""
        return peft_steps.penalty(model.base_model)

    def on_step_end(self, model: Any, step: int) -> None:
        """AdaMSS's allocation of subspaces, where ``use_asa`` is set."""
        if allocation := self._allocation(model):
            allocation.step(step)

    def state(self, model: Any) -> dict[str, torch.Tensor]:
        """What AdaMSS's allocation has pruned, and its importances."""
        allocation = self._allocation(model)
        return allocation.state() if allocation else {}

    def load_state(self, model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restores AdaMSS's allocation."""
        if allocation := self._allocation(model):
            allocation.load_state(tensors)

    def _allocation(self, model: Any) -> peft_steps.SubspaceAllocation | None:
        wanted = self._name() == "ADAMSS" and self.arguments.get("use_asa")
        return peft_steps.SubspaceAllocation(model.base_model) if wanted else None

    def _unsupported_reason(self) -> str | None:
        """Why the type, or an option of it, cannot have its effect in a recipe; None where it can."""
        name = self._name()
        if name in UNSUPPORTED:
            return f"method.peft_type={name} {UNSUPPORTED[name]}"
        for option, value in self.arguments.items():
            if value and (reason := UNSUPPORTED_OPTIONS.get((name, option))):
                return f"method.arguments.{option} {reason}"
        init = str(self.arguments.get("init_lora_weights", "")).lower()
        for prefix, reason in UNSUPPORTED_INITS.items() if name == "LORA" else ():
            if init.startswith(prefix):
                return f"method.arguments.init_lora_weights={init} {reason}"
        if name not in ALLOCATES and hasattr(_tuner(name), "update_and_allocate"):
            return f"method.peft_type={name} allocates parameters between steps in a way that peftkit does not know"
        return None

    def _arguments(self) -> dict[str, Any]:
        """The arguments as peft's configuration class takes them.

        MonteCLoRA's noise is drawn for one forward pass at a time: from a larger buffer a resumed run would draw other
        noise.
        """
        values = dict(self.arguments)
        if isinstance(monteclora := values.get("monteclora_config"), dict):
            from peft import MontecloraConfig

            values["monteclora_config"] = MontecloraConfig(**{"buffer_size": 1, **monteclora})
        return values

    def _check_known_targets(self, model_type: str) -> None:
        """Raises MethodError where peft has no modules of its own choice for an architecture."""
        known = getattr(_tuner(self._name()), "target_module_mapping", None)
        if known and model_type not in known:
            raise MethodError(
                f"method.peft_type={self._name()}: peft chooses no modules for {model_type}; name them in "
                f"method.arguments.target_modules, or use {self._alternative()}"
            )

    def _alternative(self) -> str:
        kind = self._name().lower()
        return f"method.kind={kind}" if kind in METHODS else "method.kind=lora"

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


def _check_names(place: str, config_class: type, values: Mapping[str, Any], known: set[str]) -> None:
    for name in values:
        if name not in known:
            raise MethodError(f"{place}: {config_class.__name__} has no '{name}': {did_you_mean(name, known)}")


def _nested_configs(config_class: type) -> dict[str, Any]:
    """The configuration classes of single options, by the name of the option."""
    hints = typing.get_type_hints(config_class)
    return {
        name: option
        for name, hint in hints.items()
        for option in typing.get_args(hint)
        if dataclasses.is_dataclass(option)
    }


def _tuner(name: str) -> Any:
    """peft's class that puts a type's adapters into a model."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    return {str(getattr(key, "value", key)): tuner for key, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()}[name]


def _registered() -> dict[str, Any]:
    """peft's configuration classes by the name of their type."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return {str(getattr(name, "value", name)): config for name, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}

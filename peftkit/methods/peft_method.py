"""Base classes of the methods that peft implements."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from peftkit.errors import MethodError
from peftkit.methods import missed
from peftkit.methods.targets import ALL_LINEAR, Layers, ModuleNames, choose_targets
from peftkit.schema.method import Method
from peftkit.schema.types import LoadedModel

NO_TARGET = "dummy-target-modules"
"""peft's name for an adapter without target modules; modules saved in full still travel with it."""


class PeftMethod(Method):
    """A method that peft implements."""

    @abstractmethod
    def peft_config(self, loaded: LoadedModel) -> Any:
        """peft's configuration of this method for this model; raises MethodError where it does not fit."""

    def apply(self, loaded: LoadedModel) -> None:
        """Wraps the model with peft; raises MethodError with peft's reason where peft refuses."""
        from peft import get_peft_model

        config = self.peft_config(loaded)
        try:
            loaded.model = get_peft_model(loaded.model, config)
        except (ValueError, TypeError, KeyError, NotImplementedError, AttributeError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            name = type(loaded.model).__name__
            raise MethodError(f"method.kind={self.kind} cannot be applied to {name}: {reason}") from error
        loaded.notes += self.missed(loaded)

    def load_adapter(self, loaded: LoadedModel, folder: Path) -> None:
        """Loads the weights of a peft adapter of the same configuration."""
        from peftkit.methods import continuing

        continuing.load_peft(self, loaded, folder)

    def missed(self, loaded: LoadedModel) -> list[str]:
        """Remarks on what stays as it is in the adapted model although its kind was meant to be adapted."""
        return missed.shared_weights(loaded.model)

    def shared_arguments(self, loaded: LoadedModel) -> dict[str, Any]:
        """The arguments that all peft configurations take: the task, and the head, which is trained in full."""
        return {"task_type": task_type(loaded), "modules_to_save": list(loaded.head_names) or None}


class LinearLayerMethod(PeftMethod):
    """A method that adapts linear layers, selected by name, pattern and block."""

    quantizations: ClassVar[tuple[str, ...] | None] = ("nf4", "int8")
    quantized_checkpoints: ClassVar[tuple[str, ...] | None] = ("bitsandbytes",)

    target_modules: ModuleNames = ALL_LINEAR
    """all-linear, names of modules (query, or encoder.layer.0.attention.self.query), or one regular expression that
    matches full module names. The head is never adapted: it is trained in full."""
    exclude_modules: ModuleNames | None = None
    """Modules to leave out: names, or one regular expression."""
    layers: Layers = None
    """Blocks to adapt: their numbers from 0, or -2 for the last two; None for all. auto: as many of the last ones as
    the training rows are estimated to need; {auto: {tolerance: 0.05, at_least: 1, rows: 512}} says how much may be
    lost."""

    def shared_arguments(self, loaded: LoadedModel) -> dict[str, Any]:
        """Those of every method, and the full names of the target modules."""
        chosen = (self.target_modules, self.exclude_modules, self.layers)
        targets = choose_targets(loaded.model, loaded.head_names, *chosen)
        return {**super().shared_arguments(loaded), "target_modules": targets}

    def missed(self, loaded: LoadedModel) -> list[str]:
        """Those of every method, and on weights that ``target_modules`` cannot select or selects in some blocks."""
        chosen = (loaded.model, self.target_modules, loaded.head_names)
        everywhere = missed.partly_matched(*chosen) if self.layers is None else []
        return [*super().missed(loaded), *missed.unselectable_weights(*chosen, self.layers), *everywhere]


def task_type(loaded: LoadedModel, *, prompt: bool = False) -> str | None:
    """peft's name for what the model does; None where it has no wrapper of its own for it.

    Its wrapper for questions leaves out token types and positions, which tell the question from the text, so only a
    learned ``prompt``, which needs one, gets it.
    """
    kinds = {"AutoModel": "FEATURE_EXTRACTION", "AutoModelForCausalLM": "CAUSAL_LM"}
    kinds |= {"AutoModelForMaskedLM": "FEATURE_EXTRACTION"}  # peft has none of its own; this one passes everything on
    kinds |= {"AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM"}
    kinds |= {"AutoModelForSequenceClassification": "SEQ_CLS", "AutoModelForTokenClassification": "TOKEN_CLS"}
    kinds |= {"AutoModelForQuestionAnswering": "QUESTION_ANS"} if prompt else {}
    return kinds.get(loaded.auto_class)

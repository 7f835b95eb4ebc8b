"""LoRA: a low-rank update W + (α/r) B A beside frozen weights, and its variants that need no data to start from.

Hu et al. 2021, arXiv:2106.09685. rsLoRA (α/√r): Kalajdzievski 2023, arXiv:2312.03732. DoRA (magnitude and direction):
Liu et al. 2024, arXiv:2402.09353. PiSSA (principal components first): Meng et al. 2024, arXiv:2404.02948. OLoRA
(orthonormal start): Büyükakyüz 2024, arXiv:2406.01775.

    method: {kind: lora, rank: 8, target_modules: [query, value], layers: -2}   # the last two blocks only
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from peftkit.errors import MethodError, did_you_mean
from peftkit.methods._lora_kernel import accelerate_lora
from peftkit.parts import LoadedModel, Method
from peftkit.recipe import METHODS

if TYPE_CHECKING:
    from torch import nn

    from peftkit.recipe import Recipe

Rank = Annotated[int, Field(ge=1)]
Names = str | tuple[str, ...]
SVD_STARTS = ("pissa", "olora")


@METHODS.register("lora")
class Lora(Method):
    """Low-rank adaptation of linear layers (Hu et al. 2021, arXiv:2106.09685)."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2106.09685"
    default_learning_rate: ClassVar[float] = 1e-3

    kind: Literal["lora"] = "lora"
    rank: Rank = 8
    """Width of the update."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """The update is scaled by alpha / rank; None takes twice the rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on what enters the update."""
    target_modules: Names = "all-linear"
    """all-linear, names of modules (query, or encoder.layer.0.attention.self.query), or one regular expression over
    whole module names. The head is never among them: it is trained in full."""
    exclude_modules: Names | None = None
    """Names of modules, or one regular expression, taken out of the targets."""
    layers: int | tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Blocks that are adapted: their numbers from 0, or -2 for the last two; None for all."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained as well: none, all, or those of the adapted layers."""
    use_rslora: bool = False
    """Scale by alpha / √rank, which keeps large ranks stable (rsLoRA, arXiv:2312.03732)."""
    use_dora: bool = False
    """Train magnitude and direction apart (DoRA, arXiv:2402.09353)."""
    init_lora_weights: Literal["default", "gaussian", "orthogonal", "pissa", "olora"] = "default"
    """Start of A and B. default: Kaiming-uniform and zero; orthogonal: both at once, in halves of the rank that do not
    meet; pissa and olora: factors of the base's own weights, which are taken out of these."""
    rank_pattern: dict[str, Rank] = Field(default_factory=dict)
    """Other ranks for some modules, by name or regular expression."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Other alphas for some modules, by name or regular expression."""

    @field_validator("target_modules", "exclude_modules")
    @classmethod
    def _readable(cls, value: Names | None) -> Names | None:
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"'{value}' is not a regular expression: {error}") from None
        elif value is not None and not value:
            raise ValueError("expected at least one module name, found none")
        return value

    @model_validator(mode="after")
    def _halves(self) -> Lora:
        ranks = {self.rank, *self.rank_pattern.values()}
        if self.init_lora_weights == "orthogonal" and any(rank % 2 for rank in ranks):
            raise ValueError("init_lora_weights=orthogonal shares the rank between A and B: expected an even rank")
        return self

    def check(self, recipe: Recipe) -> None:
        """PiSSA and OLoRA factor the base's weights, which quantized weights do not allow."""
        if recipe.quantization is not None and self.init_lora_weights in SVD_STARTS:
            raise MethodError(
                f"method.init_lora_weights={self.init_lora_weights} factors the base's weights, which "
                f"quantization.kind={recipe.quantization.kind} has rounded; use default, gaussian or orthogonal"
            )

    def apply(self, loaded: LoadedModel) -> None:
        """Puts the update beside every target; raises MethodError when a name or pattern matches nothing."""
        from peft import LoraConfig, get_peft_model

        targets = self.targets(loaded.model, loaded.head_names)
        _check_patterns("rank_pattern", self.rank_pattern, targets)
        _check_patterns("alpha_pattern", self.alpha_pattern, targets)
        alpha = self.alpha if self.alpha is not None else 2 * self.rank
        config = LoraConfig(
            task_type=task_type(loaded),
            r=self.rank,
            lora_alpha=alpha,  # type: ignore[arg-type]  # peft scales by it, whole or not
            lora_dropout=self.dropout,
            target_modules=targets,
            modules_to_save=list(loaded.head_names) or None,
            bias=self.bias,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            init_lora_weights=True if self.init_lora_weights == "default" else self.init_lora_weights,
            rank_pattern=dict(self.rank_pattern),
            alpha_pattern=dict(self.alpha_pattern),
            fan_in_fan_out=_transposed(loaded.model, targets),
        )
        loaded.model = get_peft_model(loaded.model, config)
        accelerate_lora(loaded.model)

    def targets(self, model: nn.Module, heads: tuple[str, ...]) -> list[str]:
        """Full names of the layers to adapt; raises MethodError where a name, a pattern or a layer matches nothing."""
        names = [name for name in linear_names(model) if not set(name.split(".")) & set(heads)]
        chosen = _choose("target_modules", self.target_modules, names)
        if self.exclude_modules is not None:
            out = set(_choose("exclude_modules", self.exclude_modules, names))
            chosen = [name for name in chosen if name not in out]
        if self.layers is not None:
            inside = _block_prefixes(model, self.layers)
            chosen = [name for name in chosen if name.startswith(inside)]
        if not chosen:
            raise MethodError("method: target_modules, exclude_modules and layers together leave no module to adapt")
        return chosen


def task_type(loaded: LoadedModel) -> str:
    """peft's name for what the model does."""
    if not loaded.head_names:
        return "CAUSAL_LM"
    return "SEQ_CLS" if loaded.pooling == "own" else "TOKEN_CLS"


def linear_names(model: nn.Module) -> list[str]:
    """Full names of the linear layers (GPT-2's Conv1D among them), output embeddings left out."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if get_output else None
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not output
    ]


def _choose(field: str, wanted: Names, names: list[str]) -> list[str]:
    """The names that are wanted, in the model's order."""
    if wanted == "all-linear":
        return names
    if isinstance(wanted, str):
        chosen = [name for name in names if re.fullmatch(wanted, name) or _is_suffix(wanted, name)]
        if not chosen:
            raise MethodError(f"method.{field}: '{wanted}' matches no linear module; {_nearest(wanted, names)}")
        return chosen
    for one in wanted:
        if not any(_is_suffix(one, name) for name in names):
            raise MethodError(f"method.{field}: '{one}' matches no linear module; {_nearest(one, names)}")
    return [name for name in names if any(_is_suffix(one, name) for one in wanted)]


def _is_suffix(wanted: str, name: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


def _nearest(wanted: str, names: list[str]) -> str:
    """Compares with as many steps of the module names as were written; block numbers tell nothing."""
    steps = wanted.count(".") + 1
    known = {".".join(name.split(".")[-steps:]) for name in names}
    return did_you_mean(wanted, {name for name in known if not name[:1].isdigit()} or known)


def _check_patterns(field: str, patterns: Mapping[str, object], targets: list[str]) -> None:
    for pattern in patterns:
        if not any(re.fullmatch(rf"(.*\.)?({pattern})", name) for name in targets):
            raise MethodError(f"method.{field}: '{pattern}' matches no adapted module; {_nearest(pattern, targets)}")


def _block_prefixes(model: nn.Module, layers: int | tuple[int, ...]) -> tuple[str, ...]:
    from peftkit.models.blocks import find_blocks

    prefix, blocks = find_blocks(model)
    count = len(blocks)
    wanted = layers if isinstance(layers, tuple) else (layers,)
    if isinstance(layers, int) and layers < 0:
        wanted = tuple(range(count + layers, count))
    wrong = [number for number in wanted if not 0 <= number < count]
    if wrong or not wanted:
        raise MethodError(f"method.layers={layers}: the model has {count} blocks, numbered 0 to {count - 1}")
    return tuple(f"{prefix}.{number}." for number in wanted)


def _transposed(model: nn.Module, targets: list[str]) -> bool:
    """Conv1D keeps its weight as [in, out]."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(model.get_submodule(targets[0]), Conv1D)

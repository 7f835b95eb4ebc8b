"""LoRA: a low-rank update W + (α/r) B A beside frozen weights, and its variants.

Hu et al. 2021, arXiv:2106.09685. rsLoRA (α/√r): Kalajdzievski 2023, arXiv:2312.03732. DoRA (magnitude and direction):
Liu et al. 2024, arXiv:2402.09353. PiSSA (principal components first): Meng et al. 2024, arXiv:2404.02948. OLoRA
(orthonormal start): Büyükakyüz 2024, arXiv:2406.01775. LoftQ (what quantization lost, as a start): Li et al. 2023,
arXiv:2310.08659. EVA (directions of the data's own activations): Paischer et al. 2024, arXiv:2410.07170. LoRA+ (a
faster B): Hayou et al. 2024, arXiv:2402.12354.

    method: {kind: lora, rank: 8, target_modules: [query, value], layers: -2}   # the last two blocks only
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from peftkit.errors import MethodError
from peftkit.methods import loftq_init
from peftkit.methods.layers.lora import accelerate_lora
from peftkit.methods.targets import (
    Blocks,
    Names,
    PeftMethod,
    Rate,
    check_patterns,
    choose_targets,
    task_type,
    transposed,
)
from peftkit.models.quantization.checkpoint import quantized_with
from peftkit.models.sources import folder_of, resolve
from peftkit.schema.registries import METHODS
from peftkit.schema.types import Batch, LoadedModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from peftkit.schema.recipe import Recipe

Rank = Annotated[int, Field(ge=1)]
NEED_WEIGHTS = ("pissa", "olora", "orthogonal")
"""Starts that peft forms from the base's weights: their factors, or matrices of their dtype."""


NEEDS_NF4 = (
    "method.init_lora_weights=loftq starts from what quantization to NF4 rounds off; set quantization.kind=nf4, or use "
    "another start"
)


@METHODS.register("lora")
class Lora(PeftMethod):
    """Low-rank adaptation of linear layers (Hu et al. 2021, arXiv:2106.09685)."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2106.09685"
    default_learning_rate: ClassVar[float] = 1e-3

    kind: Literal["lora"] = "lora"
    rank: Rank = 8
    """Width of the update."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """The update is scaled by alpha / rank; None takes twice the rank."""
    dropout: Rate = 0.0
    """Dropout on what enters the update."""
    target_modules: Names = "all-linear"
    """all-linear, names of modules (query, or encoder.layer.0.attention.self.query), or one regular expression over
    whole module names. The head is never among them: it is trained in full."""
    exclude_modules: Names | None = None
    """Names of modules, or one regular expression, taken out of the targets."""
    layers: Blocks | None = None
    """Blocks that are adapted: their numbers from 0, or -2 for the last two; None for all."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained as well: none, all, or those of the adapted layers."""
    use_rslora: bool = False
    """Scale by alpha / √rank, which keeps large ranks stable (rsLoRA, arXiv:2312.03732)."""
    use_dora: bool = False
    """Train magnitude and direction apart (DoRA, arXiv:2402.09353)."""
    init_lora_weights: Literal["default", "gaussian", "orthogonal", "pissa", "olora", "loftq", "eva"] = "default"
    """Start of A and B. default: Kaiming-uniform and zero; orthogonal: both at once, in halves of the rank that do not
    meet; pissa and olora: factors of the base's own weights, which are taken out of these; loftq: factors of what NF4
    rounded off, which `peftkit quantize` fits on training rows; eva: the directions in which the inputs of a few
    training batches vary most."""
    eva_rho: Annotated[float, Field(ge=1)] = 2.0
    """With eva, ranks go to the layers that need them, up to this many times the rank; 1 gives all the same."""
    loraplus_lr_ratio: Annotated[float, Field(ge=1)] = 1.0
    """B learns this many times as fast as A (LoRA+, arXiv:2402.12354, which advises 16)."""
    rank_pattern: dict[str, Rank] = Field(default_factory=dict)
    """Other ranks for some modules, by name or regular expression."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Other alphas for some modules, by name or regular expression."""

    @model_validator(mode="after")
    def _halves(self) -> Lora:
        ranks = {self.rank, *self.rank_pattern.values()}
        if self.init_lora_weights == "orthogonal" and any(rank % 2 for rank in ranks):
            raise ValueError("init_lora_weights=orthogonal shares the rank between A and B: expected an even rank")
        return self

    def check(self, recipe: Recipe) -> None:
        """Some starts need the base's weights unquantized; LoftQ needs what NF4 made of them."""
        super().check(recipe)
        held = recipe.quantization.kind if recipe.quantization is not None else None
        if held and self.init_lora_weights in NEED_WEIGHTS:
            raise MethodError(
                f"method.init_lora_weights={self.init_lora_weights} is made from the base's own weights, which "
                f"quantization.kind={held} has packed; use default, gaussian or eva"
            )
        if held == "int8" and self.use_dora:
            raise MethodError(
                "method.use_dora needs the norms of the base's weights at every step, which its INT8 layers do not "
                "give; set quantization.kind=nf4 or method.use_dora=false"
            )
        if self.init_lora_weights == "loftq" and held == "int8":
            raise MethodError(NEEDS_NF4)

    def check_base(self, config: PreTrainedConfig, recipe: Recipe) -> None:
        """LoftQ stands on NF4 weights: rounded as they are loaded, or already, with its factors beside them."""
        if self.init_lora_weights != "loftq" or recipe.quantization is not None:
            return
        if quantized_with(config) is None:
            raise MethodError(NEEDS_NF4)
        if loftq_init.rank_beside(folder_of(resolve(recipe.model), weights=False)) is None:
            raise MethodError(
                f"method.init_lora_weights=loftq: {recipe.model.source} is quantized already, and has no folder "
                f"{loftq_init.FOLDER} next to its weights; let `peftkit quantize` write one, or use default"
            )

    def unsupported_checkpoint_reason(self, kind: str) -> str | None:
        """Starts that are made from the base's weights need whole ones, and DoRA their norms."""
        start = self.init_lora_weights
        if start in NEED_WEIGHTS or (start == "loftq" and kind != "bitsandbytes"):
            return f"method.init_lora_weights={start} is made from whole weights; use default, gaussian or eva"
        if self.use_dora and kind != "bitsandbytes":
            return "method.use_dora needs the norms of the base's weights at every step; set method.use_dora=false"
        return super().unsupported_checkpoint_reason(kind)

    def unmergeable_reason(self) -> str | None:
        """LoftQ's update makes up for a quantized base, so it is wrong on the whole one."""
        if self.init_lora_weights == "loftq":
            return "an adapter that started from LoftQ holds what NF4 rounded off, and belongs to the NF4 base"
        return super().unmergeable_reason()

    def config(self, loaded: LoadedModel) -> Any:
        """peft's LoraConfig; raises MethodError when a name or pattern matches nothing."""
        from peft import EvaConfig, LoraConfig

        targets = choose_targets(
            loaded.model, loaded.head_names, self.target_modules, self.exclude_modules, self.layers
        )
        check_patterns("rank_pattern", self.rank_pattern, targets)
        check_patterns("alpha_pattern", self.alpha_pattern, targets)
        start = self.init_lora_weights
        return LoraConfig(
            task_type=task_type(loaded),
            r=self.rank,
            lora_alpha=self.alpha if self.alpha is not None else 2 * self.rank,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=targets,
            modules_to_save=list(loaded.head_names) or None,
            bias=self.bias,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            init_lora_weights=True if start in {"default", "loftq"} else start,  # type: ignore[arg-type]
            eva_config=EvaConfig(rho=self.eva_rho) if start == "eva" else None,
            rank_pattern=dict(self.rank_pattern),
            alpha_pattern=dict(self.alpha_pattern),
            fan_in_fan_out=transposed(loaded.model, targets),
        )

    def apply(self, loaded: LoadedModel) -> None:
        """Puts the update beside every target; raises MethodError when a name or pattern matches nothing."""
        super().apply(loaded)
        if self.init_lora_weights == "loftq":
            loftq_init.start(loaded)
        elif note := loftq_init.unused(loaded.model.get_base_model()):
            loaded.notes.append(note)
        accelerate_lora(loaded.model)

    def initialize(self, loaded: LoadedModel, batches: Sequence[Batch]) -> None:
        """EVA looks at a few batches; every other start needs none."""
        if self.init_lora_weights == "eva":
            from peftkit.methods.eva_init import eva

            eva(loaded, batches)
            accelerate_lora(loaded.model)

    def learning_rate_factor(self, name: str) -> float:
        """LoRA+: the ratio for B, 1 for everything else."""
        return self.loraplus_lr_ratio if "lora_B" in name.split(".") else 1.0

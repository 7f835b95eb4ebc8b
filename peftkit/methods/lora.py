"""LoRA: frozen weights plus a trained low-rank update, W + (α/r) B A, and its variants.

Hu et al. 2021, arXiv:2106.09685. rsLoRA: Kalajdzievski 2023, arXiv:2312.03732. DoRA: Liu et al. 2024,
arXiv:2402.09353. PiSSA: Meng et al. 2024, arXiv:2404.02948. OLoRA: Büyükakyüz 2024, arXiv:2406.01775. LoftQ: Li et al.
2023, arXiv:2310.08659. EVA: Paischer et al. 2024, arXiv:2410.07170. LoRA+: Hayou et al. 2024, arXiv:2402.12354.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from peftkit.errors import MethodError
from peftkit.methods import auto_rank, loftq_init
from peftkit.methods.peft_method import LinearLayerMethod
from peftkit.methods.targets import Fraction, check_patterns, fan_in_fan_out
from peftkit.models.quantization.checkpoint import quantized_with
from peftkit.models.sources import folder_of, resolve
from peftkit.schema.automatic import reads
from peftkit.schema.registries import METHODS
from peftkit.schema.types import Batch, LoadedModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from peftkit.schema.recipe import Recipe

Rank = Annotated[int, Field(ge=1)]
Ranks = Annotated[Rank | Literal["auto"] | auto_rank.AutoRank, reads(auto_rank.AutoRank, "auto or a whole number")]
FROM_WEIGHTS = ("pissa", "olora", "orthogonal")
"""Initializations that peft computes from the base's unquantized weights."""
NEEDS_NF4 = (
    "method.init_lora_weights=loftq starts from the error of quantization to NF4; set quantization.kind=nf4, or use "
    "another initialization"
)


@METHODS.register("lora")
class Lora(LinearLayerMethod):
    """Low-rank adaptation of linear layers (Hu et al. 2021, arXiv:2106.09685)."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2106.09685"
    quantizations: ClassVar[tuple[str, ...] | None] = None
    quantized_checkpoints: ClassVar[tuple[str, ...] | None] = None

    kind: Literal["lora"] = "lora"
    rank: Ranks = 8
    """Rank of the update. auto: as large as the training rows are estimated to need; {auto: {at_most: 32, tolerance:
    0.05, rows: 512}} bounds it and says how much may be lost."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """The update is scaled by alpha / rank; None takes twice the rank."""
    dropout: Fraction = 0.0
    """Dropout on the input of the update."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained as well: none, all, or those of the adapted layers."""
    use_rslora: bool = False
    """Scale by alpha / √rank, which keeps large ranks stable (rsLoRA, arXiv:2312.03732)."""
    use_dora: bool = False
    """Train magnitude and direction separately (DoRA, arXiv:2402.09353)."""
    init_lora_weights: Literal["default", "gaussian", "orthogonal", "pissa", "olora", "loftq", "eva"] = "default"
    """Initial A and B. default: Kaiming-uniform and zero; orthogonal: both nonzero, from orthogonal halves of the rank;
    pissa and olora: factors of the base's weights, which are subtracted from them; loftq: factors of the NF4
    quantization error, which `peftkit quantize` fits on training rows; eva: the principal components of the layers'
    inputs over a few training batches."""
    eva_rho: Annotated[float, Field(ge=1)] = 2.0
    """With eva, ranks are redistributed to the layers that need them, up to this many times the rank; 1 keeps them."""
    loraplus_lr_ratio: Annotated[float, Field(ge=1)] = 1.0
    """Learning rate of B divided by that of A (LoRA+, arXiv:2402.12354, which advises 16)."""
    rank_pattern: dict[str, Rank] = Field(default_factory=dict)
    """Other ranks for some modules, by name or regular expression."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Other alphas for some modules, by name or regular expression."""

    @model_validator(mode="after")
    def _check_even_ranks(self) -> Lora:
        ranks = {self.rank, *self.rank_pattern.values()}
        if self.init_lora_weights == "orthogonal" and any(not isinstance(rank, int) or rank % 2 for rank in ranks):
            raise ValueError("init_lora_weights=orthogonal splits the rank between A and B: expected an even rank")
        if self.init_lora_weights == "loftq" and not isinstance(self.rank, int):
            raise ValueError("init_lora_weights=loftq fits factors of one rank ahead of training: expected a number")
        return self

    def probed(self) -> Self:
        """As for every method; the weights' start is the plain one, which no rank is too large for."""
        return super().probed().model_copy(update={"init_lora_weights": "default"})

    def check(self, recipe: Recipe) -> None:
        """Some initializations need the base's weights unquantized; LoftQ needs them in NF4."""
        super().check(recipe)
        quantization, init = recipe.quantization.kind if recipe.quantization else None, self.init_lora_weights
        if quantization and init in FROM_WEIGHTS:
            raise MethodError(
                f"method.init_lora_weights={init} is computed from unquantized weights, and the recipe sets "
                f"quantization.kind={quantization}; use default, gaussian or eva"
            )
        if recipe.model.continues and init in ("loftq", "eva", "gaussian", "orthogonal"):
            raise MethodError(
                f"method.init_lora_weights={init} is for a new adapter, and model.adapter_use=continue starts from a "
                "trained one; set method.init_lora_weights=default"
            )
        if quantization == "int8" and self.use_dora:
            raise MethodError(
                "method.use_dora needs the norms of the base's weights at every step, which INT8 layers do not "
                "provide; set quantization.kind=nf4 or method.use_dora=false"
            )
        if quantization == "int8" and init == "loftq":
            raise MethodError(NEEDS_NF4)

    def check_base(self, config: PreTrainedConfig, recipe: Recipe) -> None:
        """LoftQ needs NF4 weights: quantized while loading, or a checkpoint that comes with LoftQ's factors."""
        if self.init_lora_weights != "loftq" or recipe.quantization is not None:
            return
        if quantized_with(config) is None:
            raise MethodError(NEEDS_NF4)
        if loftq_init.saved_rank(folder_of(resolve(recipe.model), weights=False)) is None:
            raise MethodError(
                f"method.init_lora_weights=loftq: {recipe.model.source} is already quantized, and has no folder "
                f"{loftq_init.FOLDER} next to its weights; write one with `peftkit quantize`, or use default"
            )

    def unsupported_checkpoint_reason(self, kind: str) -> str | None:
        """Initializations from the base's weights need them unquantized, and DoRA needs their norms."""
        init = self.init_lora_weights
        if init in FROM_WEIGHTS or (init == "loftq" and kind != "bitsandbytes"):
            return f"method.init_lora_weights={init} is computed from unquantized weights; use default, gaussian or eva"
        if self.use_dora and kind != "bitsandbytes":
            return "method.use_dora needs the norms of the base's weights at every step; set method.use_dora=false"
        return super().unsupported_checkpoint_reason(kind)

    def unmergeable_reason(self) -> str | None:
        """LoftQ's update corrects a quantized base, so it is wrong on the unquantized one."""
        if self.init_lora_weights == "loftq":
            return "an adapter initialized with LoftQ corrects the error of the NF4 base, and only fits that base"
        return super().unmergeable_reason()

    def peft_config(self, loaded: LoadedModel) -> Any:
        """peft's LoraConfig; raises MethodError when a name or pattern matches nothing."""
        from peft import EvaConfig, LoraConfig

        assert isinstance(self.rank, int), "an automatic rank is chosen before the model is built"
        shared, init = self.shared_arguments(loaded), self.init_lora_weights
        targets = shared["target_modules"]
        check_patterns("rank_pattern", self.rank_pattern, targets)
        check_patterns("alpha_pattern", self.alpha_pattern, targets)
        return LoraConfig(
            **shared,
            r=self.rank,
            lora_alpha=self.alpha if self.alpha is not None else 2 * self.rank,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            **self.model_dump(include={"bias", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"}),
            init_lora_weights=True if init in {"default", "loftq"} else init,  # type: ignore[arg-type]
            eva_config=EvaConfig(rho=self.eva_rho) if init == "eva" else None,
            fan_in_fan_out=fan_in_fan_out(loaded.model, targets),
        )

    def apply(self, loaded: LoadedModel) -> None:
        """Adds the update to every target; raises MethodError when a name or pattern matches nothing."""
        from peftkit.methods.layers.fast_lora import accelerate_lora

        super().apply(loaded)
        if self.init_lora_weights == "loftq":
            loftq_init.initialize(loaded)
        elif note := loftq_init.unused_factors_note(loaded.model.get_base_model()):
            loaded.notes.append(note)
        accelerate_lora(loaded.model)

    def initialize(self, loaded: LoadedModel, batches: Sequence[Batch]) -> None:
        """Runs a few batches for EVA; the other initializations need none."""
        if self.init_lora_weights == "eva":
            from peftkit.methods import eva_init
            from peftkit.methods.layers.fast_lora import accelerate_lora

            eva_init.initialize(loaded, batches)
            accelerate_lora(loaded.model)

    def learning_rate_factor(self, name: str) -> float:
        """LoRA+: the ratio for B, 1 for everything else."""
        return self.loraplus_lr_ratio if "lora_B" in name.split(".") else 1.0

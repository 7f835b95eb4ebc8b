"""AdaLoRA: singular values that are pruned where they matter least, so that rank goes where it is needed.

W + (α/r) P Λ Q with P and Q kept near orthogonal by a penalty; the budget falls from init_r to target_r a layer on
average, along a cubic curve between two shares of the run. Zhang et al. 2023, arXiv:2303.10512.

    method: {kind: adalora, target_r: 8, init_r: 12}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from peftkit.methods.targets import LinearLayerMethod, Rate, transposed
from peftkit.schema.registries import METHODS
from peftkit.schema.types import LoadedModel

if TYPE_CHECKING:
    import torch

PATTERN, IMPORTANCE = "rank_pattern", ("ipt", "exp_avg_ipt", "exp_avg_unc")


@METHODS.register("adalora")
class AdaLora(LinearLayerMethod):
    """LoRA whose ranks are learned (Zhang et al. 2023, arXiv:2303.10512)."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2303.10512"
    default_learning_rate: ClassVar[float] = 2e-3
    quantizations: ClassVar[tuple[str, ...] | None] = ("nf4", "int8")
    packed: ClassVar[tuple[str, ...] | None] = ("bitsandbytes", "gptq")

    kind: Literal["adalora"] = "adalora"
    target_r: Annotated[int, Field(ge=1)] = 8
    """Rank of a layer at the end, on average."""
    init_r: Annotated[int, Field(ge=1)] = 12
    """Rank of every layer at the start."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """The update is scaled by alpha / init_r; None takes twice init_r."""
    dropout: Rate = 0.0
    """Dropout on what enters the update."""
    warmup: Rate = 0.1
    """Share of the run's steps before anything is pruned."""
    final: Rate = 0.3
    """Share of the run's steps at the end, in which the ranks stay as they are."""
    prune_every: Annotated[int, Field(ge=1)] = 10
    """Steps between prunings."""
    beta1: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """Smoothing of a weight's importance."""
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """Smoothing of that importance's uncertainty."""
    orthogonality: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the penalty that keeps P and Q near orthogonal."""

    @model_validator(mode="after")
    def _falls(self) -> AdaLora:
        if self.init_r <= self.target_r:
            raise ValueError(f"init_r={self.init_r} falls to target_r={self.target_r}: expected init_r to be larger")
        if self.warmup + self.final >= 1:
            raise ValueError("warmup and final leave no steps for pruning: expected their sum below 1")
        return self

    def config(self, loaded: LoadedModel) -> Any:
        """peft's AdaLoraConfig; the run's length is told by ``begin``."""
        from peft import AdaLoraConfig

        shared = self.shared(loaded)
        return AdaLoraConfig(
            **shared,
            target_r=self.target_r,
            init_r=self.init_r,
            lora_alpha=self.alpha if self.alpha is not None else 2 * self.init_r,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            tinit=0,
            tfinal=0,
            deltaT=self.prune_every,
            beta1=self.beta1,
            beta2=self.beta2,
            orth_reg_weight=self.orthogonality,
            total_step=1,
            fan_in_fan_out=transposed(loaded.model, shared["target_modules"]),
        )

    def begin(self, model: Any, total: int) -> None:
        """Lays the three phases over the run's steps."""
        config = model.peft_config["default"]
        config.total_step = total
        config.tinit = int(self.warmup * total)
        config.tfinal = min(int(self.final * total), total - config.tinit - 1)

    def penalty(self, model: Any) -> torch.Tensor | None:
        """orthogonality · mean over P and Q of ‖PᵀP − I‖, as peft adds it to the loss that a model returns itself."""
        import torch

        if not self.orthogonality:
            return None
        norms = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("lora_A" in name or "lora_B" in name):
                product = parameter @ parameter.T if "lora_A" in name else parameter.T @ parameter
                norms.append(torch.linalg.norm(product - torch.eye(len(product), device=product.device)))
        return self.orthogonality * torch.stack(norms).mean()

    def after_step(self, model: Any, step: int) -> None:
        """Updates the importances from the step's gradients, and prunes when it is time."""
        model.base_model.update_and_allocate(step)

    def finish(self, model: Any) -> None:
        """Only what is zero may be left out of the export: values pruned before may have come back since."""
        config = model.peft_config["default"]
        if config.rank_pattern:
            config.rank_pattern = {
                name: (parameter != 0).flatten().tolist()
                for name, parameter in model.base_model.model.named_parameters()
                if ".lora_E." in name
            }

    def state(self, model: Any) -> dict[str, torch.Tensor]:
        """Importances and the pattern of ranks."""
        import torch

        allocator, pattern = model.base_model.rankallocator, model.peft_config["default"].rank_pattern or {}
        kept = {f"{PATTERN}/{_full(name)}": torch.tensor(value) for name, value in pattern.items()}
        for field in IMPORTANCE:
            kept |= {f"{field}/{name}": value for name, value in getattr(allocator, field).items()}
        return kept

    def load_state(self, model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
        """Puts importances and pattern back."""
        allocator, config = model.base_model.rankallocator, model.peft_config["default"]
        device = next(model.parameters()).device
        found: dict[str, dict[str, Any]] = {field: {} for field in (PATTERN, *IMPORTANCE)}
        for key, value in tensors.items():
            field, _, name = key.partition("/")
            found[field][name] = value.tolist() if field == PATTERN else value.to(device)
        config.rank_pattern = found[PATTERN] or None
        for field in IMPORTANCE:
            setattr(allocator, field, found[field])


def _full(name: str) -> str:
    """The parameter's name; peft takes the adapter's out of the pattern when it saves."""
    return name if name.endswith(".default") else f"{name}.default"

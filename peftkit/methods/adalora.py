"""AdaLoRA: LoRA in SVD form that prunes the least important singular values, so that rank goes where it is needed.

W + (α/r) P Λ Q, with a penalty that keeps P and Q near orthogonal. The average rank per layer falls from init_r to
target_r along a cubic schedule, after a warmup and before a final phase. Zhang et al. 2023, arXiv:2303.10512.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from peftkit.methods.peft_method import LinearLayerMethod
from peftkit.methods.targets import Fraction, fan_in_fan_out
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
    quantized_checkpoints: ClassVar[tuple[str, ...] | None] = ("bitsandbytes", "gptq")
    continues: ClassVar[bool] = False
    """Its schedule starts from full ranks, and a trained adapter's are pruned."""

    kind: Literal["adalora"] = "adalora"
    target_r: Annotated[int, Field(ge=1)] = 8
    """Average rank per layer at the end."""
    init_r: Annotated[int, Field(ge=1)] = 12
    """Rank of every layer at the start."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """The update is scaled by alpha / init_r; None takes twice init_r."""
    dropout: Fraction = 0.0
    """Dropout on the input of the update."""
    warmup: Fraction = 0.1
    """Fraction of the run's steps before pruning starts."""
    final: Fraction = 0.3
    """Fraction of the run's steps at the end in which ranks no longer change."""
    prune_every: Annotated[int, Field(ge=1)] = 10
    """Steps between prunings."""
    beta1: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """Smoothing of a weight's importance."""
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """Smoothing of that importance's uncertainty."""
    orthogonality: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the penalty that keeps P and Q near orthogonal."""

    @model_validator(mode="after")
    def _check_schedule(self) -> AdaLora:
        if self.init_r <= self.target_r:
            raise ValueError(
                f"init_r={self.init_r} is pruned to target_r={self.target_r}: expected init_r to be larger"
            )
        if self.warmup + self.final >= 1:
            raise ValueError("warmup and final leave no steps for pruning: expected their sum below 1")
        return self

    def peft_config(self, loaded: LoadedModel) -> Any:
        """peft's AdaLoraConfig; ``on_train_begin`` fills in the schedule."""
        from peft import AdaLoraConfig

        shared = self.shared_arguments(loaded)
        return AdaLoraConfig(
            **shared,
            **self.model_dump(include={"target_r", "init_r", "beta1", "beta2"}),
            lora_alpha=self.alpha if self.alpha is not None else 2 * self.init_r,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            tinit=0,
            tfinal=0,
            deltaT=self.prune_every,
            orth_reg_weight=self.orthogonality,
            total_step=1,
            fan_in_fan_out=fan_in_fan_out(loaded.model, shared["target_modules"]),
        )

    def apply(self, loaded: LoadedModel) -> None:
        """Inserts the adapters, and freezes their numbers of ranks, which peft makes trainable on a GPU."""
        super().apply(loaded)
        for name, parameter in loaded.model.named_parameters():
            if ".ranknum." in name:
                parameter.requires_grad_(False)

    def on_train_begin(self, model: Any, total_steps: int) -> None:
        """Divides the run's steps into warmup, pruning and final phase."""
        config = model.peft_config["default"]
        config.total_step = total_steps
        config.tinit = int(self.warmup * total_steps)
        config.tfinal = min(int(self.final * total_steps), total_steps - config.tinit - 1)

    def penalty(self, model: Any) -> torch.Tensor | None:
        """orthogonality · the mean over P and Q of ‖PᵀP − I‖, as peft adds it to the loss that a model returns."""
        import torch

        if not self.orthogonality:
            return None
        norms = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("lora_A" in name or "lora_B" in name):
                gram = parameter @ parameter.T if "lora_A" in name else parameter.T @ parameter
                norms.append(torch.linalg.norm(gram - torch.eye(len(gram), device=gram.device)))
        return self.orthogonality * torch.stack(norms).mean()

    def on_step_end(self, model: Any, step: int) -> None:
        """Updates the importance scores from the step's gradients, and prunes every ``prune_every`` steps."""
        model.base_model.update_and_allocate(step)

    def on_train_end(self, model: Any) -> None:
        """Rebuilds the rank pattern, so that the export drops only zeros: pruned values may have regrown."""
        config = model.peft_config["default"]
        if config.rank_pattern:
            parameters = model.base_model.model.named_parameters()
            config.rank_pattern = {name: (p != 0).flatten().tolist() for name, p in parameters if ".lora_E." in name}

    def state(self, model: Any) -> dict[str, torch.Tensor]:
        """Importance scores and the rank pattern."""
        import torch

        allocator, pattern = model.base_model.rankallocator, model.peft_config["default"].rank_pattern or {}
        # peft strips the adapter's name from the pattern when it saves
        names = {name: f"{name.removesuffix('.default')}.default" for name in pattern}
        tensors = {f"{PATTERN}/{names[name]}": torch.tensor(value) for name, value in pattern.items()}
        for field in IMPORTANCE:
            tensors |= {f"{field}/{name}": value for name, value in getattr(allocator, field).items()}
        return tensors

    def load_state(self, model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restores importance scores and the rank pattern."""
        allocator, config = model.base_model.rankallocator, model.peft_config["default"]
        device = next(model.parameters()).device
        state: dict[str, dict[str, Any]] = {field: {} for field in (PATTERN, *IMPORTANCE)}
        for key, value in tensors.items():
            field, _, name = key.partition("/")
            state[field][name] = value.tolist() if field == PATTERN else value.to(device)
        config.rank_pattern = state[PATTERN] or None
        for field in IMPORTANCE:
            setattr(allocator, field, state[field])

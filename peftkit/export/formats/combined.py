"""Several LoRA adapters on one base as one: adapter arithmetic, by peft's ``add_weighted_adapter``.

linear (Σ w A, Σ w B), svd (Σ w B A, cut to a rank), cat (their exact sum, of the summed rank), TIES (Yadav et al. 2023,
arXiv:2306.01708) and DARE (Yu et al. 2023, arXiv:2311.03099). Each run's own held-out rows are scored with its adapter
alone and with the combination.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from peftkit.errors import MethodError
from peftkit.export.exporter import Exporter
from peftkit.export.folder import ExportFolder
from peftkit.schema.recipe import replace as with_fields
from peftkit.schema.registries import EXPORTERS, METHODS

NAME = "combined"


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, (str, Path)) else value


@EXPORTERS.register("combined")
class Combined(Exporter):
    """The LoRA adapters of several runs on one base, combined into one: linear, svd, cat, TIES or DARE."""

    kind: Literal["combined"] = "combined"
    adapters: Annotated[tuple[str, ...], BeforeValidator(_as_list), Field(min_length=1)]
    """Folders of the other runs."""
    combination: Literal["linear", "svd", "cat", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd",
                         "dare_ties_svd"] = "svd"  # fmt: skip
    """How peft combines them; those ending in svd combine the products B A and cut them to a rank."""
    weights: tuple[float, ...] | None = None
    """Of the run and of each other; None takes 1 / number of runs."""
    density: Annotated[float, Field(gt=0, le=1)] = 0.5
    """With TIES and DARE, the share of values that is kept."""
    rank: Annotated[int, Field(ge=1)] | None = None
    """With svd, the rank; None takes the largest of the runs'."""
    seed: int = 0
    """With DARE, of the values that are dropped."""
    rows: Annotated[int, Field(ge=0)] = 200
    """Held-out rows of each run that are scored; 0 for none."""

    @model_validator(mode="after")
    def _check_weights(self) -> Combined:
        expected = len(self.adapters) + 1
        if self.weights is not None and len(self.weights) != expected:
            raise ValueError(f"weights: expected one per run, {expected}, found {len(self.weights)}")
        if self.rank is not None and not self.combination.endswith("svd"):
            raise ValueError(f"rank: combination={self.combination} keeps the runs' rank; leave it out, or use svd")
        return self

    def unsupported_reason(self, source: ExportFolder) -> str:
        contents = source.manifest
        if contents.saves != "adapter" or source.recipe.method.kind != METHODS.get("lora")().kind:
            method = contents.method
            return f"only LoRA adapters can be combined, and this is '{method}'; export it with --format lora first"
        if contents.heads:
            heads = ", ".join(contents.heads)
            return f"each adapter has layers of its own ({heads}), and heads cannot be combined; use add_adapter"
        return ""

    def other_runs(self) -> tuple[str, ...]:
        return self.adapters

    def export(self, source: ExportFolder, folder: Path) -> None:
        """Combines the adapters and scores the result.

        Raises:
            RunError, ModelError: another run is not finished, or is on another base.
            MethodError: peft cannot combine these adapters.
            ExportError: plain peft does not load the adapter as it was computed.
        """
        from peftkit.export import computed_adapter, multi_adapter
        from peftkit.export.held_out import HeldOutRows, listed
        from peftkit.export.loading import load_exported

        loaded = load_exported(source, device="cpu", dtype="float32", quantized=False).loaded
        runs: dict[str, ExportFolder] = {multi_adapter.FIRST: source}
        for number, path in enumerate(self.adapters, 2):
            added = multi_adapter.read(Path(path), f"run{number}", first=source.manifest, taken=runs)
            multi_adapter.attach(loaded.model, added)
            runs[added.name] = added
        held_out = {
            name: HeldOutRows(run.recipe, run.manifest.info, self.rows) for name, run in runs.items() if self.rows
        }
        before = {}
        for name, rows in held_out.items():
            multi_adapter.activate(loaded.model, name)
            before[name] = rows.score(loaded)
        weights = self.weights or (1 / len(runs),) * len(runs)
        config = self._combine(loaded, list(runs), list(weights))
        after = {name: rows.score(loaded) for name, rows in held_out.items()}
        names = source.manifest.head.metric_names(source.recipe.evaluation)
        described = [
            {
                "recipe": run.manifest.recipe,
                "weight": weight,
                "alone": before.get(name),
                "combined": after.get(name),
            }
            for (name, run), weight in zip(runs.items(), weights, strict=True)
        ]
        computed = {"combination": self.combination, "rank": config.r, "runs": described}
        scores = "".join(
            f"; on {len(rows)} rows of {runs[name].manifest.recipe}: {listed(before[name], names)} alone, "
            f"{listed(after[name], names)} combined"
            for name, rows in held_out.items()
        )
        method = METHODS.get("lora")(
            rank=config.r, alpha=config.lora_alpha, target_modules=sorted(config.target_modules),
            rank_pattern=config.rank_pattern, alpha_pattern=config.alpha_pattern,
        ).model_dump()  # fmt: skip
        recipe = with_fields(source.recipe, name=f"{source.recipe.name}-{NAME}"[:100], method=method, quantization=None)
        summary = f"{len(runs)} adapters are combined by {self.combination} into one of rank {config.r}{scores}"
        computed_adapter.save(self, source, folder, loaded, recipe, computed=computed, summary=summary)

    def _combine(self, loaded: Any, names: list[str], weights: list[float]) -> Any:
        """Leaves the combination as the only adapter of the model; returns its LoraConfig."""
        import torch
        from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

        options: dict[str, Any] = {}
        if self.combination.startswith(("ties", "dare")):
            options["density"] = self.density
        if self.rank is not None:
            options["svd_rank"] = self.rank
        model = loaded.model
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                model.add_weighted_adapter(names, weights, NAME, combination_type=self.combination, **options)
        except (ValueError, RuntimeError, NotImplementedError, TypeError) as error:
            raise MethodError(
                f"combination={self.combination} cannot combine these adapters: {str(error).splitlines()[0]}"
            ) from error
        state: Mapping[str, Any] = get_peft_model_state_dict(model, adapter_name=NAME, save_embedding_layers=False)
        config = model.peft_config[NAME]
        config.inference_mode = False
        loaded.model = get_peft_model(model.unload(), config)
        set_peft_model_state_dict(loaded.model, dict(state))
        loaded.model.requires_grad_(False).eval()
        return config

"""Every type that the installed peft registers, on a tiny encoder and decoder: trained or refused, and why.

python -m tests.methods.peft_types > docs/peft_types.md
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from peftkit.errors import UserError
from peftkit.export import verify_worker
from peftkit.export.folder import open_export
from peftkit.export.formats.merged import Merged
from peftkit.models.third_party import silence_libraries
from tests import tiny
from tests.methods import every_method
from tests.methods.every_method import TASKS

TYPES = sorted(str(getattr(name, "value", name)) for name in PEFT_TYPE_TO_CONFIG_MAPPING)
MODELS = ("encoder", "decoder")
AUTO = {"encoder": AutoModelForSequenceClassification, "decoder": AutoModelForCausalLM}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "ADAMSS": {"r": 8, "num_subspaces": 2},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "CARTRIDGE": {"num_virtual_tokens": 4},
    "FOURIERFT": {"n_frequency": 50},
    "GRALORA": {"r": 4},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 8},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "PSOFT": {"r": 8},
    "P_TUNING": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"token_indices": [5, 6, 7]},
    "VBLORA": {"r": 2, "num_vectors": 16, "vector_length": 8},
    "WAVEFT": {"n_frequency": 50},
}
"""What the tiny models need in place of defaults that are sized for real ones; other types run on their defaults."""


@dataclass(frozen=True)
class Case:
    """One peft type, or an option of one, on one tiny model."""

    peft_type: str
    model: str
    arguments: dict[str, Any] = field(default_factory=dict, compare=False)
    quantization: None = None

    def __str__(self) -> str:
        return f"{self.peft_type}-{'-'.join(self.arguments) or 'default'}-{self.model}"

    def recipe(self, folder: Path, **parts: Any) -> Any:
        """The case as a recipe."""
        arguments = {**ARGUMENTS.get(self.peft_type, {}), **self.arguments}
        method = {"kind": "peft", "peft_type": self.peft_type, "arguments": arguments}
        data = {"source": "none.csv", "max_length": 64}
        return tiny.tiny_recipe(
            folder, **{"method": method, "task": {"kind": TASKS[self.model]}, "data": data, **parts}
        )


def bases(folder: Path) -> dict[str, Path]:
    """The tiny models."""
    return {"encoder": tiny.tiny_bert(folder / "bert"), "decoder": tiny.tiny_llama(folder / "llama")}


def walk(case: Case, base: Path, work: Path) -> SimpleNamespace:
    """What became of a case.

    ``refused`` says why; of a trained one, ``still`` names the trainable parameters that did not move, ``strays`` the
    frozen ones that did, ``reloaded`` is how far plain peft's logits are from the trained model's, in their standard
    deviations, and ``merged`` the same for the merged model, or why it cannot be merged.
    """
    try:
        made = every_method.train(case, base, rate=2e-2)
    except UserError as error:
        return SimpleNamespace(refused=str(error))
    trained = {name for name, p in made.loaded.model.named_parameters() if p.requires_grad}
    saved = every_method.save(made, work / "adapter")
    again = verify_worker.load(saved["job"]).eval()
    with torch.no_grad():
        logits = verify_worker.logits(again, saved["batch"], saved["job"]["pooling"])
    return SimpleNamespace(
        refused="", losses=made.losses, still=sorted(trained - made.changed), strays=sorted(made.changed - trained),
        reloaded=_distance(logits, saved), merged=_merged(case, made.recipe.method, saved, work / "merged"), made=made,
    )  # fmt: skip


def _merged(case: Case, method: Any, saved: dict[str, Any], folder: Path) -> float | str:
    if reason := method.unmergeable_reason():
        return str(reason)
    folder.mkdir()
    try:
        Merged().write(open_export(saved["job"]["folder"]), folder, tolerance=None)
    except UserError as error:
        return str(error).partition(": ")[2]
    model = AUTO[case.model].from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(**saved["batch"]).logits
    return _distance(logits if case.model == "encoder" else logits[saved["batch"]["attention_mask"].bool()], saved)


def _distance(logits: torch.Tensor, saved: dict[str, Any]) -> float:
    return float((logits - saved["logits"]).abs().max() / saved["logits"].std())


def check(found: SimpleNamespace) -> None:
    """Asserts that a trained case learned, moved all that it should and nothing else, and comes back the same."""
    if found.refused:
        return
    assert found.losses[-1] < found.losses[0]
    # GLoRA scales biases, which are zero in a new BERT
    assert not [name for name in found.still if "glora_D" not in name]
    assert not found.strays
    assert found.reloaded < 1e-4
    assert isinstance(found.merged, str) or found.merged < 1e-3


def cell(found: SimpleNamespace) -> str:
    """A case in the table."""
    if found.refused:
        reason = found.refused.removeprefix("recipe 'tiny': ")
        return "refused: " + reason.replace("method.kind=peft cannot be applied to ", "")
    notes = [found.merged] if isinstance(found.merged, str) else []
    return "; ".join(["trained, reloaded" + ("" if notes else ", merged"), *notes])


def table(found: dict[tuple[str, str], SimpleNamespace]) -> str:
    """The page of the documentation."""
    lines = ["| peft_type | encoder (BERT classifier) | decoder (Llama) |", "|---|---|---|"]
    for name in TYPES:
        lines.append(f"| `{name}` | " + " | ".join(cell(found[name, model]) for model in MODELS) + " |")
    return "\n".join(lines) + "\n"


HEADING = """# Types of peft under `kind: peft`

Every type that peft registers, with default targets, on tiny models. "Trained" means that every trainable parameter
moved and no frozen one did (GLoRA's scale of a bias that is zero excepted); "reloaded", that plain peft gives the same
outputs from what was saved; "merged", that the merged model does. This page is written by
`python -m tests.methods.peft_types`.

"""


def main() -> None:
    """Prints the page."""
    silence_libraries()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folders = bases(Path(place))
        found = {}
        for name in TYPES:
            for model in MODELS:
                case, work = Case(name, model), Path(place) / f"{name}-{model}"
                work.mkdir()
                found[name, model] = walk(case, folders[model], work)
                check(found[name, model])
        print(HEADING + table(found), end="")


if __name__ == "__main__":
    main()

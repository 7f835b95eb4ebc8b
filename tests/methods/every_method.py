"""What tests of every method share: an example of each kind, tiny models, a few training steps, and plain reloading."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from peftkit.export import adapter, manifest, proof, verify_worker
from peftkit.models.loading import build
from peftkit.models.third_party import silence_libraries
from peftkit.models.tokenizer import load_tokenizer
from peftkit.schema.head import head_of
from peftkit.schema.types import TaskInfo
from peftkit.training.optimizer import build_optimizer
from peftkit.training.step import TaskModule
from tests import tiny, warm

STEPS = 6
TEXTS = ["good movie", "the bank and the price of oil", "a game", "science and software in space", "bad plot"]
CLASSES = TaskInfo("single_label_classification", ("bad", "good", "other"))
INFOS = {"encoder": CLASSES, "decoder": TaskInfo("causal_lm"), "decoder-classifier": CLASSES}
TASKS = {"encoder": "classification", "decoder": "style", "decoder-classifier": "classification"}


@dataclass(frozen=True)
class Example:
    """A method as a recipe would write it for tiny models, and the parameters that it trains besides the head."""

    trains: str
    """Regular expression that is searched for in parameter names."""
    arguments: dict[str, Any] = field(default_factory=dict)
    models: tuple[str, ...] = ("encoder", "decoder", "decoder-classifier")
    learning_rate: float = 2e-2


PROMPT = {"virtual_tokens": 4}
NO_TOKENS = ("encoder", "decoder")
"""Models of methods that give vectors in place of tokens, by which a decoder's classifier finds the last one."""
EXAMPLES: dict[str, Example] = {
    "adalora": Example(r"lora_[ABE]\.default", {"target_r": 2, "init_r": 4, "prune_every": 1}),
    "bitfit": Example(r"bias$", models=("encoder",)),
    "bottleneck-houlsby": Example(r"bottleneck_adapters\.", {"variant": "houlsby", "size": 4}),
    "bottleneck-parallel": Example(r"bottleneck_adapters\.", {"variant": "parallel", "size": 4}),
    "boft": Example(r"boft_[Rs]\.default", {"block_size": 4}),
    "frozen": Example(r"$^", models=("encoder", "decoder-classifier")),
    "ia3": Example(r"ia3_l\.default"),
    "ln_tuning": Example(r"[Nn]orm.*default"),
    "lora": Example(r"lora_[AB]\.default", {"rank": 4}),
    "lora-dora": Example(r"lora_(A|B|magnitude_vector)\.default", {"rank": 4, "use_dora": True}),
    "lora-rslora": Example(r"lora_[AB]\.default", {"rank": 4, "use_rslora": True}),
    "lora-pissa": Example(r"lora_[AB]\.default", {"rank": 4, "init_lora_weights": "pissa"}),
    "lora-olora": Example(r"lora_[AB]\.default", {"rank": 4, "init_lora_weights": "olora"}),
    "lora-orthogonal": Example(r"lora_[AB]\.default", {"rank": 4, "init_lora_weights": "orthogonal"}),
    "lora-loftq": Example(r"lora_[AB]\.default", {"rank": 4, "init_lora_weights": "loftq"}),
    "lora-eva": Example(
        r"lora_[AB]\.default", {"rank": 2, "init_lora_weights": "eva", "exclude_modules": ["pooler.dense"]},
        models=("encoder",),
    ),
    "lora-eva-decoder": Example(
        r"lora_[AB]\.default", {"rank": 2, "init_lora_weights": "eva"}, models=("decoder", "decoder-classifier"),
    ),
    "miss": Example(r"miss_block\.default", {"rank": 4}),
    "oft": Example(r"oft_R\.default", {"block_size": 8}),
    "p_tuning": Example(r"prompt_encoder\.default", {**PROMPT, "encoder_size": 16}, models=NO_TOKENS),
    "prefix_tuning": Example(r"prompt_encoder\.default", PROMPT),
    "prompt_tuning": Example(r"prompt_encoder\.default", PROMPT, models=NO_TOKENS),
    "trainable_tokens": Example(r"trainable_tokens_delta\.default", {"tokens": ["a", "b", "o"]}),
    "vera": Example(r"vera_lambda_[bd]\.default", {"rank": 8}),
    "peft-LOHA": Example(r"hada_.*default", {"peft_type": "LOHA", "arguments": {"r": 2}}),
    "peft-HIRA": Example(r"hira_[AB]\.default", {"peft_type": "hira", "arguments": {"r": 2}}),
    "peft-ROAD": Example(r"road_.*default", {"peft_type": "ROAD", "arguments": {"group_size": 4}}),
    "peft-CARTRIDGE": Example(
        r"trainable_embedding", {"peft_type": "CARTRIDGE", "arguments": {"num_virtual_tokens": 4}},
        models=("decoder",),
    ),
}  # fmt: skip
QUANTIZATIONS = (None, "nf4", "int8")


@dataclass(frozen=True)
class Cell:
    """One place in the table of methods."""

    example: str
    model: str
    quantization: str | None

    def __str__(self) -> str:
        return f"{self.example}-{self.model}-{self.quantization or 'none'}"

    def recipe(self, folder: Path, **parts: Any) -> Any:
        """The cell as a recipe."""
        example = EXAMPLES[self.example]
        method = {"kind": self.example.partition("-")[0], **example.arguments}
        quantization = {"kind": self.quantization} if self.quantization else None
        fields = {"method": method, "quantization": quantization, "task": {"kind": TASKS[self.model]}}
        data = {"source": "none.csv", "max_length": 64}
        return tiny.tiny_recipe(folder, **{**fields, "data": data, **parts})


def train(cell: Any, folder: Path, steps: int = STEPS, rate: float | None = None) -> SimpleNamespace:
    """The cell's model, trained for a few steps on one batch, with what changed and how the loss went.

    A cell has a ``model`` and makes a ``recipe``; one of EXAMPLES knows its rate and which parameters it trains.
    """
    training = {"learning_rate": rate or EXAMPLES[cell.example].learning_rate, "weight_decay": 0.0}
    recipe, info = cell.recipe(folder, training=training), INFOS[cell.model]
    tokenizer = load_tokenizer(recipe.model)
    loaded = build(recipe, info, tokenizer)
    batch, method = made_batch(tokenizer, cell.model), recipe.method
    method.initialize(loaded, [batch])
    method.on_train_begin(loaded.model, steps)
    before = {name: parameter.detach().clone() for name, parameter in loaded.model.named_parameters()}
    module = TaskModule(loaded, head_of(info, recipe.task))
    optimizer = build_optimizer(module, recipe)
    losses = [measured(module, batch)]
    for step in range(steps):
        module.train()
        loss = module(batch) / len(batch["input_ids"])
        penalty = method.penalty(loaded.model)  # after the forward pass, as a step does: some are about its noise
        (loss + (0.0 if penalty is None else penalty)).backward()
        optimizer.step()
        method.on_step_end(loaded.model, step + 1)
        optimizer.zero_grad()
    method.on_train_end(loaded.model)
    losses.append(measured(module, batch))
    after = dict(loaded.model.named_parameters())
    return SimpleNamespace(
        cell=cell, recipe=recipe, info=info, loaded=loaded, batch=batch, losses=losses, module=module,
        changed={name for name, value in before.items() if not torch.equal(value, after[name])},
        declared={name for name in after if isinstance(cell, Cell) and declared(cell, loaded, name)},
    )  # fmt: skip


@torch.no_grad()
def measured(module: TaskModule, batch: dict[str, torch.Tensor]) -> float:
    """The loss in evaluation mode."""
    module.eval()
    return float(module(batch)) / len(batch["input_ids"])


def declared(cell: Cell, loaded: Any, name: str) -> bool:
    """Whether the method says that it trains the parameter: its own pattern, or the copy of the head."""
    head = bool(set(loaded.head_names) & set(name.split("."))) and "original_module" not in name
    return head or bool(re.search(EXAMPLES[cell.example].trains, name))


def made_batch(tokenizer: Any, model: str) -> dict[str, torch.Tensor]:
    """Five ragged rows, padded on the tokenizer's side."""
    batch = dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if model != "decoder":
        return {**batch, "labels": torch.tensor([1, 2, 2, 2, 0])}
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def save(made: SimpleNamespace, folder: Path) -> dict[str, Any]:
    """Writes the adapter as a run does; what a fresh process is told, and the logits that it must give."""
    folder.mkdir(parents=True)
    about = manifest.build_manifest(made.loaded, made.recipe, made.info, "float32")
    adapter.save(folder, made.loaded, made.recipe, about, {})
    batch = {name: made.batch[name] for name in ("input_ids", "attention_mask")}
    logits = proof.trained_logits(made.loaded, about, batch)
    return {"job": proof.job_for(about, folder, torch.device("cpu")), "batch": batch, "logits": logits}


def reload(saved: dict[str, dict[str, Any]], work: Path) -> dict[str, torch.Tensor]:
    """The logits that one fresh process with plain peft and transformers gives for every saved adapter."""
    for name, one in saved.items():
        (work / f"{name}.json").write_text(json.dumps(one["job"]), encoding="utf-8")
        save_file({key: value.contiguous() for key, value in one["batch"].items()}, work / f"{name}.inputs")
    done = warm.run(
        [sys.executable, str(Path(__file__)), str(work)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: load_file(work / f"{name}.logits")["logits"] for name in saved}


def main(work: Path) -> None:
    """Loads every job of a folder with the script that exports are proven by."""
    silence_libraries()
    torch.set_num_threads(1)
    for file in sorted(work.glob("*.json")):
        job = json.loads(file.read_text(encoding="utf-8"))
        model = verify_worker.load(job).eval()
        with torch.no_grad():
            found = verify_worker.logits(model, load_file(file.with_suffix(".inputs")), job["pooling"])
        save_file({"logits": found.contiguous()}, file.with_suffix(".logits"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

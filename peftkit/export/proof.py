"""The proof that an export is what was trained: a fresh process loads it with plain peft and transformers.

Both sides hold the weights as in training (the base rounded to bf16 where it was) and see the same tokens. They compute
in fp32, where the order of operations hardly matters, so that a difference means other weights; over a quantized base,
whose products have a precision of their own, both take peft's and transformers' own way in the dtype of training. The
figure is the largest difference of two logits, divided by the standard deviation of the trained model's logits.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from peftkit.data.batching import collate
from peftkit.errors import ExportError
from peftkit.export.manifest import Manifest
from peftkit.methods.layers.lora import use_peft_forward
from peftkit.models import dtypes
from peftkit.models.kernels.attention import torch_attention
from peftkit.models.quantization.checkpoint import KERNELS
from peftkit.schema.head import Head
from peftkit.schema.types import LoadedModel

FILE = "proof.json"
SCRIPT = Path(__file__).with_name("verify_worker.py")
MINUTES = 20


@dataclass(frozen=True)
class Proof:
    """What proof.json says."""

    passed: bool
    relative: float
    """Largest difference of logits ÷ their standard deviation."""
    tolerance: float
    largest_difference: float
    spread: float
    rows: int
    logits: int
    same_choice: float
    """Share of rows (or tokens) whose likeliest class (or token) is the same."""
    dtype: str
    device: str
    versions: dict[str, str]


def choose_rows(encoded: Any, head: Head) -> list[dict[str, Any]]:
    """A few held-out examples of several lengths: model inputs only."""
    name = next(split for split in ("test", "validation", "train") if split in encoded.splits)
    split = encoded.splits[name]
    order = sorted(range(len(split.lengths)), key=lambda index: (int(split.lengths[index]), index))
    count = min(len(order), head.proof_rows)
    chosen = [order[(len(order) - 1) * step // max(1, count - 1)] for step in range(count)]
    inputs = [column for column in head.model_inputs if column in split.examples.column_names]
    return [{column: list(split.examples[index][column])[: head.proof_tokens] for column in inputs} for index in chosen]


def prove(
    folder: Path, loaded: LoadedModel, about: Manifest, rows: Sequence[dict[str, Any]], tolerance: float
) -> Proof:
    """Compares the export in ``folder`` with the trained model and writes proof.json into it.

    Raises:
        ExportError: the fresh process could not load the export at all.
    """
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    batch = about.head.collate(columns, loaded.tokenizer) or collate(columns, loaded.tokenizer)
    device = next(loaded.model.parameters()).device
    trained = _trained_logits(loaded, about, batch, device)
    return compare(folder, job_for(about, folder, device), batch, trained, tolerance)


def job_for(about: Manifest, folder: Path, device: torch.device, **changes: Any) -> dict[str, Any]:
    """What the fresh process is told: everything that the card tells a reader."""
    job = {
        "folder": str(folder.resolve()),
        "saves": about.saves,
        "auto_class": about.auto_class,
        "base": about.base,
        "revision": about.revision,
        "heads": list(about.heads),
        "pooling": about.pooling,
        "held": about.dtype if about.saves == "adapter" else "float32",
        "dtype": about.dtype if _quantization(about) else "float32",
        "quantization": _quantization(about),
        "device": device.type,
        "threads": torch.get_num_threads(),
    }
    return {**job, **changes}


def compare(folder: Path, job: dict[str, Any], batch: dict[str, Tensor], trained: Tensor, tolerance: float) -> Proof:
    """Runs the fresh process on a batch and holds its logits against ``trained`` [rows, labels] or [tokens, words]."""
    again, versions = _fresh_logits(job, batch)
    if again.shape != trained.shape:
        raise ExportError(
            f"the export gives logits of shape {tuple(again.shape)}, training gave {tuple(trained.shape)}"
        )
    difference = (again.double() - trained.double()).abs().max().item()
    spread = max(trained.double().std(correction=0).item(), 1e-12)
    relative = difference / spread
    proof = Proof(
        passed=relative <= tolerance,  # False for NaN, too
        relative=relative,
        tolerance=tolerance,
        largest_difference=difference,
        spread=spread,
        rows=len(batch["input_ids"]),
        logits=trained.numel(),
        same_choice=(again.argmax(-1) == trained.argmax(-1)).double().mean().item(),
        dtype=job["dtype"],
        device=job["device"],
        versions=versions,
    )
    (folder / FILE).write_text(json.dumps(asdict(proof), indent=2) + "\n", encoding="utf-8")
    return proof


def read(folder: Path) -> dict[str, Any] | None:
    """proof.json of a folder, or None where nothing was proven."""
    file = folder / FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


@torch.no_grad()
def _trained_logits(loaded: LoadedModel, about: Manifest, batch: dict[str, Tensor], device: torch.device) -> Tensor:
    model = loaded.model
    was_training = model.training
    model.eval()
    moved = {name: tensor.to(device) for name, tensor in batch.items()}
    quantized = _quantization(about) is not None
    dtype = getattr(torch, about.dtype) if quantized else torch.float32
    own_way = _plain_kernels(model) if quantized else _in_fp32(model)
    with own_way, dtypes.autocast(dtype, device):
        scores = about.head.plain_logits(model, moved, about.pooling)
    model.train(was_training)
    return scores.cpu()


@contextlib.contextmanager
def _plain_kernels(model: torch.nn.Module) -> Iterator[None]:
    """peft's layers and torch's attention, to the last bit what a fresh process takes."""
    with use_peft_forward(model), torch_attention(model):
        yield


@contextlib.contextmanager
def _in_fp32(model: torch.nn.Module) -> Iterator[None]:
    """Widens frozen half-precision weights, which loses nothing, and narrows them again, which restores them."""
    before = {name: parameter.dtype for name, parameter in model.named_parameters()}
    model.float()
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(before[name])


def _fresh_logits(job: dict[str, Any], batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, str]]:
    with tempfile.TemporaryDirectory(prefix="peftkit-proof-") as place:
        work = Path(place)
        save_file({name: tensor.contiguous() for name, tensor in batch.items()}, work / "inputs.safetensors")
        (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1"}
        # the fresh process is alone, whatever launched this one
        distributed = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
        environment = {name: value for name, value in os.environ.items() if name not in distributed}
        try:
            done = subprocess.run(
                [sys.executable, "-I", str(SCRIPT), str(work)], env=environment | quiet, capture_output=True,
                text=True, timeout=60 * MINUTES, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise ExportError(f"the fresh process did not load the export within {MINUTES} minutes") from None
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ExportError(f"plain peft and transformers cannot load the export in a fresh process: {last}")
        versions = json.loads((work / "versions.json").read_text(encoding="utf-8"))
        return load_file(work / "logits.safetensors")["logits"], versions


def _quantization(about: Manifest) -> dict[str, Any] | None:
    """The recipe's quantization in transformers' own words."""
    if about.quantization is None or about.saves == "model":
        return None
    heads = [*about.heads, ".*pooler"] if about.heads else ["lm_head"]  # as in models.loading.never_quantized
    if about.quantization["kind"] in KERNELS:
        return {"checkpoint": about.quantization["kind"]}
    if about.quantization["kind"] == "nf4":
        return {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": about.quantization["double"],
            "bnb_4bit_compute_dtype": about.dtype,
            "llm_int8_skip_modules": heads,
        }
    threshold = about.quantization["threshold"]
    return {"load_in_8bit": True, "llm_int8_threshold": threshold, "llm_int8_skip_modules": heads}

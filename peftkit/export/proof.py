"""The proof of an export: its logits, in a fresh process, compared with those of the trained model.

Both sides see the same tokens and hold the weights as in training (the base rounded to bf16 if it was). They compute
in fp32, where the order of operations hardly matters, so that a difference means different weights. Over a quantized
base, whose matmuls have a precision of their own, both use the plain layers of peft and transformers in the dtype of
training. The difference is the largest one of any logit, divided by the standard deviation of the trained model's.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from peftkit.data.batching import IGNORE, collate
from peftkit.errors import ExportError
from peftkit.export.manifest import Manifest
from peftkit.methods.layers.fast_lora import use_peft_forward
from peftkit.models import dtypes
from peftkit.models.kernels.attention import torch_attention
from peftkit.models.loading import never_quantized
from peftkit.models.quantization.checkpoint import KERNELS
from peftkit.schema.head import Head
from peftkit.schema.registries import QUANTIZATIONS
from peftkit.schema.types import LoadedModel

FILE = "proof.json"
WORKER = Path(__file__).with_name("verify_worker.py")
MINUTES = 20
SAMPLE = "The quick brown fox jumps over the lazy dog."
TEXTS = (SAMPLE, SAMPLE.upper(), f"{SAMPLE} {SAMPLE}", "?")
"""Proof of exports that are written when the run's own rows are no longer at hand."""
CPU = torch.device("cpu")


class ExportProof(Protocol):
    """What an export is proven by; ``Proof`` compares logits."""

    def write(self, folder: Path) -> None:
        """Writes proof.json into a folder."""

    def check(self, what: str) -> None:
        """Raises ExportError unless the proof passed."""


@dataclass(frozen=True)
class Proof:
    """The contents of proof.json of an export whose logits were compared."""

    passed: bool
    relative: float
    """Largest difference of two logits ÷ the standard deviation of the trained model's."""
    tolerance: float
    largest_difference: float
    spread: float
    """Standard deviation of the trained model's logits."""
    rows: int
    logits: int
    same_choice: float
    """Share of rows (or tokens) with the same likeliest class (or token)."""
    dtype: str
    device: str
    versions: dict[str, str] | None = None
    """Of the libraries in the fresh process; None if there was none."""

    def write(self, folder: Path) -> None:
        values = {name: value for name, value in asdict(self).items() if value is not None}
        (folder / FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    def check(self, what: str = "the export", allowed_by: str = "export.tolerance") -> None:
        """Raises ExportError unless the proof passed."""
        if not self.passed:
            raise ExportError(
                f"{what}: its logits differ from the trained model's by {self.relative:.2g} of their standard "
                f"deviation; {allowed_by} allows {self.tolerance:g}"
            )


def read(folder: Path) -> dict[str, Any] | None:
    """proof.json of a folder, or None if nothing was proven."""
    file = folder / FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def choose_rows(encoded: Any, head: Head) -> list[dict[str, Any]]:
    """The model inputs of a few held-out examples of different lengths."""
    name = next(split for split in ("test", "validation", "train") if split in encoded.splits)
    split = encoded.splits[name]
    order = sorted(range(len(split.lengths)), key=lambda index: (int(split.lengths[index]), index))
    count = min(len(order), head.proof_rows)
    chosen = [order[(len(order) - 1) * step // max(1, count - 1)] for step in range(count)]
    inputs = [column for column in head.model_inputs if column in split.examples.column_names]
    return [{column: list(split.examples[index][column])[: head.proof_tokens] for column in inputs} for index in chosen]


def prove(
    folder: Path, loaded: LoadedModel, manifest: Manifest, rows: Sequence[dict[str, Any]], tolerance: float
) -> Proof:
    """Compares an adapter or model that peft and transformers can load with the model that it was written from.

    Raises:
        ExportError: the fresh process could not load the export.
    """
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    batch = manifest.head.collate(columns, loaded.tokenizer) or collate(columns, loaded.tokenizer)
    device = next(loaded.model.parameters()).device
    return prove_batch(folder, manifest, batch, trained_logits(loaded, manifest, batch), tolerance, device=device)


def prove_loader(
    folder: Path, loaded: LoadedModel, manifest: Manifest, load: Callable[[Path], Any], tolerance: float
) -> Proof:
    """Compares an export of any other format with the model that it was written from, on a few texts.

    Args:
        folder: the export.
        loaded: the model in fp32 on the CPU, and its tokenizer.
        manifest: of the run.
        load: a function at the top level of an importable module. A fresh process calls it with the folder; what it
            returns is called with ``input_ids`` and ``attention_mask`` and returns an object with ``logits``.
        tolerance: allowed difference, relative to the standard deviation of the logits.

    Raises:
        ExportError: the fresh process failed.
    """
    manifest = replace(manifest, quantization=None, dtype="float32")
    batch = sample_batch(loaded.tokenizer, manifest)
    trained = trained_logits(loaded, manifest, batch)
    return prove_batch(folder, manifest, batch, trained, tolerance, loader=f"{load.__module__}:{load.__qualname__}")


def prove_batch(
    folder: Path, manifest: Manifest, batch: dict[str, Tensor], trained: Tensor, tolerance: float, *,
    device: torch.device = CPU, loader: str | None = None,
) -> Proof:  # fmt: skip
    """Compares the logits of a fresh process with ``trained`` [rows, labels] or [tokens, vocabulary]."""
    job = {**job_for(manifest, folder, device), "loader": loader}
    exported, versions = _fresh_logits(job, batch)
    return compare_logits(
        exported, trained, tolerance, rows=len(batch["input_ids"]), dtype=job["dtype"], device=job["device"],
        versions=versions,
    )  # fmt: skip


def sample_batch(tokenizer: Any, manifest: Manifest) -> dict[str, Tensor]:
    """A few texts of different lengths, tokenized and padded."""
    encoded = tokenizer(list(TEXTS), padding=True, return_tensors="pt")
    if manifest.head.encodes_source:  # whose targets may be any texts
        encoded["labels"] = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, IGNORE)
    return {name: encoded[name] for name in manifest.head.model_inputs if name in encoded}


@torch.no_grad()
def trained_logits(loaded: LoadedModel, manifest: Manifest, batch: dict[str, Tensor]) -> Tensor:
    """The logits [rows, labels] or [tokens, vocabulary] on the CPU that an export must reproduce."""
    model = loaded.model
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    quantized = _quantization(manifest) is not None
    dtype = getattr(torch, manifest.dtype) if quantized else torch.float32
    with contextlib.ExitStack() as stack:
        # over a quantized base the layers of a fresh process, so that every bit is the same
        for context in (use_peft_forward(model), torch_attention(model)) if quantized else (_in_fp32(model),):
            stack.enter_context(context)
        with dtypes.autocast(dtype, device):
            logits = manifest.head.plain_logits(model, batch, manifest.pooling)
    model.train(was_training)
    return logits.cpu()


def compare_logits(
    exported: Tensor, trained: Tensor, tolerance: float, *, rows: int, dtype: str, device: str = "cpu",
    versions: dict[str, str] | None = None,
) -> Proof:  # fmt: skip
    """The proof of an export from its logits; raises ExportError if their shape differs from the trained model's."""
    if exported.shape != trained.shape:
        raise ExportError(
            f"the export gives logits of shape {tuple(exported.shape)}, training gave {tuple(trained.shape)}"
        )
    difference = (exported.double() - trained.double()).abs().max().item()
    spread = max(trained.double().std(correction=0).item(), 1e-12)
    return Proof(
        passed=difference / spread <= tolerance,  # False for NaN, too
        relative=difference / spread,
        tolerance=tolerance,
        largest_difference=difference,
        spread=spread,
        rows=rows,
        logits=trained.numel(),
        same_choice=(exported.argmax(-1) == trained.argmax(-1)).double().mean().item(),
        dtype=dtype,
        device=device,
        versions=versions,
    )


def job_for(manifest: Manifest, folder: Path, device: torch.device) -> dict[str, Any]:
    """What the fresh process is given: the manifest, and the machine's settings."""
    quantization = _quantization(manifest, folder)
    return {
        **asdict(manifest),
        "folder": str(folder.resolve()),
        "weights_dtype": manifest.dtype if manifest.saves == "adapter" else "float32",
        "dtype": manifest.dtype if quantization else "float32",
        "quantization": quantization,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "import_path": sys.path,
    }


def _fresh_logits(job: dict[str, Any], batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, str]]:
    with tempfile.TemporaryDirectory(prefix="peftkit-proof-") as name:
        work = Path(name)
        save_file({name: tensor.contiguous() for name, tensor in batch.items()}, work / "inputs.safetensors")
        (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1"}
        # the fresh process is alone, whatever launched this one
        distributed = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
        environment = {name: value for name, value in os.environ.items() if name not in distributed}
        try:
            done = subprocess.run(
                [sys.executable, "-I", str(WORKER), str(work)], env=environment | quiet, capture_output=True,
                text=True, timeout=60 * MINUTES, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise ExportError(f"a fresh process did not load the export within {MINUTES} minutes") from None
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ExportError(f"a fresh process cannot load the export: {last}")
        versions = json.loads((work / "versions.json").read_text(encoding="utf-8"))
        return load_file(work / "logits.safetensors")["logits"], versions


@contextlib.contextmanager
def _in_fp32(model: torch.nn.Module) -> Iterator[None]:
    """Widens frozen half-precision weights to fp32 and rounds them back at the end, both without loss."""
    before = {name: parameter.dtype for name, parameter in model.named_parameters()}
    model.float()
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(before[name])


def _quantization(manifest: Manifest, folder: Path | None = None) -> dict[str, Any] | None:
    """The recipe's quantization as arguments of transformers' BitsAndBytesConfig; ``folder`` is the adapter's."""
    if manifest.quantization is None or manifest.saves == "model":
        return None
    kind = manifest.quantization["kind"]
    if kind in KERNELS:
        return {"checkpoint": kind}
    heads = [*manifest.heads, ".*pooler"] if manifest.heads else ["lm_head"]  # as in models.loading.never_quantized
    if manifest.head.completes and folder is not None:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        heads = list(never_quantized(config, "own", manifest.head, folder))
    quantization = QUANTIZATIONS.get(kind).model_validate(manifest.quantization)
    return dict(quantization.config_arguments(manifest.dtype, heads))

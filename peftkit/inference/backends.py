"""What computes a run's predictions: torch, or another runtime that the run was exported for.

An export replaces torch only if its proof passed and it was written from the weights that the run has now (see
``export.runtimes``). Which one is faster depends on the processor and on the texts, so it is measured on the first of
them: torch and each export predict them in turn, and an export whose outputs differ by more than its proof allowed is
left out. A measurement takes a second or two, and is made only where torch would take much longer than that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from peftkit.data.pipeline import EncodedSplit
from peftkit.errors import PeftkitError, RunError, did_you_mean
from peftkit.export import proof, runtimes
from peftkit.export.folder import ExportFolder
from peftkit.export.manifest import SAVES
from peftkit.schema.registries import EXPORTERS, runtime_formats

AUTO, TORCH = "auto", "torch"
GLANCE, PROBE = 8, 32
"""Texts from which torch's time is estimated, and those of the measurement."""
FEWEST = 256
"""Texts below which nothing is measured."""
WORTHWHILE = 10.0
"""Seconds of torch's work from which other runtimes are tried: loading and measuring one takes about two."""
HALF_PRECISION = 0.1
"""Tolerance where torch computes in bf16 or fp16, whose own rounding is larger than the proof's tolerance."""

Outputs = Mapping[str, np.ndarray]
Predict = Callable[[EncodedSplit], Outputs]


@dataclass
class Backend:
    """What a loaded run predicts with."""

    name: str = TORCH
    """torch, or the name of an export format."""
    pending: bool = False
    """Whether this is still to be chosen, once there are enough texts."""
    reason: str = ""
    """Why it was chosen."""
    seconds: float = 0.0
    """That torch takes per text; 0 where it was not measured."""
    runtime: Any = field(default=None, repr=False)
    """The loaded export that predicts in torch's place."""


@dataclass(frozen=True)
class Candidate:
    """An export that may predict in torch's place."""

    folder: ExportFolder
    tolerance: float
    """Largest difference of outputs, relative to their standard deviation."""


def own(export: ExportFolder) -> str:
    """The backend that an exported folder is made for."""
    return TORCH if export.manifest.saves in SAVES else export.manifest.saves


def open_backend(export: ExportFolder, backend: str | None) -> ExportFolder:
    """The folder that a backend loads: the export itself, or what was written from it for another runtime.

    Raises:
        RunError: an unknown backend, or no proven export of this run for it.
    """
    if backend in (None, AUTO, own(export)):
        return export
    names = [AUTO, TORCH, *runtime_formats()]
    if backend not in names:
        raise RunError(f"unknown backend '{backend}': {did_you_mean(str(backend), names)}")
    if own(export) != TORCH:
        raise RunError(f"{export.path} is an export for '{own(export)}'; to predict with '{backend}', name the run")
    folder = runtimes.home(export) / backend
    if not folder.is_dir():
        reason = EXPORTERS.get(backend)().unsupported_reason(export)
        advice = reason or f"there is no {folder}; run `{runtimes.command(export, backend)}` first"
        raise RunError(f"{export.path}: this run cannot predict with '{backend}': {advice}")
    opened, problem = runtimes.proven(export, backend)
    if opened is None:
        raise RunError(f"{folder} {problem}; remove it and run `{runtimes.command(export, backend)}`")
    return opened


def candidates(export: ExportFolder, *, half_precision: bool) -> tuple[dict[str, Candidate], list[str]]:
    """The exports of a run among which may be chosen without being asked, by name, and why others are left out.

    One that rounds is among them only if ``export.backends`` of the recipe names it.
    """
    usable, problems = {}, []
    for name in runtime_formats():
        allowed = not EXPORTERS.get(name).rounds or name in export.recipe.export.backends
        if not allowed or not (runtimes.home(export) / name).is_dir():
            continue
        opened, problem = runtimes.proven(export, name)
        if opened is None:
            problems.append(f"{name} {problem}")
            continue
        tolerance = float((proof.read(opened.path) or {})["tolerance"])
        usable[name] = Candidate(opened, max(tolerance, HALF_PRECISION) if half_precision else tolerance)
    return usable, problems


def seconds_of(predict: Predict, texts: EncodedSplit) -> float:
    """Seconds of a second prediction of some texts; the first one allocates and compiles."""
    predict(texts)
    return _timed(predict, texts)[1]


def fastest(
    torch_predict: Predict, tolerances: Mapping[str, float], open_runtime: Callable[[str], Predict],
    probe: EncodedSplit, count: int,
) -> tuple[str, str]:  # fmt: skip
    """The name of what predicts a probe fastest, and why in half a sentence.

    Args:
        tolerances: of the other backends, by name.
        open_runtime: loads another backend by name, and returns how it predicts.
        probe: a few texts.
        count: their number.
    """
    torch_predict(probe)
    expected, seconds = _timed(torch_predict, probe)
    times, left_out = {TORCH: seconds}, []
    for name, tolerance in tolerances.items():
        try:
            predict = open_runtime(name)
            predict(probe)
            outputs, seconds = _timed(predict, probe)
        except PeftkitError as error:
            left_out.append(f"{name}: {error}")
            continue
        times[TORCH] = min(times[TORCH], _timed(torch_predict, probe)[1])  # in turn: a busy moment hits both
        seconds = min(seconds, _timed(predict, probe)[1])
        if (difference := relative_difference(outputs, expected)) <= tolerance:
            times[name] = seconds
        else:
            left_out.append(f"{name} differs from torch by {difference:.2g} on these texts, {tolerance:g} is allowed")
    rates = ", ".join(f"{name} {count / seconds:.0f}" for name, seconds in times.items())
    return min(times, key=lambda name: times[name]), "; ".join([f"texts/s on the first {count}: {rates}", *left_out])


def relative_difference(outputs: Outputs, expected: Outputs) -> float:
    """The largest difference of two outputs of the same name ÷ the standard deviation of those expected.

    Of logits where there are any, from which all else is computed.
    """
    differences = [0.0]
    for name in ("logits",) if "logits" in expected else expected:
        ours, theirs = outputs[name], expected[name]
        if ours.shape != theirs.shape:
            return float("inf")
        different = ours[ours != theirs].astype(np.float64) - theirs[ours != theirs]
        if different.size:
            spread = max(float(theirs[np.isfinite(theirs)].std()), 1e-12)
            differences.append(float(np.nan_to_num(np.abs(different), nan=np.inf).max()) / spread)
    return max(differences)


def _timed(predict: Predict, texts: EncodedSplit) -> tuple[Outputs, float]:
    started = time.perf_counter()
    outputs = predict(texts)
    return outputs, time.perf_counter() - started

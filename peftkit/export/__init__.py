"""Adapters, merged models and whole models that other libraries load, each with a proof of equal outputs."""

from __future__ import annotations

from pathlib import Path


def run_export(run: str | Path, to: str | Path, *, merge: bool = False, to_format: str = "peft") -> str:
    """Writes what a run learned to a new folder; returns a sentence about it.

    Args:
        merge: one plain model in place of the adapter.
        to_format: "peft" for what the run holds, "onnx" for a classifier as an ONNX file, "onnx-int8" with its weights
            in 8 bits.

    Raises:
        RunError: ``run`` is not a finished run, or ``to`` holds something already.
        ExportError: the export does not reproduce the trained model.
    """
    from peftkit.export.command import deliver

    return deliver(Path(run), Path(to), merge=merge, to_format=to_format)

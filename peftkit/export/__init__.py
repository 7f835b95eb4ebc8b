"""Adapters, merged models and other formats that other libraries load, each with a proof of equal outputs."""

from __future__ import annotations

from peftkit.export.exporter import run_export

__all__ = ["run_export"]

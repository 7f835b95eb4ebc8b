"""JSON files that came with a model or an adapter, read with bounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peftkit.errors import ModelError

MAX_JSON_BYTES = 10_000_000  # configs take kilobytes; tokenizers, which may take more, are read by their own library


def read_json(file: Path) -> Any:
    """The content of a model's or an adapter's JSON file; raises ModelError if it is not JSON, or far too large."""
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(f"{file}: expected at most {MAX_JSON_BYTES:,} bytes, found {file.stat().st_size:,}")
        return json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise ModelError(f"{file}: expected JSON, found brackets nested too deeply") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: expected JSON: {error}") from None

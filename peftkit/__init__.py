"""peftkit: parameter-efficient finetuning from one recipe. Importing it imports neither torch nor peft."""

from __future__ import annotations

__version__ = "0.1.0"

"""``python -m peftkit``, and ``torchrun --nproc_per_node 2 -m peftkit predict …``: the command line."""

from __future__ import annotations

from peftkit.cli.app import main

if __name__ == "__main__":
    main()

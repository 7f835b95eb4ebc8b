"""Data sources, one file per kind; see ``peftkit.data.source``."""

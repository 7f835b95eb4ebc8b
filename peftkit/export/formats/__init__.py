"""One export format per file; see ``peftkit.export.exporter``."""

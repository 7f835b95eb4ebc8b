"""One family of model architectures per file; see ``peftkit.export.gguf.architecture``."""

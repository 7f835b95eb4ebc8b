"""The output sides of models, one file each; see ``peftkit.schema.head``."""

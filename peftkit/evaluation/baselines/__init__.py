"""What a result is compared with, one file each; see ``peftkit.schema.baseline``."""

"""File readers, one file per family of formats; see ``peftkit.data.reader``."""

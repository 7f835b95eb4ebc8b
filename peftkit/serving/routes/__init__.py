"""What the server answers, one file per route; see ``peftkit.serving.route``."""

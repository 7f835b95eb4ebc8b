"""The HTTP server: ``peftkit serve``. Routes are one file each in ``routes``; see ``route.Route``."""

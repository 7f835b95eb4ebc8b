"""Watching what is served: a log of what a model answers, compared with the rows that it was validated on."""

"""Ordinal ratings, brought to peftkit by an installed package."""

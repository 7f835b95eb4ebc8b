"""Runs of experiments are quick ones: their own reports are tested elsewhere."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def _no_plots_of_single_runs():
    from peftkit.reporting import html

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html, "plots_of", lambda report: {})
        yield

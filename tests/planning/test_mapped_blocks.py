"""Blocks so large that the allocator maps them by themselves take no more memory than their bytes."""

from __future__ import annotations

import pytest
import torch

from peftkit.planning.trace import MAPPED, OTHER, Tracer, fake_tensor_mode
from peftkit.planning.traced_model import extrapolate


@pytest.mark.parametrize(("size", "resident"), [(MAPPED - 4, 1.5), (MAPPED, 1.0)])
def test_the_allocator_s_ratio_is_for_blocks_between_which_holes_are_left(size, resident):
    with fake_tensor_mode(), Tracer() as tracer:
        held = torch.empty(size, dtype=torch.uint8)
    found = tracer.finish()
    assert found.parts == {OTHER: held.numel()}
    assert found.resident(1.5) == {OTHER: int(resident * size)}
    longer = extrapolate(found, found, 30)
    assert longer.resident(1.5) == found.resident(1.5)

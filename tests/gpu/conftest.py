"""What the tests of a GPU share. Without one they are carried out on the CPU, as far as that means anything.

    python -m pytest tests/gpu -m "slow or not slow"      everything, in a few minutes on one GPU

The judge of every test is the CPU, torch in higher precision, or the same run on another path.
"""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tests.golden import recipes


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def gpu() -> torch.device:
    """The GPU; skips the test where there is none."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return torch.device("cuda")


@pytest.fixture(scope="session")
def materials(tmp_path_factory):
    """A folder with tiny bases and data: those of the golden runs."""
    folder = tmp_path_factory.mktemp("materials")
    recipes.materials(folder)
    tiny.tiny_bert(folder / "bert_64", hidden_size=64, intermediate_size=128)
    return folder


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    """‖value − reference‖ / ‖reference‖ in fp64 on the CPU; infinite for values that are not finite."""
    value, reference = value.detach().double().cpu(), reference.detach().double().cpu()
    if not bool(torch.isfinite(value).all()):
        return float("inf")
    return float((value - reference).norm() / reference.norm().clamp_min(1e-12))

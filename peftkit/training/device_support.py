"""What training needs of the device, checked before any work is done."""

from __future__ import annotations

from peftkit.distributed.session import Session
from peftkit.models.kernels import compile
from peftkit.schema.recipe import Recipe
from peftkit.training import low_bit_optimizers


def check_device_support(recipe: Recipe, session: Session) -> None:
    """Raises RecipeError if the optimizer or the compiler does not work on this device or with sharded parameters."""
    training, device = recipe.training, session.device.type
    low_bit_optimizers.check(training.optimizer, device, sharded=session.sharded)
    if training.compile:
        compile.check(device, training.gradient_checkpointing, sharded=session.sharded)
        session.notes.append("blocks are compiled (torch.compile): the first step of each phase takes a while longer")

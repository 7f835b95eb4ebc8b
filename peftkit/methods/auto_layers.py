"""``layers: auto``: how many blocks to adapt, estimated from the gradients of every block in one pass over some rows.

Let g be the gradient of the loss of a group of rows. To first order in the change δ of the trained parameters its loss
changes by ⟨g, δ⟩. For the last k blocks, the δ is sought that lowers the loss of all groups alike, ⟨g, δ⟩ = −1, by
ridge regression on the gradients, and is judged on groups that it was not fitted to (leave-one-out): the share of their
descent that it reaches is R²(k) = 1 − mean (1 + ⟨g, δ⟩)². That is finetuning in the regime of the neural tangent kernel
(Jacot et al. 2018, arXiv:1806.07572; of pretrained language models: Malladi et al. 2023, arXiv:2210.05643), where the
kernels of blocks add up, so that one pass gives the estimate for every k. Unlike norms of gradients, it counts only
what rows have in common, and a lower block only for what the blocks above it cannot do as well. That few blocks often
suffice, and which depends on the data: Lee et al. 2022 (surgical finetuning, arXiv:2210.11466).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from peftkit.errors import MethodError
from peftkit.schema.automatic import Automatic, Candidate, Choice
from peftkit.schema.head import possible_heads
from peftkit.schema.sections import ConfigSection
from peftkit.schema.types import LoadedModel, in_head

if TYPE_CHECKING:
    import numpy as np
    import torch

    from peftkit.schema.recipe import Recipe

SKETCH = 2**14
"""Numbers that stand for a block's gradient; longer ones are added up with random signs, which keeps inner products
(count sketch; of gradients of examples: Park et al. 2023, arXiv:2303.14186)."""
RIDGES = tuple(10 ** (third / 3 - 3) for third in range(16))
"""Candidate ridge penalties, in units of the kernel's mean diagonal; each k takes its best."""


class LayerOptions(ConfigSection):
    """How many blocks are adapted where the run chooses."""

    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of what adapting all blocks is estimated to bring that may be given up for a faster run."""
    at_least: Annotated[int, Field(ge=1)] = 1
    """Fewest blocks to adapt."""
    rows: Annotated[int, Field(ge=16)] = 512
    """Most training rows to look at; half of them fit a new head."""


class AutoLayers(Automatic):
    """The last k blocks, k chosen on the data."""

    auto: LayerOptions = LayerOptions()
    """How to choose: tolerance, at_least, rows."""

    @property
    def rows(self) -> int:
        return self.auto.rows

    @property
    def widest(self) -> None:
        return None

    @property
    def span(self) -> str:
        blocks = "block" if self.auto.at_least == 1 else f"{self.auto.at_least} blocks"
        return f"between the last {blocks} and all of them"

    def check(self, field: str, recipe: Recipe) -> None:
        """Refuses an encoder–decoder: its blocks are no single stack, of which the last ones could be adapted."""
        if any(head.encodes_source for head in possible_heads(recipe.task)):
            raise MethodError(
                f"method.{field}=auto chooses among the blocks of one stack, and task.kind={recipe.task.kind} has an "
                f"encoder and a decoder; set method.{field} to numbers of blocks, or leave it out for all"
            )

    def choose(self, field: str, loaded: LoadedModel, gradients: Iterable[None]) -> Choice:
        """The fewest blocks whose estimate is within the tolerance of the best.

        All of them where the estimate for none of them exceeds its standard error: blocks are frozen on evidence only.

        Raises:
            MethodError: ``at_least`` exceeds the model's blocks.
        """
        kernels = gradient_kernels(loaded, gradients)
        return self.decide(field, kernels[0], kernels[1:])

    def decide(self, field: str, head: np.ndarray, blocks: np.ndarray) -> Choice:
        """The choice from the kernels of head, [groups, groups], and blocks, [blocks, groups, groups]."""
        count, tolerance, fewest = len(blocks), self.auto.tolerance, self.auto.at_least
        if fewest > count:
            raise MethodError(f"method.{field}.auto.at_least={fewest}: the model has {count} blocks; lower it")
        curve, known = estimate(head, blocks)
        chosen, groups = count, len(head)
        if known:
            enough = (one.size for one in curve if one.size >= fewest and one.estimate >= 1 - tolerance)
            chosen = next(enough, count)
            what = f"adapts the last {chosen} of {count} blocks" if chosen < count else f"adapts all {count} blocks"
            share = f"an estimated {curve[chosen].estimate:.0%} of what the best number of blocks brings"
            summary = f"method.{field}=auto {what}: {share} (asked for: {1 - tolerance:.0%})"
        else:
            summary = (
                f"method.{field}=auto adapts all {count} blocks: the gradients of {groups} groups of rows have too "
                "little in common for an estimate"
            )
        return Choice(
            field, -chosen, self.model_dump(mode="json"), chosen, "adapted blocks", tuple(curve), 1 - tolerance, summary
        )


def estimate(head: np.ndarray, blocks: np.ndarray) -> tuple[list[Candidate], bool]:
    """For 0 to all adapted blocks the share of the best one's gain over the head alone, and whether there is any.

    Args:
        head, blocks: inner products of the gradients of groups of rows: [groups, groups], [blocks, groups, groups].
    """
    import numpy as np

    kernels, errors = np.zeros_like(head), []
    for kernel in (head, *blocks[::-1]):
        kernels = kernels + _normalized(kernel)
        errors.append(held_out(kernels))
    means = np.array([error.mean() for error in errors])
    best = int(means.argmin())
    gain, root = means[0] - means[best], len(head) ** 0.5
    known = bool(best > 0 and gain > (errors[0] - errors[best]).std() / root)
    scale = gain if gain > 0 else 1.0
    return [
        Candidate(size, float((means[0] - mean) / scale), float((error - errors[best]).std() / root / scale))
        for size, (mean, error) in enumerate(zip(means, errors))
    ], known


def _normalized(kernel: np.ndarray) -> np.ndarray:
    """With a mean diagonal of 1: optimizers such as Adam scale every parameter's gradient to about one size."""
    size = float(kernel.trace()) / len(kernel)
    return kernel / size if size > 0 else kernel


def held_out(kernel: np.ndarray) -> np.ndarray:
    """[groups] squared distance of ⟨g, δ⟩ from −1 where δ is fitted to the other groups, in closed form."""
    import numpy as np

    identity, size = np.eye(len(kernel)), float(kernel.trace()) / len(kernel)
    if size <= 0:
        return np.ones(len(kernel))
    residuals = []
    for ridge in RIDGES:
        # leave-one-out residual of kernel ridge regression with target 1: [(K + λI)⁻¹ 1]_i / [(K + λI)⁻¹]_ii
        inverse = np.linalg.inv(kernel + ridge * size * identity)
        residuals.append((inverse.sum(1) / np.diag(inverse)) ** 2)
    return min(residuals, key=lambda squares: float(squares.mean()))


def gradient_kernels(loaded: LoadedModel, gradients: Iterable[None]) -> np.ndarray:
    """Inner products of the gradients of groups of rows, [1 + blocks, groups, groups]: of the head, and of each block.

    Gradients of other parameters, such as those of adapters below or above the blocks, are left out: they are not
    adapted where ``layers`` is a number.
    """
    import numpy as np
    import torch

    from peftkit.models.blocks import find_blocks, unwrap

    model = loaded.model
    head = [p for name, p in model.named_parameters() if p.requires_grad and in_head(name, loaded.head_names)]
    blocks = find_blocks(unwrap(model))[1]
    parts = [head, *([p for p in block.parameters() if p.requires_grad] for block in blocks)]
    signs: dict[int, Any] = {}
    sketches: list[list[torch.Tensor]] = [[] for _ in parts]
    for _ in gradients:
        for number, (sketch, parameters) in enumerate(zip(sketches, parts)):
            sketch.append(_sketch(parameters, number, signs))
    grams = []
    for sketch in sketches:
        stacked = torch.stack(sketch).double()
        grams.append((stacked @ stacked.T).numpy())
    return np.stack(grams)


def _sketch(parameters: Iterable[Any], number: int, signs: dict[int, Any]) -> torch.Tensor:
    """The gradient of some parameters as at most ``SKETCH`` numbers on the CPU; ``signs`` caches those of each part."""
    import torch

    flat = [(p.grad if p.grad is not None else torch.zeros_like(p)).float().flatten() for p in parameters]
    vector = torch.cat(flat) if flat else torch.zeros(1)
    if len(vector) <= SKETCH:
        return vector.cpu()
    if number not in signs:
        generator = torch.Generator().manual_seed(number)
        drawn = torch.randint(0, 2, (len(vector),), generator=generator, dtype=torch.int8) * 2 - 1
        signs[number] = drawn.to(vector.device)
    vector = vector * signs[number]
    padded = torch.nn.functional.pad(vector, (0, -len(vector) % SKETCH))
    return padded.view(-1, SKETCH).sum(0).cpu()

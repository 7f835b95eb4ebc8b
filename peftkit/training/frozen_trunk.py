"""The part of a model that training leaves as it is, and what leaves it: computed once, it can be put back at will.

    trunk = find(module.model, task_forward, batch)      # None where the first block is trained
    hidden = trunk.capture(lambda: forward(batch))       # runs the model up to the cut, and no further
    with trunk.replay(hidden):
        forward(trunk.reduced(batch))                    # the model's own forward, from the cut on

The cut lies below the lowest trained weight. Under a fully frozen backbone a classifier needs one vector a row (the
mean, the first or the last token, or the pooler's output: whichever is tried and seen to give the same logits);
between two blocks it needs every token. Nothing is assumed of an architecture: the order of calls is traced, and
a cut point is used only after a few rows went both ways with equal results.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.errors import ModelError
from peftkit.models import classifier
from peftkit.models.blocks import find_blocks

FEATURES = "features"
"""Under this name a batch carries the trunk's output."""
TOKENS = "tokens"
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
HALF_TOLERANCE = 3e-2
"""Largest difference of outputs, relative to the largest output, between both ways; half precision rounds coarsely."""

Outputs = Mapping[str, Tensor]


class _Reached(Exception):
    """Ends a forward pass at the cut."""

    def __init__(self, value: Any) -> None:
        self.value = value


@dataclass(frozen=True)
class FrozenTrunk:
    """A frozen, deterministic lower part of a model, and the cut point above it."""

    backbone: nn.Module
    blocks: tuple[nn.Module, ...]
    cut: int
    """Blocks below the cut point; all of them when the whole backbone is frozen."""
    kind: str
    """The trunk's output: "tokens" [rows, tokens, width], or one vector a row: mean, cls, first, last, pooler."""
    pad_token_id: int | None = None
    wraps: int | None = None
    """Length of the tuple that a block returns; None where it returns the tensor itself."""
    output_type: type | None = None
    still: tuple[nn.Module, ...] = field(default=(), repr=False)
    """Modules of the trunk; kept in evaluation mode, so that no dropout below the cut point changes what crosses it."""

    @property
    def whole(self) -> bool:
        """Whether the cut point lies above the whole backbone."""
        return self.cut == len(self.blocks)

    @property
    def per_row(self) -> bool:
        """Whether one vector a row crosses the cut point."""
        return self.kind != TOKENS

    def capture(self, forward: Callable[[], Any], batch: Mapping[str, Tensor]) -> Tensor:
        """What crosses the cut point for a batch: [rows, width], or [rows, tokens, width] with padding as it came.

        Args:
            forward: runs the model on ``batch``; it is left at the cut point, so that nothing above costs anything.
        """
        with self._stopping():
            try:
                forward()
            except _Reached as reached:
                return self._reduce(reached.value, batch)
        raise ModelError("the forward pass never reached the blocks")

    @contextlib.contextmanager
    def replay(self, hidden: Tensor) -> Iterator[None]:
        """Within it the model's own forward begins at the cut point, with ``hidden`` as the trunk's output.

        A block hands on its output, so that whatever runs a block again (gradient checkpointing) sees the same input.
        """
        stood_in = dict(self._stand_ins(hidden))
        before = {module: vars(module).get("forward") for module in stood_in}  # device maps put one on the instance
        for module, forward in stood_in.items():
            module.forward = forward
        try:
            yield
        finally:
            for module, forward in before.items():
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward

    def reduced(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The batch that goes with the trunk's output: rows of a single token where one vector a row does."""
        if not self.per_row:
            return dict(batch)
        ids = batch["input_ids"][:, :1]
        kept = {name: batch[name] for name in ("labels", "weight") if name in batch}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **kept}

    @contextlib.contextmanager
    def _stopping(self) -> Iterator[None]:
        def enter(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            raise _Reached(arguments[0] if arguments else options["hidden_states"])

        def leave(_: nn.Module, __: Any, output: Any) -> None:
            raise _Reached(output)

        if self.whole:
            handle = self.backbone.register_forward_hook(leave)
        else:
            handle = self.blocks[self.cut].register_forward_pre_hook(enter, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _reduce(self, value: Any, batch: Mapping[str, Tensor]) -> Tensor:
        if self.kind == "pooler":
            return value.pooler_output
        hidden: Tensor = value.last_hidden_state if self.whole else value
        if self.kind in ("mean", "cls"):
            return classifier.pool(hidden, batch["attention_mask"], self.kind).to(hidden.dtype)
        if self.kind == "first":
            return hidden[:, 0]
        if self.kind == "last":
            ids = batch["input_ids"]
            places = torch.arange(ids.shape[1], device=ids.device) * (ids != self.pad_token_id)
            return hidden[torch.arange(len(ids), device=ids.device), places.argmax(-1)]
        return hidden

    def _stand_ins(self, hidden: Tensor) -> Iterator[tuple[Any, Callable[..., Any]]]:
        if self.whole:
            yield self.backbone, lambda *_, **__: self._output(hidden)
            return
        for block in self.blocks[: self.cut - 1]:
            yield block, lambda x=None, *_, **options: self._wrapped(options["hidden_states"] if x is None else x)
        yield self.blocks[self.cut - 1], lambda *_, **__: self._wrapped(hidden)

    def _wrapped(self, hidden: Tensor) -> Any:
        return hidden if self.wraps is None else (hidden, *[None] * (self.wraps - 1))

    def _output(self, hidden: Tensor) -> Any:
        assert self.output_type is not None
        tokens = hidden[:, None] if self.per_row else hidden
        pooler = getattr(self.backbone, "pooler", None)
        if self.kind == "pooler":
            return self.output_type(last_hidden_state=tokens, pooler_output=hidden)
        if pooler is not None and self.kind not in ("mean", "cls"):
            return self.output_type(last_hidden_state=tokens, pooler_output=pooler(tokens))
        return self.output_type(last_hidden_state=tokens)


@torch.no_grad()
def find_frozen_trunk(
    model: nn.Module, forward: Callable[[Mapping[str, Tensor]], Outputs], batch: Mapping[str, Tensor], pooling: str
) -> tuple[FrozenTrunk | None, str]:
    """The frozen trunk of a model in evaluation mode, and, where there is none, why not in words.

    Args:
        model: with ``requires_grad`` set everywhere.
        forward: outputs of a batch by name, through the task.
        batch: a few rows of unequal length, on the model's device.
        pooling: "own", "mean" or "cls", as in ``classifier.logits``.
    """
    inner = classifier.unwrap(model)
    backbone = getattr(inner, getattr(inner, "base_model_prefix", "") or "-", None)
    try:
        blocks = tuple(find_blocks(inner)[1])
    except ModelError as error:
        return None, str(error)
    if not isinstance(backbone, nn.Module):
        return None, f"{type(inner).__name__} has no backbone apart from its head"
    first_is_trained = any(parameter.requires_grad for parameter in blocks[0].parameters())  # told without a pass
    trace = _Trace() if first_is_trained else _traced(model, backbone, blocks, lambda: forward(batch))
    cut = 0 if first_is_trained else _cut(model, blocks, trace)
    if cut == 0:
        return None, "something is trained below the first block, or in it"
    held = FrozenTrunk(
        backbone, blocks, cut, TOKENS, inner.config.get_text_config().pad_token_id, trace.wraps,
        type(trace.output), _still(backbone, blocks, cut, trace),
    )  # fmt: skip
    for kind in _kinds(held, pooling, trace):
        trunk = replace(held, kind=kind)
        if _same_both_ways(trunk, forward, batch, trace.outputs):
            return trunk, ""
    return None, f"{type(inner).__name__} gives other outputs when it is entered above its frozen blocks"


@dataclass
class _Trace:
    """One forward pass: which modules were called in which order, and what they gave."""

    order: dict[nn.Module, int] = field(default_factory=dict)
    wraps: int | None = None
    output: Any = None
    outputs: Outputs = field(default_factory=dict)


def _traced(model: nn.Module, backbone: nn.Module, blocks: tuple[nn.Module, ...], run: Callable[[], Outputs]) -> _Trace:
    trace = _Trace()

    def called(module: nn.Module, _: Any) -> None:
        trace.order.setdefault(module, len(trace.order))

    def block_left(_: nn.Module, __: Any, output: Any) -> None:
        trace.wraps = len(output) if isinstance(output, tuple) else None

    def backbone_left(_: nn.Module, __: Any, output: Any) -> None:
        trace.output = output

    handles = [module.register_forward_pre_hook(called) for module in model.modules()]
    handles += [blocks[0].register_forward_hook(block_left), backbone.register_forward_hook(backbone_left)]
    try:
        trace.outputs = run()
    finally:
        for handle in handles:
            handle.remove()
    return trace


def _cut(model: nn.Module, blocks: tuple[nn.Module, ...], trace: _Trace) -> int:
    """Blocks below the lowest trained weight; 0 where a weight outside the blocks is not seen to be used above them."""
    number = {module: index for index, block in reversed(list(enumerate(blocks))) for module in block.modules()}
    holds_blocks = {module for module in model.modules() if blocks[0] in set(module.modules())}
    last = trace.order.get(blocks[-1])
    if last is None:
        return 0
    lowest = len(blocks)
    for path, module in model.named_modules():
        if not any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            continue
        if module in number:
            lowest = min(lowest, number[module])
        elif not _called_after(model, path, trace, last, holds_blocks):
            return 0
    return lowest


def _called_after(model: nn.Module, path: str, trace: _Trace, last: int, holds_blocks: set[nn.Module]) -> bool:
    """Whether a module, or the nearest one around it that was called, was first called after the last block."""
    steps = path.split(".")
    for end in range(len(steps), 0, -1):
        module = model.get_submodule(".".join(steps[:end]))
        if module in holds_blocks:
            return False
        if module in trace.order:
            return trace.order[module] > last
    return False


def _still(backbone: nn.Module, blocks: tuple[nn.Module, ...], cut: int, trace: _Trace) -> tuple[nn.Module, ...]:
    """The blocks below the cut, what runs before them, and above a whole frozen backbone what is frozen in it."""
    first = trace.order[blocks[0]]
    inside = {module for block in blocks for module in block.modules()}
    found: list[nn.Module] = list(blocks[:cut])
    for module in backbone.modules():
        if module in inside or blocks[0] in set(module.modules()) or module not in trace.order:
            continue
        trained = any(parameter.requires_grad for parameter in module.parameters())
        if trace.order[module] < first or (cut == len(blocks) and not trained):
            found.append(module)
    return tuple(found)


def _kinds(trunk: FrozenTrunk, pooling: str, trace: _Trace) -> list[str]:
    """What may cross the cut point, the smallest first."""
    if not trunk.whole:
        return [TOKENS]
    if not hasattr(trace.output, "last_hidden_state"):
        return []
    if pooling != "own":
        return [pooling, TOKENS]
    pooler = getattr(trunk.backbone, "pooler", None)
    given = getattr(trace.output, "pooler_output", None) is not None
    frozen = pooler is None or not any(parameter.requires_grad for parameter in pooler.parameters())
    return [*(["pooler"] if given and frozen else []), "first", "last", TOKENS]


def _same_both_ways(
    trunk: FrozenTrunk, forward: Callable[[Mapping[str, Tensor]], Outputs], batch: Mapping[str, Tensor], real: Outputs
) -> bool:
    hidden = trunk.capture(lambda: forward(batch), batch)
    with trunk.replay(hidden):
        again = forward(trunk.reduced(batch))
    allowed = TOLERANCE.get(hidden.dtype, HALF_TOLERANCE)
    return all(
        found.shape == again[name].shape
        and float((found.float() - again[name].float()).abs().max()) <= allowed * max(float(found.abs().max()), 1e-6)
        for name, found in real.items()
    )

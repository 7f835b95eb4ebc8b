"""The frozen trunk of a model, and its outputs: computed once, they replace the trunk in later forward passes.

    trunk, reason = find_frozen_trunk(model, forward, batch, pooling)   # None if the first block is trained
    hidden = trunk.capture(lambda: forward(batch), batch)               # runs the model up to the cut point only
    with trunk.replay(hidden):
        forward(trunk.reduced(batch))                                   # the model's own forward, above the cut point

The cut point is below the lowest trained weight. Above a fully frozen backbone a classifier needs one vector per row
(mean, first or last token, or the pooler's output); between two blocks every token is needed. Nothing is assumed of an
architecture: the order of calls is traced, and a cut point is used only if a few rows give the same outputs both ways.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.errors import ModelError
from peftkit.models import pooled_logits
from peftkit.models.blocks import find_blocks, unwrap
from peftkit.models.patching import replaced_forward

FEATURES = "features"
"""Name of the trunk's output in a batch."""
TOKENS = "tokens"
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
HALF_TOLERANCE = 3e-2
"""Largest difference of outputs between both ways, relative to the largest output."""
Outputs = Mapping[str, Tensor]


class _CutPointReached(Exception):
    """Ends a forward pass at the cut point."""

    def __init__(self, value: Any) -> None:
        self.value = value


@dataclass(frozen=True)
class FrozenTrunk:
    """The frozen, deterministic lower part of a model, up to a cut point."""

    backbone: nn.Module
    blocks: tuple[nn.Module, ...]
    cut: int
    """Number of blocks below the cut point; all of them if the whole backbone is frozen."""
    kind: str
    """The trunk's output: "tokens" [rows, tokens, width], or one vector per row: mean, cls, first, last, pooler."""
    pad_token_id: int | None
    tuple_length: int | None
    """Length of the tuple that a block returns; None if it returns a tensor."""
    output_type: type
    eval_modules: tuple[nn.Module, ...] = field(repr=False)
    """Modules of the trunk, kept in evaluation mode: dropout would change its output."""

    @property
    def is_backbone(self) -> bool:
        return self.cut == len(self.blocks)

    @property
    def per_row(self) -> bool:
        return self.kind != TOKENS

    def capture(self, forward: Callable[[], Any], batch: Mapping[str, Tensor]) -> Tensor:
        """The trunk's output for a batch: [rows, width], or [rows, tokens, width] with padding left as it is.

        ``forward`` runs the model on the batch, and is stopped at the cut point.
        """

        def before_block(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            raise _CutPointReached(arguments[0] if arguments else options["hidden_states"])

        def after_backbone(_: nn.Module, __: Any, output: Any) -> None:
            raise _CutPointReached(output)

        if self.is_backbone:
            handle = self.backbone.register_forward_hook(after_backbone)
        else:
            handle = self.blocks[self.cut].register_forward_pre_hook(before_block, with_kwargs=True)
        try:
            forward()
        except _CutPointReached as reached:
            return self._reduce(reached.value, batch)
        finally:
            handle.remove()
        raise ModelError("the forward pass did not reach the model's blocks")

    @contextlib.contextmanager
    def replay(self, hidden: Tensor) -> Iterator[None]:
        """Within the context, ``hidden`` replaces the trunk's output; a model's forward has no parameter for that.

        Replaced blocks pass their input on, so that a block that is run again (gradient checkpointing) sees the same.
        """
        with replaced_forward(dict(self._replacements(hidden))):
            yield

    def reduced(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The batch to replay: with one vector per row, its rows have a single token."""
        if not self.per_row:
            return dict(batch)
        ids = batch["input_ids"][:, :1]
        targets = {name: batch[name] for name in ("labels", "weight") if name in batch}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **targets}

    def _reduce(self, value: Any, batch: Mapping[str, Tensor]) -> Tensor:
        if self.kind == "pooler":
            return value.pooler_output
        hidden: Tensor = value.last_hidden_state if self.is_backbone else value
        if self.kind in ("mean", "cls"):
            return pooled_logits.pool(hidden, batch["attention_mask"], self.kind).to(hidden.dtype)
        if self.kind == "first":
            return hidden[:, 0]
        if self.kind == "last":
            ids = batch["input_ids"]
            positions = torch.arange(ids.shape[1], device=ids.device) * (ids != self.pad_token_id)
            return hidden[torch.arange(len(ids), device=ids.device), positions.argmax(-1)]
        return hidden

    def _replacements(self, hidden: Tensor) -> Iterator[tuple[Any, Callable[..., Any]]]:
        if self.is_backbone:
            yield self.backbone, lambda *_, **__: self._backbone_output(hidden)
            return
        for block in self.blocks[: self.cut - 1]:
            yield block, lambda x=None, *_, **options: self._block_output(options["hidden_states"] if x is None else x)
        yield self.blocks[self.cut - 1], lambda *_, **__: self._block_output(hidden)

    def _block_output(self, hidden: Tensor) -> Any:
        return hidden if self.tuple_length is None else (hidden, *[None] * (self.tuple_length - 1))

    def _backbone_output(self, hidden: Tensor) -> Any:
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
    """The frozen trunk of a model in evaluation mode, or None and the reason.

    Args:
        model: its ``requires_grad`` must be final.
        forward: a batch's outputs by name, through the task.
        batch: a few rows of unequal lengths.
        pooling: as in ``pooled_logits.logits``.
    """
    inner = unwrap(model)
    backbone = getattr(inner, getattr(inner, "base_model_prefix", "") or "-", None)
    try:
        blocks = tuple(find_blocks(inner)[1])
    except ModelError as error:
        return None, str(error)
    if not isinstance(backbone, nn.Module):
        return None, f"{type(inner).__name__} has no backbone apart from its head"
    if any(parameter.requires_grad for parameter in blocks[0].parameters()):
        return None, "the first block is trained"
    trace = _Trace(model, backbone, blocks[0], lambda: forward(batch))
    cut = _find_cut(model, blocks, trace)
    if cut == 0:
        return None, "a weight below the first block is trained"
    every_token = FrozenTrunk(
        backbone, blocks, cut, TOKENS, inner.config.get_text_config().pad_token_id, trace.tuple_length,
        type(trace.output), _eval_modules(backbone, blocks, cut, trace),
    )  # fmt: skip
    for kind in _kinds(every_token, pooling, trace):
        trunk = replace(every_token, kind=kind)
        if _same_both_ways(trunk, forward, batch, trace.outputs):
            return trunk, ""
    return None, f"{type(inner).__name__} does not give the same outputs when entered above its frozen blocks"


class _Trace:
    """One forward pass: the order in which modules are called, and the outputs of block, backbone and task."""

    def __init__(self, model: nn.Module, backbone: nn.Module, block: nn.Module, forward: Callable[[], Outputs]) -> None:
        self.order: dict[nn.Module, int] = {}
        self.tuple_length: int | None = None
        self.output: Any = None
        handles = [module.register_forward_pre_hook(self._before) for module in model.modules()]
        handles += [block.register_forward_hook(self._after_block)]
        handles += [backbone.register_forward_hook(self._after_backbone)]
        try:
            self.outputs = forward()
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, module: nn.Module, _: Any) -> None:
        self.order.setdefault(module, len(self.order))

    def _after_block(self, _: nn.Module, __: Any, output: Any) -> None:
        self.tuple_length = len(output) if isinstance(output, tuple) else None

    def _after_backbone(self, _: nn.Module, __: Any, output: Any) -> None:
        self.output = output


def _find_cut(model: nn.Module, blocks: tuple[nn.Module, ...], trace: _Trace) -> int:
    """Number of blocks below the lowest trained weight; 0 if a trained weight may be used before the last block."""
    index_of = {module: index for index, block in reversed(list(enumerate(blocks))) for module in block.modules()}
    last = trace.order.get(blocks[-1])
    if last is None:
        return 0
    lowest = len(blocks)
    for path, module in model.named_modules():
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            if module in index_of:
                lowest = min(lowest, index_of[module])
            elif _first_call(model, path, blocks[0], trace) <= last:
                return 0
    return lowest


def _first_call(model: nn.Module, path: str, block: nn.Module, trace: _Trace) -> int:
    """When a module, or the nearest called one around it, was first called; -1 if that contains the blocks."""
    names = path.split(".")
    for end in range(len(names), 0, -1):
        module = model.get_submodule(".".join(names[:end]))
        if block in set(module.modules()):
            return -1
        if module in trace.order:
            return trace.order[module]
    return -1


def _eval_modules(backbone: nn.Module, blocks: tuple[nn.Module, ...], cut: int, trace: _Trace) -> tuple[nn.Module, ...]:
    """The blocks below the cut point, what runs before them, and of a frozen backbone what runs after them."""
    first = trace.order[blocks[0]]
    in_blocks = {module for block in blocks for module in block.modules()}
    modules: list[nn.Module] = list(blocks[:cut])
    for module in backbone.modules():
        if module in in_blocks or blocks[0] in set(module.modules()) or module not in trace.order:
            continue
        trained = any(parameter.requires_grad for parameter in module.parameters())
        if trace.order[module] < first or (cut == len(blocks) and not trained):
            modules.append(module)
    return tuple(modules)


def _kinds(trunk: FrozenTrunk, pooling: str, trace: _Trace) -> list[str]:
    """Possible kinds of output, the smallest first."""
    if not trunk.is_backbone:
        return [TOKENS]
    if not hasattr(trace.output, "last_hidden_state"):
        return []
    if pooling != "own":
        return [pooling, TOKENS]
    pooler = getattr(trunk.backbone, "pooler", None)
    pooled = getattr(trace.output, "pooler_output", None) is not None
    frozen = pooler is None or not any(parameter.requires_grad for parameter in pooler.parameters())
    return [*(["pooler"] if pooled and frozen else []), "first", "last", TOKENS]


def _same_both_ways(
    trunk: FrozenTrunk, forward: Callable[[Mapping[str, Tensor]], Outputs], batch: Mapping[str, Tensor], full: Outputs
) -> bool:
    hidden = trunk.capture(lambda: forward(batch), batch)
    with trunk.replay(hidden):
        replayed = forward(trunk.reduced(batch))
    tolerance = TOLERANCE.get(hidden.dtype, HALF_TOLERANCE)
    for name, output in full.items():
        if output.shape != replayed[name].shape:
            return False
        difference = float((output.float() - replayed[name].float()).abs().max())
        if not difference <= tolerance * max(float(output.abs().max()), 1e-6):
            return False
    return True

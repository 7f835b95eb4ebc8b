"""Finds where the branches of transformer blocks join the residual stream, by tracing a forward pass.

    x → x + branch(norm(x))            pre-norm (Llama, GPT-2)
    x → norm(x + branch(x))            post-norm (BERT)
    x → x + norm(branch(norm(x)))      both (Gemma 2)
    x → x + attention(…) + mlp(…)      parallel (GPT-NeoX, Phi)

A few tokens run through the model while every operation is observed. A tensor that comes from a block's input without
a matrix multiplication (by norms, sums, copies) belongs to the residual stream. A sum of the stream with another tensor
of its shape is a residual sum, and the other tensor is the output of a branch. No architecture is known by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from peftkit.errors import ModelError
from peftkit.models import packing
from peftkit.models.blocks import find_blocks, unwrap
from peftkit.models.loading import writes_text

TOKENS = 11
MATMULS = frozenset("mm addmm bmm baddbmm matmul linear convolution einsum _grouped_mm embedding".split())
ADDITIONS = frozenset({"add", "add_"})
MAX_NUMEL = 2**22
"""Larger tensors are not traced: activations of a few tokens are smaller, dequantized weights are larger."""
MAX_DEPTH = 8  # most operations between a branch's last module and the sum
Key = int  # identifies a tensor by its storage, as long as the tensor lives
UNKNOWN: Key = -1


@dataclass(frozen=True)
class Branch:
    """One residual branch of a block; names are full names of modules."""

    block: str
    kind: str  # attention (mixes tokens) or feed_forward
    entry: str  # the first module of the branch: its first input is the input of the branch
    exit: str  # the last module of the branch: its output is added to the residual stream
    width: int  # width of the residual stream


def find_branches(model: nn.Module) -> list[Branch]:
    """The branches of every block, as they are added; raises ModelError for a model without blocks or residual sums."""
    prefix, blocks = find_blocks(model)
    tracer = _Tracer()
    with ExitStack() as hooks:
        for number, block in enumerate(blocks):
            tracer.hook(f"{prefix}.{number}", block, hooks)
        try:
            with packing.eval_modules(model), torch.no_grad(), tracer:
                model(**_inputs(model))
        except (RuntimeError, ValueError) as error:
            if unwrap(model).device.type != "meta":
                raise
            raise ModelError(f"{type(model).__name__} cannot be traced without its weights: {error}") from error
    if not tracer.branches:
        raise ModelError(f"{type(model).__name__}: no residual sum was found in its blocks ({prefix})")
    return [branch for branches in tracer.branches.values() for branch in branches]


def _inputs(model: nn.Module) -> dict[str, Any]:
    base = unwrap(model)
    device = base.get_input_embeddings().weight.device
    inputs: dict[str, Any] = {"input_ids": torch.arange(1, TOKENS + 1, device=device)[None]}
    if device.type == "meta" and writes_text(base.config):  # without one, transformers would read the inputs' values
        inputs["attention_mask"] = torch.zeros(1, 1, TOKENS, TOKENS, device=device, dtype=base.dtype)
    return inputs | packing.no_cache(model)


class _Tracer(TorchDispatchMode):
    """Passes every operation and every module call to the trace of the block that is running."""

    def __init__(self) -> None:
        super().__init__()
        self.branches: dict[str, list[Branch]] = {}  # by the name of the block
        self._trace: _BlockTrace | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self._trace is not None:
            space, _, name = func._schema.name.partition("::")
            known = name if space == "aten" else "linear"  # other libraries' operations count as matmuls
            self._trace.record(known, list(_tensors([*args, *(kwargs or {}).values()])), list(_tensors([output])))
        return output

    def hook(self, name: str, block: nn.Module, hooks: ExitStack) -> None:
        """Hooks a block and every module in it."""
        for inner, module in block.named_modules():
            enter = partial(self._enter, inner) if inner else partial(self._begin, name)
            leave = partial(self._leave, inner) if inner else partial(self._end, name)
            hooks.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(leave))

    def _begin(self, block: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        stream = next(_tensors([*args, *kwargs.values()]), None)
        if block not in self.branches and stream is not None:  # a shared block runs several times; one is enough
            self._trace = _BlockTrace(stream)

    def _enter(self, name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        tensor = next(_tensors([*args, *kwargs.values()]), None)
        if self._trace is not None and tensor is not None:
            self._trace.module_inputs.append((name, self._trace.key(tensor)))

    def _leave(self, name: str, _: nn.Module, args: Any, output: Any) -> None:
        if self._trace is not None:
            keys = tuple(self._trace.key(tensor) for tensor in _tensors([output]))
            fits = isinstance(output, Tensor) and self._trace.fits(output)
            self._trace.module_outputs.append((name, keys, fits))

    def _end(self, block: str, *_: Any) -> None:
        if self._trace is not None and (branches := list(self._trace.find_branches(block))):
            self.branches[block] = branches
        self._trace = None


@dataclass
class _BlockTrace:
    """The dataflow inside one block."""

    first: Tensor  # the block's input
    stream: set[Key] = field(default_factory=set)
    parents: dict[Key, set[Key]] = field(default_factory=dict)  # the inputs that each tensor was computed from
    addends: list[Key] = field(default_factory=list)  # tensors that were added to the stream
    inplace_addends: dict[Key, list[Key]] = field(default_factory=dict)
    """Tensors that were added in place to one outside the stream: another branch."""
    per_head: set[Key] = field(default_factory=set)
    """Tensors with a dimension for attention heads, which feed-forward layers never compute."""
    module_inputs: list[tuple[str, Key]] = field(default_factory=list)
    module_outputs: list[tuple[str, tuple[Key, ...], bool]] = field(default_factory=list)
    """Name, outputs, and whether the only output is a tensor of the stream's shape."""
    references: list[Tensor] = field(default_factory=list)  # keeps the tensors alive, so that no key is used twice

    def __post_init__(self) -> None:
        self.stream.add(self.key(self.first))

    def key(self, tensor: Tensor) -> Key:
        if tensor.numel() > MAX_NUMEL:
            return UNKNOWN
        self.references.append(tensor)
        return int(tensor.untyped_storage()._cdata)

    def fits(self, tensor: Tensor) -> bool:
        """Whether it has the stream's size and width; rows and tokens may be flattened."""
        return tensor.numel() == self.first.numel() and tensor.shape[-1] == self.first.shape[-1]

    def record(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        keys = [self.key(tensor) for tensor in inputs]
        of_stream = name not in MATMULS and any(key in self.stream for key in keys)
        addends = [key for key, tensor in zip(keys, inputs) if self.fits(tensor)] if name in ADDITIONS else []
        if of_stream:
            self.addends += [key for key in addends if key not in self.stream]
        elif name == "add_" and len(addends) == 2:
            self.inplace_addends.setdefault(keys[0], []).append(keys[1])
            return
        for tensor in outputs:
            key = self.key(tensor)
            self.parents.setdefault(key, set()).update(parent for parent in keys if parent not in (key, UNKNOWN))
            if tensor.dim() == 4:
                self.per_head.add(key)
            if of_stream:
                self.stream.add(key)

    def find_branches(self, block: str) -> Iterator[Branch]:
        """The block's branches, each with its first and last module."""
        self.calls = [name for name, _, _ in self.module_outputs]
        exits = {keys[0]: name for name, keys, fits in self.module_outputs if fits and self.calls.count(name) == 1}
        outputs = {output for addend in self.addends for output in self._branch_outputs(addend, exits)}
        for output in sorted(outputs, key=lambda key: self.calls.index(exits[key])):
            inside = self._ancestors(output)
            entry = self._entry(inside)
            if entry is not None:
                kind = "attention" if inside & self.per_head else "feed_forward"
                yield Branch(block, kind, f"{block}.{entry}", f"{block}.{exits[output]}", self.first.shape[-1])

    def _branch_outputs(self, key: Key, exits: dict[Key, str], depth: int = 0) -> Iterator[Key]:
        """The module outputs behind an addend: itself, or those that it is scaled or summed from."""
        for addend in self.inplace_addends.get(key, ()):
            yield from self._branch_outputs(addend, exits, depth + 1)
        if key in exits:
            yield key
        elif depth < MAX_DEPTH:
            for parent in sorted(self.parents.get(key, set()) - self.stream):
                yield from self._branch_outputs(parent, exits, depth + 1)

    def _ancestors(self, output: Key) -> set[Key]:
        """Everything that a branch's output was computed from, down to the stream."""
        ancestors: set[Key] = set()
        pending = {output}
        while pending:
            ancestors |= pending
            pending = {parent for key in pending for parent in self.parents.get(key, ())} - self.stream - ancestors
        return ancestors

    def _entry(self, inside: set[Key]) -> str | None:
        """The first module that reads the stream and whose outputs belong to the branch alone."""
        outputs_of = {name: set(keys) for name, keys, _ in self.module_outputs if self.calls.count(name) == 1}
        for name, key in self.module_inputs:
            outputs = outputs_of.get(name, set())
            if key in self.stream and outputs & inside and not outputs & self.stream:
                return name
        return None


def _tensors(values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_iter(values) if isinstance(leaf, Tensor))

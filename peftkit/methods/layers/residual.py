"""Where a transformer block's branches meet its residual stream, found by watching a forward pass.

    x → x + branch(norm(x))            pre-norm (Llama, GPT-2)
    x → norm(x + branch(x))            post-norm (BERT)
    x → x + norm(branch(norm(x)))      both (Gemma 2)
    x → x + attention(…) + mlp(…)      parallel (GPT-NeoX, Phi)

A few tokens pass through the model while every operation is seen. What comes from a block's input without a product
with weights (norms, sums, copies) is its stream; a sum of the stream with something else of its shape is a residual
sum, and that something is a branch. No architecture is known by name, and names of modules are not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from peftkit.errors import ModelError
from peftkit.models import packing
from peftkit.models.blocks import find_blocks
from peftkit.models.loading import writes_text

TOKENS = 11
PRODUCTS = frozenset(
    {"mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "convolution", "einsum", "_grouped_mm", "embedding"}
)
SUMS = frozenset({"add", "add_"})
LARGEST = 2**22
"""Numbers in the largest tensor that is followed: activations of a few tokens are smaller, opened weights larger."""
DEPTH = 8
"""Operations between a branch's last module and the sum, at most."""
Key = int
UNKNOWN: Key = -1


@dataclass(frozen=True)
class Branch:
    """One branch of one block; names are those of modules of the model."""

    block: str
    kind: str
    """attention (tokens are mixed in it) or feed_forward."""
    entry: str
    """The module that the branch begins with: its first input is what the branch reads."""
    exit: str
    """The module that the branch ends with: its output is what is added to the residual stream."""
    width: int
    """Of the residual stream."""


def find_branches(model: nn.Module) -> list[Branch]:
    """The branches of every block, in the order in which they are added.

    Raises:
        ModelError: there are no blocks, or no residual sums in them.
    """
    prefix, blocks = find_blocks(model)
    watch = _Watch()
    handles = [handle for number, block in enumerate(blocks) for handle in watch.hooks(f"{prefix}.{number}", block)]
    try:
        with packing.eval_modules(model), torch.no_grad(), watch:
            model(**_inputs(model))
    except (RuntimeError, ValueError) as error:
        if packing.underlying(model).device.type != "meta":
            raise
        raise ModelError(f"{type(model).__name__} cannot be followed without its weights: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    if not watch.found:
        raise ModelError(f"{type(model).__name__}: no residual sum was seen in its blocks ({prefix})")
    return [branch for found in watch.found.values() for branch in found]


def _inputs(model: nn.Module) -> dict[str, Any]:
    base = packing.underlying(model)
    device = base.get_input_embeddings().weight.device
    inputs: dict[str, Any] = {"input_ids": torch.arange(1, TOKENS + 1, device=device)[None]}
    if device.type == "meta" and writes_text(base.config):  # a mask would be made by looking at values: none are there
        inputs["attention_mask"] = torch.zeros(1, 1, TOKENS, TOKENS, device=device, dtype=base.dtype)
    return inputs | packing.no_cache(model)


class _Watch(TorchDispatchMode):
    """Tells the trace of the block that is running of every operation and of every module that is run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[Branch]] = {}
        self._trace: _Trace | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if self._trace is not None:
            space, _, name = func._schema.name.partition("::")
            known = name if space == "aten" else "linear"  # whatever else a library brings is a product
            self._trace.operation(known, list(_tensors([*args, *(kwargs or {}).values()])), list(_tensors([made])))
        return made

    def hooks(self, name: str, block: nn.Module) -> Iterator[Any]:
        """Hooks on a block and on every module in it."""

        def begin(_: nn.Module, args: Any, kwargs: Any) -> None:
            stream = next(_tensors([*args, *kwargs.values()]), None)
            if name not in self.found and stream is not None:  # a shared block runs several times; once is enough
                self._trace = _Trace(stream)

        def end(*_: Any) -> None:
            if self._trace is not None and (found := list(self._trace.branches(name))):
                self.found[name] = found
            self._trace = None

        def enter(inner: str) -> Any:
            def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
                given = next(_tensors([*args, *kwargs.values()]), None)
                if self._trace is not None and given is not None:
                    self._trace.entered.append((inner, self._trace.key(given)))

            return hook

        def leave(inner: str) -> Any:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                if self._trace is not None:
                    self._trace.leave(inner, output)

            return hook

        yield block.register_forward_pre_hook(begin, with_kwargs=True)
        for inner, module in block.named_modules():
            if inner:
                yield module.register_forward_pre_hook(enter(inner), with_kwargs=True)
                yield module.register_forward_hook(leave(inner))
        yield block.register_forward_hook(end)


@dataclass
class _Trace:
    """What happens inside one block."""

    first: Tensor
    stream: set[Key] = field(default_factory=set)
    made_from: dict[Key, set[Key]] = field(default_factory=dict)
    branched: list[Key] = field(default_factory=list)
    """What was added to the stream."""
    summed: dict[Key, list[Key]] = field(default_factory=dict)
    """What was added in place to something that is not the stream yet: another branch."""
    heads: set[Key] = field(default_factory=set)
    """What has a dimension for heads: no feed-forward layer makes such a thing."""
    entered: list[tuple[str, Key]] = field(default_factory=list)
    left: list[tuple[str, tuple[Key, ...], bool]] = field(default_factory=list)
    """Name, results, and whether the only result is a tensor of the stream's shape."""
    alive: list[Tensor] = field(default_factory=list)
    """A key is a tensor's storage, and stands for it only as long as it lives."""

    def __post_init__(self) -> None:
        self.stream.add(self.key(self.first))

    def key(self, tensor: Tensor) -> Key:
        if tensor.numel() > LARGEST:
            return UNKNOWN
        self.alive.append(tensor)
        return int(tensor.untyped_storage()._cdata)

    def fits(self, tensor: Tensor) -> bool:
        """Whether it has the stream's numbers, in rows and tokens or one under the other."""
        return tensor.numel() == self.first.numel() and tensor.shape[-1] == self.first.shape[-1]

    def leave(self, name: str, output: Any) -> None:
        fits = isinstance(output, Tensor) and self.fits(output)
        self.left.append((name, tuple(self.key(tensor) for tensor in _tensors([output])), fits))

    def operation(self, name: str, given: list[Tensor], made: list[Tensor]) -> None:
        keys = [self.key(tensor) for tensor in given]
        of_stream = name not in PRODUCTS and any(key in self.stream for key in keys)
        summands = [key for key, one in zip(keys, given) if self.fits(one)] if name in SUMS else []
        if of_stream:
            self.branched += [key for key in summands if key not in self.stream]
        elif name == "add_" and len(summands) == 2:
            self.summed.setdefault(keys[0], []).append(keys[1])
            return
        for tensor in made:
            key = self.key(tensor)
            self.made_from.setdefault(key, set()).update(one for one in keys if one not in (key, UNKNOWN))
            if tensor.dim() == 4:
                self.heads.add(key)
            if of_stream:
                self.stream.add(key)

    def branches(self, block: str) -> Iterator[Branch]:
        """The block's branches, each by the modules that it begins and ends with."""
        self.calls = [name for name, _, _ in self.left]
        ends = {keys[0]: name for name, keys, fits in self.left if fits and self.calls.count(name) == 1}
        lasts = {last for summand in self.branched for last in self._lasts(summand, ends)}
        for last in sorted(lasts, key=lambda key: self.calls.index(ends[key])):
            inside = self._inside(last)
            first = self._beginning(inside)
            if first is not None:
                kind = "attention" if inside & self.heads else "feed_forward"
                width = self.first.shape[-1]
                yield Branch(block, kind, f"{block}.{first}", f"{block}.{ends[last]}", width)

    def _lasts(self, key: Key, ends: dict[Key, str], depth: int = 0) -> Iterator[Key]:
        """The result of a module that a summand is; of one made of others (scaled, or a sum of branches) theirs."""
        for one in self.summed.get(key, ()):
            yield from self._lasts(one, ends, depth + 1)
        if key in ends:
            yield key
        elif depth < DEPTH:
            for one in sorted(self.made_from.get(key, set()) - self.stream):
                yield from self._lasts(one, ends, depth + 1)

    def _inside(self, last: Key) -> set[Key]:
        """Everything that a branch's result was made of, short of the stream."""
        found: set[Key] = set()
        ahead = [last]
        while ahead:
            one = ahead.pop()
            if one not in found:
                found.add(one)
                ahead += self.made_from.get(one, set()) - self.stream
        return found

    def _beginning(self, inside: set[Key]) -> str | None:
        """The first module that reads the stream and whose results belong to the branch alone."""
        results = {name: set(keys) for name, keys, _ in self.left}
        for name, key in self.entered:
            makes = results.get(name, set())
            if key in self.stream and self.calls.count(name) == 1 and makes & inside and not makes & self.stream:
                return name
        return None


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)

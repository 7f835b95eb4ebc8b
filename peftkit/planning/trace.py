"""Memory and FLOPs of torch code, traced by running it on tensors without data.

The real modules, loss and autograd run under torch's fake tensors. Every storage counts from the operator that creates
it until its last reference is gone, so that the peak is the code's own for any architecture and method: tensors saved
for the backward pass, temporaries, gradients. Memory that an operator uses internally is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, shape_wrapper

aten = torch.ops.aten


def _attention_flops(matmuls: int, query: Sequence[int], key: Sequence[int]) -> int:
    """Of so many matmuls; query and key have shapes [rows, heads, tokens, width]."""
    rows, heads, queries, width = query
    return matmuls * 2 * rows * heads * queries * key[2] * width


def _attention_kernels(*names: str) -> dict[Any, Callable[..., int]]:
    forward = {getattr(aten, name): lambda query, key, *_, **__: _attention_flops(2, query, key) for name in names}
    backward = {
        getattr(aten, f"{name}_backward"): lambda _, query, key, *__, **___: _attention_flops(5, query, key)
        for name in names
    }
    return forward | backward


ATTENTION_FLOPS = _attention_kernels(
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
)  # fmt: skip
"""Formulas of attention kernels over the shapes of their arguments: torch does not count the CPU's, and refuses keys
with fewer heads than the queries (grouped-query attention) on a GPU."""
FLOPS = {**flop_registry, **{kernel: shape_wrapper(formula) for kernel, formula in ATTENTION_FLOPS.items()}}
LOGITS, OTHER = "logits", "activations"
MAPPED = 32 * 2**20
"""Bytes from which glibc always maps a block on its own (its largest M_MMAP_THRESHOLD), which leaves no holes."""


@dataclass
class Trace:
    """Memory and work of traced code."""

    peak: int = 0
    """Most bytes alive at once, in addition to those alive at the start."""
    parts: dict[str, int] = field(default_factory=dict)
    """The bytes of the peak, by part."""
    mapped: dict[str, int] = field(default_factory=dict)
    """Those of them in storages of at least ``MAPPED`` bytes."""
    end: int = 0
    """Bytes alive at the end."""
    flops: int = 0
    """FLOPs of matmuls, convolutions and attention."""
    moved: int = 0
    """Bytes read and written by all other operators."""
    operators: int = 0
    """Number of operator calls."""
    kernels: int = 0
    """Matmuls that differ in shape or dtype: a CPU's library may compile a kernel for each."""

    def resident(self, ratio: float) -> dict[str, int]:
        """The peak by part if the allocator takes ``ratio`` bytes per byte in storages that are not mapped."""
        mapped = {name: self.mapped.get(name, 0) for name in self.parts}
        return {name: mapped[name] + int((size - mapped[name]) * ratio) for name, size in self.parts.items()}


class FakeValues(TorchDispatchMode):
    """Gives tensors without data the value true, 1, or 1.0; two such tensors are equal."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = func in (aten._local_scalar_dense.default, aten.equal.default)
        if read and (isinstance(args[0], FakeTensor) or args[0].is_meta):
            if func is aten.equal.default or args[0].dtype == torch.bool:
                return True
            return 1.0 if args[0].dtype.is_floating_point else 1
        return func(*args, **(kwargs or {}))


class Tracer(FakeValues):
    """Counts storages, matmuls and operators while it is active; tensors of last dimension ``vocabulary`` as logits.

    Args:
        scored: for ``nonzero``: (number of elements of the tensor, how many of them are not zero).
    """

    def __init__(self, *, vocabulary: int = 0, scored: tuple[int, int] | None = None) -> None:
        super().__init__()
        self._vocabulary, self._scored = vocabulary, scored
        self._known: dict[int, weakref.ref[Any]] = {}
        self._live: Counter[str] = Counter()
        self._mapped: Counter[str] = Counter()
        self._matmuls: set[Any] = set()
        self.trace = Trace()

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Do not count these tensors, which are in memory already."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known[storage._cdata] = weakref.ref(storage)

    def finish(self) -> Trace:
        """The trace up to here; to be called while the results are still referenced."""
        self.trace.end, self.trace.kernels = self._live.total(), len(self._matmuls)
        return self.trace

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        nonzero = func is aten.nonzero.default
        out = self._nonzero(args[0]) if nonzero else super().__torch_dispatch__(func, types, args, kwargs)
        self._count_work(func, args, kwargs, out, [tensor for tensor in _tensors(out) if self._count_storage(tensor)])
        return out

    def _nonzero(self, tensor: torch.Tensor) -> torch.Tensor:
        count = tensor.numel()
        if self._scored and count == self._scored[0]:
            count = self._scored[1]
        return torch.empty((count, tensor.dim()), dtype=torch.int64, device=tensor.device)

    def _count_storage(self, tensor: torch.Tensor) -> bool:
        """Count a tensor's storage if it is new; returns whether it is."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self._known.get(key)
        if known is not None and known() is storage:
            return False
        part = LOGITS if self._vocabulary and tensor.dim() and tensor.shape[-1] == self._vocabulary else OTHER
        self._known[key] = weakref.ref(storage, self._on_free(key, part, size))
        self._add(part, size)
        if (total := self._live.total()) > self.trace.peak:
            self.trace.peak, self.trace.parts, self.trace.mapped = total, dict(self._live), dict(self._mapped)
        return True

    def _add(self, part: str, size: int) -> None:
        self._live[part] += size
        self._mapped[part] += size if abs(size) >= MAPPED else 0

    def _on_free(self, key: int, part: str, size: int) -> Callable[[Any], None]:
        def on_free(reference: Any) -> None:
            self._add(part, -size)
            if self._known.get(key) is reference:
                del self._known[key]

        return on_free

    def _count_work(self, func: Any, args: Any, kwargs: Any, out: Any, created: list[torch.Tensor]) -> None:
        formula = FLOPS.get(func._overloadpacket)
        self.trace.operators += 1
        if formula is not None:
            self.trace.flops += int(formula(*args, **kwargs, out_val=out))
            if func._overloadpacket in flop_registry:
                self._matmuls.add((func, *((tuple(t.shape), t.stride(), t.dtype) for t in _tensors(args))))
        elif created or func._schema.is_mutable:
            self.trace.moved += sum(t.numel() * t.element_size() for t in (*_tensors(args), *created))


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@contextmanager
def fake_tensor_mode() -> Iterator[None]:
    """Within the context, new tensors have shapes and no data, and random generators do not change."""
    state = _GET()
    try:
        # activation checkpointing saves and restores the generator's state, which fails on fake tensors
        torch.get_rng_state = torch.random.get_rng_state = lambda: state  # type: ignore[assignment]
        torch.set_rng_state = torch.random.set_rng_state = lambda _: None  # type: ignore[assignment]
        with FakeTensorMode(allow_non_fake_inputs=True), FakeValues():
            yield
    finally:
        torch.get_rng_state = torch.random.get_rng_state = _GET  # type: ignore[assignment]
        torch.set_rng_state = torch.random.set_rng_state = _SET  # type: ignore[assignment]


_GET, _SET = torch.random.get_rng_state, torch.random.set_rng_state

"""What a piece of torch code holds in memory and how much it computes, found by running it on tensors without data.

The real modules, the real loss and the real autograd run under torch's fake tensors; every storage is counted when an
operator makes it and taken off when its last reference dies. The peak is therefore that of the code itself, whatever
the architecture and the method: tensors saved for the backward pass, temporaries, gradients. What an operator uses
inside itself is not seen.

Where code asks a fake tensor for its value, it is answered: true, 1, or 1.0; ``nonzero`` finds as many elements as
``Tracer.scored`` says (the tokens that carry the loss).
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
LOGITS, OTHER = "logits", "activations"
MAPPED = 32 * 2**20
"""Bytes from which glibc always maps a block by itself (its largest M_MMAP_THRESHOLD): it leaves no holes."""


@dataclass
class Traced:
    """What a stretch of code did."""

    peak: int = 0
    """Most bytes alive at once, over those alive when the tracer began."""
    parts: dict[str, int] = field(default_factory=dict)
    """Those bytes by part."""
    mapped: dict[str, int] = field(default_factory=dict)
    """Of these, the bytes in storages of ``MAPPED`` bytes and more."""
    end: int = 0
    """Bytes still alive at the end."""
    flops: int = 0
    """Multiplications and additions of matrix products, convolutions and attention."""
    moved: int = 0
    """Bytes read and written by all other operators."""
    operators: int = 0
    """Operators called."""
    kernels: int = 0
    """Products unlike each other in shape or type, for each of which a CPU's library may make a kernel of its own."""

    def resident(self, ratio: float) -> dict[str, int]:
        """The peak's bytes by part where an allocator takes ``ratio`` for each byte in storages that are not mapped."""
        mapped = {name: self.mapped.get(name, 0) for name in self.parts}
        return {name: mapped[name] + int((size - mapped[name]) * ratio) for name, size in self.parts.items()}


class Answers(TorchDispatchMode):
    """Answers code that asks a tensor without data for its value: true, 1, or 1.0; two such tensors are equal."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (aten._local_scalar_dense.default, aten.equal.default) and _has_no_data(args[0]):
            return True if func is aten.equal.default else _plausible(args[0].dtype)
        return func(*args, **(kwargs or {}))


class Tracer(Answers):
    """Counts storages, products and operators while it is active.

    Args:
        vocabulary: tensors whose last dimension is this count as logits.
        scored: (elements in question, how many of them are not zero) for ``nonzero``.
    """

    def __init__(self, *, vocabulary: int = 0, scored: tuple[int, int] | None = None) -> None:
        super().__init__()
        self._vocabulary, self._scored = vocabulary, scored
        self._known: dict[int, weakref.ref[Any]] = {}
        self._live: Counter[str] = Counter()
        self._mapped: Counter[str] = Counter()
        self._total = 0
        self._products: set[Any] = set()
        self.found = Traced()

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """These stand in memory already and are counted elsewhere."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known[storage._cdata] = weakref.ref(storage)

    def finish(self) -> Traced:
        """What was found; call it at the end, while what is to be kept is still referenced."""
        self.found.end, self.found.kernels = self._total, len(self._products)
        return self.found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        nonzero = func is aten.nonzero.default
        out = self._nonzero(args[0]) if nonzero else super().__torch_dispatch__(func, types, args, kwargs)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        fresh = [tensor for tensor in made if self._see(tensor)]
        self._count(func, args, kwargs, out, fresh)
        return out

    def _nonzero(self, tensor: torch.Tensor) -> torch.Tensor:
        count = tensor.numel()
        if self._scored and count == self._scored[0]:
            count = self._scored[1]
        return torch.empty((count, tensor.dim()), dtype=torch.int64, device=tensor.device)

    def _see(self, tensor: torch.Tensor) -> bool:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        held = self._known.get(key)
        if held is not None and held() is storage:
            return False
        part = LOGITS if self._vocabulary and tensor.dim() and tensor.shape[-1] == self._vocabulary else OTHER
        self._known[key] = weakref.ref(storage, self._forget(key, part, size))
        self._book(part, size, 1)
        if self._total > self.found.peak:
            self.found.peak, self.found.parts = self._total, dict(self._live)
            self.found.mapped = dict(self._mapped)
        return True

    def _book(self, part: str, size: int, sign: int) -> None:
        self._live[part] += sign * size
        self._mapped[part] += sign * size if size >= MAPPED else 0
        self._total += sign * size

    def _forget(self, key: int, part: str, size: int) -> Callable[[Any], None]:
        def gone(reference: Any) -> None:
            self._book(part, size, -1)
            if self._known.get(key) is reference:
                del self._known[key]

        return gone

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any, fresh: list[torch.Tensor]) -> None:
        formula = flop_registry.get(func._overloadpacket)
        self.found.operators += 1
        if formula is not None:
            self.found.flops += int(formula(*args, **kwargs, out_val=out))
            kinds = ((tuple(t.shape), t.stride(), t.dtype) for t in tree_leaves(args) if isinstance(t, torch.Tensor))
            self._products.add((func, *kinds))
        elif func._overloadpacket is aten._scaled_dot_product_flash_attention_for_cpu:
            self.found.flops += _attention_flops(args[0], args[1], 2)
        elif func._overloadpacket is aten._scaled_dot_product_flash_attention_for_cpu_backward:
            self.found.flops += _attention_flops(args[1], args[2], 5)
        elif fresh or func._schema.is_mutable:
            read = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.found.moved += sum(t.numel() * t.element_size() for t in (*read, *fresh))


def _attention_flops(query: torch.Tensor, key: torch.Tensor, products: int) -> int:
    rows, heads, queries, width = query.shape
    return products * 2 * rows * heads * queries * key.shape[2] * width


def _has_no_data(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, FakeTensor) or tensor.is_meta


def _plausible(dtype: torch.dtype) -> Any:
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1


@contextmanager
def fake_tensor_mode() -> Iterator[FakeTensorMode]:
    """Tensors made inside have shapes and no data; random generators are left as they are."""
    state = _GET()
    try:
        # checkpointing keeps and restores the state of dropout's generator, which fake tensors do not have
        torch.get_rng_state = torch.random.get_rng_state = lambda: state  # type: ignore[assignment]
        torch.set_rng_state = torch.random.set_rng_state = lambda _: None  # type: ignore[assignment]
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, Answers():
            yield mode
    finally:
        torch.get_rng_state = torch.random.get_rng_state = _GET  # type: ignore[assignment]
        torch.set_rng_state = torch.random.set_rng_state = _SET  # type: ignore[assignment]


_GET, _SET = torch.random.get_rng_state, torch.random.set_rng_state

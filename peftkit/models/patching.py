"""Two ways to replace a module's ``forward``: on the instance, or by a subclass; docs/patches.md lists every use."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

if TYPE_CHECKING:
    from torch import nn

_REPLACED: WeakSet[Any] = WeakSet()


@contextlib.contextmanager
def replaced_forward(forwards: Mapping[Any, Callable[..., Any]]) -> Iterator[None]:
    """A context in which each module runs the given function; hooks around the module's call run as before.

    A ``forward`` that was already set on the instance (device maps set one) is restored at the end.
    """
    originals = {module: vars(module).get("forward") for module in forwards}
    _REPLACED.update(forwards)
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, original in originals.items():
            _REPLACED.discard(module)
            if original is None:
                del module.forward
            else:
                module.forward = original


def is_replaced(module: nn.Module) -> bool:
    """Whether a function computes in a module's place at the moment."""
    return module in _REPLACED


def with_forward(cls: type[nn.Module], forward: Callable[..., Any]) -> type[nn.Module]:
    """A subclass with another ``forward``, for a module's ``__class__``: names, parameters and state dict stay."""
    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__, "__doc__": cls.__doc__})

"""Named things that can be extended by a file in a package of peftkit, or through an entry point of a distribution."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from peftkit.errors import RecipeError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """A mapping from names to items that loads itself on first use and refuses duplicates.

    Args:
        noun: what an item is called in messages ("method").
        package: a package whose modules register items when imported; None where items register themselves.
        group: the entry-point group through which installed distributions add items.
    """

    def __init__(self, noun: str, *, package: str | None = None, group: str | None = None) -> None:
        self.noun = noun
        self._package, self._group = package, group
        self._items: dict[str, T] = {}
        self._loaded = False
        self._lock = threading.RLock()

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds an item under ``name``; raises RecipeError when the name is taken."""

        def add(item: T) -> T:
            first, second = _origin(self._items.get(name, item)), _origin(item)
            if first != second:
                raise RecipeError(f"{self.noun} '{name}' is registered twice: {first} and {second}; rename one")
            self._items[name] = item
            return item

        return add

    def get(self, name: str) -> T:
        """The item of that name; raises RecipeError naming the nearest when there is none."""
        self._load()
        try:
            return self._items[name]
        except KeyError:
            raise RecipeError(f"unknown {self.noun} '{name}': {did_you_mean(name, self._items)}") from None

    def names(self) -> list[str]:
        self._load()
        return sorted(self._items)

    def summaries(self) -> dict[str, str]:
        """Name → first line of the item's docstring, sorted by name."""
        return {name: (inspect.getdoc(self.get(name)) or "").partition("\n")[0] for name in self.names()}

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def _load(self) -> None:
        with self._lock:
            if self._loaded:
                return
            self._loaded = True  # before the imports: they may ask this registry for what they build on
            if self._package:
                package = importlib.import_module(self._package)
                for module in pkgutil.iter_modules(package.__path__):
                    importlib.import_module(f"{self._package}.{module.name}")
            if self._group:
                for point in entry_points(group=self._group):
                    self.register(point.name)(point.load())


def _origin(item: object) -> str:
    code = getattr(item, "__code__", None)
    where = code.co_filename if code else getattr(item, "__module__", "?")
    return f"{getattr(item, '__qualname__', item)} in {where}"

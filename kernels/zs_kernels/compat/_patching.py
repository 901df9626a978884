"""Swap functions of another package for ours wherever a module holds a reference to them, and back."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

Function = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Swap:
    """One name of the framework and what takes its place."""

    name: str
    """What `patch(only=...)` and `Patched.calls` call it."""
    module: str
    attribute: str
    """A name in the module, or `Class.method`."""
    build: Callable[[Callable[[Function], Function]], Any]
    """Makes the replacement; its argument wraps a function so that calls of it are counted."""


def function(name: str, module: str, ours: Function, *, attribute: str | None = None) -> Swap:
    """A function for a function."""
    return Swap(name, module, attribute or name, lambda counted: counted(ours))


def autograd_function(name: str, module: str, ours: Function) -> Swap:
    """Something with an `apply` for a torch.autograd.Function."""
    return Swap(
        name, module, name, lambda counted: _named(ours, type(name, (), {"apply": staticmethod(counted(ours))}))
    )


def network(name: str, module: str, ours: type[torch.nn.Module]) -> Swap:
    """A torch.nn.Module class for another; instances made before the swap stay what they are."""
    return Swap(
        name, module, name, lambda counted: _named(ours, type(name, (ours,), {"forward": counted(ours.forward)}))
    )


def _named(ours: Any, made: type) -> type:
    made.__module__ = ours.__module__
    return made


@dataclass(frozen=True, slots=True)
class Patched:
    """What `patch()` gives: which names are ours at the moment, and how often each was called since the first entry."""

    calls: Counter[str] = field(default_factory=Counter)
    """Name -> calls; those inside a compiled graph are not counted."""
    names: set[str] = field(default_factory=set)


class Patcher:
    """The swaps of one framework. Entering twice is fine: each name goes back when its last user leaves."""

    def __init__(self, framework: str, version: str, swaps: Callable[[], Sequence[Swap]]) -> None:
        self._framework, self._version, self._swaps = framework, version, swaps
        self._patched = Patched()
        self._depths: Counter[str] = Counter()
        self._active: dict[str, tuple[Swap, Any, Any]] = {}
        self._lock = threading.RLock()

    @contextmanager
    def __call__(self, only: Iterable[str] | None) -> Iterator[Patched]:
        swaps = self._chosen(only)
        with self._lock:
            if not self._depths:
                self._patched.calls.clear()
            self._enter([swap for swap in swaps if not self._depths[swap.name]])
            self._depths.update(swap.name for swap in swaps)
        try:
            yield self._patched
        finally:
            with self._lock:
                self._depths.subtract(swap.name for swap in swaps)
                self._leave([swap.name for swap in swaps if not self._depths[swap.name]])
                self._depths = +self._depths

    def _chosen(self, only: Iterable[str] | None) -> list[Swap]:
        known = {swap.name: swap for swap in self._swaps()}
        if only is None:
            return list(known.values())
        names = list(dict.fromkeys(only))
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"{self._op}: argument 'only' must hold names of {sorted(known)}, got {unknown}")
        return [known[name] for name in names]

    @property
    def _op(self) -> str:
        return f"zs_kernels.compat.{self._framework}.patch"

    def _enter(self, swaps: list[Swap]) -> None:
        found = [(swap, self._original(swap)) for swap in swaps]  # all of them before the first is touched
        for swap, original in found:
            ours = swap.build(functools.partial(self._counted, swap.name))
            self._active[swap.name] = (swap, original, ours)
            self._patched.names.add(swap.name)
            _replace(swap, original, ours, self._framework)

    def _leave(self, names: list[str]) -> None:
        for name in names:
            swap, original, ours = self._active.pop(name)
            self._patched.names.discard(name)
            _replace(swap, ours, original, self._framework)

    def _original(self, swap: Swap) -> Any:
        owner, _, method = swap.attribute.partition(".")
        try:
            module = importlib.import_module(swap.module)
            value = getattr(module, owner)
            return vars(value)[method] if method else value
        except ModuleNotFoundError as missing:
            name = missing.name or ""
            if name == self._framework:
                install = f"`pip install {self._framework}=={self._version}` first"
                raise ImportError(f"{self._op}: {self._framework} is not installed; {install}") from missing
            if not name.startswith(f"{self._framework}."):
                raise
            raise self._lacks(swap) from missing
        except (AttributeError, KeyError) as missing:
            raise self._lacks(swap) from missing

    def _lacks(self, swap: Swap) -> ImportError:
        try:
            installed = importlib.metadata.version(self._framework)
        except importlib.metadata.PackageNotFoundError:
            installed = "(unknown version)"
        return ImportError(
            f"{self._op}: {self._framework} {installed} has no {swap.module}.{swap.attribute}; this is written for "
            f"{self._framework} {self._version}. Install that version, or name what to swap without {swap.name!r}: "
            f"patch(only=[...])"
        )

    def _counted(self, name: str, ours: Function) -> Function:
        calls = self._patched.calls

        @functools.wraps(ours)
        def counted(*arguments: Any, **keywords: Any) -> Any:
            if not torch.compiler.is_compiling():  # a number that changes at each call would recompile the graph
                calls[name] += 1
            return ours(*arguments, **keywords)

        return counted


def _replace(swap: Swap, old: Any, new: Any, framework: str) -> None:
    """Put `new` wherever a loaded module, or a registry (dict) of the framework's modules, holds `old`."""
    owner, _, method = swap.attribute.partition(".")
    if method:
        setattr(getattr(sys.modules[swap.module], owner), method, new)
        return
    for name, module in list(sys.modules.items()):
        if not isinstance(module, ModuleType) or name.startswith("zs_kernels."):
            continue
        ours = name == framework or name.startswith(f"{framework}.")
        for key, value in list(vars(module).items()):
            if value is old:
                setattr(module, key, new)
            elif ours and isinstance(value, dict):
                for entry in [entry for entry, held in value.items() if held is old]:
                    value[entry] = new

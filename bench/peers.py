"""Other people's packages, where they are installed. A missing one is a row less, never an error."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any
from unittest import mock

INSTALL = "bash scripts/peers.sh .venv/bin/python"
"""Installs all of them at the versions that results name."""
PACKAGES = ("trl", "verl", "liger-kernel", "torchrl", "cut-cross-entropy")


def versions() -> dict[str, str]:
    """The installed ones."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def find(module: str, name: str) -> Any:
    """An object of a peer's module, or None where the peer (or something it needs) is not installed."""
    try:
        with _without_ray() if module.startswith("verl.") else contextlib.nullcontext():
            return getattr(importlib.import_module(module), name, None)
    except (ImportError, RuntimeError, OSError):  # RuntimeError: Triton finds no GPU; OSError: a library is missing
        return None


@contextlib.contextmanager
def _without_ray() -> Iterator[None]:
    """verl's formulas need no Ray, but the modules they stand in import it: where it is missing, a stand-in."""
    names = ("ray", "ray.actor", "ray.experimental", "ray.experimental.state", "ray.experimental.state.api", "ray.util")
    more = ("ray.util.collective", "ray.util.placement_group", "ray.util.scheduling_strategies")
    added = [] if "ray" in sys.modules or importlib.util.find_spec("ray") else [*names, *more]
    sys.modules.update({name: mock.MagicMock() for name in added})
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


class Variants:
    """Collects the variants of a case; a peer that is not there is noted instead."""

    def __init__(self) -> None:
        self.calls: dict[str, Callable[[], Any]] = {}
        self.absent: dict[str, str] = {}

    def add(self, name: str, call: Callable[[], Any]) -> None:
        """One of ours, or plain torch."""
        self.calls[name] = call

    def add_peer(self, name: str, needed: object, call: Callable[[], Any]) -> None:
        """A peer's way; `needed`: what `find` gave for it."""
        if needed is None:
            self.absent[name] = INSTALL
        else:
            self.calls[name] = call

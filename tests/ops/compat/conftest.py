"""The frameworks themselves, imported as far as this machine can; tests that need one are skipped where it is absent.

verl imports Ray (240 MB) and OpenRLHF deepspeed, for things that the compared functions never touch: files in
stand_ins/ take their place during the import, and only then.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

STAND_INS = Path(__file__).parent / "stand_ins"


@contextmanager
def quiet_imports(*stand_ins: str) -> Iterator[None]:
    """Import with stand-ins for packages that are not installed; loggers and modules are left as they were."""
    missing = [name for name in stand_ins if importlib.util.find_spec(name) is None]
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    sys.path.insert(0, str(STAND_INS))
    try:
        yield
    finally:
        sys.path.remove(str(STAND_INS))
        for name in missing:
            sys.modules.pop(name, None)
        root.handlers[:] = handlers
        root.setLevel(level)


def need(package: str, version: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; `scripts/peers.sh .venv/bin/python` installs {package} {version}")


@pytest.fixture(scope="session")
def trl_utils() -> ModuleType:
    need("trl", "1.16.0")
    return importlib.import_module("trl.trainer.utils")


@pytest.fixture(scope="session")
def trl_grpo() -> ModuleType:
    need("trl", "1.16.0")
    return importlib.import_module("trl.trainer.grpo_trainer")


@pytest.fixture(scope="session")
def verl() -> SimpleNamespace:
    """core: verl.trainer.ppo.core_algos, functional: verl.utils.torch_functional, fused, kernel: its linear heads."""
    need("verl", "0.9.1")
    with quiet_imports("ray"):
        core = importlib.import_module("verl.trainer.ppo.core_algos")
        functional = importlib.import_module("verl.utils.torch_functional")
        fused = importlib.import_module("verl.utils.experimental.torch_functional")
        kernel = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
        config = importlib.import_module("verl.workers.config").ActorConfig
    return SimpleNamespace(core=core, functional=functional, fused=fused, kernel=kernel, ActorConfig=config)


@pytest.fixture(scope="session")
def openrlhf() -> SimpleNamespace:
    """utils: openrlhf/models/utils.py, loss: openrlhf/models/loss.py, loaded from their files: importing the package
    itself needs flash-attn and deepspeed."""
    need("openrlhf", "0.11.2")
    folder = Path(importlib.util.find_spec("openrlhf").submodule_search_locations[0]) / "models"
    package = ModuleType("zs_peer_openrlhf")
    package.__path__ = [str(folder)]
    sys.modules[package.__name__] = package
    loaded = {}
    with quiet_imports("deepspeed"):
        for name in ("utils", "loss"):
            spec = importlib.util.spec_from_file_location(f"{package.__name__}.{name}", folder / f"{name}.py")
            loaded[name] = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = loaded[name]
            spec.loader.exec_module(loaded[name])
    return SimpleNamespace(**loaded)

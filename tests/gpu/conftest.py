"""Tests that need a GPU: skipped, with the reason, where there is none. `bash scripts/gpu.sh ops` runs them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = None
    if not torch.cuda.is_available():
        reason = "no CUDA device here"
    elif os.environ.get("TRITON_INTERPRET") == "1":
        reason = "Triton interprets: run these by scripts/gpu.sh"
    for item in items:
        if reason and HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _memory_is_given_back():
    """Tests here take gigabytes each."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

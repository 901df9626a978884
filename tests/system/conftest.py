from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import zs_fast.train


@pytest.fixture(scope="module")
def no_pictures():
    """Runs without curve and report: drawing takes longer than a short run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zs_fast.train, "reward_curve", lambda *_: None)
        patch.setattr(zs_fast.train, "write_report", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def memory_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder on a file system in memory where there is one: thousands of small files are made and removed."""
    if os.access("/dev/shm", os.W_OK):
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            yield Path(folder)
    else:
        yield tmp_path_factory.mktemp("faults")

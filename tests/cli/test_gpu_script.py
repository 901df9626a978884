"""scripts/gpu.sh as far as it goes without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent


def gpu(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "ZS_WHEELS": ""}
    command = ["bash", str(ROOT / "scripts/gpu.sh"), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_it_is_sound_bash():
    assert subprocess.run(["bash", "-n", str(ROOT / "scripts/gpu.sh")], capture_output=True).returncode == 0


def test_an_unknown_part_shows_the_parts():
    done = gpu("opps")
    assert done.returncode == 2
    assert all(f"gpu.sh {part} " in done.stdout for part in ("ops", "sanitizer", "bench", "train"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_builds_nothing():
    done = gpu("ops")
    assert done.returncode == 1 and "finds no CUDA device here" in done.stderr
    assert not done.stdout

"""scripts/gpu.sh as far as it goes without a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent


PARTS = ("ops", "sanitizer", "bench", "step", "train")


def gpu(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "ZS_WHEELS": "", **variables}
    command = ["bash", str(ROOT / "scripts/gpu.sh"), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_it_is_sound_bash():
    assert subprocess.run(["bash", "-n", str(ROOT / "scripts/gpu.sh")], capture_output=True).returncode == 0


def test_an_unknown_part_shows_the_parts():
    done = gpu("opps")
    assert done.returncode == 2
    assert all(f"gpu.sh {part} " in done.stdout for part in PARTS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_builds_nothing():
    done = gpu("ops")
    assert done.returncode == 1 and "finds no CUDA device here" in done.stderr
    assert not done.stdout


DRY_MARKS = {"step": pytest.mark.full}
"""Its two benchmarks have quick runs of their own in the default tier."""


@pytest.mark.parametrize("part", [pytest.param(part, marks=DRY_MARKS.get(part, ())) for part in PARTS])
def test_each_part_runs_by_itself_on_a_cpu_at_small_sizes(part, tmp_path):
    done = gpu(part, ZS_GPU_DRY="1", ZS_RESULTS=str(tmp_path), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert f"results are in {tmp_path}/dry_run" in done.stdout
    written = {path.name for path in (tmp_path / "dry_run").iterdir()}
    files = {
        "ops": "tests_gpu.txt",
        "bench": "bench_ops.txt",
        "step": "bench_end_to_end.txt",
        "train": "quickstart.json",
    }
    assert part == "sanitizer" or files[part] in written


def test_every_test_that_needs_a_gpu_is_in_it():
    """Whoever skips a test for want of CUDA has it run by the script."""
    script = (ROOT / "scripts/gpu.sh").read_text(encoding="utf-8")
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        needs = "not torch.cuda.is_available()" in path.read_text(encoding="utf-8") and path.name != Path(__file__).name
        folder = path.relative_to(ROOT).parent.as_posix()
        assert not needs or folder == "tests/gpu" or path.relative_to(ROOT).as_posix() in script, path


def test_a_part_takes_nine_minutes_at_most():
    """By its own limits, building aside; compute-sanitizer has four tools."""
    script = (ROOT / "scripts/gpu.sh").read_text(encoding="utf-8")
    for part in PARTS:
        body = script.split(f"\n{part}() {{", 1)[1].split("\n}", 1)[0]
        limits = [int(found) for found in re.findall(r"timeout (\d+)", body)]
        times = {"sanitizer": 4, "step": 2}.get(part, 1)
        assert limits and sum(limits) * times <= 540, (part, limits)

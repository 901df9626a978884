"""`make setup`, with a stand-in for the environment's python: what it asks pip for, what a failure leaves behind."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = pytest.mark.skipif(
    not (ROOT / "Makefile").is_file() or not shutil.which("make"), reason="needs a checkout and make"
)

# Writes down its arguments; `-c` is the version query of scripts/constraints.sh; FAIL_ON makes a pip call fail.
STAND_IN = """#!/usr/bin/env bash
echo "$*" >> "$CALLS"
if [[ $1 == -c ]]; then echo "${INSTALLED_TORCH:-2.13.0+cpu}"; fi
if [[ -n ${FAIL_ON:-} && "$*" == *"$FAIL_ON"* ]]; then echo "no network" >&2; exit 1; fi
"""


@pytest.fixture
def checkout(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "setup.py", "CMakeLists.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    (tmp_path / "no_gpu").mkdir()
    for path in ("venv/bin/python", "venv/bin/zs-fast", "no_gpu/nvidia-smi"):
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("#!/bin/sh\nexit 1\n" if "nvidia" in path else STAND_IN)
        target.chmod(target.stat().st_mode | stat.S_IXUSR)
    return tmp_path


def make(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {
        **os.environ,
        "CALLS": str(checkout / "calls"),
        "PATH": f"{checkout / 'no_gpu'}:{os.environ['PATH']}",
        "MAKEFLAGS": "",
        **environment,
    }
    command = ["make", "setup", "VENV=venv", *arguments]
    return subprocess.run(command, cwd=checkout, env=variables, capture_output=True, text=True, timeout=60)


def calls(checkout: Path) -> list[str]:
    return (checkout / "calls").read_text().splitlines()


def test_torch_comes_first_and_without_cuda(checkout):
    done = make(checkout)
    assert done.returncode == 0, done.stderr
    asked = [call for call in calls(checkout) if "pip install" in call]
    assert asked[0] == "-m pip install torch==2.13.0+cpu"
    assert asked[1] == "-m pip install -c venv/constraints.txt -e .[train,test]"
    assert (checkout / "venv" / ".zs_fast_setup").is_file()
    assert (checkout / "venv" / "constraints.txt").read_text() == (ROOT / "constraints.txt").read_text()


def test_a_second_call_does_nothing(checkout):
    make(checkout)
    before = calls(checkout)
    assert make(checkout).returncode == 0
    assert calls(checkout) == before


@pytest.mark.parametrize("step", ["2.13.0+cpu", "-e .[train,test]", "doctor"])
def test_a_failing_step_leaves_no_stamp(checkout, step):
    done = make(checkout, FAIL_ON=step)
    assert done.returncode != 0
    assert not (checkout / "venv" / ".zs_fast_setup").exists()
    assert make(checkout).returncode == 0, "the next call starts over"
    assert (checkout / "venv" / ".zs_fast_setup").is_file()


def test_another_torch_frees_its_pins(checkout):
    done = make(checkout, "TORCH=torch==2.14.1", INSTALLED_TORCH="2.14.1+cpu")
    assert done.returncode == 0, done.stderr
    pins = (checkout / "venv" / "constraints.txt").read_text().splitlines()
    assert "torch==2.14.1+cpu" in pins
    assert not [pin for pin in pins if pin.startswith(("torch==2.13", "triton=="))]
    assert any(pin.startswith("transformers==") for pin in pins)


def test_a_gpu_gets_the_plain_build(checkout):
    (checkout / "no_gpu" / "nvidia-smi").write_text("#!/bin/sh\nexit 0\n")
    make(checkout)
    assert calls(checkout)[0] == "-m pip install torch==2.13.0"


def test_no_python_is_said(checkout):
    shutil.rmtree(checkout / "venv")
    done = make(checkout, "PYTHON=")
    assert done.returncode != 0 and "Python >= 3.11" in done.stderr

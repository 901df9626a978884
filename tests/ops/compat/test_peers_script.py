"""scripts/peers.sh and the make targets that call it, with a stand-in for the environment's python."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.skipif(not (ROOT / "scripts" / "peers.sh").is_file(), reason="needs a checkout")

# Answers the version queries of peers.sh and constraints.sh; from the second pip call on, VERSION_AFTER.
STAND_IN = """#!/usr/bin/env bash
echo "$*" | head -n 1 >> "$CALLS"
if [[ $1 == -c && $2 == *triton* ]]; then
    if grep -q "pip install" "$CALLS"; then echo "${VERSIONS_AFTER:-torch 2.13.0+cpu triton 3.7.1}"
    else echo "torch 2.13.0+cpu triton 3.7.1"; fi
elif [[ $1 == -c ]]; then echo "2.13.0+cpu"; fi
if [[ -n ${FAIL_ON:-} && "$*" == *"$FAIL_ON"* ]]; then echo "no network" >&2; exit 1; fi
"""


@pytest.fixture
def python(tmp_path):
    path = tmp_path / "python"
    path.write_text(STAND_IN)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def run(python: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    calls = python.with_name("calls")
    variables = {**os.environ, "CALLS": str(calls), **environment}
    command = ["bash", str(ROOT / "scripts" / "peers.sh"), str(python)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)
    return done, [call for call in calls.read_text().splitlines() if "pip install" in call]


def test_everything_is_installed_under_the_constraints(python):
    done, calls = run(python)
    assert done.returncode == 0, done.stderr
    pins = dict(re.findall(r"^([\w.-]+)==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    asked = [word for call in calls for word in call.split()[3:] if not word.startswith(("-", "/"))]
    assert {"trl", "verl", "openrlhf", "liger-kernel", "cut-cross-entropy", "torchrl"} <= set(asked)
    assert not [name for name in asked if name not in pins], "each has one version"
    assert all(" -c " in call for call in calls)
    assert not {"torch", "triton", "ray"} & set(asked)


def test_a_touched_torch_is_an_error(python):
    done, _ = run(python, VERSIONS_AFTER="torch 2.15.0 triton 3.9.0")
    assert done.returncode == 1
    assert "torch 2.13.0+cpu triton 3.7.1 became torch 2.15.0 triton 3.9.0" in done.stderr


def test_a_failed_download_is_an_error_but_for_openrlhf(python):
    """OpenRLHF has wheels for some Pythons alone."""
    done, _ = run(python, FAIL_ON="verl")
    assert done.returncode == 1 and "no network" in done.stderr
    done, _ = run(python, FAIL_ON="openrlhf")
    assert done.returncode == 0 and "tests against it are skipped" in done.stderr


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_test_installs_them_unless_told_not_to(tmp_path):
    def planned(*arguments: str) -> str:
        command = ["make", "-n", "test", f"VENV={tmp_path}", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout

    assert "scripts/peers.sh" in planned()
    assert "scripts/peers.sh" not in planned("PEERS=")

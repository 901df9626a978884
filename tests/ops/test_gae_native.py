"""The compiled GAE has the reference's bits, whatever stands beside a sequence; and what happens without it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.ops.test_gae import LENGTHS, native, packed
from zs_kernels import _device
from zs_kernels.gae import MODES, gae_reference, statistics_reference


def run_native(rewards, values, mask, cu_seqlens, mode="carry", **options):
    return torch.ops.zs_native.gae(
        rewards, values, mask, cu_seqlens, 0.99, 0.95, mode=MODES.index(mode), statistics=True, **options
    )


@native
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lengths", [*LENGTHS, [4096, 1, 5000, 33] * 4, list(range(40)), [300, *[3] * 30]])
def test_bits_of_the_reference(lengths, mode):
    rewards, values, mask, cu_seqlens = packed(lengths)
    fast = run_native(rewards, values, mask, cu_seqlens, mode)
    slow = gae_reference(rewards, values, mask, cu_seqlens, gamma=0.99, lam=0.95, mode=mode)
    assert torch.equal(fast[0], slow[0].float()) and torch.equal(fast[1], slow[1].float())
    torch.testing.assert_close(fast[2], statistics_reference(fast[0], mask), rtol=1e-12, atol=1e-12)


@native
def test_a_sequence_alone_has_the_bits_it_has_in_a_batch():
    lengths = [5, 60, 8, 0, 33, 17, 90, 1, 12, 40]
    rewards, values, mask, cu_seqlens = packed(lengths)
    together = run_native(rewards, values, mask, cu_seqlens)
    for s, length in enumerate(lengths):
        part = slice(int(cu_seqlens[s]), int(cu_seqlens[s + 1]))
        alone = run_native(rewards[part], values[part], mask[part], torch.tensor([0, length]))
        assert torch.equal(alone[0], together[0][part]) and torch.equal(alone[1], together[1][part])


DIGEST = """
import hashlib, torch
from zs_kernels import gae, group_advantages
from zs_kernels.testing import seeded
r, v, m = seeded(9, 131, seed=1), seeded(9, 131, seed=2), seeded(9, 131, seed=3) > 0
found = [*gae(r, v, m, gamma=0.99, lam=0.95, whiten=True)]
found += group_advantages(r, torch.arange(9) // 3, 3, mode="reinforce++-baseline", mask=m)[:5]
digest = hashlib.sha256(b"".join(one.numpy().tobytes() for one in found)).hexdigest()
"""


@native
@pytest.mark.parametrize("instructions", ["base", "avx2"])
def test_same_bits_on_every_instruction_set(instructions):
    """A narrow one, in a process of its own, against the widest that this processor has."""
    environment = {"ZS_KERNELS_ISA": instructions, "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-c", DIGEST + "print(digest)"]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=240)
    widest: dict[str, str] = {}
    exec(DIGEST, widest)
    assert done.stdout.strip() == widest["digest"]


@native
def test_any_number_of_threads_has_the_same_bits():
    rewards, values, mask, cu_seqlens = packed([4000, 10, 7000, 900] * 12)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run_native(rewards, values, mask, cu_seqlens)
        torch.set_num_threads(3)
        three = run_native(rewards, values, mask, cu_seqlens)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_without_the_compiled_part_the_reference_answers(tmp_path):
    """A fresh process in which `_ops.so` is nowhere: the op works and the status says what is missing."""
    script = (
        "import pathlib, torch\n"
        "from zs_kernels import _device\n"
        f"_device.OPS_FILE = pathlib.Path({str(tmp_path / '_ops.so')!r})\n"
        "from zs_kernels.gae import gae\n"
        "a, r = gae(torch.tensor([0., 1.]), torch.zeros(2), torch.ones(2, dtype=torch.bool), torch.tensor([0, 2]))\n"
        "assert a.tolist() == [1., 1.], a\n"
        "status = _device.native_status()\n"
        "assert not status.available and 'not built' in status.reason, status\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_a_damaged_compiled_part_is_said_and_survived(tmp_path, monkeypatch):
    damaged = tmp_path / "_ops.so"
    damaged.write_bytes(b"not a shared object")
    monkeypatch.setattr(_device, "OPS_FILE", damaged)
    status = _device.native_status.__wrapped__()
    assert not status.available and "does not load" in status.reason

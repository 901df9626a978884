"""The C++ losses and reductions: the same bits on every instruction set and any number of threads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from zs_kernels._device import native_status, use_backend

pytestmark = pytest.mark.skipif(not native_status().available, reason="not built")

PROGRAM = """
import sys
import torch
from zs_kernels import kl_estimates, masked_statistics, masked_whiten, policy_loss, value_loss
from zs_kernels.testing import seeded

torch.set_num_threads(int(sys.argv[1]))
count = 4099  # four blocks and three tokens more
lp, old, ref, a = (seeded(count, seed=n) * 0.7 for n in range(4))
mask = seeded(count, seed=9) > -1
bounds = torch.tensor([0, 5, 2048, 2049, count])

def show(*tensors):
    for tensor in tensors:
        print(hash(tensor.detach().flatten().view(torch.int32).numpy().tobytes()))

for options in ({"dual_clip": 1.5, "ratio_cap": 1.4}, {"form": "gspo", "cu_seqlens": bounds}, {"form": "cispo"},
                {"form": "cispo_cap", "ratio_cap": 2.0}, {"form": "reinforce"}):
    for estimator in ("k1", "k2", "k3", "abs"):
        leaf = lp.clone().requires_grad_()
        result = policy_loss(leaf, old, a, a.abs(), mask=mask, ref_logprobs=ref, kl_coefficient=0.1, entropy=old,
                             entropy_coefficient=0.2, importance_weights=ref.abs(), kl_estimator=estimator,
                             kl_clamp="nemo", **options)
        result.loss.backward()
        show(*result, leaf.grad)
for estimator in ("k1", "k2", "k3", "abs", "k3+"):
    leaf = lp.clone().requires_grad_()
    value = kl_estimates(leaf, ref * 9, estimator=estimator, clamp="nemo", mask=mask)
    value.sum().backward()
    show(value, leaf.grad)
leaf = lp.clone().requires_grad_()
result = value_loss(leaf, old, ref, a, clip_range=0.3, mask=mask)
result.loss.backward()
show(*result, leaf.grad, masked_statistics(lp, mask), masked_whiten(lp, mask))
"""


def test_the_same_bits_on_every_instruction_set_and_any_number_of_threads() -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, threads],
            env=environment | {"ZS_KERNELS_ISA": isa},
            stdout=subprocess.PIPE,
            text=True,
        )
        for isa, threads in (("base", "1"), ("avx2", "2"), ("avx512", "1"))
    ]
    outputs = [process.communicate(timeout=300)[0].splitlines() for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(outputs[0]) == 20 * 15 + 5 * 2 + 7 + 3
    assert all(output == outputs[0] for output in outputs)


def test_past_the_end_nothing_is_read_or_written() -> None:
    """Views into one buffer whose neighbours are NaN: results are those of copies, and the neighbours stay."""
    buffer = torch.full((8, 64), float("nan"))
    buffer[:, 16:37] = torch.randn(8, 21, generator=torch.Generator().manual_seed(0))
    columns = [buffer[row, 16:37] for row in range(8)]
    before = buffer.clone()
    with use_backend("native"):
        from_views = torch.ops.zs_kernels.value_loss(*columns[:4], None, 0.2)
        from_copies = torch.ops.zs_kernels.value_loss(*(column.clone() for column in columns[:4]), None, 0.2)
    assert all(torch.equal(a, b) for a, b in zip(from_views, from_copies, strict=True))
    assert torch.equal(buffer.nan_to_num(7.0), before.nan_to_num(7.0))

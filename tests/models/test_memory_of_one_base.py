"""Resident memory of the roles on one base: measured in a process of its own, and held against the bytes of a copy."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

MEASURE = """
import json, os, sys
import torch
from zs_fast.learn.critic import Critic
from zs_fast.models.load import on_same_base
from zs_fast.models.lora import adapter_tensors, attach_adapter
from zs_fast.testing import tiny_model

torch.set_num_threads(1)

def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

policy = tiny_model("llama", hidden_size=1024, layers=6, heads=8, kv_heads=8)
base = sum(p.numel() * p.element_size() for p in policy.model.parameters())
attach_adapter(policy.model, 8)
before = resident()
if sys.argv[1] == "shared":
    held = [on_same_base(policy), on_same_base(policy), Critic.on_base(policy, 8)]
else:
    held = [tiny_model("llama", hidden_size=1024, layers=6, heads=8, kv_heads=8)]
grown = resident() - before
own = sum(p.numel() * p.element_size() for p in adapter_tensors(held[-1]).values()) if sys.argv[1] == "shared" else 0
print(json.dumps({"base": base, "grown": grown, "adapter": own}))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="resident memory is read from /proc/self/statm")
def test_three_more_roles_take_the_memory_of_an_adapter_and_not_of_a_copy() -> None:
    """Reference, simulator and critic on a base of 300 MB take 2 % of it; the detector, one plain copy, takes all."""

    def measure(kind: str) -> dict[str, int]:
        done = subprocess.run([sys.executable, "-c", MEASURE, kind], capture_output=True, text=True, check=True)
        return dict(json.loads(done.stdout.splitlines()[-1]))

    shared, copied = measure("shared"), measure("copied")
    assert shared["base"] > 300e6 and shared["adapter"] > 0
    assert shared["grown"] < shared["adapter"] + 0.02 * shared["base"], shared
    assert copied["grown"] > 0.9 * copied["base"], copied

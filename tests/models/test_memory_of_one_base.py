"""Resident memory of the roles on one base: measured in a process of its own, and held against that of a copy."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

MEASURE = """
import copy, json, os
import torch
from zs_fast.learn.critic import Critic
from zs_fast.models.load import on_same_base
from zs_fast.models.lora import adapter_tensors, attach_adapter
from zs_fast.system.memory import return_freed_memory
from zs_fast.testing import tiny_model

torch.set_num_threads(1)

def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def size(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

policy = tiny_model("llama", hidden_size=768, layers=3, heads=6, kv_heads=6)
base = size(policy.model.parameters())
attach_adapter(policy.model, 8)
return_freed_memory()  # or a copy would first fill what was freed while the model was made
start = resident()
roles = [on_same_base(policy), on_same_base(policy), Critic.on_base(policy, 8)]
shared = resident() - start
copied = copy.deepcopy(policy.model)
print(json.dumps({
    "base": base,
    "shared": shared,
    "adapter": size(adapter_tensors(roles[2]).values()),
    "copied": resident() - start - shared,
}))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="resident memory is read from /proc/self/statm")
def test_three_more_roles_take_the_memory_of_an_adapter_and_not_of_a_copy() -> None:
    """Reference, simulator and critic on a base of 93 MB take the critic's adapter and less than 5 % of the base more;
    the detector, one plain copy, takes all of it."""
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["base"] > 90e6 and measured["adapter"] > 0
    assert measured["shared"] < measured["adapter"] + 0.05 * measured["base"], measured
    assert measured["copied"] > 0.9 * measured["base"], measured

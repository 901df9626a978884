"""Compile Triton kernels for GPUs that are not here, through the very functions that would launch them.

A stub driver names the target, launches become compilations, and tensors are fake CUDA tensors: they have shapes,
strides and types at full size, and no memory. What Triton specialises on (types, divisibility, constants) is therefore
what it would specialise on at run time. Works in a process without TRITON_INTERPRET only.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

SHARED_MEMORY_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Compute capability -> bytes of shared memory that one block can have."""
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
"""Of an A100, an H100 and a B200: host functions size their grids by it."""
MATRIX_INSTRUCTIONS = ("tcgen05", "wgmma", "mma")


class StubDriver:
    """Answers for a GPU of one compute capability; the device number tells Triton's caches the targets apart."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


class Pointer:
    """What Triton asks of a tensor argument: its type, and an address whose alignment is that of the view."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self.address = tensor.storage_offset() * tensor.element_size()

    def data_ptr(self) -> int:
        return self.address


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch that would have happened."""

    kernel: JITFunction
    compiled: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    """By name: numbers as given, tensors as fake tensors."""

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    @property
    def constants(self) -> dict[str, Any]:
        """The compile-time arguments."""
        chosen = {parameter.name for parameter in self.kernel.params if parameter.is_constexpr}
        return {name: value for name, value in self.arguments.items() if name in chosen}

    @property
    def types(self) -> str:
        """The element types of the tensor arguments, each once, in order of appearance."""
        found = [str(value.dtype).removeprefix("torch.") for value in self.arguments.values() if is_tensor(value)]
        return " ".join(dict.fromkeys(found))


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


@contextmanager
def compile_only(capability: int) -> Iterator[list[Launch]]:
    """Inside, tensors made on "cuda" are fake and launches compile for this capability; yields the launches so far."""
    launches: list[Launch] = []
    run = JITFunction.run

    def compile_instead(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        values = [Pointer(value) if is_tensor(value) else value for value in args]
        named = {name: Pointer(value) if is_tensor(value) else value for name, value in kwargs.items()}
        compiled = run(self, *values, grid=grid, warmup=True, **named)
        bound = self.signature.bind(*args, **{k: v for k, v in kwargs.items() if k in self.signature.parameters})
        bound.apply_defaults()
        shape = grid(bound.arguments) if callable(grid) else grid
        launches.append(Launch(self, compiled, tuple(shape), dict(bound.arguments)))
        return compiled

    properties = SimpleNamespace(
        name=f"sm_{capability}",
        major=capability // 10,
        minor=capability % 10,
        multi_processor_count=MULTIPROCESSORS[capability],
        shared_memory_per_block_optin=SHARED_MEMORY_LIMIT[capability],
        L2_cache_size=50 << 20,
        total_memory=80 << 30,
    )
    with ExitStack() as stack:
        for name, value in {
            "get_device_properties": lambda device=None: properties,
            "get_device_capability": lambda device=None: (properties.major, properties.minor),
            "current_device": lambda: 0,
        }.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(JITFunction, "run", compile_instead))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(torch.no_grad())
        triton.runtime.driver.set_active(StubDriver(capability))
        yield launches


@dataclass(frozen=True, slots=True)
class Resources:
    """What the assembler reports of one compiled kernel."""

    registers: int
    spilled_bytes: int
    """Stack and local memory of a thread: above 0, registers went to memory."""
    shared_bytes: int
    warps: int
    stages: int
    matrix_instruction: str
    """How matrix products are done ("" where there are none)."""


@functools.cache
def tool(name: str) -> Path:
    """A binary that comes with Triton. Raises FileNotFoundError."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.is_file():
        raise FileNotFoundError(f"{name} is not beside Triton at {path}")
    return path


def resources(compiled: Any) -> Resources:
    """Registers, spills and shared memory of a compiled kernel, read from its machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool("cuobjdump"), "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Resources(
        registers=numbers["REG"],
        spilled_bytes=numbers["STACK"] + numbers["LOCAL"],
        shared_bytes=int(compiled.metadata.shared),
        warps=int(compiled.metadata.num_warps),
        stages=int(compiled.metadata.num_stages),
        matrix_instruction=next((name for name in MATRIX_INSTRUCTIONS if f"{name}." in compiled.asm["ptx"]), ""),
    )

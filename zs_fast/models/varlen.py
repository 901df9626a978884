"""Attention over packed sequences by kernels of torch, flash-attn and xformers: one door each, and which one is taken.

A door takes query [Q, heads, head_dim] and key and value [T, kv_heads, head_dim] of T packed tokens, and gives
[Q, heads, head_dim]; each sequence attends to itself alone, causally, and no [T, T] mask is ever built. Q is T, or less
where only each sequence's last tokens ask. The kernels run on CUDA in half precision only: everything else takes
`per_segment`, one call of torch's own attention per sequence. None of them has been measured here on a GPU.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from zs_fast.errors import PreflightError

PER_SEGMENT = "per_segment"
HALVES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM, HEAD_DIM_STEP = 256, 8
"""What all three kernels take: head_dim up to the first, in multiples of the second."""


@dataclass(slots=True)
class Segments:
    """Where the packed sequences lie. [0, 3, 5] are one of 3 and one of 2 tokens; with the query bounds [0, 3, 4] only
    the second's last token asks.

    Made once per micro batch. What the kernels need of it on the card is made by the first layer and kept for the
    others; the lengths stay Python numbers, so that nothing waits for the device.
    """

    bounds: tuple[int, ...]
    query_bounds: tuple[int, ...] = ()
    """The bounds themselves where none are given: every token asks."""
    _made: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.query_bounds = self.query_bounds or self.bounds
        for bounds in (self.bounds, self.query_bounds):
            if len(bounds) < 2 or bounds[0] != 0 or any(a >= b for a, b in pairwise(bounds)):
                raise ValueError(f"cu_seqlens must start at 0 and rise strictly, got {list(bounds[:8])}")
        if len(self.bounds) != len(self.query_bounds):
            raise ValueError(f"{len(self.bounds) - 1} sequences, but queries of {len(self.query_bounds) - 1}")
        if any(asking > length for asking, length in zip(self.query_lengths, self.lengths, strict=True)):
            raise ValueError("more tokens of a sequence ask than it has")

    @property
    def lengths(self) -> list[int]:
        return [b - a for a, b in pairwise(self.bounds)]

    @property
    def query_lengths(self) -> list[int]:
        return [b - a for a, b in pairwise(self.query_bounds)]

    @property
    def num_queries(self) -> int:
        return self.query_bounds[-1]

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def longest_query(self) -> int:
        return max(self.query_lengths)

    def offsets(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """[S + 1] int32 on `device`: the bounds of queries, and of keys."""

        def make() -> tuple[Tensor, Tensor]:
            keys = torch.tensor(self.bounds, dtype=torch.int32).to(device, non_blocking=True)
            if self.query_bounds == self.bounds:
                return keys, keys
            return torch.tensor(self.query_bounds, dtype=torch.int32).to(device, non_blocking=True), keys

        made: tuple[Tensor, Tensor] = self.once(("offsets", device), make)
        return made

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, made at the first call with this key."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


Attend = Callable[[Segments, Tensor, Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class Door:
    """One package's kernel."""

    name: str
    module: str
    """What is imported, and only when the door is considered on a CUDA device"""
    function: str
    attend: Attend
    needs: str
    """The command that brings it"""
    bfloat16_from: tuple[int, int] = (8, 0)
    float16_from: tuple[int, int] = (8, 0)
    """Least compute capability for each type"""

    @cached_property
    def missing(self) -> str:
        """Why the package can't be used here; empty where it can."""
        try:
            found = hasattr(importlib.import_module(self.module), self.function)
        except ModuleNotFoundError as error:
            return f"no module {error.name} is installed"
        except (ImportError, OSError, RuntimeError) as error:  # built for another torch, or a library is not there
            return f"{self.module} can't be imported: {str(error).strip().splitlines()[0][:200]}"
        return "" if found else f"{self.module} here has no {self.function}"


def _torch_varlen(segments: Segments, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    known = _parameters(varlen_attn)
    options: dict[str, Any] = {"scale": scaling}
    options |= {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            key, value = _repeated(key, query), _repeated(value, query)
    lengths = segments.longest_query, segments.longest
    output: Tensor = varlen_attn(query, key, value, *segments.offsets(query.device), *lengths, **options)
    return output


def _flash_attn(segments: Segments, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Fewer heads of keys than of queries are its own business. From 2.1 on the last query sees the last key."""
    from flash_attn import flash_attn_varlen_func

    lengths = segments.longest_query, segments.longest
    output: Tensor = flash_attn_varlen_func(
        query, key, value, *segments.offsets(query.device), *lengths, softmax_scale=scaling, causal=True
    )
    return output


def _xformers(segments: Segments, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Its grouped form has no backward pass, so keys and values are repeated."""
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha import attn_bias

    def make() -> Any:
        if segments.query_bounds == segments.bounds:
            return attn_bias.BlockDiagonalCausalMask.from_seqlens(segments.lengths, device=query.device)
        return attn_bias.BlockDiagonalCausalFromBottomRightMask.from_seqlens(
            segments.query_lengths, segments.lengths, device=query.device
        )

    bias = segments.once(("xformers", query.device), make)
    key, value = _repeated(key, query), _repeated(value, query)
    output: Tensor = memory_efficient_attention(query[None], key[None], value[None], attn_bias=bias, scale=scaling)
    return output[0]


def _repeated(heads: Tensor, query: Tensor) -> Tensor:
    """[T, kv_heads, head_dim] -> [T, heads, head_dim]: each of the keys' heads serves a run of the queries'."""
    times = query.shape[1] // heads.shape[1]
    return heads if times == 1 else heads.repeat_interleave(times, dim=1)


@cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    """torch renamed the arguments of its function from version to version."""
    return frozenset(inspect.signature(function).parameters)


DOORS = {
    door.name: door
    for door in (
        Door("torch_varlen", "torch.nn.attention.varlen", "varlen_attn", _torch_varlen, "pip install 'torch>=2.11'"),
        Door(
            "flash_attn",
            "flash_attn",
            "flash_attn_varlen_func",
            _flash_attn,
            "pip install flash-attn --no-build-isolation",
        ),
        Door(
            "xformers",
            "xformers.ops",
            "memory_efficient_attention",
            _xformers,
            "pip install xformers",
            float16_from=(7, 0),
        ),
    )
}
"""In the order in which `auto` tries them."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Which way attention goes, and why."""

    name: str
    reason: str
    door: Door | None
    """None for per_segment"""


def choose(wanted: str, device: torch.device, dtype: torch.dtype, head_dim: int = 64) -> Choice:
    """The door for tensors of this kind. `wanted`: a door's name, `per_segment`, or `auto` for the first that serves.

    Raises PreflightError where a named door can't be taken, with what to do.
    """
    if wanted == PER_SEGMENT:
        return Choice(PER_SEGMENT, "model.attention asks for it", None)
    if wanted != "auto":
        door = DOORS[wanted]
        if reason := _why_not(door, device, dtype, head_dim):
            raise PreflightError(
                f"model.attention is {wanted!r}, but {reason}. "
                f"{f'Run `{door.needs}`' if door.missing else 'Change that'}, or set model.attention = 'auto'."
            )
        return Choice(wanted, "model.attention asks for it", door)
    if reason := _no_door(device, dtype, head_dim):
        return Choice(PER_SEGMENT, reason, None)
    reasons = []
    for door in DOORS.values():
        reason = _why_not(door, device, dtype, head_dim)
        if not reason:
            passed_over = f"; not {', not '.join(reasons)}" if reasons else ""
            return Choice(door.name, f"the first of {', '.join(DOORS)} that serves here{passed_over}", door)
        reasons.append(f"{door.name}: {reason}")
    return Choice(PER_SEGMENT, "; ".join(reasons), None)


def _no_door(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why no kernel at all takes such tensors; empty where one may."""
    if device.type != "cuda":
        return "the variable-length kernels run on CUDA only"
    if dtype not in HALVES:
        return f"the variable-length kernels take bfloat16 and float16 only, and the weights are {_name(dtype)}"
    if head_dim > MAX_HEAD_DIM or head_dim % HEAD_DIM_STEP:
        return (
            f"the variable-length kernels take a head_dim up to {MAX_HEAD_DIM} in steps of {HEAD_DIM_STEP}, and the "
            f"model's is {head_dim}"
        )
    return ""


def _why_not(door: Door, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    if reason := _no_door(device, dtype, head_dim):
        return reason
    least = door.bfloat16_from if dtype == torch.bfloat16 else door.float16_from
    found = torch.cuda.get_device_capability(device)
    if found < least:
        return f"{_name(dtype)} there needs compute capability {_dotted(least)}, and {device} has {_dotted(found)}"
    return door.missing


def describe(device: torch.device | str) -> str:
    """What `auto` takes on a device and why, for a person."""
    device = torch.device(device)
    if device.type != "cuda":
        choice = choose("auto", device, torch.float32)
        return f"{choice.name} ({choice.reason})"
    kinds = (torch.bfloat16, torch.float32)
    choices = {dtype: choose("auto", device, dtype) for dtype in kinds}
    return "; ".join(f"{_name(dtype)}: {choice.name} ({choice.reason})" for dtype, choice in choices.items())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))

"""What the ops on an output head have in common: the head's products, chunks of rows, and its gradients.

    logits = hidden @ weight.T + lora_scale * (hidden @ lora_a.T) @ lora_b.T

N = rows (tokens), H = hidden size, V = vocabulary, r = rank of the adapter, M = rows of a chunk. Logits exist for one
chunk at a time. Bias, softcap and temperature are applied, in float32, by the row sweeps of `token_logprobs`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zs_kernels import _wide_products
from zs_kernels._check import describe, require, require_floating, require_number, require_tensor
from zs_kernels._device import backend_of
from zs_kernels._linear_shards import Shards

DEFAULT_WORKSPACE_BYTES = {"cpu": 320 << 20, "cuda": 5 << 29}
"""Most memory of one chunk's logits unless the caller says otherwise: on a CPU 1024 rows of a vocabulary of 152k in
bfloat16, on a GPU 8192 of them (a weight gradient that is added to less often costs less memory traffic)."""
MAX_ROWS = {"cpu": 1024, "cuda": 8192}
"""Most rows of a single chunk: more make no product faster."""
SEVERAL_ROWS = {"cpu": 512, "cuda": 8192}
"""Most rows of each of several chunks: a CPU is as fast with these, and leaves room for the float32 sums that the
weight's gradient then needs."""
GRADIENT_SLICE_ROWS = 4096
"""Vocabulary rows whose weight gradient is summed at a time, where the product cannot do it."""


Lora = tuple[Tensor, Tensor, float]
"""(A [r, H], B [V, r], scale): an adapter on the head that adds scale * B A to its weight."""


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def keeps_sums(tensor: Tensor) -> bool:
    """Whether the device's 16-bit products can give their float32 sums unrounded (torch: CUDA alone)."""
    return tensor.is_cuda and torch.version.hip is None


@contextlib.contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """The ops choose each product's type themselves."""
    with torch.autocast(device.type, enabled=False):
        yield


@dataclass(frozen=True, slots=True)
class Head:
    """An output head; the products that turn hidden states into raw logits."""

    weight: Tensor
    """[V, H]"""
    bias: Tensor | None = None
    """[V], left to the row sweeps"""
    softcap: float | None = None
    """Left to the row sweeps, after the bias."""
    exact: bool = False
    """Logits in float32, with no rounding between products and softmax."""
    lora_a: Tensor | None = None
    """[r, H]"""
    lora_b: Tensor | None = None
    """[V, r]"""
    lora_scale: float = 1.0

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]

    @property
    def logits_dtype(self) -> torch.dtype:
        return statistics_dtype(self.weight.dtype) if self.exact else self.weight.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of logits, and of its gradient where that needs a place of its own."""
        own = 0 if self.logits_dtype == self.weight.dtype else self.weight.element_size()
        return self.vocabulary * (torch.finfo(self.logits_dtype).bits // 8 + own)

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        """out [M, V] of `logits_dtype` <- the raw logits of hidden [M, H]."""
        if out.dtype == hidden.dtype:
            if _wide_products.pay(hidden):
                _wide_products.multiply(hidden, self.weight, out)
            else:
                torch.mm(hidden, self.weight.T, out=out)
            if self.lora_a is not None and self.lora_b is not None:
                out.addmm_(hidden @ self.lora_a.T, self.lora_b.T, alpha=self.lora_scale)
            return
        if keeps_sums(hidden):
            torch.mm(hidden, self.weight.T, out_dtype=out.dtype, out=out)
        else:
            _wide_products.multiply(hidden, self.weight, out)
        if self.lora_a is not None and self.lora_b is not None:
            adapted = hidden.to(out.dtype) @ self.lora_a.to(out.dtype).T
            out.addmm_(adapted, self.lora_b.to(out.dtype).T, alpha=self.lora_scale)


def slices(size: int, step: int) -> Iterator[slice]:
    """[0, size) in steps (of at least one)."""
    step = max(1, step)
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def kind_of(device: torch.device) -> str:
    """Which of the tables' entries is for a device: "cpu", or "cuda" for all others."""
    return "cpu" if device.type == "cpu" else "cuda"


def most_rows(row_bytes: int, workspace_bytes: int | None, device: torch.device) -> int:
    """Most rows of a chunk: as the workspace allows, at least one."""
    kind = kind_of(device)
    if workspace_bytes is not None:
        return max(1, int(workspace_bytes) // row_bytes)
    return max(1, min(MAX_ROWS[kind], DEFAULT_WORKSPACE_BYTES[kind] // row_bytes))


def planned_chunks(rows: int, row_bytes: int, workspace_bytes: int | None, device: torch.device) -> list[slice]:
    """[0, rows) in chunks of even size: one where the workspace allows it, else some of at most SEVERAL_ROWS."""
    most = most_rows(row_bytes, workspace_bytes, device)
    return even_chunks(rows, most if rows <= most else min(most, SEVERAL_ROWS[kind_of(device)]))


def even_chunks(rows: int, most: int) -> list[slice]:
    """[0, rows) in as few chunks as `most` allows, of even size."""
    count = -(-rows // most)
    return list(slices(rows, -(-rows // count))) if count else []


def compacted(op: str, mask: Tensor | None, count: int) -> Tensor | None:
    """Indices [count] of the rows to work on, or None for all; `count` -1 asks the device (a wait on a GPU).

    A given count is checked on a CPU; elsewhere it is believed.
    """
    if mask is None:
        return None
    if count >= 0 and mask.device.type != "cpu":
        return torch.nonzero_static(mask, size=count).squeeze(1)
    rows = mask.nonzero().squeeze(1)
    if count >= 0 and rows.numel() != count:
        require(False, op, "mask_count", f"{rows.numel()}, the number of True entries in 'mask'", count)
    return rows


def selected(tensor: Tensor, rows: Tensor | None) -> Tensor:
    """The given rows of a tensor, dense."""
    return tensor.contiguous() if rows is None else tensor.index_select(0, rows)


def spread(values: Tensor, rows: Tensor | None, total: int) -> Tensor:
    """Values of the given rows among `total`, 0 elsewhere."""
    if rows is None:
        return values
    return values.new_zeros(total, *values.shape[1:]).index_copy_(0, rows, values)


def inverse_temperature(temperature: float, row_temperature: Tensor | None, rows: Tensor | None) -> float | Tensor:
    """1 / temperature: a number, or [M] float32 for the given rows."""
    if row_temperature is None:
        return 1.0 / temperature
    return selected(row_temperature, rows).to(statistics_dtype(row_temperature.dtype)).reciprocal()


def part_of(value: float | Tensor, here: slice) -> float | Tensor:
    """A chunk's share of a number or of a tensor of rows."""
    return value[here] if isinstance(value, Tensor) else value


class WeightGradient:
    """Sum over chunks of dlogits.T @ hidden, kept in more bits than 16 where there are several.

    A single chunk's product is rounded once, when it is written. Several are added up in float32: by CUDA within the
    product, elsewhere from rounded products of slices of the vocabulary. For bfloat16 on a CPU the sum is the result
    and a byte of further bits for each element (see csrc/torch/accumulate.cpp): three bytes, not four plus two.
    """

    def __init__(self, like: Tensor, chunks: int) -> None:
        self.like = like
        direct = chunks <= 1 or like.dtype in (torch.float32, torch.float64)
        self.by_product = direct or keeps_sums(like)
        split = like.dtype == torch.bfloat16 and like.is_contiguous() and backend_of(like) == "native"
        self.low = torch.zeros_like(like, dtype=torch.int8) if split and not self.by_product else None
        dtype = like.dtype if direct or self.low is not None else torch.float32
        self.total = torch.empty_like(like, dtype=dtype)
        self.empty = True

    def add(self, dlogits: Tensor, hidden: Tensor) -> None:
        """Add the product of one chunk: dlogits [M, V], hidden [M, H]."""
        first, self.empty = self.empty, False
        wide = {} if self.total.dtype == dlogits.dtype else {"out_dtype": self.total.dtype}
        if self.by_product and first:
            torch.mm(dlogits.T, hidden, **wide, out=self.total)
        elif self.by_product:
            torch.addmm(self.total, dlogits.T, hidden, **wide, out=self.total)
        elif first and self.low is not None:
            torch.mm(dlogits.T, hidden, out=self.total)
        else:
            self._add_slices(dlogits, hidden, first)

    def _add_slices(self, dlogits: Tensor, hidden: Tensor, first: bool) -> None:
        vocabulary, size = self.like.shape
        product = hidden.new_empty(min(vocabulary, GRADIENT_SLICE_ROWS), size)
        for part in slices(vocabulary, GRADIENT_SLICE_ROWS):
            addend = product[: part.stop - part.start]
            torch.mm(dlogits[:, part].T, hidden, out=addend)
            self.add_slice(part, addend, first=first)

    def add_slice(self, part: slice, product: Tensor, *, first: bool) -> None:
        """Add a chunk's product for some rows of the vocabulary; first: of the first chunk."""
        if first:
            self.empty = False
            self.total[part] = product
        elif self.low is not None:
            addend = product.to(self.like.dtype)
            torch.ops.zs_native.accumulate_split_(self.total[part], self.low[part], addend)
        else:
            self.total[part] += product

    def result(self) -> Tensor:
        """[V, H] in the weight's type; ends the sum."""
        self.low = None
        return torch.zeros_like(self.like) if self.empty else self.total.to(self.like.dtype)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Whose gradients are asked for."""

    hidden: bool
    weight: bool
    bias: bool
    lora_a: bool = False
    lora_b: bool = False

    def any(self) -> bool:
        return self.hidden or self.weight or self.bias or self.lora_a or self.lora_b

    def only_hidden(self) -> bool:
        return self.hidden and not (self.weight or self.bias or self.lora_a or self.lora_b)


class HeadGradients:
    """Gradients of hidden states and head, gathered chunk by chunk from the gradient of the logits."""

    def __init__(self, head: Head, hidden: Tensor, wanted: Wanted, chunks: int) -> None:
        self.head, self.wanted = head, wanted
        wide = statistics_dtype(hidden.dtype)
        self.hidden = torch.zeros_like(hidden) if wanted.hidden else None
        self.weight = WeightGradient(head.weight, chunks) if wanted.weight else None
        self.bias = torch.zeros(head.vocabulary, dtype=wide, device=hidden.device) if wanted.bias else None
        self.lora_a = None if head.lora_a is None else torch.zeros_like(head.lora_a, dtype=wide)
        self.lora_b = None if head.lora_b is None else torch.zeros_like(head.lora_b, dtype=wide)

    def add(self, dlogits: Tensor, hidden: Tensor, here: slice | Tensor) -> None:
        """Add one chunk: dlogits [M, V] and hidden [M, H] in the head's type; `here`: its rows of all."""
        head = self.head
        if _wide_products.pay(dlogits):
            self._add_wide(dlogits, hidden, here)
        else:
            self._add_products(dlogits, hidden, here)
        if self.bias is not None:
            self.bias += dlogits.sum(dim=0, dtype=self.bias.dtype)
        if head.lora_a is not None and head.lora_b is not None:
            self._add_lora(head.lora_a, head.lora_b, dlogits, hidden, here)

    def _add_products(self, dlogits: Tensor, hidden: Tensor, here: slice | Tensor) -> None:
        if self.hidden is not None and isinstance(here, slice):
            torch.mm(dlogits, self.head.weight, out=self.hidden[here])
        elif self.hidden is not None:
            self.hidden[here] = dlogits @ self.head.weight
        if self.weight is not None:
            self.weight.add(dlogits, hidden)

    def _add_wide(self, dlogits: Tensor, hidden: Tensor, here: slice | Tensor) -> None:
        grad_hidden = None if self.hidden is None else torch.empty_like(hidden)
        weight = self.weight
        _wide_products.multiply_gradient(
            dlogits,
            self.head.weight,
            hidden,
            grad_hidden=grad_hidden,
            add_to_weight=None if weight is None else functools.partial(weight.add_slice, first=weight.empty),
        )
        if self.hidden is not None and grad_hidden is not None:
            self.hidden[here] = grad_hidden

    def _add_lora(self, lora_a: Tensor, lora_b: Tensor, dlogits: Tensor, hidden: Tensor, here: slice | Tensor) -> None:
        scale = self.head.lora_scale
        grad_adapted = dlogits @ lora_b  # [M, r]
        if self.hidden is not None:
            self.hidden[here] += scale * (grad_adapted @ lora_a)
        if self.wanted.lora_a and self.lora_a is not None:
            self.lora_a.add_(grad_adapted.T @ hidden, alpha=scale)
        if self.wanted.lora_b and self.lora_b is not None:
            self.lora_b.add_(dlogits.T @ (hidden @ lora_a.T), alpha=scale)

    def sum_over(self, shards: Shards) -> None:
        """Add up over the processes what each has from its shard of the vocabulary alone."""
        self.hidden = None if self.hidden is None else shards.total(self.hidden)
        self.lora_a = None if self.lora_a is None else shards.total(self.lora_a)

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients of hidden, weight, bias, lora_a, lora_b, each in its own type; [0] for one not asked for."""
        head = self.head
        nothing = head.weight.new_empty(0)
        return (
            nothing if self.hidden is None else self.hidden,
            nothing.clone() if self.weight is None else self.weight.result(),
            nothing.clone() if self.bias is None or head.bias is None else self.bias.to(head.bias.dtype),
            self.lora_a.to(head.lora_a.dtype) if self.wanted.lora_a and head.lora_a is not None else nothing.clone(),
            self.lora_b.to(head.lora_b.dtype) if self.wanted.lora_b and head.lora_b is not None else nothing.clone(),
        )


def require_plain(op: str, argument: str, value: Tensor) -> None:
    """Raise TypeError for a tensor that stands for a distributed one: its products would need communication."""
    require_tensor(op, argument, value)
    if hasattr(value, "device_mesh"):  # DTensor, without importing torch.distributed
        raise TypeError(
            f"{op}: argument '{argument}' must be a plain tensor, got a distributed {describe(value)}: call the op "
            "inside the head module's forward, where FSDP2 has gathered the weight, or pass full_tensor(), or "
            "to_local() with a process_group"
        )


def check_operands(
    op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, *, names: tuple[str, str] = ("hidden", "weight")
) -> None:
    """Raise unless hidden [N, H], weight [V, H] and bias [V] fit together."""
    for argument, value in zip(names, (hidden, weight), strict=True):
        require_plain(op, argument, value)
        require_floating(op, argument, value)
    require(hidden.dim() == 2, op, names[0], "of shape [N, H]", hidden)
    size = hidden.shape[1]
    good = weight.dim() == 2 and weight.shape[1] == size and weight.shape[0] > 0
    good = good and weight.dtype == hidden.dtype and weight.device == hidden.device
    if not good:  # messages are made only when needed: writing sizes out would tie a compiled graph to them
        wanted = f"of shape [V, {size}], {hidden.dtype}, on {hidden.device} like '{names[0]}'"
        require(False, op, names[1], wanted, weight)
    if bias is not None:
        require_plain(op, "bias", bias)
        require_floating(op, "bias", bias, shape=(weight.shape[0],))
        require(bias.device == hidden.device, op, "bias", "on the device of 'hidden'", bias)


def check_lora(op: str, lora: Lora | None, hidden: Tensor, weight: Tensor) -> None:
    """Raise unless the adapter fits the head."""
    if lora is None:
        return
    good = isinstance(lora, tuple) and len(lora) == 3
    require(good, op, "lora", "a tuple (A [r, H], B [V, r], scale)", lora)
    a, b, scale = lora
    for argument, value in (("lora A", a), ("lora B", b)):
        require_plain(op, argument, value)
        good = value.dtype == weight.dtype and value.device == weight.device and value.dim() == 2
        require(good, op, argument, "a matrix of the type and on the device of 'weight'", value)
    if a.shape[1] != hidden.shape[1]:
        require(False, op, "lora A", f"of shape [r, {hidden.shape[1]}]", a)
    if tuple(b.shape) != (weight.shape[0], a.shape[0]):
        require(False, op, "lora B", f"of shape {[weight.shape[0], a.shape[0]]}", b)
    require(isinstance(scale, int | float), op, "lora scale", "a number", scale)


def counted(op: str, mask: Tensor | None, count: int | None) -> int:
    """The number of True entries as far as the host can know it without waiting, else -1."""
    if mask is None:
        require(count is None, op, "mask_count", "None without a mask", count)
        return -1
    if count is not None:
        require_number(op, "mask_count", count, low=0, high=mask.shape[0], integer=True)
        return count
    return int(mask.sum()) if mask.device.type == "cpu" and not torch.compiler.is_compiling() else -1


def autocast_operands(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, lora: Lora | None
) -> tuple[Tensor, Tensor, Tensor | None, Lora | None]:
    """The operands in autocast's type where it is on, as a linear layer casts its own; yet unchecked."""
    if not isinstance(hidden, Tensor) or not torch.is_autocast_enabled(hidden.device.type):
        return hidden, weight, bias, lora
    dtype = torch.get_autocast_dtype(hidden.device.type)

    def cast(x: Any) -> Any:
        narrow = isinstance(x, Tensor) and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
        return x.to(dtype) if narrow else x

    if isinstance(lora, tuple):
        lora = tuple(cast(part) for part in lora)  # type: ignore[assignment]
    return cast(hidden), cast(weight), cast(bias), lora


def empty_gradients(operands: tuple[Tensor | None, ...], wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    """Tensors like the gradients of the operands, [0] where one is not wanted: for fake implementations."""
    first = operands[0]
    assert first is not None
    pairs = zip(operands, wanted, strict=True)
    return tuple(torch.empty_like(x) if wish and x is not None else first.new_empty(0) for x, wish in pairs)

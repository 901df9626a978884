"""The processes of a run: how they meet, what they sum and tell each other, and errors that all of them raise.

torchrun starts the processes and ends all when one fails; torch.distributed joins them (NCCL for tensors on a GPU, gloo
for those on the CPU). At world size 1 everything works without torch.distributed being started.

What ranks tell each other in words and numbers travels as JSON text in byte tensors: nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from zs_fast import errors
from zs_fast.errors import EngineError, PreflightError, ZsError
from zs_fast.system.signals import die_with_parent

BUCKET_BYTES = 25 * 2**20
"""Small tensors are summed together in buffers of this size: one collective each would cost more than their bytes."""
FINGERPRINT_WORDS = 2**16
"""Words that go into one sum in the fingerprint of a tensor on a GPU."""


def is_initialised() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    return torch.distributed.get_rank() if is_initialised() else 0


def world_size() -> int:
    return torch.distributed.get_world_size() if is_initialised() else 1


def is_main() -> bool:
    """True on the one process that writes files."""
    return rank() == 0


def local_rank() -> int | None:
    """Which of its machine's processes this is, as torchrun says; None for a run of one process."""
    return int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ and world_size() > 1 else None


@contextmanager
def process_group(device: str, *, timeout_s: float) -> Iterator[None]:
    """Join the processes that torchrun started, for the length of the block; nothing where there is one, or where they
    have met already. `device` is `model.device`; `timeout_s` is the longest wait for another rank.

    After an error the group is left as it is: closing it would wait for ranks that are not coming, while torchrun ends
    them once this process is gone.
    """
    if is_initialised() or _launched_processes() < 2:
        yield
        return
    die_with_parent()
    on_gpu = torch.cuda.is_available() and not device.startswith("cpu")
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"] and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one machine: no name look-up, nothing open to the network
    try:
        torch.distributed.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    except (RuntimeError, ValueError) as error:
        raise PreflightError(
            f"The {os.environ['WORLD_SIZE']} processes that torchrun announced did not meet within {timeout_s:.0f} s "
            f"over {backend}: {_first_line(error)} Check that all were started, and that they reach MASTER_ADDR."
        ) from error
    yield
    torch.distributed.destroy_process_group()


def _launched_processes() -> int:
    """What torchrun says in the environment; 1 without it."""
    given = os.environ.get("WORLD_SIZE", "1")
    processes = int(given) if given.isdecimal() else 1
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if processes > 1 and missing:
        raise PreflightError(
            f"WORLD_SIZE is {processes} in the environment, but {missing[0]} is not set. Start several processes with "
            "`torchrun --nproc-per-node N -m zs_fast.cli train RECIPE`, or unset WORLD_SIZE to run one."
        )
    return processes


def barrier() -> None:
    """Return once every rank has come here."""
    if world_size() > 1:
        gather(None)


def gather(value: Any) -> list[Any]:
    """The plain JSON value of every rank, in the order of ranks; NaN and infinities pass. All ranks must call."""
    if world_size() == 1:
        return [value]
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    text = bytearray(json.dumps(value).encode())
    with _in_contact():
        lengths = _all_gather(torch.tensor([len(text)], device=device))
        sizes = [int(length) for length in lengths]
        padded = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
        padded[: len(text)] = torch.frombuffer(text, dtype=torch.uint8)
        rows = _all_gather(padded)
    return [json.loads(row[:size].cpu().numpy().tobytes()) for row, size in zip(rows, sizes, strict=True)]


def _all_gather(mine: Tensor) -> list[Tensor]:
    everyone = [torch.empty_like(mine) for _ in range(world_size())]
    torch.distributed.all_gather(everyone, mine)
    return everyone


def from_main(value: Any) -> Any:
    """The plain JSON value that the main process gives; what the others give is not looked at."""
    return gather(value if is_main() else None)[0]


def all_reduce_sums(sums: Mapping[str, float]) -> dict[str, float]:
    """The sum of each named number over all ranks, the same bits on every rank.

    A name that a rank doesn't have counts as 0 there: a rank may have had nothing to count. The sums are rounded once
    from the exact ones, so neither the order of ranks nor the collective's own algorithm shows in the result. Keys keep
    their order, those of lower ranks first.
    """
    if world_size() == 1:
        return {name: float(value) for name, value in sums.items()}
    rows = gather({name: float(value) for name, value in sums.items()})
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: _exact_sum([row.get(name, 0.0) for row in rows]) for name in names}


def largest(values: Mapping[str, float]) -> dict[str, float]:
    """The largest of each named number over all ranks."""
    rows = gather(dict(values))
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: max(row[name] for row in rows if name in row) for name in names}


def sum_tensors(tensors: Sequence[Tensor]) -> None:
    """Each tensor becomes its sum over all ranks, in place and with the same bits on every rank.

    All ranks give tensors of the same shapes in the same order. Small ones travel together, in buffers of
    BUCKET_BYTES. No host sync on a GPU.
    """
    if world_size() == 1:
        return
    with _in_contact():
        for bucket in _buckets(tensors):
            if len(bucket) == 1 and bucket[0].is_contiguous():
                torch.distributed.all_reduce(bucket[0])
                continue
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            torch.distributed.all_reduce(flat)
            parts = flat.split([tensor.numel() for tensor in bucket])
            torch._foreach_copy_(bucket, [part.view_as(t) for part, t in zip(parts, bucket, strict=True)])


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in their order, cut into runs of one type and device, of at most BUCKET_BYTES or a single tensor."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        same_kind = bool(bucket) and (bucket[0].dtype, bucket[0].device) == (tensor.dtype, tensor.device)
        if bucket and (not same_kind or sum(t.nbytes for t in bucket) + tensor.nbytes > BUCKET_BYTES):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def check_same_bits(tensors: Mapping[str, Tensor], what: str) -> None:
    """Return if all ranks hold the same bits; else all raise EngineError naming one tensor that differs."""
    if world_size() == 1:
        return
    mine = {name: _fingerprint(tensor) for name, tensor in tensors.items()}
    first, *others = gather(mine)
    for number, other in enumerate(others, start=1):
        if differing := sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name)):
            unlike = EngineError(
                f"{what}: {differing[0]} has other bits on rank {number} than on rank 0 ({len(differing)} of "
                f"{len(first)} tensors differ), though both took the same steps. Resume from an earlier checkpoint; "
                "if it comes back, memory or links of that machine are faulty."
            )
            unlike.is_shared = True
            raise unlike


def _fingerprint(tensor: Tensor) -> str:
    """16 hexadecimal digits of the tensor's bits; on a GPU, of sums over them, so that little travels."""
    if tensor.device.type == "cpu":
        data = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
        return hashlib.blake2b(memoryview(data), digest_size=8).hexdigest()
    words = tensor.detach().contiguous().view(-1).view(torch.int32 if tensor.element_size() % 4 == 0 else torch.int16)
    sums = [part.sum(dtype=torch.int64) for part in words.split(FINGERPRINT_WORDS)]
    return hashlib.blake2b(torch.stack(sums).cpu().numpy().tobytes(), digest_size=8).hexdigest()


@contextmanager
def together() -> Iterator[None]:
    """What one rank raises in the block, a ZsError, all raise at its end, so that no rank waits for one that gave up.

    The block itself must not wait for other ranks. An error that other ranks raise too has `is_shared` set: the main
    process speaks for all.
    """
    failure: ZsError | None = None
    try:
        yield
    except ZsError as error:
        if world_size() == 1 or error.is_shared:
            raise
        failure = error
    if world_size() == 1:
        return
    told = gather(None if failure is None else [type(failure).__name__, str(failure)])
    for number, news in enumerate(told):
        if news is not None:
            kind: type[ZsError] = getattr(errors, news[0])
            shared = failure if number == rank() and failure is not None else kind(_by(number, news[1]))
            shared.is_shared = True
            raise shared


def _by(number: int, message: str) -> str:
    return message if number == 0 else f"rank {number}: {message}"


@contextmanager
def _in_contact() -> Iterator[None]:
    """A collective that fails because another rank is gone, or too late, is one clear EngineError."""
    try:
        yield
    except RuntimeError as error:  # what gloo, NCCL and the store raise
        raise EngineError(
            f"Rank {rank()} of {world_size()} lost contact with the others ({_first_line(error)}). The first error "
            "printed above by another rank is the cause; without one, a rank was killed or hung for longer than "
            "train.rank_timeout_s. `--resume` continues from the newest checkpoint."
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _exact_sum(values: Sequence[float]) -> float:
    """Rounded once; NaN or an infinity where there is one, or where the sum itself is too large."""
    if not all(map(math.isfinite, values)):
        return sum(values)
    try:
        return math.fsum(values)
    except OverflowError:
        return sum(values)

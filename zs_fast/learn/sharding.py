"""Models whose weights lie in pieces on all ranks (FSDP2): one whole layer at a time is in memory while it computes.

`shard_model` cuts float32 masters along their first dimension; a pass gathers them layer by layer in the model's own
type, and its backward adds up the gradients of all ranks in float32. Two things follow. A pass runs inside `whole`, so
that the embedding and the head, which the loss reads beside the model's forward, are there. And every rank makes the
same number of passes, as each is a collective: `passes` gives a rank that has fewer micro batches empty ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from zs_fast.learn.batch import MicroBatch
from zs_fast.system.distributed import largest, rank, world_size

Result = TypeVar("Result")
VALUE_HEAD = "value_head"
"""Name of a critic's head, which is float32 always."""


def shard_model(model: Any, device: torch.device, *, compute_dtype: torch.dtype, train: bool = True) -> None:
    """Cut the weights of a causal language model, or of a critic, over all ranks, in place; they go to `device`.

    The model may lie on the CPU before: each layer moves when it is cut, so that a model larger than a card never lies
    on one. With `train` the pieces are float32, whatever the passes compute in.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer.float() if train else layer, mesh=mesh, mp_policy=policy)
    if hasattr(model, VALUE_HEAD):
        fully_shard(getattr(model, VALUE_HEAD), mesh=mesh)  # computes in float32
    fully_shard(model.float() if train else model, mesh=mesh, mp_policy=policy)
    model.compute_dtype = compute_dtype
    model.run_whole = MethodType(_run, model)
    register_fsdp_forward_method(model, "run_whole")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
            module.set_gradient_divide_factor(1.0)  # a sum: the loss is divided by counts over all ranks already


def _run(model: nn.Module, function: Callable[[], Result]) -> Result:
    return function()


def is_sharded(model: nn.Module | None) -> bool:
    return hasattr(model, "run_whole")


def is_cut(tensor: Tensor) -> bool:
    """Is it in pieces (a DTensor)? Asked so that torch.distributed is imported only where it is used."""
    return hasattr(tensor, "full_tensor")


def computes_in(model: nn.Module, name: str, parameter: Tensor) -> torch.dtype:
    """The type that the parameter of this name has in a pass."""
    if not is_cut(parameter) or name.startswith(f"{VALUE_HEAD}."):
        return parameter.dtype
    dtype: torch.dtype = model.compute_dtype  # type: ignore[assignment]
    return dtype


def whole(model: Any, function: Callable[[], Result]) -> Result:
    """What `function` returns, with the weights of `model` that no layer holds (embedding, norm, head) in memory.

    Outside autograd the weights are in pieces again afterwards; with it, after the backward pass.
    """
    if not is_sharded(model):
        return function()
    result: Result = model.run_whole(function)
    if not torch.is_grad_enabled():
        model.reshard()
    return result


def passes(model: nn.Module | None, micro_batches: Iterable[MicroBatch], device: torch.device) -> Iterator[MicroBatch]:
    """The micro batches, and for a sharded model as many empty ones as another rank has more."""
    if not is_sharded(model):
        yield from micro_batches
        return
    own = list(micro_batches)
    most = int(largest({"passes": len(own)})["passes"])  # asked before the first pass: all ranks are here now
    yield from own
    for _ in range(most - len(own)):
        yield empty_micro_batch(device)


def empty_micro_batch(device: torch.device) -> MicroBatch:
    """One token that nothing is learnt from and that is in no column."""
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    return MicroBatch(
        inputs=zero,
        targets=zero,
        positions=zero,
        loss_index=zero[:0],
        cu_seqlens=(0, 1),
        loss_cu_seqlens=(0,),
        tokens=slice(0, 0),
        loss_tokens=slice(0, 0),
    )


def own_piece(tensor: Any) -> Tensor:
    """This rank's piece of a parameter or gradient, in the same memory; a plain tensor is its own piece."""
    piece: Tensor = tensor.detach().to_local() if is_cut(tensor) else tensor.detach()
    return piece


def assembled(piece: Tensor, parameter: Any) -> Tensor:
    """The whole tensor, of which `piece` is this rank's part as `parameter`'s own piece is. All ranks must call."""
    if not is_cut(parameter) or piece.dim() == 0:
        return piece
    from torch.distributed.tensor import DTensor

    cut = DTensor.from_local(
        piece, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )
    result: Tensor = cut.full_tensor()
    return result


def piece_of(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of a whole tensor that is cut as `parameter` is; no other rank is asked."""
    if not is_cut(parameter) or tensor.dim() == 0:
        return tensor
    rows = -(-parameter.shape[0] // world_size())
    return tensor[rank() * rows : (rank() + 1) * rows]

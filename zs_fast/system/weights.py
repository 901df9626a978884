"""From the trainer to the engine: which weights the next completions come from, as a number and as a fact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from zs_fast.errors import EngineError, NonFiniteError
from zs_fast.system.distributed import gather


def check_finite(trained: nn.Module, what: str) -> None:
    """Return if every trained weight is a number, on all ranks; else all raise NonFiniteError naming a tensor."""
    found = ""
    for name, parameter in trained.named_parameters():
        piece = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if not found and parameter.requires_grad and not torch.isfinite(piece.detach()).all():
            found = name
    if broken := [name for name in gather(found) if name]:
        raise NonFiniteError(
            f"{what}: {broken[0]} holds values that are not finite, so these weights are neither sampled with nor "
            "saved. --resume goes on from the newest checkpoint; if it comes back, start a new run with a lower "
            "train.learning_rate."
        )


class Publishes(Protocol):
    """The part of an engine that learns of new weights."""

    def publish(self, version: int) -> None: ...


class WeightPublisher:
    """Hand-over of what was trained: where engine and trainer share one storage only the version is announced.

    `trained` is the module the optimizer steps; `served()` gives the tensors the engine samples with at that moment, by
    the trainer's names. Each `publish` first makes sure that they still are the same memory, so that no rollout comes
    from stale weights unnoticed: a few microseconds per tensor.

    With `copy` the engine has weights of its own: each `publish` calls it first. It writes the trained values there and
    returns how many bytes it wrote.
    """

    def __init__(
        self,
        engine: Publishes,
        *,
        trained: nn.Module,
        served: Callable[[], Mapping[str, Tensor]],
        copy: Callable[[], int] | None = None,
    ) -> None:
        """Raises EngineError when the engine does not sample with every parameter of `trained`."""
        self._engine = engine
        self._trained = trained
        self._served = served
        self.version = 0
        """The version last published; 0 are the weights the run started with."""
        self.copied_bytes = 0
        """Written by the last `publish`."""
        self._copy = copy
        self.check()

    def publish(self, version: int) -> None:
        """From now on completions carry `version`. Raises EngineError if it does not rise, or memory is not shared."""
        if version <= self.version:
            raise EngineError(f"version {version} can't follow version {self.version}: versions rise with each update.")
        self.check()
        self.announce(version)

    def announce(self, version: int) -> None:
        """Say that the engine samples with these weights, as it does after both were loaded from one file; weights of
        its own that `copy` fills are filled first."""
        if self._copy is not None:
            self.copied_bytes = self._copy()
        self._engine.publish(version)
        self.version = version

    def check(self) -> None:
        """Return if the engine samples with the trained weights; EngineError naming a tensor that has parted.

        Called before each rollout, too. Weights that are copied have nothing to part.
        """
        if self._copy is None:
            check_shared(self._trained, self._served())


@torch.no_grad()
def copy_pieces(trained: nn.Module, served: Callable[[], Mapping[str, Tensor]]) -> int:
    """Copy trained weights that lie in pieces on several ranks to the engine's, one whole tensor at a time; the bytes
    written. All ranks must call it; the engine holds every parameter (`check_held`).

    Costs the engine's copy, the weights once in its own type on every rank, and an all-gather of that size each time.
    Gathering the trained weights themselves for the rollout would need as much memory just then, and leave them to a
    sampler that knows nothing of FSDP's hooks around each layer.
    """
    targets = served()
    for name, parameter in trained.named_parameters():
        narrow: Any = parameter.to(targets[name].dtype)
        targets[name].copy_(narrow.full_tensor() if hasattr(narrow, "full_tensor") else narrow)
    return sum(targets[name].nbytes for name, _ in trained.named_parameters())


def check_held(trained: nn.Module, served: Mapping[str, Tensor]) -> None:
    """Return if the engine has a tensor for every parameter of `trained`; else EngineError naming one it lacks."""
    if strange := {name for name, _ in trained.named_parameters()} - served.keys():
        raise EngineError(f"Only the trainer's model has a tensor {min(strange)}: the engine holds another model.")


def check_shared(trained: nn.Module, served: Mapping[str, Tensor]) -> None:
    """Return if every parameter of `trained` is a served tensor, in the same memory; else raise EngineError naming one.

    Buffers are compared where the engine serves them: one with a forward of its own has no use for the trainer's.
    """
    parameters = dict(trained.named_parameters())
    ours = parameters | dict(trained.named_buffers())
    if strangers := (parameters.keys() - served.keys()) | (served.keys() - ours.keys()):
        name = min(strangers)
        where = "engine's" if name in served else "trainer's"
        raise EngineError(f"Only the {where} model has a tensor {name}: engine and trainer hold different models.")
    for name, tensor in served.items():
        if _place(tensor) != _place(ours[name]):
            raise EngineError(
                f"{name} lies in other memory in the engine than in the trainer: rollouts would come from stale "
                "weights. Build the engine on the trainer's own module, and don't move or cast the module afterwards."
            )


def _place(tensor: Tensor) -> tuple[object, ...]:
    # Empty and meta tensors have no memory of their own; there, only the very same object counts.
    address: object = tensor.data_ptr() if tensor.numel() and tensor.device.type != "meta" else id(tensor)
    return address, tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device

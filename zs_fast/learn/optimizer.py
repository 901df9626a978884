"""AdamW over float32 weights, with a learning-rate schedule, gradient clipping and a guard against non-finite numbers.

Weights of a narrower type (bfloat16) have a float32 master copy here: a learning rate of 1e-6 is below the resolution
of a bfloat16 weight, so that steps on it would be lost. Their gradients are summed in float32 over micro batches too.

Kinds (`train.optimizer`), and what they hold beside the weights, in bytes a trained parameter:

    adamw           moments 8; masters 4 unless the weights are float32
    adamw_8bit      moments about 2; masters likewise
    adamw_offload   nothing on the device: masters 4 and moments 8 in main memory, where the step is taken

Gradients take 4 more during the update. Source: decoupled weight decay, arXiv:1711.05101.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zs_fast.config import OptimizerKind
from zs_fast.errors import CheckpointUnusableError
from zs_fast.learn.adamw import AdamW8, AdamW32, require_shape
from zs_fast.learn.sharding import assembled, computes_in, is_cut, own_piece, piece_of
from zs_fast.system.distributed import is_main, sum_tensors, world_size


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Learning rate of each optimizer step: linear from near 0 over the warm-up, then linear to its final fraction."""

    peak: float
    warmup_steps: int
    total_steps: int
    final_fraction: float

    def at(self, step: int) -> float:
        """Learning rate of optimizer step `step`, counting from 0. The last step has exactly peak * final_fraction."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        falling = max(1, self.total_steps - 1 - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / falling)
        return self.peak * (1.0 - progress * (1.0 - self.final_fraction))


class Optimizer:
    """Owns the masters, AdamW's moments and the step count. Weight decay acts on matrices, not on norms and biases."""

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        max_grad_norm: float,
        kind: OptimizerKind = "adamw",
    ) -> None:
        self.schedule = schedule
        self.max_grad_norm = max_grad_norm
        self.position = 0
        """Optimizer steps gone by, skipped ones included: what the schedule counts."""
        self.num_skipped = 0
        self.before_use: Callable[[], None] = _nothing
        """Called before masters or moments are read or written: they may be elsewhere between the updates."""
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._masters: dict[str, Tensor] = {}
        """What AdamW works on: a float32 parameter itself, or this rank's piece of one in the same memory, or a float32
        copy of either."""
        self._holders: dict[str, Tensor] = {}
        """Whose `grad` is the sum of a parameter's gradients, float32, on the parameter's device: its master, or for a
        master in main memory the parameter itself or a stand-in without memory of its own."""
        self._hooks: list[Any] = []
        self._offloads = kind == "adamw_offload"
        self._cut = {name for name, p in self._parameters.items() if is_cut(p)}
        """Parameters that lie in pieces on all ranks (learn/sharding.py)."""
        self._copied = {name for name, p in self._parameters.items() if self._offloads or p.dtype != torch.float32}
        """Parameters whose masters are copies, which each step writes back."""
        self._saved = {name for name, p in self._parameters.items() if computes_in(model, name, p) != torch.float32}
        self._saved |= self._copied
        """Parameters whose masters a resume needs: the saved model doesn't hold them."""
        for name, parameter in self._parameters.items():
            is_moved = name in self._cut or parameter.dtype != torch.float32
            piece = own_piece(parameter) if is_moved else parameter
            if self._offloads:
                self._masters[name] = _in_main_memory(piece)
                self._holders[name] = _stand_in(piece) if is_moved else parameter
            else:
                self._masters[name] = piece.float() if is_moved else parameter
                self._holders[name] = self._masters[name]
            if is_moved:
                move = _moves_grad_to(self._holders[name])
                self._hooks.append(parameter.register_post_accumulate_grad_hook(move))  # type: ignore[no-untyped-call]
        matrices = [master for master in self._masters.values() if master.dim() >= 2]
        others = [master for master in self._masters.values() if master.dim() < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        adamw = AdamW8 if kind == "adamw_8bit" else AdamW32
        self._adamw: AdamW8 | AdamW32 = adamw([group for group in groups if group["params"]], betas=betas, eps=eps)

    @property
    def learning_rate(self) -> float:
        """Of the step that comes next."""
        return self.schedule.at(self.position)

    def zero_grad(self) -> None:
        for name, master in self._masters.items():
            master.grad = self._holders[name].grad = None

    def place_gradients(self) -> None:
        """Zeros to add to, where there are none: on a CPU, before the first backward pass.

        Made in the midst of it they would stay behind between the activations, whose freed places glibc could not join
        again: the next micro batch took 142 MiB more of 1042 (quickstart's model, 11776 tokens).
        """
        for holder in self._holders.values():
            if holder.device.type == "cpu" and holder.grad is None:
                holder.grad = torch.zeros(holder.shape)

    def drop_gradients(self) -> None:
        """As `zero_grad`, also after a backward pass that died between a parameter's gradient and its master's."""
        for parameter in self._parameters.values():
            parameter.grad = None
        self.zero_grad()

    def sum_gradients(self) -> None:
        """Add up the gradients of all ranks; every rank then holds the same bits. No host sync.

        One sum of float32 buffers at the end of a mini batch, not a wrapper that hooks into each backward pass (DDP):
        the loss is divided by counts over all ranks already, and a rank may have any number of micro batches, or none.
        """
        if world_size() == 1:
            return
        whole = [holder for name, holder in self._holders.items() if name not in self._cut]
        for holder in whole:  # of parameters in pieces, the backward passes have added up the gradients already
            if holder.grad is None:  # no loss token here
                holder.grad = torch.zeros(holder.shape, device=holder.device)
        sum_tensors([holder.grad for holder in whole if holder.grad is not None])

    def clip_gradients(self) -> Tensor:
        """Scale the gradients down to max_grad_norm; their L2 norm before that, a float32 scalar. No host sync."""
        gradients = {name: holder.grad for name, holder in self._holders.items() if holder.grad is not None}
        if not gradients:
            return torch.zeros(())
        norm = torch.nn.utils.get_total_norm([g for name, g in gradients.items() if name not in self._cut])
        if self._cut:
            squares = torch.nn.utils.get_total_norm([g for name, g in gradients.items() if name in self._cut]).square()
            sum_tensors([squares])
            norm = (norm.to(squares.device).square() + squares).sqrt()
        factor = torch.clamp(self.max_grad_norm / (norm + 1e-6), max=1.0)
        torch._foreach_mul_(list(gradients.values()), factor)
        return norm

    def step(self) -> None:
        """One AdamW step with the gradients that lie there; they are dropped."""
        self.before_use()
        if self._offloads:
            self._fetch_gradients()
        self._adamw.step(self.learning_rate)
        with torch.no_grad():
            for name in self._copied:
                own_piece(self._parameters[name]).copy_(self._masters[name], non_blocking=True)
        self.zero_grad()
        self.position += 1

    def _fetch_gradients(self) -> None:
        """Copy the gradients to the masters in main memory, all at once, and wait for them."""
        devices = set()
        for name, master in self._masters.items():
            gradient = self._holders[name].grad
            if gradient is not None:
                devices |= {gradient.device} if gradient.is_cuda else set()
                master.grad = torch.empty_like(master, pin_memory=gradient.is_cuda).copy_(gradient, non_blocking=True)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()

    def skip(self) -> None:
        """Drop the gradients and leave weights and moments as they are; the schedule moves on."""
        self.zero_grad()
        self.position += 1
        self.num_skipped += 1

    def trained(self) -> list[Tensor]:
        """The parameters that are stepped."""
        return list(self._parameters.values())

    def own_tensors(self) -> list[Tensor]:
        """Moments that there are by now, and masters that are copies: what nobody but the optimizer reads."""
        masters = [master for name, master in self._masters.items() if name in self._copied]
        return [*masters, *(moment for master in self._masters.values() for moment in self._adamw.moments(master))]

    def saved_bytes(self) -> int:
        """Of `state_tensors` once all moments are there, without headers and step counts."""
        moments = 2 if isinstance(self._adamw, AdamW8) else 8
        return sum(p.numel() * (moments + 4 * (name in self._saved)) for name, p in self._parameters.items())

    def state_tensors(self) -> dict[str, Tensor]:
        """AdamW's step counts and moments by parameter name, and masters of narrower weights: what a resume needs.

        Where weights are in pieces all ranks must call; the main one gets whole tensors on the CPU, the others nothing.
        """
        self.before_use()
        tensors: dict[str, Tensor] = {}
        for name, master in self._masters.items():
            own = {f"{self._adamw.prefix}.{part}": tensor for part, tensor in self._adamw.state_of(master).items()}
            own |= {"master": master} if name in self._saved else {}
            for kind, piece in own.items():
                tensor = assembled(piece.detach(), self._parameters[name])
                if not self._cut:
                    tensors[f"{kind}.{name}"] = tensor
                elif is_main():
                    tensors[f"{kind}.{name}"] = tensor.cpu()
        return tensors

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state_tensors` gave. CheckpointUnusableError unless names and shapes are this model's."""
        self.before_use()
        states: dict[str, dict[str, Tensor]] = {name: {} for name in self._masters}
        for key, tensor in tensors.items():
            prefix, _, rest = key.partition(".")
            part, _, name = rest.partition(".") if prefix != "master" else ("master", "", rest)
            if name not in states or prefix not in ("master", self._adamw.prefix):
                raise CheckpointUnusableError(
                    f"The optimizer state holds {key!r}, which this run doesn't have. Resume with the model and the "
                    "train.optimizer that wrote the checkpoint."
                )
            states[name][part] = tensor
        with torch.no_grad():
            for name, master in self._masters.items():
                state, parameter = states[name], self._parameters[name]
                saved = state.pop("master", None)
                if name in self._saved:
                    if saved is None:
                        raise CheckpointUnusableError(
                            f"The optimizer state lacks 'master.{name}'. The checkpoint is incomplete; use another."
                        )
                    require_shape(f"master.{name}", saved, parameter.shape)
                    master.copy_(piece_of(saved, parameter))
                if state:
                    self._adamw.load(name, master, {part: piece_of(t, parameter) for part, t in state.items()})


def _nothing() -> None:
    """Masters and moments are where they always were."""


def _moves_grad_to(master: Tensor) -> Callable[[Tensor], None]:
    """A hook that adds a parameter's new gradient to its master's, in float32, and drops it."""

    def move(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = own_piece(parameter.grad).float()
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        parameter.grad = None

    return move


def _in_main_memory(parameter: Tensor) -> Tensor:
    """A float32 copy, pinned where the parameter is on a GPU."""
    copied = parameter.detach().to("cpu", torch.float32, copy=True)
    return copied.pin_memory() if parameter.is_cuda else copied


def _stand_in(parameter: Tensor) -> Tensor:
    """A float32 tensor of the parameter's shape and device to hang a gradient on; it takes the memory of one number."""
    return torch.zeros((), device=parameter.device).expand(parameter.shape)

"""AdamW over float32 weights, with a learning-rate schedule, gradient clipping and a guard against non-finite numbers.

Weights of a narrower type (bfloat16) have a float32 master copy here: a learning rate of 1e-6 is below the resolution
of a bfloat16 weight, so that steps on it would be lost. Their gradients are summed in float32 over micro batches too.
Source: decoupled weight decay, arXiv:1711.05101.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zs_fast.errors import CheckpointUnusableError
from zs_fast.system.distributed import sum_tensors, world_size


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
    ) -> None:
        self.schedule = schedule
        self.max_grad_norm = max_grad_norm
        self.position = 0
        """Optimizer steps gone by, skipped ones included: what the schedule counts."""
        self.num_skipped = 0
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._masters: dict[str, Tensor] = {}
        self._hooks: list[Any] = []
        for name, parameter in self._parameters.items():
            if parameter.dtype == torch.float32:
                self._masters[name] = parameter
                continue
            master = parameter.detach().float()
            self._masters[name] = master
            hook = parameter.register_post_accumulate_grad_hook(_moves_grad_to(master))  # type: ignore[no-untyped-call]
            self._hooks.append(hook)
        matrices = [master for master in self._masters.values() if master.dim() >= 2]
        others = [master for master in self._masters.values() if master.dim() < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        self._adamw = torch.optim.AdamW([g for g in groups if g["params"]], betas=betas, eps=eps, fused=True)

    @property
    def learning_rate(self) -> float:
        """Of the step that comes next."""
        return self.schedule.at(self.position)

    def zero_grad(self) -> None:
        self._adamw.zero_grad(set_to_none=True)

    def sum_gradients(self) -> None:
        """Add up the gradients of all ranks; every rank then holds the same bits. No host sync.

        One sum of float32 buffers at the end of a mini batch, not a wrapper that hooks into each backward pass (DDP):
        the loss is divided by counts over all ranks already, and a rank may have any number of micro batches, or none.
        """
        if world_size() == 1:
            return
        for master in self._masters.values():
            if master.grad is None:  # no loss token here
                master.grad = torch.zeros_like(master)
        sum_tensors([master.grad for master in self._masters.values() if master.grad is not None])

    def clip_gradients(self) -> Tensor:
        """Scale the gradients down to max_grad_norm; their L2 norm before that, a float32 scalar. No host sync."""
        gradients = [master.grad for master in self._masters.values() if master.grad is not None]
        if not gradients:
            return torch.zeros(())
        norm = torch.nn.utils.get_total_norm(gradients)
        factor = torch.clamp(self.max_grad_norm / (norm + 1e-6), max=1.0)
        torch._foreach_mul_(gradients, factor)
        return norm

    def step(self) -> None:
        """One AdamW step with the gradients that lie there; they are dropped."""
        for group in self._adamw.param_groups:
            group["lr"] = self.learning_rate
        self._adamw.step()
        with torch.no_grad():
            for name, master in self._masters.items():
                if self._parameters[name] is not master:
                    self._parameters[name].copy_(master)
        self.zero_grad()
        self.position += 1

    def skip(self) -> None:
        """Drop the gradients and leave weights and moments as they are; the schedule moves on."""
        self.zero_grad()
        self.position += 1
        self.num_skipped += 1

    def state_tensors(self) -> dict[str, Tensor]:
        """AdamW's step counts and moments by parameter name, and masters of narrower weights: what a resume needs."""
        tensors: dict[str, Tensor] = {}
        for name, master in self._masters.items():
            if self._parameters[name] is not master:
                tensors[f"master.{name}"] = master
            state = self._adamw.state.get(master)
            if state:
                tensors[f"adamw.m.{name}"] = state["exp_avg"]
                tensors[f"adamw.v.{name}"] = state["exp_avg_sq"]
                tensors[f"adamw.step.{name}"] = state["step"]
        return {name: tensor.detach() for name, tensor in tensors.items()}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state_tensors` gave. CheckpointUnusableError unless names and shapes are this model's."""
        known = {f"{kind}.{name}" for name in self._masters for kind in ("master", "adamw.m", "adamw.v", "adamw.step")}
        unknown = sorted(set(tensors) - known)
        if unknown:
            raise CheckpointUnusableError(
                f"The optimizer state holds {unknown[0]!r}, which this model doesn't have. "
                "Resume with the model that wrote the checkpoint."
            )
        with torch.no_grad():
            for name, master in self._masters.items():
                if self._parameters[name] is not master:
                    master.copy_(_fitting(tensors, f"master.{name}", master.shape))
                if f"adamw.m.{name}" in tensors:
                    self._adamw.state[master] = {
                        "step": _fitting(tensors, f"adamw.step.{name}", torch.Size()).to(master.device, copy=True),
                        "exp_avg": _fitting(tensors, f"adamw.m.{name}", master.shape).to(master.device, copy=True),
                        "exp_avg_sq": _fitting(tensors, f"adamw.v.{name}", master.shape).to(master.device, copy=True),
                    }


def _moves_grad_to(master: Tensor) -> Callable[[Tensor], None]:
    """A hook that adds a parameter's new gradient to its master's, in float32, and drops it."""

    def move(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        parameter.grad = None

    return move


def _fitting(tensors: Mapping[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    if name not in tensors:
        raise CheckpointUnusableError(f"The optimizer state lacks {name!r}. The checkpoint is incomplete; use another.")
    if tensors[name].shape != shape:
        raise CheckpointUnusableError(
            f"The optimizer state's {name!r} has shape {list(tensors[name].shape)}, this model needs {list(shape)}. "
            "Resume with the model that wrote the checkpoint."
        )
    return tensors[name].float()

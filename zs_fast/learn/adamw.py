"""AdamW over float32 tensors, its moments in 32 or in 8 bits, behind the few verbs that the optimizer needs.

    32 bits   torch's fused AdamW: 8 bytes of moments a parameter
    8 bits    bitsandbytes' AdamW8bit: about 2 bytes, blocks of 256 numbers with a scale each; small tensors stay at 32

Either works in place on whatever tensors it is given, on a GPU or on a CPU. Source: arXiv:1711.05101, arXiv:2110.02861.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zs_fast.errors import CheckpointUnusableError
from zs_fast.models.quantize import bitsandbytes

Groups = Sequence[Mapping[str, Any]]
"""Of {"params": tensors, "weight_decay": number}"""


class AdamW32:
    """torch's own."""

    prefix = "adamw"
    _KEYS = (("m", "exp_avg"), ("v", "exp_avg_sq"), ("step", "step"))

    def __init__(self, groups: Groups, *, betas: tuple[float, float], eps: float) -> None:
        self._adamw = torch.optim.AdamW(list(groups), betas=betas, eps=eps, fused=True)

    def step(self, learning_rate: float) -> None:
        _step(self._adamw, learning_rate)

    def state_of(self, master: Tensor) -> dict[str, Tensor]:
        """What a resume needs of one tensor; empty before the first step."""
        state = self._adamw.state.get(master)
        return {short: state[key] for short, key in self._KEYS} if state else {}

    def moments(self, master: Tensor) -> list[Tensor]:
        """Of one tensor; none before the first step."""
        return [self._adamw.state[master][key] for _, key in self._KEYS[:2]] if self._adamw.state.get(master) else []

    def load(self, name: str, master: Tensor, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_of` gave for the tensor called `name`."""
        require_keys(name, state, {short for short, _ in self._KEYS})
        for short in ("m", "v"):
            require_shape(f"adamw.{short}.{name}", state[short], master.shape)
        require_shape(f"adamw.step.{name}", state["step"], torch.Size())
        self._adamw.state[master] = {
            key: state[short].float().to(master.device, copy=True) for short, key in self._KEYS
        }


class AdamW8:
    """bitsandbytes' 8-bit AdamW. Raises PreflightError where it is not installed."""

    prefix = "adamw_8bit"
    _WHOLE = frozenset({"step", "state1", "state2"})
    _IN_BLOCKS = _WHOLE | {"qmap1", "qmap2", "absmax1", "absmax2"}

    def __init__(self, groups: Groups, *, betas: tuple[float, float], eps: float) -> None:
        library = bitsandbytes("train.optimizer = 'adamw_8bit'", "take train.optimizer = 'adamw'")
        self._adamw: Any = library.optim.AdamW8bit(list(groups), lr=0.0, betas=betas, eps=eps)

    def step(self, learning_rate: float) -> None:
        _step(self._adamw, learning_rate)

    def state_of(self, master: Tensor) -> dict[str, Tensor]:
        """What a resume needs of one tensor, the quantised blocks as they are; empty before the first step."""
        state = self._adamw.state.get(master) or {}
        return {
            key: value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.int64)
            for key, value in state.items()
        }

    def moments(self, master: Tensor) -> list[Tensor]:
        """Of one tensor; none before the first step."""
        state = self._adamw.state.get(master) or {}
        return [state[key] for key in ("state1", "state2") if key in state]

    def load(self, name: str, master: Tensor, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_of` gave for the tensor called `name`."""
        require_keys(name, state, self._WHOLE if "absmax1" not in state else self._IN_BLOCKS)
        for key in ("state1", "state2"):
            require_shape(f"adamw_8bit.{key}.{name}", state[key], master.shape)
        tensors = {key: value.to(master.device, copy=True) for key, value in state.items() if key != "step"}
        self._adamw.state[master] = {"step": int(state["step"]), **tensors}


def _step(adamw: Any, learning_rate: float) -> None:
    for group in adamw.param_groups:
        group["lr"] = learning_rate
    adamw.step()


def require_keys(name: str, found: Mapping[str, Tensor], wanted: set[str] | frozenset[str]) -> None:
    """Raise CheckpointUnusableError unless the state of `name` holds exactly these parts."""
    if differing := set(found) ^ wanted:
        how = "lacks" if min(differing) in wanted else "holds"
        raise CheckpointUnusableError(
            f"The optimizer state of {name!r} {how} {min(differing)!r}. Use another checkpoint, or resume with the "
            "train.optimizer that wrote it."
        )


def require_shape(name: str, tensor: Tensor, shape: torch.Size) -> None:
    """Raise CheckpointUnusableError for a tensor of another shape."""
    if tensor.shape != shape:
        raise CheckpointUnusableError(
            f"The optimizer state's {name!r} has shape {list(tensor.shape)}, this model needs {list(shape)}. "
            "Resume with the model that wrote the checkpoint."
        )

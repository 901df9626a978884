"""TRL's log-probability, entropy and chunked-head functions, its advantages and its GRPO losses, on our ops.

    with patch():
        GRPOTrainer(...).train()

`patch()` swaps the functions that TRL calls by name: the chunked head behind every fused trainer (GRPO, RLOO, SFT, DPO,
KTO), and log-softmax and entropy from logits. Group advantages and the loss itself are written out inside TRL's
trainers, where nothing can be swapped; `grpo_advantages`, `rloo_advantages` and `grpo_loss` are the same formulas for
loops of one's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from zs_kernels._check import require, require_tensor
from zs_kernels.compat._patching import Patched, Patcher, autograd_function, function
from zs_kernels.compat._rows import shaped_logprobs
from zs_kernels.compat._trl_losses import LOSS_TYPES, GrpoLoss, grpo_advantages, grpo_loss, rloo_advantages
from zs_kernels.linear_logprobs import linear_logprobs

__all__ = [
    "LOSS_TYPES",
    "VERSION",
    "ChunkedLogProbFunction",
    "GrpoLoss",
    "entropy_from_logits",
    "fused_log_softmax_and_entropy",
    "grpo_advantages",
    "grpo_loss",
    "patch",
    "rloo_advantages",
    "selective_log_softmax",
    "selective_log_softmax_and_entropy",
]

VERSION = "1.16.0"
OPTIONAL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def _result_dtype(logits: Tensor) -> torch.dtype:
    """TRL's kernel for GPUs gives float32, its fallback the type of the logits."""
    fused = logits.device.type in ("cuda", "xpu") and logits.dtype != torch.float64 and logits.dim() <= 3
    return torch.float32 if fused and logits.stride(-1) == 1 else logits.dtype


def _row_mask(op: str, row_mask: Tensor | None) -> Tensor | None:
    return None if row_mask is None else row_mask != 0


def _require_temperature(temperature: float) -> None:
    if temperature <= 0:
        raise ValueError("temperature must be positive")


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """trl.trainer.utils.selective_log_softmax: logits [..., V], index [...] or [..., K]; result like index.

    In float32 where TRL's GPU kernel runs, else in the type of the logits. row_mask: [...]; 0 gives 0.
    """
    _require_temperature(temperature)
    op = "selective_log_softmax"
    mask = _row_mask(op, row_mask)
    found = shaped_logprobs(op, logits, index, temperature=float(temperature), mask=mask)
    fused = index.dim() == logits.dim() - 1
    return found.logprobs.to(_result_dtype(logits) if fused else logits.dtype)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """trl.trainer.utils.entropy_from_logits: [...] from logits [..., V]. chunk_size is not needed and not read."""
    found = shaped_logprobs("entropy_from_logits", logits, None, entropy=True)
    return found.entropy.to(_result_dtype(logits))


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """trl.trainer.utils.selective_log_softmax_and_entropy: both [...], in the type of `selective_log_softmax`."""
    _require_temperature(temperature)
    logprobs, entropy = fused_log_softmax_and_entropy(logits, index, temperature, row_mask)
    dtype = _result_dtype(logits)
    logprobs, entropy = logprobs.to(dtype), entropy.to(dtype)
    return logprobs, entropy if entropy_requires_grad else entropy.detach()


def fused_log_softmax_and_entropy(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """trl.kernels.selective_log_softmax_and_entropy: (log-probabilities, entropy), each [...] float32."""
    op = "selective_log_softmax_and_entropy"
    require(index.dim() == logits.dim() - 1, op, "index", "one id per row", index)
    mask = _row_mask(op, row_mask)
    found = shaped_logprobs(op, logits, index, temperature=float(temperature), mask=mask, entropy=True)
    return found.logprobs, found.entropy


class ChunkedLogProbFunction:
    """trl.kernels.ChunkedLogProbFunction, as far as it is used: its `apply`."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: Sequence[str] = OPTIONAL_OUTPUTS,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """(log-probabilities, entropy, log of the sum of squared probabilities, mean logit, target is the argmax).

        hidden [N, H], weight [V, H], bias [V], targets [N]; each result [N], float32 but for the bool of the last, None
        where `outputs` does not name it. Gradients flow to hidden, weight and bias through the first two. Under
        autocast the head runs in autocast's type, and a float32 weight's gradient is rounded to it once (TRL's is not).
        mean_logits (with a softcap) and is_top1 cost one more product with the head. chunk_size is not needed and not
        read: the op bounds its own workspace.
        Raises ValueError for a logit_scale that is not above 0, and RuntimeError for a head partitioned by ZeRO-3.
        """
        op = "ChunkedLogProbFunction"
        require_tensor(op, "hidden", hidden)
        require_tensor(op, "weight", weight)
        _require_temperature(temperature)
        way_out = "above 0; leave the name out for such a model: patch(only=[...])"
        require(logit_scale > 0, op, "logit_scale", way_out, logit_scale)
        if hasattr(weight, "ds_status"):
            raise RuntimeError(
                f"{op}: the head is partitioned by DeepSpeed ZeRO-3, which frees it before the backward pass needs it; "
                "leave the name out there: patch(only=[...])"
            )
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        # scale * z under a softcap c at temperature T is z under c / scale at T / scale.
        temperature = float(temperature) / logit_scale
        softcap = None if final_logit_softcapping is None else final_logit_softcapping / logit_scale
        found = linear_logprobs(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=temperature,
            softcap=softcap,
            entropy="entropy" in outputs,
            sum_squares="log_sum_sq_probs" in outputs,
        )
        mean = top = None
        with torch.no_grad():
            if "is_top1" in outputs or ("mean_logits" in outputs and softcap is not None):
                mean, top = _by_products(hidden, weight, bias, targets, temperature, softcap)
            elif "mean_logits" in outputs:
                mean = _mean_logits(hidden, weight, bias, temperature)
        squares = found.sum_squares.log() if "log_sum_sq_probs" in outputs else None
        return (
            found.logprobs,
            found.entropy,
            squares,
            mean if "mean_logits" in outputs else None,
            top if "is_top1" in outputs else None,
        )


def _mean_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """The mean over the vocabulary is that of the head's rows: no logits needed."""
    with torch.autocast(hidden.device.type, enabled=False):
        mean = hidden.float() @ weight.mean(dim=0, dtype=torch.float32)
        return (mean if bias is None else mean + bias.float().mean()) / temperature


def _by_products(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """(mean logit, whether the target is the first largest logit), each [N], over chunks of logits in hidden's type."""
    means, tops = hidden.new_empty(hidden.shape[0], dtype=torch.float32), torch.empty_like(targets, dtype=torch.bool)
    rows = max(1, (256 << 20) // (4 * weight.shape[0]))
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, hidden.shape[0], rows):
            here = slice(start, start + rows)
            logits = torch.mm(hidden[here], weight.T)
            logits = (logits if bias is None else logits + bias).float()
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            means[here] = logits.mean(dim=1) / temperature
            tops[here] = logits.argmax(dim=1) == targets[here]
    return means, tops


_UTILS = "trl.trainer.utils"


def _swaps() -> list:
    return [
        function("selective_log_softmax", _UTILS, selective_log_softmax),
        function("entropy_from_logits", _UTILS, entropy_from_logits),
        function("selective_log_softmax_and_entropy", _UTILS, selective_log_softmax_and_entropy),
        function(
            "fused_log_softmax_and_entropy",
            "trl.kernels.logprob_entropy",
            fused_log_softmax_and_entropy,
            attribute="selective_log_softmax_and_entropy",
        ),
        autograd_function("ChunkedLogProbFunction", "trl.kernels.chunked_logprob", ChunkedLogProbFunction.apply),
    ]


_patcher = Patcher("trl", VERSION, _swaps)


def patch(*, only: Iterable[str] | None = None) -> AbstractContextManager[Patched]:
    """While it lasts, TRL's functions are ours, in every module that holds them; `only`: some of them, by name.

    Gives `Patched`: `.calls` counts the calls of each. May be entered again inside itself.
    Raises ImportError where TRL, or one of the names, is not there.
    """
    return _patcher(only)

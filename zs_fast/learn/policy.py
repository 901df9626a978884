"""Log-probabilities of a packed micro batch under a causal language model, computed at loss tokens only.

The model's trunk runs once over all packed tokens; the output head runs over the hidden states of loss tokens alone, in
chunks, so that no [tokens, vocabulary] tensor ever exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zs_fast.learn.batch import MicroBatch
from zs_fast.models.attention import PackedAttention, gather_rows
from zs_kernels import TokenLogprobs, linear_logprobs


def hidden_states(model: nn.Module, micro: MicroBatch, index: Tensor) -> Tensor:
    """[i, H]: the trunk's last hidden states of the tokens `index` [i] int64; no sequence sees another.

    The trunk runs once over all packed tokens, over a prefix that sequences share once for all of them
    (arXiv:2506.05433): its gradient is the sum of what they would have given it.
    """
    trunk: Any = model.model
    inputs, positions, shared = micro.inputs, micro.positions, micro.shared
    if shared is None:
        attention = PackedAttention(micro.cu_seqlens)
    else:
        inputs, positions = inputs[shared.computed], positions[shared.computed]
        attention = PackedAttention(micro.cu_seqlens, rows=shared.rows, computed_cu_seqlens=shared.cu_seqlens)
        index = shared.rows[index]
    output = trunk(input_ids=inputs[None], position_ids=positions[None], use_cache=False, attention_state=attention)
    return gather_rows(output.last_hidden_state[0], index)


def logprobs_at_loss_tokens(
    model: nn.Module, micro: MicroBatch, *, temperature: float, entropy: bool = False
) -> TokenLogprobs:
    """Log-probability (and entropy when asked) of each loss token at the sampling temperature: [m] float32, in nats."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    hidden = hidden_states(model, micro, micro.loss_index)
    return linear_logprobs(
        hidden, head.weight, micro.loss_targets, bias=head.bias, temperature=temperature, entropy=entropy
    )


@contextmanager
def training_mode(model: Any, *, gradient_checkpointing: bool, offload: bool = False) -> Iterator[None]:
    """Gradient checkpointing on inside, off outside. Otherwise the model stays in eval mode, as it samples: dropout
    would make its log-probabilities differ from those it sampled with.

    offload: what checkpointing holds of the trunk between forward and backward pass waits in main memory
    (`offload_activations`); the head, whose weight its backward pass reads, is no part of that.
    """
    if not gradient_checkpointing:
        yield
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    trunk: Any = getattr(model, "model", model)
    forward = trunk.forward

    def in_main_memory(*arguments: Any, **options: Any) -> Any:
        with torch.autograd.graph.save_on_cpu(pin_memory=next(trunk.parameters()).is_cuda):
            return forward(*arguments, **options)

    if offload:
        trunk.__dict__["forward"] = in_main_memory
    try:
        yield
    finally:
        trunk.__dict__.pop("forward", None)
        model.eval()
        model.gradient_checkpointing_disable()

"""Operations for reinforcement learning of language models: plain functions on tensors, importable with torch alone."""

from zs_kernels.linear_logprobs import linear_logprobs, linear_logprobs_reference
from zs_kernels.token_logprobs import TokenLogprobs, token_logprobs

__all__ = ["TokenLogprobs", "linear_logprobs", "linear_logprobs_reference", "token_logprobs"]

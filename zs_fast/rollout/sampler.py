"""One token per row from its logits, each row with its own seed stream, so that no row depends on another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zs_fast.system.seeds import uniform
from zs_fast.types import Sampling
from zs_kernels.decoder_rows import draw_rows


def sample_tokens(logits_RV: Tensor, samplings: Sequence[Sampling], counters: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Sampled ids [R] int64 and their log-probabilities [R] float32, in nats.

    Row r is drawn with draw `counters[r]` of the stream of `samplings[r].seed`, by inverting the cumulative
    distribution in float64. The log-probability is that of the softmax at the sampling temperature over the whole
    vocabulary, before top_k and top_p (at temperature 0, where the arg max is taken: at temperature 1).
    """
    device, size = logits_RV.device, logits_RV.shape[-1]
    temperatures = torch.tensor([sampling.temperature or 1.0 for sampling in samplings], dtype=torch.float32)
    draws = [uniform(s.seed, i) if s.temperature else -1.0 for s, i in zip(samplings, counters, strict=True)]
    given = temperatures.to(device), torch.tensor(draws, dtype=torch.float64).to(device)
    truncated = [row for row, sampling in enumerate(samplings) if _truncates(sampling, size)]
    if not truncated:
        return draw_rows(logits_RV, *given)
    # Which way a row goes depends on that row alone.
    whole = [row for row, sampling in enumerate(samplings) if not _truncates(sampling, size)]
    ids = torch.empty(len(samplings), dtype=torch.int64, device=device)
    logprobs = torch.empty(len(samplings), dtype=torch.float32, device=device)
    if whole:
        ids[whole], logprobs[whole] = draw_rows(logits_RV[whole], *(one[whole] for one in given))
    # softmax and log_softmax work row by row; elementwise exp over the whole [R, V] would round a row's last entries
    # differently when the number of rows changes.
    scaled = logits_RV[truncated].float() / given[0][truncated, None]
    weights = _truncate(torch.softmax(scaled, -1), [samplings[row] for row in truncated])
    chosen = _invert(weights, given[1][truncated])
    ids[truncated] = chosen
    logprobs[truncated] = torch.log_softmax(scaled, -1).gather(-1, chosen[:, None]).squeeze(-1)
    return ids, logprobs


def _truncates(sampling: Sampling, size: int) -> bool:
    return sampling.temperature > 0 and (0 < sampling.top_k < size or sampling.top_p < 1.0)


def _invert(weights_RV: Tensor, draws_R: Tensor) -> Tensor:
    """First token whose cumulative weight exceeds draw * total; never one of weight 0."""
    cumulative = weights_RV.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:].contiguous()
    target = draws_R[:, None] * total
    ids = torch.searchsorted(cumulative, target, right=True)
    # A draw next to 1 may round up to the total itself: then take the last token that added weight.
    last = torch.searchsorted(cumulative, total)
    return torch.minimum(ids, last).squeeze(-1)


def _truncate(weights_RV: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Zero the weights outside each row's top_k and top_p. Of equal weights the smaller id goes first."""
    size = weights_RV.shape[-1]
    ordered, order = weights_RV.sort(dim=-1, descending=True, stable=True)
    device = weights_RV.device
    top_k = torch.tensor([min(s.top_k, size) or size for s in samplings], device=device)
    top_p = torch.tensor([s.top_p for s in samplings], dtype=torch.float64, device=device)
    ranks = torch.arange(size, device=device)
    keep = ranks[None, :] < top_k[:, None]
    kept = (ordered * keep).double()
    before = kept.cumsum(-1) - kept
    # top_p looks at what top_k left, renormalised; the token that crosses the border stays.
    keep &= before < top_p[:, None] * kept.sum(-1, keepdim=True)
    keep |= (top_p[:, None] >= 1.0) & (ranks[None, :] < top_k[:, None])
    mask = torch.zeros_like(keep).scatter_(-1, order, keep)
    return weights_RV * mask

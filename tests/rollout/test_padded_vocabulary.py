"""F63: a head with more rows than the tokenizer has tokens, as many published models have, never gives one of those.

ZS_FAULT_TRIALS is the number of ids that the embedded engine samples (10,000 without it), from logits that all prefer
the rows beyond.
"""

from __future__ import annotations

import math
import os

import pytest
import torch

from zs_fast.models.load import LoadedModel
from zs_fast.rollout.transformers_engine import TransformersEngine
from zs_fast.testing import tiny_model
from zs_fast.types import Role, Sampling

IDS = int(os.environ.get("ZS_FAULT_TRIALS", "10000"))
SEED = int(os.environ.get("ZS_FAULT_SEED", "0"))
SLOTS, NEW_TOKENS = 256, 64


def preferring_what_is_beyond() -> LoadedModel:
    loaded = tiny_model(hidden_size=16, layers=1, heads=1, kv_heads=1, padded_rows=64, tie_word_embeddings=False)
    beyond = torch.arange(loaded.model.config.vocab_size) >= len(loaded.tokenizer)
    loaded.model.lm_head.bias = torch.nn.Parameter(torch.where(beyond, 50.0, 0.0))
    return loaded


def test_the_model_itself_would_give_nothing_else() -> None:
    loaded = preferring_what_is_beyond()
    with torch.no_grad():
        logits = loaded.model.lm_head(torch.randn(99, 16))
    assert (logits.argmax(-1) >= len(loaded.tokenizer)).all()


@pytest.mark.parametrize("batch_invariant", [True, False])
def test_no_id_beyond_the_tokenizer_is_ever_sampled(batch_invariant: bool, record_property) -> None:  # type: ignore[no-untyped-def]
    loaded = preferring_what_is_beyond()
    known = len(loaded.tokenizer)
    engine = TransformersEngine(
        {Role.POLICY: loaded}, slots=SLOTS, max_context_tokens=80, batch_invariant=batch_invariant
    )
    kinds = [{}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.9}, {"temperature": 3.0}]
    sampled = asked = 0
    wanted = IDS // (4 if batch_invariant else 1)  # the slower of the two
    seen: set[int] = set()
    while sampled < wanted:
        while engine.num_unfinished < SLOTS:
            sampling = Sampling(**{"max_new_tokens": NEW_TOKENS, "seed": SEED * 10**9 + asked} | kinds[asked % 5])
            engine.add(asked, [asked % 256, 7], sampling, role=Role.POLICY)
            asked += 1
        for completion in engine.step():
            assert max(completion.token_ids) < known and min(completion.token_ids) >= 0
            assert all(math.isfinite(logprob) and logprob <= 0.0 for logprob in completion.logprobs)
            sampled += len(completion.token_ids)
            seen.update(completion.token_ids)
    assert len(seen) > known * 0.9
    record_property("trials", sampled)

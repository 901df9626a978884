from __future__ import annotations

import copy

import pytest
import torch

from zs_fast.errors import ConfigError
from zs_fast.learn.pack import TokenSequence, pack, pack_tokens
from zs_fast.learn.policy import hidden_states, logprobs_at_loss_tokens, training_mode
from zs_fast.learn.roles import Roles, score
from zs_fast.testing import tiny_model

LENGTHS = (2, 7, 1, 31, 18)  # one without targets, one of a single prediction, longer ones


def sequences() -> list[TokenSequence]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for length in LENGTHS:
        ids = torch.randint(0, 259, (length,), generator=generator).tolist()
        flags = [False, *(torch.rand(length - 1, generator=generator) < 0.6).tolist()]
        made.append(TokenSequence(ids=ids, is_loss=flags))
    return made


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_packed_equals_each_sequence_by_itself_in_plain_transformers(kind: str, temperature: float) -> None:
    """Log-probabilities, entropies and all gradients, against transformers' own eager attention."""
    ours = tiny_model(kind).model
    theirs = copy.deepcopy(ours)
    theirs.set_attn_implementation("eager")
    expected, expected_entropy = [], []
    for sequence in sequences():
        logits = theirs(input_ids=torch.tensor([sequence.ids]), use_cache=False).logits[0] / temperature
        table = torch.log_softmax(logits, -1)
        for position, flag in enumerate(sequence.is_loss):
            if flag:
                expected.append(table[position - 1, sequence.ids[position]])
                expected_entropy.append(-(table[position - 1].exp() * table[position - 1]).sum())
    (micro,) = pack_tokens(sequences()).micro_batches(10_000)
    result = logprobs_at_loss_tokens(ours, micro, temperature=temperature, entropy=True)
    torch.testing.assert_close(result.logprobs, torch.stack(expected), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(result.entropy, torch.stack(expected_entropy), rtol=0, atol=1e-5)
    weights = torch.randn(len(expected), generator=torch.Generator().manual_seed(4))
    (result.logprobs * weights).sum().backward()
    (torch.stack(expected) * weights).sum().backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        scale = float(other.grad.abs().max())
        torch.testing.assert_close(
            mine.grad, other.grad, rtol=1e-4, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_no_sequence_sees_another() -> None:
    model = tiny_model().model
    packed = pack_tokens(sequences())
    (micro,) = packed.micro_batches(10_000)
    with torch.no_grad():
        everywhere = torch.arange(micro.cu_seqlens[-1])
        before = hidden_states(model, micro, everywhere)
        micro.inputs[: micro.cu_seqlens[1]] = 17
        after = hidden_states(model, micro, everywhere)
    assert torch.equal(before[micro.cu_seqlens[1] :], after[micro.cu_seqlens[1] :])
    assert not torch.equal(before[: micro.cu_seqlens[1]], after[: micro.cu_seqlens[1]])


def test_gradient_checkpointing_changes_no_number_and_is_left_off() -> None:
    model = tiny_model().model
    (micro,) = pack_tokens(sequences()).micro_batches(10_000)
    grads = []
    for checkpointing in (False, True):
        with training_mode(model, gradient_checkpointing=checkpointing):
            logprobs_at_loss_tokens(model, micro, temperature=1.0).logprobs.sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
        model.zero_grad()
        assert not model.training and not model.is_gradient_checkpointing
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_roles_score_the_reference_only_when_there_is_one(make_groups) -> None:  # type: ignore[no-untyped-def]
    policy, reference = tiny_model(seed=0), tiny_model(seed=1)
    packed = pack(make_groups(), token_budget=40)
    alone = Roles(policy=policy, reference=None, temperature=1.0)
    scored = score(packed, alone)
    assert scored.ref_logprobs is None and scored.old_logprobs is None and not alone.scores_before_update
    with pytest.raises(ValueError, match="no model for the role 'reference'"):
        alone.logprobs("reference", packed)

    both = Roles(policy=policy, reference=reference, temperature=1.0)
    scored = score(packed, both, old_logprobs=True)
    (whole,) = packed.micro_batches(10_000)
    for column, loaded in ((scored.old_logprobs, policy), (scored.ref_logprobs, reference)):
        expected = logprobs_at_loss_tokens(loaded.model, whole, temperature=1.0).logprobs
        torch.testing.assert_close(column[packed.loss_mask], expected.detach(), rtol=1e-6, atol=1e-5)
        assert (column[~packed.loss_mask] == 0).all() and not column.requires_grad
    assert not any(parameter.requires_grad for parameter in reference.model.parameters())


def test_greedy_play_can_not_be_trained() -> None:
    with pytest.raises(ConfigError, match=r"sampling.temperature is 0.0.*Set it above 0"):
        Roles(policy=tiny_model(), reference=None, temperature=0.0)

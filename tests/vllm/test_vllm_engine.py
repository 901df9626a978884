"""The vLLM engine is an Engine like the embedded one: the same numbers, ends, refusals, and no stale keys."""

from __future__ import annotations

import random

import pytest
import torch

from zs_fast.errors import EngineError, PreflightError
from zs_fast.rollout import transformers_engine
from zs_fast.rollout.transformers_engine import TransformersEngine
from zs_fast.types import FinishReason, Role, Sampling

POLICY, SIMULATOR = Role.POLICY, Role.SIMULATOR


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_log_probabilities_are_those_of_the_plain_model_over_several_turns(
    kind, small, vllm_engine, run, prompt, difference
):
    loaded = small(kind, padded_rows=5)
    engine = vllm_engine(loaded)
    context = {row: prompt(row, 20 + 70 * row) for row in range(4)}
    for turn in range(3):
        for row, ids in context.items():
            sampling = Sampling(max_new_tokens=12, temperature=(0.0, 0.7, 1.0)[row % 3], seed=100 * row + turn)
            engine.add(row, ids, sampling, role=POLICY, cache_salt=f"t{row}")
        for done in run(engine):
            row = done.request_id
            assert difference(loaded, context[row], done, (1.0, 0.7, 1.0)[row % 3]) < 1e-5, (turn, row)
            assert max(done.token_ids) < len(loaded.tokenizer)
            context[row] = [*context[row], *done.token_ids, *prompt(7 * row + turn, 5 + 30 * turn)]


def test_a_prefix_is_computed_once_for_all_turns_and_all_of_a_group(small, vllm_engine, run, prompt):
    engine = vllm_engine(small())
    ids = prompt(0, 128)
    for row in range(4):
        engine.add(
            row, ids + prompt(row + 1, 4), Sampling(max_new_tokens=4, seed=row), role=POLICY, cache_salt=str(row)
        )
    run(engine)
    engine.add(9, ids + prompt(3, 4) + prompt(50, 60), Sampling(max_new_tokens=4), role=POLICY, cache_salt="2")
    run(engine)
    stats = engine.stats()[POLICY]
    assert stats.reused_tokens == 4 * 128, "three of the four group members, and the second turn"
    assert stats.prefill_tokens + stats.reused_tokens == 4 * 132 + 192


def test_greedy_takes_the_most_likely_token(small, vllm_engine, sample, prompt, reference_table):
    loaded = small("qwen2", seed=3)
    ids = prompt(1, 30)
    done = sample(vllm_engine(loaded), ids, temperature=0.0, max_new_tokens=20)
    table = reference_table(loaded, [*ids, *done.token_ids])[29:-1]
    assert list(done.token_ids) == table.argmax(-1).tolist()


def test_a_seed_draws_the_same_tokens_whatever_else_runs(small, vllm_engine, run, sample, prompt):
    engine = vllm_engine(small())
    alone = [sample(engine, prompt(row, 20 + row), seed=row).token_ids for row in range(8)]
    for row in (3, 1, 7, 0, 2, 6, 5, 4):
        engine.add(row, prompt(row, 20 + row), Sampling(max_new_tokens=12, seed=row), role=POLICY)
    together = {done.request_id: done.token_ids for done in run(engine)}
    assert [together[row] for row in range(8)] == alone
    assert sample(engine, prompt(0, 20), seed=99).token_ids != alone[0]


def test_many_long_prompts_with_seeds_do_not_break_up(small, vllm_engine, run, prompt):
    """Together they are more than one step's token budget; a prompt cut in two would crash on a CPU."""
    engine = vllm_engine(small(), max_context_tokens=2000, slots=6)
    for row in range(6):
        engine.add(row, prompt(row, 1500), Sampling(max_new_tokens=3, seed=row), role=POLICY)
    assert len(run(engine)) == 6


PIECES = [
    "</search>",
    "</sea",
    "rch>",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    " ",
    "東",
    "京",
    "é",
    "x",
    "\n",
    "<",
]
STOPS = [(), ("</search>", "</answer>"), ("東",), ("東 x",), ("x ",), ("京東", "é")]


class Scripts:
    """Makes both engines sample given ids, one request at a time."""

    def __init__(self, monkeypatch, vllm, vocab_size: int) -> None:
        self.ids: list[int] = []
        self.num_vllm = 0
        monkeypatch.setattr(vllm._served[0].core.module, "compute_logits", lambda hidden: self._next(len(hidden)))
        monkeypatch.setattr(transformers_engine, "sample_tokens", self._sample)
        self._vocab_size = vocab_size

    def _next(self, rows: int) -> torch.Tensor:
        logits = torch.zeros(rows, self._vocab_size)
        logits[:, self.ids[self.num_vllm]] = 60.0
        self.num_vllm += 1
        return logits

    def _sample(self, logits, samplings, counters):
        assert len(counters) == 1
        return torch.tensor([self.ids[counters[0]]]), torch.tensor([-1.0])


def test_completions_end_at_the_same_token_for_the_same_reason_as_in_the_embedded_engine(
    small, vllm_engine, sample, monkeypatch
):
    loaded = small()
    embedded = TransformersEngine({POLICY: loaded}, slots=1, max_context_tokens=512)
    engine = vllm_engine(loaded)
    scripts = Scripts(monkeypatch, engine, loaded.model.config.vocab_size)
    draws = random.Random(0)
    ends = set()
    for _ in range(150):
        text = "".join(draws.choices(PIECES, k=draws.randint(1, 12)))
        scripts.ids = loaded.tokenizer.encode(text, add_special_tokens=False)
        scripts.num_vllm = 0
        options = {"max_new_tokens": draws.randint(1, len(scripts.ids)), "stop": draws.choice(STOPS)}
        ours = sample(engine, [65, 66], temperature=draws.choice([0.0, 1.0]), **options)
        theirs = sample(embedded, [65, 66], temperature=1.0, **options)
        assert (ours.token_ids, ours.finish_reason) == (theirs.token_ids, theirs.finish_reason), (text, options)
        assert len(ours.logprobs) == len(ours.token_ids) == scripts.num_vllm, "nothing is sampled past the end"
        ends.add((ours.finish_reason, ours.token_ids[-1] in (256, 258)))
    assert ends == {(FinishReason.STOP, True), (FinishReason.STOP, False), (FinishReason.LENGTH, False)}


def move(loaded, factor: float = 0.05) -> None:
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.add_(factor * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))


def test_published_weights_never_meet_old_keys_and_unpublished_ones_would_show(
    small, vllm_engine, sample, prompt, difference
):
    loaded = small("qwen2", seed=1)
    engine = vllm_engine(loaded)
    ids = prompt(0, 100)
    old = sample(engine, ids)
    move(loaded)
    stale = sample(engine, [*ids, *old.token_ids, 5])
    assert difference(loaded, [*ids, *old.token_ids, 5], stale) > 1e-3, "without publish old keys are read: a detector"
    engine.publish(7)
    new = sample(engine, [*ids, *old.token_ids, 5])
    assert (old.policy_version, new.policy_version) == (0, 7)
    assert difference(loaded, [*ids, *old.token_ids, 5], new) < 1e-5


def test_the_version_in_the_key_alone_keeps_old_keys_away(small, vllm_engine, sample, prompt, difference):
    """Also where the cache was not dropped at all."""
    loaded = small(seed=2)
    engine = vllm_engine(loaded)
    sample(engine, prompt(0, 100))
    move(loaded)
    engine._served[0]._versions[POLICY] = 1
    assert difference(loaded, prompt(0, 100), sample(engine, prompt(0, 100))) < 1e-5


def test_publishing_in_the_middle_of_a_request_computes_its_context_anew(
    small, vllm_engine, run, prompt, reference_logprobs
):
    loaded = small(seed=2)
    engine = vllm_engine(loaded)
    ids = prompt(0, 70)
    for row in range(3):
        engine.add(row, ids, Sampling(max_new_tokens=12, seed=row), role=POLICY)
    for _ in range(5):
        engine.step()
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.mul_(1.03)
    engine.publish(1)
    completions = run(engine)
    assert len(completions) == 3
    for done in completions:
        assert done.policy_version == 0, "the version is that of the moment the request was added"
        wrong = (torch.tensor(done.logprobs) - reference_logprobs(loaded, ids, done.token_ids)).abs()
        assert wrong[5:].max() < 1e-5 < wrong[:5].max()


def test_frozen_roles_keep_their_cache_when_weights_are_published(small, vllm_engine, sample, prompt):
    engine = vllm_engine({POLICY: small(), SIMULATOR: small("llama")}, frozen=(SIMULATOR,))
    for role in (POLICY, SIMULATOR):
        sample(engine, prompt(0, 100), role)
    engine.publish(1)
    for role in (POLICY, SIMULATOR):
        sample(engine, prompt(0, 100), role)
    stats = engine.stats()
    assert (stats[POLICY].reused_tokens, stats[SIMULATOR].reused_tokens) == (0, 96)


def test_kv_memory_is_released_and_taken_again(small, vllm_engine, sample, prompt, difference):
    loaded = small()
    engine = vllm_engine(loaded, kv_cache_bytes=96 * 2**20)
    first = sample(engine, prompt(0, 40))
    engine.add(0, [1, 2], Sampling(max_new_tokens=2), role=POLICY)
    with pytest.raises(EngineError, match="unfinished"):
        engine.release_kv()
    while engine.num_unfinished:
        engine.step()
    held = resident_bytes()
    freed = engine.release_kv()
    assert freed >= 90 * 2**20 and engine.release_kv() == 0
    assert held - resident_bytes() > 0.9 * freed
    engine.acquire_kv()
    ids = [*prompt(0, 40), *first.token_ids, *prompt(1, 9)]
    assert difference(loaded, ids, sample(engine, ids)) < 1e-5
    engine.release_kv()
    assert difference(loaded, ids, sample(engine, ids)) < 1e-5, "a new request takes the memory by itself"


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


def test_a_cache_too_small_for_all_makes_them_wait_or_compute_again(
    small, vllm_engine, run, prompt, difference, monkeypatch
):
    loaded = small()
    per_token = 2 * 2 * 1 * 32 * 4
    engine = vllm_engine(loaded, max_context_tokens=255, kv_cache_bytes=10 * 32 * per_token)
    scheduler = engine._served[0].core._engine.engine_core.engine_core.scheduler
    preempt, preempted = scheduler._preempt_request, []
    monkeypatch.setattr(scheduler, "_preempt_request", lambda *a, **k: preempted.append(a) or preempt(*a, **k))
    for row in range(8):
        engine.add(row, prompt(row, 40), Sampling(max_new_tokens=180, seed=row), role=POLICY)
    together = run(engine)
    assert len(together) == 8 and preempted
    for done in together:
        assert difference(loaded, prompt(done.request_id, 40), done) < 1e-5
    with pytest.raises(PreflightError, match=r"vLLM can't run it.*KV cache"):
        vllm_engine(small(), max_context_tokens=255, kv_cache_bytes=2 * 32 * per_token)


def test_two_models_advance_in_turn_and_each_speaks_by_its_own_weights(
    small, vllm_engine, run, prompt, difference, reference_table
):
    policy, simulator = small("qwen2"), small("llama", seed=9)
    engine = vllm_engine(
        {POLICY: policy, SIMULATOR: simulator, Role.REFERENCE: policy},
        max_context_tokens={POLICY: 200, SIMULATOR: 300, Role.REFERENCE: 200},
    )
    sampling = Sampling(max_new_tokens=6, seed=2)
    for role in (POLICY, SIMULATOR, Role.REFERENCE):
        for row in range(3):
            engine.add(row, prompt(row, 20), sampling, role=role)
    done = {(completion.role, completion.request_id): completion for completion in run(engine)}
    assert len(done) == 9
    for row in range(3):
        assert difference(policy, prompt(row, 20), done[POLICY, row]) < 1e-5
        assert done[POLICY, row].token_ids == done[Role.REFERENCE, row].token_ids
        assert done[SIMULATOR, row].logprobs == (), "nobody reads a simulator's log-probabilities"
    engine.add(0, prompt(0, 20), Sampling(max_new_tokens=6, temperature=0.0), role=SIMULATOR)
    (said,) = run(engine)
    assert (
        list(said.token_ids) == reference_table(simulator, [*prompt(0, 20), *said.token_ids])[19:-1].argmax(-1).tolist()
    )


def test_closing_one_engine_leaves_the_other_at_work(small, vllm_engine, sample, prompt, difference):
    first, second = small("qwen2"), small("qwen3", seed=4)
    engines = [vllm_engine(first), vllm_engine(second)]
    for _ in range(2):
        for engine, loaded in zip(engines, (first, second), strict=True):
            assert difference(loaded, prompt(0, 20), sample(engine, prompt(0, 20))) < 1e-5
    engines[0].close()
    assert difference(second, prompt(5, 20), sample(engines[1], prompt(5, 20))) < 1e-5
    with pytest.raises(EngineError, match="closed"):
        engines[0].add(0, [1], Sampling(max_new_tokens=1), role=POLICY)
    assert torch.isfinite(first.model.get_input_embeddings().weight).all(), "the trainer's weights outlive the engine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": []}, "prompt of 0 tokens"),
        ({"prompt_ids": [1] * 62}, "62 tokens and asks for 4"),
        ({"prompt_ids": [1, 10**6]}, "1000000"),
        ({"prompt_ids": [-1]}, "-1"),
        ({"sampling": Sampling(max_new_tokens=0)}, "asks for 0"),
        ({"sampling": Sampling(max_new_tokens=4, top_p=0.9)}, "top_p 0.9"),
        ({"sampling": Sampling(max_new_tokens=4, top_k=5)}, "top_k 5"),
        ({"sampling": Sampling(max_new_tokens=4, temperature=1e-3)}, "temperature 0.001"),
        ({"role": SIMULATOR}, "no model for role"),
        ({"request_id": 77}, "twice"),
    ],
)
def test_requests_that_can_not_be_served_are_refused(change, message, small, vllm_engine, run):
    engine = vllm_engine(small(), max_context_tokens=64)
    engine.add(77, [1, 2], Sampling(max_new_tokens=2), role=POLICY)
    request = {"request_id": 0, "prompt_ids": [1, 2], "sampling": Sampling(max_new_tokens=4), "role": POLICY} | change
    with pytest.raises(EngineError, match=message):
        engine.add(request.pop("request_id"), request.pop("prompt_ids"), request.pop("sampling"), **request)
    assert len(run(engine)) == 1, "a refused request leaves nothing behind"


def test_a_context_fills_all_positions_of_the_model(small, vllm_engine, sample, difference):
    loaded = small(max_positions=64)
    done = sample(vllm_engine(loaded, max_context_tokens=64), [1] * 61, max_new_tokens=4, temperature=0.0)
    assert len(done.token_ids) == 4 or done.finish_reason is FinishReason.STOP
    assert difference(loaded, [1] * 61, done) < 1e-5


def test_what_vllm_can_not_do_with_a_model_is_one_line(small, vllm_engine):
    with pytest.raises(PreflightError, match=r"5000 tokens.*4096 positions"):
        vllm_engine(small(), max_context_tokens=5000)
    with pytest.raises(PreflightError, match=r"heads of 16.*at least 32"):
        vllm_engine(small(heads=4))
    with pytest.raises(EngineError, match=r"engine\.slots"):
        vllm_engine(small(), slots=0)
    with pytest.raises(PreflightError, match=r"model\.device is cuda"):
        vllm_engine(small(), device=torch.device("cuda"))
    quantised = small()
    quantised.model.config.quantization_config = {"quant_method": "awq", "bits": 4}
    with pytest.raises(PreflightError, match="quantised weights"):
        vllm_engine(quantised)
    unknown = small()
    type(unknown.model).__name__, name = "UnheardOfForCausalLM", type(unknown.model).__name__
    try:
        with pytest.raises(PreflightError, match=r"vLLM can't run it.*UnheardOf") as caught:
            vllm_engine(unknown)
    finally:
        type(unknown.model).__name__ = name
    assert "\n" not in str(caught.value)


def test_threads_can_still_be_set(small, vllm_engine):
    vllm_engine(small())
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_aborted_requests_never_come_back_and_hold_nothing_up(vllm_engine, small, prompt, sample):
    engine = vllm_engine(small())
    alone = sample(engine, prompt(0, 40))
    for request_id in range(1, 4):
        engine.add(request_id, prompt(request_id, 40), Sampling(max_new_tokens=200), role=Role.POLICY)
    finished = {completion.request_id for _ in range(5) for completion in engine.step()}
    assert len(finished) < 3, "some are under way when they are dropped; one may have drawn its end by then"
    engine.abort(Role.POLICY, [1, 2, 3, 9])
    assert engine.num_unfinished == 0 and engine.step() == []
    engine.publish(1)
    again = sample(engine, prompt(0, 40))
    assert again.token_ids == alone.token_ids and again.policy_version == 1
    assert engine.release_kv() > 0

"""The embedded engine: right numbers, the same bits whatever else runs, no token computed twice, clean stops."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from transformers import AutoModelForCausalLM

from zs_fast.errors import EngineError, PreflightError
from zs_fast.models.attention import PackedAttention
from zs_fast.models.load import LoadedModel, on_same_base
from zs_fast.models.lora import attach_adapter
from zs_fast.rollout import transformers_engine
from zs_fast.rollout.row_decoder import logits_of
from zs_fast.rollout.scheduler import PIECE_TOKENS
from zs_fast.rollout.transformers_engine import TransformersEngine
from zs_fast.testing import byte_tokenizer, tiny_model
from zs_fast.types import Completion, FinishReason, Role, Sampling
from zs_kernels.decoder_rows import has_fast_rows

POLICY, SIMULATOR = Role.POLICY, Role.SIMULATOR


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def engine_for(loaded: LoadedModel, *, slots: int = 8, limit: int = 1024, **options) -> TransformersEngine:
    return TransformersEngine({POLICY: loaded}, slots=slots, max_context_tokens=limit, **options)


by_rows = pytest.mark.skipif(not has_fast_rows(), reason="the row operators are not built, or not fast here")


def run(engine: TransformersEngine) -> dict[int, Completion]:
    done: dict[int, Completion] = {}
    for _ in range(100_000):
        if not engine.num_unfinished:
            return done
        done |= {completion.request_id: completion for completion in engine.step()}
    raise AssertionError("the engine never finished")


def prompt(seed: int, length: int) -> list[int]:
    draws = random.Random(seed)
    return [draws.randrange(256) for _ in range(length)]


def fill_adapter(loaded: LoadedModel, *, std: float, seed: int = 0) -> None:
    """As if it were trained: a new one adds nothing."""
    for name, parameter in loaded.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std, generator=torch.Generator().manual_seed(len(name) + seed))


def reference_logprobs(loaded: LoadedModel, ids: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
    """Row t: log-probabilities of token t + 1 by transformers' own eager attention on a copy of the weights."""
    model = loaded.model
    config = copy.deepcopy(model.config)
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(model.dtype).eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        logits = plain(input_ids=torch.tensor([list(ids)])).logits[0, :, : len(loaded.tokenizer)]
    return torch.log_softmax(logits.float() / temperature, -1)


WAYS = [
    pytest.param({"row_operators": True}, id="row operators", marks=by_rows),
    pytest.param({"row_operators": False}, id="fixed blocks"),
    pytest.param({"batch_invariant": False}, id="plain"),
]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("options", WAYS)
def test_log_probabilities_are_those_of_the_plain_model_over_several_turns(kind, options):
    loaded = tiny_model(kind, padded_rows=5)
    engine = engine_for(loaded, **options)
    context = {row: prompt(row, 20 + 150 * row) for row in range(3)}
    for turn in range(3):
        for row, ids in context.items():
            sampling = Sampling(max_new_tokens=12, temperature=0.7, seed=100 * row + turn)
            engine.add(row, ids, sampling, role=POLICY, cache_salt=f"t{row}")
        for row, completion in run(engine).items():
            start = len(context[row])
            context[row] = context[row] + list(completion.token_ids)
            expected = reference_logprobs(loaded, context[row], 0.7)[start - 1 : -1]
            expected = expected.gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            assert torch.allclose(torch.tensor(completion.logprobs), expected, atol=2e-5), (turn, row)
            context[row] += prompt(7 * row + turn, 5 + 30 * turn)


def test_greedy_takes_the_most_likely_token():
    loaded = tiny_model("qwen2", seed=3)
    engine = engine_for(loaded)
    engine.add(0, prompt(1, 30), Sampling(max_new_tokens=20, temperature=0.0), role=POLICY)
    ids = list(run(engine)[0].token_ids)
    logprobs = reference_logprobs(loaded, prompt(1, 30) + ids)[29:-1]
    assert (logprobs.max(-1).values - logprobs.gather(-1, torch.tensor(ids)[:, None])[:, 0] < 1e-5).all()


def play_alone(loaded: LoadedModel, turns: Sequence[tuple[list[int], Sampling]], **options) -> list[Completion]:
    """One trajectory's turns with nothing else in the engine; each turn's new ids follow what was sampled."""
    engine = engine_for(loaded, slots=1, **options)
    ids: list[int] = []
    completions = []
    for new_ids, sampling in turns:
        ids = ids + new_ids
        engine.add(0, ids, sampling, role=POLICY, cache_salt="alone")
        completions.append(run(engine)[0])
        ids = ids + list(completions[-1].token_ids)
    return completions


def play_together(
    loaded: LoadedModel,
    trajectories: Sequence[Sequence[tuple[list[int], Sampling]]],
    *,
    slots: int,
    seed: int,
    **options,
) -> tuple[list[list[Completion]], TransformersEngine]:
    """All trajectories in one engine, turns added in random order at random times."""
    draws = random.Random(seed)
    engine = engine_for(loaded, slots=slots, **options)
    ids: list[list[int]] = [[] for _ in trajectories]
    done: list[list[Completion]] = [[] for _ in trajectories]
    ready = list(range(len(trajectories)))
    draws.shuffle(ready)
    while ready or engine.num_unfinished:
        while ready and draws.random() < 0.6:
            row = ready.pop(draws.randrange(len(ready)))
            new_ids, sampling = trajectories[row][len(done[row])]
            ids[row] = ids[row] + new_ids
            engine.add(row, ids[row], sampling, role=POLICY, cache_salt=f"salt-{row}")
        for completion in engine.step():
            row = completion.request_id
            done[row].append(completion)
            ids[row] = ids[row] + list(completion.token_ids)
            if len(done[row]) < len(trajectories[row]):
                ready.append(row)
            else:
                engine.end(POLICY, f"salt-{row}")
    return done, engine


def some_trajectories(count: int, seed: int) -> list[list[tuple[list[int], Sampling]]]:
    draws = random.Random(seed)
    return [
        [
            (
                prompt(draws.randrange(10**6), draws.choice([1, 2, 17, 40, 90, PIECE_TOKENS + 30])),
                Sampling(
                    max_new_tokens=draws.randint(1, 14),
                    temperature=draws.choice([0.0, 0.7, 1.0]),
                    top_p=draws.choice([1.0, 0.9]),
                    top_k=draws.choice([0, 20]),
                    seed=draws.randrange(2**63),
                ),
            )
            for _ in range(draws.randint(1, 3))
        ]
        for _ in range(count)
    ]


def bits(completions: Sequence[Completion]) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    return [(completion.token_ids, completion.logprobs) for completion in completions]


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rows_bits_do_not_depend_on_other_rows_slots_or_arrival(kind, dtype, num_threads):
    loaded = tiny_model(kind, dtype=dtype, hidden_size=96, heads=6, kv_heads=2, padded_rows=3)
    trajectories = some_trajectories(12, seed=1)
    with threads(num_threads):
        alone = [bits(play_alone(loaded, trajectory)) for trajectory in trajectories]
        for slots, seed in ((64, 0), (5, 1)):
            together, _ = play_together(loaded, trajectories, slots=slots, seed=seed)
            assert [bits(completions) for completions in together] == alone, (slots, seed)


@by_rows
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_row_operators_write_what_the_blocks_write(dtype, adapter):
    """Over packed prompts and several turns, with biases, head norms and an adapter. In bfloat16 each rounds its own
    way: there the log-probabilities of the same tokens are compared, and rounding is what may differ."""
    loaded = tiny_model(
        "qwen3" if adapter else "qwen2", dtype=dtype, hidden_size=96, heads=6, kv_heads=2, padded_rows=3
    )
    if adapter:
        attach_adapter(loaded.model, 3, seed=1)
        fill_adapter(loaded, std=0.2)
    turns = [(prompt(turn, 1 + 40 * turn), Sampling(max_new_tokens=8, temperature=0.0)) for turn in range(3)]
    found = []
    for row_operators in (True, False):
        engine = engine_for(loaded, row_operators=row_operators)
        for row in range(3):
            engine.add(row, turns[row][0], turns[row][1], role=POLICY)
        done = run(engine)
        found.append([done[row] for row in range(3)])
    for ours, theirs in zip(*found, strict=True):
        if dtype == "float32":
            assert ours.token_ids == theirs.token_ids
            assert torch.allclose(torch.tensor(ours.logprobs), torch.tensor(theirs.logprobs), atol=2e-5)
        else:
            assert abs(ours.logprobs[0] - theirs.logprobs[0]) < 0.05


@by_rows
def test_an_adapter_that_comes_later_is_sampled_from_once_weights_are_published():
    loaded = tiny_model("qwen2", seed=1)
    engine = engine_for(loaded, row_operators=True)
    request = prompt(0, 20), Sampling(max_new_tokens=6, temperature=0.0)

    def written(engine):
        engine.add(0, *request, role=POLICY)
        return run(engine)[0]

    before = written(engine)
    attach_adapter(loaded.model, 3, seed=1)
    fill_adapter(loaded, std=0.5)
    engine.publish(1)
    after, fresh = written(engine), written(engine_for(loaded, row_operators=True))
    assert (after.token_ids, after.logprobs) == (fresh.token_ids, fresh.logprobs)
    assert after.logprobs != before.logprobs


@by_rows
def test_row_operators_read_the_weights_as_they_are_now():
    """Parameters may be replaced, not only written to."""
    loaded = tiny_model(seed=1)
    engine = engine_for(loaded, row_operators=True)
    request = prompt(0, 20), Sampling(max_new_tokens=5, temperature=0.0)
    engine.add(0, *request, role=POLICY)
    run(engine)
    layer = loaded.model.model.layers[0].self_attn
    layer.q_proj.weight = torch.nn.Parameter(-2.0 * layer.q_proj.weight.detach())
    engine.publish(1)
    engine.add(1, *request, role=POLICY)
    completion = run(engine)[1]
    expected = reference_logprobs(loaded, request[0] + list(completion.token_ids))[19:-1]
    expected = expected.gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]
    assert torch.allclose(torch.tensor(completion.logprobs), expected, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model.to(torch.float16), "float16"),
        (lambda model: setattr(model.config, "hidden_act", "gelu"), "gelu"),
        (lambda model: setattr(model.config, "head_dim", 24), "head_dim is 24"),
        (lambda model: setattr(model.model.layers[1].mlp, "up_proj", torch.nn.Identity()), r"layers\.1\.up_proj"),
    ],
)
def test_a_model_that_row_operators_do_not_compute_is_refused_by_name(change, reason):
    loaded = tiny_model()
    change(loaded.model)
    with pytest.raises(PreflightError, match=reason):
        engine_for(loaded, row_operators=True)


def test_fixed_blocks_keep_a_rows_bits_too():
    loaded = tiny_model("qwen2", hidden_size=96, heads=6, kv_heads=2)
    trajectories = some_trajectories(6, seed=1)
    alone = [bits(play_alone(loaded, trajectory, row_operators=False)) for trajectory in trajectories]
    together, _ = play_together(loaded, trajectories, slots=5, seed=1, row_operators=False)
    assert [bits(completions) for completions in together] == alone


@pytest.mark.full
@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("hidden_size", [64, 192, 288])
def test_batch_invariance_over_many_shapes(kind, dtype, num_threads, hidden_size):
    heads = hidden_size // 32
    loaded = tiny_model(
        kind, dtype=dtype, hidden_size=hidden_size, layers=3, heads=heads, kv_heads=heads, padded_rows=9
    )
    trajectories = some_trajectories(40, seed=hidden_size)
    with threads(num_threads):
        alone = [bits(play_alone(loaded, trajectory)) for trajectory in trajectories]
        for slots in (64, 9, 3):
            together, _ = play_together(loaded, trajectories, slots=slots, seed=slots)
            assert [bits(completions) for completions in together] == alone, slots


def test_the_plain_path_would_fail_that_test():
    """Without fixed blocks the bits do depend on the neighbours: else the tests above would prove nothing."""
    loaded = tiny_model("llama", hidden_size=96, heads=6, kv_heads=2)
    sampling = Sampling(max_new_tokens=8, seed=5)

    def logprobs(num_neighbours: int) -> tuple[float, ...]:
        engine = engine_for(loaded, slots=40, batch_invariant=False)
        for row in range(num_neighbours + 1):
            engine.add(row, prompt(row, 20 + row), sampling, role=POLICY)
        return run(engine)[0].logprobs

    assert any(logprobs(0) != logprobs(count) for count in (1, 2, 3, 7, 20, 39))


def test_evicted_contexts_compute_on_with_the_same_bits():
    loaded = tiny_model("qwen2")
    trajectories = [turns for turns in some_trajectories(30, seed=4) if len(turns) == 3][:8]
    plenty, _ = play_together(loaded, trajectories, slots=16, seed=2)
    scarce, engine = play_together(loaded, trajectories, slots=2, seed=3)
    assert engine.stats()[POLICY].evictions > 0
    assert [bits(completions) for completions in scarce] == [bits(completions) for completions in plenty]


def test_no_token_is_prefilled_twice():
    loaded = tiny_model()
    trajectories = [turns for turns in some_trajectories(30, seed=5) if len(turns) > 1]
    done, engine = play_together(loaded, trajectories, slots=64, seed=0)
    given = sum(len(new_ids) for turns in trajectories for new_ids, _ in turns)
    # The last token of each earlier turn was sampled but never fed; it goes in with the next prompt.
    carried = sum(len(turns) - 1 for turns in trajectories)
    stats = engine.stats()[POLICY]
    assert stats.prefill_tokens == given + carried
    assert stats.decode_tokens == sum(len(c.token_ids) for completions in done for c in completions)
    assert stats.evictions == 0
    assert stats.reused_tokens > 0


@by_rows
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("slots", [3, 32])
def test_a_prompt_that_others_begin_with_is_computed_once_and_changes_no_bit(kind, slots):
    loaded = tiny_model(kind)
    beginnings = [prompt(seed, length) for seed, length in enumerate((40, 17, PIECE_TOKENS + 20))]
    grouped = []
    for row, turns in enumerate(some_trajectories(24, seed=6)):
        (new_ids, sampling), *later = turns
        grouped.append([(beginnings[row % 3] + (new_ids[:3] if row % 2 else []), sampling), *later])
    apart = []
    for turns in grouped:
        alone, _ = play_together(loaded, [turns], slots=1, seed=0)
        apart.append(bits(alone[0]))
    together, engine = play_together(loaded, grouped, slots=slots, seed=1)
    assert [bits(completions) for completions in together] == apart
    if slots == 32:
        given = sum(len(new_ids) for turns in grouped for new_ids, _ in turns) + sum(len(t) - 1 for t in grouped)
        saved = given - engine.stats()[POLICY].prefill_tokens
        assert saved >= 7 * sum(len(ids) - 1 for ids in beginnings)


@by_rows
def test_new_weights_share_nothing_with_old_ones():
    loaded = tiny_model()
    shared, sampling = prompt(0, 60), Sampling(max_new_tokens=3, temperature=0.0, seed=1)
    engine = engine_for(loaded)
    engine.add(0, shared, sampling, role=POLICY, cache_salt="kept")
    run(engine)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.mul_(1.5)
    engine.publish(1)
    engine.add(1, shared, sampling, role=POLICY)
    fresh = engine_for(loaded)
    fresh.add(1, shared, sampling, role=POLICY)
    assert bits([run(engine)[1]]) == bits([run(fresh)[1]])


def test_a_prompt_that_leaves_the_kept_context_recomputes_from_there():
    loaded = tiny_model()
    shared = prompt(0, 40)
    expected = play_alone(loaded, [(shared + prompt(2, 9), Sampling(max_new_tokens=6, seed=1))])[0]
    engine = engine_for(loaded)
    engine.add(0, shared + prompt(1, 30), Sampling(max_new_tokens=6), role=POLICY, cache_salt="a")
    run(engine)
    engine.add(1, shared + prompt(2, 9), Sampling(max_new_tokens=6, seed=1), role=POLICY, cache_salt="a")
    assert bits([run(engine)[1]]) == bits([expected])


def test_the_same_prompt_again_still_gives_logits():
    engine = engine_for(tiny_model())
    sampling = Sampling(max_new_tokens=1, temperature=0.0)
    ids = prompt(0, 25)
    engine.add(0, ids, sampling, role=POLICY, cache_salt="a")
    first = run(engine)[0]
    engine.add(1, ids, sampling, role=POLICY, cache_salt="a")
    assert run(engine)[1].token_ids == first.token_ids


def test_weights_are_shared_and_published_weights_never_meet_old_keys():
    loaded = tiny_model("qwen2", seed=1)
    engine = engine_for(loaded)
    assert engine.module(POLICY) is loaded.model
    sampling = Sampling(max_new_tokens=10, seed=3)
    ids = prompt(0, 30)
    engine.add(0, ids, sampling, role=POLICY, cache_salt="a")
    old = run(engine)[0]
    ids = ids + list(old.token_ids) + prompt(1, 10)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    engine.publish(7)
    engine.add(1, ids, sampling, role=POLICY, cache_salt="a")
    new = run(engine)[1]
    assert (old.policy_version, new.policy_version) == (0, 7)
    expected = reference_logprobs(loaded, ids + list(new.token_ids))[len(ids) - 1 : -1]
    expected = expected.gather(-1, torch.tensor(new.token_ids)[:, None])[:, 0]
    assert torch.allclose(torch.tensor(new.logprobs), expected, atol=2e-5)


def test_publishing_in_the_middle_of_a_request_computes_its_context_anew():
    loaded = tiny_model(seed=2)
    engine = engine_for(loaded)
    ids = prompt(0, 30)
    engine.add(0, ids, Sampling(max_new_tokens=12, seed=3), role=POLICY)
    for _ in range(5):
        engine.step()
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.mul_(1.03)
    engine.publish(1)
    completion = run(engine)[0]
    assert completion.policy_version == 0, "the version is that of the moment the request was added"
    expected = reference_logprobs(loaded, ids + list(completion.token_ids))[len(ids) - 1 : -1]
    expected = expected.gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]
    actual = torch.tensor(completion.logprobs)
    assert torch.allclose(actual[5:], expected[5:], atol=2e-5) and not torch.allclose(
        actual[:5], expected[:5], atol=2e-5
    )


@pytest.mark.parametrize("options", WAYS)
def test_training_after_sampling_is_training_as_if_never_sampled(options):
    def gradients(loaded: LoadedModel) -> list[torch.Tensor]:
        loaded.model.train()
        ids = torch.tensor([prompt(0, 40)])
        hidden = loaded.model.model(
            input_ids=ids,
            position_ids=torch.cat([torch.arange(15), torch.arange(25)])[None],
            use_cache=False,
            attention_state=PackedAttention([0, 15, 40]),
        ).last_hidden_state
        loaded.model.lm_head(hidden).log_softmax(-1)[..., 3].sum().backward()
        return [parameter.grad for parameter in loaded.model.parameters()]

    sampled, untouched = tiny_model("qwen2"), tiny_model("qwen2")
    sampled.model.train()
    engine = engine_for(sampled, **options)
    engine.add(0, prompt(3, 50), Sampling(max_new_tokens=5), role=POLICY)
    run(engine)
    assert all(module.training for module in sampled.model.modules())
    assert all("forward" not in module.__dict__ for module in sampled.model.modules())
    assert not any(tensor.is_inference() for tensor in (*sampled.model.parameters(), *sampled.model.buffers()))
    for ours, theirs in zip(gradients(sampled), gradients(untouched), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("options", WAYS)
def test_a_broken_forward_leaves_the_module_as_it_was(options):
    loaded = tiny_model()
    engine = engine_for(loaded, **options)
    loaded.model.train()
    engine.add(0, prompt(0, 5), Sampling(max_new_tokens=2), role=POLICY)
    handle = loaded.model.model.embed_tokens.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.step()
    handle.remove()
    assert loaded.model.training and all("forward" not in module.__dict__ for module in loaded.model.modules())


def speaking_model(text: str, prompt_ids: list[int]) -> LoadedModel:
    """A model that says exactly `text`: its head is replaced by one that reads the position."""
    loaded = tiny_model()
    ids = loaded.tokenizer.encode(text, add_special_tokens=False)
    table = torch.zeros(4096, loaded.model.config.vocab_size)
    for place, token in enumerate(ids):
        table[len(prompt_ids) - 1 + place, token] = 50.0

    class Speaks(torch.nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return table[hidden[:, 0].round().long()]

    class Positions(torch.nn.Module):
        embed_tokens = loaded.model.model.embed_tokens

        def forward(self, *, position_ids: torch.Tensor, **_: object) -> object:
            hidden = position_ids[..., None].expand(*position_ids.shape, 4).float()
            return type("Output", (), {"last_hidden_state": hidden})

    loaded.model.get_decoder = lambda: Positions()
    loaded.model.get_output_embeddings = lambda: Speaks()
    return loaded


@pytest.mark.parametrize(
    ("text", "stop", "expected", "reason"),
    [
        ("a </search> b", ("</search>", "</answer>"), "a </search>", FinishReason.STOP),
        ("<answer> x </answer></search>", ("</search>", "</answer>"), "<answer> x </answer>", FinishReason.STOP),
        ("ends <|im_end|> after", ("</search>",), "ends <|im_end|>", FinishReason.STOP),
        ("pad <|endoftext|> after", (), "pad <|endoftext|>", FinishReason.STOP),
        ("</sea<|im_start|>rch> b", ("</search>",), "</sea<|im_start|>rch>", FinishReason.STOP),
        ("né 東京 stop 東 now", ("東 n",), "né 東京 stop 東 n", FinishReason.STOP),
        ("né 東京 on", ("東",), "né 東", FinishReason.STOP),
        ("one two three", ("two ",), "one two ", FinishReason.STOP),
        ("< /search>, </search >, <search>", ("</search>",), "< /search>, </search >, <search>", FinishReason.LENGTH),
    ],
)
def test_where_a_completion_stops(text, stop, expected, reason):
    ids = prompt(0, 10)
    loaded = speaking_model(text, ids)
    engine = engine_for(loaded)
    length = len(loaded.tokenizer.encode(text, add_special_tokens=False))
    engine.add(0, ids, Sampling(max_new_tokens=length, temperature=0.0, stop=stop), role=POLICY)
    completion = run(engine)[0]
    assert loaded.tokenizer.decode(completion.token_ids, skip_special_tokens=False) == expected
    assert completion.finish_reason is reason
    assert engine.stats()[POLICY].decode_tokens == len(completion.token_ids), "nothing is sampled past the stop"


def test_stop_strings_inside_long_tokens_and_the_prompt_not_counting():
    from tokenizers import Tokenizer, models, pre_tokenizers

    from zs_fast.rollout.stop import StopStrings
    from zs_fast.search.codec import Codec

    tokenizer = byte_tokenizer()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("<", "/"), ("c", "h"), ("ch", ">"), ("ch>", "Ċ")]
    vocab = {piece: index for index, piece in enumerate(alphabet)}
    for left, right in merges:
        vocab[left + right] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
    backend.decoder = tokenizer.backend_tokenizer.decoder
    codec = Codec(backend, chat_template=False)
    ids = codec.encode_untrusted("xx </search>\nmore")
    stops = StopStrings(codec)
    completed = [stops.completed(ids[: end + 1], ("</search>",)) for end in range(len(ids))]
    assert codec.decode(ids[: completed.index(True) + 1]) == "xx </search>\n"


def test_two_roles_share_one_engine_and_even_one_model():
    policy, simulator = tiny_model("llama"), tiny_model("qwen2", seed=9)
    engine = TransformersEngine(
        {POLICY: policy, SIMULATOR: simulator, Role.REFERENCE: policy}, slots=4, max_context_tokens={
            POLICY: 200, SIMULATOR: 300, Role.REFERENCE: 200,
        }
    )  # fmt: skip
    sampling = Sampling(max_new_tokens=6, seed=2)
    for role in (POLICY, SIMULATOR, Role.REFERENCE):
        engine.add(0, prompt(0, 20), sampling, role=role)
    done = []
    while engine.num_unfinished:
        done += engine.step()
    by_role = {completion.role: bits([completion]) for completion in done}
    assert by_role[POLICY] == by_role[Role.REFERENCE] != by_role[SIMULATOR]
    assert by_role[SIMULATOR] == bits(play_alone(simulator, [(prompt(0, 20), sampling)]))


def on_one_base(seed: int = 1) -> dict[Role, LoadedModel]:
    """A policy with an adapter, a simulator with another one, and the base as it is."""
    policy = tiny_model("qwen2", seed=seed)
    attach_adapter(policy.model, 3, targets=("q_proj", "o_proj", "up_proj"), seed=1)
    simulator = on_same_base(policy)
    attach_adapter(simulator.model, 5, targets=("v_proj", "down_proj", "gate_proj"), seed=2)
    for number, loaded in enumerate((policy, simulator)):
        fill_adapter(loaded, std=0.3, seed=number)
    return {POLICY: policy, SIMULATOR: simulator, Role.REFERENCE: on_same_base(policy)}


@pytest.fixture
def forwards(monkeypatch) -> list[list[int]]:
    """The numbers of tokens of each model, for every forward by the row operators."""
    counts: list[list[int]] = []

    def counted(rows):
        counts.append([len(one.input_ids) for one in rows])
        return logits_of(rows)

    monkeypatch.setattr(transformers_engine, "logits_of", counted)
    return counts


@by_rows
def test_roles_on_one_base_share_each_forward_and_have_the_bits_they_have_alone(forwards):
    """Over prompts that are prefilled while others decode, turns, and roles that are done before others."""
    models = on_one_base()
    work = {
        POLICY: [(prompt(0, 30), 9, "a"), (prompt(1, 300), 4, "b"), (prompt(2, 3), 20, "c")],
        SIMULATOR: [(prompt(3, 50), 12, None), (prompt(3, 51), 2, None)],
        Role.REFERENCE: [(prompt(0, 30), 5, None)],
    }

    def written(*roles: Role) -> dict[tuple[Role, int], tuple[tuple[int, ...], tuple[float, ...]]]:
        engine = TransformersEngine({role: models[role] for role in roles}, slots=2, max_context_tokens=400)
        done: dict[tuple[Role, int], Completion] = {}
        for turn in range(2):
            for role in roles:
                for number, (ids, length, salt) in enumerate(work[role]):
                    before = done.get((role, number))
                    context = ids if before is None else [*ids, *before.token_ids, *prompt(9, 11)]
                    sampling = Sampling(max_new_tokens=length, seed=number + turn)
                    engine.add(number + 10 * turn, context, sampling, role=role, cache_salt=salt)
            while engine.num_unfinished:
                done |= {(one.role, one.request_id): one for one in engine.step()}
        stats = engine.stats()
        assert all(stats[role].steps > 20 for role in roles if role is not Role.REFERENCE)
        return {key: (one.token_ids, one.logprobs) for key, one in done.items()}

    together = written(*models)
    num_together, most = len(forwards), max(map(len, forwards))
    forwards.clear()
    alone: dict[tuple[Role, int], tuple[tuple[int, ...], tuple[float, ...]]] = {}
    for role in models:
        alone |= written(role)
    assert together == alone and len(together) == 12
    assert most == 3 and num_together < 0.6 * len(forwards)
    assert together[POLICY, 0] != together[Role.REFERENCE, 0], "the adapter counts"


@by_rows
@pytest.mark.parametrize("broken", ["reserve", "logits_of", "sample_tokens"])
def test_a_step_that_fails_for_one_role_is_made_up_for_by_the_next_one(broken, monkeypatch):
    models = on_one_base()

    def written(fails_at: int | None) -> dict[Role, tuple]:
        engine = TransformersEngine(models, slots=2, max_context_tokens=400)
        for role in models:
            engine.add(0, prompt(0, 300), Sampling(max_new_tokens=7), role=role, cache_salt="a")
        done: dict[Role, tuple] = {}
        steps = 0
        while engine.num_unfinished:
            steps += 1
            with monkeypatch.context() as patch:
                if steps == fails_at:
                    where = engine._lane(SIMULATOR).slots if broken == "reserve" else transformers_engine
                    patch.setattr(where, broken, lambda *_: 1 / 0)
                    with pytest.raises(ZeroDivisionError):
                        engine.step()
                    continue
                done |= {one.role: (one.token_ids, one.logprobs) for one in engine.step()}
        return done

    undisturbed = written(None)
    assert len(undisturbed) == 3
    assert all(written(step) == undisturbed for step in (1, 2, 5))


@by_rows
def test_roles_part_when_the_base_of_one_is_another(forwards):
    models = on_one_base()
    engine = TransformersEngine(models, slots=2, max_context_tokens=100)

    def tokens() -> list[list[int]]:
        forwards.clear()
        for role in models:
            engine.add(0, prompt(0, 20), Sampling(max_new_tokens=1), role=role)
        run(engine)
        return list(forwards)

    assert tokens() == [[20, 20, 20]]
    layer = models[SIMULATOR].model.model.layers[1].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
    engine.publish(1)
    assert tokens() == [[20, 20], [20]]
    apart = TransformersEngine(
        {POLICY: tiny_model(seed=1), SIMULATOR: tiny_model(seed=1)}, slots=2, max_context_tokens=99
    )
    for role in (POLICY, SIMULATOR):
        apart.add(0, prompt(0, 20), Sampling(max_new_tokens=1), role=role)
    forwards.clear()
    run(apart)
    assert forwards == [[20], [20]], "equal weights are not the same weights"


def test_slots_are_given_back():
    engine = engine_for(tiny_model(), slots=2)
    for row in range(6):
        engine.add(row, prompt(row, 10), Sampling(max_new_tokens=2), role=POLICY, cache_salt=str(row))
        engine.end(POLICY, str(row)) if row == 5 else None  # ended while it still waits
    run(engine)
    for row in range(5):
        engine.end(POLICY, str(row))
    engine.end(POLICY, "never seen")
    evictions = engine.stats()[POLICY].evictions
    for row in range(10):
        engine.add(row, prompt(row, 10), Sampling(max_new_tokens=2), role=POLICY)
    assert len(run(engine)) == 10
    assert engine.stats()[POLICY].evictions == evictions


def test_kv_memory_is_released_and_taken_again():
    loaded = tiny_model()
    engine = engine_for(loaded)
    turns = [(prompt(0, 30), Sampling(max_new_tokens=5, seed=1)), (prompt(1, 8), Sampling(max_new_tokens=5, seed=2))]
    expected = bits(play_alone(loaded, turns))
    engine.add(0, turns[0][0], turns[0][1], role=POLICY, cache_salt="a")
    with pytest.raises(EngineError, match="unfinished"):
        engine.release_kv()
    first = run(engine)[0]
    assert engine.release_kv() > 0 and engine.release_kv() == 0
    engine.acquire_kv()
    engine.add(0, turns[0][0] + list(first.token_ids) + turns[1][0], turns[1][1], role=POLICY, cache_salt="a")
    assert bits([first, run(engine)[0]]) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": []}, "prompt of 0 tokens"),
        ({"prompt_ids": [1] * 62}, "62 tokens and asks for 4"),
        ({"prompt_ids": [1, 10**6]}, "1000000"),
        ({"prompt_ids": [-1]}, "-1"),
        ({"sampling": Sampling(max_new_tokens=0)}, "asks for 0"),
        ({"role": SIMULATOR}, "no model for role"),
        ({"request_id": 77}, "twice"),
        ({"cache_salt": "busy"}, "'busy'"),
    ],
)
def test_requests_that_can_not_be_served_are_refused(change, message):
    engine = engine_for(tiny_model(), limit=64)
    engine.add(77, [1, 2], Sampling(max_new_tokens=2), role=POLICY, cache_salt="busy")
    request = {"request_id": 0, "prompt_ids": [1, 2], "sampling": Sampling(max_new_tokens=4), "role": POLICY} | change
    with pytest.raises(EngineError, match=message):
        engine.add(request.pop("request_id"), request.pop("prompt_ids"), request.pop("sampling"), **request)
    assert len(run(engine)) == 1, "a refused request leaves nothing behind"


def test_a_context_fills_its_limit_exactly():
    engine = engine_for(tiny_model(), limit=64)
    engine.add(0, [1] * 61, Sampling(max_new_tokens=4, temperature=0.0), role=POLICY)
    assert len(run(engine)[0].token_ids) <= 4


def test_a_context_longer_than_the_model_knows_is_refused_at_start():
    with pytest.raises(PreflightError, match=r"5000 tokens.*4096 positions"):
        engine_for(tiny_model(), limit=5000)
    with pytest.raises(EngineError, match=r"engine\.slots"):
        engine_for(tiny_model(), slots=0)

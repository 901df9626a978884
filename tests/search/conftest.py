"""Fixtures of the search tests: codecs of four tokenizer families, and a scripted player of whole trajectories."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest

from zs_fast.config import GameConfig
from zs_fast.search.codec import AnyCodec, ByteCodec, Codec
from zs_fast.search.environment import Episode
from zs_fast.types import Completion, FinishReason, Question, Role, SearchMode, SearchResult


def _load_families() -> ModuleType:
    """The helper module beside this file; test files are no package, so it is loaded by its path, once."""
    name = "zs_search_tokenizer_families"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("tokenizer_families.py"))
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def families() -> ModuleType:
    """Module `tokenizer_families`: FAMILIES, family(name)."""
    return _load_families()


@pytest.fixture(scope="session")
def family_codecs(families: ModuleType) -> dict[str, Codec]:
    """A codec with chat template for each family."""
    return {name: Codec(families.family(name).tokenizer, True) for name in families.FAMILIES}


@pytest.fixture(scope="session", params=_load_families().FAMILIES)
def family_codec(request: pytest.FixtureRequest, family_codecs: dict[str, Codec]) -> Codec:
    return family_codecs[request.param]


@pytest.fixture(scope="session")
def byte_codec() -> ByteCodec:
    return ByteCodec()


@pytest.fixture(scope="session")
def question() -> Question:
    return Question(id="nq_1", text="who wrote the novel Emma", answers=("Jane Austen", "Austen"), source="nq")


def sampled(ids: Sequence[int], limit: int | None = None, *, finish: FinishReason = FinishReason.STOP) -> Completion:
    """A completion of the policy; longer than `limit`, it is cut there as an engine does."""
    if limit is not None and len(ids) > limit:
        ids, finish = ids[:limit], FinishReason.LENGTH
    return Completion(
        request_id=0, role=Role.POLICY, token_ids=tuple(ids), logprobs=(-1.0,) * len(ids), finish_reason=finish
    )


def play(
    codec: AnyCodec,
    question: Question,
    turns: Sequence[str | Sequence[int]],
    documents: Sequence[Sequence[str]] | Sequence[str] = (),
    game: GameConfig | None = None,
    *,
    fail_search: bool = False,
) -> Episode:
    """Play scripted turns (text, or ids) until the game is over or the script ends. `documents`: of every search."""
    episode = Episode(
        question,
        sample=0,
        step=1,
        noise_probability=0.0,
        game=game or GameConfig(max_context_tokens=16384),
        codec=codec,
    )
    for turn in turns:
        if episode.done:
            break
        ids = encode_sample(codec, turn) if isinstance(turn, str) else list(turn)
        request = episode.on_completion(sampled(ids, episode.max_new_tokens()))
        if request is not None:
            found = () if fail_search else tuple(documents)
            episode.on_search_result(
                SearchResult(request=request, documents=found, mode=SearchMode.USEFUL, failed=fail_search)
            )
    return episode


def encode_sample(codec: AnyCodec, text: str) -> list[int]:
    """Ids that a model might sample for a text: added tokens count (a policy may well sample them)."""
    if isinstance(codec, Codec):
        return codec._full.encode(text, add_special_tokens=False).ids
    return codec.encode_untrusted(text)


@pytest.fixture(scope="session", name="play")
def play_fixture() -> Callable[..., Episode]:
    return play


@pytest.fixture(scope="session", name="sampled")
def sampled_fixture() -> Callable[..., Completion]:
    return sampled


@pytest.fixture(scope="session", name="encode_sample")
def encode_sample_fixture() -> Callable[..., list[int]]:
    return encode_sample

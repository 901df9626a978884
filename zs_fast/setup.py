"""From a config to the things that play: models, engine, search backends and players. Used by train, evaluate and ask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from zs_fast.config import RunConfig, SamplingConfig
from zs_fast.models.load import DTYPES, LoadedModel, load_model
from zs_fast.rollout.engine import Engine
from zs_fast.rollout.openai_engine import OpenAIEngine
from zs_fast.rollout.play import Player
from zs_fast.rollout.transformers_engine import TransformersEngine
from zs_fast.search.backends import SearchBackend
from zs_fast.search.backends.bm25 import Bm25Search, load_passages
from zs_fast.search.backends.closed_book import ClosedBook
from zs_fast.search.codec import ByteCodec, Codec
from zs_fast.search.simulator import SimulatedSearch
from zs_fast.types import Role

EVALUATION_NAMES = {"simulator": "simulator", "bm25": "bm25", "none": "closed_book"}


@dataclass(frozen=True, slots=True)
class Arena:
    """Where the policy plays: one engine for policy and simulator, one player to train with, one per evaluation."""

    engine: TransformersEngine
    codec: Codec
    training_player: Player
    evaluation_players: dict[str, Player]
    """By name: `simulator`, `bm25`, `closed_book`."""
    close: Callable[[], None]


def build_arena(config: RunConfig, policy: LoadedModel, *, device: Any) -> Arena:
    """Load the simulator, put it into one engine with `policy`, and make the players."""
    models = {Role.POLICY: policy}
    simulator_context = config.game.max_context_tokens + config.simulator.max_new_tokens
    if config.simulator.kind == "model":
        models[Role.SIMULATOR] = load_model(config.simulator.path, dtype=DTYPES[config.model.dtype], device=device)
    elif config.simulator.kind == "policy":
        models[Role.SIMULATOR] = load_model(config.model.path, dtype=DTYPES[config.model.dtype], device=device)
    engine = TransformersEngine(
        models,
        slots=config.engine.slots,
        max_context_tokens={Role.POLICY: config.game.max_context_tokens, Role.SIMULATOR: simulator_context},
        batch_invariant=config.engine.batch_invariant,
    )
    remote = OpenAIEngine(config.simulator) if config.simulator.kind == "openai" else None
    codec = Codec(policy.tokenizer, chat_template=config.model.chat_template)
    searches = _Searches(config, engine, remote, models)

    def player(search: SearchBackend, sampling: SamplingConfig, group_size: int) -> Player:
        return Player(
            engine,
            search,
            codec,
            game=config.game,
            sampling=sampling,
            group_size=group_size,
            run_seed=config.seed,
            max_failed_share=config.simulator.max_failed_share,
            simulator_engine=remote,
        )

    kind = "bm25" if config.simulator.kind == "bm25" else "simulator"
    greedy = SamplingConfig(temperature=config.eval.temperature)
    evaluation_players = {
        EVALUATION_NAMES[name]: player(searches.make(name), greedy, 1) for name in config.eval.search if config.eval.data
    }

    def close() -> None:
        engine.close()
        if remote is not None:
            remote.close()

    training_player = player(searches.make(kind), config.sampling, config.train.group_size)
    return Arena(engine, codec, training_player, evaluation_players, close)


class _Searches:
    """Makes search backends by name."""

    def __init__(
        self, config: RunConfig, engine: Engine, remote: OpenAIEngine | None, models: dict[Role, LoadedModel]
    ) -> None:
        self._config, self._engine, self._remote, self._models = config, engine, remote, models

    def make(self, name: str) -> SearchBackend:
        simulator = self._config.simulator
        if name == "none":
            return ClosedBook()
        if name == "bm25" or simulator.kind == "bm25":
            return Bm25Search(load_passages(simulator.corpus), documents=simulator.documents)
        speaker: Codec | ByteCodec = ByteCodec()
        if self._remote is None:
            speaker = Codec(self._models[Role.SIMULATOR].tokenizer, chat_template=True)
        return SimulatedSearch(
            self._remote or self._engine,
            speaker,
            simulator,
            run_seed=self._config.seed,
            max_query_characters=self._config.game.max_query_characters,
        )

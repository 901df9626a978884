"""From a config to the things that play: models, engine, search backends and players."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch

from zs_fast.config import EvalConfig, MethodName, RunConfig, SamplingConfig
from zs_fast.errors import ConfigError, PreflightError
from zs_fast.models.attention import use_attention
from zs_fast.models.liger import use_liger
from zs_fast.models.load import (
    DTYPES,
    LoadedModel,
    load_model,
    load_skeleton,
    on_same_base,
    resolve_device,
    resolve_path,
    whole_model,
    with_trained_weights,
)
from zs_fast.models.lora import adapter_rank, read_adapter
from zs_fast.models.quantize import quantize_base
from zs_fast.rollout.child_server import MODEL_NAME, ChildServer, start_simulator
from zs_fast.rollout.engine import LocalEngine
from zs_fast.rollout.journal import Journal
from zs_fast.rollout.openai_engine import OpenAIEngine
from zs_fast.rollout.play import Player
from zs_fast.rollout.transformers_engine import TransformersEngine
from zs_fast.search.backends import SearchBackend
from zs_fast.search.backends.bm25 import Bm25Index, Bm25Search
from zs_fast.search.backends.closed_book import ClosedBook
from zs_fast.search.backends.function import FunctionSearch
from zs_fast.search.backends.passages import read_corpus
from zs_fast.search.backends.remote import DIALECTS, RemoteSearch
from zs_fast.search.by_set import QuestionSets, SearchBySet
from zs_fast.search.codec import ByteCodec, Codec
from zs_fast.search.own_code import load_function
from zs_fast.search.reward import reward_of
from zs_fast.search.simulator import SimulatedSearch
from zs_fast.system.distributed import local_rank, world_size
from zs_fast.system.memory import return_freed_memory, wake_kv_cache
from zs_fast.system.seeds import seed_for
from zs_fast.types import Role

EVALUATION_NAMES = {
    "simulator": "simulator",
    "bm25": "bm25",
    "retriever": "retriever",
    "function": "function",
    "none": "closed_book",
}
"""`eval.search` -> the evaluation's name in metrics and summary."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arena:
    """Where the policy plays: one engine for policy and simulator, one player to train with, one per evaluation."""

    engine: LocalEngine
    codec: Codec
    training_player: Player
    training_search: SearchBackend
    """Who answers the searches of `training_player`."""
    evaluation_players: dict[str, Player] = field(default_factory=dict)
    """By name: `simulator`, `bm25`, `retriever`, `closed_book`, `rag_bm25`, `direct`, ... (`planned_evaluations`)."""
    remote: OpenAIEngine | None = None
    retriever: RemoteSearch | None = None
    child: ChildServer | None = None
    """The server behind `remote`, where the run has started it."""
    copy_policy: Callable[[], int] | None = None
    """Writes the trained policy into an engine that has weights of its own; None where they are one."""
    choices: tuple[str, ...] = ()
    """A line each on what was chosen for the engine's memory, and why."""

    def close(self) -> None:
        self.engine.close()
        if self.remote is not None:
            self.remote.close()
        if self.retriever is not None:
            self.retriever.close()
        if self.child is not None:
            self.child.close()


@dataclass(kw_only=True)
class SearchEngines:
    """The search backends of a run, each made when it is first asked for. Players that share one take turns."""

    config: RunConfig
    engine: LocalEngine
    remote: OpenAIEngine | None
    models: dict[Role, LoadedModel]
    retriever: RemoteSearch | None = None
    """The remote one, once a player uses it."""

    def backend(self, name: str) -> SearchBackend:
        """Who answers the searches of a player: `simulator` as `simulator.kind` has it, or one of `eval.search`."""
        kind = self.config.simulator.kind if name == "simulator" else name
        if kind == "none":
            return ClosedBook()
        if kind == "bm25":
            return self._searching(*self._bm25)
        if kind == "retriever":
            documents, processes = self.config.simulator.documents, world_size()
            if self.retriever is None:
                self.retriever = RemoteSearch(self.config.retriever, documents=documents, processes=processes)
            return self.retriever
        if kind == "function":
            name = self.config.simulator.function
            function = load_function(name, setting="simulator.function")
            return FunctionSearch(function, documents=self.config.simulator.documents, name=name)
        return self._simulated()

    def judge(self, name: str, sets: QuestionSets) -> SearchBackend:
        """Who answers in an evaluation of `sets`: as `backend`, but `bm25` looks into `eval.corpus` where there is one.

        Raises ConfigError where that has passages for each set, and no set is given.
        """
        corpus = self.config.eval.corpus
        if name != "bm25" or not corpus:
            return self.backend(name)
        if "{set}" not in corpus:
            return self._searching(*self._indexed(corpus))
        if not sets:
            raise ConfigError(
                f"eval.corpus is {corpus!r}, with passages for each set of questions, but this question belongs to no "
                "set. Name one file: --eval.corpus FILE."
            )
        indexed = {set_name: self._indexed(corpus.replace("{set}", set_name)) for set_name in sets}
        return SearchBySet({set_name: self._searching(*found) for set_name, found in indexed.items()}, sets)

    @cached_property
    def _bm25(self) -> tuple[list[str], Bm25Index]:
        return self._indexed(self.config.simulator.corpus)

    def _indexed(self, corpus: str) -> tuple[list[str], Bm25Index]:
        passages = read_corpus(corpus)
        return [passage.document for passage in passages], Bm25Index.over(passages, self.config.bm25)

    def _searching(self, passages: list[str], index: Bm25Index) -> Bm25Search:
        return Bm25Search(passages, documents=self.config.simulator.documents, index=index)

    def close(self) -> None:
        if self.retriever is not None:
            self.retriever.close()

    def _simulated(self) -> SimulatedSearch:
        speaker: Codec | ByteCodec = ByteCodec()
        if self.remote is None:
            speaker = Codec(self.models[Role.SIMULATOR].tokenizer, chat_template=True)
        return SimulatedSearch(
            self.remote or self.engine,
            speaker,
            self.config.simulator,
            run_seed=self.config.seed,
            max_query_characters=self.config.game.max_query_characters,
        )


def planned_evaluations(settings: EvalConfig) -> dict[str, tuple[MethodName, str]]:
    """Name -> (method, one of `eval.search`): what an evaluation of these settings plays. Empty without eval.data.

    The agent plays with each search, under the search's name alone; `rag` with each that finds something.
    """
    planned: dict[str, tuple[MethodName, str]] = {}
    for method in settings.methods if settings.data else ():
        if method not in ("agent", "rag"):
            planned[method] = (method, "none")
            continue
        for search in settings.search:
            name = EVALUATION_NAMES[search]
            if method == "agent":
                planned[name] = (method, search)
            elif search != "none":
                planned[f"rag_{name}"] = (method, search)
    return planned


def use_device(config: RunConfig) -> torch.device:
    """The device of `model.device`, after setting torch's number of CPU threads, and which kernels the models take.

    With several processes each has a GPU of its own, counted by torchrun's LOCAL_RANK on every machine.
    """
    device = _device(config)
    use_attention(config.model.attention, device, DTYPES[config.model.dtype])
    use_liger(config.model.liger, device)
    return device


def _device(config: RunConfig) -> torch.device:
    if config.threads:
        torch.set_num_threads(config.threads)
    device = resolve_device(config.model.device)
    number = local_rank()
    if device.type != "cuda" or number is None:
        return device
    if device.index is not None:
        raise PreflightError(
            f"model.device is {config.model.device!r}, one card, but there are {world_size()} processes. Take 'cuda' "
            "or 'auto': each process then has a card of its own."
        )
    if number >= torch.cuda.device_count():
        raise PreflightError(
            f"This is process {number} of its machine (LOCAL_RANK), but there are only {torch.cuda.device_count()} "
            "GPUs. Start at most as many with torchrun --nproc-per-node, or set model.device = 'cpu'."
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def load_served(path: str, config: RunConfig, device: torch.device) -> LoadedModel:
    """The model at `path`, for `build_arena` to serve. vLLM reads a folder's weights itself: they exist only once."""
    dtype = DTYPES[config.model.dtype]
    if config.engine.kind != "vllm":
        return load_model(path, dtype=dtype, device=device)
    if resolve_path(whole_model(path)).is_dir():
        return load_skeleton(path, dtype=dtype)
    return load_model(path, dtype=dtype)


def load_policy(config: RunConfig, device: torch.device) -> LoadedModel:
    """The model to train, for `build_arena` to serve: with `model.lora_rank` a new adapter on frozen weights, and from
    a peft folder the adapter that is there."""
    packed = config.model.quantization == "nf4"
    loaded = load_served(config.model.path, config, torch.device("cpu") if packed else device)
    if packed:
        quantize_base(loaded.model, device=device)
    seed = seed_for(config.seed, role=Role.POLICY, purpose="adapter")
    loaded = with_trained_weights(loaded, config.model, seed=seed)
    if packed and not adapter_rank(loaded.model):
        raise PreflightError(
            "model.quantization is 'nf4' and model.lora_rank 0: packed weights can't be trained, only an adapter on "
            "them. Set model.lora_rank, or leave model.quantization out."
        )
    if config.simulator.adapter and not adapter_rank(loaded.model):
        raise PreflightError(
            f"simulator.adapter is {config.simulator.adapter!r}, an adapter on the policy's base, but model.lora_rank "
            "is 0: all the policy's weights are trained. Set model.lora_rank, or take simulator.kind = 'model' with "
            "the adapter's folder as simulator.path."
        )
    return loaded


def simulator_name(config: RunConfig, *, training: bool, policy: LoadedModel | None = None) -> str:
    """Who answers the searches of "simulator": the path of a model, the address of a server, or the passages of bm25.

    Kind `policy` is the base of a policy with an adapter, or what `simulator.adapter` makes of it; else the policy as
    it was before training: `model.path`, and where that is a checkpoint to evaluate, the model that its run began with.
    Raises PreflightError if the checkpoint doesn't say which.
    """
    simulator = config.simulator
    if simulator.kind != "policy":
        retriever = config.retriever
        return {
            "model": simulator.path,
            "openai": simulator.url,
            "bm25": f"bm25 in {simulator.corpus}",
            "retriever": f"{retriever.kind} at {retriever.url or DIALECTS[retriever.kind].default_url}",
            "function": simulator.function,
        }[simulator.kind]
    if policy is not None and adapter_rank(policy.model):
        return simulator.adapter or policy.base
    state = Path(config.model.path).expanduser().absolute().parent / "trainer.json"
    if training or not state.is_file():
        return config.model.path
    try:
        return str(json.loads(state.read_bytes())["config"]["model"]["path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PreflightError(
            f"{state} does not say which model the checkpoint {config.model.path} was trained from "
            f"({type(error).__name__}: {error}); simulator.kind = 'policy' speaks through that one. Name it: "
            "--simulator.kind model --simulator.path MODEL."
        ) from error


def build_arena(
    config: RunConfig,
    policy: LoadedModel,
    *,
    device: torch.device,
    base: LoadedModel | None = None,
    training: bool = True,
    eval_sets: QuestionSets | None = None,
    journal: Journal | None = None,
) -> Arena:
    """Put `policy`, and the simulator where a search needs it, into one engine, and make the players.

    `policy` is a model of `load_served`; its module is the engine's afterwards. `base` is one too, the policy before
    training, where it is in memory already: a simulator of kind `policy` speaks through it.
    Without `training` the simulator is loaded, or its server asked, only if an evaluation needs it. `eval_sets` are
    what evaluations play; needed where `eval.corpus` has passages for each set. All
    players keep their replies in `journal`.
    """
    reward_of(config.game.reward)  # one that is missing is an error now, not after the first rollout
    planned = planned_evaluations(config.eval)
    used = {search for _, search in planned.values()} | ({"simulator"} if training else set())
    models = {Role.POLICY: policy}
    remote: OpenAIEngine | None = None
    child: ChildServer | None = None
    if "simulator" in used and config.simulator.kind == "openai":
        remote = OpenAIEngine(config.simulator)
    elif "simulator" in used and config.simulator.process == "child":
        child, remote = _simulator_process(config, device)
    elif "simulator" in used and config.simulator.kind not in ("bm25", "retriever", "function"):
        models[Role.SIMULATOR] = _simulator_model(config, policy, base, device, training=training)
    try:
        engine = _engine(config, models, device)
    except BaseException:
        if remote is not None:
            remote.close()
        if child is not None:
            child.close()
        raise
    codec = Codec(policy.tokenizer, chat_template=config.model.chat_template)
    searches = SearchEngines(config=config, engine=engine, remote=remote, models=models)

    def player(
        search: SearchBackend, sampling: SamplingConfig, group_size: int, method: MethodName = "agent"
    ) -> Player:
        return Player(
            engine,
            search,
            codec,
            game=config.game,
            sampling=sampling,
            group_size=group_size,
            run_seed=config.seed,
            max_failed_share=config.simulator.max_failed_share,
            journal=journal,
            simulator_engine=remote,
            method=method,
        )

    training_search = searches.backend("simulator" if training else "none")
    greedy = SamplingConfig(temperature=config.eval.temperature)
    judges = {search: searches.judge(search, eval_sets or {}) for _, search in planned.values()}
    return Arena(
        engine=engine,
        codec=codec,
        training_player=player(training_search, config.sampling, config.train.group_size),
        training_search=training_search,
        evaluation_players={
            name: player(judges[search], greedy, 1, method) for name, (method, search) in planned.items()
        },
        remote=remote,
        retriever=searches.retriever,
        child=child,
        copy_policy=partial(engine.copy_weights, Role.POLICY) if engine.copies(Role.POLICY) else None,
        choices=(
            *engine.choices(),
            *([f"the simulator runs in a process of its own, at {child.url}"] if child else ()),
        ),
    )


def _simulator_process(config: RunConfig, device: torch.device) -> tuple[ChildServer, OpenAIEngine]:
    """A server for the simulator's model, started, and an engine that asks it."""
    child = start_simulator(config, device)
    served = {"url": child.url, "remote_model": MODEL_NAME, "api_key_env": ""}  # no key is meant for it
    try:
        return child, OpenAIEngine(config.simulator.model_copy(update=served), check=child.check)
    except BaseException:
        child.close()
        raise


def _simulator_model(
    config: RunConfig, policy: LoadedModel, base: LoadedModel | None, device: torch.device, *, training: bool
) -> LoadedModel:
    if config.simulator.kind == "policy" and adapter_rank(policy.model):
        # vLLM takes an adapter with each request; the embedded engine has a module for each role.
        return policy if config.engine.kind == "vllm" else on_same_base(policy, config.simulator.adapter)
    if config.simulator.kind == "policy" and base is not None:
        return base
    return load_served(simulator_name(config, training=training), config, device)


def _engine(config: RunConfig, models: dict[Role, LoadedModel], device: torch.device) -> LocalEngine:
    limits = {
        Role.POLICY: config.game.max_context_tokens,
        Role.SIMULATOR: config.game.max_context_tokens + config.simulator.max_new_tokens,
    }
    settings, sampling = config.engine, config.sampling
    if settings.kind == "transformers":
        return TransformersEngine(
            models, slots=settings.slots, max_context_tokens=limits, batch_invariant=settings.batch_invariant
        )
    if settings.batch_invariant:
        raise PreflightError(
            "engine.batch_invariant = true is offered by engine.kind = 'transformers' only; vLLM's results depend on "
            "the batch. Leave it out, or take that kind."
        )
    if sampling.top_p < 1.0 or sampling.top_k:
        raise PreflightError(
            f"sampling.top_p is {sampling.top_p} and sampling.top_k {sampling.top_k}, but engine.kind = 'vllm' takes "
            "top_p = 1 and top_k = 0 only: its log-probabilities would be those of the cut distribution."
        )
    from zs_fast.rollout.vllm_engine import VllmEngine

    engine = VllmEngine(
        models,
        slots=settings.slots,
        max_context_tokens=limits,
        device=device,
        frozen=(Role.SIMULATOR,),
        kv_cache_bytes=int(settings.kv_cache_gib * 2**30) or None,
        enforce_eager=settings.enforce_eager,
        weights=settings.weights,
        wake=wake_kv_cache if settings.release_kv else None,
        adapters={Role.SIMULATOR: read_adapter(resolve_path(adapter))} if (adapter := config.simulator.adapter) else {},
    )
    return_freed_memory()  # of models that were loaded here and moved into vLLM's memory
    return engine

"""`zs-fast simulator-quality`: are a simulator's useful documents useful, and its noisy ones noise?

Real searches are repeated: the simulator is asked for useful and for noisy documents for each, and its documents are
held beside those that were really found. Curricula rest on the difference between the two modes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from zs_fast.config import RunConfig, SimulatorConfig
from zs_fast.errors import ConfigError, EngineError
from zs_fast.models.load import LoadedModel, whole_model
from zs_fast.ranks import hold_run_folder
from zs_fast.rollout.engine import Engine
from zs_fast.rollout.openai_engine import OpenAIEngine
from zs_fast.rollout.play import IDLE_SLEEP_S, Progress
from zs_fast.rollout.transformers_engine import TransformersEngine
from zs_fast.search.codec import AnyCodec, ByteCodec, Codec
from zs_fast.search.simulator import SimulatedSearch
from zs_fast.setup import load_served, simulator_name, use_device
from zs_fast.simulator.measures import measure, table
from zs_fast.simulator.reader import read
from zs_fast.simulator.records import LabelledSearch, read_searches, to_row, write_json, write_rows
from zs_fast.system.console import make_screen
from zs_fast.system.seeds import seed_for
from zs_fast.types import Role, SearchMode, SearchResult

SUMMARY_FILE = "quality.json"
OUTPUTS_FILE = "outputs.jsonl"
SIMULATED = (SearchMode.USEFUL, SearchMode.NOISY)


def simulator_quality(config: RunConfig) -> dict[str, Any]:
    """Judge the simulator of section `simulator` on the searches of `quality.data`; what is in <output>/quality.json.

    Every document that was written or found lies beside it in outputs.jsonl.
    """
    if not config.quality.data:
        raise ConfigError(
            "quality.data is empty, so there are no searches to repeat. Give the validation_searches.jsonl that "
            "`zs-fast label` writes."
        )
    if config.simulator.kind not in ("model", "policy", "openai"):
        raise ConfigError(
            f"simulator.kind is {config.simulator.kind!r}, which is no simulator. Take 'model', 'policy' or 'openai'."
        )
    output = config.output or Path("runs") / f"{config.name}_quality"
    searches = chosen_searches(config)
    with ExitStack() as stack:
        hold_run_folder(output, stack)
        screen = stack.enter_context(closing(make_screen(0, config.name)))
        device = use_device(config)
        results = _simulate(searches, config, device, partial(screen.progress, "writing documents"))
        results[SearchMode.REAL] = [_real(search) for search in searches]
        f1: Mapping[SearchMode, list[float]] = {}
        if config.quality.reader != "none":
            reader = load_served(config.quality.reader or config.model.path, config, device)
            f1 = read(reader, results, config, on_progress=partial(screen.progress, "reading"))
        measured = measure(results, f1)
        summary = {
            "simulator": _name(config),
            "template": config.simulator.template,
            "documents": config.simulator.documents,
            "temperature": config.simulator.temperature,
            "max_samples": config.simulator.max_samples,
            "data": config.quality.data,
            "searches": len(searches),
            "seed": config.seed,
            "reader": config.quality.reader or config.model.path,
            "quality": {mode: {name: value.as_dict() for name, value in of.items()} for mode, of in measured.items()},
        }
        write_rows(output / OUTPUTS_FILE, _output_rows(results, f1))
        write_json(output / SUMMARY_FILE, summary)
        screen.note(table(measured))
    return summary


def quality_in_training(config: RunConfig, device: torch.device) -> Callable[[LoadedModel], dict[str, float]]:
    """For `zs-fast sft`: a measure of the model as it is, on the first `quality.during_training` searches."""
    searches = chosen_searches(config)[: config.quality.during_training]
    simulator = config.simulator.model_copy(update={"template": "fine_tuned"})

    def quality(model: LoadedModel) -> dict[str, float]:
        results = _simulate_with(model, searches, config, simulator)
        results[SearchMode.REAL] = [_real(search) for search in searches]
        return {
            f"{mode}_{name}": value.value
            for mode, of_mode in measure(results, {}).items()
            if mode is not SearchMode.REAL
            for name, value in of_mode.items()
        }

    return quality


def chosen_searches(config: RunConfig) -> list[LabelledSearch]:
    """One search of each of the first `quality.questions` questions of `quality.data`, in seeded order."""
    by_question: dict[str, list[LabelledSearch]] = {}
    for search in read_searches(Path(config.quality.data).expanduser()):
        by_question.setdefault(search.question.id, []).append(search)
    ranked = sorted(by_question, key=lambda id_: seed_for(config.seed, question_id=id_, purpose="quality"))
    chosen = ranked[: config.quality.questions or len(ranked)]
    return [
        of_question[seed_for(config.seed, question_id=id_, purpose="quality search") % len(of_question)]
        for id_ in chosen
        for of_question in [by_question[id_]]
    ]


def simulate(
    engine: Engine,
    codec: AnyCodec,
    searches: Sequence[LabelledSearch],
    config: RunConfig,
    simulator: SimulatorConfig,
    *,
    on_progress: Progress | None = None,
) -> dict[SearchMode, list[SearchResult]]:
    """What the simulator writes for each search, in order, in either mode: asked as it is in training."""
    backend = SimulatedSearch(
        engine, codec, simulator, run_seed=config.seed, max_query_characters=config.game.max_query_characters
    )
    requests = [replace(search, mode=mode).request() for mode in SIMULATED for search in searches]
    for request in requests:
        backend.submit(request)
    found: dict[tuple[str, float], SearchResult] = {}
    while len(found) < len(requests):
        started = time.monotonic()
        completions = engine.step()
        for completion in completions:
            backend.deliver(completion)
        for result in backend.poll():
            found[result.request.question.id, result.request.noise_probability] = result
        if not engine.num_unfinished and len(found) < len(requests):
            raise EngineError(f"{len(requests) - len(found)} of {len(requests)} searches were lost by the engine")
        if completions and on_progress is not None:
            on_progress(len(found), len(requests))
        if not completions and time.monotonic() - started < IDLE_SLEEP_S:
            time.sleep(IDLE_SLEEP_S)  # a remote engine: others do the work
    results = [found[request.question.id, request.noise_probability] for request in requests]
    return {SearchMode.USEFUL: results[: len(searches)], SearchMode.NOISY: results[len(searches) :]}


def _simulate(
    searches: Sequence[LabelledSearch], config: RunConfig, device: torch.device, on_progress: Progress
) -> dict[SearchMode, list[SearchResult]]:
    simulator = config.simulator
    if simulator.kind == "openai":
        remote = OpenAIEngine(simulator)
        try:
            return simulate(remote, ByteCodec(), searches, config, simulator, on_progress=on_progress)
        finally:
            remote.close()
    model = load_served(_name(config), config, device)
    return _simulate_with(model, searches, config, simulator, on_progress)


def _simulate_with(
    model: LoadedModel,
    searches: Sequence[LabelledSearch],
    config: RunConfig,
    simulator: SimulatorConfig,
    on_progress: Progress | None = None,
) -> dict[SearchMode, list[SearchResult]]:
    engine = TransformersEngine(
        {Role.SIMULATOR: model},
        slots=config.engine.slots,
        max_context_tokens=config.game.max_context_tokens + simulator.max_new_tokens,
        batch_invariant=config.engine.batch_invariant,
    )
    try:
        codec = Codec(model.tokenizer, chat_template=True)
        return simulate(engine, codec, searches, config, simulator, on_progress=on_progress)
    finally:
        engine.close()


def _name(config: RunConfig) -> str:
    """The model that speaks: of kind `policy`, the adapter on the policy's base, or that base."""
    name = simulator_name(config, training=False)
    if config.simulator.kind != "policy":
        return name
    return config.simulator.adapter or whole_model(name)


def _real(search: LabelledSearch) -> SearchResult:
    return SearchResult(request=search.request(), documents=search.documents, mode=SearchMode.REAL)


def _output_rows(
    results: Mapping[SearchMode, Sequence[SearchResult]], f1: Mapping[SearchMode, Sequence[float]]
) -> list[dict[str, Any]]:
    rows = []
    for mode, of_mode in results.items():
        for number, result in enumerate(of_mode):
            search = LabelledSearch(
                question=result.request.question, query=result.request.query, mode=mode, documents=result.documents
            )
            extra = {"malformed": result.malformed, "error": result.error}
            rows.append(to_row(search) | extra | ({"reader_f1": f1[mode][number]} if mode in f1 else {}))
    return rows

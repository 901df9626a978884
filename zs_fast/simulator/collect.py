"""`zs-fast collect`: real searches over training questions, each kept with the trajectory that it belongs to.

Lines are appended as trajectories end, so that a killed collection goes on where it was: draws are a function of (seed,
question, sample, turn), and a torn last line is cut off. Test questions are refused: a simulator that was fine-tuned on
them would hand their answers to the policy that is judged by them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from zs_fast.config import RunConfig
from zs_fast.errors import ConfigError, DataError, PreflightError, SimulatorError
from zs_fast.ranks import hold_run_folder
from zs_fast.rollout.play import IDLE_SLEEP_S, Player, Progress
from zs_fast.search.backends import SearchBackend
from zs_fast.search.backends.bm25 import Bm25Index, Bm25Search
from zs_fast.search.backends.passages import read_corpus
from zs_fast.search.backends.remote import RemoteSearch
from zs_fast.search.data import QuestionOrder, load_questions
from zs_fast.search.reward import normalise
from zs_fast.setup import build_arena, load_policy, use_device
from zs_fast.simulator.records import (
    CollectedTrajectory,
    FoundSearch,
    read_trajectories,
    to_row,
    write_json,
    write_rows,
)
from zs_fast.system.console import make_screen
from zs_fast.system.distributed import world_size
from zs_fast.system.jsonl import JsonlWriter
from zs_fast.types import Question, SearchRequest, SearchResult, Trajectory

FILE = "trajectories.jsonl"
SUMMARY_FILE = "collect.json"
_HELD_OUT = re.compile(r"(?:^|[^a-z])(?:test|dev|validation|heldout|held_out)(?:[^a-z]|$)")
"""In the name of a file or split, or in a question's id: what a simulator must not be made from."""


def collect(config: RunConfig, *, resume: bool = False) -> dict[str, Any]:
    """Play `data` against `collect.search` into <output>/trajectories.jsonl; counts, ready for JSON.

    With `resume` the whole lines of that file stay and their trajectories are not played again. Raises ConfigError when
    the file is there without it, DataError for questions that are no training questions.
    """
    if world_size() > 1:
        raise PreflightError(f"zs-fast collect runs in one process, but torchrun started {world_size()}.")
    output = config.output or Path("runs") / f"{config.name}_collect"
    path = output / FILE
    if path.exists() and not resume:
        raise ConfigError(f"{path} exists already. Go on with --resume, or choose another --output.")
    questions = training_questions(config)
    with ExitStack() as stack:
        hold_run_folder(output, stack)
        done = _resumed(path, questions)
        screen = stack.enter_context(closing(make_screen(0, config.name)))
        writer = stack.enter_context(closing(JsonlWriter(path)))
        missing = [q for q in questions if any((q.id, s) not in done for s in range(config.collect.samples))]
        screen.note(f"{len(questions)} questions, {len(missing)} of them to be played")

        def keep(trajectory: CollectedTrajectory) -> None:
            key = trajectory.question.id, trajectory.sample
            if key not in done:
                done[key] = trajectory
                writer.append(to_row(trajectory))

        progress = partial(screen.progress, "collecting")
        if missing and config.collect.play == "question":
            _search_questions(config, missing, keep, progress, stack)
        elif missing:
            _play_policy(config, missing, keep, progress, stack)
        writer.sync()
        summary = {"trajectories_file": str(path)} | summarise(list(done.values()))
        write_json(output / SUMMARY_FILE, summary)
    return summary


def training_questions(config: RunConfig) -> list[Question]:
    """The questions of `data` to play: the first `collect.questions` in seeded order. DataError for test questions."""
    name = config.data.rpartition("/")[2] if "/" in config.data else config.data
    if match := _HELD_OUT.search(name.lower()):
        raise DataError(
            f"data is {config.data!r}, by its name ({match[0].strip('._:-')!r}) no training questions: what a "
            "simulator is made from must never judge a policy. Give training questions, or rename the file if it "
            "holds some."
        )
    questions = load_questions(config.data)
    named = [question.id for question in questions if _HELD_OUT.search(question.id.lower())]
    if named:
        raise DataError(
            f"{config.data}: {len(named)} of {len(questions)} questions are no training questions by their ids (first: "
            f"{named[0]!r}). Test sets never train anything, a simulator neither: leave them out."
        )
    judged = {normalise(question.text) for spec in config.eval.data for question in load_questions(spec)}
    shared = [question.id for question in questions if normalise(question.text) in judged]
    if shared:
        raise DataError(
            f"{config.data}: {len(shared)} of {len(questions)} questions are in eval.data too "
            f"({', '.join(config.eval.data)}; first: {shared[0]!r}). "
            "What a simulator is made from must never judge a policy: leave them out."
        )
    count = config.collect.questions or len(questions)
    return QuestionOrder(questions, config.seed).batch(0, min(count, len(questions)))


def summarise(trajectories: Sequence[CollectedTrajectory]) -> dict[str, Any]:
    """Counts of what was collected, and how it ended."""
    searches = [search for trajectory in trajectories for search in trajectory.searches]
    scored = [trajectory.f1 for trajectory in trajectories if trajectory.f1 is not None]
    return {
        "questions": len({trajectory.question.id for trajectory in trajectories}),
        "trajectories": len(trajectories),
        "searches": len(searches),
        "failed_searches": sum(trajectory.failed_searches for trajectory in trajectories),
        "searches_with_answer": sum(search.contains_answer for search in searches),
        "mean_f1": sum(scored) / len(scored) if scored else None,
    }


def real_search(config: RunConfig) -> SearchBackend:
    """The real search engine of `collect.search`."""
    documents = config.collect.documents
    if config.collect.search == "retriever":
        return RemoteSearch(config.retriever, documents=documents)
    passages = read_corpus(config.simulator.corpus)
    index = Bm25Index.over(passages, config.bm25)
    return Bm25Search([passage.document for passage in passages], documents=documents, index=index)


def _resumed(path: Path, questions: Sequence[Question]) -> dict[tuple[str, int], CollectedTrajectory]:
    """What the file already holds, by question and sample; a torn last line is cut off."""
    if not path.exists():
        return {}
    found = read_trajectories(path)
    known = {question.id: question for question in questions}
    for trajectory in found:
        if known.get(trajectory.question.id) != trajectory.question:
            raise ConfigError(
                f"{path} holds a trajectory of question {trajectory.question.id!r}, which is not among those of this "
                "collection. Resume with the same data, seed and collect.questions, or choose another --output."
            )
    write_rows(path, map(to_row, found))
    return {(trajectory.question.id, trajectory.sample): trajectory for trajectory in found}


def _search_questions(
    config: RunConfig,
    questions: Sequence[Question],
    keep: Callable[[CollectedTrajectory], None],
    progress: Progress,
    stack: ExitStack,
) -> None:
    """Each question is its own one query; without its question mark, as a policy would write it."""
    backend = real_search(config)
    if isinstance(backend, RemoteSearch):
        stack.callback(backend.close)
    limit = config.game.max_query_characters
    for start in range(0, len(questions), config.engine.slots):
        batch = questions[start : start + config.engine.slots]
        for question in batch:
            query = question.text.strip().rstrip("?").strip()[:limit]
            for sample in range(config.collect.samples):
                backend.submit(
                    SearchRequest(step=0, question=question, sample=sample, turn=0, query=query, noise_probability=0.0)
                )
        expected = len(batch) * config.collect.samples
        while expected:
            results = backend.poll()
            expected -= len(results)
            for result in results:
                keep(_without_policy(result))
            if not results:
                time.sleep(IDLE_SLEEP_S)
        progress(start + len(batch), len(questions))


def _play_policy(
    config: RunConfig,
    questions: Sequence[Question],
    keep: Callable[[CollectedTrajectory], None],
    progress: Progress,
    stack: ExitStack,
) -> None:
    """The policy plays as it does in training, the real search engine in the simulator's place."""
    playing = config.model_copy(
        update={
            "simulator": config.simulator.model_copy(
                update={"kind": config.collect.search, "documents": config.collect.documents, "adapter": ""}
            ),
            "train": config.train.model_copy(update={"group_size": config.collect.samples}),
            "eval": config.eval.model_copy(update={"data": ()}),
        }
    )
    device = use_device(playing)
    arena = build_arena(playing, load_policy(playing, device), device=device)
    stack.callback(arena.close)
    player = arena.training_player
    # Twice as many as the engine has places for: some are always ready when one ends.
    waiting = iter(questions)
    for question in islice(waiting, max(1, 2 * config.engine.slots // config.collect.samples)):
        player.submit(question, step=0, noise_probability=0.0)
    for number in range(len(questions)):
        group = _collect_one(player)
        for trajectory in group:
            keep(_with_policy(trajectory))
        progress(number + 1, len(questions))
        for question in islice(waiting, 1):
            player.submit(question, step=0, noise_probability=0.0)


def _collect_one(player: Player) -> tuple[Trajectory, ...]:
    (group,) = player.collect(1, may_all_fail=True)
    if all(t.num_searches and all(s.search is None or s.search.failed for s in t.turns) for t in group.trajectories):
        errors = {turn.search.error for t in group.trajectories for turn in t.turns if turn.search}
        raise SimulatorError(
            f"All searches of question {group.question.id!r} failed ({'; '.join(sorted(errors))[:400]}). Mend the "
            "search engine and go on with --resume."
        )
    return group.trajectories


def _with_policy(trajectory: Trajectory) -> CollectedTrajectory:
    searches = [(number, turn.search) for number, turn in enumerate(trajectory.turns) if turn.search is not None]
    return CollectedTrajectory(
        question=trajectory.question,
        sample=trajectory.sample,
        searches=tuple(_found(number, search) for number, search in searches if not search.failed),
        failed_searches=sum(search.failed for _, search in searches),
        answer=trajectory.answer,
        f1=trajectory.scores.f1,
        exact_match=trajectory.scores.exact_match,
        cover_match=trajectory.scores.cover_match,
        stop_reason=str(trajectory.stop_reason),
    )


def _without_policy(result: SearchResult) -> CollectedTrajectory:
    if result.failed:
        raise SimulatorError(
            f"The search for {result.request.query[:80]!r} failed: {result.error}. Mend the search engine and go on "
            "with --resume."
        )
    return CollectedTrajectory(
        question=result.request.question,
        sample=result.request.sample,
        searches=(_found(0, result),),
        failed_searches=0,
        answer=None,
        f1=None,
        exact_match=None,
        cover_match=None,
        stop_reason="question_searched",
    )


def _found(turn: int, result: SearchResult) -> FoundSearch:
    return FoundSearch(
        turn=turn,
        query=result.request.query,
        documents=result.documents,
        contains_answer=result.contains_answer,
    )

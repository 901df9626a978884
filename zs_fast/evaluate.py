"""Judge a policy: the same play as in training, every question, greedy unless told otherwise, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from zs_fast.config import RunConfig, write_config
from zs_fast.errors import ConfigError
from zs_fast.evaluation_folder import EvaluationFolder, Results
from zs_fast.ranks import check_recipe, hold_run_folder, play
from zs_fast.rollout.play import OnGroup, Player, Progress
from zs_fast.scoreboard import Evaluation, Result, averages, summarise, table
from zs_fast.search.by_set import QuestionSets, load_sets
from zs_fast.setup import Arena, build_arena, load_policy, planned_evaluations, simulator_name, use_device
from zs_fast.system.console import Screen, make_screen
from zs_fast.system.distributed import from_main, is_main, process_group, together
from zs_fast.system.environment import write_environment
from zs_fast.types import Group, Question, StopReason, Trajectory


def evaluate_run(config: RunConfig, *, resume: bool = False) -> dict[str, Any]:
    """Evaluate the policy `model.path` on each set of `eval.data`, by each of `eval.methods` and `eval.search`; what
    `zs-fast eval` does.

    Returns the summary and writes it to `<output>/evaluation.json`, as a table to `evaluation.md`, with every
    trajectory beside it in `trajectories_<set>_<name>.jsonl`. The default output is runs/<name>_eval. With `resume`
    the trajectories that are there already are kept.
    """
    if not config.eval.data:
        raise ConfigError(
            "eval.data is empty, so there are no questions to judge by. Give files: --eval.data FILE ..., or "
            "--eval.data quickstart:heldout."
        )
    output = config.output or Path("runs") / f"{config.name}_eval"
    if (output / "checkpoints").exists():
        raise ConfigError(
            f"{output} holds a training run, whose config.toml an evaluation would replace. Choose another --output."
        )
    sets = evaluation_sets(config)
    with process_group(config.model.device, timeout_s=config.train.rank_timeout_s), ExitStack() as stack:
        check_recipe(config)
        hold_run_folder(output, stack)
        with together():
            folder = EvaluationFolder(output, config, sets, resume=resume) if is_main() else None
            found = folder.finished() if folder is not None else {}
        results = _shared(found)
        if folder is not None:
            stack.callback(folder.close)
        screen = stack.enter_context(closing(make_screen(0, config.name))) if is_main() else None
        if screen is not None and (kept := sum(map(len, results.values()))):
            screen.note(f"{kept} trajectories are there already")
        with together():
            device = use_device(config)
            policy = load_policy(config, device)
            arena = build_arena(config, policy, device=device, training=False, eval_sets=sets)
            stack.callback(arena.close)
            if folder is not None:
                folder.begin()
                write_config(config, output / "config.toml")
                write_environment(output, device)
        _play_missing(arena, sets, results, folder, screen)
        summary = _summary(config, sets, results)
        if "simulator" in {search for _, search in planned_evaluations(config.eval).values()}:
            summary["simulator"] = simulator_name(config, training=False, policy=policy)
        if folder is not None and screen is not None:
            summary["settings"]["fingerprint"] = folder.fingerprint
            page = _page(config, summary, sets, results)
            folder.write(summary, page)
            for line in page:
                screen.note(line)
    return summary


def evaluation_sets(config: RunConfig) -> dict[str, list[Question]]:
    """The sets of `eval.data`: of each the first `eval.questions` in seeded order, all when that is 0."""
    return load_sets(config.eval.data, first=config.eval.questions, seed=config.seed)


def evaluate(
    player: Player,
    questions: Sequence[Question],
    *,
    step: int,
    on_progress: Progress | None = None,
    on_group: OnGroup | None = None,
) -> tuple[Evaluation, list[Trajectory]]:
    """Play every question once with `player` (whose group size is 1) and no noise."""
    groups = play(player, questions, step=step, noise=0.0, on_progress=on_progress, on_group=on_group)
    trajectories = [group.trajectories[0] for group in groups]
    return summarise([Result.of(trajectory) for trajectory in trajectories]), trajectories


def _shared(found: Results) -> Results:
    """What the main process found finished, on every process."""
    plain = {name: {id_: asdict(result) for id_, result in of.items()} for name, of in found.items()}
    return {name: {id_: Result(**result) for id_, result in of.items()} for name, of in from_main(plain).items()}


def _play_missing(
    arena: Arena, sets: QuestionSets, results: Results, folder: EvaluationFolder | None, screen: Screen | None
) -> None:
    """Play what has no result yet; `results` and the folder get each trajectory as it is finished."""
    for name, player in arena.evaluation_players.items():
        finished = results[name]
        missing = [question for of_set in sets.values() for question in of_set if question.id not in finished]
        num_kept = len(finished)

        def keep(group: Group, name: str = name, finished: dict[str, Result] = finished) -> None:
            trajectory = group.trajectories[0]
            finished[trajectory.question.id] = Result.of(trajectory)
            if folder is not None:
                folder.append(name, trajectory, arena.codec.decode)

        def progress(done: int, total: int, name: str = name, num_kept: int = num_kept) -> None:
            if screen is not None:
                screen.progress(f"evaluation, {name}", num_kept + done, num_kept + total)

        if missing:
            play(player, missing, step=0, noise=0.0, on_progress=progress, on_group=keep)
        if screen is not None:
            screen.note(summarise(_in_order(sets, finished)).line(name))


def _in_order(sets: QuestionSets, finished: dict[str, Result]) -> list[Result]:
    return [finished[question.id] for questions in sets.values() for question in questions]


def _summary(config: RunConfig, sets: QuestionSets, results: Results) -> dict[str, Any]:
    by_set = {
        set_name: {name: [finished[q.id] for q in questions] for name, finished in results.items()}
        for set_name, questions in sets.items()
    }
    return {
        "model": config.model.path,
        "data": list(config.eval.data),
        "temperature": config.eval.temperature,
        "seed": config.seed,
        "num_questions": {name: len(questions) for name, questions in sets.items()},
        "settings": {
            "decoding": decoding(config),
            "methods": list(config.eval.methods),
            "search": list(config.eval.search),
            "corpus": config.eval.corpus or config.simulator.corpus,
            "documents": config.simulator.documents,
            "first_questions": config.eval.questions,
        }
        | config.game.model_dump(),
        "results": {name: asdict(summarise(_in_order(sets, finished))) for name, finished in results.items()},
        "sets": {
            set_name: {name: asdict(summarise(of)) for name, of in by_name.items()}
            for set_name, by_name in by_set.items()
        },
        "average_of_sets": {
            name: {
                measure: asdict(interval)
                for measure, interval in averages([by_name[name] for by_name in by_set.values()]).items()
            }
            for name in results
        },
    }


def decoding(config: RunConfig) -> str:
    """How the policy's tokens are chosen in an evaluation, in words."""
    if config.eval.temperature == 0:
        return "greedy"
    return f"sampled at temperature {config.eval.temperature:g}, seed {config.seed}"


def _page(config: RunConfig, summary: dict[str, Any], sets: QuestionSets, results: Results) -> list[str]:
    """The summary to read: what was played and how, then a table for each evaluation."""
    settings = summary["settings"]
    rows = f"the first {config.eval.questions} of each set" if config.eval.questions else "all rows"
    total = sum(map(len, sets.values()))
    lines = [
        f"# Evaluation of {config.model.path}",
        "",
        f"{decoding(config).capitalize()}; {total} questions ({rows}); at most {config.game.max_turns} completions "
        f"(so {config.game.max_turns - 1} searches) of {config.game.max_new_tokens} tokens, {settings['documents']} "
        f"documents a search, {config.game.max_observation_tokens} tokens of them; settings {settings['fingerprint']}. "
        "Means with 95 % bootstrap intervals.",
    ]
    for name, finished in results.items():
        by_set = {set_name: [finished[q.id] for q in questions] for set_name, questions in sets.items()}
        lines += ["", f"## {name}", "", *table(by_set)]
        if failed := sum(r.stop_reason == StopReason.SEARCH_FAILED for of in by_set.values() for r in of):
            lines += ["", f"{failed} trajectories were ended by a failed search, and count with 0."]
    return lines

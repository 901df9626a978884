"""Where a run's numbers go: files first, then screen, TensorBoard and W&B.

metrics.jsonl    only values that are a function of config and seed: two runs of the same give the same bytes
timings.jsonl    clocks, rates and memory of the same steps
rollouts.jsonl   trajectories to read
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zs_fast.config import LogConfig
from zs_fast.system.console import Screen, make_screen
from zs_fast.system.files import FileOperations
from zs_fast.system.jsonl import JsonlWriter, cut_back, number, read_rows
from zs_fast.system.sinks import Sink, make_sinks
from zs_fast.system.token_text import token_lengths
from zs_fast.types import Action, Answer, Group, Search, SearchResult, Trajectory, Turn

FILES = ("metrics.jsonl", "timings.jsonl", "rollouts.jsonl")
Decode = Callable[[Sequence[int]], str]


class RunLog:
    """Everything a run writes about itself, step by step. Used as a context manager, or closed.

    Rows carry `step`, the number of finished steps: 1 after the first, 0 for what was measured before it.

    `decode` turns token ids into text, for rollouts.jsonl. `total_steps` sets the progress bar. `config` is shown to
    W&B. Opens nothing but the files unless `log` asks; raises PreflightError when a sink that was asked for is missing.
    """

    def __init__(
        self,
        folder: Path,
        log: LogConfig,
        *,
        decode: Decode,
        total_steps: int = 0,
        name: str = "run",
        config: Mapping[str, Any] | None = None,
        screen: Screen | None = None,
        files: FileOperations | None = None,
    ) -> None:
        self.folder = Path(folder)
        self._log = log
        self._decode = decode
        self._files = files or FileOperations()
        self._writers: dict[str, JsonlWriter] = {}
        self._screen = screen if screen is not None else make_screen(total_steps, name)
        self._sinks: list[Sink] = make_sinks(self.folder, log, name=name, config=config or {})
        self._open()

    def step(
        self,
        step: int,
        metrics: Mapping[str, float],
        timings: Mapping[str, float],
        groups: Sequence[Group] = (),
    ) -> None:
        """Record a finished training step. Raises CheckpointError when a file can't be written."""
        self._append(step, metrics, timings)
        for trajectory in choose_rollouts(groups, self._log.rollouts_per_step):
            self._writers["rollouts.jsonl"].append(rollout_row(step, trajectory, self._decode))
        self._screen.step(step, metrics, timings)

    def record(
        self, step: int, metrics: Mapping[str, float], timings: Mapping[str, float] | None = None, *, message: str = ""
    ) -> None:
        """Record numbers beside the steps, such as an evaluation after `step` finished steps.

        To be kept on resume, record what belongs to a step before the checkpoint of that step is saved. `message` is
        what the screen shows in place of the numbers.
        """
        self._append(step, metrics, timings or {})
        shown = message or "  ".join(f"{key} {value:.4g}" for key, value in metrics.items())
        self._screen.note(f"after step {step}: {shown}")

    def note(self, message: str) -> None:
        """One line for a person; goes to the screen only."""
        self._screen.note(message)

    def progress(self, label: str, done: int, total: int) -> None:
        """How far the current step's phase is; shown on a terminal only."""
        self._screen.progress(label, done, total)

    def truncate(self, step: int) -> list[str]:
        """Cut the files back to the first `step` steps, before a resume. Sentences about what could not be kept.

        `truncate(-1)` empties the files, for a start over. Each file is replaced atomically, so a crash in here only
        means that the next resume cuts again.
        """
        self._close_writers()
        for name in FILES:
            cut_back(self.folder / name, step, files=self._files)
        recorded = {row["step"] for row in read_rows(self.folder / "metrics.jsonl")}
        missing = [index for index in range(1, step + 1) if index not in recorded]
        self._open()
        for sink in self._sinks:
            sink.truncate(step)
        self._screen.truncate(step)
        if not missing:
            return []
        return [f"{self.folder / 'metrics.jsonl'} has no row for {len(missing)} of {step} steps, first {missing[0]}"]

    def sync(self) -> None:
        """All rows so far survive a power cut; call it before a checkpoint is saved."""
        for writer in self._writers.values():
            writer.sync()

    def close(self) -> None:
        self._screen.close()
        self._close_writers()
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open(self) -> None:
        self._writers = {name: JsonlWriter(self.folder / name, files=self._files) for name in FILES}

    def _close_writers(self) -> None:
        for writer in self._writers.values():
            writer.close()

    def _append(self, step: int, metrics: Mapping[str, float], timings: Mapping[str, float]) -> None:
        for name, values in (("metrics.jsonl", metrics), ("timings.jsonl", timings)):
            if values:
                row = {"step": step} | {key: number(value) for key, value in values.items()}
                self._writers[name].append(row)
        for sink in self._sinks:
            sink.write(step, metrics, timings)


class SilentLog(RunLog):
    """The log of a process that writes nothing, because another one writes for all."""

    def __init__(self) -> None:
        pass

    def step(self, *arguments: Any, **named: Any) -> None:
        pass

    def record(self, *arguments: Any, **named: Any) -> None:
        pass

    def note(self, message: str) -> None:
        pass

    def progress(self, label: str, done: int, total: int) -> None:
        pass

    def truncate(self, step: int) -> list[str]:
        return []

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


def choose_rollouts(groups: Sequence[Group], count: int) -> list[Trajectory]:
    """The first `count` trajectories, taking one of each question before a second of any."""
    most = max((len(group.trajectories) for group in groups), default=0)
    in_turn = [
        group.trajectories[sample] for sample in range(most) for group in groups if sample < len(group.trajectories)
    ]
    return in_turn[:count]


def rollout_row(step: int, trajectory: Trajectory, decode: Decode) -> dict[str, Any]:
    """A trajectory as plain JSON, in words: what was asked, written, searched, found and scored.

    `token_lengths` of a turn and of its observation say which characters each token wrote (system/token_text.py), for
    a reader of the loss mask.
    """
    question = trajectory.question
    return {
        "step": step,
        "question_id": question.id,
        "source": question.source,
        "question": question.text,
        "answers": list(question.answers),
        "sample": trajectory.sample,
        "answer": trajectory.answer,
        "reward": number(trajectory.reward),
        "f1": number(trajectory.scores.f1),
        "exact_match": number(trajectory.scores.exact_match),
        "cover_match": number(trajectory.scores.cover_match),
        "stop_reason": str(trajectory.stop_reason),
        "trainable": trajectory.trainable,
        "prompt": decode(trajectory.prompt_ids),
        "prompt_tokens": len(trajectory.prompt_ids),
        **({} if trajectory.opening is None else {"opening": _search_row(trajectory.opening)}),
        "turns": [_turn_row(turn, decode) for turn in trajectory.turns],
    }


def _turn_row(turn: Turn, decode: Decode) -> dict[str, Any]:
    text = decode(turn.completion.token_ids)
    return {
        "text": text,
        "tokens": len(turn.completion.token_ids),
        "token_lengths": token_lengths(turn.completion.token_ids, text, decode),
        "finish_reason": str(turn.completion.finish_reason),
        "policy_version": turn.completion.policy_version,
        "action": _action_row(turn.action),
        "observation": turn.observation,
        "observation_token_lengths": token_lengths(turn.observation_ids, turn.observation, decode),
        "search": None if turn.search is None else _search_row(turn.search),
    }


def _search_row(search: SearchResult) -> dict[str, Any]:
    return {
        "query": search.request.query,
        "mode": str(search.mode),
        "noise_probability": number(search.request.noise_probability),
        "documents": list(search.documents),
        "contains_answer": search.contains_answer,
        "malformed": search.malformed,
        "failed": search.failed,
        "error": search.error,
    }


def _action_row(action: Action) -> dict[str, str]:
    if isinstance(action, Search):
        return {"kind": "search", "text": action.query}
    if isinstance(action, Answer):
        return {"kind": "answer", "text": action.text}
    return {"kind": "invalid", "text": action.reason}

"""The folder of an evaluation: finished trajectories are appended as they come, so that a killed one goes on.

settings.json                  what the results depend on; a resume with anything else is refused
trajectories_<set>_<name>.jsonl   a row per finished trajectory, in words
evaluation.json, evaluation.md    the result, once all rows are there
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from zs_fast import __version__
from zs_fast.config import RunConfig
from zs_fast.errors import CheckpointUnusableError, ConfigError
from zs_fast.models.load import resolve_path
from zs_fast.scoreboard import Result
from zs_fast.search.by_set import QuestionSets
from zs_fast.setup import planned_evaluations
from zs_fast.system.files import FileOperations, files_digest, replace_file
from zs_fast.system.jsonl import JsonlWriter, encode_row, read_rows
from zs_fast.system.metrics import Decode, rollout_row
from zs_fast.types import StopReason, Trajectory

RESULTS_DEPEND_ON = ("model", "simulator", "bm25", "retriever", "game", "eval", "seed")
"""Parts of a recipe that a trajectory of an evaluation depends on. Of the engine it is the kind."""

Results = dict[str, dict[str, Result]]
"""Name of an evaluation -> question id -> what came of it."""


class EvaluationFolder:
    """What lies in an evaluation's folder, and what of it may be kept. Only the main process makes one.

    Raises ConfigError where the folder holds an evaluation and `resume` is not asked for, or one of other settings.
    """

    def __init__(self, folder: Path, config: RunConfig, sets: QuestionSets, *, resume: bool) -> None:
        self._folder = folder
        self._names = tuple(planned_evaluations(config.eval))
        self._set_of = {question.id: name for name, questions in sets.items() for question in questions}
        self._writers: dict[tuple[str, str], JsonlWriter] = {}
        self.settings = settings_of(config, sets)
        self._check(resume=resume)

    def begin(self) -> None:
        """Say what the trajectories that follow are of."""
        settings = json.dumps(self.settings, indent=2).encode() + b"\n"
        replace_file(FileOperations(), self._folder / "settings.json", settings)

    @property
    def fingerprint(self) -> str:
        """The settings in 16 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]

    def finished(self) -> Results:
        """The results that are there already. Half a last row is cut off, and trajectories that a failed search ended
        are taken out: they are played again."""
        results: Results = {name: {} for name in self._names}
        for name in self._names:
            for set_name in dict.fromkeys(self._set_of.values()):
                path = self._path(set_name, name)
                if not path.is_file():
                    continue
                try:
                    kept = [row for row in read_rows(path) if row["stop_reason"] != StopReason.SEARCH_FAILED]
                    results[name] |= {row["question_id"]: _result(row) for row in kept}
                except (KeyError, TypeError, ValueError) as error:
                    raise CheckpointUnusableError(
                        f"{path} has a row that is no trajectory of an evaluation ({type(error).__name__}: {error}). "
                        "Remove the file to play its questions again."
                    ) from error
                content = b"".join(map(encode_row, kept))
                if content != path.read_bytes():
                    replace_file(FileOperations(), path, content)
        return results

    def append(self, name: str, trajectory: Trajectory, decode: Decode) -> None:
        """Keep a finished trajectory of the evaluation `name`."""
        set_name = self._set_of[trajectory.question.id]
        if (set_name, name) not in self._writers:
            self._writers[set_name, name] = JsonlWriter(self._path(set_name, name))
        row = {"evaluation": name, "set": set_name} | rollout_row(0, trajectory, decode)
        self._writers[set_name, name].append(row | {"searches": trajectory.num_searches})

    def write(self, summary: Mapping[str, Any], page: Sequence[str]) -> None:
        """The result, as JSON and as a page to read; only now does the folder count as finished."""
        for writer in self._writers.values():
            writer.sync()
        page_bytes = "".join(f"{line}\n" for line in page).encode()
        replace_file(FileOperations(), self._folder / "evaluation.md", page_bytes)
        replace_file(FileOperations(), self._folder / "evaluation.json", json.dumps(summary, indent=2).encode() + b"\n")

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()

    def _path(self, set_name: str, name: str) -> Path:
        return self._folder / f"trajectories_{set_name}_{name}.jsonl"

    def _check(self, *, resume: bool) -> None:
        path = self._folder / "settings.json"
        is_there = path.exists()
        if (is_there or (self._folder / "evaluation.json").exists()) and not resume:
            raise ConfigError(
                f"{self._folder} already holds an evaluation. Add --resume to keep what is finished and play the rest, "
                "choose another --output, or remove the folder."
            )
        if not is_there and any(self._folder.glob("trajectories_*.jsonl")):
            raise ConfigError(
                f"{self._folder} holds trajectories, but no settings.json that says what they are of. Choose another "
                "--output."
            )
        if not is_there:
            return
        try:
            before = dict(_flat(json.loads(path.read_bytes())))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} can't be read ({error}). Choose another --output.") from error
        now = dict(_flat(self.settings))
        changed = [
            f"{key}: was {before.get(key, '(absent)')!r}, is {now.get(key, '(absent)')!r}"
            for key in sorted(before.keys() | now.keys())
            if key not in before or key not in now or before[key] != now[key]
        ]
        if changed:
            raise ConfigError(
                f"The evaluation in {self._folder} was made with other settings, so its trajectories can't be kept:\n  "
                + "\n  ".join(changed)
                + "\nGo on with those settings, or choose another --output."
            )


def settings_of(config: RunConfig, sets: QuestionSets) -> dict[str, Any]:
    """What the results depend on, as plain JSON: recipe, questions, and the files of models and passages."""
    recipe = config.model_dump(mode="json", include=set(RESULTS_DEPEND_ON))
    searches = {search for _, search in planned_evaluations(config.eval).values()}
    files = {config.model.path: files_digest(resolve_path(config.model.path))}
    if "simulator" in searches and config.simulator.kind == "model":
        files[config.simulator.path] = files_digest(resolve_path(config.simulator.path))
    if searches - {"none"}:
        corpora = {(config.eval.corpus or config.simulator.corpus).replace("{set}", name) for name in sets}
        for corpus in sorted(corpora):
            path = Path(os.path.expanduser(corpus))
            files |= {corpus: files_digest(path)} if path.is_file() else {}
    return {
        "version": __version__,
        "recipe": recipe | {"engine.kind": config.engine.kind},
        "questions": {name: _questions_digest(sets, name) for name in sets},
        "files": files,
    }


def _questions_digest(sets: QuestionSets, name: str) -> str:
    questions = json.dumps([asdict(question) for question in sets[name]], sort_keys=True)
    return f"{len(sets[name])} of {hashlib.sha256(questions.encode()).hexdigest()[:16]}"


def _result(row: Mapping[str, Any]) -> Result:
    return Result(
        source=row["source"],
        f1=float(row["f1"]),
        exact_match=float(row["exact_match"]),
        cover_match=float(row["cover_match"]),
        num_searches=row["searches"],
        stop_reason=row["stop_reason"],
    )


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value

"""What is written between the steps of making a simulator: trajectories, and searches to learn from or repeat."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from zs_fast.errors import DataError
from zs_fast.system.files import FileOperations, replace_file
from zs_fast.system.jsonl import encode_row, read_rows
from zs_fast.types import Question, SearchMode, SearchRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundSearch:
    """One search of a trajectory and what the real search engine found, best first."""

    turn: int
    query: str
    documents: tuple[str, ...]
    contains_answer: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectedTrajectory:
    """A question, all that was searched for it, and how it ended. One line of `trajectories.jsonl`."""

    question: Question
    sample: int
    searches: tuple[FoundSearch, ...]
    """Those that found something; a failed search is counted in `failed_searches` alone."""
    failed_searches: int
    answer: str | None
    f1: float | None
    """None, like the other two, where no policy played."""
    exact_match: float | None
    cover_match: float | None
    stop_reason: str
    """A StopReason, or `question_searched` where no policy played."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledSearch:
    """A query with documents that a simulator should write for it. With mode REAL: what was really found."""

    question: Question
    query: str
    mode: SearchMode
    documents: tuple[str, ...]

    def request(self) -> SearchRequest:
        """The search as a backend takes it."""
        noise = 1.0 if self.mode is SearchMode.NOISY else 0.0
        return SearchRequest(
            step=0, question=self.question, sample=0, turn=0, query=self.query, noise_probability=noise
        )


def to_row(record: CollectedTrajectory | LabelledSearch) -> dict[str, Any]:
    """Plain JSON, the question's fields beside the others."""
    row = asdict(record)
    question = row.pop("question")
    return {
        "question_id": question["id"],
        "question": question["text"],
        "answers": question["answers"],
        "source": question["source"],
    } | row


def read_trajectories(path: Path) -> list[CollectedTrajectory]:
    """The whole rows of a file of `zs-fast collect`; a torn last one is left out. Raises DataError."""
    return [_trajectory(row, f"{path}, line {number}") for number, row in _rows(path, "zs-fast collect")]


def read_searches(path: Path) -> list[LabelledSearch]:
    """The rows of a file of searches of `zs-fast label`. Raises DataError."""
    return [_search(row, f"{path}, line {number}") for number, row in _rows(path, "zs-fast label")]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """The file holds these rows, or after a crash what it held before."""
    replace_file(FileOperations(), path, b"".join(encode_row(row) for row in rows))


def write_json(path: Path, value: object) -> None:
    replace_file(FileOperations(), path, json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")


def _rows(path: Path, writer: str) -> Iterable[tuple[int, dict[str, Any]]]:
    if not path.is_file():
        raise DataError(f"{path}: no such file. `{writer}` writes it.")
    return enumerate(read_rows(path), start=1)


def _question(row: Mapping[str, Any]) -> Question:
    return Question(id=row["question_id"], text=row["question"], answers=tuple(row["answers"]), source=row["source"])


def _trajectory(row: dict[str, Any], where: str) -> CollectedTrajectory:
    try:
        return CollectedTrajectory(
            question=_question(row),
            sample=row["sample"],
            searches=tuple(
                FoundSearch(**found | {"documents": tuple(found["documents"])}) for found in row["searches"]
            ),
            failed_searches=row["failed_searches"],
            answer=row["answer"],
            f1=row["f1"],
            exact_match=row["exact_match"],
            cover_match=row["cover_match"],
            stop_reason=row["stop_reason"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where}: not a trajectory of `zs-fast collect` ({type(error).__name__}: {error})") from error


def _search(row: dict[str, Any], where: str) -> LabelledSearch:
    try:
        return LabelledSearch(
            question=_question(row),
            query=row["query"],
            mode=SearchMode(row["mode"]),
            documents=_texts(row["documents"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where}: not a search of `zs-fast label` ({type(error).__name__}: {error})") from error


def _texts(value: Sequence[str]) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise TypeError("documents must be a list of strings")
    return tuple(value)

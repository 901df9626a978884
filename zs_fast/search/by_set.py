"""Sets of questions that are judged together, each under a name, and a search that has its own passages for each."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

from zs_fast.errors import ConfigError, DataError
from zs_fast.search.backends import SearchBackend
from zs_fast.search.data import QuestionOrder, load_questions
from zs_fast.types import Completion, Question, SearchRequest, SearchResult

QuestionSets = Mapping[str, Sequence[Question]]
"""Name of a set -> its questions, in the order in which they are played."""


def set_name(spec: str) -> str:
    """The name of the set that a data spec means: `qa/nq.test.jsonl.gz` -> `nq`, `quickstart:heldout` -> `heldout`.

    A file's name up to its first dot, or the last part of a folder or hub id; letters, digits, `_` and `-` only.
    """
    if spec.startswith("quickstart:"):
        return spec.partition(":")[2]
    last = os.path.basename(spec.rstrip("/"))
    stem = last.partition(".")[0] if os.path.isfile(os.path.expanduser(spec)) else last
    return re.sub(r"[^\w-]", "_", stem) or "set"


def load_sets(specs: Sequence[str], *, first: int, seed: int) -> dict[str, list[Question]]:
    """The questions of each spec in seeded order, or the `first` n of them (0: all).

    Raises ConfigError for two sets of one name, and DataError for a question id that two sets share.
    """
    sets: dict[str, list[Question]] = {}
    found: dict[str, str] = {}
    for spec in specs:
        name = set_name(spec)
        if name in sets:
            raise ConfigError(
                f"eval.data names two sets that are called {name!r}, the second by {spec!r}. Rename a file, or "
                "evaluate them one after the other."
            )
        questions = load_questions(spec)
        sets[name] = QuestionOrder(questions, seed).batch(0, min(first or len(questions), len(questions)))
        for question in sets[name]:
            if question.id in found:
                raise DataError(
                    f"The question id {question.id!r} is in two sets of eval.data, {found[question.id]} and {name}. "
                    "Evaluate them one after the other, or give each its own data_source."
                )
            found[question.id] = name
    return sets


class SearchBySet:
    """A search backend that hands each search to the backend of its question's set."""

    def __init__(self, backends: Mapping[str, SearchBackend], sets: QuestionSets) -> None:
        self._backends = dict(backends)
        self._set_of = {question.id: name for name, questions in sets.items() for question in questions}

    def submit(self, request: SearchRequest) -> None:
        self._backends[self._set_of[request.question.id]].submit(request)

    def deliver(self, completion: Completion) -> None:
        raise AssertionError(f"passages ask no model, yet a completion of role {completion.role} came back")

    def cancel(self) -> None:
        for backend in self._backends.values():
            backend.cancel()

    def recall(self, results: Sequence[SearchResult]) -> None:
        for backend in self._backends.values():
            backend.recall(results)

    def poll(self) -> list[SearchResult]:
        return [result for backend in self._backends.values() for result in backend.poll()]

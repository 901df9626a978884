"""Rollouts for the page's reader: a stated, seeded sample of rollouts.jsonl, without what the page can do without."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zs_fast.errors import DataError
from zs_fast.report.run_data import RunData, note_torn, rows_of

MOST_ROLLOUTS = 2000
"""Rollouts on a page that was asked for no other number."""
MOST_BYTES = 12_000_000
"""Bytes of rollouts.jsonl that are taken into such a page, all runs together."""


@dataclass(slots=True)
class Reader:
    """What the page's rollout reader gets: plain JSON. `prompts` holds (text before, text after the question)."""

    rollouts: list[dict[str, Any]] = field(default_factory=list)
    prompts: list[tuple[str, str]] = field(default_factory=list)
    num_recorded: int = 0
    notes: list[str] = field(default_factory=list)
    """Where the page shows a sample: how it was drawn."""
    _places: dict[tuple[str, str], int] = field(default_factory=dict)

    def add(self, run: RunData, place: int, *, most: int, most_bytes: int | None) -> None:
        """The rollouts of `run`, number `place` of the page: all of them, or a sample of at most `most`."""
        path = run.folder / "rollouts.jsonl"
        if not path.is_file():
            return
        count = sum(1 for _ in rows_of(path))
        shown = min(count, most)
        size = path.stat().st_size
        if most_bytes is not None and size > most_bytes:
            shown = min(shown, max(1, count * most_bytes // size))
        chosen = sample_indices(count, shown)
        torn: list[str] = []
        note_torn(path, torn)
        self.notes += [f"{run.label}: {note}" for note in torn]
        self.num_recorded += count
        if shown < count:
            self.notes.append(
                f"{run.label}: {shown} of {count} rollouts are here, drawn with a fixed seed, one from each of {shown} "
                "equal stretches of rollouts.jsonl. zs-fast report --rollouts N takes N, and 0 all of them."
            )
        wanted = set(chosen)
        for index, row in enumerate(rows_of(path)):
            if index in wanted:
                try:
                    self.rollouts.append(self._compact(run, place, row))
                except (KeyError, TypeError, ValueError) as error:
                    raise DataError(
                        f"{path}, row {index + 1}, is no rollout: {type(error).__name__} at {error}"
                    ) from error

    def _compact(self, run: RunData, place: int, row: Mapping[str, Any]) -> dict[str, Any]:
        """One row. Raises KeyError, TypeError or ValueError for what is none."""
        question, prompt = _text(row["question"]), _text(row.get("prompt", ""))
        before, found, after = prompt.rpartition(question) if question else (prompt, "", "")
        parts = (before, after) if found else (prompt, "")
        stop_reason = _text(row.get("stop_reason", ""))
        in_loss = bool(row.get("trainable", True)) and stop_reason not in _list(
            run.settings.get("algorithm.mask_stop_reasons", [])
        )
        return {
            "run": place,
            "step": row["step"],
            "sample": row.get("sample"),
            "id": _text(row.get("question_id", "")),
            "source": _text(row.get("source", "")),
            "question": question,
            "answers": [_text(answer) for answer in _list(row.get("answers", []))],
            "answer": None if row.get("answer") is None else _text(row["answer"]),
            "reward": _score(row.get("reward", row.get("f1"))),
            "f1": _score(row.get("f1")),
            "exact_match": _score(row.get("exact_match")),
            "stop": stop_reason,
            "in_loss": in_loss,
            "documents_in_loss": in_loss and run.settings.get("algorithm.mask_documents", True) is False,
            "prompt": self._place_of(parts),
            "prompt_has_question": bool(found),
            "prompt_tokens": row.get("prompt_tokens"),
            "turns": [_turn(turn) for turn in _list(row["turns"])],
        }

    def _place_of(self, prompt: tuple[str, str]) -> int:
        if prompt not in self._places:
            self._places[prompt] = len(self.prompts)
            self.prompts.append(prompt)
        return self._places[prompt]


def read_rollouts(runs: list[RunData], most: int | None) -> Reader:
    """The rollouts of all runs. most: of all runs together; 0 for every one, None for MOST_ROLLOUTS and MOST_BYTES.

    Raises DataError for a row that is no rollout.
    """
    reader = Reader()
    share = (MOST_ROLLOUTS if most is None else most) // len(runs)
    for place, run in enumerate(runs):
        if not (run.folder / "rollouts.jsonl").is_file():
            reader.notes.append(f"{run.label}: rollouts.jsonl is missing.")
        reader.add(
            run,
            place,
            most=max(1, share) if most != 0 else 2**62,
            most_bytes=MOST_BYTES // len(runs) if most is None else None,
        )
    return reader


def sample_indices(count: int, shown: int) -> list[int]:
    """`shown` of range(count), rising: one, drawn with a fixed seed, from each of `shown` stretches of equal length."""
    if shown >= count:
        return list(range(count))
    draws = random.Random("zs_fast report")
    edges = [count * place // shown for place in range(shown + 1)]
    return [draws.randrange(low, high) for low, high in itertools.pairwise(edges)]


def _turn(turn: Any) -> dict[str, Any]:
    turn = _object(turn)
    search = None if turn.get("search") is None else _object(turn["search"])
    action = _object(turn.get("action") or {})
    compact: dict[str, Any] = {
        "text": _text(turn["text"]),
        "tokens": turn.get("tokens"),
        "lengths": _text(turn.get("token_lengths", "")),
        "action": _text(action.get("kind", "")),
        "observation": _text(turn.get("observation", "")),
        "observation_lengths": _text(turn.get("observation_token_lengths", "")),
        "finish": _text(turn.get("finish_reason", "")),
        "search": None,
    }
    if action.get("kind") == "invalid":
        compact["reason"] = _text(action.get("text", ""))
    if search is not None:
        compact["search"] = {
            "mode": _text(search.get("mode", "")),
            "hit": bool(search.get("contains_answer", False)),
            "malformed": bool(search.get("malformed", False)),
            "error": _text(search.get("error", "")) or ("failed" if search.get("failed") else ""),
        }
    return compact


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:60]!r}, which is no text")
    return value


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{str(value)[:60]!r}, which is no object")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{str(value)[:60]!r}, which is no list")
    return value


def _score(value: Any) -> float | None:
    """None for a missing one and for what is not finite."""
    if value is None:
        return None
    number = float(value)
    return number if abs(number) < float("inf") else None

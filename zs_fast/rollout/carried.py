"""Turns of unfinished trajectories as plain JSON, and the episode that plays them again, for the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zs_fast.search.environment import Episode
from zs_fast.types import Completion, FinishReason, Role, SearchMode, SearchResult, Turn


def turn_state(turn: Turn) -> dict[str, Any]:
    """What was sampled and found; all else of a turn follows from that."""
    completion, search = turn.completion, turn.search
    return {
        "token_ids": list(completion.token_ids),
        "logprobs": list(completion.logprobs),
        "finish_reason": str(completion.finish_reason),
        "policy_version": completion.policy_version,
        "search": None if search is None else _search_state(search),
    }


def replay(episode: Episode, turns: Sequence[Mapping[str, Any]]) -> None:
    """Bring a new episode to where it was when `turn_state` wrote these turns.

    Raises KeyError, TypeError, ValueError or EngineError for what `turn_state` never writes, or wrote of another one.
    """
    for state in turns:
        if episode.done or episode.pending is not None:
            raise ValueError(f"a turn follows turn {episode.turn}, which no turn can follow")
        request = episode.on_completion(
            Completion(
                request_id=0,
                role=Role.POLICY,
                token_ids=tuple(state["token_ids"]),
                logprobs=tuple(state["logprobs"]),
                finish_reason=FinishReason(state["finish_reason"]),
                policy_version=state["policy_version"],
            )
        )
        found = state["search"]
        if found is not None:
            if request is None:
                raise ValueError("a turn that does not search has documents")
            episode.on_search_result(
                SearchResult(
                    request=request,
                    **found | {"documents": tuple(found["documents"]), "mode": SearchMode(found["mode"])},
                )
            )


def _search_state(search: SearchResult) -> dict[str, Any]:
    return {
        "documents": list(search.documents),
        "mode": str(search.mode),
        "contains_answer": search.contains_answer,
        "malformed": search.malformed,
        "failed": search.failed,
        "error": search.error,
        "num_generated_tokens": search.num_generated_tokens,
        "num_samples": search.num_samples,
        "shared": search.shared,
    }

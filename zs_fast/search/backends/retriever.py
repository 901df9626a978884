"""The protocols of two retrieval servers: Search-R1's /retrieve, which verl and others speak, and ZeroSearch's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

from zs_fast.search.backends.passages import document, split_contents
from zs_fast.search.backends.transport import Call

Documents = tuple[str, ...]
T = TypeVar("T")


class Dialect(Protocol):
    """How one kind of server is asked, and how its replies read."""

    default_url: str
    default_key_env: str
    key_parameter: str
    """Name of the query-string parameter that holds the key; empty: an Authorization header does."""
    takes_batches: bool
    has_free_probe: bool
    """May a search be sent at the start, only to see whether the server is there?"""

    def call(self, queries: Sequence[str], k: int) -> Call: ...

    def documents(self, reply: object, num_queries: int) -> list[Documents]:
        """The documents of each query. Raises ValueError, which says what is wrong, for a reply of another shape."""
        ...


class SearchR1:
    """POST {queries, topk, return_scores} -> {result: [[{document: {contents}, score}, ...], ...]}."""

    default_url = "http://127.0.0.1:8000/retrieve"
    default_key_env = ""
    key_parameter = ""
    takes_batches = True
    has_free_probe = True

    def call(self, queries: Sequence[str], k: int) -> Call:
        return Call(method="POST", json={"queries": list(queries), "topk": k, "return_scores": True})

    def documents(self, reply: object, num_queries: int) -> list[Documents]:
        results = _field(reply, "result", list)
        if len(results) != num_queries:
            raise ValueError(f"'result' has {len(results)} lists for {num_queries} queries")
        return [tuple(_passage(item) for item in _checked(result, list, "a result")) for result in results]


class ZeroSearchWiki:
    """POST {query, top_k} -> [{text}, ...]."""

    default_url = "http://127.0.0.1:6002/retrieve"
    default_key_env = ""
    key_parameter = ""
    takes_batches = False
    has_free_probe = True

    def call(self, queries: Sequence[str], k: int) -> Call:
        (query,) = queries
        return Call(method="POST", json={"query": query, "top_k": k})

    def documents(self, reply: object, num_queries: int) -> list[Documents]:
        return [tuple(_field(item, "text", str) for item in _checked(reply, list, "the reply"))]


def _passage(item: object) -> str:
    """The document of one item: with its score beside it, or alone; contents, or title and text."""
    found = item["document"] if isinstance(item, Mapping) and "document" in item else item
    if isinstance(found, str):
        return document(*split_contents(found))
    if isinstance(found, Mapping) and "contents" not in found and isinstance(found.get("text"), str):
        title = found.get("title")
        return document(title if isinstance(title, str) else "", found["text"])
    return document(*split_contents(_field(found, "contents", str)))


def _field(value: object, name: str, kind: type[T]) -> T:
    if not isinstance(value, Mapping) or name not in value:
        keys = f", keys {sorted(map(str, value))[:5]}" if isinstance(value, Mapping) else ""
        raise ValueError(f"expected an object with {name!r}, got {type(value).__name__}{keys}")
    return _checked(value[name], kind, repr(name))


def _checked(value: object, kind: type[T], what: str) -> T:
    if not isinstance(value, kind):
        raise ValueError(f"{what} is {type(value).__name__}, expected {kind.__name__}")
    return value

"""Google's results through SerpAPI: title and snippet of the organic ones. Each search is paid for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from zs_fast.search.backends.passages import document
from zs_fast.search.backends.transport import Call

_NOTHING_FOUND = "Google hasn't returned any results"


class SerpApi:
    """GET ?engine=google&q=...&num=k&api_key=... -> {organic_results: [{title, snippet}, ...]}; see `Dialect`."""

    default_url = "https://serpapi.com/search"
    default_key_env = "SER_API_KEY"
    key_parameter = "api_key"
    takes_batches = False
    has_free_probe = False

    def call(self, queries: Sequence[str], k: int) -> Call:
        (query,) = queries
        return Call(method="GET", parameters={"engine": "google", "q": query, "num": str(k), "output": "json"})

    def documents(self, reply: object, num_queries: int) -> list[tuple[str, ...]]:
        if not isinstance(reply, Mapping):
            raise ValueError(f"expected an object, got {type(reply).__name__}")
        results = reply.get("organic_results")
        if results is None and str(reply.get("error", "")).startswith(_NOTHING_FOUND):
            return [()]
        if not isinstance(results, list):
            raise ValueError(f"no list 'organic_results'; error: {str(reply.get('error'))[:160]}")
        return [tuple(text for item in results if (text := _text(item)))]


def _text(item: object) -> str:
    """Title and snippet of a result; empty for one that has neither."""
    if not isinstance(item, Mapping):
        raise ValueError(f"an organic result is {type(item).__name__}, expected an object")
    title, snippet = (value if isinstance(value := item.get(name), str) else "" for name in ("title", "snippet"))
    return document(title, snippet) if snippet else title

"""Real search in process: BM25 over passages in memory. No server, no download, no gold answer ever seen."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import bm25s

from zs_fast.errors import DataError
from zs_fast.search.reward import contains_answer
from zs_fast.types import Completion, SearchMode, SearchRequest, SearchResult


def load_passages(spec: str) -> list[str]:
    """The passages of a jsonl(.gz) file, as `title: text`, or of `quickstart:world`.

    A row has `text` and maybe `title`, or Search-R1's `contents` (`"Title"\\nText`). Raises DataError naming file, line
    and field.
    """
    if spec == "quickstart:world":
        path = Path(str(resources.files("zs_fast.quickstart") / "world" / "passages.jsonl"))
    else:
        path = Path(os.path.expanduser(spec))
    if not os.path.isfile(path):
        raise DataError(f"corpus file {path} does not exist. Give a jsonl or jsonl.gz file, or quickstart:world.")
    passages: list[str] = []
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    passages.append(_passage(line, f"{path}, line {number}"))
    except (UnicodeDecodeError, EOFError, zlib.error, OSError) as error:
        raise DataError(f"corpus file {path} can't be read as UTF-8 jsonl(.gz): {error}") from error
    if not passages:
        raise DataError(f"corpus file {path} holds no passages.")
    return passages


def _passage(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not a JSON object ({error.msg}): {line[:80]!r}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}: {line[:80]!r}")
    if isinstance(row.get("contents"), str):
        title, _, text = row["contents"].partition("\n")
        title = title.strip().strip('"')
    elif isinstance(row.get("text"), str):
        title, text = row.get("title") or "", row["text"]
        if not isinstance(title, str):
            raise DataError(f"{where}: field 'title' must be a string, got {type(title).__name__}")
    else:
        raise DataError(f"{where}: field 'text' (or 'contents') is missing or not a string: {line[:80]!r}")
    # A passage that opens with its own title needs no second one.
    return text if not title or text.startswith(title) else f"{title}: {text}"


class Bm25Search:
    """A search backend over passages: every query is answered at the next `poll`.

    Scores are Lucene's BM25 (k1 1.5, b 0.75) over lower-cased words. The index is exact and deterministic; ties go to
    the earlier passage.
    """

    def __init__(self, passages: Sequence[str], *, documents: int) -> None:
        self._passages = list(passages)
        self._documents = min(documents, len(self._passages))
        self._index = bm25s.BM25()
        self._index.index(bm25s.tokenize(self._passages, stopwords=None, show_progress=False), show_progress=False)
        self._waiting: list[SearchRequest] = []

    def submit(self, request: SearchRequest) -> None:
        self._waiting.append(request)

    def deliver(self, completion: Completion) -> None:
        raise AssertionError(f"BM25 asks no model, yet a completion of role {completion.role} came back")

    def cancel(self) -> None:
        self._waiting = []

    def poll(self) -> list[SearchResult]:
        """The top passages of every waiting query, best first; the first passages for a query without words."""
        requests, self._waiting = self._waiting, []
        return [self._search(request) for request in requests]

    def _search(self, request: SearchRequest) -> SearchResult:
        tokens = bm25s.tokenize([request.query], stopwords=None, show_progress=False, return_ids=False)
        scores = self._index.get_scores(tokens[0]) if tokens[0] else None
        ranked = range(self._documents) if scores is None else (-scores).argsort(kind="stable")[: self._documents]
        documents = tuple(self._passages[index] for index in ranked)
        return SearchResult(
            request=request,
            documents=documents,
            mode=SearchMode.REAL,
            contains_answer=contains_answer(documents, request.question.answers),
        )

"""`zs-fast retriever`: a corpus, searched by BM25, behind Search-R1's /retrieve protocol on this machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from zs_fast.config import Bm25Config
from zs_fast.errors import ConfigError, PreflightError
from zs_fast.search.backends.bm25 import Bm25Index
from zs_fast.search.backends.passages import read_corpus
from zs_fast.search.retriever_server import MAX_DOCUMENTS, RetrieverServer

DEFAULT_PORT = 8000


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"zs-fast retriever: {message}")


def retriever_command(words: Sequence[str]) -> int:
    """Serve until interrupted. Raises ConfigError, DataError, or PreflightError for a port that is taken."""
    asked = _parser().parse_args(words)
    if not 0 <= asked.port <= 65535:
        raise ConfigError(f"zs-fast retriever: --port is {asked.port}, allowed are 0 (any free one) to 65535")
    if not 1 <= asked.topk <= MAX_DOCUMENTS:
        raise ConfigError(f"zs-fast retriever: --topk is {asked.topk}, allowed are 1 to {MAX_DOCUMENTS}")
    passages = [passage for spec in asked.corpus for passage in read_corpus(spec)]
    index = Bm25Index.over(passages, Bm25Config(analysis=asked.analysis))
    try:
        server = RetrieverServer(passages, index, port=asked.port, documents=asked.topk)
    except OSError as error:
        raise PreflightError(
            f"zs-fast retriever can't listen on 127.0.0.1:{asked.port} ({error.strerror}). End the program that does, "
            "or choose another --port; 0 takes any free one."
        ) from error
    with server:
        print(f"{len(passages)} passages at {server.url} (Ctrl-C ends)", file=sys.stderr, flush=True)
        server.serve_forever()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="zs-fast retriever",
        description="Serve a corpus over Search-R1's /retrieve protocol, on this machine only (127.0.0.1).",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--corpus",
        nargs="+",
        required=True,
        metavar="FILE",
        help="jsonl(.gz) with title and text, or contents; or quickstart:world",
    )
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="default: 8000; 0 takes any free one")
    parser.add_argument("--topk", type=int, default=3, help="documents where a request names no topk; default: 3")
    parser.add_argument(
        "--analysis",
        choices=("words", "english"),
        default="words",
        help="every word as it stands, or without English stop words and cut to stems; default: words",
    )
    return parser

"""Passages: read from files, and in the two forms that others know them by.

To a policy a passage is `title: text`. Search-R1 and those who speak its protocol write `contents`: the title in double
quotes on the first line, the text below.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from zs_fast.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class Passage:
    """`Passage(id="7", title="Emma", text="a novel").document == "Emma: a novel"`. `id` and `title` may be empty."""

    id: str
    title: str
    text: str

    @property
    def document(self) -> str:
        """What the policy is shown."""
        return document(self.title, self.text)

    @property
    def contents(self) -> str:
        """What is sent over Search-R1's protocol."""
        return f'"{self.title}"\n{self.text}'


def document(title: str, text: str) -> str:
    """A title and a text as one; a passage that opens with its own title needs no second one."""
    return text if not title or text.startswith(title) else f"{title}: {text}"


def split_contents(contents: str) -> tuple[str, str]:
    """(title, text) of Search-R1's `contents`; a single line is a text without a title."""
    first, newline, rest = contents.partition("\n")
    return (first.strip().strip('"'), rest) if newline else ("", contents)


def load_passages(spec: str) -> list[str]:
    """The documents of `read_corpus(spec)`: `title: text`."""
    return [passage.document for passage in read_corpus(spec)]


def read_corpus(spec: str) -> list[Passage]:
    """The passages of a jsonl(.gz) file, or of `quickstart:world`.

    A row has `text` and maybe `title`, or Search-R1's `contents` (`"Title"\\nText`). Raises DataError naming file, line
    and field.
    """
    if spec == "quickstart:world":
        path = Path(str(resources.files("zs_fast.quickstart") / "world" / "passages.jsonl"))
    else:
        path = Path(os.path.expanduser(spec))
    if not os.path.isfile(path):
        raise DataError(f"corpus file {path} does not exist. Give a jsonl or jsonl.gz file, or quickstart:world.")
    try:
        passages = list(_rows(path))
    except (UnicodeDecodeError, EOFError, zlib.error, OSError) as error:
        raise DataError(f"corpus file {path} can't be read as UTF-8 jsonl(.gz): {error}") from error
    if not passages:
        raise DataError(f"corpus file {path} holds no passages.")
    return passages


def _rows(path: Path) -> Iterator[Passage]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _passage(line, number, f"{path}, line {number}")


def _passage(line: str, number: int, where: str) -> Passage:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{where}: not a JSON object ({error}): {line[:80]!r}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}: {line[:80]!r}")
    if isinstance(row.get("contents"), str):
        title, text = split_contents(row["contents"])
    elif isinstance(row.get("text"), str):
        title, text = row.get("title") or "", row["text"]
        if not isinstance(title, str):
            raise DataError(f"{where}: field 'title' must be a string, got {type(title).__name__}")
    else:
        raise DataError(f"{where}: field 'text' (or 'contents') is missing or not a string: {line[:80]!r}")
    return Passage(id=str(row.get("id", number)), title=title, text=text)

"""From a simulator's raw output to single documents.

The asked-for form is one document a line, `Doc 1: ...` to `Doc k: ...`. A marker counts only at the start of a line:
a document that speaks of "Doc 2" inside its text is never cut there. Other forms are repaired and flagged.
Time is linear in the length of the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

_CANONICAL = re.compile(r"Doc (\d{1,3}):")
_MARKER = re.compile(
    r"(?:[-*+•#>]{1,6}\s{0,4})?"  # markdown bullet, heading or quote
    r"[*_\[(]{0,3}"
    r"(?:doc|document)[ \t_\-.#]{0,3}(\d{1,3})"
    r"(?:[*_\])]{0,3}\s{0,4}(?:[:：]|[.)\-–—](?=[\s*_]|$))[*_]{0,3}"  # Doc 1:   **Doc 1:**   Document 1 -
    r"|[*_]{0,3}[\])][*_]{0,3}(?=\s)"  # [Doc 1] ...
    r"|[*_\])]{0,3}\s*$)",  # **Doc 1** alone in its line
    re.IGNORECASE,
)
_NUMBERED = re.compile(r"[*_\[(]{0,3}(\d{1,2})[*_]{0,3}[.):\]](?:[*_]{0,3}\s|\s*$)")
_BULLET = re.compile(r"[-*+•]\s")
_FENCE = re.compile(r"[`~*_=#-]{3,}\s*(?:text|markdown|json)?\s*")
_REFUSAL = re.compile(
    r"(?:i(?:'|\u2019)?m (?:very )?sorry|sorry,|i apologi[sz]e|i can(?:not|'t|\u2019t)|i am (?:sorry|unable|not able)|"
    r"i(?:'|\u2019)m (?:unable|not able)|as an ai\b|unfortunately, i )",
    re.IGNORECASE,
)
MAX_CHARACTERS = 262_144
"""Only this much of an output is read; a longer one is malformed. 20 documents of 30 words take about 5,000."""
_MARKER_WINDOW = 48
"""Characters of a line that may hold its marker; bounds the work per line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParsedDocuments:
    """`documents` are stripped single lines without markers, at most k, none empty; maybe there are none at all."""

    documents: tuple[str, ...]
    malformed: bool
    """The text did not have exactly the asked-for form."""
    refused: bool = False
    """The text is a refusal ("I'm sorry, ..."), not documents; then `documents` is empty."""


@dataclass(frozen=True, slots=True)
class _Marker:
    number: int
    rest: str
    """What follows the marker in its line."""
    canonical: bool


def parse_documents(text: str, k: int) -> ParsedDocuments:
    """The first k documents of a simulator's output.

    Repaired, with `malformed` set: lines before the first marker (dropped, unless the first document alone lacks its
    marker), fewer or more than k documents, repeated or skipped numbers, `Document 1:`, `**Doc 1**`, bullets, numbered
    lists, paragraphs without any marker, a thinking block, code fences, empty documents (dropped). A document that
    runs over several lines is joined to one and counts as well-formed.
    """
    body = _after_thinking(text[:MAX_CHARACTERS])
    if body is None:
        return ParsedDocuments(documents=(), malformed=True)
    lines = [line.strip() for line in body.splitlines()]
    kept = [line for line in lines if not _FENCE.fullmatch(line[:_MARKER_WINDOW])]
    repaired = len(kept) != len(lines) or len(body) != len(text)
    for read_marker in (_document_marker, _number_marker(), _bullet_marker):
        preamble, blocks = _split_at_markers(kept, read_marker)
        if blocks:
            return _number_documents(preamble, blocks, k, repaired or read_marker is not _document_marker)
    paragraphs = _paragraphs(kept)
    if paragraphs and _REFUSAL.match(paragraphs[0]):
        return ParsedDocuments(documents=(), malformed=True, refused=True)
    return ParsedDocuments(documents=tuple(paragraphs[:k]), malformed=True)


def _after_thinking(text: str) -> str | None:
    """The text after a leading `<think>...</think>`; None if the thinking never ends."""
    if not text.lstrip().startswith("<think>"):
        return text
    _, closed, rest = text.partition("</think>")
    return rest if closed else None


def _document_marker(line: str) -> _Marker | None:
    match = _MARKER.match(line[:_MARKER_WINDOW])
    if match is None or (match.end() == _MARKER_WINDOW < len(line) and line[match.end() - 1].isspace()):
        return None
    return _Marker(int(match[1]), line[match.end() :].strip(), _CANONICAL.match(line) is not None)


def _number_marker() -> Callable[[str], _Marker | None]:
    """A reader of `1. ...`, `2) ...`: only the next number in turn is a marker, so that "30. April" is text."""
    expected = 1

    def read(line: str) -> _Marker | None:
        nonlocal expected
        match = _NUMBERED.match(line[:_MARKER_WINDOW])
        if match is None or int(match[1]) != expected:
            return None
        expected += 1
        return _Marker(int(match[1]), line[match.end() :].strip(), False)

    return read


def _bullet_marker(line: str) -> _Marker | None:
    return _Marker(0, line[1:].strip(), False) if _BULLET.match(line[:_MARKER_WINDOW]) else None


def _split_at_markers(
    lines: list[str], read_marker: Callable[[str], _Marker | None]
) -> tuple[str, list[tuple[_Marker, str]]]:
    """(text before the first marker, [(marker, its document), ...])."""
    preamble: list[str] = []
    blocks: list[tuple[_Marker, list[str]]] = []
    for line in lines:
        marker = read_marker(line)
        if marker is not None:
            blocks.append((marker, [marker.rest]))
        elif blocks:
            blocks[-1][1].append(line)
        else:
            preamble.append(line)
    return _join(preamble), [(marker, _join(parts)) for marker, parts in blocks]


def _number_documents(preamble: str, blocks: list[tuple[_Marker, str]], k: int, repaired: bool) -> ParsedDocuments:
    documents = [document for _, document in blocks if document]
    first = blocks[0][0].number
    if preamble and first > 1 and not preamble.endswith(":"):
        documents.insert(0, preamble)  # the output began with document 1 itself, its marker left to the prompt
    well_formed = (
        not repaired
        and not preamble
        and len(documents) == k
        and [marker.number for marker, _ in blocks] == list(range(1, k + 1))
        and all(marker.canonical for marker, _ in blocks)
    )
    return ParsedDocuments(documents=tuple(documents[:k]), malformed=not well_formed)


def _paragraphs(lines: list[str]) -> list[str]:
    """Blocks between empty lines; single lines when there is no empty line between two of them."""
    blocks: list[list[str]] = [[]]
    for line in lines:
        if line:
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    filled = [block for block in blocks if block]
    return filled[0] if len(filled) == 1 else [_join(block) for block in filled]


def _join(parts: list[str]) -> str:
    return " ".join(part for part in parts if part)

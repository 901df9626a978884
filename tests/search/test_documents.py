"""The document parser: the asked-for form, each known malformation, and bounds on time and content."""

from __future__ import annotations

import os
import string
import sys
from collections.abc import Callable
from types import FrameType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zs_fast.search import documents
from zs_fast.search.documents import parse_documents

EXAMPLES = int(os.environ.get("ZS_HYPOTHESIS_EXAMPLES", "200"))
THREE = "Doc 1: Emma is by Jane Austen.\nDoc 2: It came out in 1815.\nDoc 3: Emma Woodhouse is its heroine."
THREE_DOCUMENTS = ("Emma is by Jane Austen.", "It came out in 1815.", "Emma Woodhouse is its heroine.")


def parsed(text: str, k: int = 3) -> tuple[tuple[str, ...], bool]:
    result = parse_documents(text, k)
    return result.documents, result.malformed


@pytest.mark.parametrize(
    "text",
    [
        THREE,
        THREE + "\n",
        "\n" + THREE.replace("\n", "\n\n"),
        THREE.replace("\n", "\r\n"),
        THREE.replace("Doc 2: It came", "Doc 2:   It came"),
        THREE.replace("by Jane", "by\nJane"),
        "  " + THREE.replace("\n", "  \n  "),
    ],
    ids=["plain", "final_newline", "blank_lines", "crlf", "spaces", "document_over_two_lines", "indented"],
)
def test_asked_for_form_is_well_formed(text: str) -> None:
    assert parsed(text) == (THREE_DOCUMENTS, False)


REPAIRED = {
    "preamble": ("Here are three useful documents:\n\n" + THREE, THREE_DOCUMENTS),
    "echoed_heading": ("Useful Output:\n" + THREE, THREE_DOCUMENTS),
    "first_marker_left_out": (THREE.removeprefix("Doc 1: "), THREE_DOCUMENTS),
    "document_i": (THREE.replace("Doc", "Document"), THREE_DOCUMENTS),
    "lower_case": (THREE.replace("Doc", "doc"), THREE_DOCUMENTS),
    "bold": (THREE.replace("Doc 1:", "**Doc 1:**").replace("Doc 2:", "**Doc 2**:"), THREE_DOCUMENTS),
    "bullets_before_markers": (THREE.replace("Doc", "- Doc"), THREE_DOCUMENTS),
    "headings": ("\n".join("### " + line.replace(": ", "\n") for line in THREE.split("\n")), THREE_DOCUMENTS),
    "brackets": (THREE.replace("Doc 1:", "[Doc 1]").replace("Doc 2:", "(Doc 2):"), THREE_DOCUMENTS),
    "no_space": (THREE.replace("Doc ", "Doc"), THREE_DOCUMENTS),
    "full_width_colon": (THREE.replace("Doc 2:", "Doc 2："), THREE_DOCUMENTS),
    "dash": (THREE.replace("Doc 2:", "Doc 2 -"), THREE_DOCUMENTS),
    "fewer": ("\n".join(THREE.split("\n")[:2]), THREE_DOCUMENTS[:2]),
    "more": (THREE + "\nDoc 4: One more.", THREE_DOCUMENTS),
    "repeated_numbers": (THREE.replace("Doc 2", "Doc 1").replace("Doc 3", "Doc 1"), THREE_DOCUMENTS),
    "skipped_number": (THREE.replace("Doc 3", "Doc 4"), THREE_DOCUMENTS),
    "backwards": (THREE.replace("Doc 1", "Doc 9"), THREE_DOCUMENTS),
    "empty_document": (THREE.replace(" It came out in 1815.", ""), (THREE_DOCUMENTS[0], THREE_DOCUMENTS[2])),
    "numbered_list": ("\n".join(f"{i}. {text}" for i, text in enumerate(THREE_DOCUMENTS, 1)), THREE_DOCUMENTS),
    "numbered_list_with_date": ("1. May came.\n30. April went.\n2. June.", ("May came. 30. April went.", "June.")),
    "bullets": ("\n".join(f"* {text}" for text in THREE_DOCUMENTS), THREE_DOCUMENTS),
    "paragraphs": ("\n\n".join(THREE_DOCUMENTS), THREE_DOCUMENTS),
    "paragraph_of_two_lines": ("Emma is by\nJane Austen.\n\nIt is old.", ("Emma is by Jane Austen.", "It is old.")),
    "lines": ("\n".join(THREE_DOCUMENTS), THREE_DOCUMENTS),
    "one_line": ("Emma is by Jane Austen.", ("Emma is by Jane Austen.",)),
    "thinking_first": ("<think>\nThe answer is Doc 1: no.\n</think>\n" + THREE, THREE_DOCUMENTS),
    "code_fence": ("```text\n" + THREE + "\n```", THREE_DOCUMENTS),
    "rules_between": (THREE.replace("\n", "\n---\n"), THREE_DOCUMENTS),
}


@pytest.mark.parametrize("name", REPAIRED)
def test_malformed_output_is_repaired_and_flagged(name: str) -> None:
    text, expected = REPAIRED[name]
    repaired, malformed = parsed(text)
    assert malformed
    assert repaired == expected


@pytest.mark.parametrize(
    "inner",
    [
        "It was better, as Doc 2: the film says, than the book.",
        "see Doc 2",
        "Doc Holliday drew 2: he lost.",
        "Document 12-B was signed.",
        "Doc 2 is a film of 1999.",
        "Doctor 2: the return.",
    ],
)
def test_a_mention_inside_a_document_is_never_a_cut(inner: str) -> None:
    text = f"Doc 1: First line.\nDoc 2: {inner}\n{inner if inner.startswith('Doc') else ''}\nDoc 3: Last."
    first, second, last = parse_documents(text, 3).documents
    assert first == "First line." and last == "Last."
    assert inner in second


@pytest.mark.parametrize(
    "text", ["", " \n\n\t", "Doc 1:", "Doc 1:\nDoc 2:\n", "```\n```", "<think>the answer is Paris"]
)
def test_output_without_text_gives_no_documents(text: str) -> None:
    result = parse_documents(text, 5)
    assert result.documents == () and result.malformed and not result.refused


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I cannot generate noisy documents.",
        "As an AI model, I have no access.",
    ],
)
def test_a_refusal_is_no_document(text: str) -> None:
    result = parse_documents(text, 5)
    assert result.documents == () and result.refused


def test_documents_that_begin_like_a_refusal_are_kept() -> None:
    assert parsed("Doc 1: I'm sorry, the song by Brenda Lee, came out in 1960.\nDoc 2: b.", 2) == (
        ("I'm sorry, the song by Brenda Lee, came out in 1960.", "b."),
        False,
    )


hostile_lines = st.lists(
    st.one_of(
        st.text(max_size=60),
        st.sampled_from(
            ["Doc 1: a", "Doc 2:", "doc", "Document 3: b", "**Doc 4**", "1. x", "- y", "```", "<think>", "\x00"]
        ),
        st.text(alphabet="Doc 12:*-#\n \t", max_size=60),
    ),
    max_size=20,
)


@settings(max_examples=EXAMPLES, deadline=None)
@given(lines=hostile_lines, k=st.integers(1, 20))
def test_any_text_gives_at_most_k_single_nonempty_lines(lines: list[str], k: int) -> None:
    text = "\n".join(lines)
    result = parse_documents(text, k)
    assert len(result.documents) <= k
    for document in result.documents:
        assert document == document.strip() != ""
        assert len(document.splitlines()) == 1
    letters_out = sum(len(document.replace(" ", "")) for document in result.documents)
    assert letters_out <= len(text)
    assert parse_documents(text, k) == result
    if not result.malformed:
        assert len(result.documents) == k and not result.refused


words = st.text(alphabet=string.ascii_letters + string.digits + " ,.'éß中", min_size=1, max_size=80)
plain_documents = st.lists(words.map(lambda text: "x" + " ".join(text.split())), min_size=1, max_size=9)


@settings(max_examples=EXAMPLES, deadline=None)
@given(written=plain_documents)
def test_honest_documents_come_back_as_they_are(written: list[str]) -> None:
    text = "\n".join(f"Doc {number}: {document}" for number, document in enumerate(written, 1))
    assert parsed(text, len(written)) == (tuple(written), False)


def executed_lines(text: str) -> int:
    """Lines of documents.py that run for `text`: its work, without a clock."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., object] | None:
        nonlocal count
        count += event == "line"
        return trace if frame.f_code.co_filename == documents.__file__ else None

    sys.settrace(trace)
    try:
        documents.parse_documents(text, 5)
    finally:
        sys.settrace(None)
    return count


@pytest.mark.parametrize(
    "line",
    ["Doc 1: ", "Doc 1:\n", " ", "\n", "-", "*" * 7 + " Doc", "1. a\n", "- \n", "a\n\n", "<think>", "[", "\u2028", "~"],
)
def test_work_grows_no_faster_than_the_text(line: str) -> None:
    small, large = (executed_lines((line * size)[:size]) for size in (2_000, 8_000))
    assert large <= 4 * small + 100


def test_an_endless_output_is_cut_and_flagged() -> None:
    repaired, malformed = parsed("Doc 1: a\nDoc 2: b\nDoc 3: " + "c" * 10_000_000)
    assert malformed and repaired[:2] == ("a", "b") and len(repaired[2]) < documents.MAX_CHARACTERS

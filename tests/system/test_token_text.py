"""Token lengths cut a decoded text where its tokens meet, for every kind of decoder, or say that they can't."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zs_fast.system.token_text import token_lengths

PIECES = ("", " word", "é", "\U0001f5fb", "x" * 50)


def from_bytes(ids: Sequence[int]) -> str:
    """Tokens are bytes: those of one character decode to nothing sound by themselves."""
    return bytes(ids).decode("utf-8", "replace")


def stripped(ids: Sequence[int]) -> str:
    """A decoder that drops the first space of a text, as SentencePiece ones do."""
    return "".join(PIECES[index] for index in ids).removeprefix(" ")


def cut(text: str, lengths: str) -> list[str]:
    found, start = [], 0
    for length in lengths:
        found.append(text[start : start + ord(length) - 48])
        start += ord(length) - 48
    assert start == len(text)
    return found


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_bytes_of_a_character_are_counted_by_the_last_of_them(text: str) -> None:
    if "\ufffd" in text:
        return
    parts = cut(text, token_lengths(list(text.encode()), text, from_bytes))
    assert [part for part in parts if part] == list(text) and len(parts) == len(text.encode())


@given(st.binary(max_size=30))
def test_any_bytes_have_one_length_each(data: bytes) -> None:
    text = from_bytes(data)
    lengths = token_lengths(list(data), text, from_bytes)
    if lengths:
        assert len(cut(text, lengths)) == len(data)


def test_a_first_space_that_the_decoder_drops_is_not_counted() -> None:
    text = stripped([1, 1, 0, 3, 4])
    lengths = token_lengths([1, 1, 0, 3, 4], text, stripped)
    assert cut(text, lengths) == ["word", " word", "", "\U0001f5fb", "x" * 50] and lengths[:4] == "4501"


@pytest.mark.parametrize("ids", [[120], [120, 121, 122]])
def test_a_text_that_the_ids_do_not_decode_to_has_no_lengths(ids: list[int]) -> None:
    assert token_lengths(ids, "other", from_bytes) == ""
    assert token_lengths([], "", from_bytes) == ""

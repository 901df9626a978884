"""Which characters of a decoded text each of its tokens wrote, in one character a token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

ZERO = ord("0")
MOST_CHARACTERS = 1000
"""A token that seems to write more was not told apart from its neighbours."""


def token_lengths(ids: Sequence[int], text: str, decode: Callable[[Sequence[int]], str]) -> str:
    """How many characters of `text`, the decoded `ids`, come from each token: `chr(48 + characters)`, one a token.

    `"50"` is a token of five characters and one without text: a special token, or a part of a character whose last
    token counts it. Up to nine characters it reads as a digit; `len` is the number of tokens. Empty when the tokens
    can't be told apart, because `text` is not what the ids decode to.
    """
    pieces = [decode([index]) for index in ids]
    if "".join(pieces) != text:
        pieces = _pieces_in_context(ids, decode)
        if "".join(pieces) != text:
            return ""
    if any(len(piece) > MOST_CHARACTERS for piece in pieces):
        return ""
    return "".join(chr(ZERO + len(piece)) for piece in pieces)


def _pieces_in_context(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """What each token adds to the text before it, for decoders that join bytes or drop a text's first space."""
    pieces: list[str] = []
    start, before = 0, ""
    for end in range(1, len(ids) + 1):
        now = decode(ids[start:end])
        if now.endswith("\ufffd") and end < len(ids):  # an unfinished character: the token that ends it counts it
            pieces.append("")
            continue
        pieces.append(now[len(before) :])
        start, before = end - 1, decode(ids[end - 1 : end])
        if before.startswith("\ufffd"):  # the last token is no whole character: it can't be the context alone
            start, before = end, ""
    return pieces

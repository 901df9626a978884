"""Text that others wrote (a simulator, a retriever), made safe to show to the policy.

Nothing here is what keeps the reward or the loss mask right: only the policy's own tokens are parsed, and masks come
from who wrote a token. Cleaning keeps a document from *looking like* the game's own text, to the model and to a
reader of the logs. `codec.encode_untrusted` sees to it that no added token id can come out of any text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

# C0 without tab and newline, DEL, C1, and the bidirectional embeddings, overrides and isolates, which can show text in
# another order than it is read in. The invisible marks U+200E, U+200F, U+061C can't, and honest Hebrew or Arabic names
# in English articles come with them, so they stay.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]+")
_SURROGATES = re.compile("[\ud800-\udfff]")
# Possessive repeats: a run of spaces after each `<` is read once, never re-read.
_PROTOCOL_TAG = re.compile(r"<(?=[\s/]*+(?:think|search|information|answer)\b)", re.IGNORECASE)

_TAG_LEFT_BY_A_CUT = re.compile(r"<[\s/]*+(?:think|search|information|answer)\Z", re.IGNORECASE)

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")

_Tree = dict[str, "_Tree"]


def one_line(text: str) -> str:
    """The text as one line: control, bidirectional and zero-width characters, lone surrogates and line breaks become
    spaces, and runs of them one."""
    return " ".join(_UNPRINTABLE.sub(" ", text).split())


def clean_document(text: str, reserved_strings: Iterable[str]) -> str:
    """The document without control characters, with protocol tags and reserved strings made harmless.

    Dropped: C0 and C1 controls except tab and newline, DEL, bidirectional embeddings, overrides and isolates. A lone
    surrogate becomes U+FFFD. The `<` of a protocol tag (think, search, information, answer; any case, spaces,
    attributes, slash) and of a reserved string becomes `&lt;`; a reserved string that starts otherwise gets a space
    after its first character. Text without any of these comes back byte-identical. Linear time.
    """
    text = without_controls(text)
    text = _PROTOCOL_TAG.sub("&lt;", text)
    return break_strings(text, reserved_strings)


def without_controls(text: str) -> str:
    """The text as a terminal may show it: no escape sequence, no carriage return, nothing that reorders what is read.

    Tabs and newlines stay; a lone surrogate becomes U+FFFD. Character by character, so that pieces may be cleaned as
    they come.
    """
    return _SURROGATES.sub("\ufffd", _CONTROLS.sub("", text))


def without_cut_tag(text: str) -> str:
    """A cleaned text that was then cut, without the start of a longer word (`<answered`) that now reads as a tag."""
    return _TAG_LEFT_BY_A_CUT.sub("", text)


def break_strings(text: str, reserved_strings: Iterable[str]) -> str:
    """The text with every occurrence of a reserved string broken after or at its first character."""
    pattern = _any_of(reserved_strings if isinstance(reserved_strings, tuple) else tuple(reserved_strings))
    if pattern is None:
        return text
    return pattern.sub(lambda first: "&lt;" if first[0] == "<" else first[0] + " ", text)


@lru_cache(maxsize=16)
def _any_of(strings: tuple[str, ...]) -> re.Pattern[str] | None:
    """A pattern for the first character of each occurrence of any of `strings`; overlapping ones are all found.

    The strings are laid out as a tree, so that a place in the text is tried against all of them at the cost of the
    longest, however many there are (some tokenizers reserve thousands).
    """
    tree: _Tree = {}
    for reserved in strings:
        node = tree
        for character in reserved:
            if "" in node:
                break  # a shorter reserved string already covers this one
            node = node.setdefault(character, {})
        else:
            node.clear()
            node[""] = {}
    tree.pop("", None)
    if not tree:
        return None
    return re.compile("|".join(f"{re.escape(first)}(?={_tree_pattern(rest)})" for first, rest in tree.items()))


def _tree_pattern(node: _Tree) -> str:
    """What may follow: a chain of characters stays flat, a fork becomes a group."""
    chain = ""
    while len(node) == 1:
        character, node = next(iter(node.items()))
        if character == "":
            return chain
        chain += re.escape(character)
    return chain + "(?:" + "|".join(re.escape(first) + _tree_pattern(rest) for first, rest in node.items()) + ")"

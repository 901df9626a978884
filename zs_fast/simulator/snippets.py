"""From a retrieved passage to the snippet of about 30 words that a simulator is asked for."""

from __future__ import annotations

import re
from collections.abc import Sequence

from zs_fast.search.reward import contains_answer

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[\"'(]?[A-Z0-9])")


def snippet(passage: str, max_words: int, answers: Sequence[str] = ()) -> str:
    """At most `max_words` words of the passage, on one line; 0 keeps all.

    It starts with a sentence, and goes on to the end of another one if that takes no more words: the first sentence, or
    where `answers` are given the first one with an answer. An answer that stands too late in its sentence is shown with
    the words before it. A passage that holds no answer by itself in any sentence starts at its beginning.
    """
    words = passage.split()
    if not max_words or len(words) <= max_words:
        return " ".join(words)
    sentences = [sentence.split() for sentence in _SENTENCE_END.split(" ".join(words))]
    first = next((n for n, s in enumerate(sentences) if answers and contains_answer([" ".join(s)], answers)), 0)
    chosen = list(sentences[first])
    if len(chosen) > max_words:
        return " ".join(_window(chosen, max_words, answers))
    for sentence in sentences[first + 1 :]:
        if len(chosen) + len(sentence) > max_words:
            break
        chosen += sentence
    return " ".join(chosen)


def _window(words: list[str], size: int, answers: Sequence[str]) -> list[str]:
    """The first `size` words in a row that hold an answer whole; the first ones where none do."""
    if not answers:
        return words[:size]
    starts = range(len(words) - size + 1)
    found = next((start for start in starts if contains_answer([" ".join(words[start : start + size])], answers)), 0)
    return words[found : found + size]

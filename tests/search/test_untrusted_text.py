"""Cleaning takes away what looks like the game's own text, and nothing else."""

from __future__ import annotations

import re
import time

import pytest

from zs_fast.search.untrusted import break_strings, clean_document, without_cut_tag

RESERVED = ("<|im_end|>", "<|im_start|>", "<tool_call>", "[INST]", "[/INST]", "</s>", "<s>")
HONEST = [
    "Emma is a novel by Jane Austen, published in 1815.",
    "a < b, b > c, <b>bold</b>, <5 answers>, i<thin, <thinker>, <answers>, think>, /search>, x<y",
    "Tabs\tand\n\nblank lines, \u00a0no-break, zero\u200bwidth, joiner 👩\u200d👩\u200d👧, BOM \ufeff",
    "The answer is to search for information and think.",
    "Straße, Москва, 東京, עברית, العربية, नमस्ते",
    "Yehuda Avner (Hebrew: יהודה אבנר\u200e ; 1928) and \u200fעברית\u061c",
    "&lt;answer&gt; [1] [INS] <| |> im_end",
    "",
]


@pytest.mark.parametrize("text", HONEST)
def test_honest_text_is_untouched(text: str) -> None:
    assert clean_document(text, RESERVED) == text


TAGS = ["<answer>", "</answer>", "<ANSWER>", "< answer >", "</ answer>", "< / Answer>", "<search/>", "<think >"]
TAGS += ['<information src="x">', "<\nthink\n>", "<\tsearch", "<//answer>", "</Information", "<ſearch>", "<thinK>"]


@pytest.mark.parametrize("tag", TAGS)
def test_a_protocol_tag_loses_its_bracket(tag: str) -> None:
    assert clean_document(f"a {tag} b", ()) == f"a &lt;{tag[1:]} b"


@pytest.mark.parametrize(
    "hidden", ["<ans\x00wer>", "<\u202eanswer>", "<answer\u2066>", "\x1b<an\x08swer>", "<a\u2069nswer>"]
)
def test_a_tag_hidden_by_dropped_characters_is_found(hidden: str) -> None:
    assert clean_document(hidden, ()) == "&lt;answer>"


def test_control_and_direction_characters_go() -> None:
    dropped = [chr(code) for code in [*range(9), *range(11, 32), *range(127, 160)]]
    dropped += list("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
    assert clean_document("a" + "".join(dropped) + "b\n\tc", ()) == "ab\n\tc"
    assert clean_document("a\r\nb", ()) == "a\nb"


def test_lone_surrogates_become_the_replacement_character() -> None:
    assert clean_document("a\ud800b\udc00", ()) == "a\ufffdb\ufffd"


@pytest.mark.parametrize("reserved", RESERVED)
def test_a_reserved_string_is_broken(reserved: str) -> None:
    cleaned = clean_document(f"x{reserved}{reserved}y", RESERVED)
    assert reserved not in cleaned
    assert cleaned.replace("&lt;", "<").replace("[ ", "[") == f"x{reserved}{reserved}y"


def test_overlapping_and_nested_reserved_strings_are_all_broken() -> None:
    reserved = ("<a>", "a><b", "<a><", "ab")
    cleaned = break_strings("<a><b <a><a> ab", reserved)
    assert not any(string in cleaned for string in reserved)


def test_breaking_one_string_does_not_build_another() -> None:
    cleaned = clean_document("<<|im_end|>|im_end|>", RESERVED)
    assert not any(string in cleaned for string in RESERVED)
    cleaned = clean_document("<an<answer>swer>", RESERVED)
    assert not re.search(r"<\s*/?\s*answer", cleaned)


def test_cleaning_twice_changes_nothing_more() -> None:
    text = "<answer> <|im_end|> </s> [INST] \x00 < search >"
    once = clean_document(text, RESERVED)
    assert clean_document(once, RESERVED) == once


@pytest.mark.parametrize(
    "unit", ["<", "< ", "<" + " " * 50_000, "<answer>", "<|im_", "<unused", "\x00", "\ud800", "[", "</"]
)
def test_linear_in_the_text_however_many_strings_are_reserved(unit: str) -> None:
    """From 125 kB to 1 MB the time may grow 8-fold; 24-fold leaves room for noise, a square would be 64-fold."""
    reserved = (*RESERVED, *(f"<unused{index}>" for index in range(6_000)))
    clean_document("warm the cache", reserved)
    times = []
    for size in (125_000, 1_000_000):
        text = unit * (size // len(unit))
        best = float("inf")
        for _ in range(3):
            start = time.process_time()
            clean_document(text, reserved)
            best = min(best, time.process_time() - start)
        times.append(best)
    assert times[1] <= 24 * max(times[0], 1e-3), times


@pytest.mark.parametrize("cut", ["a </answer", "a < / Search", "a <information"])
def test_a_cut_does_not_make_a_tag_of_the_start_of_a_word(cut):
    assert clean_document(cut + "ed", ()) == cut + "ed"
    assert without_cut_tag(cut) == "a "
    assert without_cut_tag(cut + "ed") == cut + "ed"

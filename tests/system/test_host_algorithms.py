"""The compiled host algorithms equal their Python references, and those equal a brute-force reading of the words."""

from __future__ import annotations

import itertools
import os
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zs_fast import host

EXAMPLES = int(os.environ.get("ZS_HYPOTHESIS_EXAMPLES", "200"))
NAMES = ("think", "search", "answer", "information")


def runs(lengths: list[int], bounds: list[int]) -> list[int]:
    return [sum(lengths[a:b]) for a, b in itertools.pairwise(bounds)]


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.lists(st.integers(0, 60), max_size=40), st.integers(1, 120))
def test_packing_equals_its_reference_and_keeps_the_budget(lengths, budget):
    bounds = host.pack_segments(lengths, budget)
    assert bounds == host.pack_segments_reference(lengths, budget)
    assert bounds == sorted(set(bounds)) and bounds[0] == 0 and bounds[-1] == len(lengths)
    for begin, end in itertools.pairwise(bounds):
        assert sum(lengths[begin:end]) <= budget or sum(length > 0 for length in lengths[begin:end]) == 1


@settings(max_examples=min(EXAMPLES, 2000), deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(9, 20))
def test_packing_is_optimal(lengths, budget):
    """Against every way to cut: no fewer runs within the budget, and with that many no smaller largest run."""
    cuts = itertools.chain.from_iterable(itertools.combinations(range(1, len(lengths)), k) for k in range(len(lengths)))
    ways = [runs(lengths, [0, *cut, len(lengths)]) for cut in cuts]
    best = min((len(way), max(way)) for way in ways if max(way) <= budget)
    mine = runs(lengths, host.pack_segments(lengths, budget))
    assert (len(mine), max(mine)) == best


def test_packing_examples():
    assert host.pack_segments([], 10) == [0]
    assert host.pack_segments([50], 10) == [0, 1]
    assert host.pack_segments([5, 5, 5, 1], 10) == [0, 2, 4]
    assert host.pack_segments([9, 1, 1, 1], 10) == [0, 1, 4]  # two runs either way; 9 is a smaller largest run than 10
    assert host.pack_segments([2**62, 2**62, 2**62], 2**62) == [0, 1, 2, 3]


@pytest.mark.parametrize("lengths, budget, name", [([1], 0, "token_budget"), ([-1], 5, "lengths")])
def test_packing_names_what_is_wrong(lengths, budget, name):
    with pytest.raises(ValueError, match=name):
        host.pack_segments(lengths, budget)


PIECES = st.sampled_from(
    ["<", ">", "/", "</", "<<", " ", "a", "é", "漢", "😀", "\ud800", "\0", *NAMES, "<think>", "</answer>", "<search >"]
)


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.lists(PIECES, max_size=30).map("".join))
def test_tags_equal_their_reference(text):
    tags = host.find_tags(text, NAMES)
    assert tags == host.find_tags_reference(text, NAMES)
    for tag in tags:
        assert text[tag.start : tag.end] == f"<{'/' if tag.closing else ''}{tag.name}>"


@pytest.mark.parametrize("find", [host.find_tags, host.find_tags_reference])
def test_tag_examples(find):
    assert find("<search>x</search>", NAMES) == [(0, 8, "search", False), (9, 18, "search", True)]
    assert find("<<think>", NAMES) == [(1, 8, "think", False)]
    assert find("<think", NAMES) == [] and find("<think >", NAMES) == [] and find("<Think>", NAMES) == []
    assert find("😀</answer>", NAMES) == [(1, 10, "answer", True)]
    assert find("<a>", ()) == []


def test_a_megabyte_of_open_tags_is_one_pass():
    text = "<search>" * 125_000
    assert len(host.find_tags(text, NAMES)) == 125_000


def test_compiled_core_is_used_when_built():
    """Where the file is there it must load: a silent fall-back would hide a broken build."""
    built = Path(host.__file__).with_name(f"_core{sysconfig.get_config_var('EXT_SUFFIX')}")
    assert built.is_file() == host.NATIVE

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
OPENINGS, CLOSINGS = [f"<{name}>" for name in NAMES], [f"</{name}>" for name in NAMES]


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
    ["<", ">", "/", "</", "<<", " ", "a", "é", "漢", "😀", "\ud800", "\0", *NAMES, *OPENINGS, *CLOSINGS, "<search >"]
)


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.lists(PIECES, max_size=30).map("".join))
def test_the_first_action_equals_its_reference(text):
    found = host.first_action(text)
    assert found == host.first_action_reference(text)
    if found:
        kind, start, end = found
        assert text[:start].endswith(f"<{kind}>") and text[end:].startswith(f"</{kind}>")


@pytest.mark.parametrize("first_action", [host.first_action, host.first_action_reference])
@pytest.mark.parametrize(
    "text, expected",
    [
        ("<search>x</search>", ("search", 8, 9)),
        ("<<answer></answer>", ("answer", 9, 9)),
        ("<think><search>a</search></think><answer>b</answer>", ("answer", 41, 42)),
        ("<search>a<information></search><search>\ud800</search>", ("search", 39, 40)),
        ("</answer><information><answer>😀</answer>", ("answer", 30, 31)),
        ("<search>a</answer>", None),
        ("<search>a</search", None),
        ("<search >a</search>", None),
        ("<Search>a</Search>", None),
        ("", None),
    ],
)
def test_first_action_examples(first_action, text, expected):
    assert first_action(text) == expected


def test_compiled_core_is_used_when_built():
    """Where the file is there it must load: a silent fall-back would hide a broken build."""
    built = Path(host.__file__).with_name(f"_core{sysconfig.get_config_var('EXT_SUFFIX')}")
    assert built.is_file() == host.NATIVE

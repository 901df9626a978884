"""The compiled host algorithms equal their Python references, and those equal a brute-force reading of the words."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
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
    with pytest.raises(ValueError, match="prefixes are of 1 segments, expected 2"):
        host.pack_segments([1, 2], 5, [[]])


SEQUENCES = st.lists(st.lists(st.integers(0, 2), max_size=7), max_size=9)


def common(one: list[int], other: list[int]) -> int:
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


@settings(max_examples=EXAMPLES, deadline=None)
@given(SEQUENCES, st.integers(0, 10), st.integers(1, 4))
def test_shared_prefixes_are_the_longest_whatever_the_first_sequence_is(sequences, look_back, least):
    prefixes = host.shared_prefixes(sequences, look_back=look_back, least=least)
    assert len(prefixes) == len(sequences)
    for number, sequence in enumerate(sequences):
        for first in range(number + 1):
            source, length = host.held_prefix(prefixes[number], first)
            seen = range(max(first, number - look_back), number)
            longest = max((common(sequence, sequences[other]) for other in seen), default=0)
            longest = min(longest, max(0, len(sequence) - 1))  # its last token is its own
            assert length == (longest if longest >= least else 0)
            if length:
                assert first <= source < number and sequences[source][:length] == sequence[:length]


def computed(sequences: list[list[int]]) -> int:
    """Tokens that a pass over them computes: distinct beginnings, and every sequence's last token."""
    beginnings = {tuple(one[: end + 1]) for one in sequences for end in range(len(one) - 1)}
    ends = [one for number, one in enumerate(sequences) if one and not is_held_whole(sequences, number)]
    again = sum(bool(one) for one in sequences) - len(ends)
    return len(beginnings | {tuple(one) for one in ends}) + again


def is_held_whole(sequences: list[list[int]], number: int) -> bool:
    return any(other[: len(sequences[number])] == sequences[number] for other in sequences[:number])


@settings(max_examples=EXAMPLES, deadline=None)
@given(SEQUENCES, st.integers(1, 25))
def test_packing_with_shared_prefixes_counts_each_once(sequences, budget):
    lengths, prefixes = list(map(len, sequences)), host.shared_prefixes(sequences, least=1)
    bounds = host.pack_segments(lengths, budget, prefixes)
    assert bounds == host.pack_segments_reference(lengths, budget, prefixes)
    assert bounds == sorted(set(bounds)) and bounds[0] == 0 and bounds[-1] == len(lengths)
    for begin, end in itertools.pairwise(bounds):
        held = [host.held_prefix(prefixes[number], begin)[1] for number in range(begin, end)]
        run = [length - own for length, own in zip(lengths[begin:end], held, strict=True)]
        assert sum(run) <= budget or sum(length > 0 for length in lengths[begin:end]) == 1


@settings(max_examples=min(EXAMPLES, 2000), deadline=None)
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=5), min_size=1, max_size=7), st.integers(5, 14))
def test_packing_with_shared_prefixes_is_optimal(sequences, budget):
    """Against every way to cut, and a count that knows nothing of sources."""
    cuts = itertools.chain.from_iterable(
        itertools.combinations(range(1, len(sequences)), k) for k in range(len(sequences))
    )
    ways = [[computed(sequences[a:b]) for a, b in itertools.pairwise([0, *cut, len(sequences)])] for cut in cuts]
    best = min((len(way), max(way)) for way in ways if max(way) <= budget)
    bounds = host.pack_segments(list(map(len, sequences)), budget, host.shared_prefixes(sequences, least=1))
    mine = [computed(sequences[a:b]) for a, b in itertools.pairwise(bounds)]
    assert (len(mine), max(mine)) == best


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


def test_a_core_of_other_sources_is_left_alone():
    """Its functions may take other arguments: the references answer, and `zs-fast doctor` says what to do."""
    script = """
import sys, types
import zs_fast
core = types.ModuleType("zs_fast._core")
core.INTERFACE = 1
core.pack_segments = lambda lengths, budget: 1 / 0
sys.modules["zs_fast._core"] = zs_fast._core = core
from zs_fast import doctor, host
assert host.STALE and not host.NATIVE and host.pack_segments([5, 5], 5) == [0, 1, 2]
print(doctor._compiled()["_core"]["detail"])
"""
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)
    assert "pip install -e ." in told.stdout

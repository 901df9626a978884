"""200 rows of what an answer is worth, and the scorer against a second writing of it."""

from __future__ import annotations

import math
import os
import random
import re
import string
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zs_fast.search.reward import (
    MAX_ANSWER_CHARACTERS,
    contains_answer,
    cover_match,
    exact_match,
    f1,
    normalise,
    score,
)
from zs_fast.types import Scores

EXAMPLES = int(os.environ.get("ZS_HYPOTHESIS_EXAMPLES", "200"))
Row = tuple[str, tuple[str, ...], float, float, float]
"""prediction, gold answers, F1, exact match, cover match"""

PLAIN: list[Row] = [
    ("Jane Austen", ("Jane Austen",), 1, 1, 1),
    ("jane austen", ("Jane Austen",), 1, 1, 1),
    ("  Jane   Austen \n", ("Jane Austen",), 1, 1, 1),
    ("Jane Austen.", ("Jane Austen",), 1, 1, 1),
    ('"Jane Austen!"', ("Jane Austen",), 1, 1, 1),
    ("the Jane Austen", ("Jane Austen",), 1, 1, 1),
    ("The Beatles", ("Beatles",), 1, 1, 1),
    ("a an the Beatles", ("the Beatles",), 1, 1, 1),
    ("Austen", ("Jane Austen",), 2 / 3, 0, 0),
    ("Jane", ("Jane Austen",), 2 / 3, 0, 0),
    ("Austen Jane", ("Jane Austen",), 1, 0, 0),
    ("Jane Q. Austen", ("Jane Austen",), 0.8, 0, 0),
    ("It was Jane Austen", ("Jane Austen",), 2 / 3, 0, 1),
    ("Jane Austen wrote it", ("Jane Austen",), 2 / 3, 0, 1),
    ("Jane Austen Jane Austen", ("Jane Austen",), 2 / 3, 0, 1),
    ("Jane Jane", ("Jane Austen",), 0.5, 0, 0),
    ("Charlotte Bronte", ("Jane Austen",), 0, 0, 0),
    ("", ("Jane Austen",), 0, 0, 0),
    ("   ", ("Jane Austen",), 0, 0, 0),
    ("the", ("Jane Austen",), 0, 0, 0),
    ("?!", ("Jane Austen",), 0, 0, 0),
    ("Austen", ("Jane Austen", "Austen"), 1, 1, 1),
    ("Miss Austen", ("Jane Austen", "Austen"), 2 / 3, 0, 1),
    ("x", (), 0, 0, 0),
    ("", (), 0, 0, 0),
    ("yes", ("yes",), 1, 1, 1),
    ("no", ("yes",), 0, 0, 0),
    ("yes it is", ("yes",), 0.5, 0, 1),
    ("no answer", ("noanswer",), 0, 0, 0),
    ("rock-n-roll", ("rock n roll",), 0, 0, 0),
    ("rocknroll", ("rock-n-roll",), 1, 1, 1),
    ("U.S.A.", ("USA",), 1, 1, 1),
    ("U S A", ("USA",), 0, 0, 0),
    ("O'Brien", ("OBrien",), 1, 1, 1),
    ("Another", ("other",), 0, 0, 0),
    ("theatre", ("atre",), 0, 0, 0),
    ("Anna", ("a n n a",), 0, 0, 0),
    ("x a y", ("x y",), 1, 1, 1),
    ("A", ("a b",), 0, 0, 0),
    ("vitamin a", ("vitamin",), 1, 1, 1),
]
EMPTY_GOLDS = ["", " ", "The", "the", "A", "an", "a the", "!", "?!.", "...", "-", '"', "'", "the!", "\n", "\t", "(a)"]
EMPTY_GOLDS += ["a-", "An.", "$%&"]
EMPTY: list[Row] = [(prediction, (gold,), 0, 0, 0) for gold in EMPTY_GOLDS for prediction in ("Jane Austen", "the", "")]
NUMBERS: list[Row] = [
    ("1999", ("9",), 0, 0, 0),
    ("9", ("1999",), 0, 0, 0),
    ("in 1999", ("1999",), 2 / 3, 0, 1),
    ("1,999", ("1999",), 1, 1, 1),
    ("1 999", ("1999",), 0, 0, 0),
    ("19.99", ("1999",), 1, 1, 1),
    ("3.14", ("314",), 1, 1, 1),
    ("-5", ("5",), 1, 1, 1),
    ("5%", ("5",), 1, 1, 1),
    ("$5", ("5",), 1, 1, 1),
    ("five", ("5",), 0, 0, 0),
    ("05", ("5",), 0, 0, 0),
    ("5.0", ("5",), 0, 0, 0),
    ("1e3", ("1000",), 0, 0, 0),
    ("4 July 1776", ("July 4, 1776",), 1, 0, 0),
    ("July 4th 1776", ("July 4, 1776",), 2 / 3, 0, 0),
    ("1815-12-23", ("1815",), 0, 0, 0),
    ("10 20 30", ("20",), 0.5, 0, 1),
    ("١٩٩٩", ("1999",), 0, 0, 0),
    ("１９９９", ("1999",), 0, 0, 0),
    ("Ⅳ", ("IV",), 0, 0, 0),
    ("²", ("2",), 0, 0, 0),
    ("½", ("1/2",), 0, 0, 0),
    ("1/2", ("12",), 1, 1, 1),
]
LOOKALIKES = {
    "Cyrillic a": "J\u0430ne Austen",
    "full width": "Ｊａｎｅ Austen",
    "bold mathematical": "𝐉𝐚𝐧𝐞 Austen",
    "zero width": "Ja\u200bne Austen",
    "soft hyphen": "Ja\u00adne Austen",
    "combining": "Ja\u0301ne Austen",
    "dotless": "Jane Austen".replace("e", "\u0435"),
    "BOM": "\ufeffJane Austen",
    "leet": "J4ne Austen",
    "script": "𝒥ane Austen",
}
ALIKE: list[Row] = [(text, ("Jane",), 0, 0, 0) for text in LOOKALIKES.values()]
ALIKE += [(text, ("Jane Austen",), 0 if "e" not in text.split()[-1] else 0.5, 0, 0) for text in LOOKALIKES.values()]
ALIKE += [
    ("caf\u00e9", ("cafe\u0301",), 0, 0, 0),
    ("caf\u00e9", ("cafe",), 0, 0, 0),
    ("CAFÉ", ("café",), 1, 1, 1),
    ("Straße", ("Strasse",), 0, 0, 0),
    ("STRASSE", ("Straße",), 0, 0, 0),
    ("ΣΊΣΥΦΟΣ", ("Σίσυφος",), 1, 1, 1),
    ("ﬁne", ("fine",), 0, 0, 0),
    ("Jane\u00a0Austen", ("Jane Austen",), 1, 1, 1),
    ("Jane\u2003Austen", ("Jane Austen",), 1, 1, 1),
    ("Jane\u2013Austen", ("Jane Austen",), 0, 0, 0),
    ("“Jane Austen”", ("Jane Austen",), 0, 0, 0),
    ("Jane Austen’s", ("Jane Austen",), 0.5, 0, 0),
    ("<answer>Jane Austen</answer>", ("Jane Austen",), 0, 0, 0),
]
CJK: list[Row] = [
    ("東京", ("東京",), 1, 1, 1),
    ("東京都", ("東京",), 0, 0, 0),
    ("東京", ("東京都",), 0, 0, 0),
    ("東京。", ("東京",), 0, 0, 0),
    ("東京 日本", ("東京",), 2 / 3, 0, 1),
    ("首都は東京です", ("東京",), 0, 0, 0),
    ("北京", ("北京", "Beijing"), 1, 1, 1),
    ("Beijing", ("北京", "Beijing"), 1, 1, 1),
    ("서울", ("서울",), 1, 1, 1),
    ("서울", ("\u1109\u1165\u110b\u116e\u11af",), 0, 0, 0),
    ("กรุงเทพ", ("กรุงเทพ",), 1, 1, 1),
    ("ירושלים", ("ירושלים",), 1, 1, 1),
]
CITIES = [f"city{index}" for index in range(40)]
SHOTGUN: list[Row] = [
    (" ".join(CITIES[:count]), (CITIES[0],), 2 / (count + 1), float(count == 1), 1) for count in range(1, 41)
]
PADDED: list[Row] = [
    (" ".join(["filler"] * count + ["Jane Austen"]), ("Jane Austen",), 4 / (count + 4), float(count == 0), 1)
    for count in range(11)
]
ROWS = PLAIN + EMPTY + NUMBERS + ALIKE + CJK + SHOTGUN + PADDED


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0][:20]!a}-{'|'.join(row[1])[:20]!a}")
def test_an_answer_is_worth(row: Row) -> None:
    prediction, answers, word_f1, exact, cover = row
    assert f1(prediction, answers) == pytest.approx(word_f1, abs=1e-12)
    assert exact_match(prediction, answers) == exact
    assert cover_match(prediction, answers) == cover


def test_the_table_has_200_rows() -> None:
    assert len(ROWS) >= 200


def test_no_answer_scores_nothing() -> None:
    assert score(None, ("Jane Austen",)) == Scores(f1=0.0, exact_match=0.0, cover_match=0.0)
    assert score("Jane Austen", ("Jane Austen",)) == Scores(f1=1.0, exact_match=1.0, cover_match=1.0)


def test_only_the_start_of_a_very_long_answer_is_scored() -> None:
    assert score("x" * MAX_ANSWER_CHARACTERS + " Jane Austen", ("Jane Austen",)).cover_match == 0.0
    assert score("x " * 100 + "Jane Austen", ("Jane Austen",)).cover_match == 1.0


def test_contains_answer_looks_at_whole_words_of_one_document() -> None:
    assert contains_answer(["no", "It was by JANE  Austen, in 1815."], ("Jane Austen",))
    assert not contains_answer(["Jane", "Austen"], ("Jane Austen",))
    assert not contains_answer(["1999"], ("9",))
    assert not contains_answer(["anything"], ("The", "!"))
    assert not contains_answer([], ("x",))


def second_words(text: str) -> list[str]:
    """SQuAD's normalisation, written from its description."""
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"(?<!\w)(a|an|the)(?!\w)", " ", kept).split()


def second_f1(prediction: str, gold: str) -> float:
    """The same measure through precision and recall."""
    left, right = second_words(prediction), second_words(gold)
    common = Counter(left) & Counter(right)
    same = sum(common.values())
    if same == 0:
        return 0.0
    precision, recall = same / len(left), same / len(right)
    return 2 * precision * recall / (precision + recall)


texts = st.text(st.sampled_from("ab theAN'.-!９é東\u0301\n\u200b "), max_size=40) | st.text(max_size=40)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES <= 300)
@given(prediction=texts, answers=st.lists(texts, max_size=4))
def test_scores_are_finite_and_in_order(prediction: str, answers: list[str]) -> None:
    scores = score(prediction, answers)
    for value in (scores.f1, scores.exact_match, scores.cover_match):
        assert math.isfinite(value) and 0.0 <= value <= 1.0
    assert scores.exact_match <= scores.cover_match, "what equals a gold answer also holds it"
    assert scores.exact_match <= scores.f1 + 1e-12
    assert scores.f1 == pytest.approx(max((second_f1(prediction, gold) for gold in answers), default=0.0))
    assert normalise(normalise(prediction)) == normalise(prediction)


def test_ten_thousand_random_pairs_score_as_squads_measure_has_them() -> None:
    """Pairs of a few common words, so that most overlap in part: F1 and exact match against the second writing."""
    draws = random.Random(0)
    words = [
        "the",
        "The",
        "a",
        "an",
        "Jane",
        "jane",
        "Austen",
        "austen,",
        "U.S.",
        "us",
        "1999",
        "19.99",
        "東京",
        "é",
        "-",
    ]
    partial = equal = 0
    for _ in range(10_000):
        prediction, gold = (" ".join(draws.choices(words, k=draws.randrange(7))) for _ in range(2))
        if draws.random() < 0.1:
            prediction = f" {gold.upper()}!"
        expected = second_f1(prediction, gold)
        same = second_words(prediction) == second_words(gold) != []
        assert f1(prediction, (gold,)) == pytest.approx(expected, abs=1e-12), (prediction, gold)
        assert exact_match(prediction, (gold,)) == float(same), (prediction, gold)
        partial += 0.0 < expected < 1.0
        equal += same
    assert partial > 3000 and equal > 500


@pytest.mark.parametrize("unit", ["a ", "the ", "x", "x ", "!", "Jane Austen ", "a", "\n"])
def test_a_megabyte_document_is_searched_in_linear_time(unit: str) -> None:
    times = []
    for size in (125_000, 1_000_000):
        document, gold = unit * (size // len(unit)), (unit * 50 + " y").strip()
        best = float("inf")
        for _ in range(3):
            start = time.process_time()
            contains_answer([document], (gold, "Jane Austen Jane"))
            best = min(best, time.process_time() - start)
        times.append(best)
    assert times[1] <= 24 * max(times[0], 1e-3), times

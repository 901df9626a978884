"""How an answer is scored: word F1 (the reward, if not told otherwise), exact match and cover match, each against the
best gold answer.

Only the text of the answer that ended the trajectory is ever scored: not the prompt, not a document, not an answer
that was thought about. No answer scores 0. A gold answer in which normalisation leaves nothing never matches.

Normalisation is SQuAD's: lower case, ASCII punctuation removed, the words a, an, the removed, spaces collapsed. There
is no Unicode folding: full-width or look-alike letters differ from plain ones. Yes, no and noanswer get no special
rule. Source of the F1: arXiv:2505.04588, section 3.5.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from zs_fast.errors import ConfigError
from zs_fast.search.own_code import load_function
from zs_fast.types import Scores, Trajectory

MAX_ANSWER_CHARACTERS = 4096
"""Only this many characters at the start of an answer are scored."""

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """The text as its compared words, separated by single spaces. `normalise("The  Beatles!") == "beatles"`."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Word F1 with the best of `answers`: 2 * shared / (words in prediction + words in gold), in [0, 1]."""
    return _best(_word_f1(normalise(prediction).split(), gold.split()) for gold in _golds(answers))


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the normalised prediction equals any normalised gold answer, else 0.0."""
    return float(normalise(prediction) in _golds(answers))


def cover_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the words of any gold answer stand side by side in the prediction, else 0.0. `9` is not in `1999`."""
    words = f" {normalise(prediction)} "
    return float(any(f" {gold} " in words for gold in _golds(answers)))


def score(answer: str | None, answers: Sequence[str]) -> Scores:
    """The scores of a trajectory's terminating answer; None (no answer) scores 0 in all."""
    if answer is None:
        return Scores()
    prediction = answer[:MAX_ANSWER_CHARACTERS]
    return Scores(
        f1=f1(prediction, answers),
        exact_match=exact_match(prediction, answers),
        cover_match=cover_match(prediction, answers),
    )


def reward_of(name: str) -> Callable[[Trajectory], float]:
    """The reward that `game.reward` names: one of the scores, or a function of somebody's own, whose result is checked.

    Raises PreflightError where there is no such function; the reward raises ConfigError for what is no finite number.
    """
    if ":" not in name:
        return lambda trajectory: float(getattr(trajectory.scores, name))
    function = load_function(name, setting="game.reward")

    def reward(trajectory: Trajectory) -> float:
        value = function(trajectory)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(
                f"game.reward {name} gave {value!r} for question {trajectory.question.id!r}, sample "
                f"{trajectory.sample}. A reward is a finite int or float."
            )
        return float(value)

    return reward


def tells_nothing(answers: Sequence[str]) -> bool:
    """Is the answer a yes or no, which may stand in any document without answering anything?"""
    return normalise(answers[0]) in ("yes", "no")


def contains_answer(documents: Sequence[str], answers: Sequence[str]) -> bool:
    """Do the words of any gold answer stand side by side in any one document?"""
    return any(cover_match(document, answers) > 0.0 for document in documents)


def _golds(answers: Sequence[str]) -> list[str]:
    return [gold for answer in answers if (gold := normalise(answer))]


def _best(values: Iterable[float]) -> float:
    return max(values, default=0.0)


def _word_f1(prediction: list[str], gold: list[str]) -> float:
    shared = sum((Counter(prediction) & Counter(gold)).values())
    return 2.0 * shared / (len(prediction) + len(gold)) if shared else 0.0

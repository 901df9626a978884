"""How often search results are noisy at a given step."""

from __future__ import annotations

import math

from zs_fast.config import CurriculumConfig


def noise_probability(step: int, curriculum: CurriculumConfig, train_steps: int) -> float:
    """Chance that a simulated search result is noisy in `step`, counted from 1 (the first step of a run is 1).

    p = start + (base^(step / total) - 1) / (base - 1) * (end - start), with total = `curriculum.total_steps`, or
    `train_steps` where that is 0. Held at `end` after `total` steps, at `start` before the first. Base 1 is the
    straight line, the formula's limit. Source: arXiv:2505.04588, equation 1.
    """
    total = curriculum.total_steps or train_steps
    progress = min(max(step / total, 0.0), 1.0) if total > 0 else 1.0
    growth = math.log(curriculum.base)
    # expm1 keeps the quotient exact for a base just above 1, where base - 1 loses its digits.
    share = math.expm1(progress * growth) / math.expm1(growth) if growth > 0.0 else progress
    return curriculum.start + min(max(share, 0.0), 1.0) * (curriculum.end - curriculum.start)

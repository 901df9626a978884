from __future__ import annotations

import pytest

from zs_fast.config import CurriculumConfig
from zs_fast.search.curriculum import noise_probability


@pytest.mark.parametrize("step, expected", [(1, 0.001), (50, 0.068), (101, 0.166), (150, 0.298), (202, 0.495)])
def test_published_schedule(step: int, expected: float) -> None:
    """Start 0, end 0.5, base 4 over 203 steps, to the three digits of the reference."""
    assert round(noise_probability(step, CurriculumConfig(start=0.0, end=0.5), 203), 3) == expected


def test_formula_digit_for_digit() -> None:
    config = CurriculumConfig(start=0.25, end=0.75, base=4.0)
    for step in range(1, 101):
        expected = 0.25 + (4.0 ** (step / 100) - 1) / (4.0 - 1) * (0.75 - 0.25)
        assert noise_probability(step, config, 100) == pytest.approx(expected, abs=1e-12)


def test_held_at_both_ends() -> None:
    config = CurriculumConfig(start=0.1, end=0.5, total_steps=10)
    assert noise_probability(0, config, 99) == noise_probability(-5, config, 99) == 0.1
    assert noise_probability(10, config, 99) == noise_probability(1000, config, 99) == 0.5


def test_own_total_wins_over_the_runs() -> None:
    assert noise_probability(5, CurriculumConfig(total_steps=5), 100) == 0.5
    assert noise_probability(5, CurriculumConfig(total_steps=0), 100) < 0.05


def test_base_one_is_the_straight_line_and_a_base_near_it_is_close() -> None:
    line = [noise_probability(step, CurriculumConfig(base=1.0), 20) for step in range(21)]
    assert line == pytest.approx([0.5 * step / 20 for step in range(21)])
    near = [noise_probability(step, CurriculumConfig(base=1.0 + 1e-12), 20) for step in range(21)]
    assert near == pytest.approx(line, abs=1e-9)


def test_falling_noise_is_allowed_and_stays_between() -> None:
    config = CurriculumConfig(start=0.8, end=0.2)
    values = [noise_probability(step, config, 50) for step in range(60)]
    assert values == sorted(values, reverse=True) and values[0] == 0.8 and values[-1] == pytest.approx(0.2)

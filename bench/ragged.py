"""A ragged batch of trajectories as played games have them: lengths alone, committed as bench/traces/ragged_32.json.

`python -m bench.ragged` draws it again: questions of about 150 tokens, 0 to 5 searches, and log-normal segments (mean
150 tokens written, 250 observed, none above 500). 32 trajectories are 4 questions, 8 times each. The seed is the first
from 0 with which padding micro batches of 8 takes about 1.6 times the tokens (1.55 to 1.7).
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zs_fast.config import AlgorithmConfig
from zs_fast.learn.batch import ScoredBatch, TrainBatch
from zs_fast.learn.pack import pack
from zs_fast.types import (
    Answer,
    Completion,
    FinishReason,
    Group,
    Question,
    Role,
    Search,
    StopReason,
    Trajectory,
    Turn,
)

PATH = Path(__file__).with_name("traces") / "ragged_32.json"
SEED, QUESTIONS, GROUP_SIZE = 1, 4, 8
MOST_SEARCHES, CAP, SIGMA = 5, 500, 0.6
MEANS = {"written": 150.0, "observed": 250.0}


@dataclass(frozen=True, slots=True)
class Lengths:
    """One trajectory: tokens of the prompt, and of what was written and then observed in each turn."""

    prompt: int
    turns: tuple[tuple[int, int], ...]

    @property
    def completion(self) -> int:
        return sum(written + observed for written, observed in self.turns)

    @property
    def written(self) -> int:
        return sum(written for written, _ in self.turns)

    def scaled(self, divisor: int) -> Lengths:
        """Every length divided, rounded up: the spread stays."""
        turns = tuple((math.ceil(written / divisor), math.ceil(observed / divisor)) for written, observed in self.turns)
        return Lengths(math.ceil(self.prompt / divisor), turns)


def draw(seed: int = SEED) -> list[list[Lengths]]:
    """[question][sample]"""
    draws = random.Random(seed)

    def segment(kind: str) -> int:
        mean = math.log(MEANS[kind]) - SIGMA**2 / 2
        return max(1, min(CAP, round(draws.lognormvariate(mean, SIGMA))))

    groups = []
    for _ in range(QUESTIONS):
        prompt = draws.randint(140, 160)
        group = []
        for _ in range(GROUP_SIZE):
            searches = draws.randint(0, MOST_SEARCHES)
            turns = [(segment("written"), segment("observed")) for _ in range(searches)]
            group.append(Lengths(prompt, (*turns, (segment("written"), 0))))
        groups.append(group)
    return groups


def as_json(groups: list[list[Lengths]]) -> dict[str, Any]:
    return {
        "made_by": "python -m bench.ragged",
        "seed": SEED,
        "groups": [[{"prompt": one.prompt, "turns": [list(turn) for turn in one.turns]} for one in g] for g in groups],
    }


def read(path: Path = PATH) -> list[list[Lengths]]:
    """The committed trace."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    return [
        [Lengths(one["prompt"], tuple((written, observed) for written, observed in one["turns"])) for one in group]
        for group in stored["groups"]
    ]


def padded_tokens(trajectories: list[Lengths], micro_batch: int) -> int:
    """Tokens of padded micro batches: prompts to the longest prompt of each, completions to the longest completion."""
    parts = [trajectories[start : start + micro_batch] for start in range(0, len(trajectories), micro_batch)]
    return sum(len(part) * (max(t.prompt for t in part) + max(t.completion for t in part)) for part in parts)


def play(groups: list[list[Lengths]], vocabulary: int, seed: int = 0) -> list[Group]:
    """Trajectories of these lengths, with random ids and rewards."""
    draws = random.Random(seed)

    def ids(number: int) -> tuple[int, ...]:
        return tuple(draws.randrange(vocabulary) for _ in range(number))

    def turn(written: int, observed: int) -> Turn:
        completion = Completion(
            request_id=0, role=Role.POLICY, token_ids=ids(written), logprobs=(), finish_reason=FinishReason.STOP
        )
        action = Search("query") if observed else Answer("answer")
        return Turn(completion=completion, action=action, observation_ids=ids(observed))

    played = []
    for number, group in enumerate(groups):
        question = Question(id=f"q{number}", text="?", answers=("a",), source="bench")
        prompt = ids(group[0].prompt)
        trajectories = tuple(
            Trajectory(
                question=question,
                sample=sample,
                prompt_ids=prompt,
                turns=tuple(turn(*lengths) for lengths in one.turns),
                stop_reason=StopReason.ANSWER,
                reward=draws.random(),
            )
            for sample, one in enumerate(group)
        )
        played.append(Group(question=question, trajectories=trajectories))
    return played


def train_batch(groups: list[Group], *, token_budget: int, device: str) -> TrainBatch:
    """The batch of a step with a single update and no KL term; advantages are rewards less their group's mean."""
    packed = pack(groups, token_budget=token_budget).to(device)
    rewards = [torch.tensor([t.reward for t in group.trajectories]) for group in groups]
    advantages = torch.cat([values - values.mean() for values in rewards])
    per_token = advantages.to(device)[packed.sequence] * packed.loss_mask
    return TrainBatch(
        scored=ScoredBatch(packed=packed, old_logprobs=None, ref_logprobs=None),
        advantages=per_token,
        sequence_advantages=advantages,
        dead_groups=torch.zeros(len(groups), dtype=torch.bool),
        kl_coefficient=0.0,
    )


ALGORITHM = AlgorithmConfig(name="grpo", kl_coefficient=0.0)
"""Clipped ratios, a mean over the step's loss tokens: what TRL calls `dapo` (its default) at 0.2 on both sides."""


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(json.dumps(as_json(draw())) + "\n", encoding="utf-8")

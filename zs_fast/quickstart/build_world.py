"""Write the quickstart's world: `python -m zs_fast.quickstart.build_world`. Same files every time.

world/passages.jsonl   every entity's facts, for the real retriever
world/train.jsonl      questions to train on, half of them two-hop
world/heldout.jsonl    questions to judge by, half of them two-hop; no answer of theirs is an answer in train.jsonl
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from zs_fast.quickstart.world import World, WorldQuestion, make_world

FOLDER = Path(__file__).parent / "world"
TRAIN_QUESTIONS = 800
HELDOUT_QUESTIONS = 400


def build_world() -> World:
    return make_world(random.Random("zs_fast quickstart world"), people=300, towns=80, companies=80, books=80)


def split_questions(world: World, draws: random.Random) -> tuple[list[WorldQuestion], list[WorldQuestion]]:
    """(train, held out): half one-hop, half two-hop each; split by answer, so that no answer is in both."""
    answers = sorted(entity.name for kind in ("person", "town") for entity in world.of_kind(kind))
    heldout_answers = set(draws.sample(answers, len(answers) // 2))
    questions = world.all_questions(draws)
    draws.shuffle(questions)

    def half_and_half(pool: Sequence[WorldQuestion], count: int) -> list[WorldQuestion]:
        chosen = [q for hops in (1, 2) for q in [q for q in pool if len(q.hops) == hops][: count // 2]]
        if len(chosen) != count:
            raise ValueError(f"the world is too small: {len(chosen)} of {count} questions")
        draws.shuffle(chosen)
        return chosen

    train = half_and_half([q for q in questions if q.answer not in heldout_answers], TRAIN_QUESTIONS)
    heldout = half_and_half([q for q in questions if q.answer in heldout_answers], HELDOUT_QUESTIONS)
    return train, heldout


def _write(path: Path, rows: Iterable[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    world = build_world()
    draws = random.Random("zs_fast quickstart questions")
    train, heldout = split_questions(world, draws)
    for name, questions in (("train", train), ("heldout", heldout)):
        rows = [
            {
                "id": f"{name}_{number}",
                "question": question.text,
                "golden_answers": [question.answer],
                "data_source": f"quickstart_{'one' if len(question.hops) == 1 else 'two'}_hop",
            }
            for number, question in enumerate(questions)
        ]
        _write(FOLDER / f"{name}.jsonl", rows)
    names = sorted(world.entities)
    draws.shuffle(names)
    passages = ({"id": str(i), "text": world.passage(name, draws)} for i, name in enumerate(names))
    _write(FOLDER / "passages.jsonl", passages)


if __name__ == "__main__":
    main()

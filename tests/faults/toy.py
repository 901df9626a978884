"""The smallest run that goes through the whole loop: rollout with searches, score, update, metrics, journal,
checkpoint. About a sixth of a CPU second a step."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from zs_fast.config import RunConfig
from zs_fast.recipe_files import load_recipe

COMPARED = ("metrics.jsonl", "rollouts.jsonl")


def toy(output: Path, steps: int, **overrides: object) -> RunConfig:
    small: dict[str, object] = {
        "output": output,
        "simulator.kind": "bm25",
        "train.steps": steps,
        "train.questions_per_step": 1,
        "train.group_size": 2,
        "train.learning_rate": 1e-5,
        "train.save_every": 0,
        "game.max_turns": 2,
        "game.max_new_tokens": 40,
        "game.max_observation_tokens": 48,
        "eval.data": "",
        "engine.slots": 4,
        "threads": 1,
    }
    return load_recipe(["quickstart"], {key: [str(value)] for key, value in (small | overrides).items()})


def outcome(run: Path, steps: int) -> dict[str, str]:
    """sha256 of all that must not differ between two runs of one seed."""
    last = run / "checkpoints" / f"step_{steps}"
    paths = [*(run / name for name in COMPARED), last / "model" / "model.safetensors", last / "trainer.safetensors"]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def chat_reply(body: bytes) -> bytes:
    """A simulator's reply that is a function of the request alone."""
    number = int.from_bytes(hashlib.sha256(body).digest()[:4], "big")
    documents = "\n".join(f"Doc {place}: fact {number % 97 + place} of the world" for place in range(1, 6))
    message: dict[str, Any] = {"role": "assistant", "content": documents}
    return json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()

"""Many prompts at once through an engine, replies in the order of the prompts."""

from __future__ import annotations

import time
from collections.abc import Sequence

from zs_fast.rollout.engine import Engine
from zs_fast.rollout.play import IDLE_SLEEP_S, Progress
from zs_fast.types import Completion, Role, Sampling


def ask(
    engine: Engine,
    role: Role,
    prompts: Sequence[list[int]],
    sampling: Sequence[Sampling],
    *,
    on_progress: Progress | None = None,
) -> list[Completion]:
    """The completion of each prompt. The engine must have no other requests. Raises EngineError for a prompt that can't
    fit; a request that the engine gave up comes back FAILED."""
    for number, (prompt, how) in enumerate(zip(prompts, sampling, strict=True)):
        engine.add(number, prompt, how, role=role)
    found: dict[int, Completion] = {}
    while len(found) < len(prompts):
        started = time.monotonic()
        completions = engine.step()
        found |= {completion.request_id: completion for completion in completions}
        if completions and on_progress is not None:
            on_progress(len(found), len(prompts))
        if not completions and time.monotonic() - started < IDLE_SLEEP_S:
            time.sleep(IDLE_SLEEP_S)  # a remote engine: others do the work
    return [found[number] for number in range(len(prompts))]

"""Every random draw of a run, as one pure function of what the draw is for. No global generator, never the rank.

Two draws share a seed only if all of (run_seed, step, question_id, sample, turn, role, purpose) agree, so that a
resumed run, another batch order or another number of processes draws the same numbers.
"""

from __future__ import annotations

import hashlib


def seed_for(
    run_seed: int,
    *,
    step: int = 0,
    question_id: str = "",
    sample: int = 0,
    turn: int = 0,
    role: str = "",
    purpose: str = "",
) -> int:
    """A 63-bit seed for one draw. The same arguments give the same seed on every machine and Python version."""
    key = "\x1f".join((str(run_seed), str(step), question_id, str(sample), str(turn), str(role), purpose))
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniform(seed: int, counter: int = 0) -> float:
    """A number in [0, 1) with 53 random bits: the `counter`-th draw of `seed`'s stream."""
    digest = hashlib.blake2b(f"{seed}\x1f{counter}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53

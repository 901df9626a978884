"""The scheduler alone, without a model: who gets a slot, what goes into a forward, what is kept and what is not."""

from __future__ import annotations

import pytest

from zs_fast.errors import EngineError
from zs_fast.rollout.scheduler import LEAST_SHARED, PIECE_TOKENS, PREFILL_TOKENS, Request, Scheduler
from zs_fast.types import Role, Sampling

Scheduled = list[tuple[Request, list[tuple[int, int]]]]


def scheduler(num_slots: int) -> Scheduler:
    return Scheduler(Role.POLICY, num_slots)


def add(queue: Scheduler, request_id: int, length: int, salt: str | None = None) -> None:
    queue.add(request_id, list(range(length)), Sampling(max_new_tokens=8), salt, 0)


def computed(scheduled: Scheduled) -> Scheduled:
    """What the engine does with the pieces: their keys and values are there now."""
    for request, pieces in scheduled:
        for start, end in pieces:
            request.context.token_ids.extend(request.token_ids(start, end))
            request.context.bounds.append(end)
    return scheduled


def sampled(request: Request) -> None:
    request.sampled_ids.append(7)
    request.plan.append((request.num_tokens - 1, request.num_tokens))


def ids(scheduled: Scheduled) -> list[int]:
    return [request.request_id for request, _ in scheduled]


def test_slots_in_order_of_arrival_and_again_when_they_are_free():
    queue = scheduler(2)
    for number in range(3):
        add(queue, number, 4)
    assert (queue.num_unfinished, queue.num_waiting) == (3, 3)
    first = computed(queue.next_pieces())
    assert ids(first) == [0, 1] and queue.num_waiting == 1
    assert [pieces for _, pieces in first] == [[(0, 4)], [(0, 4)]]
    assert {request.context.slot for request, _ in first} == {0, 1}
    freed = first[0][0].context.slot
    queue.finish(first[0][0])
    ((third, _),) = queue.next_pieces()
    assert third.request_id == 2 and third.context.slot == freed
    assert (queue.num_unfinished, queue.num_waiting) == (2, 0)


def test_a_long_prompt_is_cut_and_does_not_hold_up_decoding():
    queue = scheduler(2)
    add(queue, 0, 4)
    ((short, _),) = computed(queue.next_pieces())
    length = PREFILL_TOKENS + PIECE_TOKENS
    add(queue, 1, length)
    rounds = []
    while not rounds or rounds[-1][-1][1] != length:
        sampled(short)
        scheduled = dict(computed(queue.next_pieces()))
        assert scheduled[short] == [(short.num_tokens - 1, short.num_tokens)]
        rounds.append(next(pieces for request, pieces in scheduled.items() if request is not short))
        assert sum(end - start for start, end in rounds[-1]) <= PREFILL_TOKENS
    pieces = [piece for part in rounds for piece in part]
    assert len(rounds) == 2 and [start for start, _ in pieces] == [0, *(end for _, end in pieces[:-1])]
    assert max(end - start for start, end in pieces) == PIECE_TOKENS
    assert queue.counts["prefill_tokens"] == 4 + length


def test_a_kept_context_computes_only_what_is_new():
    queue = scheduler(2)
    add(queue, 0, 10, "a")
    ((turn, _),) = computed(queue.next_pieces())
    queue.finish(turn)
    add(queue, 1, 16, "a")
    assert [pieces for _, pieces in queue.next_pieces()] == [[(10, 16)]]
    assert queue.counts == {"prefill_tokens": 16, "reused_tokens": 10, "recomputed_tokens": 0, "evictions": 0}


def test_who_may_evict_whom():
    queue = scheduler(2)
    for number, salt in enumerate("ab"):
        add(queue, number, 10, salt)
    kept = [request for request, _ in computed(queue.next_pieces())]
    queue.finish(kept[1])
    queue.next_pieces()
    queue.finish(kept[0])
    add(queue, 2, 5)
    add(queue, 3, 5)
    assert ids(computed(queue.next_pieces())) == [2], "a new one evicts only below half of the slots"
    assert kept[1].context.slot is None and kept[0].context.slot is not None, "the least recently used of two as long"
    add(queue, 4, 12, "b")
    assert ids(queue.next_pieces()) == [4], "one that was begun goes before, and may evict"
    assert queue.counts["evictions"] == 2 and queue.num_waiting == 1
    assert queue.counts["recomputed_tokens"] == 10, "what it had computed before its slot went"


def test_the_shortest_context_goes_first():
    queue = scheduler(3)
    for number, (salt, length) in enumerate(zip("abc", (30, 10, 20), strict=True)):
        add(queue, number, length, salt)
    kept = [request for request, _ in computed(queue.next_pieces())]
    for request in kept:
        queue.finish(request)
        queue.next_pieces()
    add(queue, 3, 5)
    queue.next_pieces()
    assert [request.context.slot is None for request in kept] == [False, True, False]


def test_new_weights_make_a_running_request_compute_everything_again():
    queue = scheduler(1)
    add(queue, 0, 10, "a")
    ((request, _),) = computed(queue.next_pieces())
    sampled(request)
    queue.forget_kv()
    assert queue.next_pieces() == [(request, [(0, 10), (10, 11)])]
    assert queue.counts["recomputed_tokens"] == 10


def test_an_ended_context_gives_its_slot_back():
    queue = scheduler(1)
    add(queue, 0, 4, "a")
    ((request, _),) = computed(queue.next_pieces())
    queue.end("a")
    assert request.context.slot == 0, "not while it runs"
    queue.finish(request)
    assert request.context.slot is None
    queue.end("never seen")


def test_one_request_at_a_time():
    queue = scheduler(2)
    add(queue, 0, 4, "a")
    with pytest.raises(EngineError, match="added twice"):
        add(queue, 0, 4)
    with pytest.raises(EngineError, match="cache_salt 'a', whose last request is unfinished"):
        add(queue, 1, 4, "a")
    assert queue.num_unfinished == 1


def test_an_aborted_request_is_gone_and_its_context_is_free_for_another():
    queue = scheduler(1)
    add(queue, 0, 10, "a")
    add(queue, 1, 4)
    computed(queue.next_pieces())
    queue.abort(1)
    queue.abort(0)
    queue.abort(7)
    assert (queue.num_unfinished, queue.num_waiting) == (0, 0) and queue.next_pieces() == []
    add(queue, 0, 12, "a")
    assert [pieces for _, pieces in queue.next_pieces()] == [[(10, 12)]], "what was computed is still right"
    queue.abort(0)
    queue.end("a")
    add(queue, 2, 4)
    assert ids(queue.next_pieces()) == [2]


def sharing(num_slots: int) -> tuple[Scheduler, list[tuple[int, int, int]]]:
    copies: list[tuple[int, int, int]] = []
    return Scheduler(Role.POLICY, num_slots, lambda *copied: copies.append(copied)), copies


def test_a_group_computes_its_prompt_once():
    queue, copies = sharing(4)
    for number in range(3):
        add(queue, number, 100, f"sample {number}")
    ((first, pieces),) = computed(queue.next_pieces())
    assert pieces == [(0, 100)] and queue.num_waiting == 2, "the others wait for it"
    sampled(first)
    others = computed(queue.next_pieces())[1:]
    assert ids(others) == [1, 2] and [pieces for _, pieces in others] == [[(99, 100)]] * 2
    slots = [request.context.slot for request, _ in others]
    assert copies == [(first.context.slot, slots[0], 99), (first.context.slot, slots[1], 99)]
    assert [request.context.token_ids for request, _ in others] == [list(range(100))] * 2
    assert (queue.counts["prefill_tokens"], queue.counts["reused_tokens"]) == (102, 198)


def test_the_longest_beginning_that_some_slot_holds_is_copied():
    queue, copies = sharing(4)
    tail = [1000, 1001]
    for number, prompt in enumerate([list(range(20)), [*range(40), *tail], list(range(60))]):
        queue.add(number, prompt, Sampling(max_new_tokens=8), f"context {number}", 0)
        for request, _ in computed(queue.next_pieces()):
            queue.finish(request)
    copies.clear()
    queue.add(3, [*range(40), 2000], Sampling(max_new_tokens=8), None, 0)
    ((request, pieces),) = queue.next_pieces()
    assert pieces == [(40, 41)] and [copied for *_, copied in copies] == [40]
    queue.add(4, [*range(LEAST_SHARED - 1), 2000], Sampling(max_new_tokens=8), None, 0)
    queue.finish(request)
    ((request, pieces),) = queue.next_pieces()
    assert pieces == [(0, LEAST_SHARED)] and len(copies) == 1, "too few to be worth a copy"


def test_what_a_free_slot_holds_serves_its_next_owner():
    queue, copies = sharing(1)
    add(queue, 0, 50)
    ((first, _),) = computed(queue.next_pieces())
    queue.finish(first)
    queue.add(1, [*range(30), 7, 8], Sampling(max_new_tokens=8), None, 0)
    ((second, pieces),) = computed(queue.next_pieces())
    assert pieces == [(30, 32)] and copies == [], "the slot itself: nothing to copy"
    queue.finish(second)
    queue.add(2, list(range(50)), Sampling(max_new_tokens=8), None, 0)
    ((_, pieces),) = queue.next_pieces()
    assert pieces == [(30, 50)], "the second one wrote over the rest"


def test_nothing_is_copied_from_before_new_weights():
    queue, copies = sharing(2)
    add(queue, 0, 50)
    ((first, _),) = computed(queue.next_pieces())
    queue.finish(first)
    add(queue, 1, 50, "kept")
    ((kept, _),) = computed(queue.next_pieces())
    queue.finish(kept)
    copies.clear()
    queue.forget_kv()
    add(queue, 2, 50)
    assert [pieces for _, pieces in queue.next_pieces()] == [[(0, 50)]] and copies == []


def test_an_evicted_context_takes_back_what_others_hold():
    queue, copies = sharing(1)
    add(queue, 0, 40, "a")
    ((first, _),) = computed(queue.next_pieces())
    queue.finish(first)
    queue.add(1, [*range(30), 7], Sampling(max_new_tokens=8), "b", 0)
    ((second, pieces),) = computed(queue.next_pieces())
    assert pieces == [(30, 31)] and first.context.slot is None
    queue.finish(second)
    add(queue, 2, 45, "a")
    ((_, pieces),) = queue.next_pieces()
    assert pieces == [(30, 40), (40, 45)] and copies == []
    assert queue.counts["recomputed_tokens"] == 10


def test_sharing_can_be_turned_off():
    queue, copies = sharing(2)
    queue.shares_prefixes = False
    add(queue, 0, 50)
    add(queue, 1, 50)
    assert [pieces for _, pieces in queue.next_pieces()] == [[(0, 50)], [(0, 50)]] and copies == []


def test_a_request_that_is_given_up_holds_nobody_up():
    queue, _ = sharing(2)
    add(queue, 0, PREFILL_TOKENS + PIECE_TOKENS)
    add(queue, 1, PREFILL_TOKENS + PIECE_TOKENS)
    assert ids(computed(queue.next_pieces())) == [0]
    queue.abort(0)
    ((other, pieces),) = computed(queue.next_pieces())
    assert other.request_id == 1 and pieces[0][0] == PREFILL_TOKENS, "what was computed up to then is there"

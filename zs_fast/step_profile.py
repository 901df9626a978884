"""One step looked at closely: who computed when, what each trajectory and request waited for, and why nobody worked.

Built at the start of a step, it listens until `finish`; a run without one is told nothing and measures nothing. It
reads clocks and counts alone, so a step gives the same bits with it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from zs_fast.learn.batch import MicroBatch
from zs_fast.learn.micro_step import MicroSteps
from zs_fast.learn.roles import Roles
from zs_fast.learn.update import Updater
from zs_fast.rollout.play import Player
from zs_fast.rollout.transformers_engine import TransformersEngine
from zs_fast.rollout.watch import Row, TrajectoryName, Wait
from zs_fast.system.memory import Memory, Phase
from zs_fast.system.trace_events import Span, TraceEvents, common, seconds, without
from zs_fast.types import Role

PLAYERS = (Role.POLICY, Role.SIMULATOR)
WAITS = {Wait.POLICY: "policy", Wait.SEARCH: "waits for documents", Wait.OTHERS: "over, waits for others"}


class Forward(NamedTuple):
    """One forward of a role, sampling included."""

    span: Span
    rows: Sequence[Row]


class Pass(NamedTuple):
    """One micro batch, scored or learnt from."""

    name: str
    span: Span
    num_tokens: int


@dataclass(slots=True)
class Request:
    """One of an engine's."""

    role: Role
    request_id: int
    num_prompt_tokens: int
    added: float
    begun: float | None = None
    """Start of the first forward it was part of."""
    prefilled: float | None = None
    """End of the forward that made its first token."""
    computed_s: float = 0.0
    """Of forwards it was part of."""
    finished: float | None = None
    num_tokens: int = 0


@dataclass(slots=True)
class Waiting:
    """A stretch of a trajectory's time."""

    wait: Wait
    turn: int
    since: float
    request: Request | None = None
    until: float | None = None


@dataclass(slots=True, eq=False)
class StepProfile:
    """What was seen of one step. Makes itself the watcher of everything it is given."""

    step: int
    player: Player
    engine: object
    """Forwards and single requests are seen of the embedded one alone."""
    memory: Memory
    roles: Roles
    updater: Updater
    phases: dict[Phase, Span] = field(default_factory=dict)
    forwards: dict[Role, list[Forward]] = field(default_factory=lambda: {role: [] for role in PLAYERS})
    requests: list[Request] = field(default_factory=list)
    trajectories: dict[TrajectoryName, list[Waiting]] = field(default_factory=dict)
    passes: dict[Role, list[Pass]] = field(default_factory=dict)
    _open: dict[tuple[Role, int], Request] = field(default_factory=dict)
    _asking: dict[int, Waiting] = field(default_factory=dict)
    """By the policy's request: stretches whose request has not been added yet."""

    def __post_init__(self) -> None:
        self.player.watcher = self
        self.memory.watch = self._on_phase
        if isinstance(self.engine, TransformersEngine):
            self.engine.watcher = self
        for role, name, passes in self._passes():
            passes.watch = partial(self._on_pass, role, name)

    def finish(self, folder: Path) -> str:
        """Stop listening, write `profile_step_N.json`, and return its summary as lines for a person."""
        self.player.watcher = None
        self.memory.watch = None
        if isinstance(self.engine, TransformersEngine):
            self.engine.watcher = None
        for _, _, passes in self._passes():
            passes.watch = None
        summary = self.summary()
        path = folder / f"profile_step_{self.step}.json"
        self._events().write(path, summary)
        return render(summary, path)

    # What the watched ones tell.

    def waits(self, trajectory: TrajectoryName, wait: Wait, *, turn: int, request_id: int | None = None) -> None:
        now = time.perf_counter()
        known = self.trajectories.setdefault(trajectory, [])
        if known:
            known[-1].until = now
        known.append(Waiting(wait, turn, now))
        if request_id is not None:
            self._asking[request_id] = known[-1]

    def added(self, role: Role, request_id: int, num_prompt_tokens: int) -> None:
        request = Request(role, request_id, num_prompt_tokens, time.perf_counter())
        self.requests.append(request)
        self._open[role, request_id] = request
        if role is Role.POLICY and request_id in self._asking:
            self._asking.pop(request_id).request = request

    @contextmanager
    def forward(self, role: Role, rows: Sequence[Row]) -> Iterator[None]:
        started = time.perf_counter()
        yield
        ended = time.perf_counter()
        self.forwards[role].append(Forward((started, ended), rows))
        for row in rows:
            request = self._open.get((role, row.request_id))
            if request is not None:
                request.begun = started if request.begun is None else request.begun
                request.computed_s += ended - started
                if not row.decodes:
                    request.prefilled = ended

    def finished(self, role: Role, request_id: int, num_tokens: int) -> None:
        request = self._open.pop((role, request_id), None)
        if request is not None:
            request.finished, request.num_tokens = time.perf_counter(), num_tokens

    def _on_phase(self, phase: Phase, started: float, ended: float) -> None:
        self.phases[phase] = (started, ended)

    @contextmanager
    def _on_pass(self, role: Role, name: str, micro: MicroBatch) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self.memory.device.type == "cuda":
            torch.cuda.synchronize(self.memory.device)
        self.passes.setdefault(role, []).append(Pass(name, (started, time.perf_counter()), micro.num_tokens))

    def _passes(self) -> list[tuple[Role, str, MicroSteps]]:
        found = [(role, "score", passes) for role, passes in self.roles.scoring_passes().items()]
        found.append((Role.POLICY, "update", self.updater.micro_steps))
        if self.updater.critic is not None:
            found.append((Role.CRITIC, "update", self.updater.critic.micro_steps))
        return found

    # What it comes to.

    def summary(self) -> dict[str, Any]:
        """Plain JSON: see docs/profile.md."""
        rollout = self.phases[Phase.ROLLOUT]
        return {
            "step": self.step,
            "phase_seconds": {str(phase): span[1] - span[0] for phase, span in self.phases.items()},
            "pass_seconds": {
                f"{role}/{name}": sum(one.span[1] - one.span[0] for one in passes if one.name == name)
                for role, passes in self.passes.items()
                for name in dict.fromkeys(one.name for one in passes)
            },
            "rollout": {
                "forwards_are_seen": isinstance(self.engine, TransformersEngine),
                "roles": {str(role): self._role(role, rollout) for role in PLAYERS if self.forwards[role]},
                "outside_forwards_seconds": rollout[1] - rollout[0] - seconds(self._busy(PLAYERS)),
                "trajectories": len(self.trajectories),
                "trajectory_shares": self._trajectory_shares(rollout),
                "tail_seconds": self._tail(rollout),
            },
        }

    def _busy(self, roles: Sequence[Role]) -> list[Span]:
        return [forward.span for role in roles for forward in self.forwards[role]]

    def _role(self, role: Role, rollout: Span) -> dict[str, Any]:
        """How a role spent the rollout: its forwards, and what kept it from having one, in seconds."""
        other = Role.SIMULATOR if role is Role.POLICY else Role.POLICY
        forwards = self.forwards[role]
        rows = [row for forward in forwards for row in forward.rows]
        present = [(one.added, _else(one.finished, rollout[1])) for one in self.requests if one.role is role]
        idle = without([rollout], self._busy([role]))
        held_up = common(idle, present)
        nothing_to_do = without(idle, present)
        wait = Wait.SEARCH if role is Role.POLICY else Wait.POLICY
        awaited = [
            (one.since, _else(one.until, rollout[1]))
            for stretches in self.trajectories.values()
            for one in stretches
            if one.wait is wait
        ]
        return {
            "forwards": len(forwards),
            "seconds": seconds(self._busy([role])),
            "prefill_tokens": sum(row.prefill_tokens for row in rows),
            "decode_tokens": sum(row.decodes for row in rows),
            "rows_per_forward": len(rows) / len(forwards),
            "idle_seconds": {
                f"the {other} computes": seconds(common(held_up, self._busy([other]))),
                "between forwards": seconds(without(held_up, self._busy([other]))),
                f"no request: waits for the {other}": seconds(common(nothing_to_do, awaited)),
                "no request: nothing left to do": seconds(without(nothing_to_do, awaited)),
            },
        }

    def _trajectory_shares(self, rollout: Span) -> dict[str, float]:
        """Shares of the time of all trajectories together, each from the start of the rollout to its end."""
        spent: Counter[str] = Counter()
        for stretches in self.trajectories.values():
            spent["not begun"] += max(0.0, stretches[0].since - rollout[0])
            for one in stretches:
                length = max(0.0, _else(one.until, rollout[1]) - one.since)
                name = {
                    Wait.POLICY: "policy",
                    Wait.SEARCH: "waits for documents",
                    Wait.OTHERS: "over, waits for others",
                }
                request = one.request
                if one.wait is not Wait.POLICY or request is None:
                    spent[name[one.wait]] += length
                    continue
                queued = min(length, _else(request.begun, rollout[1]) - one.since)
                computed = min(length - queued, request.computed_s)
                spent["policy: in a forward"] += computed
                spent["policy: queued for a slot"] += queued
                spent["policy: between forwards"] += length - queued - computed
        whole = (rollout[1] - rollout[0]) * max(1, len(self.trajectories))
        return {name: length / whole for name, length in spent.most_common()}

    def _tail(self, rollout: Span) -> float:
        """Seconds of the rollout after half of its trajectories were over."""
        over = sorted(s[-1].since for s in self.trajectories.values() if s[-1].wait is Wait.OTHERS)
        half = (len(self.trajectories) + 1) // 2
        return rollout[1] - over[half - 1] if len(over) >= half > 0 else 0.0

    # The trace.

    def _events(self) -> TraceEvents:
        start, end = min(self.phases.values())[0], max(span[1] for span in self.phases.values())
        until = self.phases[Phase.ROLLOUT][1]
        events = TraceEvents(start)
        events.span("step", "phases", f"step {self.step}", (start, end))
        for phase, span in self.phases.items():
            events.span("step", "phases", str(phase), span)
        for role, forwards in self.forwards.items():
            for forward in forwards:
                prefill = sum(row.prefill_tokens for row in forward.rows)
                decode = sum(row.decodes for row in forward.rows)
                details = {"rows": len(forward.rows), "prefill_tokens": prefill, "decode_tokens": decode}
                kind = "prefill and decode" if prefill and decode else "prefill" if prefill else "decode"
                events.span(str(role), "forwards", kind, forward.span, **details)
        for role, passes in self.passes.items():
            for one in passes:
                events.span(str(role), "micro batches", one.name, one.span, tokens=one.num_tokens)
        for name, stretches in self.trajectories.items():
            track = f"{name.question_id} sample {name.sample}, step {name.step}"
            for one in stretches:
                self._add_waiting(events, track, one, until)
        calls = [one for one in self.requests if one.role is Role.SIMULATOR]
        for lane, call in _lanes(calls, until):
            self._add_request(events, "simulator", f"calls {lane}", f"call {call.request_id}", call, until)
        self._add_counter(events)
        return events

    def _add_waiting(self, events: TraceEvents, track: str, one: Waiting, until: float) -> None:
        span = (one.since, _else(one.until, until))
        if one.wait is Wait.SEARCH:
            events.span("trajectories", track, f"search {one.turn}", span)
        elif one.wait is Wait.POLICY and one.request is not None:
            self._add_request(events, "trajectories", track, f"turn {one.turn + 1}", one.request, until)
        elif one.wait is Wait.POLICY:
            events.span("trajectories", track, f"turn {one.turn + 1}", span)

    def _add_request(
        self, events: TraceEvents, process: str, track: str, name: str, request: Request, until: float
    ) -> None:
        """From submit to finish, and inside that what it waited for and had."""
        end = _else(request.finished, until)
        details = {"prompt_tokens": request.num_prompt_tokens, "tokens": request.num_tokens}
        events.span(process, track, name, (request.added, end), request=request.request_id, **details)
        begun = end if request.begun is None else request.begun
        prefilled = end if request.prefilled is None else min(end, request.prefilled)
        for part, span in (
            ("queued", (request.added, begun)),
            ("prefill", (begun, max(begun, prefilled))),
            ("decode", (max(begun, prefilled), end)),
        ):
            if span[1] > span[0]:
                events.span(process, track, part, span)

    def _add_counter(self, events: TraceEvents) -> None:
        """How many trajectories wait for what."""
        changes = sorted(
            (one.since, str(before.wait) if before else "", str(one.wait))
            for stretches in self.trajectories.values()
            for before, one in zip([None, *stretches], stretches, strict=False)
        )
        counts = Counter({str(wait): 0 for wait in Wait})
        for at, left, entered in changes:
            counts[entered] += 1
            if left:
                counts[left] -= 1
            events.counter("trajectories", "trajectories that wait for", at, counts)


def _else(at: float | None, otherwise: float) -> float:
    return otherwise if at is None else at


def _lanes(requests: Sequence[Request], until: float) -> Iterator[tuple[int, Request]]:
    """Each request with the first track, from 1, that is free when it comes."""
    free_from: list[float] = []
    for request in sorted(requests, key=lambda one: one.added):
        lane = next((index for index, at in enumerate(free_from) if at <= request.added), len(free_from))
        free_from[lane : lane + 1] = [_else(request.finished, until)]
        yield lane + 1, request


def render(summary: dict[str, Any], path: Path) -> str:
    """The summary in a few lines."""
    rollout = summary["rollout"]
    phases = ", ".join(f"{name} {value:.2f} s" for name, value in summary["phase_seconds"].items())
    lines = [f"profile of step {summary['step']}: {phases}; {path} opens in ui.perfetto.dev"]
    for role, one in rollout["roles"].items():
        idle = ", ".join(f"{name} {value:.2f} s" for name, value in one["idle_seconds"].items() if value >= 0.005)
        lines.append(
            f"  {role}: {one['seconds']:.2f} s in {one['forwards']} forwards of {one['rows_per_forward']:.1f} rows "
            f"({one['prefill_tokens']} tokens prefilled, {one['decode_tokens']} decoded); idle: {idle or 'never'}"
        )
    shares = ", ".join(f"{name} {share:.0%}" for name, share in rollout["trajectory_shares"].items() if share >= 0.005)
    tail = f"{rollout['tail_seconds']:.2f} s after half of them were over"
    lines.append(f"  {rollout['trajectories']} trajectories: {shares}; {tail}")
    if summary["pass_seconds"]:
        lines.append("  " + ", ".join(f"{name} {value:.2f} s" for name, value in summary["pass_seconds"].items()))
    return "\n".join(lines)

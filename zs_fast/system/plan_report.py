"""Does a run fit where it is to take place, and if not, what to change: a plan for a person, and the early refusal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from zs_fast.config import RunConfig
from zs_fast.errors import MemoryBudgetError
from zs_fast.system.hardware import GIB, MUCH_BYTES, Hardware
from zs_fast.system.plan import SPARE_SHARE, MemoryPlan, PlanPhase, plan_memory, policy_rank, shortest
from zs_fast.system.plan_times import phase_seconds

MARGIN = 0.15
"""By which a plan may be above what a run takes (docs/plan.md has what was measured). A run is refused only where it
would not fit even so."""
MOST_SLOTS, MOST_TOKENS = 1024, 65_536
"""Up to where the largest fitting values are looked for."""
LEAST_SLOTS, LEAST_TOKENS = 8, 1024
"""Below these a run is not sensible: advice does not go there."""
TOKEN_STEP = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A field to change, and the peak that the run then has, with the changes before it."""

    field: str
    value: Any
    saves_bytes: int
    phase: PlanPhase
    peak_bytes: int

    @property
    def text(self) -> str:
        """`engine.release_kv = true saves 13.7 GiB in the update`"""
        value = str(self.value).lower() if isinstance(self.value, bool) else self.value
        shown = f'"{value}"' if isinstance(self.value, str) else value
        return f"{self.field} = {shown} saves {self.saves_bytes / GIB:.2f} GiB in the {self.phase}"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """A recipe held against a machine."""

    hardware: Hardware
    budget_bytes: int
    memory: MemoryPlan
    seconds: dict[PlanPhase, float]
    fits: bool
    most_slots: int
    """Largest engine.slots with which all phases fit, the rest unchanged; 0 for none."""
    most_tokens: int
    """Largest train.token_budget that fits, the rest unchanged; 0 for none."""
    advice: tuple[Change, ...]
    """In this order, until it fits. Empty where it fits."""
    enough: bool
    """With the advice taken, it fits."""


def plan_run(config: RunConfig, hardware: Hardware) -> RunPlan:
    """Plan a recipe for a machine. Raises PreflightError for a model whose sizes are unknown."""
    budget = budget_bytes(hardware)

    def peak(changed: RunConfig) -> int:
        return plan_memory(changed, is_cuda=hardware.is_cuda).peak_bytes

    memory = plan_memory(config, is_cuda=hardware.is_cuda)
    fits = memory.peak_bytes <= budget
    advice = () if fits else tuple(_advice(config, hardware, budget))
    return RunPlan(
        hardware=hardware,
        budget_bytes=budget,
        memory=memory,
        seconds=phase_seconds(config, hardware),
        fits=fits,
        most_slots=_largest(lambda n: peak(changed(config, "engine.slots", n)) <= budget, MOST_SLOTS, 1),
        most_tokens=_largest(
            lambda n: peak(changed(config, "train.token_budget", n)) <= budget, MOST_TOKENS, TOKEN_STEP
        ),
        advice=advice,
        enough=fits or bool(advice and advice[-1].peak_bytes <= budget),
    )


def budget_bytes(hardware: Hardware) -> int:
    """What a run may take of the machine's memory."""
    return int(hardware.memory_bytes * (1.0 - SPARE_SHARE)) if hardware.is_cuda else hardware.memory_bytes


def changed(config: RunConfig, name: str, value: Any) -> RunConfig:
    """The recipe with one field, given by its dotted name, at another value."""
    section, _, field = name.rpartition(".")
    inner = getattr(config, section).model_copy(update={field: value})
    return config.model_copy(update={section: inner})


def _largest(fits: Callable[[int], bool], most: int, step: int) -> int:
    """The largest multiple of `step` up to `most` that fits, 0 for none. What fits does so with fewer too."""
    low, high = 0, most // step
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle - 1)
    return low * step


def _advice(config: RunConfig, hardware: Hardware, budget: int) -> Iterator[Change]:
    """What to change, that first which costs a run least, until it fits; nothing that proves needless in the end."""
    cuda = hardware.is_cuda
    chosen: dict[str, Any] = {}
    for propose in PROPOSALS:
        now = _with(config, chosen)
        if (peak := plan_memory(now, is_cuda=cuda).peak_bytes) <= budget:
            break
        proposal = propose(now, hardware, budget)
        if proposal and plan_memory(changed(now, *proposal), is_cuda=cuda).peak_bytes < peak:
            chosen |= dict([proposal])
    if plan_memory(_with(config, chosen), is_cuda=cuda).peak_bytes <= budget:
        chosen = _needed(config, chosen, hardware, budget)
    now = config
    for name, value in chosen.items():
        before, now = plan_memory(now, is_cuda=cuda), changed(now, name, value)
        after = plan_memory(now, is_cuda=cuda)
        saved = {use.phase: use.total_bytes for use in before.phases}
        for use in after.phases:
            saved[use.phase] -= use.total_bytes
        size = {use.phase: use.total_bytes for use in before.phases}
        phase = max(saved, key=lambda one: (saved[one], size[one]))
        yield Change(field=name, value=value, saves_bytes=saved[phase], phase=phase, peak_bytes=after.peak_bytes)


def _with(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    for name, value in changes.items():
        config = changed(config, name, value)
    return config


def _needed(config: RunConfig, chosen: dict[str, Any], hardware: Hardware, budget: int) -> dict[str, Any]:
    """Those changes without which it does not fit; numbers that were lowered as large as they can be."""

    def fits(changes: Mapping[str, Any]) -> bool:
        return plan_memory(_with(config, changes), is_cuda=hardware.is_cuda).peak_bytes <= budget

    needed = dict(chosen)
    for name in chosen:
        without = {key: value for key, value in needed.items() if key != name}
        if fits(without):
            needed = without
    for name, step in (("train.token_budget", TOKEN_STEP), ("engine.slots", 1)):
        if name in needed:
            section, _, field = name.rpartition(".")
            most = int(getattr(getattr(config, section), field))
            largest = _largest(lambda n, name=name: fits(needed | {name: n}), most, step)  # type: ignore[misc]
            needed[name] = max(needed[name], largest)
    return needed


Proposal = tuple[str, Any] | None


def _release_kv(config: RunConfig, hardware: Hardware, budget: int) -> Proposal:
    return None if config.engine.release_kv else ("engine.release_kv", True)


def _smaller_budget(config: RunConfig, hardware: Hardware, budget: int) -> Proposal:
    return _shrunk(config, hardware, budget, "train.token_budget", config.train.token_budget, LEAST_TOKENS, TOKEN_STEP)


def _fewer_slots(config: RunConfig, hardware: Hardware, budget: int) -> Proposal:
    return _shrunk(config, hardware, budget, "engine.slots", config.engine.slots, LEAST_SLOTS, 1)


def _shrunk(config: RunConfig, hardware: Hardware, budget: int, name: str, now: int, least: int, step: int) -> Proposal:
    """The largest smaller value that fits; the least sensible one where none does."""
    if now <= least:
        return None
    cuda = hardware.is_cuda
    found = _largest(lambda n: plan_memory(changed(config, name, n), is_cuda=cuda).peak_bytes <= budget, now, step)
    return name, max(found, least)


def _checkpointing(config: RunConfig, hardware: Hardware, budget: int) -> Proposal:
    return None if config.train.gradient_checkpointing else ("train.gradient_checkpointing", True)


def _narrow(config: RunConfig, hardware: Hardware, budget: int) -> Proposal:
    return ("model.dtype", "bfloat16") if config.model.dtype == "float32" else None


def _adapter(config: RunConfig, hardware: Hardware, budget: int) -> Proposal:
    return None if policy_rank(config) else ("model.lora_rank", 32)


def _one_model(config: RunConfig, hardware: Hardware, budget: int) -> Proposal:
    is_inside = config.simulator.kind == "model" and config.simulator.process == "inside"
    return ("simulator.kind", "policy") if is_inside else None


def _move_simulator(config: RunConfig, hardware: Hardware, budget: int) -> Proposal:
    simulator, engine = config.simulator, config.engine
    possible = hardware.is_cuda and (engine.kind == "transformers" or engine.enforce_eager)
    movable = simulator.kind == "model" and simulator.process == "inside" and not simulator.offload_weights
    return ("simulator.offload_weights", True) if possible and movable else None


def _move_state(config: RunConfig, hardware: Hardware, budget: int) -> Proposal:
    train = config.train
    possible = hardware.is_cuda and config.engine.release_kv and train.optimizer != "adamw_offload"
    return ("train.offload_optimizer_state", True) if possible and not train.offload_optimizer_state else None


def _8bit(config: RunConfig, hardware: Hardware, budget: int) -> Proposal:
    return ("train.optimizer", "adamw_8bit") if config.train.optimizer == "adamw" else None


def _offload(config: RunConfig, hardware: Hardware, budget: int) -> Proposal:
    train = config.train
    fits_elsewhere = hardware.is_cuda and train.optimizer != "adamw_offload" and not train.offload_optimizer_state
    return ("train.optimizer", "adamw_offload") if fits_elsewhere else None


def _4bit(config: RunConfig, hardware: Hardware, budget: int) -> Proposal:
    possible = policy_rank(config) and config.engine.kind == "transformers" and config.model.quantization == "none"
    return ("model.quantization", "nf4") if possible else None


PROPOSALS = (
    _release_kv,
    _smaller_budget,
    _fewer_slots,
    _checkpointing,
    _move_simulator,
    _move_state,
    _narrow,
    _8bit,
    _adapter,
    _one_model,
    _4bit,
    _offload,
)
"""In this order."""


def refuse_if_too_large(config: RunConfig, plan: RunPlan) -> None:
    """MemoryBudgetError, with what to change, where the run can't fit even with the shortest trajectories, and with
    MARGIN taken off what is planned for those."""
    is_cuda = plan.hardware.is_cuda
    # A micro batch that does not fit is halved in the run itself, so that the smallest one is what has to fit.
    smallest = changed(config, "train.token_budget", 1)
    least = plan_memory(smallest, is_cuda=is_cuda, lengths=shortest(config))
    if least.peak_bytes / (1.0 + MARGIN) <= plan.budget_bytes:
        return
    raise MemoryBudgetError(
        f"This run needs at least {least.peak_bytes / (1.0 + MARGIN) / GIB:.1f} GiB of memory (in the "
        f"{least.fullest.phase}; planned for full length: {plan.memory.peak_bytes / GIB:.1f}), but "
        f"{plan.hardware.name} has {plan.budget_bytes / GIB:.1f} GiB for it{held_by_others(plan)}.\n"
        + "\n".join(advice_lines(plan))
        + "\nTo start all the same: train.check_memory = false."
    )


def advice_lines(plan: RunPlan) -> list[str]:
    """What to change, one line each; a last one where all of it is not enough."""
    lines = [f"  {number}. {change.text}" for number, change in enumerate(plan.advice, start=1)]
    if lines:
        lines.insert(0, "Change, in this order:")
    if not plan.enough:
        left = plan.advice[-1].peak_bytes if plan.advice else plan.memory.peak_bytes
        lines.append(f"{'Even so' if lines else 'It'} needs {left / GIB:.1f} GiB: take a smaller model or more memory.")
    return lines


def held_by_others(plan: RunPlan) -> str:
    """What other processes hold of the card, where that is much; else nothing."""
    held = plan.hardware.held_by_others
    if held < MUCH_BYTES:
        return ""
    return (
        f" (other processes hold {held / GIB:.1f} GiB of it; nvidia-smi names them: end them, or choose another card "
        "with CUDA_VISIBLE_DEVICES)"
    )


@contextmanager
def with_plan(planned: str) -> Iterator[None]:
    """What runs out of memory inside says so with the plan, which holds the advice."""
    try:
        yield
    except MemoryBudgetError as error:
        raise MemoryBudgetError(f"{error}\n{planned}") from error


def brief(plan: RunPlan) -> str:
    """For the start of a run: one line, and advice where long trajectories may need more than there is."""
    phases = ", ".join(f"{use.phase} {use.total_bytes / GIB:.2f}" for use in plan.memory.phases)
    line = f"memory planned, GiB: {phases}; {plan.hardware.name} has {plan.budget_bytes / GIB:.1f}"
    line += held_by_others(plan)
    if plan.fits:
        return line
    return "\n".join([f"{line}: trajectories of full length may not fit.", *advice_lines(plan)])


def render(plan: RunPlan) -> str:
    """The whole plan as text."""
    columns = [use.phase for use in plan.memory.phases]
    rows: dict[tuple[str, str], dict[PlanPhase, int]] = {}
    for use in plan.memory.phases:
        for one in use.uses:
            cell = rows.setdefault((one.role, one.part), {})
            cell[use.phase] = cell.get(use.phase, 0) + one.num_bytes
    lines = [f"{'GiB':<24}" + "".join(f"{column:>10}" for column in columns)]
    for (role, part), cells in rows.items():
        if any(cells.values()):
            shown = "".join(f"{cells[c] / GIB:>10.3f}" if cells.get(c) else f"{'':>10}" for c in columns)
            lines.append(f"{f'{role} {part}':<24}{shown}")
    lines.append(f"{'total':<24}" + "".join(f"{use.total_bytes / GIB:>10.3f}" for use in plan.memory.phases))
    seconds = ", ".join(f"{phase} {value:.3g} s" for phase, value in plan.seconds.items())
    lines += [
        "",
        f"on {plan.hardware.name}: {plan.budget_bytes / GIB:.2f} GiB for the run, at most "
        f"{plan.memory.peak_bytes / GIB:.2f} planned: {'it fits' if plan.fits else 'IT DOES NOT FIT'}",
        f"the largest that fit, each by itself: engine.slots {plan.most_slots or 'none'}, "
        f"train.token_budget {plan.most_tokens or 'none'}",
        f"a step, roughly: {seconds}; {sum(plan.seconds.values()):.3g} s in all",
        *([] if plan.fits else advice_lines(plan)),
    ]
    return "\n".join(lines)


def as_dict(plan: RunPlan) -> dict[str, Any]:
    """The plan as one JSON object."""
    return {
        "hardware": plan.hardware.name,
        "budget_bytes": plan.budget_bytes,
        "peak_bytes": plan.memory.peak_bytes,
        "fits": plan.fits,
        "phases": {
            str(use.phase): {
                "total_bytes": use.total_bytes,
                "seconds": plan.seconds.get(use.phase),
                "uses": [{"role": one.role, "part": str(one.part), "bytes": one.num_bytes} for one in use.uses],
            }
            for use in plan.memory.phases
        },
        "most_slots": plan.most_slots,
        "most_tokens": plan.most_tokens,
        "advice": [
            {"field": c.field, "value": c.value, "saves_bytes": c.saves_bytes, "phase": str(c.phase), "text": c.text}
            for c in plan.advice
        ],
        "enough": plan.enough,
    }

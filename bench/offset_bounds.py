"""Do a kernel's element offsets fit their integer type? Read from Triton's intermediate code, without running it.

Every 32-bit integer of a compiled kernel gets bounds from what one launch passes: program numbers from the grid,
numbers from the arguments, loop variables from their loops. A pointer's offset that is computed in 32 bits and may
leave them is an overflow: at 14,134 rows of 151,936 logits `row * stride` is past 2^31. What is loaded from memory or
carried through a loop is unknown: adding to it is let pass, multiplying it by something large is not.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from typing import Any

INT32 = (-(2**31), 2**31 - 1)
LARGE = 1 << 15

Bounds = tuple[float, float] | None
"""Lowest and highest value; None where nothing is known."""

_ASSIGN = re.compile(r"^(%[\w:]+(?:, %[\w:]+)*) = (.*)$")
_ARGUMENT = re.compile(r"(%\w+): (!?[\w.<>]+)")
_FOR = re.compile(r"scf\.for (%\w+) = (%\w+) to (%\w+) step (%\w+)")
_CARRIED = re.compile(r"iter_args\((.*?)\) ->")
_NAME = re.compile(r"%\w+(?:#\d+)?")
_LOCATION = re.compile(r"\s*loc\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)")


@dataclass(slots=True)
class _Walk:
    bounds: dict[str, Bounds] = field(default_factory=dict)
    sources: dict[str, list[str]] = field(default_factory=dict)
    """What a value is computed from, by integer arithmetic."""
    overflows: dict[str, str] = field(default_factory=dict)
    """32-bit values that may leave their type, with the line that computes them."""
    offsets: list[str] = field(default_factory=list)
    regions: list[list[list[str]]] = field(default_factory=list)
    """For each open region, innermost last: the names that stand for each of its yielded values."""

    def of(self, name: str) -> Bounds:
        return self.bounds.get(name)


def overflows(ttir: str, arguments: dict[str, Any], grid: tuple[int, ...]) -> list[str]:
    """The lines of `ttir` where a pointer's offset may overflow 32 bits.

    arguments: numbers passed to the kernel by name (others are ignored). grid: programs along each axis.
    """
    walk = _Walk()
    for raw in ttir.splitlines():
        line = _LOCATION.sub("", raw).strip()
        if line.startswith("tt.func"):
            for name, _ in _ARGUMENT.findall(line):
                value = arguments.get(name[1:])
                walk.bounds[name] = (value, value) if isinstance(value, int) else None
        elif line:
            _step(walk, line, grid)
    reached: set[str] = set()
    queue = list(walk.offsets)
    while queue:
        name = queue.pop()
        if name not in reached:
            reached.add(name)
            queue += walk.sources.get(name, [])
    return [line for name, line in walk.overflows.items() if name in reached]


def _step(walk: _Walk, line: str, grid: tuple[int, ...]) -> None:
    _regions(walk, line)
    if found := _FOR.search(line):
        variable, first, last, step = found.groups()
        walk.bounds[variable] = _loop(walk.of(first), walk.of(last), walk.of(step))
        walk.sources[variable] = [first]
    if not (assigned := _ASSIGN.match(line)):
        return
    name, expression = assigned.groups()
    operation, _, rest = expression.partition(" ")
    operands = _NAME.findall(rest)
    if operation == "tt.addptr":
        walk.offsets.append(operands[1])
        return
    value = _value(walk, operation, rest, operands, grid)
    if operation in _FLOWS:
        walk.sources[name] = operands
    walk.bounds[name] = value
    if operation not in ("arith.muli", "arith.addi", "arith.subi", "arith.shli") or not re.search(r"[:x] ?i32\b", rest):
        return
    if value is None:
        known = [walk.of(operand) for operand in operands]
        unknown_product = operation == "arith.muli" and not any(b and max(map(abs, b)) < LARGE for b in known)
        if unknown_product:
            walk.overflows[name] = line
    elif value[0] < INT32[0] or value[1] > INT32[1]:
        walk.overflows[name] = line
        walk.bounds[name] = INT32


def _regions(walk: _Walk, line: str) -> None:
    """Follow what loops and branches yield: into their results, and into the next round of a loop."""
    if line.startswith("}") and walk.regions:
        closed = walk.regions.pop()
        if line.endswith("{"):  # } else {
            walk.regions.append(closed)
        return
    if line.startswith("scf.yield") and walk.regions:
        for names, value in zip(walk.regions[-1], _NAME.findall(line), strict=False):
            for name in names:
                walk.sources.setdefault(name, []).append(value)
    if line.endswith("{"):
        result, _, count = (line.split(" = ")[0] if line.startswith("%") else "").partition(":")
        results = [result] if not count else [f"{result}#{i}" for i in range(int(count))]
        carried = re.findall(r"(%\w+) = (%[\w#]+)", found[1]) if (found := _CARRIED.search(line)) else []
        for name, start in carried:
            walk.sources[name] = [start]
        names = [[one] for one in results if one]
        walk.regions.append(
            [[*one, *carry[:1]] for one, carry in zip(names, carried or [()] * len(names), strict=False)]
        )


def _loop(first: Bounds, last: Bounds, step: Bounds) -> Bounds:
    if first is None or last is None or step is None or step[0] <= 0:
        return None
    return first[0], max(first[0], last[1] - 1)


def _value(walk: _Walk, operation: str, rest: str, operands: list[str], grid: tuple[int, ...]) -> Bounds:
    """Bounds of one operation's result."""
    if operation == "arith.constant":
        found = re.match(r"(?:dense<)?(-?\d+)>? :.*i\d+", rest)
        return (int(found[1]), int(found[1])) if found else None
    if operation in ("tt.get_program_id", "tt.get_num_programs"):
        size = grid["xyz".index(rest[0])] if "xyz".index(rest[0]) < len(grid) else 1
        return (0, size - 1) if operation == "tt.get_program_id" else (size, size)
    if operation == "tt.make_range":
        end, start = (int(re.search(rf"{word} = (\d+)", rest)[1]) for word in ("end", "start"))  # type: ignore[index]
        return start, end - 1
    if operation in _SAME:
        return walk.of(operands[0])
    if operation == "arith.trunci":
        return _clip(walk.of(operands[0]), INT32) if "to i32" in rest or "xi32>" in rest.split(" to ")[-1] else None
    if operation == "arith.select":
        return _join(walk.of(operands[1]), walk.of(operands[2]))
    if operation in _ARITHMETIC:
        left, right = walk.of(operands[0]), walk.of(operands[1])
        return None if left is None or right is None else _ARITHMETIC[operation](left, right)
    return None


def _clip(bounds: Bounds, limits: tuple[float, float]) -> Bounds:
    return None if bounds is None or bounds[0] < limits[0] or bounds[1] > limits[1] else bounds


def _join(left: Bounds, right: Bounds) -> Bounds:
    return None if left is None or right is None else (min(left[0], right[0]), max(left[1], right[1]))


Pair = tuple[float, float]


def _corners(function: Callable[[float, float], float]) -> Callable[[Pair, Pair], Pair]:
    def over(left: Pair, right: Pair) -> Pair:
        found = [function(a, b) for a in left for b in right]
        return min(found), max(found)

    return over


def _divide(a: float, b: float) -> float:
    return inf if b == 0 else int(a / b)


_SAME = ("tt.splat", "tt.expand_dims", "tt.broadcast", "tt.reshape", "tt.unsplat", "arith.extsi", "arith.extui")
_ARITHMETIC: dict[str, Callable[[Pair, Pair], Pair]] = {
    "arith.muli": _corners(lambda a, b: a * b),
    "arith.addi": _corners(lambda a, b: a + b),
    "arith.subi": _corners(lambda a, b: a - b),
    "arith.shli": _corners(lambda a, b: a * 2.0**b),
    "arith.divsi": _corners(_divide),
    "arith.maxsi": _corners(max),
    "arith.minsi": _corners(min),
    "arith.remsi": lambda a, b: (0 if a[0] >= 0 else -max(map(abs, b)), max(map(abs, b)) - 1),
    "arith.andi": lambda a, b: (0, min(a[1], b[1])) if min(a[0], b[0]) >= 0 else (min(a[0], b[0]), max(a[1], b[1])),
}
_FLOWS = {*_SAME, *_ARITHMETIC, "arith.trunci", "arith.select"}

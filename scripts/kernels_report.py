"""`make kernels-report`: what every Triton kernel compiles to, for GPUs that need not be here.

    python scripts/kernels_report.py [--arch 80,90,100] [--write docs/kernels.md] [--json]

Ends with exit code 1 where a kernel spills registers, needs more shared memory than a block has, may overflow 32-bit
offsets, or is launched by no call of bench/kernel_calls.py. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = (80, 90, 100)
ROWS = (8192, 16384)
"""Tokens of each call: the usual size, and one whose logits have more than 2^31 elements."""


@dataclass(slots=True)
class Report:
    """The compiled kernels, a line each, and what is wrong with them."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    tools: dict[str, str] = field(default_factory=dict)


def compile_all(architectures: tuple[int, ...], calls: dict[str, Any] | None = None) -> Report:
    """Every call of the table, compiled for each architecture."""
    import torch
    import triton
    from triton.compiler.errors import CompilationError

    from bench import ahead_of_time, kernel_calls

    calls = kernel_calls.CALLS if calls is None else calls
    report = Report(tools={"triton": triton.__version__, "torch": torch.__version__})
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    launched = set()
    for capability in architectures:
        for what, call in calls.items():
            launches = []
            for rows in ROWS:
                with ahead_of_time.compile_only(capability) as seen:
                    try:
                        call(rows)
                    except CompilationError as error:
                        report.problems.append(f"{what}: does not compile for sm_{capability}: {_last_lines(error)}")
                launches += seen
            if not launches:
                report.problems.append(f"{what}: the call launches no kernel")
            for launch in launches:
                launched.add(launch.kernel)
                _add(found, launch, capability, report.problems)
    report.rows = [found[key] for key in sorted(found)]
    report.problems += kernel_calls.never_reached(launched)
    report.problems = list(dict.fromkeys(report.problems))
    return report


def _add(found: dict[tuple[str, ...], dict[str, Any]], launch: Any, capability: int, problems: list[str]) -> None:
    """One launch: its row of the table, and its faults."""
    from bench import ahead_of_time, offset_bounds

    constants = " ".join(f"{name}={_short(value)}" for name, value in launch.constants.items())
    key = (launch.kernel.fn.__module__.partition(".")[2], launch.name, launch.types, constants)
    row = found.setdefault(key, dict(zip(("module", "kernel", "types", "constants"), key, strict=True)))
    where = f"{key[0]}.{launch.name} [{launch.types}] [{constants}] sm_{capability}"
    arguments = {name: value for name, value in launch.arguments.items() if type(value) is int}
    for line in offset_bounds.overflows(launch.compiled.asm["ttir"], arguments, launch.grid):
        problems.append(f"{where}: an offset may overflow 32 bits: {line}")
    if len(launch.grid) != 1 or launch.grid[0] >= 2**31:
        problems.append(f"{where}: the grid {launch.grid} is not one-dimensional and below 2^31")
    if f"sm_{capability}" in row:
        return
    used = ahead_of_time.resources(launch.compiled)
    row[f"sm_{capability}"] = asdict(used)
    if used.spilled_bytes:
        problems.append(f"{where}: {used.spilled_bytes} bytes of a thread's registers are spilled to memory")
    if used.shared_bytes > ahead_of_time.SHARED_MEMORY_LIMIT[capability]:
        problems.append(f"{where}: {used.shared_bytes} bytes of shared memory are more than a block has")


def _last_lines(error: Exception) -> str:
    return " / ".join(line.strip() for line in str(error).strip().splitlines()[-4:])


def _short(value: object) -> str:
    return getattr(value, "name", None) or str(value)


def markdown(report: Report) -> str:
    """docs/kernels.md."""
    spilled = any("spilled" in problem for problem in report.problems)
    lines = [
        "# What the Triton kernels compile to",
        "",
        "Written by `make kernels-report`: every kernel as its op launches it at 8192 and 16384 tokens with a",
        "vocabulary of 151,936, compiled without a GPU. For each architecture: registers of a thread (r), kilobytes of",
        f"shared memory (K), how matrix products are done. Spilled registers: {'see the end' if spilled else 'none'}.",
        f"Compiler: Triton {report.tools['triton']}. Nothing on this page was measured on a GPU.",
        "",
    ]
    architectures = sorted({int(name[3:]) for row in report.rows for name in row if name.startswith("sm_")})
    for module in dict.fromkeys(row["module"] for row in report.rows):
        lines += [f"## {module}", ""]
        head = ["kernel", "types", "constants", "warps", *(f"sm_{a}" for a in architectures)]
        lines += [_line(head), _line("---" for _ in head)]
        for row in (row for row in report.rows if row["module"] == module):
            cells = [row.get(f"sm_{a}") for a in architectures]
            warps = sorted({cell["warps"] for cell in cells if cell})
            text = [f"`{row['kernel']}`", row["types"], row["constants"], "/".join(map(str, warps))]
            lines.append(_line([*text, *(_cell(cell) for cell in cells)]))
        lines.append("")
    if report.problems:
        lines += ["## Faults", "", *(f"- {problem}" for problem in report.problems), ""]
    return "\n".join(lines)


def _cell(used: dict[str, Any] | None) -> str:
    if used is None:
        return "-"
    parts = [f"{used['registers']} r", f"{used['shared_bytes'] / 1024:.0f} K", used["matrix_instruction"]]
    if used["spilled_bytes"]:
        parts.append(f"**{used['spilled_bytes']} B spilled**")
    return " ".join(part for part in parts if part)


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    """Compile, print, write; the exit code."""
    parser = argparse.ArgumentParser(description="Compile every Triton kernel for GPUs that need not be here.")
    parser.add_argument("--arch", default=",".join(map(str, ARCHITECTURES)), help="compute capabilities, as in 80,90")
    parser.add_argument("--write", type=Path, help="write the table to this file")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    given = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: kernels are not compiled under the interpreter")
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    report = compile_all(tuple(int(one) for one in given.arch.split(",")))
    print(json.dumps(asdict(report)) if given.json else markdown(report))
    if given.write:
        given.write.write_text(markdown(report), encoding="utf-8")
    for problem in report.problems:
        print(f"kernels_report: {problem}", file=sys.stderr)
    return 1 if report.problems else 0


if __name__ == "__main__":
    raise SystemExit(main())

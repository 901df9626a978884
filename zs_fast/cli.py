"""`zs-fast`: read the command line, load the recipe, call one function, print what it returns.

Nothing heavy is imported before it is needed, so `--help` and a wrong flag answer at once. Every ZsError is one clean
line on stderr and its own exit code; ZS_FAST_TRACEBACK=1 shows the traceback too.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import TYPE_CHECKING, Any

from zs_fast import __version__
from zs_fast.errors import ConfigError, MemoryBudgetError, PreflightError, ZsError

if TYPE_CHECKING:
    from zs_fast.config import RunConfig

USAGE = """\
usage: zs-fast COMMAND ...

  train RECIPE ...   play, score, update: a whole run, into its run folder
  eval RECIPE ...    evaluate a model on sets of questions, by itself and with baselines: a table with intervals
  ask QUESTION ...   let a model answer one question, with its searches and sources; a recipe may follow (quickstart)
  sft RECIPE ...     supervised fine-tuning on examples
  collect RECIPE ... real searches over training questions, to make a simulator from
  label RECIPE ...   collected searches -> useful and noisy examples
  simulator-quality RECIPE ...
                     what a simulator's documents are worth, with intervals
  simulator RECIPE ...
                     all of it: collect, label, sft, simulator-quality
  plan RECIPE ...    memory and time by phase, on --gpu 24GiB (or a card's name), else on this machine; what to change
  report RUN ...     one HTML page of finished or running runs: curves, comparison, rollouts to read
  retriever          serve a corpus (--corpus FILE ...) to this and other trainers over Search-R1's /retrieve
  bench SUBJECT      measure (in a checkout of the repository); subjects: {subjects}
  doctor             what this machine can do, and what is missing

RECIPE is a name ({recipes}) or a path to a .toml file; several merge left to right.
`zs-fast train --help` lists every field of a recipe; each is a flag, as in --train.steps 20.
Common: --output DIR, --data FILE, --seed N, --resume, --json (the last stdout line is one JSON document).
"""
SUBJECTS = ("ops", "train_step", "rollout", "end_to_end", "scaling", "plan", "compare")
SPEAKING_TIME_S = 60.0
"""Longest time that the process which reports an error gets to close its files and do so."""
INTERRUPTED = {
    "train": "; `--resume` continues from the newest checkpoint",
    "eval": "; `--resume` keeps the trajectories that are finished",
}
MISSING_EXTRA = "zs-fast {command} needs the package {package}, which is not installed: pip install 'zs-fast[train]'"


@dataclass(slots=True)
class CommandLine:
    """The words after the command, sorted: recipes, field overrides, and the switches that are no fields."""

    recipes: list[str] = field(default_factory=list)
    overrides: dict[str, list[str]] = field(default_factory=dict)
    switches: set[str] = field(default_factory=set)


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script. Ends in SystemExit, or, for one of several processes that failed, at once."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = run(words)
    except ZsError as error:
        if _speaks(error):
            _report(f"zs-fast: {_with_prefix(str(error))}")
        else:  # torchrun ends the others when the first one leaves, and that one has something to say
            time.sleep(SPEAKING_TIME_S)
        code = error.exit_code
    except ModuleNotFoundError as error:
        if not error.name or error.name.partition(".")[0] in ("zs_fast", "zs_kernels"):
            raise
        _report(f"zs-fast: {MISSING_EXTRA.format(command=words[0], package=error.name)}")
        code = PreflightError.exit_code
    except KeyboardInterrupt as stop:
        hint = INTERRUPTED.get(words[0], "")
        _report(f"zs-fast: {str(stop) or 'interrupted'}{hint}")
        code = 128 + getattr(stop, "number", signal.SIGINT)
    except BrokenPipeError:  # the reader of a pipe (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    if code and _is_one_of_several():  # a group's destructor may wait for ranks, which torchrun ends once this is gone
        sys.stdout.flush()
        os._exit(code)
    raise SystemExit(code)


def run(words: list[str]) -> int:
    """Run one command; its exit code. Raises ZsError."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE.format(subjects=", ".join(SUBJECTS), recipes=_recipe_names()), end="")
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(f"zs-fast {__version__}")
        return 0
    command, rest = words[0], words[1:]
    if command in RUN_COMMANDS:
        return _run_with_recipe(command, rest)
    if command == "ask":
        return _ask(rest)
    if command == "plan":
        return _plan(rest)
    if command == "report":
        return _report_page(rest)
    if command == "retriever":
        from zs_fast.retriever_command import retriever_command

        return retriever_command(rest)
    if command == "doctor":
        return _doctor(rest)
    if command == "bench":
        return _bench(rest)
    raise ConfigError(f"unknown command {command!r}; the commands are {', '.join(COMMANDS)}{_nearest(command)}")


def parse(words: Sequence[str], switches: Sequence[str], other_names: Mapping[str, str] | None = None) -> CommandLine:
    """Sort the words of a command that takes recipes. Raises ConfigError for a flag without its value."""
    from zs_fast.recipe_files import fields, is_list

    line = CommandLine()
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if not word.startswith("--"):
            line.recipes.append(word)
            continue
        flag, equals, value = word[2:].partition("=")
        name = flag.replace("-", "_")
        name = (other_names or {}).get(name, name)
        if name in switches and not equals:
            line.switches.add(name)
            continue
        values = [value] if equals else _take_values(queue, name)
        if not values and name in fields() and not is_list(name):
            raise ConfigError(f"--{flag} needs a value; {_what_it_takes(name)}")
        line.overrides[name] = values
    return line


def _take_values(queue: list[str], name: str) -> list[str]:
    """Remove and return the words that belong to a flag: all up to the next flag for a list, else at most one."""
    from zs_fast.recipe_files import fields, is_list, looks_like_recipe

    known = fields().get(name)
    if known is not None and known.annotation is bool and (not queue or looks_like_recipe(queue[0])):
        return ["true"]
    values = []
    while queue and not queue[0].startswith("--") and (is_list(name) or not values):
        values.append(queue.pop(0))
    return values


def _what_it_takes(name: str) -> str:
    from zs_fast.recipe_files import allowed, fields

    return f"it takes {allowed(fields()[name])}"


def _run_with_recipe(command: str, words: list[str]) -> int:
    if "-h" in words or "--help" in words:
        return _help(command)
    from zs_fast.recipe_files import load_recipe, recipe_names

    line = parse(words, RUN_COMMANDS[command].switches, RUN_COMMANDS[command].other_names)
    if not line.recipes:
        raise ConfigError(f"zs-fast {command} needs a recipe: one of {', '.join(recipe_names())}, or a .toml file")
    config = load_recipe(line.recipes, line.overrides)
    from zs_fast.system.distributed import is_main, process_group

    with process_group(config.model.device, timeout_s=config.train.rank_timeout_s):
        result = RUN_COMMANDS[command].call(config, line.switches)
        if is_main():
            _print_result(result, as_json="json" in line.switches)
    return 0


def _train(config: RunConfig, switches: set[str]) -> object:
    from zs_fast.train import train

    return train(config, resume="resume" in switches)


def _eval(config: RunConfig, switches: set[str]) -> object:
    from zs_fast.evaluate import evaluate_run

    return evaluate_run(config, resume="resume" in switches)


def _sft(config: RunConfig, switches: set[str]) -> object:
    from contextlib import ExitStack

    from zs_fast.ranks import hold_run_folder
    from zs_fast.simulator.circle import tune
    from zs_fast.train import output_folder

    with ExitStack() as stack:
        hold_run_folder(output_folder(config), stack)
        return tune(config)


def _collect(config: RunConfig, switches: set[str]) -> object:
    from zs_fast.simulator.collect import collect

    return collect(config, resume="resume" in switches)


def _label(config: RunConfig, switches: set[str]) -> object:
    from zs_fast.simulator.label import label

    return label(config)


def _simulator_quality(config: RunConfig, switches: set[str]) -> object:
    from zs_fast.simulator.quality import simulator_quality

    return simulator_quality(config)


def _simulator(config: RunConfig, switches: set[str]) -> object:
    from zs_fast.simulator.circle import make_simulator

    return make_simulator(config, resume="resume" in switches)


@dataclass(frozen=True, slots=True)
class RunCommand:
    """A command that takes recipes."""

    call: Callable[[Any, set[str]], object]
    summary: str
    switches: tuple[str, ...]
    other_names: Mapping[str, str] = field(default_factory=dict)
    """Flags that stand for a field's."""


RUN_COMMANDS: Mapping[str, RunCommand] = {
    "train": RunCommand(
        _train, "Train a policy. Plain switches: --resume (continue --output), --json.", ("resume", "json")
    ),
    "eval": RunCommand(
        _eval,
        "Evaluate model.path on each set of eval.data, by each of eval.methods and eval.search. --limit N: the first N "
        "questions of each set (eval.questions). Plain switches: --resume (keep what --output holds), --json.",
        ("resume", "json"),
        {"limit": "eval.questions"},
    ),
    "sft": RunCommand(_sft, "Fine-tune model.path on the examples in data. Plain switch: --json.", ("json",)),
    "collect": RunCommand(
        _collect,
        "Play model.path against a real search engine over the training questions in data; keep every search. Plain "
        "switches: --resume (keep what --output holds), --json.",
        ("resume", "json"),
    ),
    "label": RunCommand(
        _label,
        "Label the searches in the folder data of `zs-fast collect` by label.by. Plain switch: --json.",
        ("json",),
    ),
    "simulator-quality": RunCommand(
        _simulator_quality, "Judge the simulator on the searches of quality.data. Plain switch: --json.", ("json",)
    ),
    "simulator": RunCommand(
        _simulator,
        "Make a simulator: collect, label, sft, simulator-quality. Plain switches: --resume (skip finished steps), "
        "--json.",
        ("resume", "json"),
    ),
}
PLAN_SUMMARY = (
    "Plan the memory and time of a run, without loading anything. --gpu SIZE or NAME (24GiB, h100): for that card; "
    "without it, for this machine. Plain switch: --json. The exit code is 3 where it does not fit."
)
ASK_SUMMARY = (
    "Answer QUESTION with model.path, searching with the first of eval.search that is no simulator, else with BM25 in "
    "eval.corpus or simulator.corpus. Greedy unless eval.temperature says otherwise. Plain switch: --json."
)
OTHER_SUMMARIES: Mapping[str, str] = {"plan": PLAN_SUMMARY, "ask": ASK_SUMMARY}
COMMANDS = (*RUN_COMMANDS, "ask", "plan", "report", "retriever", "bench", "doctor")


def _help(command: str) -> int:
    """Print the help page: tyro draws it from the config's types, defaults and docstrings."""
    import tyro

    from zs_fast.config import RunConfig

    words = "QUESTION [RECIPE ...]" if command == "ask" else "RECIPE [RECIPE ...]"
    print(f"usage: zs-fast {command} {words} [--field VALUE ...]")
    print(f"RECIPE: {_recipe_names()}, or a .toml file\n")
    try:
        tyro.cli(
            RunConfig,
            args=["--help"],
            prog=f"zs-fast {command} RECIPE",
            description=OTHER_SUMMARIES.get(command) or RUN_COMMANDS[command].summary,
            config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
            use_underscores=True,
        )
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def _ask(words: list[str]) -> int:
    if "-h" in words or "--help" in words:
        return _help("ask")
    from zs_fast.recipe_files import load_recipe

    line = parse(words, ("json",))
    if not line.recipes:
        raise ConfigError("zs-fast ask needs a question: zs-fast ask 'who wrote emma?'")
    question, *recipes = line.recipes
    config = load_recipe(recipes or ["quickstart"], line.overrides)
    from zs_fast.ask import ask

    result = ask(config, question)
    if "json" in line.switches:
        print(_as_json(result))
    return 0


def _plan(words: list[str]) -> int:
    if "-h" in words or "--help" in words:
        return _help("plan")
    from zs_fast.recipe_files import load_recipe, recipe_names
    from zs_fast.system.hardware import gpu, present_machine
    from zs_fast.system.plan_report import as_dict, plan_run, render

    line = parse(words, ("json",))
    cards = line.overrides.pop("gpu", None)
    if cards == []:
        raise ConfigError("--gpu needs a value: a size such as 24GiB, or a card's name such as h100")
    if not line.recipes:
        raise ConfigError(f"zs-fast plan needs a recipe: one of {', '.join(recipe_names())}, or a .toml file")
    config = load_recipe(line.recipes, line.overrides)
    plan = plan_run(config, gpu(cards[0]) if cards else present_machine(config.model.device, config.threads))
    print(_as_json(as_dict(plan)) if "json" in line.switches else render(plan))
    return 0 if plan.fits else MemoryBudgetError.exit_code


REPORT_USAGE = """\
usage: zs-fast report RUN [RUN ...] [--output FILE] [--rollouts N] [--json]

Writes one self-contained HTML page: curves, final figures, settings that differ between the runs, rollouts to read.
RUN is a folder that `zs-fast train` wrote, finished or not. The page of one run is RUN/report.html unless --output says
otherwise; that of several is comparison.html. --rollouts N takes N rollouts into the page, 0 all of them; without it a
page holds at most 2000 of them, drawn with a fixed seed, and says so.
"""


def _report_page(words: list[str]) -> int:
    from pathlib import Path

    if "-h" in words or "--help" in words:
        print(REPORT_USAGE, end="")
        return 0
    line = parse(words, ("json",))
    output, rollouts = line.overrides.pop("output", None), line.overrides.pop("rollouts", None)
    if line.overrides:
        raise ConfigError(
            f"zs-fast report does not know --{next(iter(line.overrides))}; it takes --output FILE, --rollouts N, --json"
        )
    if output == []:
        raise ConfigError("--output needs a value: the file to write the page to")
    if rollouts is not None and not (rollouts and rollouts[0].isascii() and rollouts[0].isdigit()):
        raise ConfigError(f"--rollouts {''.join(rollouts)} is no whole number; give how many to show, 0 for all")
    if not line.recipes:
        raise ConfigError("zs-fast report needs the folder of a run, such as runs/quickstart")
    from zs_fast.report.page import write_report

    path = Path(output[0]) if output else None if len(line.recipes) == 1 else Path("comparison.html")
    report = write_report(
        [Path(folder) for folder in line.recipes], path, most_rollouts=int(rollouts[0]) if rollouts else None
    )
    _print_result(report, as_json="json" in line.switches)
    return 0


def _doctor(words: list[str]) -> int:
    from zs_fast.doctor import examine, render

    _only_switches("doctor", words, ("--json", "--brief"))
    report = examine()
    if "--json" in words:
        print(_as_json(report))
    else:
        print(render(report, brief="--brief" in words))
    return 0


def _bench(words: list[str]) -> int:
    from pathlib import Path

    import zs_fast

    checkout = Path(zs_fast.__file__).resolve().parent.parent
    if not (checkout / "bench" / "harness.py").is_file():
        raise PreflightError(
            "zs-fast bench works in a checkout of the repository, where bench/ lies beside zs_fast/; "
            f"this zs_fast is installed in {checkout}. Clone the repository and run `make bench` there."
        )
    subject = next((word for word in words if not word.startswith("--")), None)
    if subject not in SUBJECTS:
        raise ConfigError(f"zs-fast bench {subject or ''}: the subjects are {', '.join(SUBJECTS)}")
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    run_subject = importlib.import_module(f"bench.{subject}").main
    summary = run_subject([word for word in words if word not in (subject, "--json")])
    if "--json" in words:
        print(_as_json(summary))
    return int(bool(summary.get("regressions")))


def _only_switches(command: str, words: Sequence[str], known: Sequence[str]) -> None:
    if unknown := [word for word in words if word not in known]:
        raise ConfigError(f"zs-fast {command} does not know {' '.join(unknown)!r}; it takes {', '.join(known)}")


def _print_result(result: object, *, as_json: bool) -> None:
    values = asdict(result) if is_dataclass(result) and not isinstance(result, type) else result
    if as_json:
        print(_as_json(values))
    elif isinstance(values, Mapping):
        for name, value in values.items():
            if not isinstance(value, Mapping):
                print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")


def _as_json(value: object) -> str:
    return json.dumps(_finite(value), allow_nan=False, default=str)


def _finite(value: object) -> object:
    """JSON has no NaN: a number that is none becomes null."""
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _recipe_names() -> str:
    from pathlib import Path

    return ", ".join(sorted(path.stem for path in Path(__file__).with_name("recipes").glob("*.toml")))


def _nearest(command: str) -> str:
    import difflib

    near = difflib.get_close_matches(command, COMMANDS, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _speaks(error: ZsError) -> bool:
    """Of several processes that fail in the same way the first one says so; one that fails alone speaks for itself."""
    is_everyones = error.is_shared or isinstance(error, ConfigError)
    return not (is_everyones and _is_one_of_several()) or os.environ.get("RANK", "0") == "0"


def _is_one_of_several() -> bool:
    """Did torchrun start this process beside others?"""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1")


def _with_prefix(message: str) -> str:
    return "\nzs-fast: ".join(message.splitlines())


def _report(message: str) -> None:
    if os.environ.get("ZS_FAST_TRACEBACK") == "1":
        import traceback

        traceback.print_exc()
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

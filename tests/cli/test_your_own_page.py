"""docs/your_own.md: its blocks run in order, its commands with fewer steps; and what own functions do wrong is said."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from zs_fast import cli
from zs_fast.config import GameConfig
from zs_fast.errors import ConfigError, PreflightError, SimulatorError
from zs_fast.recipe_files import load_recipe
from zs_fast.search.backends.function import FunctionSearch
from zs_fast.search.codec import ByteCodec
from zs_fast.search.own_code import load_function
from zs_fast.types import Question, SearchRequest, SearchResult, StopReason

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "your_own.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(python|bash)\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
SMALL = {
    "train": {
        "--train.steps": "1",
        "--train.questions_per_step": "2",
        "--train.group_size": "2",
        "--train.save_every": "1",
        "--game.max_turns": "2",
        "--game.max_new_tokens": "24",
        "--simulator.max_new_tokens": "32",
        "--eval.data": "",
    },
    "eval": {"--eval.questions": "2", "--game.max_new_tokens": "16"},
    "plan": {},
}
"""Flags win over those before them."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder in which the page's Python blocks were run."""
    folder = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for kind, text in BLOCKS:
            if kind == "python" and text.startswith("# file: "):
                name, _, body = text.removeprefix("# file: ").partition("\n")
                (folder / name).write_text(body, encoding="utf-8")
            elif kind == "python":
                exec_block(text)
    return folder


def exec_block(text: str) -> None:
    exec(compile(text, "docs/your_own.md", "exec"), {})


@pytest.mark.parametrize("command", COMMANDS, ids=[f"{n}" for n in range(len(COMMANDS))])
def test_a_command_runs(command, workplace, monkeypatch, capfd):
    monkeypatch.chdir(workplace)
    words = shlex.split(command)
    if words[0] == "PYTHONPATH=.":
        monkeypatch.syspath_prepend(str(workplace))
        words = words[1:]
    assert words.pop(0) == "zs-fast"
    small = [word for flag in SMALL[words[0]].items() for word in flag]
    with pytest.raises(SystemExit) as end:
        cli.main([*words, *small])
    shown = capfd.readouterr()
    assert end.value.code == 0, shown.out + shown.err
    if words[0] == "train":
        output = workplace / words[words.index("--output") + 1]
        (row,) = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
        assert row["step"] == 1 and row["tokens"] > 0


def trajectory(reward: str):
    from zs_fast.search.environment import Episode

    question = Question(id="q7", text="who wrote emma?", answers=("Jane Austen",), source="s")
    game = GameConfig(max_new_tokens=4, max_context_tokens=8, reward=reward)  # the prompt alone fills the context
    episode = Episode(question, sample=3, step=1, noise_probability=0.0, game=game, codec=ByteCodec())
    assert episode.done
    return episode.trajectory()


def own_module(text: str, folder: Path, monkeypatch, name: str) -> str:
    (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    return name


def test_a_reward_is_asked_once_and_kept(tmp_path, monkeypatch):
    text = "calls = []\ndef reward(played):\n    calls.append(played)\n    return -2\n"
    module = own_module(text, tmp_path, monkeypatch, "own_reward_once")
    found = trajectory(f"{module}:reward")
    assert found.reward == -2.0 and isinstance(found.reward, float) and found.scores.f1 == 0.0
    assert found.stop_reason is StopReason.CONTEXT_LIMIT and found.turns == ()
    (seen,) = load_function(f"{module}:reward", setting="game.reward").__globals__["calls"]
    assert seen.question.id == "q7" and seen.reward == 0.0


@pytest.mark.parametrize("value", ["float('nan')", "float('inf')", "None", "'1'", "True", "[1.0]"])
def test_a_reward_that_is_no_number_is_named(value, tmp_path, monkeypatch):
    module = own_module(
        f"def reward(played): return {value}\n", tmp_path, monkeypatch, f"own_reward_{abs(hash(value))}"
    )
    with pytest.raises(ConfigError, match=rf"{module}:reward gave .* question 'q7', sample 3"):
        trajectory(f"{module}:reward")


@pytest.mark.parametrize("words", ["reward", "my reward:f", "a:b:c", "a:b()", "os.system('x'):f", "../a:b", ":f", "a:"])
def test_only_an_import_path_is_taken(words):
    with pytest.raises(ConfigError, match=r"game\.reward"):
        load_recipe([], {"game.reward": [words]})
    with pytest.raises(ConfigError, match=r"simulator\.function"):
        load_recipe([], {"simulator.kind": ["function"], "simulator.function": [words]})


def test_what_cannot_be_imported_is_said_with_a_way_out(tmp_path, monkeypatch):
    with pytest.raises(PreflightError, match=r"game\.reward is 'not_there:f'.*PYTHONPATH"):
        load_function("not_there:f", setting="game.reward")
    with pytest.raises(PreflightError, match="math has no function 'f1'"):
        load_function("math:f1", setting="game.reward")
    broken = own_module("import not_there_either\n", tmp_path, monkeypatch, "own_broken")
    with pytest.raises(ModuleNotFoundError, match="not_there_either"):
        load_function(f"{broken}:f", setting="game.reward")
    with pytest.raises(ConfigError, match=r"simulator\.function names none"):
        load_recipe([], {"simulator.kind": ["function"]})
    with pytest.raises(ConfigError, match=r"simulator\.function names none"):
        load_recipe([], {"eval.search": ["function"]})


def searched(function) -> list[SearchResult]:
    search = FunctionSearch(function, documents=2, name="mine:search")
    question = Question(id="q", text="t", answers=("Jane Austen",), source="s")
    for turn, query in enumerate(("emma", "dracula")):
        search.submit(SearchRequest(step=1, question=question, sample=0, turn=turn, query=query, noise_probability=0.0))
    results = search.poll()
    assert search.poll() == []
    return results


def test_a_search_function_sees_queries_alone():
    seen = []

    def search(*given):
        seen.append(given)
        return [("about jane austen!", "b", "one too many"), []]

    first, second = searched(search)
    assert seen == [(["emma", "dracula"], 2)]
    assert first.documents == ("about jane austen!", "b") and first.contains_answer and first.request.query == "emma"
    assert second.documents == () and not second.failed, "nothing found is no failure"


def test_a_search_that_says_it_failed_has_failed():
    def search(queries, documents):
        raise SimulatorError("the index is gone")

    results = searched(search)
    assert [result.failed for result in results] == [True, True] and results[0].error == "the index is gone"
    with pytest.raises(ZeroDivisionError):
        searched(lambda queries, documents: 1 / 0)


@pytest.mark.parametrize("found", [None, [], [["a"]], ["ab", "cd"], [["a"], [1]], [["a"], None], {"emma": ["a"]}])
def test_results_of_another_shape_are_named(found):
    with pytest.raises(SimulatorError, match=r"mine:search was given 2 queries and returned"):
        searched(lambda queries, documents: found)

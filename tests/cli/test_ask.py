"""`zs-fast ask`: one question, its words as they come, its sources, and nothing hostile on the terminal."""

from __future__ import annotations

import io
import json

import pytest

import zs_fast.ask
from zs_fast import cli
from zs_fast.ask import ask
from zs_fast.config import GameConfig
from zs_fast.errors import ConfigError
from zs_fast.recipe_files import load_recipe
from zs_fast.rollout.transformers_engine import TransformersEngine
from zs_fast.search.codec import ByteCodec
from zs_fast.setup import Arena, SearchEngines
from zs_fast.testing import ScriptedEngine, ScriptedSearch
from zs_fast.types import Role


class Pieces(io.StringIO):
    """A screen that remembers each write."""

    encoding = "utf-8"

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []

    def write(self, text: str) -> int:
        self.pieces.append(text)
        return super().write(text)


@pytest.fixture
def scripted(monkeypatch):
    """`ask` with a scripted policy and search in place of models: returns (screen text, result)."""

    def run(turns, documents=lambda request: ["Emma: by Jane Austen."], encoding="utf-8"):
        codec = ByteCodec()
        said = iter(turns)
        engine = ScriptedEngine({Role.POLICY: lambda ids: next(said)}, codec)
        monkeypatch.setattr(zs_fast.ask, "load_policy", lambda *_: None)
        arena = Arena(engine=engine, codec=codec, training_player=None, training_search=None)
        monkeypatch.setattr(zs_fast.ask, "build_arena", lambda *_, **__: arena)
        monkeypatch.setattr(SearchEngines, "judge", lambda *_: ScriptedSearch(documents))
        screen = Pieces()
        screen.encoding = encoding
        config = load_recipe(["quickstart"]).model_copy(update={"game": GameConfig(max_context_tokens=8192)})
        return screen, lambda: ask(config, "who wrote emma", screen=screen)

    return run


def test_the_quickstart_policy_answers_token_by_token(capsys):
    """The embedded models as a person meets them: the words of the screen are those of the result."""
    with pytest.raises(SystemExit) as end:
        cli.main(["ask", "Where was Emma born?", "--game.max_turns", "2", "--json"])
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert end.value.code == 0 and result["question"] == "Where was Emma born?" and result["search"] == "bm25"
    assert len(result["searches"]) <= 1 and all(len(found["documents"]) == 5 for found in result["searches"])
    assert ("answer: " in out) == (result["answer"] is not None)


def test_tokens_come_before_the_completion_is_finished(monkeypatch):
    screens = []
    step = TransformersEngine.step
    monkeypatch.setattr(TransformersEngine, "step", lambda self: screens.append(screen.getvalue()) or step(self))
    screen = Pieces()
    config = load_recipe(["quickstart"], {"game.max_turns": ["1"], "game.max_new_tokens": ["12"]})
    result = ask(config, "Where was Emma born?", screen=screen)
    assert len(set(screens)) > 3, "the text grew while the turn was sampled"
    assert all(screen.getvalue().startswith(part) for part in screens) and result["stop_reason"] != "context_limit"


def test_searches_documents_and_sources(scripted):
    screen, run = scripted(
        ["<search> emma novel </search>", "<search> austen </search>", "<answer> Jane Austen </answer>"],
        lambda request: [f"about {request.query}", "x" * 500],
    )
    result = run()
    text = screen.getvalue()
    assert result["answer"] == "Jane Austen" and [s["query"] for s in result["searches"]] == ["emma novel", "austen"]
    assert result["searches"][0]["documents"][1] == "x" * 500 and "x" * 241 not in text
    assert text.index("<search> emma novel </search>") < text.index("[1] about emma novel") < text.index("[3] about")
    assert text.rstrip().splitlines()[-3:] == [
        "answer: Jane Austen",
        "sources: [1] to [2], for 'emma novel'",
        "sources: [3] to [4], for 'austen'",
    ]


def test_hostile_text_reaches_no_terminal(scripted):
    hostile = "\x1b]0;owned\x07\x1b[2J\r\x9b31m\u202eevil\x00\x08"
    screen, run = scripted(
        [f"<search> {hostile} </search>", f"<answer> {hostile} </answer>"], lambda request: [hostile, "\ud800"]
    )
    run()
    shown = screen.getvalue()
    assert "evil" in shown and not set(shown) & set("\x1b\x07\r\x9b\u202e\x00\x08\ud800")


def test_a_screen_that_knows_few_characters(scripted):
    screen, run = scripted(["<answer> Zoë \u2713 </answer>"], encoding="ascii")
    assert run()["answer"] == "Zoë \u2713"
    assert "answer: Zo? ?" in screen.getvalue()


def test_no_documents_a_failed_search_and_no_answer(scripted):
    screen, run = scripted(["<search> x </search>", "nothing", "nothing", "nothing"], lambda request: [])
    assert run()["answer"] is None
    assert "nothing was found" in screen.getvalue() and "no answer (turn_limit)" in screen.getvalue()
    screen, run = scripted(["<search> x </search>"], lambda request: None)
    assert run()["stop_reason"] == "search_failed"
    assert "the search failed: scripted" in screen.getvalue()


def test_ctrl_c_is_clean(monkeypatch, capsys):
    closed = []
    calls = []

    def step(self):
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return real(self)

    real, close = TransformersEngine.step, TransformersEngine.close
    monkeypatch.setattr(TransformersEngine, "step", step)
    monkeypatch.setattr(TransformersEngine, "close", lambda self: closed.append(1) or close(self))
    with pytest.raises(SystemExit) as end:
        cli.main(["ask", "who wrote emma?"])
    captured = capsys.readouterr()
    assert end.value.code == 130 and captured.err == "zs-fast: interrupted\n" and closed
    assert captured.out.endswith("\n")


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "needs a question"),
        (["  "], "the question is empty"),
        (["who?", "nosuchrecipe"], "recipe 'nosuchrecipe' is not one of"),
        (["who?", "--eval.corpus", "c/{set}.jsonl"], "belongs to no set"),
    ],
)
def test_what_can_not_be_asked(words, said, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["ask", *words])
    err = capsys.readouterr().err
    assert end.value.code == 2 and said in err and len(err.splitlines()) == 1


def test_an_empty_question_from_python():
    with pytest.raises(ConfigError, match="the question is empty"):
        ask(load_recipe(["quickstart"]), "\n")

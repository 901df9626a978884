"""The whole way from a policy to a measured simulator, in small, and each of its steps gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zs_fast.config import RunConfig
from zs_fast.errors import ConfigError
from zs_fast.recipe_files import load_recipe
from zs_fast.search.codec import Codec
from zs_fast.simulator import circle
from zs_fast.simulator.circle import make_simulator
from zs_fast.simulator.quality import chosen_searches, simulate, simulator_quality
from zs_fast.simulator.reader import read
from zs_fast.simulator.records import LabelledSearch
from zs_fast.testing import ScriptedEngine, byte_tokenizer, tiny_model
from zs_fast.types import Question, Role, SearchMode, SearchResult

SMALL = {
    "collect.questions": ["40"],
    "collect.samples": ["1"],
    "collect.play": ["question"],
    "sft.epochs": ["1"],
    "sft.learning_rate": ["1e-4"],
    "sft.validate_every": ["0"],
    "simulator.documents": ["2"],
    "simulator.max_new_tokens": ["12"],
    "game.max_new_tokens": ["8"],
    "quality.questions": ["3"],
    "quality.during_training": ["2"],
}


def recipe(output: Path, **more: str) -> RunConfig:
    return load_recipe(
        ["simulator_quickstart"], SMALL | {"output": [str(output)]} | {name: [value] for name, value in more.items()}
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("circle")
    make_simulator(recipe(folder))
    return folder


def test_every_step_leaves_what_the_next_one_needs(made: Path) -> None:
    summary = json.loads((made / "summary.json").read_bytes())
    assert summary["collect"]["trajectories"] == 40
    assert summary["tuned"]["validation_loss_after"] < summary["tuned"]["validation_loss_before"]
    rows = [json.loads(line) for line in (made / "tuned" / "metrics.jsonl").read_text().splitlines()]
    judged = [row for row in rows if "quality/useful_contains_answer" in row]
    assert len(judged) == 2, "before the first step and after the last"
    for which, template in (("quality_tuned", "fine_tuned"), ("quality_prompted", "prompted")):
        assert summary[which]["template"] == template and summary[which]["searches"] == 3
        assert {"useful", "noisy", "real"} == set(summary[which]["quality"])
        assert all("reader_f1" in of_mode for of_mode in summary[which]["quality"].values())
        outputs = (made / which / "outputs.jsonl").read_text().splitlines()
        assert len(outputs) == 9
    assert summary["quality_prompted"]["simulator"] == "quickstart:policy"
    held_out = {row["question_id"] for row in map(json.loads, outputs)}
    learnt = (made / "labels" / "train_searches.jsonl").read_text()
    assert not any(f'"{question_id}"' in learnt for question_id in held_out)


def test_a_second_call_does_nothing_again(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("collecting.collect", "labelling.label", "sft_command", "judging.simulator_quality"):
        monkeypatch.setattr(f"zs_fast.simulator.circle.{name}", lambda *_, **__: pytest.fail("done again"))
    before = json.loads((made / "summary.json").read_bytes())
    assert make_simulator(recipe(made), resume=True) == before


def test_a_fine_tuning_that_was_killed_begins_again(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = (made / "tuned" / circle.TUNED_FILE).read_bytes()
    (made / "tuned" / circle.TUNED_FILE).unlink()
    tuned: list[bool] = []

    def tune(config: RunConfig, device: object, *, quality: object) -> dict[str, object]:
        tuned.append((made / "tuned" / "model").exists())
        return dict(json.loads(done))

    kept = made / "kept"
    (made / "tuned" / "model").rename(kept)
    (made / "tuned" / "model").mkdir()
    monkeypatch.setattr(circle, "sft_command", tune)
    make_simulator(recipe(made), resume=True)
    kept.rename(made / "tuned" / "model")
    assert tuned == [False], "the half-written model went first"


def test_another_configuration_is_not_gone_on_with(made: Path) -> None:
    with pytest.raises(ConfigError, match="--resume"):
        make_simulator(recipe(made))
    with pytest.raises(ConfigError, match="differs"):
        make_simulator(recipe(made, **{"label.document_words": "9"}), resume=True)


def search(number: int) -> LabelledSearch:
    question = Question(id=f"s:{number}", text=f"what is {number}?", answers=(f"thing {number}",), source="s")
    return LabelledSearch(question=question, query=f"q{number}", mode=SearchMode.REAL, documents=("real",))


def test_results_belong_to_their_searches_whatever_the_order_of_replies(tmp_path: Path) -> None:
    codec = Codec(byte_tokenizer(), chat_template=True)

    def script(ids: list[int]) -> str:
        prompt = codec.decode(ids)
        query = prompt.partition("Query: ")[2].partition("\n")[0]
        return f"Doc 1: {query} {'thing ' + query[1:] if 'useful' in prompt else 'nothing'}\nDoc 2: more"

    engine = ScriptedEngine({Role.SIMULATOR: script}, codec, steps_needed=lambda number: 9 - number)
    config = recipe(tmp_path, **{"simulator.max_new_tokens": "200"})
    results = simulate(engine, codec, [search(n) for n in range(4)], config, config.simulator)
    for mode, word in ((SearchMode.USEFUL, "thing"), (SearchMode.NOISY, "nothing")):
        assert [result.request.question.id for result in results[mode]] == [f"s:{n}" for n in range(4)]
        for number, result in enumerate(results[mode]):
            assert result.mode is mode and result.documents[0].startswith(f"q{number} {word}")
            assert result.contains_answer == (mode is SearchMode.USEFUL)


def test_one_search_per_question_in_an_order_of_the_seed(made: Path) -> None:
    data = {"quality.data": str(made / "labels" / "validation_searches.jsonl")}
    config = recipe(made, **data)
    chosen = chosen_searches(config)
    assert len({one.question.id for one in chosen}) == 3 and chosen == chosen_searches(config)
    assert chosen != chosen_searches(recipe(made, seed="5", **data))


def test_a_reader_is_scored_on_what_it_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    codec = Codec(model.tokenizer, chat_template=True)
    engines: list[ScriptedEngine] = []

    def script(ids: list[int]) -> str:
        prompt = codec.decode(ids)
        found = prompt.rpartition("Doc 1: ")[2].partition("</information>")[0]
        return "<search> again </search>" if found == "nothing" else f"<think> x </think><answer> {found} </answer>"

    def engine(*_: object, **__: object) -> ScriptedEngine:
        engines.append(ScriptedEngine({Role.POLICY: script}, codec, steps_needed=lambda number: 9 - number))
        return engines[-1]

    monkeypatch.setattr("zs_fast.simulator.reader.TransformersEngine", engine)
    found = {
        SearchMode.USEFUL: ["thing 0", "a thing", ""],  # the third search failed
        SearchMode.NOISY: ["nothing", "thing 1", "thing 2"],
    }
    results = {
        mode: [
            SearchResult(request=search(n).request(), documents=(text,) if text else (), mode=mode)
            for n, text in enumerate(texts)
        ]
        for mode, texts in found.items()
    }
    assert read(model, results, recipe(tmp_path, **{"game.max_new_tokens": "200"})) == {
        SearchMode.USEFUL: [1.0, pytest.approx(2 / 3), 0.0],
        SearchMode.NOISY: [0.0, 1.0, 1.0],
    }
    prompt = codec.decode(engines[0].requests[0][2])
    assert "Question: what is 0?" in prompt and "<search> q0 </search>" in prompt
    assert engines[0].requests[0][3].temperature == 0.0


def test_quality_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"quality\.data is empty"):
        simulator_quality(recipe(tmp_path))
    with pytest.raises(ConfigError, match="no simulator"):
        simulator_quality(recipe(tmp_path, **{"quality.data": "x", "simulator.kind": "bm25"}))

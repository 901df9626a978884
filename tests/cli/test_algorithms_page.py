"""The sweep's page is written from what runs left, and says what the numbers say."""

from __future__ import annotations

import json

import pytest

from bench import algorithms, sweep


def test_the_runs_are_every_algorithm_and_ablation_with_three_seeds(tmp_path):
    from zs_fast.config import ALGORITHM_DEFAULTS

    planned = algorithms.runs(tmp_path)
    names = {run.variant.name for run in planned}
    assert set(ALGORITHM_DEFAULTS) <= names and {"documents trained on", "noise 0.5 throughout"} <= names
    assert len({run.folder for run in planned}) == len(planned) == 3 * len(names)


def test_overrides_are_fields_of_the_recipe(tmp_path):
    from zs_fast.recipe_files import load_recipe

    for run in algorithms.runs(tmp_path):
        config = load_recipe([sweep.RECIPE], {key: [value] for key, value in run.variant.overrides.items()})
        assert config.train.warmup_steps == load_recipe([sweep.RECIPE], {}).train.warmup_steps


def test_the_difference_of_two_rows_has_students_interval():
    mean, width = sweep.difference([0.9, 0.8, 0.7], [0.5, 0.5, 0.5])
    assert mean == pytest.approx(0.3) and width == pytest.approx(4.303 * 0.1 / 3**0.5)


@pytest.fixture
def finished(tmp_path):
    for number, run in enumerate(algorithms.runs(tmp_path)):
        run.folder.mkdir(parents=True)
        f1 = 0.2 if run.variant.name == "gspo" else 0.8 + 0.001 * number
        after = {"f1": f1, "f1_low": f1 - 0.05, "f1_high": f1 + 0.05}
        summary = {"f1_bm25_after": f1, "seconds": 80.0, "evaluations": {"bm25": {"after": after}}}
        (run.folder / "summary.json").write_text(json.dumps(summary))
        steps = [{"step": s, "reward/mean": 0.1 * s, "update/nonfinite_losses": 0.0} for s in (1, 2, 3)]
        (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    for seed in sweep.SEEDS:
        folder = tmp_path / f"untrained_seed{seed}"
        folder.mkdir()
        (folder / "evaluation.json").write_text(json.dumps({"results": {"bm25": {"f1": 0.25}}}))
    return tmp_path


def test_the_page_names_what_falls_short(finished, tmp_path):
    found = algorithms.collect(finished)
    text = algorithms.page(found, {"gspo": "its clip is narrow."})
    assert "| gspo | 3e-4 | 0.200, 0.200, 0.200 | 0.200 | 0.000 | -0.050 | 3 of 3 | 80 |" in text
    assert "**gspo** ends below 0.70 (seed 0, seed 1, seed 2): its clip is narrow." in text and "**grpo**" not in text
    assert "documents masked less documents trained on" in text
    algorithms.picture(found, tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_is_not_run_again(finished, monkeypatch):
    monkeypatch.setattr(sweep.subprocess, "Popen", lambda *a, **k: pytest.fail("a run was started"))
    sweep.run_all(algorithms.runs(finished), parallel=2)

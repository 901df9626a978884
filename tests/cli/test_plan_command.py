"""`zs-fast plan`: what it prints, and what it exits with."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from zs_fast.cli import main


def run(capsys, *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["plan", *words])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def test_a_recipe_that_fits(capsys):
    code, out, err = run(capsys, "grpo_qwen2.5_3b_lora_24gb", "--gpu", "24GiB")
    assert (code, err) == (0, "")
    assert "it fits" in out and "policy kv cache" in out and "engine.slots" in out


def test_one_that_does_not_fit_comes_with_advice_and_an_exit_code(capsys):
    code, out, _ = run(capsys, "grpo_qwen2.5_3b_full_80gb", "--gpu", "24GiB")
    assert code == 3
    assert "IT DOES NOT FIT" in out and "model.lora_rank = 32 saves" in out


def test_a_flag_changes_the_plan_as_it_changes_the_run(capsys):
    words = ("grpo_qwen2.5_3b_full_80gb", "--gpu", "24GiB", "--model.lora_rank", "32", "--engine.slots", "64")
    assert run(capsys, *words)[0] == 0


def test_json_is_one_document(capsys):
    code, out, _ = run(capsys, "grpo_qwen2.5_3b_full_80gb", "--gpu", "rtx4090", "--json")
    plan = json.loads(out)
    assert code == 3 and not plan["fits"] and plan["advice"][0]["field"]
    assert plan["peak_bytes"] == max(phase["total_bytes"] for phase in plan["phases"].values())


def test_this_machine(capsys):
    code, out, _ = run(capsys, "quickstart", "--model.device", "cpu", "--json")
    assert code == 0
    assert json.loads(out)["hardware"] == "main memory"


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("quickstart", "--gpu", "large"), 2, "neither a size such as 24GiB"),
        (("quickstart", "--gpu"), 2, "--gpu needs a value"),
        ((), 2, "needs a recipe"),
        (("quickstart", "--train.stepz", "3"), 2, "train.stepz"),
        (("quickstart", "--model.path", "models/Unheard-9B", "--gpu", "h100"), 3, "config.json"),
    ],
)
def test_wrong_words(capsys, words, code, text):
    found, _, err = run(capsys, *words)
    assert found == code
    assert text in err


def test_help_names_the_card(capsys):
    assert "--gpu" in run(capsys, "--help")[1]


RECIPES_PAGE = (Path(__file__).resolve().parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
CARD_ROW = re.compile(r"^\| (\d+ GiB) \| `(\S+)` \| [^|]+ \| (\S+) \| (\S+) \| (\S+) \|$", re.MULTILINE)


@pytest.mark.parametrize("card, recipe, budget, peak, seconds", CARD_ROW.findall(RECIPES_PAGE))
def test_the_page_of_recipes_has_what_plan_says(capsys, card, recipe, budget, peak, seconds):
    code, out, _ = run(capsys, recipe, "--gpu", card.replace(" ", ""), "--json")
    plan = json.loads(out)
    times = sum(phase["seconds"] or 0.0 for phase in plan["phases"].values())
    assert code == 0 and plan["fits"]
    assert [budget, peak] == [f"{plan[name] / 2**30:.1f}" for name in ("budget_bytes", "peak_bytes")]
    assert seconds == f"{times:.0f}"


def test_there_is_a_recipe_for_each_size_of_card():
    assert {card for card, *_ in CARD_ROW.findall(RECIPES_PAGE)} == {"5 GiB", "16 GiB", "24 GiB", "80 GiB"}

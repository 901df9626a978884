"""The page and the picture: complete, self-contained, and safe with hostile text. A browser has its own tests."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from zs_fast.errors import DataError
from zs_fast.report.charts import charts_of, thin
from zs_fast.report.page import embed, visible, write_report
from zs_fast.report.plots import reward_curve, running_mean
from zs_fast.report.rollouts import MOST_ROLLOUTS, sample_indices
from zs_fast.report.run_data import collect_series, read_runs
from zs_fast.report.tables import NONE, differing_settings, final_figures
from zs_fast.system.jsonl import encode_row

HOSTILE = "</pre><script>alert('canary')</script><img src=x onerror=alert(1)> {{ 7*7 }} {% raw %} \ud800 \x00 &amp; $x_"


def hostile_rollout(step: int, sample: int = 0) -> dict[str, object]:
    search = {"mode": HOSTILE, "contains_answer": True, "failed": True, "error": HOSTILE}
    action = {"kind": HOSTILE, "text": HOSTILE}
    turn = {"text": HOSTILE, "observation": HOSTILE, "action": action, "search": search}
    names = ("question", "question_id", "source", "answer", "stop_reason", "prompt")
    return {
        "step": step,
        "sample": sample,
        "answers": [HOSTILE],
        "f1": 0.5,
        "trainable": False,
        "turns": [turn],
        **dict.fromkeys(names, HOSTILE),
    }


def make_run(folder: Path) -> Path:
    run = folder / "<b>run"
    run.mkdir()
    rows: list[dict[str, object]] = [{"step": 0, "eval/simulator/f1": 0.1}]
    rows += [{"step": s, "reward/mean": s / 10, "loss": "nan", f"source/{HOSTILE}/f1": 0.5} for s in range(1, 6)]
    (run / "metrics.jsonl").write_bytes(b"".join(map(encode_row, rows)))
    (run / "timings.jsonl").write_bytes(encode_row({"step": 1, "rollout/seconds": 2.0}))
    rollouts = [hostile_rollout(step, sample) for step in range(1, 6) for sample in range(2)]
    (run / "rollouts.jsonl").write_bytes(b"".join(map(encode_row, rollouts)))
    (run / "config.toml").write_text(f'name = "{HOSTILE[:30]}"')
    (run / "summary.json").write_text(json.dumps({HOSTILE: HOSTILE, "f1_after": 0.87654321, "evaluations": {"x": 1}}))
    (run / "env.json").write_text(json.dumps({"cpu": HOSTILE, "gpu": None, "zs_fast": "0.1.0"}))
    return run


class Inventory(HTMLParser):
    """Every tag and attribute of a page, and its text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def data_of(page: str) -> dict[str, object]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found.group(1))


def page_of(run: Path) -> str:
    return write_report([run]).path.read_text(encoding="utf-8")


def test_hostile_text_is_shown_and_never_markup(tmp_path: Path) -> None:
    text = page_of(make_run(tmp_path))
    page = Inventory()
    page.feed(text)
    assert page.tags.count("script") == 2 and "b" not in page.tags and "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "<script>alert('canary')</script>" in page.text and "{{ 7*7 }}" in page.text
    assert not [value for name, value in page.attributes if name == "src"]
    assert "https://" not in text and text.replace("http://www.w3.org/2000/svg", "").count("http://") == 0
    assert data_of(text)["rollouts"][0]["question"] == visible(HOSTILE)


def test_the_policy_allows_the_pages_own_script_and_style_alone(tmp_path: Path) -> None:
    text = page_of(make_run(tmp_path))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None and "default-src 'none'" in policy.group(1)
    for tag in ("script", "style"):
        content = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert len(content) == 1
        digest = base64.b64encode(hashlib.sha256(content[0].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy.group(1)


def test_embedded_data_is_ascii_and_shows_what_can_not_be_seen() -> None:
    text = "</script><!-- \u2028 \ud83d \x00\x1b\r\t\n& é"
    embedded = embed({text: text})
    assert embedded.isascii() and not re.search("[<>&\x00-\x1f]", embedded)
    (key, value), *rest = json.loads(embedded).items()
    assert not rest and key == value == "</script><!-- \u2028 \ufffd ␀␛␍\t\n& é" and len(value) == len(text)


def test_a_run_that_only_began_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b"")
    text = page_of(tmp_path)
    assert "metrics.jsonl has no row yet." in text and "rollouts.jsonl is missing." in text
    assert data_of(text)["charts"] == [] and data_of(text)["rollouts"] == []


def test_a_torn_last_line_is_left_out_and_said(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for name in ("metrics.jsonl", "timings.jsonl", "rollouts.jsonl"):
        with (run / name).open("ab") as file:
            file.write(b'{"step": 9, "torn')
    text = page_of(run)
    assert all(f"{name} ends within a line" in text for name in ("metrics.jsonl", "timings.jsonl", "rollouts.jsonl"))
    assert len(data_of(text)["rollouts"]) == 10 and "5 steps" in text


@pytest.mark.parametrize(
    ("name", "content"),
    [("config.toml", b"= \xff"), ("summary.json", b'{"f1'), ("env.json", b"[1]"), ("env.json", b"[" * 100_000)],
)
def test_a_broken_side_file_is_a_note(tmp_path: Path, name: str, content: bytes) -> None:
    run = make_run(tmp_path)
    (run / name).write_bytes(content)
    assert re.search(f"<li>{re.escape(name)} is not (TOML|JSON|a JSON object)", page_of(run))


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("metrics.jsonl", b'{"step": 1, "a": [2]}', "which is no number"),
        ("metrics.jsonl", b'{"a": 2}', "no whole number `step`"),
        ("timings.jsonl", b'{"step": true}', "no whole number `step`"),
        ("timings.jsonl", b'{"step": -1}', "no whole number `step`"),
        ("rollouts.jsonl", b'{"step": 1, "question": 5, "turns": []}', "row 1, is no rollout"),
        ("rollouts.jsonl", b'{"step": 1, "question": "q", "turns": [3]}', "is no rollout"),
        ("rollouts.jsonl", b'{"step": 1, "question": "q", "turns": [{"text": "", "action": "a"}]}', "is no rollout"),
        ("rollouts.jsonl", b'{"step": 1, "turns": []}', "KeyError at 'question'"),
        ("rollouts.jsonl", b"{torn", "is not JSON"),
    ],
)
def test_a_broken_row_is_one_error_that_names_the_file(tmp_path: Path, name: str, row: bytes, said: str) -> None:
    run = make_run(tmp_path)
    (run / name).write_bytes(row + b"\n")
    with pytest.raises(DataError, match=re.escape(said)) as caught:
        write_report([run])
    assert name in str(caught.value)


def test_a_folder_without_a_run_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no metrics\.jsonl"):
        write_report([tmp_path])
    with pytest.raises(DataError, match="is not a folder"):
        write_report([tmp_path / "missing"])
    run = make_run(tmp_path)
    with pytest.raises(DataError, match="given twice"):
        write_report([run, run / ".." / run.name], tmp_path / "page.html")
    with pytest.raises(DataError, match="can't be written"):
        write_report([run], tmp_path / "missing" / "page.html")


def test_the_reward_curve_is_a_png_and_the_same_each_time(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for name in ("a.png", "b.png"):
        reward_curve(run / "metrics.jsonl", tmp_path / name)
    first = (tmp_path / "a.png").read_bytes()
    assert first.startswith(b"\x89PNG") and first == (tmp_path / "b.png").read_bytes()
    (tmp_path / "empty.jsonl").write_bytes(b"")
    reward_curve(tmp_path / "empty.jsonl", tmp_path / "empty.png")
    assert (tmp_path / "empty.png").read_bytes() != first


def test_series_keep_gaps_for_values_that_are_not_finite() -> None:
    rows = [{"step": 1, "a": 1}, {"step": 2, "a": "nan", "b": 0.5}, {"step": 3, "a": "inf"}, {"step": 4, "a": 10**400}]
    series = collect_series(rows)
    steps, values = series["a"]
    assert steps == [1, 2, 3, 4] and values[0] == 1.0 and all(value != value for value in values[1:])
    assert series["b"] == ([2], [0.5])
    assert collect_series([{"step": 3, "a": 1}, {"step": 2, "a": 2}])["a"] == ([2, 3], [2.0, 1.0])
    assert running_mean([1.0, 3.0, float("nan"), 5.0], 2) == [1.0, 2.0, 3.0, 5.0]


def test_a_thinned_curve_keeps_every_extreme_of_its_stretches() -> None:
    values = [float(index % 7) for index in range(10_000)]
    values[1234], values[9876], values[5] = 99.0, -99.0, float("nan")
    steps, kept = thin((list(range(10_000)), values), 200)
    assert len(steps) <= 200 and steps == sorted(steps)
    assert max(kept) == 99.0 and min(kept) == -99.0 and steps[kept.index(99.0)] == 1234
    assert thin(([1], [2.0]), 200) == ([1], [2.0])


def write_run(folder: Path, num_rollouts: int, config: str = "", f1: float = 0.5) -> Path:
    folder.mkdir(parents=True)
    rows = [{"step": step, "reward/mean": f1, "stop/answer": 1.0, "stop/turn_limit": 0.0} for step in range(1, 21)]
    evaluation = {"eval/bm25/f1": f1, "eval/bm25/f1_low": f1 - 0.1, "eval/bm25/f1_high": f1 + 0.1}
    rows.append({"step": 20, **evaluation, "eval/bm25/num_questions": 200.0})
    (folder / "metrics.jsonl").write_bytes(b"".join(map(encode_row, rows)))
    (folder / "config.toml").write_text(config)
    turn = {"text": "<answer> é🗻 </answer>", "tokens": 3, "token_lengths": ":<0", "observation": "", "action": {}}
    rollouts = [
        {"step": 1 + index // 500, "question": f"q{index}", "prompt": f"say q{index}.", "f1": 1.0, "turns": [turn]}
        for index in range(num_rollouts)
    ]
    (folder / "rollouts.jsonl").write_bytes(b"".join(map(encode_row, rollouts)))
    return folder


def test_a_large_run_has_a_stated_sample_of_all_its_steps(tmp_path: Path) -> None:
    run = write_run(tmp_path / "large", 10_000)
    text = page_of(run)
    data = data_of(text)
    assert len(data["rollouts"]) == MOST_ROLLOUTS and len(data["prompts"]) == 1
    assert f"{MOST_ROLLOUTS} of 10000 rollouts are here, drawn with a fixed seed" in text
    assert {rollout["step"] for rollout in data["rollouts"]} == set(range(1, 21))
    assert page_of(run) == text, "the same run gives the same page"
    assert write_report([run], most_rollouts=0).num_rollouts == 10_000
    assert write_report([run], most_rollouts=7).num_rollouts == 7


def test_the_sample_is_one_of_each_stretch() -> None:
    chosen = sample_indices(1000, 10)
    assert [index // 100 for index in chosen] == list(range(10)) and len({index % 8 for index in chosen}) > 2
    assert sample_indices(3, 5) == [0, 1, 2] and sample_indices(0, 5) == []


def test_the_loss_mask_follows_the_configuration(tmp_path: Path) -> None:
    config = '[algorithm]\nmask_documents = false\nmask_stop_reasons = ["turn_limit"]\n'
    run = write_run(tmp_path / "run", 0, config)
    turns = {"question": "", "turns": []}
    rows = [{"step": 1, "stop_reason": "answer"}, {"step": 1, "stop_reason": "turn_limit"}]
    rows.append({"step": 1, "stop_reason": "answer", "trainable": False})
    (run / "rollouts.jsonl").write_bytes(b"".join(encode_row(row | turns) for row in rows))
    rollouts = data_of(page_of(run))["rollouts"]
    assert [rollout["in_loss"] for rollout in rollouts] == [True, False, False]
    assert [rollout["documents_in_loss"] for rollout in rollouts] == [True, False, False]


def test_several_runs_are_compared(tmp_path: Path) -> None:
    same = 'name = "x"\noutput = "{}"\n[train]\nlearning_rate = {}\nsteps = 20\n'
    first = write_run(tmp_path / "a" / "run", 1, same.format("here", 0.1), f1=0.25)
    second = write_run(tmp_path / "b" / "run", 2, same.format("there", 0.2) + "epochs = 2\n")
    runs = read_runs([first, second])
    assert [run.label for run in runs] == ["a/run", "b/run"]
    differing = {row.name: row.values for row in differing_settings(runs)}
    assert differing == {"train.learning_rate": ("0.1", "0.2"), "train.epochs": (NONE, "2")}
    figures = {row.name: row.values for row in final_figures(runs)}
    evaluation = "0.250 (0.150 to 0.350, n 200, step 20)", "0.500 (0.400 to 0.600, n 200, step 20)"
    assert figures["held-out F1, bm25 search"] == evaluation
    assert figures["reward (mean of last 10 steps)"] == ("0.250", "0.500")
    charts, thinned = charts_of(runs)
    titles = {chart["title"]: [line["run"] for line in chart["lines"]] for chart in charts}
    assert titles["Reward"] == titles["How trajectories end: turn_limit"] == [0, 1] and not thinned
    assert len(data_of(write_report([first, second], tmp_path / "two.html").path.read_text())["rollouts"]) == 3
    with pytest.raises(DataError, match="Give its file"):
        write_report([first, second])


def test_every_curve_says_what_it_is_once(tmp_path: Path) -> None:
    charts, _ = charts_of(read_runs([write_run(tmp_path / "run", 0)]))
    drawn = {chart["title"]: [line["label"] for line in chart["lines"]] for chart in charts}
    assert drawn["How trajectories end"] == ["answer", "turn_limit"] and drawn["Held-out F1"] == ["bm25"]
    assert drawn["eval/bm25/num_questions"] and not [title for title in drawn if title.endswith("f1_low")]
    assert all(chart["about"] for chart in charts)

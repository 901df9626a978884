"""The page and the picture: complete, self-contained, and safe with hostile text."""

from __future__ import annotations

import base64
import json
import re
import struct
from html.parser import HTMLParser
from pathlib import Path

import pytest

from zs_fast.errors import DataError
from zs_fast.report.page import spread, write_report
from zs_fast.report.plots import collect_series, panels_png, reward_curve, running_mean
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


def test_hostile_text_is_shown_and_never_markup(tmp_path: Path) -> None:
    path = write_report(make_run(tmp_path))
    page = Inventory()
    page.feed(path.read_text(encoding="utf-8"))
    assert "script" not in page.tags and "b" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "<script>alert('canary')</script>" in page.text and "{{ 7*7 }}" in page.text
    assert page.text.count("alert('canary')") > 100
    sources = [value or "" for name, value in page.attributes if name in ("src", "href", "action")]
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert ("http-equiv", "Content-Security-Policy") in page.attributes
    assert "http://" not in path.read_text(encoding="utf-8") and "https://" not in path.read_text(encoding="utf-8")


def test_pictures_in_the_page_are_pngs(tmp_path: Path) -> None:
    text = write_report(make_run(tmp_path)).read_text(encoding="utf-8")
    images = [base64.b64decode(found) for found in re.findall(r"base64,([A-Za-z0-9+/=]+)", text)]
    assert len(images) >= 4
    for image in images:
        assert image.startswith(b"\x89PNG\r\n\x1a\n")
        width, height = struct.unpack(">II", image[16:24])
        assert width > 300 and height > 100
    assert "0.8765" in text and "5 steps" in text and "10 recorded" in text


def test_a_run_that_only_began_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b"")
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "No metrics yet." in text and "No rollouts recorded." in text


def test_a_folder_without_a_run_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no metrics\.jsonl"):
        write_report(tmp_path)


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
    series = collect_series([{"step": 1, "a": 1}, {"step": 2, "a": "nan", "b": 0.5}, {"step": 3, "a": "inf"}])
    steps, values = series["a"]
    assert steps == [1, 2, 3] and values[0] == 1.0 and values[1] != values[1] and values[2] != values[2]
    assert series["b"] == ([2], [0.5])
    assert panels_png(series).startswith(b"\x89PNG")
    means = running_mean([1.0, 3.0, float("nan"), 5.0], 2)
    assert means == [1.0, 2.0, 3.0, 5.0]
    assert running_mean([float("nan")], 3)[0] != running_mean([float("nan")], 3)[0]


def test_rollouts_shown_are_spread_over_the_run() -> None:
    rows = [{"step": step, "sample": sample} for step in range(1, 101) for sample in range(3)]
    shown, count = spread(rows, steps=3, per_step=2)
    assert count == 300
    assert [(step, len(chosen)) for step, chosen in shown] == [(100, 2), (51, 2), (1, 2)]
    assert spread([], steps=3) == ([], 0)
    assert [step for step, _ in spread([{"step": 4}], steps=3)[0]] == [4]

"""The report in a real headless Chromium: `make test-report`. Skipped, with a reason, where there is none."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from zs_fast.report.page import write_report
from zs_fast.system.jsonl import encode_row

pytestmark = pytest.mark.browser

HOSTILE = (
    "</script><script>window.canary = 1</script><img src=x onerror='window.canary = 2'><svg onload='window.canary = 3'>"
    "<!--<script> {{ 7*7 }} \u2028\u2029 \ud800 \x00\x1b\x7f \u202e &lt; ' \" ` ${window.canary = 4} é🗻"
)
SHOWN = HOSTILE.replace("\ud800", "\ufffd").replace("\x00\x1b\x7f", "␀␛␡")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: make test-report installs it")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = os.environ.get("ZS_FAST_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no Chromium: apt-get install chromium, or set ZS_FAST_CHROMIUM to the program")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Any]:
    """Open a file; every error, console message and request of the page fails the test."""
    contexts, wrong = [], []

    def open_file(path: Path, width: int = 1280, height: int = 900, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text))
        page.on("request", lambda request: request.url == path.as_uri() or wrong.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_file
    for context in contexts:
        context.close()
    assert not wrong


def wait_for(page: Any, selector: str, start: str) -> None:
    """Until the element's text starts so. Playwright's own waiting needs `eval`, which the page's policy forbids."""
    text = ""
    for _ in range(100):
        text = page.locator(selector).first.evaluate("e => e.textContent")
        if text.startswith(start):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"{selector} is {text!r} and never starts with {start!r}")


def lengths(text: str, size: int = 4) -> str:
    """Tokens of `size` characters, and a last one without text."""
    return "".join(chr(48 + len(text[at : at + size])) for at in range(0, len(text), size)) + "0"


def rollout(step: int, **changed: Any) -> dict[str, Any]:
    first, found = "<think> why </think>\n<search> q </search>", "\n<information>Doc 1: d</information>\n"
    last = "<think> so </think>\n<answer> a </answer>"
    search = {"mode": "useful", "contains_answer": True, "malformed": False, "failed": False, "error": ""}
    turns = [
        {"text": first, "observation": found, "search": search, "action": {"kind": "search", "text": "q"}},
        {"text": last, "observation": "", "search": None, "action": {"kind": "answer", "text": "a"}},
    ]
    for turn in turns:
        turn["token_lengths"] = lengths(turn["text"])
        turn["tokens"] = len(turn["token_lengths"])
        turn["observation_token_lengths"] = lengths(turn["observation"])[:-1]
    row = {"step": step, "question_id": f"id{step}", "source": "nq", "question": f"question {step}?", "answers": ["a"]}
    row |= {"sample": 0, "answer": "a", "reward": 1.0, "f1": 1.0, "exact_match": 1.0, "stop_reason": "answer"}
    return row | {"trainable": True, "prompt": f"Q: question {step}?", "prompt_tokens": 7, "turns": turns} | changed


def write_run(folder: Path, rollouts: list[dict[str, Any]], steps: int = 12, **metrics: float) -> Path:
    folder.mkdir(parents=True)
    rows = [
        {"step": step, "reward/mean": step / steps, "trajectory/searches": 1.5, "entropy": 0.5, **metrics}
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_bytes(b"".join(map(encode_row, rows)))
    (folder / "timings.jsonl").write_bytes(b"".join(encode_row({"step": s, "rollout/seconds": 2.0}) for s in (1, 2)))
    (folder / "rollouts.jsonl").write_bytes(b"".join(map(encode_row, rollouts)))
    (folder / "config.toml").write_text("[algorithm]\nmask_documents = true\n")
    (folder / "env.json").write_text(json.dumps({"cpu": "a processor", "zs_fast": "0.1.0"}))
    (folder / "summary.json").write_text(json.dumps({"seconds": 3.5}))
    return folder


def hostile_run(folder: Path) -> Path:
    rows = []
    for step in (1, 2):
        row = rollout(step, question=HOSTILE, prompt=HOSTILE, answer=HOSTILE, stop_reason=HOSTILE, source=HOSTILE)
        turn = {"text": HOSTILE, "tokens": 3, "token_lengths": lengths(HOSTILE), "observation": HOSTILE}
        turn |= {"observation_token_lengths": "", "action": {"kind": "invalid", "text": HOSTILE}}
        turn["search"] = {"mode": HOSTILE, "error": HOSTILE, "failed": True}
        rows.append(row | {"turns": [turn], "answers": [HOSTILE], "question_id": HOSTILE})
    run = write_run(folder / "<b>run'\"&", rows, **{f"source/{HOSTILE}/f1": 0.5, HOSTILE: 1.0})
    (run / "env.json").write_bytes(json.dumps({"cpu": HOSTILE, "zs_fast": HOSTILE}).encode())
    (run / "config.toml").write_text(f"name = '''{HOSTILE[:30]}'''")
    return run


def test_hostile_text_is_shown_whole_and_does_nothing(open_page: Any, tmp_path: Path) -> None:
    runs = [hostile_run(tmp_path / "one"), hostile_run(tmp_path / "two")]
    for folders in (runs[:1], runs):
        page = open_page(write_report(folders, tmp_path / "page.html").path)
        for summary in page.locator(".rollout > summary").all():
            summary.click()
        for details in page.locator("details:not([open]) > summary").all():
            if details.is_visible():
                details.click()
        page.wait_for_timeout(100)
        assert page.evaluate("window.canary") is None
        assert page.locator("img, b, iframe, [onerror], [onload]").count() == 0
        assert page.locator(".rollout .question").first.evaluate("e => e.textContent") == SHOWN
        words = page.locator(".rollout > pre.words").first.evaluate("e => e.textContent")
        assert words == SHOWN + SHOWN
        assert HOSTILE[:40] in page.locator("#charts").evaluate("e => e.textContent")


def test_the_mask_is_visible_token_by_token(open_page: Any, tmp_path: Path) -> None:
    rows = [rollout(2), rollout(1, trainable=False, stop_reason="search_failed")]
    page = open_page(write_report([write_run(tmp_path / "run", rows)]).path)
    page.locator(".rollout > summary").first.click()
    box = page.locator(".rollout").first.locator("> pre.words")
    turn = rows[0]["turns"][0]
    assert box.first.locator(".in-loss").count() == turn["tokens"]
    assert box.first.locator(".no-loss").count() == len(turn["observation_token_lengths"])
    texts = box.first.locator(".in-loss").evaluate_all("all => all.map(e => e.textContent)")
    assert texts == [turn["text"][at : at + 4] for at in range(0, len(turn["text"]), 4)] + [""]
    numbers = (
        page.locator(".rollout").first.locator("[data-token]").evaluate_all("all => all.map(e => +e.dataset.token)")
    )
    total = sum(len(turn["token_lengths"]) + len(turn["observation_token_lengths"]) for turn in rows[0]["turns"])
    assert numbers == list(range(8, 8 + total))
    for kind, text in (("think", "<think> why </think>"), ("search", "<search> q </search>")):
        assert (
            "".join(box.first.locator(f".in-loss .{kind}").evaluate_all("all => all.map(e => e.textContent)")) == text
        )
    assert "Doc 1: d" in "".join(box.first.locator(".no-loss .information").all_text_contents())
    assert "<answer> a </answer>" in "".join(box.nth(1).locator(".answer").all_text_contents())
    line = "e => getComputedStyle(e).borderBottomStyle"
    assert box.first.locator(".in-loss").first.evaluate(line) == "solid"
    assert box.first.locator(".no-loss").first.evaluate(line) == "dotted"
    assert f"{sum(len(t['token_lengths']) for t in rows[0]['turns'])} of {7 + total} tokens" in page.content()
    page.get_by_label("Show the loss mask").uncheck()
    assert (
        box.first.locator(".in-loss").first.evaluate("e => getComputedStyle(e).borderBottomColor") == "rgba(0, 0, 0, 0)"
    )
    page.locator(".rollout > summary").nth(1).click()
    assert page.locator(".rollout").nth(1).locator(".in-loss").count() == 0


def test_rollouts_without_token_lengths_show_whole_spans(open_page: Any, tmp_path: Path) -> None:
    row = rollout(1)
    for turn in row["turns"]:
        del turn["token_lengths"], turn["observation_token_lengths"]
    page = open_page(write_report([write_run(tmp_path / "run", [row])]).path)
    page.locator(".rollout > summary").first.click()
    spans = page.locator(".rollout > pre.words").first.locator(".token")
    assert spans.evaluate_all("all => all.map(e => e.title)") == ["tokens not told apart"] * 2


def test_filters(open_page: Any, tmp_path: Path) -> None:
    rows = [rollout(step, sample=sample, reward=step / 10, f1=0.0) for step in range(1, 11) for sample in range(4)]
    rows[5] |= {"stop_reason": "turn_limit", "answer": "A Needle"}
    page = open_page(write_report([write_run(tmp_path / "run", rows)]).path)
    status, listed = page.get_by_role("status").last, page.locator(".rollout")

    def matching(number: int) -> None:
        wait_for(page, "#reader [role=status]", f"{number} of 40 rollouts")

    matching(40)
    assert listed.count() == 25 and "25 listed" in status.inner_text()
    page.get_by_role("button", name="Show 15 more").click()
    assert listed.count() == 40 and page.evaluate("document.activeElement.tagName") == "SUMMARY"
    page.get_by_label("Reward from").fill("0.5")
    page.get_by_label("Reward to").fill("0.6")
    matching(8)
    page.get_by_label("Step to").fill("5")
    matching(4)
    page.get_by_role("button", name="Clear filters").click()
    matching(40)
    page.get_by_label("Stop reason").select_option(label="turn_limit")
    matching(1)
    page.get_by_role("button", name="Clear filters").click()
    page.get_by_label("Text in question").fill("a nEEdle")
    matching(1)
    page.get_by_label("Text in question").fill("not there")
    matching(0)
    assert listed.count() == 0
    page.get_by_role("button", name="Clear filters").click()
    page.get_by_label("Order").select_option("lowest reward first")
    wait_for(page, ".rollout .chip", "step 1")


def test_values_by_keyboard_and_pointer(open_page: Any, tmp_path: Path) -> None:
    page = open_page(write_report([write_run(tmp_path / "run", [])]).path)
    plot = page.get_by_role("slider", name="Reward")
    plot.focus()
    for key, step in (("Home", 1), ("ArrowRight", 2), ("End", 12), ("ArrowLeft", 11), ("PageDown", 10)):
        page.keyboard.press(key)
        assert plot.get_attribute("aria-valuenow") == str(step)
    assert plot.get_attribute("aria-valuetext") == "step 10: reward 0.8333"
    box = plot.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 12, box["y"] + 40)
    assert page.locator(".readout").first.inner_text() == "step 12: reward 1"
    page.locator("figure summary").first.click()
    assert page.locator("figure").first.locator("tbody tr").count() == 12


def test_runs_are_overlaid_and_can_be_hidden(open_page: Any, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, [rollout(1)]) for name in ("one", "two", "three")]
    (runs[1] / "config.toml").write_text("[algorithm]\nmask_documents = false\n")
    page = open_page(write_report(runs, tmp_path / "page.html").path)
    first = page.locator("figure").first
    assert first.locator("path.curve[class*=' c']").count() == 6 and first.locator(".keys span").count() == 3
    strokes = first.locator(".plot path.curve").evaluate_all("all => all.map(e => getComputedStyle(e).stroke)")
    assert len(set(strokes)) == 3
    page.get_by_label("two").first.uncheck()
    assert first.locator(".plot path.curve").count() == 2 and "two" not in first.locator(".readout").inner_text()
    row = page.locator("section", has=page.locator("#settings")).get_by_role("row").nth(1)
    assert "algorithm.mask_documents" in row.inner_text() and "false" in row.inner_text()
    page.get_by_label(re.compile("^Run")).last.select_option(label="three")
    wait_for(page, "#reader [role=status]", "1 of 3 rollouts")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scroll_and_text_has_contrast(open_page: Any, tmp_path: Path, scheme: str) -> None:
    wide = "w" * 400
    runs = [write_run(tmp_path / f"run_{index}_{'n' * 60}", [rollout(1, question=wide)]) for index in range(6)]
    (runs[0] / "config.toml").write_text(f'name = "{wide}"')
    for folders in (runs[:1], runs):
        page = open_page(write_report(folders, tmp_path / "page.html").path, 360, 800, scheme)
        page.locator(".rollout > summary").first.click()
        for summary in page.locator("#charts > details > summary, figure summary").all()[:3]:
            summary.click()
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        assert min(page.evaluate(CONTRASTS)) >= 4.5
        unnamed = "input, select, button, [role=slider], [role=region]"
        for control in page.locator(unnamed).all():
            labels = "e => (e.labels?.[0]?.textContent || e.getAttribute('aria-label') || e.textContent).trim()"
            assert control.evaluate(labels)


CONTRASTS = """() => {
  const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const linear = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const behind = (e) => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length === 3 || c[3] > 0) return c; } return parse(getComputedStyle(document.body).backgroundColor); };
  const own = [...document.querySelectorAll("body *")].filter((e) => !/SCRIPT|STYLE/.test(e.tagName)
    && e.getClientRects().length && [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()));
  return own.map((e) => { const style = getComputedStyle(e);
    const [one, other] = [light(parse(e instanceof SVGElement ? style.fill : style.color)), light(behind(e))];
    return (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05); });
}"""


def test_ten_thousand_rollouts_open_quickly(open_page: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [rollout(1 + index // 100) for index in range(10_000)], steps=5000)
    start = time.perf_counter()
    report = write_report([run])
    written = time.perf_counter()
    page = open_page(report.path)
    page.locator(".rollout").first.wait_for()
    opened = time.perf_counter()
    print(f"written in {written - start:.1f} s, {report.num_bytes / 1e6:.1f} MB, opened in {opened - written:.1f} s")
    assert report.num_bytes < 8e6 and opened - written < 15
    assert "2000 of 10000" in page.locator("main").inner_text()
    page.get_by_label("Text in question").fill("question 57?")
    wait_for(page, "#reader [role=status]", "20 of 2000 rollouts")

"""The page driven in a real Chromium, from a file, as a reader does it."""

import functools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_sstoken.report import page as page_module
from megatron_sstoken.report.page import render
from tests.helpers.report_example import HOSTILE, LONG, example, example_of_many, hostile

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (pip install -e '.[dev]')")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium, chromium-browser or google-chrome here")

WIDE = {"viewport": {"width": 1280, "height": 900}}
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True}
SCREENS = {"wide": WIDE, "phone": PHONE}
UNFINISHED = "details[open]:not(:has(> :not(summary))), .picture:empty"
"""What the page fills in events that follow a click or its own loading: parts that were opened, and charts."""


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    """One browser for all tests; its windows have no network."""
    sync_api.expect.set_options(timeout=30_000)  # as for clicks: the cores may be busy
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


class Window:
    """Shows one page after another, and tells all that they do besides."""

    def __init__(self, browser: sync_api.Browser, screen: dict[str, Any]):
        self.page = browser.new_context(offline=True, **screen).new_page()
        self.events: list[str] = []
        self._address = ""
        self.page.on("console", lambda message: self.events.append(f"console: {message.text}"))
        self.page.on("pageerror", lambda error: self.events.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: (self.events.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.page.on("request", lambda request: request.url != self._address and self.events.append(request.url))

    def open(self, path: Path) -> None:
        """Nothing of the page before is left: no pointer where it was, no other medium or theme."""
        self.page.mouse.move(0, 0)
        self.page.emulate_media(media="null", color_scheme="null")
        self._address = path.as_uri()
        self.page.goto(self._address)
        self.finished()

    def finished(self) -> None:
        """Waits until there is all that the page makes by itself."""
        sync_api.expect(self.page.locator(UNFINISHED)).to_have_count(0)

    def unfold(self, summaries: sync_api.Locator) -> None:
        """Clicks each, and waits until what they open is there."""
        sync_api.expect(summaries).not_to_have_count(0)
        for summary in summaries.all():
            summary.click()
        self.finished()

    def figure(self, name: str) -> sync_api.Locator:
        """In the panel, of the token that is pointed at."""
        return self.page.locator(f".panel dl > div:has(> dt:text-is('{name}')) > dd")

    def shown_samples(self) -> list[int]:
        return self.page.eval_on_selector_all(".sample", "nodes => nodes.map((node) => Number(node.dataset.sample))")

    def panel(self) -> dict[str, str]:
        return dict(
            self.page.eval_on_selector_all(
                ".panel dl > div", "nodes => nodes.map((node) => [...node.children].map((one) => one.textContent))"
            )
        )

    def token(self, sample: int, index: int) -> sync_api.Locator:
        return self.page.locator(f"[data-sample='{sample}'] [data-index='{index}']")

    def wait_for(self, happened: Callable[[], bool]) -> None:
        """Until something has happened that the page cannot tell; at most 10 seconds."""
        for _ in range(200):
            if happened():
                return
            self.page.wait_for_timeout(50)
        raise AssertionError(self.events)

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        return self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


@pytest.fixture(scope="module")
def window_on(browser) -> Callable[[str], Window]:
    """The one window on each of `SCREENS`: to open a window takes longer than to show a page."""
    return functools.cache(lambda screen: Window(browser, SCREENS[screen]))


@pytest.fixture
def show(window_on, tmp_path) -> Iterator[Callable[..., Window]]:
    """Shows a report in place of the last one; at the end nothing may have gone wrong, been asked or been requested."""
    windows: list[Window] = []

    def show_report(report: dict, screen: str = "wide") -> Window:
        path = tmp_path / f"{len(windows)}.html"
        path.write_text(render(report), encoding="utf-8", newline="")
        windows.append(window_on(screen))
        windows[-1].open(path)
        return windows[-1]

    yield show_report
    events = []
    for window in windows:
        window.page.evaluate("new Promise(requestAnimationFrame)")  # what is under way counts, too
        events += window.events
        window.events.clear()
    assert events == []


def test_it_answers_the_three_questions_and_shows_every_part(show):
    report = example()
    window = show(report)
    page = window.page
    assert page.title() == page.locator("h1").text_content() == report["title"]
    assert page.locator("#verdict p").all_text_contents() == list(report["verdict"].values())
    assert page.locator("#notes li").all_text_contents() == report["notes"]
    assert page.locator(".chart h3").all_text_contents() == [
        "Validation",
        "All response tokens",
        "Kept tokens",
        "Dropped tokens",
        "Drift: dropped tokens, loss − history loss",
    ]
    settings = page.locator("#settings table").first.text_content()
    assert all(name in settings for run in report["runs"] for name in run["changed"])
    assert page.locator("#facts dd").all_text_contents() == [one["value"] for one in report["facts"] if one["value"]]
    window.unfold(page.get_by_text("What these words mean"))
    words = page.locator("#facts tbody tr").all_text_contents()
    assert words == [f"{one['name']}{one['value'] or ''}{one['meaning']}" for one in report["facts"]]
    window.unfold(page.get_by_text("All settings of full"))
    assert "explore" in page.locator("#settings details[open]").text_content()


def test_charts_tell_values_to_pointer_keys_and_tables(show):
    report = example()
    curve, shorter = (report["runs"][n]["curves"]["loss/validation"] for n in (0, 1))
    shorter.pop()
    window = show(report)
    page = window.page
    chart = page.locator(".chart").first
    frame, value = chart.locator(".chart-frame"), chart.locator(".legend .value").first
    assert value.text_content() == f"{curve[-1][1]:.4g}"
    assert chart.locator(".legend .value").nth(1).text_content() == f"{shorter[-1][1]:.4g}"
    box = frame.bounding_box()
    page.mouse.move(box["x"] + 50, box["y"] + 60)
    sync_api.expect(value).to_have_text(f"{curve[0][1]:.4g}")
    page.mouse.move(0, 0)
    frame.focus()
    page.keyboard.press("ArrowLeft")
    assert f"step {curve[-2][0]}: run {curve[-2][1]:.4g}" in frame.get_attribute("aria-valuetext")
    page.mouse.move(0, 0)
    window.unfold(page.get_by_text("Show as tables"))
    cells = page.locator("#losses table").first.locator("tbody tr").first.locator("th, td").all_text_contents()
    assert cells == [str(curve[0][0]), *(f"{run['curves']['loss/validation'][0][1]:.4g}" for run in report["runs"])]


def test_charts_share_their_steps_and_drift_has_its_bound(show):
    report = example()
    for name, curve in report["runs"][0]["curves"].items():
        if name != "loss/validation":
            curve[:] = [point for point in curve if point[0] > 10]
    page = show(report).page
    texts = "[...one.querySelectorAll('.axes text[text-anchor=middle]')].map((text) => text.textContent)"
    ticks = f"charts => charts.map((one) => {texts})"
    (wide, *small) = page.eval_on_selector_all(".chart", ticks)
    assert wide[0] == small[0][0] and all(one == small[0] for one in small)
    drift = page.locator(".chart").last
    assert page.locator("#losses .threshold-text").all_text_contents() == ["bound 0.2"]
    assert 0 < drift.locator(".threshold").bounding_box()["y"] - drift.locator("svg").first.bounding_box()["y"] < 180
    report["selection"]["drift_bound"] = None
    assert show(report).page.locator("#losses .threshold").count() == 0


def test_scores_of_a_step_and_their_threshold(show):
    report = example()
    report["scores"]["40"]["threshold"] = 0.25
    window = show(report)
    page = window.page
    assert f"{sum(report['scores']['60']['dropped']):,} dropped" in page.locator("#scores").text_content()
    assert page.locator("#scores rect.up").count() == 30
    assert page.locator("#scores .threshold").count() == 0
    assert "each sample has a threshold of its own" in page.locator("#scores").text_content()
    page.locator("#scores-step").select_option("40")
    assert page.locator("#scores .threshold-text").text_content() == "threshold 0.25"
    window.unfold(page.get_by_text("Show as table", exact=True))
    cells = page.locator("#scores tbody tr").first.locator("td").all_text_contents()
    assert cells == [str(report["scores"]["40"][kind][0]) for kind in ("selected", "dropped")]


def test_bars_of_scores_tell_what_they_hold_to_pointer_and_keys(show):
    report = example()
    scores = report["scores"]["60"]
    page = show(report).page
    frame, reading = page.locator("#scores .chart-frame"), page.locator("#scores .chart-frame + p")
    rest = reading.text_content()

    def says(index):
        low, high = (f"{scores['edges'][place]:.4g}" for place in (index, index + 1))
        return f"Score {low} to {high}: {scores['selected'][index]:,} kept, {scores['dropped'][index]:,} dropped"

    bar = page.locator("#scores rect.up").nth(12)
    bar.hover()
    sync_api.expect(reading).to_have_text(says(12))
    page.mouse.move(0, 0)
    sync_api.expect(reading).to_have_text(rest)
    frame.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert reading.text_content() == frame.get_attribute("aria-valuetext") == says(1)


def test_groups_stand_above_the_kinds_which_have_a_least_count(show):
    report = example()
    page = show(report).page
    group = report["groups"][0]
    row = page.locator("#types .groups tbody tr").first.locator("th, td").all_text_contents()
    assert row == [
        *["digits", f"{group['count']:,}", f"{100 * group['share']:.1f}%", f"{group['dropped']:,}"],
        *[f"{100 * group['dropped_share']:.1f}%", f"{group['loss']:.3f}"],
    ]
    for kind, count in zip(report["types"], [19, 20, 99, 100], strict=False):
        kind |= {"count": count, "selected_share": 0.0, "change": -0.0003}
    page = show(report).page
    shown = "#types .types tbody .lone"
    page.get_by_role("button", name="Share dropped").click()
    texts = [kind["text"] for kind in report["types"][:4]]
    assert sorted(page.locator(shown).all_text_contents()[:3]) == sorted(texts[1:4])
    page.get_by_label("Tokens that occur").select_option("1")
    assert sorted(page.locator(shown).all_text_contents()[:4]) == sorted(texts)
    page.get_by_label("Tokens that occur").select_option("100")
    assert page.locator(shown).first.text_content() == texts[3]
    assert page.locator("#types .types tbody td:last-child").first.text_content() == "no change"


def test_kinds_are_sorted_by_any_heading(show):
    report = example()
    page = show(report).page
    first = "#types .types tbody tr:first-child th .lone"
    most = max(report["types"], key=lambda kind: kind["count"] * (1 - kind["selected_share"]))
    assert page.locator(first).text_content() == most["text"]
    page.get_by_role("button", name="Share dropped").click()
    least = min(report["types"], key=lambda kind: kind["selected_share"])
    assert page.locator(first).text_content() == least["text"]
    page.get_by_role("button", name="Change").click()
    worst = max(report["types"], key=lambda kind: kind["change"])
    assert page.locator(first).text_content() == worst["text"]
    assert page.locator("#types th[aria-sort=descending]").text_content() == "Change"
    page.get_by_role("button", name=f"Show all {len(report['types'])}").click()
    assert page.locator("#types .types tbody tr").count() == len(report["types"])


def test_the_slider_shows_each_step_and_what_flipped(show):
    report = example()
    window = show(report)
    slider = window.page.locator("#step")
    slider.focus()
    for step, before in (("60", "40"), ("40", "0"), ("0", None)):
        assert slider.get_attribute("aria-valuetext") == f"step {step}"
        flipped, dropped = set(), set()
        for sample in report["samples"]:
            at = sample["at"].get(step)
            if at is None or (before is not None and before not in sample["at"]):
                continue
            tokens = [i for i, loss in enumerate(at["loss"]) if loss is not None]
            dropped |= {(sample["sample"], i) for i in tokens if not at["selected"][i]}
            if before is not None:
                earlier = sample["at"][before]["selected"]
                flipped |= {(sample["sample"], i) for i in tokens if earlier[i] != at["selected"][i]}
        assert flipped or before is None
        several = {sample["sample"] for sample in report["samples"] if len(sample["at"]) == 3}
        for kind, expected in (("flipped", flipped), ("dropped", dropped)):
            found = window.page.eval_on_selector_all(
                f".sample .{kind}",
                "nodes => nodes.map((node) => [Number(node.closest('.sample').dataset.sample), Number(node.dataset.index)])",
            )
            assert {tuple(pair) for pair in found if pair[0] in several} == {p for p in expected if p[0] in several}
        told = dict(
            window.page.eval_on_selector_all(
                ".sample",
                "nodes => nodes.map((node) => [node.dataset.sample, node.querySelector('.facts').textContent])",
            )
        )
        for sample in report["samples"]:
            if step in sample["at"]:
                ending = f"step {step}" if len(sample["at"]) > 1 else f"recorded at step {step} alone"
                assert told[str(sample["sample"])].endswith(f" · {ending}")
        window.page.keyboard.press("ArrowLeft")
    assert set(window.shown_samples()) == {s["sample"] for s in report["samples"] if "0" in s["at"]}
    window.page.get_by_label("only samples recorded at this step").uncheck()
    assert set(window.shown_samples()) == {s["sample"] for s in report["samples"]}


def test_what_is_most_drifted_is_so_at_the_step_that_is_shown(show):
    report = example()
    several = [sample for sample in report["samples"] if len(sample["at"]) == 3]
    alone = next(sample for sample in report["samples"] if list(sample["at"]) == ["40"])
    alone["drift"] = 99.0  # of another step
    several[-1] |= {"step": 40, "drift": 99.0}

    def drift(sample):
        at = sample["at"]["0"]
        columns = zip(at["loss"], at["history_loss"], at["selected"], strict=True)
        changes = [loss - history for loss, history, kept in columns if loss is not None and not kept]
        return sum(changes) / len(changes)

    window = show(report)
    window.page.locator("#order").select_option("drift")
    assert alone["sample"] not in window.shown_samples()
    window.page.locator("#step").focus()
    window.page.keyboard.press("Home")
    assert window.shown_samples() == [one["sample"] for one in sorted(several, key=drift, reverse=True)]


def test_what_samples_begin_with_alike_is_shown_once(show):
    report = example()
    sample, alike = [
        one for one in report["samples"] if "".join(one["tokens"]["text"]).startswith("<|im_start|>system\nSolve")
    ]
    window = show(report)
    page = window.page
    button = page.locator(f"[data-sample='{alike['sample']}'] .opening")
    assert re.fullmatch(rf"\d+ tokens as in sample {sample['sample']}", button.text_content())
    length = int(button.text_content().split()[0])
    assert alike["tokens"]["id"][:length] == sample["tokens"]["id"][:length] and not any(
        alike["tokens"]["role"][:length]
    )
    assert page.locator(f"[data-sample='{sample['sample']}'] .opening").count() == 0
    assert not window.token(alike["sample"], 0).is_visible() and window.token(alike["sample"], length).is_visible()
    window.token(alike["sample"], length + 2).focus()
    for key in ("Home", "ArrowLeft", "ArrowUp"):
        page.keyboard.press(key)
        assert window.panel()["Position"] == str(length)
    button.click()
    assert window.token(alike["sample"], 0).is_visible() and not button.is_visible()
    page.locator("#search").fill("Solve the")  # what is found is shown, wherever it is
    sync_api.expect(page.locator(".sample")).to_have_count(2)
    assert page.locator(".hit").count() > 2 and all(hit.is_visible() for hit in page.locator(".hit").all())


def test_controls_stay_in_sight_and_cover_nothing_that_is_pointed_at(show):
    page = show(example_of_many(23)).page
    last = page.locator(".sample").last.locator(".token").last
    last.focus()
    bar = page.locator(".bar").bounding_box()
    assert 0 <= bar["y"] < 5 and page.locator("#step").is_visible()
    for _ in range(12):
        page.keyboard.press("ArrowUp")
        tops = page.evaluate("document.activeElement.getBoundingClientRect().top")
        assert tops >= bar["height"]
    assert page.locator(".panel").bounding_box()["y"] >= bar["height"]


BROKEN = """cells => {
  const range = new Range();
  const lines = (text) => (range.selectNodeContents(text), range.getClientRects().length);
  const texts = cells.flatMap((cell) => [...cell.childNodes].filter((node) => node.nodeType === Node.TEXT_NODE && node.data));
  return texts.filter((text) => lines(text) > text.data.split(' ').length).map((text) => text.data);
}"""


@pytest.mark.parametrize("screen", SCREENS)
def test_words_are_whole(show, screen):
    """Those of choices, whichever is chosen, and first columns: a word that is explained, a part of a setting's name."""
    window = show(example(), screen)
    window.unfold(window.page.locator("#facts summary, #settings summary"))
    for table in ("#facts", "#settings"):
        assert window.page.locator(f"{table} tbody th bdi").evaluate_all(BROKEN) == []
    lacking = "one => { const width = one.offsetWidth; one.style.inlineSize = 'max-content'; return one.offsetWidth - width; }"
    for choice in window.page.locator("select").all():
        assert choice.evaluate(lacking) <= 0, choice.text_content()


def test_filters_order_search_and_pages(show):
    report = example_of_many(23)
    report["samples"][22]["tokens"]["text"][3] = " Zebra"
    report["samples"][22]["tokens"]["text"][4] = "fish"
    report["samples"][7]["source"], report["samples"][8]["source"] = "books", "web"
    window = show(report)
    page = window.page
    page.get_by_label("only samples recorded at this step").uncheck()
    assert window.shown_samples() == list(range(10))
    page.get_by_role("button", name="Next").first.click()
    assert window.shown_samples() == list(range(10, 20))
    for order in ("dropped_share", "drift", "top_score"):
        page.locator("#order").select_option(order)
        ranked = sorted(report["samples"], key=lambda sample: -(sample[order] or 0))
        assert window.shown_samples() == [sample["sample"] for sample in ranked[:10]]
    page.locator("#source").select_option("web")
    assert window.shown_samples() == [8]
    page.locator("#source").select_option("")
    page.locator("#search").fill("zebraF")
    sync_api.expect(page.locator(".sample")).to_have_count(1)
    assert page.locator(".hit").all_text_contents() == [" Zebra", "fish"]
    assert page.locator("#samples p[role=status]").text_content() == "1 of 23 samples"
    page.locator("#search").fill("not there")
    sync_api.expect(page.locator(".sample")).to_have_count(0)
    assert page.locator("#samples p[role=status]").text_content() == "No sample of 23 fits."


def test_a_token_tells_its_figures_to_pointer_and_keys(show):
    report = example()
    window = show(report)
    sample = report["samples"][0]
    index = next(i for i, loss in enumerate(sample["at"]["60"]["loss"]) if loss and loss > 0.1)
    window.token(sample["sample"], index).hover()
    sync_api.expect(window.figure("Position")).to_have_text(str(index))
    at, panel = sample["at"]["60"], window.panel()
    assert window.page.locator(".panel-text").text_content() == sample["tokens"]["text"][index]
    assert float(panel["Loss"]) == at["loss"][index] and float(panel["Score"]) == at["score"][index]
    assert float(panel["Attention"]) == at["attention"][index] and float(panel["Entropy"]) == at["entropy"][index]
    assert panel["State"] == ("kept" if at["selected"][index] else "dropped")
    assert panel["Token id"] == str(sample["tokens"]["id"][index])

    window.token(sample["sample"], index).focus()
    window.page.keyboard.press("ArrowRight")
    focused = "Number(document.activeElement.dataset.index)"
    assert window.page.evaluate(focused) == index + 1
    assert window.panel()["Position"] == str(index + 1)
    assert "Loss" in window.page.locator(".panel [aria-live]").text_content()
    tops = "document.activeElement.getBoundingClientRect().top"
    top = window.page.evaluate(tops)
    window.page.keyboard.press("ArrowUp")
    assert window.page.evaluate(tops) < top
    window.page.keyboard.press("ArrowDown")
    assert window.page.evaluate(tops) == pytest.approx(top)
    window.page.keyboard.press("Home")
    assert window.page.evaluate(focused) == 0
    stops = "all => all.map((one) => one.querySelectorAll('[tabindex=\"0\"]').length)"
    assert set(window.page.eval_on_selector_all(".tokens", stops)) == {1}


def test_shades_follow_the_metric_and_marks_the_choice(show):
    report = example()
    window = show(report)
    sample = report["samples"][0]
    for metric in ("loss", "attention", "rel", "entropy", "score"):
        window.page.locator("#metric").select_option(metric)
        values = [value for value in sample["at"]["60"][metric] if value is not None]
        classes = window.page.eval_on_selector_all(
            f"[data-sample='{sample['sample']}'] .token:not(.context)", "nodes => nodes.map((node) => node.className)"
        )
        shades = [int(re.search(r"shade-(\d)", names)[1]) for names in classes]
        by_value = [shade for _, shade in sorted(zip(map(abs, values), shades, strict=True))]
        assert by_value == sorted(by_value) and len(set(shades)) > 2
        assert ["below" in names for names in classes] == [value < 0 for value in values]
    dropped, legend = window.page.locator(".beside .dropped").last, window.page.locator(".shades .dropped").first
    for marking, is_marked in (("underlined", True), ("greyed", True), ("unmarked", False)):
        window.page.locator("#marking").select_option(marking)
        style = dropped.evaluate(
            "node => { const style = getComputedStyle(node);"
            " return [style.textDecorationLine, style.backgroundImage, style.backgroundSize, style.paddingBlockEnd]; }"
        )
        assert style[0] == "none" and ("gradient" in style[1]) == is_marked
        if is_marked:  # narrower than the token, and in the space below its glyphs
            assert style[2] == "calc(100% - 3px) 2px" and float(style[3].removesuffix("px")) >= 4
        inks = [one.evaluate("node => getComputedStyle(node).color") for one in (dropped, legend)]
        assert inks[0] == inks[1]
    assert dropped.get_attribute("role") == "deletion"


def test_the_legend_tells_the_ends_of_the_scale_and_both_outlines(show):
    report = example()
    page = show(report).page
    legend = page.locator(".shades")
    values = sorted(v for s in report["samples"] for at in s["at"].values() for v in at["score"] if v is not None)
    low, high = (values[round(share * (len(values) - 1))] for share in (0.02, 0.98))
    assert values[0] < low and values[-1] > high
    assert f"Score {low:.4g} or less" in legend.text_content() and f"{high:.4g} or more" in legend.text_content()
    styles = {
        one.text_content(): one.evaluate("node => getComputedStyle(node).outlineStyle")
        for one in legend.locator(".flipped").all()
    }
    assert styles == {"newly kept": "solid", "newly dropped": "dashed"}
    for sample in report["samples"]:
        for at in sample["at"].values():
            at["score"] = [None if value is None else 0.5 for value in at["score"]]
    assert "or " not in show(report).page.locator(".shades").text_content()


def test_only_what_was_recorded_of_a_token_is_told(show):
    report = example()
    sample, weighted = report["samples"][:2]
    last, last_weighted = (len(one["tokens"]["text"]) - 1 for one in (sample, weighted))
    assert sample["at"]["60"]["weight"] is None
    weighted["at"]["60"]["weight"] = [0.25] * (last_weighted + 1)
    window = show(report)
    window.token(sample["sample"], last).hover()
    sync_api.expect(window.figure("Position")).to_have_text(str(last))
    assert "Weight" not in window.panel() and "Entropy" in window.panel()
    window.token(weighted["sample"], last_weighted).hover()
    sync_api.expect(window.figure("Weight")).to_have_text("0.25")


def test_commands_are_whole_and_break_between_words_alone(show):
    report = example()
    command = "python -m megatron_sstoken.train " + " ".join(
        f"--section.name_of_a_setting_{n}=a/b/c-{n}" for n in range(60)
    )
    report["runs"][0]["command"] = command
    for screen in SCREENS:
        window = show(report, screen)
        code = window.page.locator(".command code").first
        assert code.text_content() == command and window.overflow() == 0
        assert code.evaluate("node => node.scrollHeight <= node.clientHeight && node.scrollWidth <= node.clientWidth")
        words = "nodes => nodes.every((node) => node.getBoundingClientRect().height < 30)"
        assert screen == "phone" or code.locator("span").evaluate_all(words)
        code.click()
        assert window.page.evaluate("getSelection().toString()").split() == command.split()


def test_hardware_that_was_not_there_is_not_shown(show):
    report = example()
    report["runs"][1]["versions"]["device"] = "NVIDIA H100"
    for run in report["runs"]:
        run["settings"]["hardware"] = {"gpu": "h100"}
    window = show(report)
    window.unfold(window.page.locator("#settings summary"))
    shown = ["hardware.gpu" in text for text in window.page.locator("#settings details").all_text_contents()]
    assert shown == [False, True, False]


def test_text_is_copied_as_it_is(show):
    report = example()
    window = show(report)
    sample = report["samples"][0]
    copied = window.page.evaluate(
        "() => { const node = document.querySelector('.tokens'); getSelection().selectAllChildren(node);"
        " return getSelection().toString(); }"
    )
    assert copied.rstrip("\n") == "".join(sample["tokens"]["text"]).rstrip("\n")
    mark = window.page.locator(".tokens .newline").first.evaluate("node => getComputedStyle(node, '::before').content")
    assert "↵" in mark


CONTRAST = """() => {
  const canvas = Object.assign(document.createElement('canvas'), { width: 1, height: 1 });
  const brush = canvas.getContext('2d', { willReadFrequently: true });
  const over = (colours) => {
    brush.fillStyle = '#fff'; brush.fillRect(0, 0, 1, 1);
    for (const colour of colours) { brush.fillStyle = colour; brush.fillRect(0, 0, 1, 1); }
    return [...brush.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (colour) => colour.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, n) => sum + v * [0.2126, 0.7152, 0.0722][n], 0);
  const seen = new Map();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || node.closest('script, style, [hidden], :disabled, .unseen, option')) continue;
    const grounds = [];
    for (let one = node; one; one = one.parentElement) grounds.unshift(getComputedStyle(one).backgroundColor);
    const ink = node instanceof SVGElement ? getComputedStyle(node).fill : getComputedStyle(node).color;
    const key = [...grounds, ink].join();
    if (seen.has(key)) continue;
    const [a, b] = [light(over(grounds)), light(over([...grounds, ink]))].sort((x, y) => y - x);
    seen.set(key, [(a + 0.05) / (b + 0.05), node.className.baseVal ?? node.className, node.textContent.slice(0, 30)]);
  }
  return [...seen.values()].sort((x, y) => x[0] - y[0]);
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_themes_have_contrast(show, theme):
    window = show(example())
    window.page.emulate_media(color_scheme=theme)
    ground = "getComputedStyle(document.body).backgroundColor"
    by_system = window.page.evaluate(ground)
    for metric in ("score", "rel"):
        window.page.locator("#metric").select_option(metric)
        found = window.page.evaluate(CONTRAST)
        assert len(found) > 10 and found[0][0] >= 4.5, found[:3]
    other = {"light": "dark", "dark": "light"}[theme]
    window.page.locator("#theme").select_option(other)
    assert window.page.evaluate(ground) != by_system
    window.page.locator("#theme").select_option(theme)
    assert window.page.evaluate(ground) == by_system


@pytest.mark.parametrize("report", [example(), hostile()], ids=["example", "hostile"])
def test_a_phone_scrolls_downwards_only(show, report):
    window = show(report, "phone")
    assert window.overflow() == 0
    sample = report["samples"][0]["sample"]
    window.token(sample, 5).tap()
    sync_api.expect(window.figure("Position")).to_have_text("5")
    box = window.page.locator(".panel").bounding_box()
    assert box["y"] >= 0 and box["y"] + box["height"] <= PHONE["viewport"]["height"] + 1
    window.unfold(window.page.locator("summary"))
    assert window.overflow() == 0


def test_paper_gets_the_samples_without_controls(show):
    window = show(example())
    window.page.emulate_media(media="print")
    assert not window.page.locator("#search").is_visible() and not window.page.locator(".panel").is_visible()
    assert window.page.locator(".token").first.is_visible()


def test_hostile_text_is_text(show):
    report = hostile()
    window = show(report)
    page = window.page
    window.unfold(page.locator("summary"))
    page.get_by_role("button", name="Show all").click()
    texts = "nodes => nodes.map((node) => JSON.stringify(node.textContent))"  # halves of pairs would be lost on the way

    def texts_of(selector: str) -> list[str]:
        return [json.loads(text) for text in page.eval_on_selector_all(selector, texts)]

    assert texts_of("[data-sample='0'] [data-index]") == [*HOSTILE, LONG]
    assert set(texts_of("#types .lone")) == {*HOSTILE, LONG, "empty"} - {""}
    assert texts_of("#notes li") == [*HOSTILE, LONG]
    assert texts_of("h1") == ["".join(HOSTILE)]
    assert set(texts_of("#verdict p")) == {" ".join([*HOSTILE, LONG])}
    shown = set(texts_of("#settings bdi"))
    assert set(HOSTILE) <= shown and {f"{text}.{text}" for text in HOSTILE} <= shown
    assert page.locator("img, iframe, object, embed, base, form, link, [onerror], [onload], [onmouseover]").count() == 0
    assert page.locator("script").count() == 2
    assert window.overflow() == 0


def test_marks_of_direction_stay_in_their_token(show):
    """Right-to-left text reads from the right, and a token's override does not turn round the tokens after it."""
    report = example()
    sample = report["samples"][0]
    texts = ["abc", "\u202e", "def", " ", "ghi", "\n", "שלום", " ", "עולם", " abc"]
    sample["tokens"] = {"text": texts, "id": [0] * len(texts), "role": [0] * len(texts)}
    page = show(report).page
    lefts = page.eval_on_selector_all(
        f"[data-sample='{sample['sample']}'] [data-index]",
        "nodes => nodes.map((node) => node.getBoundingClientRect().left)",
    )
    assert lefts[0] < lefts[2] < lefts[4]
    assert lefts[6] > lefts[8] > lefts[9]
    first_letter = page.locator(f"[data-sample='{sample['sample']}'] [data-index='2']").evaluate(
        "node => { const range = new Range(); range.setStart(node.firstChild, 0); range.setEnd(node.firstChild, 1);"
        " return range.getBoundingClientRect().left; }"
    )
    assert first_letter == pytest.approx(lefts[2], abs=0.5)


def test_the_policy_stops_what_would_leave_the_page(browser, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(render(example()), encoding="utf-8")
    window = Window(browser, WIDE)
    window.open(path)
    window.page.evaluate("fetch('http://127.0.0.1:9/').catch(() => 0)")
    window.page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'alert(1)'}))")
    window.page.evaluate("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/x.png'}))")
    window.wait_for(lambda: sum("Content Security Policy" in event for event in window.events) >= 3)
    window.page.context.close()
    assert not any("dialog" in event for event in window.events)


def test_these_tests_notice_text_that_is_not_escaped(browser, tmp_path, monkeypatch):
    """Each guard taken away: the hostile report runs something, or the page is not drawn."""
    monkeypatch.setattr(page_module, "as_script_data", lambda report: json.dumps(report))
    path = tmp_path / "page.html"
    path.write_text(re.sub(r"<meta http-equiv[^>]*>", "", render(hostile())), encoding="utf-8")
    window = Window(browser, WIDE)
    window.open(path)
    assert window.page.locator("img").count() > 0
    window.wait_for(lambda: "dialog: 1" in window.events)
    window.page.context.close()

"""The page in a real browser: it opens without a word, draws, zooms, fits, can be read, and runs nothing of the data.

Where no Chromium is found this is left out, but not in continuous integration.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browser import chromium, needs_chromium
from report_folders import HOSTILE, a_run

from switchcli.report import html_page
from switchcli.report.charts import Axis, lines
from switchcli.report.comparison import compare
from switchcli.report.html_page import charts, page
from switchcli.report.run_report import Report, parts
from switchcli.report.runs import Run, read
from switchcli.report.series import group_by_recipe
from switchcli.terminal.table import Table

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

pytestmark = needs_chromium
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


class Seen:
    """What a page did while it was open."""

    def __init__(self, opened: Page) -> None:
        self.words: list[str] = []
        self.requests: list[str] = []
        opened.on("console", lambda message: self.words.append(message.text))
        opened.on("pageerror", lambda error: self.words.append(str(error)))
        opened.on("dialog", lambda dialog: self.words.append(dialog.message))
        opened.route(re.compile(".*"), lambda route: (self.requests.append(route.request.url), route.continue_()))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two series of two seeds; names, recipes, tasks, languages and samples are what an enemy would choose."""
    folder = tmp_path_factory.mktemp("report")
    harmful = "".join(HOSTILE)
    samples = [{"input": text, "target": text, "prediction": text} for text in HOSTILE]
    result = {"samples": samples, "texts": {text: {"neg_log_perplexity": -2.0} for text in HOSTILE}}
    result["tasks"] = {text: {"score": {"value": 50.0}} for text in HOSTILE}
    runs = []
    for seed in range(2):
        for name, experts in (("dense", 0), (HOSTILE[2].replace("/", ""), 4)):
            path = a_run(
                folder / f"{name}-{seed}",
                lambda step, seed=seed, experts=experts: (step / 50) ** 0.5 - 5 + seed / 9 + experts / 9,
                seed=seed,
                experts=experts,
                model={"size": harmful, harmful: experts},
                result=result,
            )
            runs.append(read_as(path))
    file = folder / "report.html"
    file.write_text(
        page(f"report {harmful}", parts(Report(compare(group_by_recipe(runs), None, None, 1), [], [harmful])))
    )
    return file


def read_as(path: Path) -> Run:
    import yaml

    return read(path, yaml.safe_load((path / "recipe.yaml").read_text(encoding="utf-8")))


def opened(browser: Browser, file: Path, size: dict[str, int], scheme: str) -> tuple[Page, Seen]:
    """The page with all that is folded open, when everything is drawn."""
    context = browser.new_context(viewport=size, color_scheme=scheme, has_touch=size == PHONE, is_mobile=size == PHONE)
    tab = context.new_page()
    seen = Seen(tab)
    tab.goto(file.as_uri())
    tab.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    tab.wait_for_function("[...document.querySelectorAll('.plot')].every((one) => one.view)", timeout=60_000)
    return tab, seen


def test_a_page_without_charts_has_no_script() -> None:
    text = page("a <b>", [Table(("x",), [["<i>"]], "t & u", "why")])
    assert "<script" not in text
    assert "script-src" not in text
    assert "<h1>a &lt;b&gt;</h1>" in text
    assert "t &amp; u" in text
    assert "<td>&lt;i&gt;</td>" in text


def test_one_library_and_one_table_serve_several_charts() -> None:
    harm = "</script><script>window.hacked = 1</script><!--"
    rows = [(harm, step, value, value, value) for step, value in enumerate((1 / 3, 2.0))]
    table = Table(("series", "step", "value", "least", "most"), rows, name="t")
    figures = [lines(name, name, "", table, Axis("step", "s"), Axis("value", "v"), [harm]) for name in ("one", "two")]
    text = page("p", [charts(figures)])
    assert text.count("<script") == text.count("</script>") == 3
    assert "<!--" not in text
    assert text.count("0.333333") == 3  # the mean, least and most
    assert text.count("window.vegaEmbed=") == 1
    assert len(text) < 1_100_000


def test_a_page_keeps_all_digits_of_a_step() -> None:
    table = Table(("series", "step", "value", "least", "most"), [("a", 1234567.0, 1.0, 1.0, 1.0)], name="t")
    text = page("p", [charts([lines("one", "one", "", table, Axis("step", "s"), Axis("value", "v"), ["a"])])])
    assert '"step":[1234567]' in text


def test_the_library_ships_with_its_versions_and_licenses() -> None:
    folder = Path(html_page.__file__).parent / "vega"
    licenses = (folder / "LICENSES.txt").read_text(encoding="utf-8").splitlines()
    (versions,) = re.findall(r"npm install .*", (folder / "README.md").read_text(encoding="utf-8"))
    for package, version in re.findall(r"(vega[\w-]*)@([\d.]+)", versions):
        assert f"{package} {version} (BSD-3-Clause)" in licenses
        assert f'"{version}"' in (folder / "vega-embed.min.js").read_text(encoding="utf-8")


@pytest.mark.integration
@pytest.mark.parametrize(("size", "scheme"), [(DESKTOP, "light"), (PHONE, "dark")], ids=["desktop", "phone"])
def test_it_draws_fits_is_readable_and_says_nothing(
    browser: Browser, report: Path, size: dict[str, int], scheme: str
) -> None:
    tab, seen = opened(browser, report, size, scheme)
    assert seen.words == []
    assert seen.requests == [report.as_uri()]
    plots = tab.locator(".plot").all()
    assert len(plots) == 2 + 2 + 1 + 2 + 2  # held out, training, tokens/s, routing, load
    for plot in plots:
        drawn = plot.locator("svg path").evaluate_all("(paths) => paths.map((path) => path.getAttribute('d') ?? '')")
        assert sum(path.count(",") > 1 or path.count("h") > 0 for path in drawn) > 1
        assert not any("NaN" in path for path in drawn)
    assert tab.evaluate("document.documentElement.scrollWidth") <= size["width"]
    over = tab.evaluate(
        """(width) => [...document.querySelectorAll("body *")]
            .filter((one) => !one.closest(".scroll") && one.getBoundingClientRect().right > width + 1)
            .map((one) => one.outerHTML.slice(0, 200))""",
        size["width"],
    )
    assert over == []
    below = tab.evaluate(
        """[...document.querySelectorAll(".plot svg text")]
            .filter((one) => one.getBoundingClientRect().bottom > one.closest("svg").getBoundingClientRect().bottom + 3)
            .map((one) => one.textContent)"""
    )
    assert below == []  # a legend ends above the chart's caption
    assert too_faint(tab) == {}

    def shown() -> list[int]:
        count = "(lines) => lines.filter((line) => line.getAttribute('opacity') !== '0').length"
        return [plot.locator(".mark-line path").evaluate_all(count) for plot in plots]

    before = shown()
    assert before[:2] == [2, 2]
    legend = plots[0].locator(".role-legend-label text")
    for modifiers, lines_left in (
        ([], 1),
        (["Shift"], 2),
    ):  # a click on a series shows it alone, Shift adds another one
        legend.nth(len(modifiers)).click(modifiers=modifiers)
        tab.wait_for_timeout(300)
        assert shown()[:2] == [lines_left, 2]
        assert too_faint(tab) == {}
    assert shown() == before
    tab.context.close()


@pytest.mark.integration
def test_a_phone_shows_the_series_with_its_verdict_first_and_scrolls_only_the_table(
    browser: Browser, report: Path
) -> None:
    tab, _ = opened(browser, report, PHONE, "light")
    table = tab.locator("#overview .scroll").first
    first, second = (table.locator(f"tr:nth-child(3) td:nth-child({column})") for column in (1, 2))
    assert second.inner_text() in ("better", "worse", "no difference seen")
    box = second.bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= PHONE["width"]
    before = first.bounding_box()
    table.evaluate("(one) => { one.scrollLeft = 200 }")
    assert table.evaluate("(one) => one.scrollLeft") > 0
    assert first.bounding_box() == before  # the series stays in sight
    assert tab.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    tab.context.close()


@pytest.mark.integration
def test_a_heat_map_has_readable_rows_and_labels(browser: Browser, tmp_path: Path) -> None:
    experts = 256
    run = read_as(a_run(tmp_path / "run", experts=experts))
    file = tmp_path / "page.html"
    file.write_text(page("p", parts(Report(compare(group_by_recipe([run]), None, None, 1), [], []))))
    tab, _ = opened(browser, file, DESKTOP, "light")
    plot = tab.locator('[data-figure^="load_"]').first
    cell = plot.locator(".mark-rect.role-mark path").first.bounding_box()
    assert cell is not None
    assert cell["height"] >= 3
    assert cell["width"] >= 3
    # Vega hides labels that would touch others by their opacity. Boxes are [left, right, top, bottom].
    texts = plot.locator("text").evaluate_all(
        """(texts) => texts.filter((one) => getComputedStyle(one).opacity !== "0").map((one) => {
            const box = one.getBoundingClientRect();
            return [one.textContent, [box.left, box.right, box.top, box.bottom]];
        })"""
    )
    assert {"0", str(experts - 1)} <= {text for text, _ in texts}
    for (one, (left, right, top, bottom)), (other, box) in combinations(texts, 2):
        apart = left >= box[1] or box[0] >= right
        assert apart or min(bottom, box[3]) - max(top, box[2]) < 4, (one, other)  # a box has room around its letters
    tab.context.close()


def too_faint(tab: Page) -> dict[str, float]:
    """Return the texts and lines whose contrast with their background, as WCAG counts it, is less than 4.5."""
    return tab.evaluate(
        """() => {
        const parts = (color) => color.match(/[\\d.]+/g).map(Number);
        const light = (color) => parts(color).slice(0, 3).map((part) => part / 255)
            .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
            .reduce((sum, part, place) => sum + part * [0.2126, 0.7152, 0.0722][place], 0);
        const behind = (one) => {
            const color = getComputedStyle(one).backgroundColor;
            if (parts(color).length < 4 || parts(color)[3] > 0) return color;
            return one.parentElement && behind(one.parentElement);
        };
        const found = {};
        const note = (name, ink, paper) => {
            const [more, less] = [light(ink), light(paper)].sort((one, other) => other - one);
            const ratio = (more + 0.05) / (less + 0.05);
            if (ratio < 4.5) found[name] = ratio;
        };
        const texts = "h1, h2, h3, p, a, th, td, dt, dd, summary, figcaption, text";
        for (const one of document.querySelectorAll(texts)) {
            const style = getComputedStyle(one);
            const ink = one.tagName === "text" ? style.fill : style.color;
            note(`${one.tagName} ${one.textContent.slice(0, 40)}`, ink, behind(one.closest("svg") ?? one));
        }
        const page = getComputedStyle(document.body).backgroundColor;
        for (const line of document.querySelectorAll(".mark-line path"))
            note(getComputedStyle(line).stroke, getComputedStyle(line).stroke, page);
        return found;
    }"""
    )


@pytest.mark.integration
def test_nothing_of_the_data_runs(browser: Browser, report: Path) -> None:
    tab, seen = opened(browser, report, DESKTOP, "light")
    tab.mouse.move(400, 400)
    for symbol in tab.locator(".role-legend-symbol path").all():
        symbol.click()
    assert tab.evaluate("window.hacked") is None
    assert tab.locator("main script, main img, main iframe, svg [onload]").count() == 0
    assert seen.words == []
    said = tab.locator("body").inner_text()
    for text in HOSTILE[:6]:
        assert text in said
    for link in tab.locator("a").all():
        assert (link.get_attribute("href") or "").startswith("#")
    # What were to slip through the escaping would still not run.
    tab.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hacked = 1\">')")
    tab.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'window.hacked = 1'}))")
    assert tab.evaluate("window.hacked") is None
    assert any("Content Security Policy" in words for words in seen.words)
    tab.context.close()


def axis(plot: Locator) -> list[float]:
    """What the axis of steps goes from and to."""
    return plot.evaluate("(one) => one.view.scale('x').domain()")


@pytest.mark.integration
def test_ctrl_and_the_wheel_zoom_and_the_wheel_alone_scrolls(browser: Browser, report: Path) -> None:
    tab, _ = opened(browser, report, DESKTOP, "light")
    plot = tab.locator(".plot").first
    plot.scroll_into_view_if_needed()
    before, box = axis(plot), plot.bounding_box()
    assert before == pytest.approx([8.2, 101.8])  # from a tenth on, with room for the last marker
    assert box is not None
    tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tab.mouse.wheel(0, -300)
    tab.wait_for_timeout(200)
    assert axis(plot) == before
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    assert box is not None
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tab.mouse.move(*middle)
    tab.keyboard.down("Control")
    tab.mouse.wheel(0, -300)
    tab.keyboard.up("Control")
    tab.wait_for_function("(one) => one.view.scale('x').domain()[0] > 9", arg=plot.element_handle())
    low, high = axis(plot)
    assert before[0] < low < high < before[1]
    tab.mouse.dblclick(*middle)
    tab.wait_for_function("(one) => one.view.scale('x').domain()[0] < 8.3", arg=plot.element_handle())
    tab.context.close()

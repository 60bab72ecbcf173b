"""The page and the figures of a routing atlas: what a map shows is what was counted, and text does nothing."""

import csv
import io
import re
from pathlib import Path

import pytest
from browser import chromium, needs_chromium
from messages import lacking
from routing_survey import LAYERS, a_survey

from switchcli.report import charts
from switchcli.report.charts import write_files
from switchcli.report.html_page import write_page
from switchcli.report.routing_page import PAGE_EXPERTS, every_figure, parts, title, token_tables


def test_the_maps_show_what_was_counted() -> None:
    survey = a_survey()
    figures = {figure.name: figure for figure in every_figure(survey)}
    assert len(figures) == len([*every_figure(survey)]) == 2 * (2 + 2 * 3)
    suffix = LAYERS[0].replace(".", "_")
    position = figures[f"position_1_{suffix}"]
    assert position.title == "Encoder block 12: By position"
    cells = position.table.rows
    assert {(label, expert): round(float(times or 0), 6) for label, expert, times in cells} == {
        (label, expert): round(4 * 10 * expert / 60, 6) if label == "256-511" else 0.0
        for label in ("0-255", "256-511")
        for expert in range(4)
    }
    assert set(figures[f"sentinel_0_{suffix}"].table.column("sentinel")) == {"<extra_id_0>"}  # the other is rare
    told = figures["told_0"].table
    assert told.rows[:2] == [
        ("Encoder block 12", "token", 0.5),
        ("Encoder block 12", "text", 0.0),
    ]


def test_of_many_experts_those_with_most_tokens_are_drawn() -> None:
    """They are the last ones of the report."""
    drawn, words = 0, f"{PAGE_EXPERTS} {2 * PAGE_EXPERTS} experts --json"
    most_used = {*range(PAGE_EXPERTS, 2 * PAGE_EXPERTS)}
    for figure in every_figure(a_survey(experts=2 * PAGE_EXPERTS)):
        for column in {"expert", "first", "second"} & {*figure.table.columns}:
            assert set(figure.table.column(column)) == ({*range(PAGE_EXPERTS)} if column == "second" else most_used), (
                figure.name
            )
            assert not lacking(figure.title, words)
            drawn += 1
    assert drawn == 2 * (1 + 2 * 3)


def test_the_title_names_the_run_from_within_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = tmp_path / "mine" / "checkpoints" / "step-00000010"
    step.mkdir(parents=True)
    for within, checkpoint in (("mine", "."), ("mine", f"checkpoints/{step.name}"), ("mine/checkpoints", step.name)):
        monkeypatch.chdir(tmp_path / within)
        survey = a_survey()
        survey["models"] = [{**survey["models"][0], "checkpoint": checkpoint}]
        assert not lacking(title(survey), "mine step 10")


def test_the_page_has_every_figure_and_no_text_that_does_anything(tmp_path: Path) -> None:
    survey = a_survey(pieces=["</script><script>alert(1)</script>", "<b>&\u202e"])
    write_page(tmp_path / "page.html", title(survey), parts(survey))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert set(re.findall('data-figure="([^"]+)"', page)) == {figure.name for figure in every_figure(survey)}
    assert re.search(r"<title>.*\bone, step 10\b.*\btwo, step 10\b.*</title>", page)
    assert "alert(1)</script>" not in page
    assert "&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;\u00a02.0x" in page
    assert "&lt;b&gt;&amp;\\u202e\u00a01,234" in page


@pytest.mark.integration
def test_figures_are_files(tmp_path: Path) -> None:
    survey = {**a_survey(pieces=['a,"b', "\n"]), "drift": None}
    figures = [*every_figure(survey)][:2]
    write_files(figures, token_tables(survey), tmp_path / "figures")
    drawn = {f"{figure.name}.{ending}" for figure in figures for ending in ("csv", "png", "svg")}
    written = {path.name for path in (tmp_path / "figures").iterdir()}
    assert written == {*drawn, "tokens_0.csv", "tokens_1.csv"}
    with (tmp_path / "figures/tokens_1.csv").open(newline="", encoding="utf-8") as file:
        heading, *tokens = csv.reader(file)
    assert heading == ["layer", "expert", "piece", "count", "lift"]
    assert tokens == [
        [layer, expert, piece, "1234", "2.0"]
        for layer in ("Encoder block 12", "Decoder block 12, self attention")
        for expert in "123"
        for piece in ('a,"b', "\n")
    ]
    rows = [*csv.reader(io.StringIO((tmp_path / "figures/told_0.csv").read_text()))]
    assert rows[1] == ["Encoder block 12", "token", "0.5"]
    assert figures[0].title in charts.svg(figures[0])


@pytest.mark.integration
@needs_chromium
def test_a_browser_draws_every_map_with_a_cell_for_each_count_and_has_nothing_to_say(tmp_path: Path) -> None:
    survey = a_survey(pieces=["</script><script>window.ran = true</script>"])
    write_page(tmp_path / "page.html", title(survey), parts(survey))
    figures = {figure.name: figure for figure in every_figure(survey)}
    with chromium() as browser:
        tab = browser.new_page()
        said: list[str] = []
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("console", lambda message: said.append(message.text))
        tab.goto((tmp_path / "page.html").as_uri())
        for details in tab.locator("details").all():
            details.locator("summary").click()
        for name, figure in figures.items():
            plot = tab.locator(f'[data-figure="{name}"]')
            plot.locator("svg").wait_for()
            cells = len(figure.table.rows)
            assert plot.locator(".mark-rect.role-mark path").count() == cells, name
        assert tab.evaluate("window.ran") is None
        assert said == []
